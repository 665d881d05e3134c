"""A small forward and backward of every op against fp64, relative to the error of plain torch in the same dtype."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from . import dispatch
from .ops.attention import attention, attention_ref
from .ops.cross_entropy import cross_entropy, cross_entropy_ref
from .ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from .ops.linear_kl import linear_kl, linear_kl_ref
from .ops.moe_experts import moe_experts, moe_experts_ref
from .ops.moe_router import moe_router, moe_router_ref
from .ops.paged_attention import FP8, paged_attention, paged_attention_ref
from .ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from .ops.rms_norm import rms_norm, rms_norm_ref
from .ops.swiglu import swiglu, swiglu_ref
from .ops.swiglu_mlp import MIN_ROWS, swiglu_mlp, swiglu_mlp_ref

LIMIT = 2.0  # DESIGN rule: error at most twice that of plain torch


def error_ratio(got: Tensor, plain: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ over ‖plain − truth‖, where the latter counts as at least one rounding of ``plain``'s dtype: its root
    mean square over many numbers, a whole unit in the last place for a single one, whose error in ``plain`` is luck."""
    truth = truth.double().cpu()
    error = (got.double().cpu() - truth).norm()
    floor = torch.finfo(plain.dtype).eps * (1.0 if truth.numel() == 1 else 0.25) * truth.norm()
    ratio = error / torch.maximum((plain.double().cpu() - truth).norm(), floor).clamp(min=1e-300)
    return float("inf") if ratio.isnan() else ratio.item()


# Floating arguments that get no gradient.
CONSTANTS = frozenset({"cos", "sin", "k8", "v8", "scales", "teacher_hidden", "teacher_head", "logprobs"})


def run(op: str, backend: str, device: str, dtype: torch.dtype) -> float:
    """Error ratio of one backend on small inputs; infinite when it raises.

    An op's first call may come from anywhere: a checkpointed layer, autocast, inference mode, a trace. All of that
    belongs to the caller's thread, so the check has one of its own.
    """
    function, ref = PAIRS[op]
    index = torch.cuda.current_device() if device == "cuda" else None

    def check() -> float:
        if index is not None:
            torch.cuda.set_device(index)
        with torch.enable_grad(), dispatch.use(backend, op):
            return compare(function, ref, inputs_for(op, device, dtype))

    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(check).result()
    except Exception as e:  # a backend that cannot even run is a failed check, and the doctor shows why
        warnings.warn(f"qwen3_kernels: self-check of {op} on backend '{backend}' raised {e!r}", stacklevel=2)
        return float("inf")


