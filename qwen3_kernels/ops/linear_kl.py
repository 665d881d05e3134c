"""Distillation: Kullback-Leibler divergence between a student's and a teacher's next-token distributions, through both heads,
without either's logits as a whole. Chunks of tokens and gradients in the forward, as in `linear_cross_entropy`.

Sources: Hinton et al. 2015 (arXiv 1503.02531) for the forward direction; Agarwal et al. 2023 (arXiv 2306.13649, section 3)
for the reverse one on the student's own samples; Qwen3 technical report, section 4.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ._check import floating, require, same_device, same_dtype
from .linear_cross_entropy import (
    _add_product, _gradients, _reduced_autograd, _reduced_context, _token_weights, _total_for, chunk_size,
)

DIRECTIONS = ("forward", "reverse")
REDUCTIONS = ("mean", "sum", "num_items")
# Tensors of a chunk's logits, in fp32, that live at one time: (with a teacher's head, with its top tokens). Together they
# may take what `linear_cross_entropy` spends on its one, 640 MiB, in which it has 2,048 tokens of Qwen3's vocabulary;
# here those are 256 and 512 in torch (467 and 622 MB), 512 and 1,024 in Triton (622 MB).
LIVE_LOGITS = {"torch": (3, 2), "triton": (2, 1)}


def linear_kl_ref(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None = None, teacher_head: Tensor | None = None, *,
    teacher_top: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, direction: str = "forward",
    temperature: float = 1.0, reduction: str = "mean", num_items: float | Tensor | None = None,
) -> Tensor:
    """Plain torch with all logits. Arguments as `linear_kl`."""
    kl = divergences_ref(hidden, head, teacher_hidden, teacher_head, teacher_top, direction, temperature)
    labels = torch.zeros_like(kl, dtype=torch.int64) if mask is None else (mask == 0).long()
    return (kl * _token_weights(labels, mask, 1, reduction, num_items, kl.dtype)).sum()


def divergences_ref(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None,
    teacher_top: tuple[Tensor, Tensor] | None, direction: str = "forward", temperature: float = 1.0,
) -> Tensor:
    """Those of `linear_kl_ref`, one a token."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    q = ((hidden @ head.T).to(wide) / temperature).log_softmax(-1)
    if teacher_top is None:
        p = ((teacher_hidden @ teacher_head.T).detach().to(wide) / temperature).log_softmax(-1)
    else:
        ids, p = teacher_top[0], teacher_top[1].to(wide)
        rest = q.masked_fill(torch.zeros_like(q, dtype=torch.bool).scatter(-1, ids, True), -torch.inf)
        q = torch.cat((q.gather(-1, ids), rest.logsumexp(-1, keepdim=True)), -1)
        p = torch.cat((p, _log_rest(p).unsqueeze(-1)), -1)
    return (p.exp() * (p - q) if direction == "forward" else q.exp() * (q - p)).sum(-1)


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

    FLOPs: 2·N·V·(H + Ht) for the loss, Ht 0 with teacher_top, and 4·N·V·H for the gradients. Logits are written and read
    in fp32; see a backend for the bytes. Memory beyond inputs and gradients: `LIVE_LOGITS` times one chunk's logits and,
    with more than `MAX_ROUNDED_CHUNKS` chunks of a half precision, a float32 gradient of the head until it is rounded; only
    the divergences grow with N.

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
    backend = "torch" if wide == torch.float64 else dispatch.resolve(op, hidden.device.type, hidden.dtype)
    live = LIVE_LOGITS[backend][0 if teacher_top is None else 1]
    grads = torch.is_grad_enabled()
    loss, tokens, _, _ = _reduced(
        hidden.reshape(N, H), head, weight_N, teacher_hidden, None if teacher_head is None else teacher_head.detach(), ids,
        logprobs, grads and hidden.requires_grad, grads and head.requires_grad, direction == "reverse", float(temperature),
        chunk_tokens or chunk_size(max(N, 1), V, live * wide.itemsize), backend,
    )
    return (loss, tokens.detach().view(shape)) if return_tokens else loss


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - Σ exp) over the last dimension, at least that of one rounding of 1: a teacher's top K may hold all it has."""
    rest = 1 - logprobs.exp().sum(-1)
    return rest.clamp(min=torch.finfo(rest.dtype).eps).log()


def _logits(hidden: Tensor, head: Tensor, wide: torch.dtype) -> Tensor:
    if hidden.is_cuda and hidden.dtype.itemsize == 2:
        return torch.mm(hidden, head.T, out_dtype=torch.float32).to(wide)
    return (hidden @ head.T).to(wide)


