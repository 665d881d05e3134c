"""Bars of the percentage of the ceiling, by case and implementation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .harness import Row


def require() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed")


def save(path: Path, rows: list[Row]) -> None:
    """One panel per suite and mode; a bar per implementation, grouped by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r.pct_of_ceiling is not None]
    panels = list(dict.fromkeys((r.suite, r.mode) for r in timed))
    impls = list(dict.fromkeys(r.impl for r in timed))
    heights = [0.6 + 0.14 * sum((r.suite, r.mode) == panel for r in timed) for panel in panels]
    figure, axes = plt.subplots(len(panels) or 1, 1, figsize=(10, sum(heights) + 1), squeeze=False,
                                gridspec_kw={"height_ratios": heights or [1]}, layout="constrained")
    for axis, (suite, mode) in zip(axes[:, 0], panels):
        group = [r for r in timed if (r.suite, r.mode) == (suite, mode)]
        at, ticks = 0.0, {}
        for i, row in enumerate(group):
            at += 1.0 if i == 0 or group[i - 1].case == row.case else 2.0
            axis.barh(at, row.pct_of_ceiling, color=f"C{impls.index(row.impl) % 10}")
            axis.text(row.pct_of_ceiling, at, f" {row.impl} {row.pct_of_ceiling:.0f}%", va="center", fontsize=6)
            ticks.setdefault(row.case, []).append(at)
        axis.set_yticks([sum(t) / len(t) for t in ticks.values()], list(ticks), fontsize=7)
        axis.invert_yaxis()
        axis.axvline(100, color="0.6", linewidth=0.8)
        axis.set_title(f"{suite}, {mode}", fontsize=9)
    axes[-1, 0].set_xlabel("% of the measured ceiling")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
