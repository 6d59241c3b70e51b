"""gin at the edge: files and flags in, an `Experiment` out, and back into a run's config.gin."""

import ast
import dataclasses
import io
import logging
import re
import tokenize
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

import gin
from dss.config.experiment import DataConfig, Experiment
from dss.data.rationales import RationaleConfig
from dss.errors import UserError, first_line, unknown_name
from dss.parallel.config import MeshConfig
from dss.paths import BYTE_ORDER_MARK, CONFIG_FILE, find_gin_file, gin_root, write_whole
from dss.student.config import DecodingConfig, T5Config
from dss.training.config import OptimizerConfig, TrainerConfig
from gin import config_parser

__all__ = [
    "gin_flags",
    "gin_name",
    "load_config",
    "parse_beside",
    "parse_gin",
    "save_config",
]

T = TypeVar("T")

DEFAULTS = "runs/train.gin"
GIN_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    LookupError,
    AttributeError,
    ImportError,
    RuntimeError,
    OSError,
)
NESTED = {
    "student": T5Config,
    "data": DataConfig,
    "rationales": RationaleConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "mesh": MeshConfig,
    "decoding": DecodingConfig,
}

# What gin's parser calls the statements that a run's file may not have.
STATEMENTS = {
    "ImportStatement": "an import",
    "IncludeStatement": "an include",
    "BlockDeclaration": "a block",
}
CLASSES = {"Experiment", *(kind.__name__ for kind in NESTED.values())}

_experiment = gin.external_configurable(Experiment, "Experiment")
for _kind in NESTED.values():
    gin.external_configurable(_kind, _kind.__name__)


def _open(path: str) -> io.StringIO:
    """Returns a gin file without a byte order mark, from a bucket too; gin names it in errors."""
    file = io.StringIO(epath.Path(path).read_text("utf-8").removeprefix(BYTE_ORDER_MARK))
    file.name = path
    return file


def _but_folders(exists: Callable[[str], bool]) -> Callable[[str], bool]:
    """Returns one of gin's tests for a file, which a folder of the package's name does not break.

    gin looks for `runs/train.gin` in a package `runs` first, and takes a folder of that name where
    one works for a package without a file.
    """

    def check(path: str) -> bool:
        try:
            return exists(path)
        except TypeError:
            return False

    return check


# Ours stands before gin's own, which know neither a byte order mark nor a bucket.
gin.config._FILE_READERS[:] = [
    (_open, lambda path: epath.Path(path).is_file()),
    *((read, _but_folders(exists)) for read, exists in gin.config._FILE_READERS),
]


