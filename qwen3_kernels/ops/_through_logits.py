"""A chunk of `linear_cross_entropy` on a backend's cross-entropy kernels: its logits in fp32, then their gradient."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkGrads(NamedTuple):
    """What the gradients of n tokens are made of: u @ head and u.T @ hidden, or where there is an ``s``

    dhidden = s · (u @ head) + own · head[labels],    dhead = u.T @ x + the sum of own · hidden in each label's row
    """

    u: Tensor  # [n, V]
    x: Tensor  # [n, H]
    s: Tensor | None = None  # [n] float32
    own: Tensor | None = None  # [n] float32


def chunk(
    kernels: ModuleType, hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int,
    inverse_temperature: float, z_loss: float, nll: Tensor, lse: Tensor, entropy: Tensor | None,
) -> ChunkGrads | None:
    """See `linear_cross_entropy`; ``kernels`` has the forward and backward of ``cross_entropy``."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)
    else:  # no fp32 result on the CPU; plain torch rounds the logits, too
        logits = (hidden @ head.T).float()
    if inverse_temperature != 1:
        logits *= inverse_temperature
    found_nll, found_lse = kernels.forward(logits, labels, ignore_index)
    kept = labels != ignore_index
    nll.copy_(found_nll)
    lse.copy_(found_lse * kept)
    if entropy is not None:
        logp = logits - found_lse.unsqueeze(1)
        entropy.copy_(-(logp.exp() * logp.clamp(min=-1e30)).sum(1) * kept)
        del logp
    if weight is None:
        return None
    weight = weight.float() * kept
    dlse = 2 * z_loss * found_lse * weight if z_loss else None
    dlogits = kernels.backward(weight, dlse, logits, labels, found_lse, ignore_index)
    if inverse_temperature != 1:
        dlogits *= inverse_temperature
    return ChunkGrads(dlogits.to(hidden.dtype), hidden)


def _forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none"), torch.logsumexp(logits, -1)


def _backward(
    dnll: Tensor, dlse: Tensor | None, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    kept = labels != ignore_index
    grad = (logits - lse.unsqueeze(1)).exp_()
    grad *= (dnll if dlse is None else dnll + dlse).unsqueeze(1)
    return grad.scatter_add_(1, labels.masked_fill(~kept, 0).unsqueeze(1), (-dnll * kept).unsqueeze(1))


plain = SimpleNamespace(forward=_forward, backward=_backward)
"""The kernels in plain torch."""
