"""AdamW with float32 master weights, learning-rate schedules as pure functions of the step, clipping without host sync.

Sources: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); warm-up, stable, decay: Hu et al. 2024 (arXiv 2404.06395),
with the 1 - sqrt decay of Hägele et al. 2024 (arXiv 2405.18392).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SCHEDULES = ("wsd", "cosine")


def lr_scale(
    step: int, *, total: int, warmup: int, schedule: str = "wsd", decay: int | None = None, floor: float = 0.0
) -> float:
    """Factor of the peak learning rate at ``step`` in [0, total).

    Linear warm-up over ``warmup`` steps, then for "cosine" half a cosine towards ``floor``; for "wsd" a plateau and, over
    the last ``decay`` steps (default a fifth of all), 1 - sqrt towards ``floor``. ``floor`` would be reached at step
    ``total``, so that no step is spent at a rate of zero.

    Raises:
        ValueError: an unknown schedule, or lengths that do not fit in ``total``.
    """
    decay = (total // 5 if schedule == "wsd" else total - warmup) if decay is None else decay
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {SCHEDULES}")
    if not 0 <= step < total:
        raise ValueError(f"step is {step}; expected 0 <= step < total = {total}")
    if warmup < 0 or decay < 0 or warmup + decay > total or not 0 <= floor <= 1:
        raise ValueError(
            f"warmup {warmup}, decay {decay}, floor {floor}; expected warmup + decay <= {total} and floor in [0, 1]"
        )
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        done = (step - warmup) / (total - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    done = max(0, step - (total - decay)) / max(decay, 1)
    return floor + (1 - floor) * (1 - math.sqrt(done))


@torch.no_grad()
def clip_grad_norm_(grads: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales ``grads`` in place to a global 2-norm of at most ``max_norm``; returns the norm before, a device scalar
    that was never read on the host. Raises ValueError for max_norm <= 0 (inf: only measure)."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; expected above 0 (inf: no clipping)")
    grads = list(grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class AdamW:
    """``torch.optim.AdamW`` over a model's parameters; weight decay on matrices only, not on norm weights.

    For parameters that are not float32 it keeps float32 master weights and sums the gradients of micro-steps in
    float32; the parameters are roundings of the masters. State is addressed by parameter name.
    """

    def __init__(
        self, model: nn.Module, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1
    ):
        self._params = dict(model.named_parameters())
        self._masters = {n: p if p.dtype == torch.float32 else p.detach().float() for n, p in self._params.items()}
        for name, p in self._params.items():
            if self._masters[name] is not p:
                p.register_post_accumulate_grad_hook(self._move_grad(self._masters[name]))
        matrices = [m for m in self._masters.values() if m.dim() >= 2]
        others = [m for m in self._masters.values() if m.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Fused is one pass over memory, on CPU as on CUDA; elsewhere torch picks its own default.
        fused = all(m.device.type in ("cpu", "cuda") for m in self._masters.values()) or None
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=fused)

    @staticmethod
    def _move_grad(master: Tensor):
        def hook(param: Tensor) -> None:
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None

        return hook

    def step(self, lr: float, max_norm: float) -> Tensor:
        """Clips, updates, rounds the masters into the parameters and drops the gradients. Returns the gradient norm
        before clipping, on the device."""
        norm = clip_grad_norm_((m.grad for m in self._masters.values() if m.grad is not None), max_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in self._params.items():
                if self._masters[name] is not p:
                    p.copy_(self._masters[name])
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """{"exp_avg.NAME", "exp_avg_sq.NAME", "step.NAME" and, where the parameter is not float32, "master.NAME"}."""
        state = {}
        for name, m in self._masters.items():
            state.update({f"{key}.{name}": value for key, value in self._adamw.state[m].items()})
            if m is not self._params[name]:
                state[f"master.{name}"] = m
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_tensors``. Raises ValueError for missing, extra or mis-shaped tensors."""
        wanted = {}
        for name, m in self._masters.items():
            wanted |= {f"exp_avg.{name}": m.shape, f"exp_avg_sq.{name}": m.shape, f"step.{name}": torch.Size([])}
            if m is not self._params[name]:
                wanted[f"master.{name}"] = m.shape
        got = {k: v.shape for k, v in state.items()}
        if wrong := sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k)):
            k = wrong[0]
            raise ValueError(
                f"optimizer state does not fit the model in {len(wrong)} tensors; first: {k} is "
                f"{tuple(got[k]) if k in got else 'missing'}; expected {tuple(wanted[k]) if k in wanted else 'none'}"
            )
        for name, m in self._masters.items():
            self._adamw.state[m] = {
                key: state[f"{key}.{name}"].to(m.device, torch.float32).clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if m is not self._params[name]:
                m.copy_(state[f"master.{name}"])
                self._params[name].copy_(m)
