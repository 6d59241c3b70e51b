"""Examples, labels, teacher outputs and the datasets that hold them."""
