"""Tasks and mixtures: what a student reads and learns to write."""
