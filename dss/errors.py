"""The exceptions for errors that a user can fix, and their messages."""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DssError",
    "MissingPackageError",
    "TeacherError",
    "first_line",
    "missing_package",
    "unknown_name",
]


class DssError(Exception):
    """Invalid input. The message is one line: what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """


class ConfigError(DssError, ValueError):
    """A configuration, a gin file or a flag is invalid."""


class DataError(DssError):
    """Data are missing or malformed, or do not fit their configuration."""


class CheckpointError(DssError):
    """A checkpoint is missing or corrupt, or its format or its shapes do not fit."""


class TeacherError(DssError):
    """A prompt or a request is invalid, or the endpoint refuses to answer."""


class MissingPackageError(DssError, ImportError):
    """A package of an optional extra is not installed."""


def missing_package(feature: str, package: str | None, extra: str) -> MissingPackageError:
    """Returns the error for a feature whose extra is not installed.

    Args:
      feature: subject of the message, such as "the report".
      package: module that cannot be imported, as in `ModuleNotFoundError.name`.
      extra: extra of dss with that package.

    >>> str(missing_package("the report", "jinja2", "report"))
    "the report needs jinja2 (not installed): pip install 'dss[report]'"
    """
    return MissingPackageError(
        f"{feature} needs {package} (not installed): pip install 'dss[{extra}]'"
    )


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, truncated; the type's name without a message.

    >>> first_line(ValueError("\\n  no such thing\\nand more"))
    'no such thing'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def unknown_name(
    kind: str, name: str, known: Iterable[str], error: type[DssError] = DssError
) -> DssError:
    """Returns the error for an unknown name, which suggests similar known names.

    >>> str(unknown_name("student", "smal", ["small", "base"]))
    "unknown student 'smal'; did you mean 'small'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        hint = "known: " + (", ".join(known) if known else "none")
    return error(f"unknown {kind} {name!r}; {hint}")
