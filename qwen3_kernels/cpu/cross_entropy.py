from __future__ import annotations

import torch
from torch import Tensor

from ._core import core, row_major, rows


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    n, v = logits.shape
    logits, labels = row_major(logits), labels.contiguous()
    nll, lse = (torch.empty(n, dtype=torch.float32) for _ in range(2))
    core.cross_entropy(n, v, rows(logits), labels.data_ptr(), ignore_index, nll.data_ptr(), lse.data_ptr())
    return nll, lse


def backward(
    dnll: Tensor, dlse: Tensor | None, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    n, v = logits.shape
    logits, labels, dnll = row_major(logits), labels.contiguous(), dnll.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    dlogits = torch.empty((n, v), dtype=logits.dtype)
    core.cross_entropy_backward(
        n, v, dnll.data_ptr(), 0 if dlse is None else dlse.data_ptr(), rows(logits), labels.data_ptr(), ignore_index,
        lse.data_ptr(), rows(dlogits),
    )
    return dlogits
