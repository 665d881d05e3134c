"""A run's report as one HTML file without scripts or references to other files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .log import read_metrics

Point = tuple[float, float]
FILE = "report.html"

_STYLE = """
:root { --ink: #1d2433; --dim: #667085; --line: #e3e7ee; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #98a2b3; --line: #344054; --paper: #12161f; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: var(--dim); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: color-mix(in srgb, var(--line) 40%, transparent); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem;
      white-space: pre-wrap; }
pre b { color: #175cd3; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg text.dim { fill: var(--dim); }
.wide { overflow-x: auto; }
"""
_COLOURS = ("#2e7cf6", "#e8590c", "#2f9e44", "#9c36b5", "#c92a2a")


def of_run(out: Path, title: str) -> Path:
    """``report.html`` of a training run's folder: a curve of every metric that changes, first and last value of all, config
    and environment."""
    found: dict[str, dict[str, list[Point]]] = {}
    for record in read_metrics(out):
        for name, value in record.items():
            if name not in ("kind", "step"):
                found.setdefault(name, {}).setdefault(record["kind"], []).append((record["step"], value))
    sections, rows = [], []
    for name, kinds in found.items():
        values = [v for points in kinds.values() for _, v in points if math.isfinite(v)]
        if len(set(values)) > 1 and "=" not in name:  # domain=code and the like: many, and in the table
            sections.append((name, chart({k: p[:: 1 + len(p) // 1000] for k, p in kinds.items()}, x="step", y=name)))
        rows += [(name, kind, *(f"{v:.6g}" for v in (points[0][1], points[-1][1])), len(points)) for kind, points in kinds.items()]
    sections.append(("All metrics", table(("metric", "of", "first", "last", "records"), rows)))
    run = json.loads((out / "run.json").read_text())
    for part in ("config", "environment"):
        sections.append((part.capitalize(), table(("", ""), [(k, v) for k, v in run[part].items()])))
    lead = f"{run['config']['steps']} steps on {run['environment']['device']}"
    write(out / FILE, page(title, lead, sections))
    return out / FILE


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document from sections of (heading, HTML)."""
    body = "".join(f"<h2>{escape(heading)}</h2>{html}" for heading, html in sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>{body}</html>\n'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers are set flush right."""
    def cell(tag: str, value: object, number: bool) -> str:
        return f'<{tag}{" class=n" if number else ""}>{escape(str(value))}</{tag}>'

    numeric = [all(isinstance(r[i], (int, float)) or _is_number(str(r[i])) for r in rows) for i in range(len(head))]
    lines = ["".join(cell("th", h, n) for h, n in zip(head, numeric))]
    lines += ["".join(cell("td", v, n) for v, n in zip(row, numeric)) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def chart(
    series: Mapping[str, Sequence[Point]], *, x: str, y: str, baselines: Mapping[str, float] | None = None,
    size: tuple[int, int] = (900, 360),
) -> str:
    """Lines (with dots where there are few points) and dashed horizontal baselines, as inline SVG.

    Raises ValueError when there is no finite point.
    """
    baselines = baselines or {}
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    xs = [p[0] for points in series.values() for p in points]
    ys = [p[1] for points in series.values() for p in points] + list(baselines.values())
    if not xs:
        raise ValueError(f"chart of {y}: no finite points")
    width, height = size
    left, right, top, bottom = 56, 210, 30, 44
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x0, x1 = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y0, y1 = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])
    if x1 == x0:
        x1 = x0 + 1
    if y1 == y0:
        y1 = y0 + 1

    def at(point: Point) -> tuple[float, float]:
        across = left + (point[0] - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (point[1] - y0) / (y1 - y0) * (height - top - bottom)

    parts = []
    for value in y_ticks:
        _, v = at((x0, value))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{v:.1f}" y2="{v:.1f}"/>'
                     f'<text class="dim" x="{left - 8}" y="{v + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        u, _ = at((value, y0))
        parts.append(f'<text class="dim" x="{u:.1f}" y="{height - bottom + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text class="dim" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x)}</text>'
                 f'<text class="dim" x="4" y="{top - 18}">{escape(y)}</text>')
    labels: list[tuple[float, str, str]] = []
    for colour, (name, points) in zip(_cycle(len(series)), series.items()):
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in map(at, points))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        if len(points) <= 40:
            parts += [f'<circle cx="{u:.1f}" cy="{v:.1f}" r="3" fill="{colour}"/>' for u, v in map(at, points)]
        if points:
            labels.append((at(points[-1])[1], f"{name}: {_short(points[-1][1])}", colour))
    for name, value in baselines.items():
        _, v = at((x0, value))
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{v:.1f}" y2="{v:.1f}" stroke="#98a2b3" '
                     f'stroke-width="1.4" stroke-dasharray="6 4"/>')
        labels.append((v, f"{name}: {_short(value)}", "#98a2b3"))
    spread = -math.inf
    for v, text, colour in sorted(labels):
        spread = max(v, spread + 15)
        parts.append(f'<rect x="{width - right + 10}" y="{spread - 5:.1f}" width="9" height="9" fill="{colour}"/>'
                     f'<text x="{width - right + 24}" y="{spread + 4:.1f}">{escape(text)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y)}">{"".join(parts)}</svg>'


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Running mean over up to ``window`` points behind each."""
    out, total = [], 0.0
    for i, (u, v) in enumerate(points):
        total += v - (points[i - window][1] if i >= window else 0.0)
        out.append((u, total / min(i + 1, window)))
    return out


def write(path: Path, html: str) -> None:
    """Whole or not at all."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(html, encoding="utf-8")
    tmp.rename(path)


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    return [round(i * step, 10) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _cycle(n: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix(" %") or "nan")
    except ValueError:
        return False
    return True
