"""Frozen dataclasses from JSON: every key must be a field, every field without a default must be given."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read(cls: type[T], file: Path, **overrides: Any) -> T:
    """``cls`` from a JSON file; ``overrides`` replace its keys. Raises ValueError naming the file, key and value."""
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is not JSON: {e}") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}; expected a JSON object")
    try:
        return build(cls, raw | overrides)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def build(cls: type[T], raw: dict[str, Any], where: str = "") -> T:
    """``cls`` from a dict. Raises ValueError for unknown, missing or ill-typed keys, with the path to them."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw.keys() - fields.keys():
        near = difflib.get_close_matches(key, fields, 1)
        raise ValueError(f"{where}{key} is not known; expected " + (f"{near[0]}?" if near else f"some of {sorted(fields)}"))
    hints = typing.get_type_hints(cls)
    for name, f in fields.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}{name} is missing")
    return cls(**{name: _value(hints[name], value, where + name) for name, value in raw.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; expected one of {args}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; expected an object")
        return build(hint, value, where + ".")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {value!r}; expected a list")
        return tuple(_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; expected an object")
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
