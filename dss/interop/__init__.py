"""Reads and writes checkpoints of Hugging Face and T5X, and writes CTranslate2's."""
