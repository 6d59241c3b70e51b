"""Distilling step-by-step (Hsieh et al., 2023): small T5 students from large language models."""

__version__ = "0.1.0"
