"""Losses through a head of Qwen3's vocabulary: linear_cross_entropy at the widths of the 0.6B and 8B models and over many
tokens, linear_kl from a 1.7B teacher to a 0.6B student.

The peak of the long cases is higher than that of 8,192 tokens by the gradient of the hidden states (2·T·H bytes) and larger
chunks (`default_chunk`: 4,096 tokens for 768); between the two long ones only the first differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qwen3_kernels import linear_cross_entropy, linear_kl
from qwen3_kernels.ops.linear_cross_entropy import linear_cross_entropy_ref
from qwen3_kernels.ops.linear_kl import linear_kl_ref

from ..ceilings import short_name
from ..harness import TOLERANCE, Case, InputSet

GRADS = ("hidden", "head")
REFERENCE_TOKENS = 2048  # of the reference at a time


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        shapes, long = [(64, 32, 520, torch.bfloat16)], [(2 * REFERENCE_TOKENS + 64, 32, 520, torch.bfloat16)]
        kl = [(64, 32, 48, 520, torch.bfloat16)]
    elif device == "cuda":
        shapes = [(8192, h, 151936, torch.bfloat16) for h in (1024, 4096)]
        long = [(n, 1024, 151936, torch.bfloat16) for n in (32768, 65536)]
        kl = [(8192, 1024, 2048, 151936, torch.bfloat16)]
    else:
        shapes, long = [(64, 1024, 151936, dtype) for dtype in (torch.float32, torch.bfloat16)], []
        kl = [(64, 1024, 2048, 151936, torch.float32)]
    for shape in shapes:
        yield case(device, *shape)
    for shape in long:  # logits as a whole are 20 GB in bf16 at the longest
        yield case(device, *shape, peers=("liger",))
    for shape in kl:
        yield kl_case(device, *shape)


def states_and_head(g: torch.Generator, n: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Their logits have deviation 2, as a trained model's do, rather than a flat softmax."""
    hidden = torch.randn(n, h, generator=g, device=g.device, dtype=dtype)
    return hidden, torch.randn(v, h, generator=g, device=g.device, dtype=dtype).mul_(2 * h**-0.5)


def in_parts(ref: Callable[..., Tensor], per_token: Sequence[str], count: Callable[[dict], int]) -> Callable:
    """A reference in float32 that holds the logits of `REFERENCE_TOKENS` alone: the mean over ``count(inputs)`` tokens, with
    gradients. ``per_token``: the inputs that are cut."""

    def run(data: InputSet) -> tuple[list, list]:
        wide = {n: t.float() if t.is_floating_point() else t for n, t in data.inputs.items()}
        kept, total, dhidden, dhead = count(wide), 0.0, [], torch.zeros_like(wide["head"])
        for start in range(0, len(wide["hidden"]), REFERENCE_TOKENS):
            part = wide | {n: wide[n][start : start + REFERENCE_TOKENS] for n in per_token}
            wanted = [part[n].detach().requires_grad_() for n in GRADS]
            loss = ref(**(part | dict(zip(GRADS, wanted))), reduction="num_items", num_items=kept)
            grads = torch.autograd.grad(loss, wanted, data.cotangents[0])
            total += loss.detach()
            dhidden.append(grads[0])
            dhead += grads[1]
        return [total], [torch.cat(dhidden), dhead]

    return run


def case(device: str, n: int, h: int, v: int, dtype: torch.dtype, peers: tuple[str, ...] | None = None) -> Case:
    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        hidden, head = states_and_head(g, n, h, v, dtype)
        labels = torch.randint(v, (n,), generator=g, device=device)
        labels[::17] = -100
        return InputSet({"hidden": hidden, "head": head, "labels": labels}, (torch.ones((), device=device),))

    product = 2 * n * h * v
    return Case(
        "linear_cross_entropy", f"linear_cross_entropy {n}x{h} V{v} {short_name(dtype)}", make, linear_cross_entropy,
        in_parts(linear_cross_entropy_ref, ("hidden", "labels"), lambda inputs: int((inputs["labels"] != -100).sum())),
        3 * TOLERANCE[dtype], f"gemm_{short_name(dtype)}_tflops", flops={"fwd": product, "fwdbwd": 3 * product}, grads=GRADS,
        modes=("fwd", "fwdbwd"), context={"device": device, "dtype": dtype}, sets=2, peers=peers,
    )


def kl_case(device: str, n: int, h: int, teacher_h: int, v: int, dtype: torch.dtype) -> Case:
    """Forward KL; no gradient for the teacher."""

    def make(seed: int) -> InputSet:
        g = torch.Generator(device).manual_seed(seed)
        hidden, head = states_and_head(g, n, h, v, dtype)
        teacher_hidden, teacher_head = states_and_head(g, n, teacher_h, v, dtype)
        inputs = {"hidden": hidden, "head": head, "teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
        return InputSet(inputs, (torch.ones((), device=device),))

    product, taught = 2 * n * h * v, 2 * n * teacher_h * v
    return Case(
        "linear_kl", f"linear_kl {n}x{h} from {teacher_h} V{v} {short_name(dtype)}", make, linear_kl,
        in_parts(linear_kl_ref, ("hidden", "teacher_hidden"), lambda inputs: len(inputs["hidden"])), 3 * TOLERANCE[dtype],
        f"gemm_{short_name(dtype)}_tflops", flops={"fwd": product + taught, "fwdbwd": 3 * product + taught}, grads=GRADS,
        modes=("fwd", "fwdbwd"), context={"device": device, "dtype": dtype}, sets=2,
    )
