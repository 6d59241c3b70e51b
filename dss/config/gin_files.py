"""Reads an `Experiment` from gin files and flags, and writes a run's config.gin."""

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
from dss.errors import ConfigError, first_line, unknown_name
from dss.parallel.config import MeshConfig
from dss.paths import BYTE_ORDER_MARK, CONFIG_FILE, find_gin_file, gin_root, write_whole
from dss.student.config import DecodingConfig, T5Config
from dss.training.config import OptimizerConfig, TrainerConfig
from gin import config_parser

__all__ = [
    "gin_flags",
    "gin_name",
    "load_config",
    "macro_of",
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

# The statements of gin's parser that are not allowed in a run's config.gin.
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
    """Opens a gin file, local or in a bucket, without its byte order mark."""
    file = io.StringIO(epath.Path(path).read_text("utf-8").removeprefix(BYTE_ORDER_MARK))
    file.name = path  # gin's error messages contain it
    return file


def _without_type_error(exists: Callable[[str], bool]) -> Callable[[str], bool]:
    """Returns one of gin's file checks with TypeError counted as False.

    gin looks for `runs/train.gin` in a Python package `runs` first. A folder `runs` in the working
    directory is a namespace package, whose missing file makes gin raise TypeError.
    """

    def check(path: str) -> bool:
        try:
            return exists(path)
        except TypeError:
            return False

    return check


# Tried before gin's own readers, which support neither byte order marks nor buckets.
gin.config._FILE_READERS[:] = [
    (_open, lambda path: epath.Path(path).is_file()),
    *((read, _without_type_error(exists)) for read, exists in gin.config._FILE_READERS),
]


def _binding(flag: str) -> str:
    """Returns the gin binding of `NAME=VALUE`; a value that is not a literal becomes a string."""
    name, equals, value = flag.partition("=")
    if not equals:
        raise ConfigError(f"--gin.{flag}: no value; give it as --gin.NAME=VALUE")
    if not value.startswith(("@", "%")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = repr(value)
    return f"{name} = {value}"


class _NotAValueError(Exception):
    """Raised for a run's config.gin with anything but values; gin appends the line number."""


class _ValuesOnly(config_parser.ParserDelegate):
    """Rejects macros, and references to anything but the classes of an experiment."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        if scoped_configurable_name not in CLASSES or not evaluate:
            raise _NotAValueError(f"@{scoped_configurable_name}")
        return scoped_configurable_name

    def macro(self, macro_name: str) -> None:
        raise _NotAValueError(f"%{macro_name}")


def _check_run_file(path: epath.Path) -> None:
    """Checks that a run's config.gin only sets fields of an experiment to values.

    gin files can import modules and call functions. That is safe for a user's own files, but a run
    directory may be a download.

    Args:
      path: the config.gin of a run directory.

    Raises:
      ConfigError: if the file has an import, an include, a macro, or a name other than the fields
        of an experiment.
    """

    def rejected(statement: str, line: int) -> ConfigError:
        return ConfigError(
            f"{path}:{line}: {statement} in the configuration of a run, which may hold values "
            "only; nothing was read from it"
        )

    try:
        text = path.read_text("utf-8").removeprefix(BYTE_ORDER_MARK)
        for statement in config_parser.ConfigParser(text, _ValuesOnly()):
            line = statement.location.line_num
            if not isinstance(statement, config_parser.BindingStatement):
                kind = type(statement).__name__
                raise rejected(STATEMENTS.get(kind, kind), line)
            if statement.scope or statement.selector not in CLASSES:
                raise rejected(f"{statement.scope or statement.selector!r}", line)
    except _NotAValueError as error:
        location = re.search(r"line (\d+)", str(error))
        raise rejected(f"{first_line(error)!r}", int(location[1]) if location else 1) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
        raise ConfigError(f"{path}: not a configuration: {first_line(error)}") from None


def _read(
    files: Sequence[str], bindings: Sequence[str], search: Sequence[str], make: Callable[[], T]
) -> T:
    """Reads gin files and bindings, and returns the result of `make`."""
    gin.clear_config()
    root = gin_root()
    for folder in (str(root), *search):
        gin.add_config_file_search_path(folder)
    paths = [find_gin_file(file, search) for file in files]
    for path in map(epath.Path, paths):
        if path.name == CONFIG_FILE:
            _check_run_file(path)
    logging.disable(logging.ERROR)  # gin logs its errors and raises them too
    try:
        gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
        return make()
    except GIN_ERRORS as error:
        raise ConfigError(f"configuration: {_describe(error)}") from error
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
        if name not in read:  # a misspelled name, or a field of a student that is not configured
            if "." not in name:
                raise unknown_name("macro", name, [n for n in read if "." not in n], ConfigError)
            raise ConfigError(
                f"configuration: {name} is set but not used; without a students/ file give "
                "Experiment.dtype, Experiment.remat and DROPOUT_RATE"
                if name.startswith("T5Config.")
                else f"configuration: {name} is set but not used"
            )
    return experiment


def _defaults() -> str:
    return (gin_root() / DEFAULTS).read_text(encoding="utf-8")


def _macro_fields() -> dict[str, str]:
    """Returns the field that each macro sets."""
    return {m: f for f, m in re.findall(r"^([\w.]+) = %(\w+)", _defaults(), re.MULTILINE)}


def _names(config: str) -> list[str]:
    """Returns the names of the macros and fields that are set in the text of a configuration."""
    return re.findall(r"^([\w.]+) = ", config, re.MULTILINE)


def _describe(error: Exception) -> str:
    """Returns gin's error message as one line, with the file and line that gin appends."""
    location = re.search(r"(?:file|In) \"?([^\"\n]+\.gin)\"?,? line (\d+)", str(error))
    text = first_line(error)
    unset = re.search(r"configurable 'macro' .* in scope '(\w+)'", str(error))
    if unset and "'value'" in text:
        return f"macro {unset[1]!r} is used but not set"
    if isinstance(error, KeyError):
        text = text.strip("'\"")
    missing = isinstance(error, ImportError) and re.search(r"\b(seqio|tensorflow)\b", text)
    if missing and "pip install" not in text:
        text += ": pip install 'dss[seqio]'"
    return f"{text} ({location[1]}:{location[2]})" if location else text


def parse_gin(
    files: Sequence[str],
    flags: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    beside: Sequence[type] = (),
) -> Experiment:
    """Returns the experiment of gin files and flags, over the defaults of runs/train.gin.

    Args:
      files: gin files, in order; relative ones are searched for in the working directory, the gin
        files of dss and `search_paths`.
      flags: `NAME=VALUE` of each `--gin.NAME=VALUE`.
      search_paths: more folders to search for gin files.
      beside: other configuration classes that the same files set; see `parse_beside`.

    Raises:
      ConfigError: if a file is missing, a name is unknown, or a value is invalid.
    """
    return _parse([DEFAULTS, *files], [_binding(flag) for flag in flags], search_paths, beside)


def parse_beside(
    kind: type[T],
    files: Sequence[str],
    flags: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> T:
    """Returns a configuration other than `Experiment` from gin files and flags.

    Unknown names are not errors here: they may be the experiment's, and `parse_gin` checks them.

    Args:
      kind: the class of the configuration, registered with gin.
      files: gin files, in order, as for `parse_gin`.
      flags: `NAME=VALUE` of each `--gin.NAME=VALUE`.
      search_paths: more folders to search for gin files.

    Raises:
      ConfigError: if a file is missing or a value is invalid.
    """
    bindings = [_binding(flag) for flag in flags]
    return _read([DEFAULTS, *files], bindings, search_paths, gin.get_configurable(kind))


def _values(experiment: Experiment) -> dict[str, Any]:
    """Returns the value of every field of an experiment, by the field's name in gin."""
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
    """Returns the name by which gin files and flags set a field of an experiment.

    Args:
      path: the field, such as `trainer.train_steps`.

    Returns:
      The field's macro, such as `TRAIN_STEPS`; without one, the field with its class, such as
      `TrainerConfig.patience`.
    """
    nested, _, field = path.rpartition(".")
    kind = NESTED[nested] if nested else Experiment
    return macro_of(f"{kind.__name__}.{field}")


def macro_of(field: str) -> str:
    """Returns the macro that sets a field with its class, such as `TRAIN_STEPS` for
    `TrainerConfig.train_steps`; without one, the field.
    """
    return {field: macro for macro, field in _macro_fields().items()}.get(field, field)


def gin_flags(experiment: Experiment, base: Experiment) -> list[str]:
    """Returns the flags `--gin.NAME=VALUE` that turn one experiment into another.

    Args:
      experiment: the experiment with the flags; it has a student if `base` has one.
      base: the experiment without the flags, such as that of a student's gin file.
    """
    before, flags = _values(base), []
    if base.student is None and experiment.student is not None:
        flags.append(f"--gin.Experiment.student=@{T5Config.__name__}()")
    for name, value in _values(experiment).items():
        if name in before and before[name] == value:
            continue
        text = value if isinstance(value, str) and _is_plain(value) else repr(value)
        flags.append(f"--gin.{macro_of(name)}={text}")
    return flags


def _is_plain(text: str) -> bool:
    """Returns whether a flag's value is read as this string without quotes."""
    return _binding(f"x={text}") == f"x = {text!r}"


def _lines(prefix: str, config: Any) -> list[str]:
    return [
        f"{prefix}.{field.name} = {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if not (isinstance(config, Experiment) and field.name in NESTED)
    ]


def save_config(experiment: Experiment, run: epath.Path) -> None:
    """Writes a run's config.gin with the values of all fields."""
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
      run: the run directory.
      flags: `NAME=VALUE` of gin values to override, by field or macro.

    Raises:
      ConfigError: if it is not a run directory.
    """
    path = epath.Path(run).expanduser() / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{run}: no run directory: it has no {CONFIG_FILE}")
    # A run's file has no macros, so a macro is replaced by the field that it sets.
    fields, bindings = _macro_fields(), []
    for flag in flags:
        name, equals, value = flag.partition("=")
        bindings.append(_binding(fields.get(name, name) + equals + value))
    # A mixture replaces the run's method and teacher, and a method replaces its mixture.
    for given, others in (("mixture", ("method", "teacher")), ("method", ("mixture",))):
        if any(binding.startswith(f"Experiment.{given} = ") for binding in bindings):
            bindings[:0] = [f"Experiment.{other} = None" for other in others]
    return _parse([str(path)], bindings, ())
