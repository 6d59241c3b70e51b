"""Sweeps: one experiment across students, sizes, methods and seeds."""
