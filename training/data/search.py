"""The mixture that small proxy models learn most from.

As the Qwen3 report has it (section 3.1), the mixture is optimised over instances by their labels, by ablations on small
proxy models; the report gives no method. Here: proxies are trained on random mixtures, ridge regressions from the
mixtures' features to the logarithm of each held-out loss are fitted, the candidate with the least predicted mean is
taken, and proxies trained on it and on the natural mixture say whether that was true. Sources of the idea: Liu et al. 2024
(RegMix, arXiv 2407.01492), Ye et al. 2024 (data mixing laws, arXiv 2403.16952).

A mixture is a point of few numbers: a log factor per domain, a slope over the educational value, and a power that evens
out the languages. Together they give every label vector a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ..files import kept, write_json
from . import cells as cells_module
from .cells import Cell
from .mixture import weights


@dataclass(frozen=True)
class Point:
    """A mixture: log factor per domain, and the two numbers above."""

    domains: Mapping[str, float]
    slope: float = 0.0
    evenness: float = 0.0

    def factors(self, cells: Mapping[Cell, int]) -> dict[str, float]:
        """Factors per label for ``mixture.weights``."""
        language: dict[str, int] = {}
        for c, n in cells.items():
            language[c.language] = language.get(c.language, 0) + n
        largest = max(language.values())
        values = {c.educational_value for c in cells}
        return (
            {f"domain={d}": float(np.exp(x)) for d, x in self.domains.items()}
            | {f"educational_value={v}": float(np.exp(self.slope * (int(v) - 2.5))) for v in values if v.isdigit()}
            | {f"language={x}": float((n / largest) ** -self.evenness) for x, n in language.items()}
        )


def draw(cells: Mapping[Cell, int], rng: np.random.Generator, spread: float) -> Point:
    domains = sorted({c.domain for c in cells})
    logs = rng.normal(0, spread, len(domains))
    slope, evenness = float(rng.normal(0, spread / 3)), float(rng.uniform(0, 0.5))
    return Point(dict(zip(domains, (logs - logs.mean()).tolist())), slope, evenness)


def features(share: Mapping[Cell, float]) -> dict[str, float]:
    """What the regression sees of a mixture: log share per domain, log share of what is not in the two commonest
    languages, mean educational value."""
    domain: dict[str, float] = {}
    language: dict[str, float] = {}
    for c, w in share.items():
        domain[c.domain] = domain.get(c.domain, 0.0) + w
        language[c.language] = language.get(c.language, 0.0) + w
    rest = 1 - sum(sorted(language.values())[-2:])
    value = sum(w * int(c.educational_value) for c, w in share.items() if c.educational_value.isdigit())
    return {d: float(np.log(w + 1e-6)) for d, w in sorted(domain.items())} | {
        "other languages": float(np.log(rest + 1e-3)), "educational value": value,
    }


@dataclass(frozen=True)
class Ridge:
    """ln(loss) from features, per target. ``error``: root mean square of what each run is missed by when the fit is made
    without it; ``spread``: standard deviation of the targets, what a constant would miss."""

    names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray  # [1 + features, targets]
    error: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, float]], losses: np.ndarray, penalty: float = 0.1) -> Ridge:
        """``losses`` [runs, targets]. Raises ValueError for fewer than 4 runs."""
        if len(rows) < 4:
            raise ValueError(f"{len(rows)} runs; expected at least 4 to fit a regression")
        names = tuple(rows[0])
        x = np.array([[r[n] for n in names] for r in rows])
        mean, scale = x.mean(0), x.std(0) + 1e-9
        x = np.concatenate([np.ones((len(x), 1)), (x - mean) / scale], 1)
        y = np.log(losses)
        damp = penalty * np.eye(x.shape[1])
        damp[0, 0] = 0.0
        solve = np.linalg.solve(x.T @ x + damp, x.T)
        w = solve @ y
        leverage = np.einsum("ij,ji->i", x, solve)
        missed = (y - x @ w) / (1 - leverage)[:, None]  # leave-one-out in closed form
        return cls(names, mean, scale, w, np.sqrt(np.mean(missed**2, 0)), y.std(0))

    def __call__(self, rows: Sequence[Mapping[str, float]]) -> np.ndarray:
        """Predicted losses [rows, targets]."""
        x = (np.array([[r[n] for n in self.names] for r in rows]) - self.mean) / self.scale
        return np.exp(np.concatenate([np.ones((len(x), 1)), x], 1) @ self.coefficients)


def search(
    cells: Mapping[Cell, int], train_proxy: Callable[[str, Mapping[Cell, float], int], dict[str, float]], *, runs: int,
    out: Path, targets: Mapping[str, float] | None = None, spread: float = 0.8, candidates: int = 3000, top: int = 8,
    checks: int = 2, total_tokens: float = 0, max_epochs: float = 4.0, seed: int = 0,
    settings: Mapping[str, Any] = {}, quiet: bool = False,
) -> dict[str, Any]:
    """Runs or resumes a search and returns what ``out / "search.json"`` holds.

    Args:
        train_proxy: (name, shares, seed) -> held-out losses {"domain=code": nats, ...}; called ``runs + 2 * checks``
            times. targets: weight per held-out loss in what is minimised; default: all domains alike.
        checks: seeds with which the best and the natural mixture are trained at the end.
        total_tokens, max_epochs: of the run that the mixture is for: no cell is to be read more often.
        settings: of ``train_proxy``, all that its losses depend on; kept beside them.

    Raises:
        ValueError: losses in ``out`` are of another mixture, seed or settings; names the file and what differs.
    """
    rng = np.random.default_rng(seed)
    bounds = {"total_tokens": total_tokens, "max_epochs": max_epochs}
    natural = weights(cells, **bounds)
    points = [draw(cells, rng, spread) for _ in range(runs)]
    shares = [weights(cells, p.factors(cells), **bounds) for p in points]
    progress = {"description": "proxies", "console": Console(quiet=quiet), "disable": quiet or not Console().is_terminal}

    def losses_of(name: str, share: Mapping[Cell, float], seed: int) -> dict[str, float]:
        """A proxy's losses. Its shares are kept to 9 digits: those of the best mixture vary with the machine in the last."""
        own = {"shares": {c.key: round(w, 9) for c, w in share.items()}, "seed": seed}
        return kept(out / f"{name}.json", own | dict(settings), lambda: train_proxy(name, share, seed))

    measured = [losses_of(f"proxy-{i:02d}", s, seed) for i, s in track(list(enumerate(shares)), **progress)]
    targets = dict(targets or {k: 1.0 for k in measured[0] if k.startswith("domain=")})
    names, weight = tuple(targets), np.array(list(targets.values())) / sum(targets.values())
    losses = np.array([[m[t] for t in names] for m in measured])
    model = Ridge.fit([features(s) for s in shares], losses)

    tried = [draw(cells, rng, spread) for _ in range(candidates)]
    tried = [p for p in tried if max(map(abs, p.domains.values())) <= 2 * spread]  # inside what the proxies have seen
    predicted = model([features(weights(cells, p.factors(cells), **bounds)) for p in tried]) @ weight
    first = [tried[i] for i in np.argsort(predicted, kind="stable")[:top]]
    best = Point(
        {d: float(np.mean([p.domains[d] for p in first])) for d in first[0].domains},
        float(np.mean([p.slope for p in first])), float(np.mean([p.evenness for p in first])),
    )
    chosen = weights(cells, best.factors(cells), **bounds)
    both = {"best": chosen, "natural": natural}
    check = {
        name: [losses_of(f"{name}-{s}", share, seed + 1 + s) for s in range(checks)]
        for name, share in both.items()
    }
    score = {n: [float(np.array([m[t] for t in names]) @ weight) for m in runs_] for n, runs_ in check.items()}
    result = {
        "factors": best.factors(cells), "point": asdict(best), "targets": targets,
        "predicted": {n: float((model([features(s)]) @ weight)[0]) for n, s in both.items()},
        "measured": score, "measured by target": {n: {t: [m[t] for m in r] for t in names} for n, r in check.items()},
        "proxies": [
            {"features": features(s), "mean": float(x @ weight), "losses": dict(zip(names, x.tolist()))}
            for s, x in zip(shares, losses)
        ],
        "regression": {
            t: {"leave-one-out error": float(e), "spread": float(s)} for t, e, s in zip(names, model.error, model.spread)
        },
        "shares": {n: {c.key: w for c, w in s.items()} for n, s in both.items()},
    }
    write_json(out / "search.json", result)
    return result


def shares_by(share: Mapping[Cell, float], label: str) -> dict[str, float]:
    """Shares summed over all but one label, largest first."""
    if label not in cells_module.LABELS:
        raise ValueError(f"label is {label!r}; expected one of {cells_module.LABELS}")
    found: dict[str, float] = {}
    for c, w in share.items():
        found[getattr(c, label)] = found.get(getattr(c, label), 0.0) + w
    return dict(sorted(found.items(), key=lambda kv: -kv[1]))
