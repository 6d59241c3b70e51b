"""Run directories: training, resuming and using a student."""
