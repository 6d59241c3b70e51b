"""Stubs of T5X's modules, for parsing gin files where T5X is not installed.

Every name can be imported and called with any arguments. Parsing therefore checks the files'
syntax, their macros, and the names of dss's functions and of their parameters.
"""

import importlib.machinery
import sys
import types

NAMES = {
    "t5x": (),
    "t5x.adafactor": ("Adafactor", "standard_logical_factor_rules"),
    "t5x.decoding": ("temperature_sample",),
    "t5x.examples": (),
    "t5x.examples.t5": (),
    "t5x.examples.t5.network": ("T5Config", "Transformer"),
    "t5x.gin_utils": ("summarize_gin_config",),
    "t5x.models": ("EncoderDecoderModel",),
    "t5x.optimizers": ("OptaxWrapper",),
    "t5x.partitioning": ("PjitPartitioner", "standard_logical_axis_rules"),
    "t5x.trainer": ("Trainer",),
    "t5x.utils": (
        "CheckpointConfig",
        "DatasetConfig",
        "RestoreCheckpointConfig",
        "SaveCheckpointConfig",
    ),
}


def _stub(name: str, module: str) -> type:
    def init(self, *args, **options):
        self.args, self.options = args, options

    return type(name, (), {"__init__": init, "__module__": module})


def install() -> None:
    """Makes the stubs importable."""
    for module, names in NAMES.items():
        stub = types.ModuleType(module)
        stub.__spec__ = importlib.machinery.ModuleSpec(module, None, origin=__file__)
        stub.__path__ = []
        for name in names:
            setattr(stub, name, _stub(name, module))
        sys.modules[module] = stub
        parent, _, child = module.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