def _binding(flag: str) -> str:
    """Returns the gin binding of `NAME=VALUE`; a value that is no gin literal is a text."""
    name, equals, value = flag.partition("=")
    if not equals:
        raise UserError(f"--gin.{flag}: give it as --gin.NAME=VALUE")
    if not value.startswith(("@", "%")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = repr(value)
    return f"{name} = {value}"


class _NotAValueError(Exception):
    """A run's file holds something other than values; gin appends the line."""


class _ValuesOnly(config_parser.ParserDelegate):
    """Refuses references to anything but the classes of an experiment."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        if scoped_configurable_name not in CLASSES or not evaluate:
            raise _NotAValueError(f"@{scoped_configurable_name}")
        return scoped_configurable_name

    def macro(self, macro_name: str) -> None:
        raise _NotAValueError(f"%{macro_name}")


def _check_run_file(path: epath.Path) -> None:
    """Refuses a run's config.gin that is a program.

    A gin file can import modules and call functions. A user's own may; a run directory may have
    been downloaded, and nothing of it is executed.

    Args:
      path: the config.gin of a run directory.

    Raises:
      UserError: if it imports, includes, or names anything but the fields of an experiment and
        their values.
    """

    def refuse(what: str, line: int) -> UserError:
        return UserError(
            f"{path}:{line}: {what} in the configuration of a run, which may hold values only; "
            "nothing was read from it"
        )

    try:
        text = path.read_text("utf-8").removeprefix(BYTE_ORDER_MARK)
        for statement in config_parser.ConfigParser(text, _ValuesOnly()):
            line = statement.location.line_num
            if not isinstance(statement, config_parser.BindingStatement):
                kind = type(statement).__name__
                raise refuse(STATEMENTS.get(kind, kind), line)
            if statement.scope or statement.selector not in CLASSES:
                raise refuse(f"{statement.scope or statement.selector!r}", line)
    except _NotAValueError as error:
        where = re.search(r"line (\d+)", str(error))
        raise refuse(f"{first_line(error)!r}", int(where[1]) if where else 1) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration: {first_line(error)}") from None


def _read(
    files: Sequence[str], bindings: Sequence[str], search: Sequence[str], make: Callable[[], T]
) -> T:
    """Returns what `make` makes when gin has read some files and bindings."""
    gin.clear_config()
    root = gin_root()
    for folder in (str(root), *search):
        gin.add_config_file_search_path(folder)
    paths = [find_gin_file(file, search) for file in files]
    for path in map(epath.Path, paths):
        if path.name == CONFIG_FILE:
            _check_run_file(path)
    logging.disable(logging.ERROR)  # gin says at length what it also raises
    try:
        gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
        return make()
    except GIN_ERRORS as error:
        raise UserError(f"configuration: {_describe(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _parse(
    files: Sequence[str],
    bindings: Sequence[str],
    search: Sequence[str],
    beside: Sequence[type] = (),
) -> Experiment:
    def make() -> Experiment:
        for kind in beside:
            gin.get_configurable(kind)()
        return _experiment()

    experiment = _read(files, bindings, search, make)
    read = {*_names(gin.operative_config_str()), *_names(_defaults())}
    for name in _names(gin.config_str()):
        if name not in read:  # nothing reads it: a slip of the pen, or a student that is not there
            if "." not in name:
                raise unknown_name("macro", name, [n for n in read if "." not in n])
            raise UserError(
                f"configuration: {name} is set and nothing reads it; without a students/ file give "
                "Experiment.dtype, Experiment.remat and DROPOUT_RATE"
                if name.startswith("T5Config.")
                else f"configuration: {name} is set and nothing reads it"
            )
    return experiment


def _defaults() -> str:
    return (gin_root() / DEFAULTS).read_text(encoding="utf-8")


def _macro_fields() -> dict[str, str]:
    """Returns the field that each macro sets."""
    return {m: f for f, m in re.findall(r"^([\w.]+) = %(\w+)", _defaults(), re.MULTILINE)}


def _names(config: str) -> list[str]:
    """Returns the names of the macros and fields that a configuration's text binds."""
    return re.findall(r"^([\w.]+) = ", config, re.MULTILINE)


def _describe(error: Exception) -> str:
    """Returns gin's message in a line, with the file and line that it appends to it."""
    where = re.search(r"(?:file|In) \"?([^\"\n]+\.gin)\"?,? line (\d+)", str(error))
    text = first_line(error)
    unset = re.search(r"configurable 'macro' .* in scope '(\w+)'", str(error))
    if unset and "'value'" in text:
        return f"macro {unset[1]!r} is used and never set"
    if isinstance(error, KeyError):
        text = text.strip("'\"")
    return f"{text} ({where[1]}:{where[2]})" if where else text


def parse_gin(
    files: Sequence[str],
    flags: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    beside: Sequence[type] = (),
) -> Experiment:
    """Returns the experiment of gin files and flags, over the defaults of runs/train.gin.

    Args:
      files: `--gin_file`, in order; looked for here, among the files of dss and in search_paths.
      flags: `NAME=VALUE` of `--gin.NAME=VALUE`.
      search_paths: more folders.
      beside: other configurations that the same files set; see `parse_beside`.

    Raises:
      UserError: a missing file, an unknown name, a value out of range.
    """
    return _parse([DEFAULTS, *files], [_binding(flag) for flag in flags], search_paths, beside)


def parse_beside(
    kind: type[T],
    files: Sequence[str],
    flags: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> T:
    """Returns another configuration than an experiment's that gin files and flags set.

    Names that it does not read are the experiment's: `parse_gin` checks them.

    Args:
      kind: its class, registered with gin.
      files: see `parse_gin`.
      flags: see `parse_gin`.
      search_paths: see `parse_gin`.

    Raises:
      UserError: see `parse_gin`.
    """
    bindings = [_binding(flag) for flag in flags]
    return _read([DEFAULTS, *files], bindings, search_paths, gin.get_configurable(kind))


def _values(experiment: Experiment) -> dict[str, Any]:
    """Returns the value of every field by the name that gin knows it by."""
    configs = {"Experiment": experiment}
    configs |= {kind.__name__: getattr(experiment, name) for name, kind in NESTED.items()}
    return {
        f"{prefix}.{field.name}": getattr(config, field.name)
        for prefix, config in configs.items()
        if config is not None
        for field in dataclasses.fields(config)
        if not (config is experiment and field.name in NESTED)
    }


def gin_name(path: str) -> str:
    """Returns how a user sets a field of an experiment.

    Args:
      path: the field, such as `trainer.train_steps`.

    Returns:
      Its macro, as `TRAIN_STEPS`, or where it has none `TrainerConfig.patience`.
    """
    nested, _, field = path.rpartition(".")
    kind = NESTED[nested] if nested else Experiment
    name = f"{kind.__name__}.{field}"
    macros = {field: macro for macro, field in _macro_fields().items()}
    return macros.get(name, name)


def gin_flags(experiment: Experiment, base: Experiment) -> list[str]:
    """Returns the `--gin.NAME=VALUE` that make one experiment of another.

    Args:
      experiment: the one that is wanted; it has a student if the other has.
      base: the one without the flags, such as of a student's gin file alone.
    """
    macros = {field: macro for macro, field in _macro_fields().items()}
    before, flags = _values(base), []
    if base.student is None and experiment.student is not None:
        flags.append(f"--gin.Experiment.student=@{T5Config.__name__}()")
    for name, value in _values(experiment).items():
        if name in before and before[name] == value:
            continue
        text = value if isinstance(value, str) and _is_plain(value) else repr(value)
        flags.append(f"--gin.{macros.get(name, name)}={text}")
    return flags


def _is_plain(text: str) -> bool:
    """Returns whether a flag's value that reads so is this text."""
    return _binding(f"x={text}") == f"x = {text!r}"


def _lines(prefix: str, config: Any) -> list[str]:
    return [
        f"{prefix}.{field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if not (isinstance(config, Experiment) and field.name in NESTED)
    ]


def save_config(experiment: Experiment, run: epath.Path) -> None:
    """Writes a run's config.gin: every value, so that it needs no other file to be read."""
    blocks = [_lines("Experiment", experiment)]
    for name, kind in NESTED.items():
        value = getattr(experiment, name)
        if value is not None:
            blocks[0].append(f"Experiment.{name} = @{kind.__name__}()")
            blocks.append(_lines(kind.__name__, value))
    text = "\n\n".join("\n".join(block) for block in blocks) + "\n"
    write_whole(run / CONFIG_FILE, text)


def load_config(run: epath.PathLike, flags: Sequence[str] = ()) -> Experiment:
    """Returns the experiment of a run directory.

    Args:
      run: the directory.
      flags: `NAME=VALUE` of gin values to read differently; a macro stands for its field.

    Raises:
      UserError: it is no run directory.
    """
    path = epath.Path(run).expanduser() / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run}: no run directory: it has no {CONFIG_FILE}")
    # A run's file has no macros: what they set is in the fields that the defaults name.
    fields, bindings = _macro_fields(), []
    for flag in flags:
        name, equals, value = flag.partition("=")
        bindings.append(_binding(fields.get(name, name) + equals + value))
    # A mixture takes the place of the run's method, and a method that of its mixture.
    for given, other in (("mixture", "method"), ("method", "mixture")):
        if any(binding.startswith(f"Experiment.{given} = ") for binding in bindings):
            bindings.insert(0, f"Experiment.{other} = None")
    return _parse([str(path)], bindings, ())
