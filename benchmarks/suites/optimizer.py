"""A step of AdamW for all parameters of Qwen3 models, with the clip's scale, beside torch's fused one where that can.

Ours runs as `training.adamw.AdamW` (bf16) or as `training.optim.Optimizer` calls it; on a CPU, where the class takes
torch's step, there is bf16 alone, for a few small layers. The first step is held against float64, for some tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from training.adamw import AdamW, adamw_fused_, adamw_torch_

from ..harness import TOLERANCE, Clock, Row, Settings, describe, interleave, median, percentile, relative_error

BF16, FP32 = torch.bfloat16, torch.float32
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class Kind:
    """Dtypes of weights and gradients, of moments and of copies of the weights."""

    weight: torch.dtype
    moment: torch.dtype
    copy: torch.dtype | None = None
    stochastic: bool = False

    @property
    def bytes(self) -> int:
        """Per parameter: the gradient is read, the copy written, the others both."""
        return 3 * self.weight.itemsize + 4 * self.moment.itemsize + (self.copy.itemsize if self.copy else 0)


KINDS = {
    "bf16": Kind(BF16, BF16),
    "bf16 stochastic": Kind(BF16, BF16, stochastic=True),
    "bf16, fp32 moments": Kind(BF16, FP32, stochastic=True),
    "fp32 masters": Kind(FP32, FP32, copy=BF16),
}


# All of a case is there twice, for torch, too: larger models in more than bfloat16 fill the card.
CASES = [("Qwen3-0.6B", tuple(KINDS)), ("Qwen3-1.7B", ("bf16", "bf16 stochastic"))]
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 1000,
         "num_attention_heads": 2, "num_key_value_heads": 1}


def rows(
    device: str, quick: bool, peers: list[str], ceilings: dict[str, float], say: Callable[[str], None],
    wanted: Callable[[str], bool] = lambda case: True,
) -> Iterator[Row]:
    small, settings = quick or device == "cpu", Settings.for_run(device, quick)
    for model, kinds in CASES[:1] if small else CASES:
        with torch.device("meta"):
            shapes = [p.shape for p in Qwen3(Qwen3Config.from_name(model, **(SMALL if small else {}))).parameters()]
        for name in kinds[:1] if device == "cpu" else kinds:
            if wanted(case := f"AdamW {'small' if small else model} {name}"):
                yield from compare(case, KINDS[name], shapes, "torch" in peers, settings, ceilings, say)
                if device == "cuda":
                    torch.cuda.empty_cache()


def compare(
    case: str, kind: Kind, shapes: list[torch.Size], with_torch: bool, settings: Settings, ceilings: dict[str, float],
    say: Callable[[str], None],
) -> list[Row]:
    """Ours, and torch's where all is of one dtype and rounded to the nearest."""
    device, generator = settings.device, torch.Generator(settings.device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator, dtype=kind.weight)
    grads = [draw(shape) for shape in shapes]
    start = [draw(shape).mul_(0.02) for shape in shapes]
    scale = torch.tensor(1.25, device=device)
    torch_too = with_torch and kind.weight == kind.moment and not kind.stochastic
    impls = {"ours": ours} | ({"torch": by_torch} if torch_too else {})
    exact = {i: after_a_step(start[i], grads[i], scale) for i in {1, 2, len(shapes) - 1}}
    steps, found = {}, []
    for impl, make in impls.items():
        row = Row("optimizer", case, impl, "step", backend="triton" if device == "cuda" and impl == "ours" else "torch")
        try:
            say(f"{case}: checking {impl}")
            weights = [w.clone() for w in start]
            steps[impl] = make(kind, weights, grads, scale)
            steps[impl]()
            row.rel_error = max(relative_error(weights[i], want) for i, want in exact.items())
            if not row.rel_error <= TOLERANCE[kind.weight]:
                raise ValueError(f"wrong weights: relative error {row.rel_error:.3g}")
        except Exception as e:  # is the row's text
            row.error = describe(e)
            steps.pop(impl, None)
        found.append(row)
    del start, exact
    clock, times = Clock(device), {impl: [] for impl in steps}
    for impl in interleave(list(steps), settings.turns + 2) if steps else ():
        say(f"{case}: timing {impl}")
        times[impl].append(clock.time([steps[impl]] * 2, impl))
    total = kind.bytes * sum(shape.numel() for shape in shapes)
    for row in found:
        if ms := times.get(row.impl, [])[2:]:  # without the warm-up
            row.ms, row.ms_p20, row.ms_p80, row.turns = median(ms), percentile(ms, 0.2), percentile(ms, 0.8), len(ms)
            row.tbps = total / row.ms * 1e-9
            row.pct_of_ceiling = 100e3 * row.tbps / ceilings["copy_gbps"]
            if (seconds := clock.enqueue_s.get(row.impl)) is not None:
                say(f"{case}: {row.impl} {row.ms:.3g} ms; the CPU enqueues a step in {seconds / 2 * 1e3:.2g} ms")
    return found


def ours(kind: Kind, weights: list[Tensor], grads: list[Tensor], scale: Tensor) -> Callable[[], None]:
    if kind == KINDS["bf16"]:
        return _stepping(AdamW, weights, grads, scale)
    moments, squares = ([torch.zeros_like(w, dtype=kind.moment) for w in weights] for _ in range(2))
    counts = list(torch.zeros(len(weights), device=scale.device).unbind())
    return partial(
        adamw_fused_, weights, grads, moments, squares, counts, scale=scale,
        copies=[torch.empty_like(w, dtype=kind.copy) for w in weights] if kind.copy else None,
        keys=range(len(weights)) if kind.stochastic else None, **OPTIONS,
    )


def by_torch(kind: Kind, weights: list[Tensor], grads: list[Tensor], scale: Tensor) -> Callable[[], None]:
    """Its gradients are its own, as torch divides them in place. It copies masters in a second pass."""
    step = _stepping(partial(torch.optim.AdamW, fused=True), weights, [g.clone() for g in grads], scale)
    if kind.copy is None:
        return step
    copies = [torch.empty_like(w, dtype=kind.copy) for w in weights]

    def with_copies() -> None:
        step()
        torch._foreach_copy_(copies, weights)

    return with_copies


def _stepping(optimizer: Callable, weights: list[Tensor], grads: list[Tensor], scale: Tensor) -> Callable[[], None]:
    for w, g in zip(weights, grads):
        w.grad = g
    made = optimizer(weights, **OPTIONS)
    made.grad_scale = scale
    return made.step


def after_a_step(weight: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    w = weight.double()
    moments = ([torch.zeros_like(w)] for _ in range(2))
    adamw_torch_([w], [grad.double() / scale.double()], *moments, [torch.zeros_like(scale)], **OPTIONS)
    return w
