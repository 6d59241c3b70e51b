"""Distilling step-by-step: train small T5 students on labels and rationales (Hsieh et al., 2023)."""

__version__ = "0.1.0"
