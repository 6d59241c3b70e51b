"""Examples, teacher outputs, tasks, the token store and batches."""

from dss.data.registry import get_dataset, register, set_data_root
from dss.data.tasks import get_mixture, mixture_names

__all__ = ["get_dataset", "get_mixture", "mixture_names", "register", "set_data_root"]
