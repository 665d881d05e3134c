"""The language-model head and cross-entropy in one: ``hidden @ head.T`` is never held as a whole.

Tokens go through in chunks. With a reduced loss the gradients are computed in the forward, chunk by chunk, while the
chunk's logits are at hand: three matrix products in all, as many as the plain computation. With ``reduction="none"`` the
gradient of each token's loss is known only in the backward, which computes the logits again: four.

Sources: the chunked form is that of Liger (Hsu et al. 2024, arXiv 2410.10989, section 3.3); z-loss as in `cross_entropy`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from . import _through_logits
from ._check import floating, require, same_device, same_dtype

REDUCTIONS = ("mean", "sum", "num_items", "none")
# Bytes of one chunk's logits, but see `default_chunk`: 2,048 tokens of Qwen3's vocabulary in bf16. A chunk reads and writes
# the whole gradient of the head once more, so larger ones are faster: 8,192 tokens of width 1024 took 11.8 and 10.5 ms in
# chunks of 768 and 2,048 on an H100.
CHUNK_BYTES = 640 << 20
# More chunks than this are summed in float32, unless the labels' part of the head's gradient is added last. In bf16 every
# addition rounds that gradient again: 1.6, 1.9, 2.5, 3.7 times the error of plain torch after 1, 4, 11, 32 chunks, 1.6 in
# float32 however many. Nearly all that is rounded is the labels' part; without it the sums are small, and the error is 0.9
# to 1.0 times plain torch's after 1 to 64 chunks (simulated: 4,096 tokens, 12,000 classes, width 256).
MAX_ROUNDED_CHUNKS = 4


class TokenStats(NamedTuple):
    """Per token, float32, in the shape of the labels, without gradient; 0 where the label is ignored."""

    nll: Tensor  # -log p(label); the label's log-probability is its negative
    lse: Tensor  # logsumexp of the (temperature-scaled) logits
    entropy: Tensor  # of the whole distribution, in nats


def linear_cross_entropy_ref(
    hidden: Tensor, head: Tensor, labels: Tensor, *, weights: Tensor | None = None, temperature: float = 1.0,
    ignore_index: int = -100, reduction: str = "mean", num_items: float | Tensor | None = None, z_loss: float = 0.0,
) -> Tensor:
    """Plain torch with all logits: in the dtype of the arguments, then fp32 (fp64 for fp64)."""
    logits = hidden @ head.T
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    kept = labels != ignore_index
    lse = torch.logsumexp(logits, -1)
    target = logits.gather(-1, labels.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    loss = (lse - target + z_loss * lse.square()).masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss if weights is None else loss * weights
    return (loss * _token_weights(labels, weights, ignore_index, reduction, num_items, loss.dtype)).sum()


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, *, weights: Tensor | None = None, temperature: float = 1.0,
    ignore_index: int = -100, reduction: str = "mean", num_items: float | Tensor | None = None, z_loss: float = 0.0,
    return_stats: bool = False, head_grad: Tensor | None = None, chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Cross-entropy of ``softmax(hidden @ head.T / temperature)`` against ``labels``.

    Args:
        hidden: [..., H], head: [V, H], the same floating dtype.
        labels: [...] int64, in [0, V) or ``ignore_index``.
        weights: [...] factor of each token's loss, without gradient (loss masks, advantages); None for ones.
        reduction: over the kept tokens: "mean" (weighted, divided by the sum of the weights), "sum", "num_items" (the sum
            divided by ``num_items``, for batches in micro-steps), or "none".
        z_loss: weight of logsumexp² in each token's loss.
        return_stats: also return `TokenStats`.
        head_grad: [V, H] in head's dtype or float32: the head's gradient is added to it in place of being handed to
            autograd, so micro-steps share one buffer. Needs a reduced loss, whose own gradient must be 1 (as under
            ``loss.backward()``; scale by ``num_items`` or ``weights``).
        chunk_tokens: tokens a chunk; default: see `default_chunk`.

    Returns:
        float32: the loss, a scalar or [...] for "none"; with ``return_stats`` the pair (loss, stats).

    FLOPs: 2·N·H·V for the loss, 6·N·H·V with gradients (8·N·H·V for "none"). Memory beyond inputs and gradients: one
    chunk's logits and, on a CPU or with ``head_grad`` and more than `MAX_ROUNDED_CHUNKS` chunks of a half precision, the
    sum of the head's gradient (float32 on a CPU) until it is rounded; only the per-token results grow with N.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit. IndexError (CPU): a label out of range; on CUDA
        that token's loss is NaN, since a check would need a host sync. RuntimeError: a second backward through one
        reduced loss (its gradients are scaled in place).
    """
    op = "linear_cross_entropy"
    floating(op, hidden=hidden)
    require(hidden.dim() >= 1 and hidden.shape[-1] > 0, op, "hidden", tuple(hidden.shape), "[..., H], H > 0")
    H = hidden.shape[-1]
    require(head.dim() == 2 and head.shape[0] > 0 and head.shape[1] == H, op, "head", tuple(head.shape), f"[V, {H}], V > 0")
    require(labels.shape == hidden.shape[:-1], op, "labels", tuple(labels.shape), f"shape {tuple(hidden.shape[:-1])}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels is {labels.dtype}; expected torch.int64")
    require(weights is None or weights.shape == labels.shape, op, "weights", None if weights is None else tuple(weights.shape),
            f"labels' shape {tuple(labels.shape)}")
    same_device(op, hidden, head=head, labels=labels, weights=weights, head_grad=head_grad)
    same_dtype(op, hidden, head=head)
    require(temperature > 0, op, "temperature", temperature, "above 0")
    require(reduction in REDUCTIONS, op, "reduction", repr(reduction), f"one of {REDUCTIONS}")
    require((num_items is not None) == (reduction == "num_items"), op, "num_items", num_items,
            "a number with reduction 'num_items', else None")
    require(chunk_tokens is None or chunk_tokens > 0, op, "chunk_tokens", chunk_tokens, "at least 1, or None")
    if head_grad is not None:
        require(reduction != "none", op, "head_grad", "given", "None with reduction 'none'")
        require(head_grad.shape == head.shape and head_grad.is_contiguous(), op, "head_grad", tuple(head_grad.shape),
                f"head's shape {tuple(head.shape)}, contiguous")
        require(head_grad.dtype in (head.dtype, torch.float32), op, "head_grad", head_grad.dtype,
                f"{head.dtype} or torch.float32")
    shape, N, V = labels.shape, labels.numel(), head.shape[0]
    backend = dispatch.resolve(op, hidden.device.type, hidden.dtype)
    if hidden.dtype == torch.float64 or N == 0:
        loss = linear_cross_entropy_ref(
            hidden, head, labels, weights=weights, temperature=temperature, ignore_index=ignore_index, reduction=reduction,
            num_items=num_items, z_loss=z_loss,
        )
        require(not return_stats and head_grad is None, op, "hidden", f"{hidden.dtype} {tuple(hidden.shape)}",
                "not float64 and not empty with return_stats or head_grad")
        return loss
    if backend == "cuda" and (H % 8 or V % 8):  # TMA reads rows of 16-byte units
        backend = "triton"
    sums = backend == "cuda" and torch.is_grad_enabled() and head.requires_grad and head_grad is None
    rows = chunk_tokens or default_chunk(N, V, H, 2 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else 4, sums)
    flat = (hidden.reshape(N, H), head, labels.reshape(N))
    options = (ignore_index, float(temperature), float(z_loss), return_stats, rows, backend)
    if reduction == "none":
        loss, nll, lse, entropy = _per_token(*flat, *options)
        loss = loss.view(shape) if weights is None else loss.view(shape) * weights.detach().float()
    else:
        weight_N = _token_weights(labels, weights, ignore_index, reduction, num_items, torch.float32).reshape(N)
        grads = torch.is_grad_enabled()
        if head_grad is not None and grads and head.requires_grad:
            loss, nll, lse, entropy, _ = _reduced_into(*flat, weight_N, head_grad, hidden.requires_grad, *options)
        else:
            loss, nll, lse, entropy, _, _ = _reduced(
                *flat, weight_N, grads and hidden.requires_grad, grads and head.requires_grad, *options
            )
    if not return_stats:
        return loss
    return loss, TokenStats(*(t.detach().view(shape) for t in (nll, lse, entropy)))


