"""Cross-entropy over a large vocabulary, in fp32 whatever the dtype of the logits, with an optional z-loss.

The z-loss ``z * logsumexp(logits)^2`` is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_ref(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean", z_loss: float = 0.0
) -> Tensor:
    """Plain torch, through ``logsumexp`` in fp32 (fp64 for fp64 logits)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    kept = labels != ignore_index
    lse = torch.logsumexp(x, dim=-1)
    target = x.gather(-1, labels.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    return _reduce((lse - target).masked_fill(~kept, 0.0), lse, kept, reduction, z_loss)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean", z_loss: float = 0.0
) -> Tensor:
    """Negative log-likelihood of ``labels`` under ``softmax(logits)``.

    Args:
        logits: [..., V], float32, bfloat16 or float16.
        labels: [...], int64, in [0, V) or ``ignore_index``.
        reduction: "mean" over the kept labels (0 when none is kept), "sum", or "none".
        z_loss: weight of logsumexp² added per kept label.

    Returns:
        float32: a scalar, or [...] for "none".

    Bytes moved (b per element): forward N·V·b, backward 2·N·V·b.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit. IndexError (CPU): a label out of range;
        on CUDA that row's loss is NaN, since a check would need a host sync.
    """
    floating("cross_entropy", logits=logits)
    require(reduction in REDUCTIONS, "cross_entropy", "reduction", repr(reduction), f"one of {REDUCTIONS}")
    require(logits.dim() >= 1 and logits.shape[-1] > 0, "cross_entropy", "logits", tuple(logits.shape), "[..., V], V > 0")
    require(labels.shape == logits.shape[:-1], "cross_entropy", "labels", tuple(labels.shape),
            f"shape {tuple(logits.shape[:-1])}, that of logits without the last dimension")
    if labels.dtype != torch.int64:
        raise TypeError(f"cross_entropy: labels is {labels.dtype}; expected torch.int64")
    same_device("cross_entropy", logits, labels=labels)
    V = logits.shape[-1]
    backend = dispatch.resolve("cross_entropy", logits.device.type, logits.dtype)
    if backend == "torch" or logits.numel() == 0:
        return cross_entropy_ref(logits, labels, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss)
    nll, lse = _forward(logits.reshape(-1, V), labels.reshape(-1), ignore_index, backend)
    kept = labels != ignore_index
    return _reduce(nll.view(labels.shape), lse.view(labels.shape), kept, reduction, z_loss)


def _reduce(nll: Tensor, lse: Tensor, kept: Tensor, reduction: str, z_loss: float) -> Tensor:
    if z_loss:
        nll = nll + z_loss * lse.masked_fill(~kept, 0.0).square()  # masked first: 0 * NaN is no zero gradient
    if reduction == "none":
        return nll
    return nll.sum() if reduction == "sum" else nll.sum() / kept.sum().clamp(min=1)


@torch.library.custom_op("qwen3::cross_entropy", mutates_args=())
def _forward(logits_NV: Tensor, labels_N: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor]:
    """(nll [N] float32, 0 where ignored; lse [N] float32)."""
    return dispatch.backend("cross_entropy", backend).forward(logits_NV, labels_N, ignore_index)


@_forward.register_fake
def _(logits_NV, labels_N, ignore_index, backend):
    return tuple(logits_NV.new_empty(logits_NV.shape[0], dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("qwen3::cross_entropy_backward", mutates_args=())
def _backward(
    dnll_N: Tensor, dlse_N: Tensor | None, logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, ignore_index: int,
    backend: str,
) -> Tensor:
    """dlogits = (dnll·[kept] + dlse)·softmax − dnll·[kept]·onehot, in the logits' dtype."""
    return dispatch.backend("cross_entropy", backend).backward(dnll_N, dlse_N, logits_NV, labels_N, lse_N, ignore_index)


@_backward.register_fake
def _(dnll_N, dlse_N, logits_NV, labels_N, lse_N, ignore_index, backend):
    return logits_NV.new_empty(logits_NV.shape)


def _setup_context(ctx, inputs, output):
    logits, labels, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dnll, dlse):
    logits, labels, lse = ctx.saved_tensors
    if dnll is None:
        dnll = torch.zeros_like(lse)
    return _backward(dnll, dlse, logits, labels, lse, ctx.ignore_index, ctx.backend), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
