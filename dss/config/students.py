"""The students of gin/students, by name."""

import ast
import re

from dss.errors import ConfigError, unknown_name
from dss.paths import gin_root
from dss.student.config import T5Config

__all__ = ["named_student"]


def named_student(name: str) -> T5Config:
    """Returns the configuration of a student of gin/students.

    >>> named_student("small").d_model
    512

    Raises:
      ConfigError: if there is no such student.
    """
    files = {path.stem: path for path in (gin_root() / "students").glob("*.gin")}
    if name not in files:
        raise unknown_name("student", name, files, ConfigError)
    text = files[name].read_text(encoding="utf-8")
    values = re.findall(r"^T5Config\.(\w+) = ([^#\n]+)", text, re.MULTILINE)
    return T5Config(**{field: ast.literal_eval(value.strip()) for field, value in values})