# --- What is made of a chunk's logits.
#
# A backend's ``chunk(student, teacher, ids, logprobs, weight, reverse, temperature, dtype, want_grad)`` takes logits [n, V] in
# fp32 (fp64), which it may overwrite: the student's and the teacher's, or None with ids. It returns (divergence [n], the
# weighted gradient of the student's logits [n, V] in dtype, that of the student, its rows of any stride, or None). With q and
# p the student's and teacher's classes, each a token or, given ids, all others,
#
# forward  dz_c = q_c - p_c
# reverse  dz_c = q_c (log q_c - log p_c - KL)
#
# which the class of all others shares among its tokens by their probability.


def _of_classes(log_q: Tensor, logprobs: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """(divergence [n], dz [n, K + 1]) of the student's log-probabilities [n, K + 1], the others' last, and the teacher's [n, K]."""
    log_p = torch.cat((logprobs, _log_rest(logprobs).unsqueeze(-1)), -1)
    ratio, q, p = log_q - log_p, log_q.exp(), log_p.exp()
    if reverse:
        at = ratio.gather(-1, q.argmax(-1, keepdim=True))  # of a sure student the divergence itself, but for a little
        ratio -= at
        mean = (q * ratio).sum(-1, keepdim=True)
        return (at + mean).squeeze(-1), q * (ratio - mean)
    return -(p * ratio).sum(-1), q * p.sum(-1, keepdim=True) - p  # a sum of 1, but for the least that is left of p


def _chunk(
    student: Tensor, teacher: Tensor | None, ids: Tensor | None, logprobs: Tensor | None, weight: Tensor, reverse: bool,
    temperature: float, dtype: torch.dtype, want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """In plain torch; nothing but log-probabilities, in place, and a third tensor of their size."""
    log_q = _log_probs_(student, temperature)
    if ids is None:
        log_p = _log_probs_(teacher, temperature)
        if reverse:
            ratio, q = log_p.sub_(log_q).neg_(), log_q.exp_()
            kl = (q * ratio).sum(-1)
            grad = ratio.sub_(kl.unsqueeze(-1)).mul_(q)
        else:
            p = log_p.exp()
            kl = log_p.sub_(log_q).mul_(p).sum(-1)
            grad = log_q.exp_().sub_(p)
            del p
    else:
        top = log_q.gather(-1, ids)
        others = log_q.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        kl, dz = _of_classes(torch.cat((top, others), -1), logprobs, reverse)
        grad = log_q.sub_(others).exp_().mul_(dz[:, -1:]).scatter_(-1, ids, dz[:, :-1])
    return kl, grad.mul_(weight.unsqueeze(-1)).div_(temperature).to(dtype) if want_grad else None


def _log_probs_(logits: Tensor, temperature: float) -> Tensor:
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)  # the maximum first: large logits keep their distances
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


@torch.library.custom_op("qwen3::linear_kl", mutates_args=())
def _reduced(
    hidden_NH: Tensor, head_VH: Tensor, weight_N: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None,
    ids_NK: Tensor | None, logprobs_NK: Tensor | None, want_hidden: bool, want_head: bool, reverse: bool, temperature: float,
    rows: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Σ weight · divergence, divergence [N], dhidden, dhead), the gradients empty where not wanted."""
    N, wide = hidden_NH.shape[0], weight_N.dtype
    kl = torch.empty(N, dtype=wide, device=hidden_NH.device)
    dhidden, dhead = _gradients(hidden_NH, head_VH, want_hidden, want_head)
    total = _total_for(dhead, N, rows) if want_head else None
    chunk = _chunk if backend == "torch" else dispatch.backend("linear_kl", backend).chunk
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        hidden = hidden_NH[part]
        teacher = None if teacher_hidden is None else _logits(teacher_hidden[part], teacher_head, wide)
        top = (None, None) if ids_NK is None else (ids_NK[part], logprobs_NK[part].to(wide))
        kl[part], grad = chunk(_logits(hidden, head_VH, wide), teacher, *top, weight_N[part], reverse, temperature,
                               hidden.dtype, want_hidden or want_head)
        del teacher
        if grad is None:
            continue
        if want_hidden:
            torch.mm(grad, head_VH, out=dhidden[part])
        if want_head:
            _add_product(total, grad, hidden, start > 0)
        del grad  # before the next chunk's is made
    if total is not dhead:
        dhead.copy_(total)
    empty = hidden_NH.new_empty
    return (kl * weight_N).sum(), kl, empty(0) if dhidden is None else dhidden, empty(0) if dhead is None else dhead


@_reduced.register_fake
def _(hidden_NH, head_VH, weight_N, teacher_hidden, teacher_head, ids_NK, logprobs_NK, want_hidden, want_head, reverse,
      temperature, rows, backend):
    return (weight_N.new_empty(()), weight_N.new_empty(hidden_NH.shape[0]),
            hidden_NH.new_empty(hidden_NH.shape if want_hidden else 0),
            head_VH.new_empty(head_VH.shape if want_head else 0))


_reduced.register_autograd(_reduced_autograd, setup_context=_reduced_context)
