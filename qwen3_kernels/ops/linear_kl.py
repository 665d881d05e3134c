"""Distillation: Kullback-Leibler divergence between a student's and a teacher's next-token distributions, through both heads,
without either's logits as a whole. Chunks of tokens and gradients in the forward, as in `linear_cross_entropy`.

Sources: Hinton et al. 2015 (arXiv 1503.02531) for the forward direction; Agarwal et al. 2023 (arXiv 2306.13649, section 3)
for the reverse one on the student's own samples; Qwen3 technical report, section 4.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import floating, require, same_device, same_dtype
from .linear_cross_entropy import (
    _add_product, _gradients, _reduced_autograd, _reduced_context, _token_weights, _total_for, chunk_size,
)

DIRECTIONS = ("forward", "reverse")
REDUCTIONS = ("mean", "sum", "num_items")
# Tensors of a chunk's logits, in fp32, that live at one time. So that they take together what `linear_cross_entropy` spends on
# its one, 640 MiB, a chunk has 256 tokens of Qwen3's vocabulary, which are 467 MB, where that op has 2,048.
LIVE_LOGITS = 3


def linear_kl_ref(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None = None, teacher_head: Tensor | None = None, *,
    teacher_top: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, direction: str = "forward",
    temperature: float = 1.0, reduction: str = "mean", num_items: float | Tensor | None = None,
) -> Tensor:
    """Plain torch with all logits. Arguments as `linear_kl`."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    q = ((hidden @ head.T).to(wide) / temperature).log_softmax(-1)
    if teacher_top is None:
        p = ((teacher_hidden @ teacher_head.T).detach().to(wide) / temperature).log_softmax(-1)
    else:
        ids, p = teacher_top[0], teacher_top[1].to(wide)
        rest = q.masked_fill(torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True), -torch.inf)
        q = torch.cat((q.gather(-1, ids), rest.logsumexp(-1, keepdim=True)), -1)
        p = torch.cat((p, _log_rest(p).unsqueeze(-1)), -1)
    kl = (p.exp() * (p - q) if direction == "forward" else q.exp() * (q - p)).sum(-1)
    labels = torch.zeros_like(kl, dtype=torch.int64) if mask is None else (mask == 0).long()
    weights = None if mask is None else mask
    return (kl * _token_weights(labels, weights, 1, reduction, num_items, wide)).sum()


