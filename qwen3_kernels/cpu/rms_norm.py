from __future__ import annotations

import torch
from torch import Tensor

from ._core import core, row_major, rows


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    n, h = x.shape
    x, weight = row_major(x), weight.contiguous()
    y = torch.empty((n, h), dtype=x.dtype)
    if residual is not None:
        residual = row_major(residual)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(n, dtype=torch.float32)
    core.rms_norm(n, h, eps, rows(x), rows(residual), rows(weight), rows(y), rows(total), rstd.data_ptr())
    return y, total, rstd


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    n, width = h.shape
    dy, h, weight = row_major(dy), row_major(h), weight.contiguous()
    if dh is not None:
        dh = row_major(dh)
    dx = torch.empty((n, width), dtype=h.dtype)
    dweight = torch.empty(width, dtype=torch.float32)
    core.rms_norm_backward(
        n, width, rows(dy), rows(dh), rows(h), rows(weight), rstd.data_ptr(), rows(dx), dweight.data_ptr()
    )
    return dx, dweight.to(weight.dtype)
