"""Distillation in Triton: one program a token, which reads its fp32 logits once for the divergence and once more for the
gradient: 16 bytes a class with a teacher's head, 8 with its top tokens, half of that without gradients.

Of two distributions x and y with x(log x - log y) the divergence's terms, the first pass keeps a running maximum and mass of
each, and Σ e^(x - max x) ((x - max x) - (y - max y)): a difference of numbers that are near 0 where x has its probability,
however large the logits are, and exactly 0 for equal ones.

The gradient, of 2 or 4 bytes, overwrites the student's logits. A row is rewritten from its beginning, always behind what has
been read: so a row has one program, whose threads wait for each other between reading a block and writing it. The first
pass goes from the end to the beginning: the second finds there what is still in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.linear_kl import _of_classes
from ._launch import cast, exp, on_device
from .cross_entropy import _finite_or_zero


@triton.jit
def _values(logits, cols, V: tl.constexpr):
    return tl.load(logits + cols, mask=cols < V, other=float("-inf"))


@triton.jit
def _raised(peak, mass, v, t, PRECISE: tl.constexpr):
    """A lane's maximum, mass and terms e^(t (v - maximum)) after a round, and what its older terms are scaled by."""
    higher = tl.maximum(peak, tl.max(v, 0))
    shift = _finite_or_zero(higher)
    scale = exp((peak - shift) * t, PRECISE)
    terms = exp((v - shift[None, :]) * t, PRECISE)
    return higher, mass * scale + tl.sum(terms, 0), terms, scale


@triton.jit
def _row_mass(peak, mass, t, PRECISE: tl.constexpr):
    """A row's maximum, its mass, and what each lane's is scaled by to be a part of it. Few numbers a row, so in fp64: all
    probabilities share the rounding of the mass."""
    top = tl.max(peak, 0)
    scale = exp((peak - top) * t, PRECISE)
    return top, tl.sum((mass * scale).to(tl.float64), 0), scale


