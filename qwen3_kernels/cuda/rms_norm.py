from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import row_major, rows


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    n, h = x.shape
    x, weight = row_major(x), weight.contiguous()
    if residual is not None:
        residual = row_major(residual)
    y = torch.empty((n, h), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        core.rms_norm(n, h, eps, rows(x), rows(residual), rows(weight), rows(y), rows(total), rstd.data_ptr(), stream)
    return y, total, rstd


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    n, width = h.shape
    dy, h, weight = row_major(dy), row_major(h), weight.contiguous()
    if dh is not None:
        dh = row_major(dh)
    dx = torch.empty((n, width), dtype=h.dtype, device=h.device)
    dweight = torch.empty_like(weight)
    with torch.cuda.device(h.device):
        partial = torch.empty(core.rms_norm_partials(n, width), width, dtype=torch.float32, device=h.device)
        core.rms_norm_backward(
            n, width, rows(dy), rows(dh), rows(h), rows(weight), rstd.data_ptr(), rows(dx), rows(dweight),
            partial.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )
    return dx, dweight