def outputs_and_grads(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of ``function(**inputs)`` and gradients of the floating inputs under fixed pseudo-random cotangents; none of an
    op for inference."""
    inputs = {
        n: t.detach().clone().requires_grad_(t.is_floating_point() and n not in CONSTANTS) for n, t in inputs.items()
    }
    out = function(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in out]
    wanted = [t for t in inputs.values() if t.requires_grad]
    differentiable = any(o.requires_grad for o in out)
    grads = torch.autograd.grad(out, wanted, cotangents, allow_unused=True) if differentiable else ()
    return [o.detach() for o in out] + [g for g in grads if g is not None]


def ratios(op: Callable, ref: Callable, inputs: dict[str, Tensor], **options) -> list[float]:
    """Error ratio of each output and gradient of ``op``; truth is ``ref`` in fp64 on the CPU."""
    wide, wide_options = ({n: _wide(t) for n, t in d.items()} for d in (inputs, options))
    truth = outputs_and_grads(lambda **kw: ref(**kw, **wide_options), wide)
    plain = outputs_and_grads(lambda **kw: ref(**kw, **options), inputs)
    got = outputs_and_grads(lambda **kw: op(**kw, **options), inputs)
    return [error_ratio(g, p, t) for g, p, t in zip(got, plain, truth, strict=True)]


def compare(op: Callable, ref: Callable, inputs: dict[str, Tensor], **options) -> float:
    """The worst of `ratios`."""
    return max(ratios(op, ref, inputs, **options))


def _wide(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double() if value.is_floating_point() else value.cpu()


def inputs_for(op: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Small random inputs with odd sizes, by keyword of the op."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    if op == "rms_norm":
        return {"x": rand(5, 72), "weight": rand(72), "residual": rand(5, 72)}
    if op == "swiglu":
        return {"gate": rand(5, 72), "up": rand(5, 72)}
    if op == "cross_entropy":
        return {"logits": rand(6, 519), "labels": torch.tensor([0, 518, -100, 7, 100, 3], device=device)}
    if op == "linear_cross_entropy":
        labels = torch.tensor([0, 519, -100, 7, 100, 3], device=device)
        H = 2056 if device == "cuda" else 64  # a wide head's gradient is another kernel's there
        return {"hidden": rand(6, H), "head": rand(520, H) * (2 * H**-0.5), "labels": labels}
    if op == "linear_kl":
        logprobs, ids = rand(6, 520).float().log_softmax(-1).topk(5)
        return {"hidden": rand(6, 64), "head": rand(520, 64) / 4, "teacher_hidden": rand(6, 72),
                "teacher_head": rand(520, 72) / 4, "ids": ids, "logprobs": logprobs}
    if op == "qk_norm_rope":
        angle = torch.rand(7, 32, generator=g) * 100
        return {"q": rand(7, 4, 64), "k": rand(7, 2, 64), "q_weight": rand(64), "k_weight": rand(64),
                "cos": angle.cos().to(device), "sin": angle.sin().to(device)}
    if op == "moe_router":
        return {"logits": rand(6, 40) * 2}
    if op == "moe_experts":
        ids = torch.tensor([[0, 4], [4, 2], [2, 0], [4, 5], [4, 0]], device=device)  # none to 1 and 3, one dropped
        weights = torch.rand(5, 2, generator=g).to(device)
        return {"x": rand(5, 64), "gate_up": rand(5, 96, 64) / 8, "down": rand(5, 64, 48) / 7, "ids": ids,
                "weights": weights}
    if op == "swiglu_mlp":
        return {"x": rand(MIN_ROWS + 5, 64), "gate": rand(72, 64) / 8, "up": rand(72, 64) / 8, "down": rand(64, 72) / 8}
    if op == "attention":
        n, width = (200, 128) if device == "cuda" else (40, 64)  # more than a block; the width that the kernels take
        cu = torch.tensor([0, 3, 3, n], dtype=torch.int32, device=device)
        return {"q": rand(n, 4, width), "k": rand(n, 2, width), "v": rand(n, 2, width), "cu_seqlens": cu}
    if op == "paged_attention":
        k, v = rand(6, 8, 2, 64), rand(6, 8, 2, 64)
        table = torch.tensor([[4, 1, -1], [5, 0, 2], [-1, -1, -1]], dtype=torch.int32, device=device)
        return {"q": rand(3, 2, 6, 64), "k_pages": k, "v_pages": v, "k8": k.to(FP8), "v8": v.to(FP8),
                "scales": torch.tensor([0.5, 1.5], device=device), "page_table": table,
                "lengths": torch.tensor([9, 24, 0], dtype=torch.int32, device=device)}
    raise ValueError(f"op is {op!r}; expected one of the ops in dispatch.OPS")


def _floats(router: Callable) -> Callable:
    """The outputs of the router that have gradients, with three experts a token."""

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        weights, _, stats = router(logits, 3, return_stats=True)
        return weights, *stats

    return run


def _taught(kl: Callable) -> Callable:
    """Both directions from a teacher's head, and one from its top tokens."""

    def run(
        hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, ids: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher = (teacher_hidden, teacher_head)
        return (kl(hidden, head, *teacher), kl(hidden, head, *teacher, direction="reverse"),
                kl(hidden, head, teacher_top=(ids, logprobs)))

    return run


def _paged(attend: Callable) -> Callable:
    """Outputs over pages of the queries' dtype, and over those of 8 bits."""

    @torch.no_grad()
    def run(
        q: Tensor, k_pages: Tensor, v_pages: Tensor, k8: Tensor, v8: Tensor, scales: Tensor, page_table: Tensor,
        lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return (attend(q, k_pages, v_pages, page_table, lengths),
                attend(q, k8, v8, page_table, lengths, k_scale=scales, v_scale=scales.flip(0)))

    return run


PAIRS = {
    "rms_norm": (rms_norm, rms_norm_ref),
    "swiglu": (swiglu, swiglu_ref),
    "cross_entropy": (cross_entropy, cross_entropy_ref),
    "linear_cross_entropy": (partial(linear_cross_entropy, chunk_tokens=4), linear_cross_entropy_ref),  # two chunks
    "linear_kl": (_taught(linear_kl), _taught(linear_kl_ref)),
    "qk_norm_rope": (qk_norm_rope, qk_norm_rope_ref),
    "moe_router": (_floats(moe_router), _floats(moe_router_ref)),
    "moe_experts": (moe_experts, moe_experts_ref), "swiglu_mlp": (swiglu_mlp, swiglu_mlp_ref),
    "attention": (attention, attention_ref),
    "paged_attention": (_paged(paged_attention), _paged(paged_attention_ref)),
}