def _token_weights(
    labels: Tensor, weights: Tensor | None, ignore_index: int, reduction: str, num_items: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What each token's loss is multiplied with before the sum."""
    kept = (labels != ignore_index).to(dtype)
    weight = kept if weights is None else kept * weights.detach().to(dtype)
    if reduction == "mean":
        total = weight.sum()
        return weight / torch.where(total == 0, 1.0, total)
    return weight / num_items if reduction == "num_items" else weight


def chunk_size(N: int, V: int, logit_bytes: int, budget: int | None = None) -> int:
    """Tokens in each of the equal chunks, whole tiles of 256, whose logits take at most ``budget`` bytes, by default
    `CHUNK_BYTES`."""
    most = max((budget or CHUNK_BYTES) // (V * logit_bytes) // 256 * 256, 256)
    chunks = max(-(-N // most), 1)
    return max(-(-N // (chunks * 256)) * 256, 256)


def default_chunk(N: int, V: int, H: int, logit_bytes: int, sums: bool) -> int:
    """Tokens in a chunk by default. ``sums``: whether the chunks are those of the compiled kernel, which holds nothing but 2
    bytes a logit, and add up to a new gradient of the head in bfloat16.

    Up to 8,192 tokens a chunk's logits are then at most three quarters of that gradient, which is there anyway: 768 tokens
    of width 1024; and at most half of `CHUNK_BYTES`: at width 4096 chunks of 1,024 and 2,048 tokens took 43.5 and 43.6 ms on
    an H100, with 0.34 GB between them. More tokens come in four chunks or as many as take twice `CHUNK_BYTES`, since each
    chunk reads and writes the gradient: 16,384 tokens of width 2048 took 43.5 ms in four chunks, 48.3 in eight.
    """
    if not sums:
        return chunk_size(N, V, logit_bytes)
    if N <= 8192:
        return chunk_size(N, V, logit_bytes, min(CHUNK_BYTES // 2, 3 * V * H // 2))
    return chunk_size(N, V, logit_bytes, min(2 * CHUNK_BYTES, -(-N // 1024) * 256 * V * logit_bytes))


# --- The computation, shared by all backends.
#
# A backend's ``chunk(hidden, head, labels, weight, ignore_index, inverse_temperature, z_loss, nll, lse, entropy)`` writes
# the per-token results and returns, when ``weight`` is given, `ChunkGrads`.


def _run(
    hidden: Tensor, head: Tensor, labels: Tensor, weight: Tensor | None, dhidden: Tensor | None, dhead: Tensor | None,
    ignore_index: int, temperature: float, z_loss: float, with_entropy: bool, rows: int, backend: str, adds: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, lse, entropy [N] float32 or [0]). Writes dhidden and dhead, or with ``adds`` adds to the latter."""
    N = hidden.shape[0]
    hidden, head, labels = hidden.contiguous(), head.contiguous(), labels.contiguous()
    kernels = None if backend == "torch" else dispatch.backend("linear_cross_entropy", backend)
    chunk = functools.partial(_through_logits.chunk, _through_logits.plain) if kernels is None else kernels.chunk
    nll, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropy = torch.empty(N if with_entropy else 0, dtype=torch.float32, device=hidden.device)
    wants = dhidden is not None or dhead is not None
    last = dhead is not None and _labels_last(hidden)
    own = torch.empty(N if last else 0, dtype=torch.float32, device=hidden.device)
    total = None if dhead is None else _total_for(dhead, N, rows, last, adds)
    add_product = getattr(kernels, "add_product", _add_product)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        grads = chunk(
            hidden[part], head, labels[part], weight[part] if wants else None, ignore_index, 1.0 / temperature, z_loss,
            nll[part], lse[part], entropy[part] if with_entropy else None,
        )
        if not wants:
            continue
        if dhidden is not None and grads.s is None:
            torch.mm(grads.u, head, out=dhidden[part])
        elif dhidden is not None:  # in fp32 until all is added, so that it is rounded once
            dispatch.backend("linear_cross_entropy", "triton").finish_hidden(
                dhidden[part], torch.mm(grads.u, head, out_dtype=torch.float32), grads.s, grads.own, head, labels[part]
            )
        if dhead is not None:
            if last:
                own[part] = _take_labels(grads.u, labels[part]) if grads.own is None else grads.own
            add_product(total, grads.u, grads.x, start > 0 or (adds and total is dhead))
        del grads  # before the next chunk's are made
    if total is not dhead:
        dhead.add_(total) if adds else dhead.copy_(total)
    if last:
        dispatch.backend("linear_cross_entropy", "triton").add_label_rows(dhead, hidden, labels, own)
    return nll, lse, entropy


def _labels_last(hidden: Tensor) -> bool:
    """Whether the labels' part of the head's gradient is added after all chunks: see `MAX_ROUNDED_CHUNKS`."""
    return hidden.is_cuda and hidden.dtype.itemsize < 4


def _take_labels(u: Tensor, labels: Tensor) -> Tensor:
    """What a token's hidden state has in the gradient of its label's row, float32 [n]; in ``u`` it is 0 from here on."""
    at = labels.clamp(0, u.shape[1] - 1).unsqueeze(1)  # an ignored token has zeros everywhere, one out of range NaN
    own = u.gather(1, at).squeeze(1).float()
    u.scatter_(1, at, 0)
    return own


def _total_for(dhead: Tensor, N: int, rows: int, labels_last: bool = False, adds: bool = False) -> Tensor:
    """Where the chunks' products are summed, not initialised if it is not ``dhead``: see `MAX_ROUNDED_CHUNKS`. With ``adds``
    dhead has labels' parts of calls before."""
    if dhead.dtype.itemsize >= 4 or -(-N // rows) <= MAX_ROUNDED_CHUNKS or (labels_last and not adds):
        return dhead
    return torch.empty(dhead.shape, dtype=dhead.dtype if labels_last else torch.float32, device=dhead.device)


def _add_product(total: Tensor, u: Tensor, x: Tensor, add: bool) -> None:
    """total = u.T @ x, plus what it was with ``add``; the product of bf16 is added to a float32 total without being rounded
    first, where torch can."""
    if total.dtype == u.dtype:
        total.addmm_(u.T, x) if add else torch.mm(u.T, x, out=total)
    elif total.is_cuda:
        torch.addmm(total, u.T, x, beta=1.0 if add else 0.0, out_dtype=total.dtype, out=total)
    else:
        total.add_(u.T @ x) if add else total.copy_(u.T @ x)


def _token_loss(nll: Tensor, lse: Tensor, z_loss: float) -> Tensor:
    return nll + z_loss * lse.square() if z_loss else nll.clone()


@torch.library.custom_op("qwen3::linear_cross_entropy", mutates_args=())
def _per_token(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, ignore_index: int, temperature: float, z_loss: float,
    with_entropy: bool, rows: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N] float32, nll [N], lse [N], entropy [N] or [0])."""
    nll, lse, entropy = _run(hidden_NH, head_VH, labels_N, None, None, None, ignore_index, temperature, z_loss,
                             with_entropy, rows, backend)
    return _token_loss(nll, lse, z_loss), nll, lse, entropy


@_per_token.register_fake
def _(hidden_NH, head_VH, labels_N, ignore_index, temperature, z_loss, with_entropy, rows, backend):
    N = hidden_NH.shape[0]
    return tuple(hidden_NH.new_empty(n, dtype=torch.float32) for n in (N, N, N, N if with_entropy else 0))


@torch.library.custom_op("qwen3::linear_cross_entropy_backward", mutates_args=())
def _per_token_backward(
    dloss_N: Tensor, hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, want_hidden: bool, want_head: bool,
    ignore_index: int, temperature: float, z_loss: float, rows: int, backend: str,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dhead), empty where not wanted."""
    dhidden, dhead = _gradients(hidden_NH, head_VH, want_hidden, want_head)
    _run(hidden_NH, head_VH, labels_N, dloss_N.float().contiguous(), dhidden, dhead, ignore_index, temperature, z_loss, False,
         rows, backend)
    return tuple(hidden_NH.new_empty(0) if t is None else t for t in (dhidden, dhead))


@_per_token_backward.register_fake
def _(dloss_N, hidden_NH, head_VH, labels_N, want_hidden, want_head, ignore_index, temperature, z_loss, rows, backend):
    return (hidden_NH.new_empty(hidden_NH.shape if want_hidden else 0),
            head_VH.new_empty(head_VH.shape if want_head else 0))


def _gradients(hidden: Tensor, head: Tensor, want_hidden: bool, want_head: bool) -> tuple[Tensor | None, Tensor | None]:
    """For the chunks to write; zeros where there will be none."""
    make = torch.empty if len(hidden) else torch.zeros
    return tuple(make(t.shape, dtype=t.dtype, device=t.device) if want else None
                 for t, want in ((hidden, want_hidden), (head, want_head)))


def _per_token_context(ctx, inputs, output):
    hidden, head, labels, ctx.ignore_index, ctx.temperature, ctx.z_loss, _, ctx.rows, ctx.backend = inputs
    ctx.save_for_backward(hidden, head, labels)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _per_token_autograd(ctx, dloss, *_):
    want_hidden, want_head = ctx.needs_input_grad[:2]
    dhidden, dhead = _per_token_backward(
        dloss, *ctx.saved_tensors, want_hidden, want_head, ctx.ignore_index, ctx.temperature, ctx.z_loss, ctx.rows, ctx.backend
    )
    return (dhidden if want_hidden else None, dhead if want_head else None, *[None] * 7)


_per_token.register_autograd(_per_token_autograd, setup_context=_per_token_context)


@torch.library.custom_op("qwen3::linear_cross_entropy_reduced", mutates_args=())
def _reduced(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, weight_N: Tensor, want_hidden: bool, want_head: bool,
    ignore_index: int, temperature: float, z_loss: float, with_entropy: bool, rows: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(Σ weight · loss, nll, lse, entropy, dhidden, dhead), the gradients empty where not wanted."""
    dhidden, dhead = _gradients(hidden_NH, head_VH, want_hidden, want_head)
    nll, lse, entropy = _run(hidden_NH, head_VH, labels_N, weight_N, dhidden, dhead, ignore_index, temperature, z_loss,
                             with_entropy, rows, backend)
    loss = (_token_loss(nll, lse, z_loss) * weight_N).sum()
    return loss, nll, lse, entropy, *(hidden_NH.new_empty(0) if t is None else t for t in (dhidden, dhead))


@_reduced.register_fake
def _(hidden_NH, head_VH, labels_N, weight_N, want_hidden, want_head, ignore_index, temperature, z_loss, with_entropy, rows,
      backend):
    N = hidden_NH.shape[0]
    stats = (hidden_NH.new_empty(n, dtype=torch.float32) for n in (N, N, N if with_entropy else 0))
    return (hidden_NH.new_empty((), dtype=torch.float32), *stats, hidden_NH.new_empty(hidden_NH.shape if want_hidden else 0),
            head_VH.new_empty(head_VH.shape if want_head else 0))


def _reduced_context(ctx, inputs, output):
    """For ops of (hidden, head, ...) that return (loss, ..., dhidden, dhead)."""
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros like dhead are made for its unused gradient
    ctx.inputs, ctx.spent = len(inputs), False


def _reduced_autograd(ctx, dloss, *_):
    wanted = ctx.needs_input_grad[:2]
    # In place: another gradient of the head's size would be the largest tensor here (311 MB for 0.6B).
    if torch.compiler.is_compiling() or type(dloss) is not Tensor:  # traced: AOTAutograd allows no mutation here
        grads = [(g.float() * dloss).to(g.dtype) if want else None for g, want in zip(ctx.saved_tensors, wanted)]
    else:
        if ctx.spent:
            raise RuntimeError("linear_cross_entropy: second backward through one loss; its gradients were scaled in place "
                               "by the first. Call the op again, or use reduction='none'")
        ctx.spent = True
        grads = [_scaled_(g, dloss) if want else None for g, want in zip(ctx.saved_tensors, wanted)]
    return (*grads, *[None] * (ctx.inputs - 2))


def _scaled_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, without touching x when the factor is 1, as it is under ``loss.backward()``."""
    if x.is_cuda:
        from ..triton._launch import scale_

        scale_(x, factor)
    elif factor.item() != 1:
        x.mul_(factor)
    return x


_reduced.register_autograd(_reduced_autograd, setup_context=_reduced_context)


@torch.library.custom_op("qwen3::linear_cross_entropy_into", mutates_args=("head_grad",))
def _into(
    hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, weight_N: Tensor, head_grad: Tensor, want_hidden: bool,
    ignore_index: int, temperature: float, z_loss: float, with_entropy: bool, rows: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``qwen3::linear_cross_entropy_reduced``, the head's gradient added to ``head_grad``."""
    dhidden, _ = _gradients(hidden_NH, head_VH, want_hidden, False)
    nll, lse, entropy = _run(hidden_NH, head_VH, labels_N, weight_N, dhidden, head_grad, ignore_index, temperature, z_loss,
                             with_entropy, rows, backend, adds=True)
    loss = (_token_loss(nll, lse, z_loss) * weight_N).sum()
    return loss, nll, lse, entropy, hidden_NH.new_empty(0) if dhidden is None else dhidden


@_into.register_fake
def _(hidden_NH, head_VH, labels_N, weight_N, head_grad, want_hidden, ignore_index, temperature, z_loss, with_entropy, rows,
      backend):
    N = hidden_NH.shape[0]
    stats = (hidden_NH.new_empty(n, dtype=torch.float32) for n in (N, N, N if with_entropy else 0))
    return hidden_NH.new_empty((), dtype=torch.float32), *stats, hidden_NH.new_empty(hidden_NH.shape if want_hidden else 0)


class _ReducedInto(torch.autograd.Function):
    """The op that mutates, under autograd (torch.library registers no formula for an op that does)."""

    @staticmethod
    def forward(ctx, hidden, head, labels, weight, head_grad, want_hidden, *options):
        out = _into(hidden, head.detach(), labels, weight, head_grad, want_hidden, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out[4])
        ctx.mark_non_differentiable(*out[1:])
        ctx.want_hidden, ctx.inputs = want_hidden, 6 + len(options)
        return out

    @staticmethod
    def backward(ctx, dloss, *_):
        torch._assert_async(dloss == 1, "linear_cross_entropy: with head_grad, the gradient of the loss must be 1")
        dhidden = ctx.saved_tensors[0] if ctx.want_hidden else None
        return dhidden, *[None] * (ctx.inputs - 1)


def _reduced_into(*args):
    return _ReducedInto.apply(*args)
