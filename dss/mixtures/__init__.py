"""Tasks and mixtures: the inputs and targets that a student is trained on."""
