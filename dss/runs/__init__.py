"""Run directories: training and resuming runs, and using their students."""
