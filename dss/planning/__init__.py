"""Estimates of a run's memory, compute, communication and time, from its compiled train step."""
