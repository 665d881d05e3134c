"""The router of a mixture of experts, and the plan by which tokens are handed to the experts.

One forward gives each token's experts and weights, and what the losses need of the whole distribution: the sum of the
probabilities over tokens and each token's logsumexp. Their gradients meet in one backward that writes the logits'
gradient once; probabilities [N, E] are never stored.

Sources: Qwen3 technical report, section 2 (softmax over all experts, top 8, renormalised); Shazeer et al. 2017 (arXiv
1701.06538) for top-k gating; Ma et al. 2025 (arXiv 2510.11370) for replayed routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device

MAX_EXPERTS, MAX_TOP_K = 512, 16


class RouterStats(NamedTuple):
    """What load-balancing losses and z-loss are made of; both with gradient."""

    prob_sum: Tensor  # [E] float32: sum over the kept tokens of each expert's probability
    lse: Tensor  # [N] float32: logsumexp of each token's logits


class Plan(NamedTuple):
    """Which row of the expert-sorted activations holds what. R = N·K rows; rows from offsets[E] on are unused."""

    offsets: Tensor  # int32 [E + 1]: expert e has the rows offsets[e] to offsets[e + 1]
    token: Tensor  # int32 [R]: the token of row r
    slot: Tensor  # int32 [R]: n·K + k of row r
    inverse: Tensor  # int32 [R]: the row of assignment n·K + k


def moe_router_ref(
    logits: Tensor, top_k: int, *, renormalise: bool = True, expert_ids: Tensor | None = None, mask: Tensor | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RouterStats]:
    """Plain torch, in float32 (float64 for float64)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probs = wide.softmax(-1)
    if expert_ids is None:
        expert_ids = probs.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    # Over the kept logits alone: the same numbers, and defined for replayed experts whose probability is 0 by now.
    weights = wide.gather(1, expert_ids).softmax(-1) if renormalise else probs.gather(1, expert_ids)
    if not return_stats:
        return weights, expert_ids
    kept = probs if mask is None else probs * mask.to(probs.dtype).unsqueeze(1)
    return weights, expert_ids, RouterStats(kept.sum(0), wide.logsumexp(-1))


def moe_router(
    logits: Tensor, top_k: int, *, renormalise: bool = True, expert_ids: Tensor | None = None, mask: Tensor | None = None,
    return_stats: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, RouterStats]:
    """The ``top_k`` most probable experts of each token and their weights, by a softmax in float32.

    Args:
        logits: [N, E].
        top_k: K, at most E. More than 512 experts or 16 a token run in plain torch.
        renormalise: weights sum to 1 over the K experts; else they are the probabilities.
        expert_ids: [N, K] int64 in [0, E): routing replay. These experts are taken, their weights (and gradients) come from
            ``logits``.
        mask: [N], 0 leaves a token (padding) out of ``prob_sum``. It is routed all the same.
        return_stats: also return `RouterStats`.

    Returns:
        (weights [N, K] float32, expert ids [N, K] int64), the most probable first, equal probabilities to the lower index;
        with ``return_stats`` the triple with `RouterStats`. ``weights``, ``prob_sum`` and ``lse`` are differentiable.

    Bytes moved (b per logit): forward N·(E·b + 12·K), backward N·(2·E·b + 12·K).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit. IndexError (CPU): an id out of range; on CUDA, where
        a check would need a host sync, that token's weights are NaN.
    """
    op = "moe_router"
    floating(op, logits=logits)
    require(logits.dim() == 2 and logits.shape[1] > 0, op, "logits", tuple(logits.shape), "[N, E], E > 0")
    N, E = logits.shape
    require(1 <= top_k <= E, op, "top_k", top_k, f"1 to {E}, the number of experts")
    require(mask is None or mask.shape == (N,), op, "mask", None if mask is None else tuple(mask.shape), f"({N},)")
    if expert_ids is not None:
        require(expert_ids.shape == (N, top_k), op, "expert_ids", tuple(expert_ids.shape), f"({N}, {top_k})")
        if expert_ids.dtype != torch.int64:
            raise TypeError(f"{op}: expert_ids is {expert_ids.dtype}; expected torch.int64")
        if expert_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(expert_ids, E)
    same_device(op, logits, expert_ids=expert_ids, mask=mask)
    if logits.dtype == torch.float64 or N == 0:
        out = moe_router_ref(logits, top_k, renormalise=renormalise, expert_ids=expert_ids, mask=mask,
                             return_stats=return_stats)
        return out if N else (out[0].to(torch.float32), *out[1:])
    backend = dispatch.resolve(op, logits.device.type, logits.dtype)
    if E > MAX_EXPERTS or top_k > MAX_TOP_K:
        backend = "torch"
    mask = None if mask is None else mask.float().contiguous()
    weights, ids, prob_sum, lse = _forward(logits, top_k, renormalise, expert_ids, mask, return_stats, backend)
    ids = ids if expert_ids is None else expert_ids
    return (weights, ids, RouterStats(prob_sum, lse)) if return_stats else (weights, ids)


def _check_range(expert_ids: Tensor, E: int) -> None:
    wrong = expert_ids[(expert_ids < 0) | (expert_ids >= E)]
    if len(wrong):
        raise IndexError(f"moe_router: expert_ids holds {wrong[0].item()}; expected 0 to {E - 1}")


