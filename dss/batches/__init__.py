"""From the text of a mixture to packed batches."""
