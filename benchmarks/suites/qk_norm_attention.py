"""qk_norm_attention, from raw projections to the output: at the shapes of the models, batched and packed. FLOPs are attention's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qwen3_kernels import qk_norm_attention
from qwen3_kernels.ops.qk_norm_rope import qk_norm_rope_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet, autograd_reference
from . import attention

GRADS = ("q", "k", "v", "q_weight", "k_weight")


def cases(device: str, quick: bool) -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        yield case(device, [48, 48], 4, 2, 64, bf16, packed=False)
        yield case(device, [16, 48], 4, 2, 64, bf16, packed=True)
    elif device == "cuda":
        for lengths, Hq in (([4096] * 4, 32), ([16384], 32), ([4096] * 8, 16)):
            yield case(device, lengths, Hq, 8, 128, bf16, packed=False)
        yield case(device, [2048] * 16, 32, 8, 128, bf16, packed=True)
    else:
        for dtype in (fp32, bf16):
            yield case(device, [512], 16, 8, 128, dtype, packed=False)


def run(cos, sin, **inputs):
    return qk_norm_attention(rope=(cos, sin), **inputs)


def case(device: str, lengths: list[int], Hq: int, Hk: int, D: int, dtype: torch.dtype, packed: bool) -> Case:
    base = attention.case(device, lengths, Hq, Hk, D, dtype, packed)

    def make(seed: int) -> InputSet:
        data = base.make(seed)
        g = torch.Generator(device).manual_seed(seed + 1)
        weights = {n: (1 + 0.1 * torch.randn(D, generator=g, device=device)).to(dtype) for n in ("q_weight", "k_weight")}
        frequency = 1e6 ** (-torch.arange(0, D, 2, device=device) / D)
        position = torch.cat([torch.arange(n, device=device) for n in (lengths if packed else lengths[:1])])
        angle = position.unsqueeze(1) * frequency
        return InputSet(data.inputs | weights | {"cos": angle.cos(), "sin": angle.sin()}, data.cotangents)

    def reference(data: InputSet) -> tuple[list, list]:
        """Norm and RoPE in float32 around attention's blockwise reference."""
        wide = {n: t.float() if t.is_floating_point() else t for n, t in data.inputs.items()}
        leaves = [wide[n].requires_grad_() for n in ("q", "k", "q_weight", "k_weight")]
        rotated = qk_norm_rope_ref(*leaves, wide["cos"], wide["sin"])
        inner = InputSet({"q": rotated[0].detach(), "k": rotated[1].detach(), "v": wide["v"]}, data.cotangents)
        out, (dq, dk, dv) = attention.reference(inner, lengths)
        dq, dk, *dweights = torch.autograd.grad(rotated, leaves, (dq, dk))
        return out, [dq, dk, dv, *dweights]

    name = base.name.replace("attention ", "qk_norm_attention ", 1)
    return Case(
        "qk_norm_attention", name, make, run, reference, 2 * TOLERANCE[dtype], base.ceiling, flops=base.flops, grads=GRADS,
        context=base.context,
    )