@triton.jit(do_not_specialize=["t"])
def _kl_kernel(
    student, teacher, weight, kl, grad, grad_stride, t, V: tl.constexpr, REVERSE: tl.constexpr, PRECISE: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = (student if REVERSE else teacher) + row * V
    y_row = (teacher if REVERSE else student) + row * V
    x_peak = tl.full([LANES], float("-inf"), tl.float32)
    y_peak = tl.full([LANES], float("-inf"), tl.float32)
    x_mass = tl.zeros([LANES], tl.float32)
    y_mass = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    STEP: tl.constexpr = DEPTH * LANES
    LAST: tl.constexpr = (V - 1) // STEP * STEP
    for start in range(0, V, STEP):
        cols = LAST - start + tile
        x = _values(x_row, cols, V)
        y = _values(y_row, cols, V)
        x_old, y_old, older = _finite_or_zero(x_peak), _finite_or_zero(y_peak), x_mass
        x_peak, x_mass, x_terms, scale = _raised(x_peak, x_mass, x, t, PRECISE)
        y_peak, y_mass, _, _ = _raised(y_peak, y_mass, y, t, PRECISE)
        x_new, y_new = _finite_or_zero(x_peak), _finite_or_zero(y_peak)
        apart = tl.where(cols < V, (x - x_new[None, :]) - (y - y_new[None, :]), 0.0)
        total = scale * (total - older * ((x_new - x_old) - (y_new - y_old))) + tl.sum(x_terms * apart, 0)
    x_top, x_sum, scale = _row_mass(x_peak, x_mass, t, PRECISE)
    y_top, y_sum, _ = _row_mass(y_peak, y_mass, t, PRECISE)
    total -= x_mass * ((x_top - _finite_or_zero(x_peak)) - (y_top - _finite_or_zero(y_peak)))
    mean = tl.sum((total * scale).to(tl.float64), 0) / x_sum
    tl.store(kl + row, (mean * t + (tl.log(y_sum) - tl.log(x_sum))).to(tl.float32))
    if grad is not None:
        grad += row * grad_stride
        w = tl.load(weight + row).to(tl.float64) * t
        x_factor = (w / x_sum).to(tl.float32)
        y_factor = (w / y_sum).to(tl.float32)
        mean = mean.to(tl.float32)
        block = tl.arange(0, STEP)
        if w == 0.0:
            for start in range(0, V, STEP):
                cols = start + block
                tl.store(grad + cols, tl.zeros([STEP], grad.dtype.element_ty), mask=cols < V)
        else:
            for start in range(0, V, STEP):
                cols = start + block
                x = _values(x_row, cols, V) - x_top
                y = _values(y_row, cols, V) - y_top
                if REVERSE:
                    g = exp(x * t, PRECISE) * x_factor * (((x - y) - mean) * t)
                else:
                    g = exp(y * t, PRECISE) * y_factor - exp(x * t, PRECISE) * x_factor
                tl.debug_barrier()  # other threads of this program read what is overwritten here
                tl.store(grad + cols, cast(g, grad.dtype.element_ty), mask=cols < V)


@triton.jit(do_not_specialize=["t"])
def _mass_kernel(
    logits, peak, mass, t, V: tl.constexpr, PRECISE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):
    """A row's maximum and Σ e^(t (logit - maximum))."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    highest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for start in range(0, V, DEPTH * LANES):
        highest, total, _, _ = _raised(highest, total, _values(logits, start + tile, V), t, PRECISE)
    top, total_mass, _ = _row_mass(highest, total, t, PRECISE)
    tl.store(peak + row, top)
    tl.store(mass + row, total_mass.to(tl.float32))


@triton.jit(do_not_specialize=["t", "K"])
def _share_kernel(
    logits, peak, mass, dz, ids, grad, grad_stride, K, t, V: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient, written over the logits as above: that of the K named tokens from dz [K + 1], and its last shared among
    the others, whose maximum and mass are given."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    grad += row * grad_stride
    dz += row * (K + 1)
    top = tl.load(peak + row)
    share = tl.load(dz + K) / tl.load(mass + row)
    block = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        cols = start + block
        g = exp((_values(logits, cols, V) - top) * t, PRECISE) * share
        tl.debug_barrier()
        tl.store(grad + cols, cast(g, grad.dtype.element_ty), mask=cols < V)
    tl.debug_barrier()  # another thread of this program wrote the named tokens' 0
    for start in range(0, K, 128):
        named = start + tl.arange(0, 128)
        g = tl.load(dz + named, mask=named < K, other=0.0)
        cols = tl.load(ids + row * K + named, mask=named < K, other=0)
        tl.store(grad + cols, cast(g, grad.dtype.element_ty), mask=named < K)


# 4 warps x 8 x 4 values, one 16-byte load each, of both distributions: 32 KB of a program's on their way, and four programs on
# a multiprocessor, by their registers. So 512 tokens are one wave of 132 multiprocessors, 97 % full. A round's lanes rescale
# their sums once for 8 values. A vocabulary of 151,936 takes 38 rounds, of which one is partly masked.
_ROUND = {"DEPTH": 8, "LANES": 512, "num_warps": 4}
# Without a teacher's logits or a running sum there are registers for twice the programs.
_BLOCK = {"BLOCK": 4096, "num_warps": 8}


def chunk(
    student: Tensor, teacher: Tensor | None, ids: Tensor | None, logprobs: Tensor | None, weight: Tensor, reverse: bool,
    temperature: float, dtype: torch.dtype, want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `linear_kl`. ``student`` and ``teacher`` are contiguous."""
    n, V = student.shape
    grad = student.view(dtype)[:, :V] if want_grad else None
    stride = 0 if grad is None else grad.stride(0)
    options = {"V": V, "PRECISE": dtype == torch.float32}
    t = 1.0 / temperature
    if teacher is not None:
        kl = torch.empty(n, dtype=torch.float32, device=student.device)
        with on_device(student):
            # A product that is rounded once and one that is not would differ where the two distributions are equal.
            _kl_kernel[(n,)](student, teacher, weight, kl, grad, stride, t, REVERSE=reverse, enable_fp_fusion=False,
                             **options, **_ROUND)
        return kl, grad
    top = student.gather(-1, ids)
    student.scatter_(-1, ids, -torch.inf)
    peak, mass = torch.empty((2, n, 1), dtype=torch.float32, device=student.device)
    with on_device(student):
        _mass_kernel[(n,)](student, peak, mass, t, **options, **_ROUND)
    highest = torch.maximum(peak, top.amax(-1, keepdim=True))
    log_q = torch.cat(((top - highest) * t, (peak - highest) * t + mass.log()), -1).log_softmax(-1)
    kl, dz = _of_classes(log_q, logprobs, reverse)
    if grad is None:
        return kl, None
    dz *= (weight * t).unsqueeze(-1)
    with on_device(student):
        _share_kernel[(n,)](student, peak, mass, dz, ids.contiguous(), grad, stride, ids.shape[1], t, **options, **_BLOCK)
    return kl, grad
