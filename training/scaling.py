"""Scaling laws from a ladder of small runs: loss against size and tokens, and the best learning rate and batch.

The Qwen3 report (section 3.2) predicts the learning rate and batch size of every model and stage so, without figures or
formulas. Here: L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556, approach 3), and power laws for
the best rate and batch (as DeepSeek 2024, arXiv 2401.02954, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Run:
    """One rung: non-embedding parameters, training tokens, held-out loss in nats per token."""

    params: float
    tokens: float
    loss: float
    lr: float = 0.0
    batch_tokens: float = 0.0


@dataclass(frozen=True)
class LossLaw:
    """L = E + A / N^a + B / D^b. ``error``: root mean square of ln(predicted / measured) on the runs it was fitted to."""

    E: float
    A: float
    a: float
    B: float
    b: float
    error: float

    def __call__(self, params: float, tokens: float) -> float:
        return self.E + self.A / params**self.a + self.B / tokens**self.b

    def best_split(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) of the least loss for 6 N D FLOPs."""
        G = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        budget = flops / 6
        return G * budget ** (self.b / (self.a + self.b)), budget ** (self.a / (self.a + self.b)) / G


def fit_loss(runs: Sequence[Run]) -> LossLaw:
    """Fits the law to the best run of each (size, tokens): given the exponents, the rest is linear least squares of the
    relative errors, so only two exponents are searched, on ever finer grids.

    Raises ValueError for fewer than 6 rungs, or fewer than 2 sizes or numbers of tokens (five constants need more), and
    when no law with E, A, B >= 0 fits: the losses do not fall with size and tokens.
    """
    best: dict[tuple[float, float], float] = {}
    for r in runs:
        best[r.params, r.tokens] = min(r.loss, best.get((r.params, r.tokens), math.inf))
    sizes, lengths = len({n for n, _ in best}), len({d for _, d in best})
    if len(best) < 6 or sizes < 2 or lengths < 2:
        raise ValueError(f"{len(best)} rungs of {sizes} sizes and {lengths} lengths; expected at least 6, of 2 and 2")
    N, D = np.array(list(best), np.float64).T
    loss = np.array(list(best.values()))
    n0, d0 = N.min(), D.min()  # keeps the columns near 1

    def solve(a: float, b: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(N), (N / n0) ** -a, (D / d0) ** -b], 1) / loss[:, None]
        x = np.linalg.lstsq(columns, np.ones_like(loss), rcond=None)[0]
        fits = min(a, b) > 0 and x.min() >= 0
        return (float(np.square(columns @ x - 1).mean()) if fits else math.inf), x

    centre, width = (0.6, 0.6), 0.55  # exponents of 0.05 to 1.15 to begin with
    for _ in range(12):
        offsets = np.linspace(-1, 1, 13) * width
        grid = [(centre[0] + i, centre[1] + j) for i in offsets for j in offsets]
        centre = min(grid, key=lambda ab: solve(*ab)[0])
        width /= 2.5
    error, (E, A, B) = solve(*centre)
    if not math.isfinite(error):
        raise ValueError("no law with positive constants fits: the losses do not fall with size and tokens")
    a, b = map(float, centre)
    law = LossLaw(float(E), float(A * n0**a), a, float(B * d0**b), b, 0.0)
    off = [math.log(law(n, d) / x) for n, d, x in zip(N, D, loss)]
    return replace(law, error=float(np.sqrt(np.mean(np.square(off)))))


@dataclass(frozen=True)
class PowerLaw:
    """y = c N^n D^d; a constant where the runs hold one size or one number of tokens."""

    c: float
    n: float
    d: float

    def __call__(self, params: float, tokens: float) -> float:
        return self.c * params**self.n * tokens**self.d


def best_of(values: Sequence[float], losses: Sequence[float]) -> tuple[float, bool]:
    """(the value of the least loss by a parabola through the logarithms of the values, whether it lies inside them).

    Raises ValueError for fewer than 3 distinct values."""
    if len(set(values)) < 3:
        raise ValueError(f"{len(set(values))} distinct values; expected at least 3 for a parabola")
    x = np.log(np.asarray(values, np.float64))
    curve, slope, _ = np.polyfit(x, np.asarray(losses, np.float64), 2)
    if curve <= 0:  # no minimum: the end with the lower loss
        return float(values[int(np.argmin(losses))]), False
    peak = -slope / (2 * curve)
    return float(np.exp(np.clip(peak, x.min(), x.max()))), bool(x.min() < peak < x.max())


def fit_power(points: Sequence[tuple[float, float, float]]) -> PowerLaw:
    """Least squares on logarithms of (parameters, tokens, y)."""
    if not points:
        raise ValueError("no points to fit a power law to")
    N, D, y = np.log(np.asarray(points, np.float64)).T
    columns = [np.ones_like(N)] + [c for c in (N, D) if np.ptp(c) > 1e-9]
    solution = iter(np.linalg.lstsq(np.stack(columns, 1), y, rcond=None)[0].tolist())
    c = math.exp(next(solution))
    n, d = (next(solution) if np.ptp(column) > 1e-9 else 0.0 for column in (N, D))
    return PowerLaw(c, n, d)


@dataclass(frozen=True)
class Plan:
    """What a ladder predicts for a run. ``lr_inside``, ``batch_inside``: share of the rungs with at least three rates or
    batches where the best lay inside those tried; elsewhere it is a bound. 0.0 for batches where none were tried."""

    loss: float
    lr: float
    batch_tokens: float
    lr_inside: float
    batch_inside: float


def predict(runs: Sequence[Run], *, params: float, tokens: float) -> tuple[Plan, LossLaw, PowerLaw]:
    """Loss, learning rate and batch of a run from a ladder's, with the laws of loss and rate.

    Loss and rate are from the runs with the commonest batch, since a rung with other batches would seem better than its
    neighbours; the batch is from the rungs where at least three were tried, else the commonest.

    Raises ValueError: as ``fit_loss``, or no rung with three rates.
    """
    batches = [r.batch_tokens for r in runs]
    common = max(sorted(set(batches)), key=batches.count) if batches else 0.0
    law = fit_loss([r for r in runs if r.batch_tokens == common])
    rates = _best_per_rung([r for r in runs if r.batch_tokens == common], lambda r: r.lr)
    if not rates:
        raise ValueError("no rung has three learning rates; expected at least one, to find the best")
    sizes = _best_per_rung(runs, lambda r: r.batch_tokens)
    rate_law = fit_power([point for point, _ in rates])
    batch = fit_power([point for point, _ in sizes])(params, tokens) if sizes else common
    inside = [float(np.mean([ok for _, ok in found])) if found else 0.0 for found in (rates, sizes)]
    return Plan(law(params, tokens), rate_law(params, tokens), batch, *inside), law, rate_law


def _best_per_rung(
    runs: Sequence[Run], value: Callable[[Run], float]
) -> list[tuple[tuple[float, float, float], bool]]:
    """[((parameters, tokens, best value), whether inside)] of the rungs with three values or more."""
    found = []
    for n, d in sorted({(r.params, r.tokens) for r in runs}):
        least: dict[float, float] = {}
        for r in runs:
            if (r.params, r.tokens) == (n, d):
                least[value(r)] = min(r.loss, least.get(value(r), math.inf))
        if len(least) >= 3:
            best, inside = best_of(list(least), list(least.values()))
            found.append(((n, d, best), inside))
    return found
