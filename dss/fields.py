"""Validation of configuration fields: types and ranges."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from dss.errors import ConfigError

__all__ = ["check_at_least", "check_rate", "check_types"]

UNIONS = (typing.Union, types.UnionType)


def _fits(value: Any, hint: Any) -> bool:
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind in UNIONS:
        return any(_fits(value, arg) for arg in args)
    if kind is typing.Literal:
        return value in args
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(v, args[1]) for v in value.values())
    if kind is tuple:
        items = args[:1] * len(value) if args[1:] == (...,) and _is_list(value) else args
        return _is_list(value) and len(items) == len(value) and all(map(_fits, value, items))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _type_text(hint: Any) -> str:
    parts = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    if any(typing.get_origin(part) is typing.Literal for part in parts):
        choices = [choice for part in parts for choice in typing.get_args(part) or (None,)]
        return "one of " + ", ".join(map(repr, choices))
    return f"of type {hint.__name__ if isinstance(hint, type) else hint}"


def check_types(config: Any) -> None:
    """Checks the type of each field of a dataclass against its annotation.

    Raises:
      ConfigError: if a field has a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            where = f"{type(config).__name__}.{field.name}"
            raise ConfigError(f"{where} must be {_type_text(hints[field.name])}, got {value!r}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Checks that the named fields of a configuration are None or at least `least`.

    Raises:
      ConfigError: if one is less.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            where = f"{type(config).__name__}.{name}"
            raise ConfigError(f"{where} must be at least {least}, got {value}")


def check_rate(config: Any, *names: str) -> None:
    """Checks that the named fields of a configuration are in [0, 1), such as dropout rates.

    Raises:
      ConfigError: if one is outside.
    """
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{type(config).__name__}.{name} must be in [0, 1), got {value}")