def routing_plan(ids: Tensor, num_experts: int) -> Plan:
    """Sorts the assignments of tokens to experts by expert, stably.

    Args:
        ids: [N, K], int64 or int32. Ids outside [0, num_experts), as expert parallelism marks experts of other ranks, are
            dropped: their rows lie behind all others, from ``offsets[num_experts]`` on.

    Returns: `Plan`. All sizes follow from shapes: no host sync, and a CUDA graph may be replayed with other ids.

    Raises ValueError, TypeError: shapes or dtypes that do not fit, or 2^31 assignments and more.
    """
    op = "routing_plan"
    require(ids.dim() == 2, op, "ids", tuple(ids.shape), "[N, K]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids is {ids.dtype}; expected torch.int64 or torch.int32")
    require(ids.numel() < 2**31, op, "ids", tuple(ids.shape), "fewer than 2^31 assignments")
    require(num_experts >= 1, op, "num_experts", num_experts, "at least 1")
    backend = "torch"
    if num_experts <= MAX_EXPERTS and ids.numel():
        backend = _plan_backend(ids.device.type)
    return Plan(*_plan(ids, num_experts, backend))


def _plan_backend(device: str) -> str:
    """The router's, but where `dispatch.use` names one that has no router (for the experts, say)."""
    name = dispatch.resolve("moe_router", device, torch.float32)
    known = name == "torch" or dispatch.unavailable("moe_router", name, device, torch.float32) is None
    return name if known else dispatch.explain("moe_router", device, torch.float32).backend


_plan_backend._dynamo_marked_constant = True


# --- Plain torch.


def torch_plan(ids: Tensor, num_experts: int) -> Plan:
    flat = ids.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat).to(torch.int32)
    by_expert, slot = flat.sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(by_expert, experts, out_int32=True)
    rows = torch.arange(flat.numel(), dtype=torch.int32, device=ids.device)
    inverse = torch.empty_like(rows).scatter_(0, slot, rows)
    return Plan(offsets, (slot // max(ids.shape[1], 1)).int(), slot.int(), inverse)


def _torch_forward(
    logits: Tensor, top_k: int, renormalise: bool, expert_ids: Tensor | None, mask: Tensor | None, stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, ids, (prob_sum, lse) = moe_router_ref(
        logits, top_k, renormalise=renormalise, expert_ids=expert_ids, mask=mask, return_stats=True
    )
    return weights, ids.clone() if ids is expert_ids else ids, prob_sum if stats else prob_sum.new_empty(0), lse


def _torch_backward(
    dweights: Tensor | None, dprob_sum: Tensor | None, dlse: Tensor | None, logits: Tensor, ids: Tensor,
    mask: Tensor | None, renormalise: bool,
) -> Tensor:
    wide = logits.float()
    probs = wide.softmax(-1)  # more accurate than by the logsumexp, whose rounding every probability would share
    dlogits = torch.zeros_like(probs) if dlse is None else probs * dlse.unsqueeze(1)
    dprobs = None
    if dprob_sum is not None:
        dprobs = dprob_sum.expand_as(probs) if mask is None else dprob_sum * mask.unsqueeze(1)
    if dweights is not None and renormalise:
        weights = wide.gather(1, ids).softmax(-1)
        dlogits.scatter_add_(1, ids, weights * (dweights - (weights * dweights).sum(-1, keepdim=True)))
    elif dweights is not None:
        dprobs = (torch.zeros_like(probs) if dprobs is None else dprobs.clone()).scatter_add_(1, ids, dweights)
    if dprobs is not None:
        dlogits += probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True))
    return dlogits.to(logits.dtype)


# --- The custom ops.


@torch.library.custom_op("qwen3::routing_plan", mutates_args=())
def _plan(ids: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "torch":
        return tuple(torch_plan(ids, num_experts))
    return tuple(dispatch.backend("moe_router", backend).plan(ids, num_experts))


@_plan.register_fake
def _(ids, num_experts, backend):
    return tuple(ids.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, *[ids.numel()] * 3))


@torch.library.custom_op("qwen3::moe_router", mutates_args=())
def _forward(
    logits_NE: Tensor, top_k: int, renormalise: bool, expert_ids: Tensor | None, mask_N: Tensor | None, stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights [N, K], ids [N, K], prob_sum [E] or [0], lse [N])"""
    forward = _torch_forward if backend == "torch" else dispatch.backend("moe_router", backend).forward
    return forward(logits_NE, top_k, renormalise, expert_ids, mask_N, stats)


@_forward.register_fake
def _(logits_NE, top_k, renormalise, expert_ids, mask_N, stats, backend):
    N, E = logits_NE.shape
    new = lambda *shape, dtype=torch.float32: logits_NE.new_empty(shape, dtype=dtype)  # noqa: E731
    return new(N, top_k), new(N, top_k, dtype=torch.int64), new(E if stats else 0), new(N)


@torch.library.custom_op("qwen3::moe_router_backward", mutates_args=())
def _backward(
    dweights_NK: Tensor | None, dprob_sum_E: Tensor | None, dlse_N: Tensor | None, logits_NE: Tensor, ids_NK: Tensor,
    mask_N: Tensor | None, renormalise: bool, backend: str,
) -> Tensor:
    backward = _torch_backward if backend == "torch" else dispatch.backend("moe_router", backend).backward
    return backward(dweights_NK, dprob_sum_E, dlse_N, logits_NE, ids_NK, mask_N, renormalise)


@_backward.register_fake
def _(dweights_NK, dprob_sum_E, dlse_N, logits_NE, ids_NK, mask_N, renormalise, backend):
    return logits_NE.new_empty(logits_NE.shape)


def _setup_context(ctx, inputs, output):
    logits, _, ctx.renormalise, _, mask, ctx.stats, ctx.backend = inputs
    ids = output[1]
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, mask)


def _autograd(ctx, dweights, _, dprob_sum, dlse):
    dprob_sum = dprob_sum if ctx.stats else None
    dlogits = None
    if any(g is not None for g in (dweights, dprob_sum, dlse)):
        dlogits = _backward(dweights, dprob_sum, dlse, *ctx.saved_tensors, ctx.renormalise, ctx.backend)
    return dlogits, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
