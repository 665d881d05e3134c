from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda as core
from ..cpu._core import ABSENT, rows

DTYPES = (torch.bfloat16,)
CAPABILITY = (9, 0)  # wgmma


def chunk(
    hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, inverse_temperature: float,
    z_loss: float, nll: Tensor, lse: Tensor, entropy: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    (n, h), v, device = hidden.shape, head.shape[0], hidden.device
    floats = {"dtype": torch.float32, "device": device}
    scratch = torch.empty(core.linear_cross_entropy_scratch(n, v), **floats)
    grads = None
    if weight is not None:
        grads = (torch.empty(n, v, dtype=torch.bfloat16, device=device), torch.empty(n, **floats), torch.empty_like(hidden))
    u, s, x = grads or (None, None, None)
    with torch.cuda.device(device):
        core.linear_cross_entropy(
            n, h, v, rows(hidden), rows(head), labels.data_ptr(), ignore_index, inverse_temperature, z_loss,
            0 if weight is None else weight.data_ptr(), nll.data_ptr(), lse.data_ptr(),
            0 if entropy is None else entropy.data_ptr(), rows(u) if grads else ABSENT, rows(x) if grads else ABSENT,
            s.data_ptr() if grads else 0, scratch.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )
    return grads
