"""Examples, labels, teacher outputs and the datasets that hold them."""

from dss.data.registry import get_dataset, register, set_data_root

__all__ = ["get_dataset", "register", "set_data_root"]
