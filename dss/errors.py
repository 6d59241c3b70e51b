"""The one exception that stands for a mistake the user can mend."""

import difflib
from collections.abc import Iterable

__all__ = ["MissingPackageError", "UserError", "first_line", "missing_package", "unknown_name"]


class UserError(Exception):
    """Wrong input from outside: one line that says what is wrong, where, and what to do.

    The command line prints the message and exits with status 2; no traceback. Library callers
    may catch it like any other exception.
    """


class MissingPackageError(UserError, ImportError):
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
    """Returns the first line of an error's message, shortened; its type's name if it has none.

    >>> first_line(ValueError("\\n  no such thing\\nand more"))
    'no such thing'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not known, with the nearest known names in it.

    >>> str(unknown_name("student", "smal", ["small", "base"]))
    "unknown student 'smal'; did you mean 'small'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        hint = "known: " + (", ".join(known) if known else "none")
    return UserError(f"unknown {kind} {name!r}; {hint}")
