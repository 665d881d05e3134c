"""AdamW and Muon, learning-rate schedules as pure functions of the step, clipping without host sync.

Sources: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); Muon, Jordan et al. 2024
(kellerjordan.github.io/posts/muon), its step scaled to AdamW's as in Liu et al. 2025 (arXiv 2502.16982, section 2.2);
warm-up, stable, decay: Hu et al. 2024 (arXiv 2404.06395), with the 1 - sqrt decay of Hägele et al. 2024 (arXiv
2405.18392).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from . import adamw

SCHEDULES = ("wsd", "cosine")
OPTIMIZERS = ("adamw", "muon")
STATES = ("float32", "float32-moments", "bfloat16")
PIECE = 1 << 22  # elements that are in float32 at a time where the state is not


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
def clip_factor(grads: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """(global 2-norm, what clipping to ``max_norm`` multiplies by), float32 scalars on the device that were never read on
    the host. For fused optimizers, whose ``grad_scale`` divides as the step reads: bfloat16 gradients are multiplied a
    tensor at a time otherwise (3.1 ms for 0.6B parameters on an H100, of which memory needs 0.8). Raises ValueError for
    max_norm <= 0 (inf: only measure)."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; expected above 0 (inf: no clipping)")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def round_stochastic_(out: Tensor, x: Tensor, generator: torch.Generator) -> None:
    """Writes float32 ``x`` to bfloat16 ``out``: each element to one of its two neighbours, with probabilities that make
    the mean ``x``. What is not finite stays as it is."""
    # A bfloat16 is the upper half of a float32; a random lower half carries into it as often as x's own is large.
    bits = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
    out.copy_(torch.where(x.isfinite(), bits.view(torch.float32), x))


def orthogonalised(x_BMN: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T: five steps of a quintic Newton-Schulz iteration, which take the singular values
    to somewhere near 1 (0.7 to 1.2). In bfloat16 on a GPU; on CPUs without instructions for it that is the slow one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    x = x_BMN.mT if tall else x_BMN  # the Gram matrix is of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x if x.device.type == "cpu" else x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@torch.no_grad()
def muon_(
    weight_BMN: Tensor, grad_BMN: Tensor, momentum_BMN: Tensor, *, lr: float, weight_decay: float, beta: float = 0.95
) -> None:
    """A Muon step with Nesterov momentum for a batch of matrices, all float32. The update's root mean square is about
    0.2, AdamW's, so both take the same learning rate and weight decay."""
    momentum_BMN.lerp_(grad_BMN, 1 - beta)
    update = orthogonalised(grad_BMN.lerp(momentum_BMN, beta))
    weight_BMN.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * 0.2 * math.sqrt(max(weight_BMN.shape[-2:])))


class SpikeGuard:
    """Tells steps to skip: those whose loss or gradient norm is not finite, or more than ``sigma`` standard deviations
    above its mean over the last ``window`` steps that were taken (half a window must have been). Reads nothing from the
    device. Source of the rule: SkipStepOptimizer of OLMo-core (github.com/allenai/OLMo-core)."""

    def __init__(self, sigma: float, window: int, device: torch.device | str = "cpu"):
        if not sigma > 0 or window < 2:
            raise ValueError(f"sigma is {sigma}, window {window}; expected sigma > 0 and window >= 2")
        self.sigma = sigma
        self.recent = torch.zeros(2, window, device=device)  # losses; norms
        self.taken = torch.zeros((), dtype=torch.int64, device=device)
        self.skip = torch.zeros((), device=device)  # the last verdict: 1 or 0

    @torch.no_grad()
    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """float32 scalar: 1 to skip the step, else 0."""
        now_2 = torch.stack((loss.detach(), norm)).float()
        window = self.recent.shape[1]
        places = torch.arange(window, device=now_2.device)
        valid = (places < self.taken).double()
        n = valid.sum().clamp(min=1)
        recent = self.recent.double()
        mean_2 = (recent * valid).sum(1) / n
        std_2 = (((recent - mean_2[:, None]) ** 2 * valid).sum(1) / n).sqrt()
        far = ((now_2 - mean_2) > self.sigma * std_2.clamp(min=1e-3 * mean_2.abs() + 1e-8)).any() & (self.taken >= window // 2)
        skip = far | ~now_2.isfinite().all()
        here = (places == self.taken % window) & ~skip
        self.recent.copy_(torch.where(here, now_2[:, None], self.recent))
        self.taken += ~skip
        return self.skip.copy_(skip)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"guard.recent": self.recent, "guard.taken": self.taken}


