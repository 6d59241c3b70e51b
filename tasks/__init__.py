"""SeqIO registrations, a module a dataset; importing one registers its tasks and mixtures."""
