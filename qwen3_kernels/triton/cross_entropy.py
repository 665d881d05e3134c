"""Cross-entropy in Triton: one program a row, which reads the row once in the forward and once in the backward.

The true class never meets a subtraction from 1. The forward sums the other classes apart from it and takes
``nll = log1p(sum_others / exp(x_true))``; the backward gives it ``-dnll * sum_others / (sum_others + p_true)``. Both keep
their relative accuracy as p_true -> 1, where ``lse - x_true`` and ``p_true - 1`` cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cast, exp, on_device, row_major


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], to fp32 accuracy: 2·artanh(z) with z = e / (2 + e) <= 1/3."""
    z = e / (2.0 + e)
    s = z * z
    p = s * (1.0 / 15.0) + 1.0 / 13.0
    p = p * s + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return 2.0 * z * (p * s + 1.0)


@triton.jit
def _finite_or_zero(peak):
    """A shift for exponents that leaves exp(-inf - shift) = 0 where nothing but -inf has been seen."""
    return tl.where(peak == float("-inf"), 0.0, peak)


IGNORED = tl.constexpr(-1)
OUT_OF_RANGE = tl.constexpr(-2)


@triton.jit
def _target_of(label, ignore_index, V: tl.constexpr):
    """The column of the true class, or one of the two negative codes."""
    inside = tl.where((label >= 0) & (label < V), label, OUT_OF_RANGE)
    return tl.where(label == ignore_index, IGNORED, inside).to(tl.int32)


@triton.jit(do_not_specialize=["ignore_index"])
def _forward_kernel(
    logits, labels, nll, lse, stride, ignore_index, V: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):
    PRECISE: tl.constexpr = logits.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = _target_of(tl.load(labels + row), ignore_index, V)
    # Each lane keeps a running maximum and sum of its own over DEPTH values a round; the lanes meet once, at the end.
    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, DEPTH * LANES):
        cols = start + tile
        v = tl.load(logits + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        v = tl.where(cols == target, float("-inf"), v)
        higher = tl.maximum(peak, tl.max(v, 0))
        shift = _finite_or_zero(higher)
        total = total * exp(peak - shift, PRECISE) + tl.sum(exp(v - shift[None, :], PRECISE), 0)
        peak = higher
    shift = _finite_or_zero(tl.max(peak, 0))
    # A few numbers a row in fp64: every probability of the row's gradient carries the rounding of lse.
    mass = tl.log(tl.sum(total * exp(peak - shift, PRECISE), 0).to(tl.float64))
    true = tl.load(logits + target, mask=target >= 0, other=float("-inf")).to(tl.float64)
    gap = (shift.to(tl.float64) - true) + mass  # in this order: equal logits, however large, leave mass alone
    tail = _log1p(tl.exp(-tl.abs(gap)).to(tl.float32)).to(tl.float64)
    loss = tl.where(target >= 0, tl.maximum(gap, 0.0) + tail, float("nan"))
    tl.store(nll + row, tl.where(target == IGNORED, 0.0, loss).to(tl.float32))
    tl.store(lse + row, (tl.maximum(shift.to(tl.float64) + mass, true) + tail).to(tl.float32))


@triton.jit(do_not_specialize=["ignore_index"])
def _backward_kernel(
    dnll, dlse, logits, labels, lse, dlogits, dnll_stride, dlse_stride, stride, ignore_index,
    V: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):
    PRECISE: tl.constexpr = logits.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dlogits += row * V
    target = _target_of(tl.load(labels + row), ignore_index, V)
    dn = tl.load(dnll + row * dnll_stride).to(tl.float32)
    dn = tl.where(target == IGNORED, 0.0, tl.where(target >= 0, dn, float("nan")))
    dl = 0.0
    if dlse is not None:
        dl = tl.load(dlse + row * dlse_stride).to(tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if (dn == 0.0) & (dl == 0.0):
        # Rows without a gradient (prompts in fine-tuning) are not read.
        for start in range(0, V, DEPTH * LANES):
            cols = start + tile
            tl.store(dlogits + cols, tl.zeros([DEPTH, LANES], dlogits.dtype.element_ty), mask=cols < V)
    else:
        shift = tl.load(lse + row)
        others = tl.zeros([LANES], tl.float32)
        for start in range(0, V, DEPTH * LANES):
            cols = start + tile
            v = tl.load(logits + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            p = exp(v - shift, PRECISE)
            tl.store(dlogits + cols, cast(p * (dn + dl), dlogits.dtype.element_ty), mask=cols < V)
            others += tl.sum(tl.where(cols == target, 0.0, p), 0)
        rest = tl.sum(others, 0)
        tl.debug_barrier()  # another thread of this program wrote a first value of the true class
        true = exp(tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32) - shift, PRECISE).to(tl.float64)
        # In fp64 up to the last rounding: this entry is the largest of the row's gradient.
        rest_share = rest.to(tl.float64) / (rest.to(tl.float64) + true)
        d = -dn.to(tl.float64) * rest_share
        if dlse is not None:
            d += dl.to(tl.float64) * true
        tl.store(dlogits + target, cast(d.to(tl.float32), dlogits.dtype.element_ty), mask=target >= 0)


# 8 warps x 8 values are one 16-byte load of bf16 a lane; 4 of them in flight a round cost 1.25 exponentials a value.
# A vocabulary of 151,936 takes 19 rounds, of which the last is masked.
_ROUND = {"DEPTH": 4, "LANES": 2048, "num_warps": 8}


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    n, V = logits.shape
    logits, labels = row_major(logits), labels.contiguous()
    nll = torch.empty(n, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    with on_device(logits):
        _forward_kernel[(n,)](logits, labels, nll, lse, logits.stride(0), ignore_index, V=V, **_ROUND)
    return nll, lse


def backward(
    dnll: Tensor, dlse: Tensor | None, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> Tensor:
    n, V = logits.shape
    logits, labels = row_major(logits), labels.contiguous()
    dlogits = torch.empty((n, V), dtype=logits.dtype, device=logits.device)
    with on_device(logits):
        _backward_kernel[(n,)](
            dnll, dlse, logits, labels, lse, dlogits, dnll.stride(0), 0 if dlse is None else dlse.stride(0),
            logits.stride(0), ignore_index, V=V, **_ROUND,
        )
    return dlogits
