"""torch's FlashAttention kernels for CUDA as the functions of a backend of `attention`.

They are called by themselves, not through scaled_dot_product_attention, which may take others (cuDNN's among them),
keeps the log-sum-exp to itself, and whose backward adds to dq in the order in which its programs happen to come.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def fits(q: Tensor, q_start: Tensor | None, scale: float) -> bool:
    """Whether the kernels can do it. They look for the largest score before they scale, so scale must be above 0."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[-1] <= 256 and q_start is None and scale > 0 and _available()


def _available() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


_available._dynamo_marked_constant = True  # as dispatch.resolve


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    width, (q, k, v) = q.shape[-1], map(_readable, (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_documents(q, k, cu_seqlens), 0.0, causal, False, scale=scale
    )
    lse = lse.masked_fill(lse.isposinf(), -torch.inf)  # +inf is their sign of a query that sees no key
    return out[..., :width].contiguous(), lse.transpose(-1, -2).contiguous()  # theirs is [B, H, T] or [H, N]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    q_start: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    width, (dout, q, k, v, out) = q.shape[-1], map(_readable, (dout, q, k, v, out))
    lse = lse.masked_fill(lse.isneginf(), torch.inf).transpose(-1, -2).contiguous()
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)  # of dropout: not read
    with _deterministic():
        grads = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *_documents(q, k, cu_seqlens), 0.0, causal, seed, offset, scale=scale
        )
    return tuple(t[..., :width].contiguous() for t in grads)


def _documents(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Their arguments cum_seq_q, cum_seq_k, max_q and max_k."""
    if cu_seqlens is None:
        return None, None, q.shape[1], k.shape[1]
    cu_seqlens = cu_seqlens.contiguous()
    # The longest document only sizes the grid, so N serves and no host sync is needed to find it. At 1, they would take
    # it that every document has a query, and 1 can be N with empty documents about.
    longest = max(q.shape[0], 2)
    return cu_seqlens, cu_seqlens, longest, longest


def _readable(t: Tensor) -> Tensor:
    """Loads are of 16 bytes. Columns of zeros change no score, and their own results are cut off."""
    return aligned(t) if t.shape[-1] % 8 == 0 else F.pad(t, (0, -t.shape[-1] % 8))


def aligned(t: Tensor) -> Tensor:
    """The tensor itself when it can be read in units of 16 bytes: D contiguous, all else in steps of 8 numbers, not of none."""
    steps = zip(t.stride()[:-1], t.shape)
    fits = t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s % 8 == 0 and (s > 0 or n == 1) for s, n in steps)
    return t if fits else t.clone(memory_format=torch.contiguous_format)  # .contiguous() keeps one that begins in between


_flag = threading.Lock()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Torch's backward gives each program a dq of its own, and sums these in order, if and only if deterministic
    algorithms are asked for when it is launched; it has no argument for that. The flag is the process's: the lock keeps
    two threads from restoring each other's, but work that another thread launches in these microseconds sees it, too.
    (Set by the debug mode since use_deterministic_algorithms would change inductor's settings as well.)"""
    with _flag:
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
