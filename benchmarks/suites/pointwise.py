"""rms_norm, swiglu and cross_entropy: a pass or two over memory each, so the ceiling is the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen3_kernels import cross_entropy, rms_norm, swiglu
from qwen3_kernels.ops.cross_entropy import cross_entropy_ref
from qwen3_kernels.ops.rms_norm import rms_norm_ref
from qwen3_kernels.ops.swiglu import swiglu_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet, autograd_reference

BF16, FP32 = torch.bfloat16, torch.float32


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        norms = [(64, 256, BF16, False), (64, 256, BF16, True)]
        acts, losses = [(64, 384, BF16)], [(16, 1000, BF16)]
    elif device == "cuda":
        norms = [(16384, 4096, BF16, False), (16384, 4096, BF16, True), (4096, 1024, BF16, False),
                 (4096, 1024, BF16, True), (2048, 2560, BF16, False)]
        acts, losses = [(16384, 12288, BF16)], [(8192, 151936, BF16)]
    else:
        norms = [(2048, 1024, FP32, False), (2048, 1024, BF16, False), (2048, 1024, BF16, True)]
        acts, losses = [(2048, 3072, FP32), (2048, 3072, BF16)], [(32, 151936, FP32), (32, 151936, BF16)]
    for n, h, dtype, residual in norms:
        yield norm_case(device, n, h, dtype, residual)
    for n, i, dtype in acts:
        yield swiglu_case(device, n, i, dtype)
    for n, v, dtype in losses:
        yield loss_case(device, n, v, dtype)


def traffic(fwd: float, bwd: float) -> dict[str, float]:
    return {"fwd": fwd, "bwd": bwd, "fwdbwd": fwd + bwd}


def norm_case(device: str, n: int, h: int, dtype: torch.dtype, residual: bool) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        x, *rest = (torch.randn(n, h, generator=g, device=device, dtype=dtype) for _ in range(4 if residual else 2))
        weight = 1 + 0.1 * torch.randn(h, generator=g, device=device)
        inputs = {"x": x, "weight": weight.to(dtype)} | ({"residual": rest.pop()} if residual else {})
        return InputSet(inputs, tuple(rest))

    b = n * h * dtype.itemsize
    return Case(
        "rms_norm", f"rms_norm{'+residual' if residual else ''} {n}x{h} {short_name(dtype)}", make,
        lambda x, weight, residual=None: rms_norm(x, weight, 1e-6, residual),
        autograd_reference(lambda x, weight, residual=None: rms_norm_ref(x, weight, 1e-6, residual),
                           grads := ("x", "weight", "residual") if residual else ("x", "weight")),
        TOLERANCE[dtype], "copy_gbps", bytes=traffic(*((4 * b, 4 * b) if residual else (2 * b, 3 * b))), grads=grads,
        context={"device": device, "dtype": dtype},
    )


def swiglu_case(device: str, n: int, i: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        gate, up, dy = (torch.randn(n, i, generator=g, device=device, dtype=dtype) for _ in range(3))
        return InputSet({"gate": gate, "up": up}, (dy,))

    b = n * i * dtype.itemsize
    return Case(
        "swiglu", f"swiglu {n}x{i} {short_name(dtype)}", make, swiglu, autograd_reference(swiglu_ref, ("gate", "up")),
        TOLERANCE[dtype], "copy_gbps", bytes=traffic(3 * b, 5 * b), grads=("gate", "up"),
        context={"device": device, "dtype": dtype},
    )


def loss_case(device: str, n: int, v: int, dtype: torch.dtype) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(n, v, generator=g, device=device, dtype=dtype).mul_(3)
        labels = torch.randint(v, (n,), generator=g, device=device)
        labels[::17] = -100
        return InputSet({"logits": logits, "labels": labels}, (torch.ones((), device=device),))

    b = n * v * dtype.itemsize
    return Case(
        "cross_entropy", f"cross_entropy {n}x{v} {short_name(dtype)}", make, cross_entropy,
        autograd_reference(cross_entropy_ref, ("logits",)), TOLERANCE[dtype], "copy_gbps",
        bytes=traffic(b, 2 * b), grads=("logits",), context={"device": device, "dtype": dtype},
    )
