from __future__ import annotations

import torch
from torch import Tensor

from ._core import core, row_major, rows


def forward(gate: Tensor, up: Tensor) -> Tensor:
    n, width = gate.shape
    gate, up = row_major(gate), row_major(up)
    y = torch.empty((n, width), dtype=gate.dtype)
    core.swiglu(n, width, rows(gate), rows(up), rows(y))
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    n, width = gate.shape
    dy, gate, up = row_major(dy), row_major(gate), row_major(up)
    core.swiglu_backward(n, width, rows(dy), rows(gate), rows(up), rows(dgate), rows(dup))
