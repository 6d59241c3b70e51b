"""Distilling step-by-step (Hsieh et al., 2023): small T5 students from large language models.

The names below are the public API; see docs/python.md for examples. Each is imported at its first
use, so that `import dss` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dss.api import Annotation, Prediction, Student, annotate, load, train
    from dss.config.experiment import DataConfig, Experiment
    from dss.data.datasets import Dataset
    from dss.data.rationales import RationaleConfig
    from dss.errors import DssError
    from dss.evaluation.result import Evaluation
    from dss.mixtures.methods import Method
    from dss.parallel.config import MeshConfig
    from dss.student.config import DecodingConfig, T5Config
    from dss.training.config import OptimizerConfig, TrainerConfig

__version__ = "0.1.0"

__all__ = [
    "Annotation",
    "DataConfig",
    "Dataset",
    "DecodingConfig",
    "DssError",
    "Evaluation",
    "Experiment",
    "MeshConfig",
    "Method",
    "OptimizerConfig",
    "Prediction",
    "RationaleConfig",
    "Student",
    "T5Config",
    "TrainerConfig",
    "annotate",
    "load",
    "train",
]

_MODULES = {
    "dss.api": ("Annotation", "Prediction", "Student", "annotate", "load", "train"),
    "dss.config.experiment": ("DataConfig", "Experiment"),
    "dss.data.datasets": ("Dataset",),
    "dss.data.rationales": ("RationaleConfig",),
    "dss.errors": ("DssError",),
    "dss.evaluation.result": ("Evaluation",),
    "dss.mixtures.methods": ("Method",),
    "dss.parallel.config": ("MeshConfig",),
    "dss.student.config": ("DecodingConfig", "T5Config"),
    "dss.training.config": ("OptimizerConfig", "TrainerConfig"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dss' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
