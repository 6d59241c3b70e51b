"""SeqIO registrations, one module per dataset; importing it registers its tasks and mixtures."""
