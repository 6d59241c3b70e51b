"""Configuration of experiments, and its gin files."""