def linear_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None = None, teacher_head: Tensor | None = None, *,
    teacher_top: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, direction: str = "forward",
    temperature: float = 1.0, reduction: str = "mean", num_items: float | Tensor | None = None,
    return_tokens: bool = False, chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """KL divergence of ``softmax(logits / temperature)`` of teacher and student. No gradient flows to the teacher.

    Args:
        hidden: [..., H], head: [V, H]: the student's, one floating dtype.
        teacher_hidden: [..., Ht], teacher_head: [V, Ht]: the teacher's, one floating dtype, any width.
        teacher_top: instead, (ids [..., K] int64, log-probabilities [..., K] at this temperature) of the teacher's K most
            likely tokens, distinct; what is left of its probability meets the student's on all other tokens as one class.
        mask: [...] factor of each token, 0 leaves it out; None for ones.
        direction: "forward" is KL(teacher ‖ student), "reverse" KL(student ‖ teacher).
        reduction: "mean" (weighted by the mask), "sum", or "num_items" (the sum over ``num_items``).
        return_tokens: also return each token's divergence, unmasked, float32 [...], without gradient.
        chunk_tokens: tokens a chunk; by default as many as keep its memory to that of `linear_cross_entropy`.

    Returns:
        float32 scalar (float64 for float64); with ``return_tokens`` the pair (loss, divergences).

    FLOPs: 6·N·V·H, and 2·N·V·Ht for a teacher's head. Memory beyond inputs and gradients: `LIVE_LOGITS` times one chunk's
    logits in fp32 and, with more than `MAX_ROUNDED_CHUNKS` chunks of a half precision, a float32 gradient of the head until
    it is rounded; only the divergences grow with N.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit. RuntimeError: a second backward.
    """
    op = "linear_kl"
    floating(op, hidden=hidden)
    require(hidden.dim() >= 1 and hidden.shape[-1] > 0, op, "hidden", tuple(hidden.shape), "[..., H], H > 0")
    shape, H = hidden.shape[:-1], hidden.shape[-1]
    require(head.dim() == 2 and head.shape[0] > 0 and head.shape[1] == H, op, "head", tuple(head.shape), f"[V, {H}], V > 0")
    same_dtype(op, hidden, head=head)
    V, N = head.shape[0], hidden[..., 0].numel()
    given = (teacher_hidden is not None, teacher_head is not None, teacher_top is not None)
    require(given in ((True, True, False), (False, False, True)), op, "teacher", f"given as (hidden, head, top) = {given}",
            "teacher_hidden and teacher_head, or teacher_top alone")
    ids = logprobs = None
    if teacher_top is None:
        floating(op, teacher_hidden=teacher_hidden)
        same_dtype(op, teacher_hidden, teacher_head=teacher_head)
        require(teacher_hidden.shape[:-1] == shape, op, "teacher_hidden", tuple(teacher_hidden.shape), f"[{shape}, Ht]")
        require(teacher_head.shape == (V, teacher_hidden.shape[-1]), op, "teacher_head", tuple(teacher_head.shape),
                f"({V}, {teacher_hidden.shape[-1]})")
    else:
        ids, logprobs = teacher_top
        floating(op, teacher_top_logprobs=logprobs)
        require(ids.dtype == torch.int64 and ids.shape[:-1] == shape and 0 < ids.shape[-1] < V, op, "teacher_top ids",
                f"{ids.dtype} {tuple(ids.shape)}", f"int64 {(*shape, 'K')}, 0 < K < {V}")
        require(logprobs.shape == ids.shape, op, "teacher_top log-probabilities", tuple(logprobs.shape), f"{tuple(ids.shape)}")
    require(mask is None or mask.shape == shape, op, "mask", None if mask is None else tuple(mask.shape), f"shape {tuple(shape)}")
    same_device(op, hidden, head=head, teacher_hidden=teacher_hidden, teacher_head=teacher_head, ids=ids, logprobs=logprobs,
                mask=mask)
    require(temperature > 0, op, "temperature", temperature, "above 0")
    require(direction in DIRECTIONS, op, "direction", repr(direction), f"one of {DIRECTIONS}")
    require(reduction in REDUCTIONS, op, "reduction", repr(reduction), f"one of {REDUCTIONS}")
    require((num_items is not None) == (reduction == "num_items"), op, "num_items", num_items,
            "a number with reduction 'num_items', else None")
    require(chunk_tokens is None or chunk_tokens > 0, op, "chunk_tokens", chunk_tokens, "at least 1, or None")

    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = torch.ones(shape, dtype=wide, device=hidden.device) if mask is None else mask
    labels = (weights == 0).long()  # 1: left out
    weight_N = _token_weights(labels, weights, 1, reduction, num_items, wide).reshape(N)
    flat = (None if t is None else t.reshape(N, t.shape[-1]) for t in (teacher_hidden, ids, logprobs))
    teacher_hidden, ids, logprobs = (None if t is None else t.detach() for t in flat)
    grads = torch.is_grad_enabled()
    loss, tokens, _, _ = _reduced(
        hidden.reshape(N, H), head, weight_N, teacher_hidden, None if teacher_head is None else teacher_head.detach(), ids,
        logprobs, grads and hidden.requires_grad, grads and head.requires_grad, direction == "reverse", float(temperature),
        chunk_tokens or chunk_size(max(N, 1), V, LIVE_LOGITS * wide.itemsize),
    )
    return (loss, tokens.detach().view(shape)) if return_tokens else loss


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - Σ exp) over the last dimension, at least that of one rounding of 1: a teacher's top K may hold all it has."""
    rest = 1 - logprobs.exp().sum(-1)
    return rest.clamp(min=torch.finfo(rest.dtype).eps).log()


def _log_probs(hidden: Tensor, head: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32).to(wide)
    else:
        logits = (hidden @ head.T).to(wide)
    return logits.div_(temperature).log_softmax(-1)


