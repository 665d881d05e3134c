"""The compiled CPU module and how tensors are handed to it."""

from __future__ import annotations

import torch  # before _cpu: both then share torch's OpenMP runtime and its threads
from torch import Tensor

from .. import _cpu as core

__all__ = ["core", "heads", "rows", "row_major", "ABSENT"]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0, 0)


def rows(t: Tensor | None) -> tuple[int, int, int]:
    """(address, dtype code, elements between rows) of a tensor whose last dimension is contiguous."""
    if t is None:
        return ABSENT
    return t.data_ptr(), DTYPE_CODES[t.dtype], t.stride(0) if t.dim() > 1 else t.shape[0]


def heads(t: Tensor) -> tuple[int, int, int, int, int]:
    """(address, dtype code, strides of batch, token and head)"""
    return t.data_ptr(), DTYPE_CODES[t.dtype], 0 if t.dim() == 3 else t.stride(0), t.stride(-3), t.stride(-2)


def row_major(t: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
