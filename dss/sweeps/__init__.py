"""Sweeps over methods, students, training-set sizes and seeds."""