def _chunk(
    log_q: Tensor, weight: Tensor, log_p: Tensor | None, ids: Tensor | None, logprobs: Tensor | None, reverse: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(divergence [n], weighted gradient of the logits [n, V]). Overwrites log_q and log_p. With q and p the student's and
    teacher's classes:

    forward  dz_j = q_j - p_j for a class of one token; q_j (1 - p_r / q_r) for a token of the class r of all others
    reverse  dz_j = q_j (log q_c - log p_c - KL), c the class of token j
    """
    if ids is None:
        if reverse:
            ratio, q = log_p.sub_(log_q).neg_(), log_q.exp_()
            kl = (q * ratio).sum(-1)
            grad = ratio.sub_(kl.unsqueeze(-1)).mul_(q)
        else:
            p = log_p.exp()
            kl = log_p.sub_(log_q).mul_(p).sum(-1)
            grad = log_q.exp_().sub_(p)
        return kl, grad.mul_(weight.unsqueeze(-1)) if want_grad else None
    others = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    classes_q = torch.cat((log_q.gather(-1, ids), others), -1)
    classes_p = torch.cat((logprobs, _log_rest(logprobs).unsqueeze(-1)), -1)
    ratio = classes_q - classes_p
    kl = ((classes_q.exp() * ratio) if reverse else (classes_p.exp() * -ratio)).sum(-1)
    if not want_grad:
        return kl, None
    q_top = classes_q[:, :-1].exp()
    if reverse:
        ratio -= kl.unsqueeze(-1)
        of_rest, of_top = ratio[:, -1:], q_top * ratio[:, :-1]
    else:
        of_rest, of_top = 1 - (-ratio[:, -1:]).exp(), q_top - logprobs.exp()
    return kl, log_q.exp_().mul_(of_rest).scatter_(-1, ids, of_top).mul_(weight.unsqueeze(-1))


@torch.library.custom_op("qwen3::linear_kl", mutates_args=())
def _reduced(
    hidden_NH: Tensor, head_VH: Tensor, weight_N: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None,
    ids_NK: Tensor | None, logprobs_NK: Tensor | None, want_hidden: bool, want_head: bool, reverse: bool, temperature: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Σ weight · divergence, divergence [N], dhidden, dhead), the gradients empty where not wanted."""
    N, wide = hidden_NH.shape[0], weight_N.dtype
    kl = torch.empty(N, dtype=wide, device=hidden_NH.device)
    dhidden, dhead = _gradients(hidden_NH, head_VH, want_hidden, want_head)
    total = _total_for(dhead, N, rows) if want_head else None
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        hidden = hidden_NH[part]
        log_p = None if teacher_hidden is None else _log_probs(teacher_hidden[part], teacher_head, temperature, wide)
        top = (None, None) if ids_NK is None else (ids_NK[part], logprobs_NK[part].to(wide))
        log_q = _log_probs(hidden, head_VH, temperature, wide)
        kl[part], grad = _chunk(log_q, weight_N[part], log_p, *top, reverse, want_hidden or want_head)
        del log_q, log_p
        if grad is None:
            continue
        grad = grad.div_(temperature).to(hidden.dtype)
        if want_hidden:
            torch.mm(grad, head_VH, out=dhidden[part])
        if want_head:
            _add_product(total, grad.T, hidden)
        del grad  # before the next chunk's is made
    if total is not dhead:
        dhead += total
    empty = hidden_NH.new_empty
    return (kl * weight_N).sum(), kl, empty(0) if dhidden is None else dhidden, empty(0) if dhead is None else dhead


@_reduced.register_fake
def _(hidden_NH, head_VH, weight_N, teacher_hidden, teacher_head, ids_NK, logprobs_NK, want_hidden, want_head, reverse,
      temperature, rows):
    return (weight_N.new_empty(()), weight_N.new_empty(hidden_NH.shape[0]),
            hidden_NH.new_empty(hidden_NH.shape if want_hidden else 0),
            head_VH.new_empty(head_VH.shape if want_head else 0))


_reduced.register_autograd(_reduced_autograd, setup_context=_reduced_context)
