from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..ops import _through_logits
from . import cross_entropy
from ._launch import cast, on_device

chunk = functools.partial(_through_logits.chunk, cross_entropy)


@triton.jit
def _label_rows_kernel(
    head_grad, hidden, labels, order, factor, N, V, H: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    first = tl.program_id(0)
    label = tl.load(labels + first)
    before = tl.load(labels + first - 1, mask=first > 0, other=-1)
    if (label != before) & (label >= 0) & (label < V):  # the first token of its label
        cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = cols < H
        total = tl.zeros([WIDTH], tl.float32)
        start = first
        more = True
        while more:
            at = start + tl.arange(0, TOKENS)
            same = (tl.load(labels + at, mask=at < N, other=-1) == label)
            token = tl.load(order + at, mask=same, other=0)
            f = tl.load(factor + token, mask=same, other=0.0)
            x = tl.load(hidden + token[:, None] * H + cols[None, :], mask=same[:, None] & inside[None, :], other=0.0)
            total += tl.sum(f[:, None] * x.to(tl.float32), 0)
            start += TOKENS
            more = tl.sum(same.to(tl.int32), 0) == TOKENS
        to = head_grad + label * H + cols
        old = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, cast(old + total, head_grad.dtype.element_ty), mask=inside)


@triton.jit
def _finish_hidden_kernel(
    out, product, scale, own, head, labels, V, out_row, H: tl.constexpr, WIDTH: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = cols < H
    label = tl.load(labels + token)
    known = inside & (label >= 0) & (label < V)
    w = tl.load(head + label * H + cols, mask=known, other=0.0).to(tl.float32)
    p = tl.load(product + token * H + cols, mask=inside)
    y = tl.load(scale + token) * p + tl.load(own + token) * w
    tl.store(out + token * out_row + cols, cast(y, out.dtype.element_ty), mask=inside)


def finish_hidden(out: Tensor, product: Tensor, scale: Tensor, own: Tensor, head: Tensor, labels: Tensor) -> None:
    """out = scale * product + own * head[labels], in float32 and rounded once; labels outside of [0, V) count as zeros.
    out, product [n, H]: rows contiguous; head [V, H]: contiguous; scale, own, labels [n]."""
    n, H = product.shape
    width = min(triton.next_power_of_2(H), 1024)
    with on_device(out):
        _finish_hidden_kernel[(n, triton.cdiv(H, width))](
            out, product, scale, own, head, labels, head.shape[0], out.stride(0), H, WIDTH=width, num_warps=4
        )


def add_label_rows(head_grad: Tensor, hidden: Tensor, labels: Tensor, factor: Tensor) -> None:
    """head_grad[labels[i]] += factor[i] * hidden[i], in float32 and rounded once a row; the order of the sums is that of the
    tokens. Labels outside of [0, V) are left out. head_grad [V, H], hidden [N, H]: contiguous; labels, factor [N]."""
    N, H = hidden.shape
    labels, order = labels.sort(stable=True)
    width = min(triton.next_power_of_2(H), 1024)
    with on_device(hidden):
        _label_rows_kernel[(N, triton.cdiv(H, width))](
            head_grad, hidden, labels, order, factor, N, head_grad.shape[0], H, TOKENS=8, WIDTH=width, num_warps=4
        )
