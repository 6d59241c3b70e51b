"""The way in and out: Hugging Face and T5X."""
