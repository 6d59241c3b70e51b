"""Fast checks of a command's arguments, before JAX is imported and data are read.

Paths in a bucket, and values that only the library can check, are left to the command itself.
"""

import argparse
import ast
import os
from collections.abc import Sequence
from pathlib import Path

from dss.cli.options import run_flags
from dss.errors import DssError
from dss.paths import CONFIG_FILE, check_no_pipes, in_bucket, is_stream

__all__ = [
    "check_flags",
    "check_folders",
    "check_input",
    "check_new_folder",
    "check_output",
    "check_run",
    "check_run_probabilities",
    "check_source",
    "check_vocabulary",
]


def check_run(run: str) -> None:
    """Raises DssError if a folder is not a run directory."""
    if not in_bucket(run) and not (_local(run) / CONFIG_FILE).is_file():
        raise DssError(f"{run}: no run directory: it has no {CONFIG_FILE}")


def check_run_probabilities(args: argparse.Namespace) -> None:
    """Raises DssError if the student that the options select generates labels as text.

    Args:
      args: the options of `add_run_options`.
    """
    from dss.config.data import open_mixture
    from dss.config.gin_files import load_config
    from dss.evaluation.calibration import check_probabilities

    if args.generate:
        raise DssError("--generate: generated labels have no probabilities; leave it out")
    check_no_pipes(os.path.expanduser(args.run), below=False)
    experiment = load_config(args.run, run_flags(args))
    if experiment.has_task:
        check_probabilities(open_mixture(experiment, must_exist=False), experiment.decoding)


def check_folders(folders: Sequence[str]) -> None:
    """Raises DssError if a folder of runs does not exist."""
    for folder in folders:
        if not in_bucket(folder) and not _local(folder).is_dir():
            raise DssError(f"{folder}: no such folder; give run directories or folders of them")


def check_input(file: str) -> None:
    """Raises DssError if a file to read does not exist."""
    if in_bucket(file):
        return
    if _local(file).is_dir():
        raise DssError(f"{file}: a folder; give a file")
    if not _local(file).exists():
        raise DssError(f"{file}: no such file")


def check_output(option: str, file: str) -> None:
    """Raises DssError if a file cannot be written.

    Args:
      option: the option that names the file, such as "--json".
      file: the file to write; an existing one is replaced.
    """
    if in_bucket(file):
        return
    path = _local(file)
    if path.is_dir() or not path.parent.is_dir():
        raise DssError(
            f"{option}={file}: cannot be written: it is a folder, or its folder does not exist"
        )
    # A file is replaced by a temporary one beside it, which needs write access to the folder.
    if not os.access(path if is_stream(path) else path.parent, os.W_OK):
        raise DssError(f"{option}={file}: no permission to write")


def check_new_folder(folder: str, command: str) -> None:
    """Raises DssError if a folder to create exists and is not empty.

    Args:
      folder: the folder to create.
      command: the command's name for the message, "import" or "export".
    """
    path = _local(folder)
    if in_bucket(folder) or not path.exists():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise DssError(f"{folder}: not empty; {command} into a new folder")


def check_source(source: str) -> None:
    """Raises DssError if a checkpoint is neither an existing folder nor a possible hub id."""
    form, colon, name = source.partition(":")
    if not colon or form not in ("hf", "t5x"):
        form, name = "", source
    if in_bucket(name) or _local(name).is_dir():
        return
    if form == "t5x" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DssError(f"{name}: no such folder; give a checkpoint's folder or a hub id")


def check_vocabulary(file: str) -> None:
    """Raises DssError if a vocabulary, a file or "bytes", does not exist."""
    if file != "bytes" and not in_bucket(file) and not _local(file).is_file():
        raise DssError(f"{file}: no such vocabulary file; give a SentencePiece model or 'bytes'")


def check_flags(flags: Sequence[str], *, trains: bool = False) -> None:
    """Raises DssError if data or a vocabulary given by flags do not exist.

    Args:
      flags: gin values as `NAME=VALUE`; the last value of a name counts.
      trains: True to check the initial checkpoint too, unless the run resumes, which does not read
        it.
    """
    values = {name: _value(text) for name, _, text in (flag.partition("=") for flag in flags)}
    paths = {name: path for name, path in values.items() if path and not in_bucket(path)}
    if (root := paths.get("DATA_ROOT")) and not _local(root).is_dir():
        raise DssError(f"DATA_ROOT {root}: no such folder")
    if (data := paths.get("DATASET_PATH")) and not _local(data).exists():
        raise DssError(f"DATASET_PATH {data}: no such file or folder")
    if vocabulary := paths.get("VOCABULARY"):
        check_vocabulary(vocabulary)
    is_new = trains and not (_local(values.get("MODEL_DIR") or "") / CONFIG_FILE).is_file()
    if is_new and (checkpoint := paths.get("INITIAL_CHECKPOINT_PATH")):
        check_source(checkpoint)


def _value(text: str) -> str | None:
    """Returns the string value of a flag, quoted or not; None for a value of another type."""
    if text.startswith(("@", "%")):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, str) else None


def _local(path: str) -> Path:
    return Path(path).expanduser()
