"""Tokenization of a mixture, and packed batches."""
