"""linear_cross_entropy at Qwen3's vocabulary and the widths of the 0.6B and 8B models."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen3_kernels import linear_cross_entropy
from qwen3_kernels.ops.linear_cross_entropy import linear_cross_entropy_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet, autograd_reference

GRADS = ("hidden", "head")


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        shapes = [(64, 32, 520, torch.bfloat16)]
    elif device == "cuda":
        shapes = [(8192, h, 151936, torch.bfloat16) for h in (1024, 4096)]
    else:
        shapes = [(64, 1024, 151936, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for shape in shapes:
        yield case(device, *shape)


def case(device: str, n: int, h: int, v: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        # Logits of deviation 2, as a trained model has them, rather than a flat softmax.
        hidden = torch.randn(n, h, generator=g, device=device, dtype=dtype)
        head = torch.randn(v, h, generator=g, device=device, dtype=dtype).mul_(2 * h**-0.5)
        labels = torch.randint(v, (n,), generator=g, device=device)
        labels[::17] = -100
        return InputSet({"hidden": hidden, "head": head, "labels": labels}, (torch.ones((), device=device),))

    product = 2 * n * h * v
    return Case(
        "linear_cross_entropy", f"linear_cross_entropy {n}x{h} V{v} {short_name(dtype)}", make, linear_cross_entropy,
        autograd_reference(linear_cross_entropy_ref, GRADS), 3 * TOLERANCE[dtype], f"gemm_{short_name(dtype)}_tflops",
        flops={"fwd": product, "fwdbwd": 3 * product}, grads=GRADS, modes=("fwd", "fwdbwd"),
        context={"device": device, "dtype": dtype}, sets=2,
    )
