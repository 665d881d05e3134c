"""Argument checks shared by the public ops. Every message names the op, the argument, its value and what would be right."""

from __future__ import annotations

from torch import Tensor


def require(ok: bool, op: str, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {name} is {value}; expected {wanted}")


def same_device(op: str, like: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != like.device:
            raise ValueError(f"{op}: {name} is on {t.device}; expected {like.device}, where the first argument is")


def same_dtype(op: str, like: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.dtype != like.dtype:
            raise TypeError(f"{op}: {name} is {t.dtype}; expected {like.dtype}, the dtype of the first argument")


def floating(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} is {t.dtype}; expected a floating-point dtype")
