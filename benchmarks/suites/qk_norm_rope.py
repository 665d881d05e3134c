"""qk_norm_rope at the shapes of the 4B/8B (32/8 heads) and 0.6B/1.7B (16/8 heads) models."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen3_kernels import qk_norm_rope
from qwen3_kernels.ops.qk_norm_rope import qk_norm_rope_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet, autograd_reference
from .pointwise import traffic

GRADS = ("q", "k", "q_weight", "k_weight")


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        shapes = [(2, 32, 4, 2, 64, torch.bfloat16)]
    elif device == "cuda":
        shapes = [(b, t, hq, 8, 128, torch.bfloat16) for b, t, hq in ((4, 4096, 32), (1, 32768, 32), (4, 4096, 16))]
    else:
        shapes = [(2, 512, 16, 8, 128, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for shape in shapes:
        yield case(device, *shape)


def case(device: str, B: int, T: int, Hq: int, Hk: int, D: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        q, dq = (torch.randn(B, T, Hq, D, generator=g, device=device, dtype=dtype) for _ in range(2))
        k, dk = (torch.randn(B, T, Hk, D, generator=g, device=device, dtype=dtype) for _ in range(2))
        q_weight, k_weight = ((1 + 0.1 * torch.randn(D, generator=g, device=device)).to(dtype) for _ in range(2))
        frequency = 1e6 ** (-torch.arange(0, D, 2, device=device) / D)
        angle = torch.arange(T, device=device).unsqueeze(1) * frequency
        inputs = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": angle.cos(), "sin": angle.sin()}
        return InputSet(inputs, (dq, dk))

    b, tables = B * T * (Hq + Hk) * D * dtype.itemsize, 4 * T * D
    return Case(
        "qk_norm_rope", f"qk_norm_rope b{B}T{T}h{Hq}/{Hk} {short_name(dtype)}", make, qk_norm_rope,
        autograd_reference(qk_norm_rope_ref, GRADS), TOLERANCE[dtype], "copy_gbps",
        bytes=traffic(2 * b + tables, 3 * b + tables), grads=GRADS, context={"device": device, "dtype": dtype},
    )
