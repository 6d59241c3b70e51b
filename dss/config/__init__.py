"""The configuration of an experiment, and its gin files."""
