"""Parses gin/t5x/ as T5X does, with every dataset, method and variant, for training, evaluation and
inference; prints the values of each as a JSON line.

python -m tests.integrations.parse_t5x_gin DATA_ROOT
"""

import contextlib
import importlib.util
import json
import logging
import re
import sys

import gin
from tests.integrations import t5x_stubs

SCRIPTS = {"train": "train", "eval": "evaluate", "infer": "infer"}
VALUES = {
    "train": ["MODEL_DIR = 'folder'"],
    "eval": ["CHECKPOINT_PATH = 'folder'", "EVAL_OUTPUT_DIR = 'out'"],
    "infer": ["CHECKPOINT_PATH = 'folder'", "INFER_OUTPUT_DIR = 'out'"],
}


def configurable(name):
    def function(**options):
        return options

    function.__name__ = name
    function.__module__ = "__main__"
    setattr(sys.modules["__main__"], name, function)
    return gin.configurable(function)


def main(data_root):
    from dss.paths import gin_root

    logging.disable(logging.ERROR)  # gin logs each folder without the file
    gin.add_config_file_search_path(str(gin_root()))
    scripts = {mode: configurable(name) for mode, name in SCRIPTS.items()}
    for mode, script in scripts.items():
        parse_all(mode, script, gin_root(), data_root)


def parse_all(mode, script, root, data_root):
    data = [f"DATA_ROOT = '{data_root}'", "VOCABULARY = 'bytes'"]
    datasets, methods, variants = (
        sorted(root.glob(f"{folder}/*.gin")) for folder in ("datasets", "methods", "variants")
    )
    for given_files in (
        *([methods[0], path] for path in datasets),
        *([datasets[0], path] for path in methods),
        *([datasets[0], methods[0], path] for path in variants),
    ):
        gin.clear_config()
        files = [f"t5x/{mode}.gin", *map(str, given_files)]
        gin.parse_config_files_and_bindings(files, [*VALUES[mode], *data])
        text = gin.config_str()
        macros = sorted(set(re.findall(r"%(\w+)", text)))
        bound = {name: gin.query_parameter(f"%{name}") for name in macros}
        given = sorted(script())  # constructs all objects that the file passes to T5X
        row = {"mode": mode, "file": given_files[-1].stem, "macros": bound, "given": given}
        print(json.dumps(row))


if __name__ == "__main__":
    if importlib.util.find_spec("t5x") is None:
        t5x_stubs.install()
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  before TensorFlow
    main(*sys.argv[1:])