class Optimizer:
    """AdamW, or Muon for the matrices in the layers and AdamW for the rest. Weight decay is for matrices only.

    torch.optim.Muon takes no batches of matrices, such as experts are; hence a Muon of our own.

    Args:
        model: Muon takes its parameters of two or more dimensions below ``layers``: not the embedding, nor the head.
        kind: "adamw" or "muon".
        states: what is kept per parameter, for bfloat16 parameters in bytes beside weight and gradient (Muon: without
            the 4 or 2 of the second moment):
            "float32": master weights, moments and the sum of the gradients in float32, the parameters being roundings
            of the masters (4 + 8, and the gradient takes 4 instead of 2);
            "float32-moments": no masters; the weights are rounded stochastically, so that small updates add up (8);
            "bfloat16": moments in bfloat16, too, also rounded stochastically (4).
            Without masters the gradients of micro-steps are summed in the parameters' dtype.
        seed: of the stochastic rounding, which is a function of seed, step and parameter name (per type of device).
        guard: if given, steps it tells to skip change neither weights nor moments. They count in AdamW's bias correction.

    State is addressed by parameter name. A step reads nothing from the device. On CUDA, AdamW is one pass over memory
    with the kernel of `adamw`; what that does not take, and Muon, goes through torch, in float32 a piece at a time.

    Raises:
        ValueError: unknown options, dtypes other than float32 and bfloat16, or nothing for Muon to do.
    """

    def __init__(
        self, model: nn.Module, *, kind: str = "adamw", states: str = "float32",
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1, seed: int = 0,
        guard: SpikeGuard | None = None,
    ):
        for name, value, known in (("kind", kind, OPTIMIZERS), ("states", states, STATES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {known}")
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if wrong := [n for n, p in self._params.items() if p.dtype not in (torch.float32, torch.bfloat16)]:
            raise ValueError(f"{wrong[0]} is {self._params[wrong[0]].dtype}; expected torch.float32 or torch.bfloat16")
        self._weights = dict(self._params)  # what is updated: the parameters or their masters
        if states == "float32":
            for name, p in self._params.items():
                if p.dtype != torch.float32:
                    self._weights[name] = p.detach().float()
                    p.register_post_accumulate_grad_hook(self._move_grad(self._weights[name]))
        self._muon = {n for n in self._params if kind == "muon" and is_matrix_of_a_layer(n, self._params[n])}
        if kind == "muon" and not self._muon:
            raise ValueError("kind is 'muon', but no parameter is a matrix below 'layers'")
        dtype = torch.bfloat16 if states == "bfloat16" else torch.float32
        self._moments = {
            n: {key: torch.zeros_like(w, dtype=dtype, requires_grad=False) for key in
                (("momentum",) if n in self._muon else ("exp_avg", "exp_avg_sq"))} for n, w in self._weights.items()
        }
        self._step, self._seed, self.guard = 0, seed, guard
        self._stochastic = states != "float32"
        self._options, self._weight_decay = {"betas": betas, "eps": eps}, weight_decay
        self._generators = {p.device: torch.Generator(p.device) for p in self._params.values()}
        for device in self._generators:
            adamw.runs(device)  # now, as it waits for the device

    @staticmethod
    def _move_grad(master: Tensor):
        def hook(param: Tensor) -> None:
            master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
            param.grad = None

        return hook

    @torch.no_grad()
    def step(self, lr: float, max_norm: float, *, loss: Tensor | None = None) -> Tensor:
        """Clips, updates and drops the gradients; parameters without one are left alone. Returns the gradient norm
        before clipping, on the device. ``loss`` is for the guard, which needs it."""
        live = {n: w for n, w in self._weights.items() if w.grad is not None}
        norm, factor = clip_factor((w.grad for w in live.values()), max_norm)
        skip = None if self.guard is None else self.guard(loss, norm)
        self._step += 1
        pairs = [n for n in live if n not in self._muon]
        fused = {n for n in pairs if adamw.fits(live[n], live[n].grad, *self._moments[n].values())}
        if unscaled := [w.grad for n, w in live.items() if n not in fused]:
            torch._foreach_mul_(unscaled, factor)
        together = defaultdict(list)
        for name, w in live.items():
            if name in fused or not (name in self._muon or self._in_pieces(name)):
                together[name in fused, self._decay(name), w is self._params[name]].append(name)
            else:
                self._step_in_pieces(name, lr, skip)
        for (by_kernel, decay, alone), names in together.items():
            weights = [live[n] for n in names]
            update, extra = adamw.adamw_torch_, {}
            if by_kernel:
                keys = [self._key(n) >> 1 for n in names] if self._stochastic else None
                copies = None if alone else [self._params[n] for n in names]
                update, extra = adamw.adamw_fused_, {"scale": factor.reciprocal(), "copies": copies, "keys": keys}
            moments, squares = ([self._moments[n][key] for n in names] for key in ("exp_avg", "exp_avg_sq"))
            update(
                weights, [w.grad for w in weights], moments, squares, self._steps(weights),
                lr=lr, weight_decay=decay, skip=skip, **extra, **self._options,
            )
        for name, w in live.items():
            w.grad = None
            if w is not self._params[name] and name not in fused:
                self._params[name].copy_(w)
        return norm

    def _steps(self, weights: list[Tensor]) -> list[Tensor]:
        """The steps before this one, for each weight."""
        return list(torch.full((len(weights),), self._step - 1.0, device=weights[0].device).unbind())

    def _key(self, name: str) -> int:
        """64 bits, of the noise for a parameter at this step."""
        return int.from_bytes(hashlib.sha256(f"{self._seed} {self._step} {name}".encode()).digest()[:8])

    def _decay(self, name: str) -> float:
        return self._weight_decay if self._params[name].dim() >= 2 else 0.0

    def _in_pieces(self, name: str) -> bool:
        return any(t.dtype != torch.float32 for t in (self._weights[name], *self._moments[name].values()))

    def _step_in_pieces(self, name: str, lr: float, skip: Tensor | None) -> None:
        weight, options = self._weights[name], {"lr": lr, "weight_decay": self._decay(name)}
        generator = self._generators[weight.device]
        generator.manual_seed(self._key(name))
        for grad, *kept in zip(*(self._pieces(name, t) for t in (weight.grad, weight, *self._moments[name].values()))):
            grad, wide = grad.float(), [t.float() if skip is None else t.to(torch.float32, copy=True) for t in kept]
            if name in self._muon:
                muon_(wide[0], grad, wide[1], **options)
            else:
                columns = ([t] for t in (wide[0], grad, *wide[1:]))
                adamw.adamw_torch_(*columns, self._steps(wide[:1]), **options, **self._options)
            for t, x in zip(kept, wide):
                x = x if skip is None else torch.where(skip > 0, t.float(), x)
                if t.dtype != torch.float32:
                    round_stochastic_(t, x, generator)  # leaves alone what is a bfloat16 already
                elif t is not x:  # .float() of float32 is the tensor itself
                    t.copy_(x)

    def _pieces(self, name: str, t: Tensor) -> Iterator[Tensor]:
        """Views of at most PIECE elements; for Muon of whole matrices [B, M, N], gate and up projections apart."""
        if name not in self._muon:
            return iter(t.view(-1).split(PIECE))
        matrices = t.view(-1, t.shape[-2] // (2 if "gate_up_proj" in name else 1), t.shape[-1])
        return iter(matrices.split(max(1, PIECE // matrices[0].numel())))

    def state_tensors(self) -> dict[str, Tensor]:
        """{"step", per parameter "exp_avg.NAME" and "exp_avg_sq.NAME" or (Muon) "momentum.NAME", and "master.NAME"
        where there is one, and the guard's}."""
        state = {f"{key}.{n}": t for n, moments in self._moments.items() for key, t in moments.items()}
        state |= {f"master.{n}": w for n, w in self._weights.items() if w is not self._params[n]}
        return state | {"step": torch.tensor(self._step)} | (self.guard.state_tensors() if self.guard else {})

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state_tensors``. Raises ValueError for missing or extra tensors, another shape or dtype."""
        own = self.state_tensors()
        wanted, got = ({k: f"{t.dtype} {tuple(t.shape)}" for k, t in tensors.items()} for tensors in (own, state))
        if wrong := sorted(k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k)):
            k = wrong[0]
            raise ValueError(
                f"optimizer state does not fit the model in {len(wrong)} tensors; first: {k} is "
                f"{got.get(k, 'missing')}; expected {wanted.get(k, 'none')}"
            )
        for key, t in own.items():
            t.copy_(state[key])
        self._step = int(own["step"])
        for name, w in self._weights.items():
            if w is not self._params[name]:
                self._params[name].copy_(w)


def is_matrix_of_a_layer(name: str, p: Tensor) -> bool:
    return p.dim() >= 2 and "layers" in name.split(".")
