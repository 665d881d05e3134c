"""``python -m benchmarks.tables FILE.json ... [--update README.md]``: measured rows as Markdown tables.

A table has a line per case and mode: ours beside the fastest peer of the same run. What failed is named under it.

``--update`` rewrites, in a Markdown file, what stands between ``<!-- benchmarks: SUITE ... [MODE ...] -->`` and
``<!-- end -->``. The suites share a table; of modes, those that the marker names are shown, all when it names none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .harness import MODES, Row

HEAD = ("case", "mode", "ours, ms", "best peer, ms", "best peer", "peer/ours", "% of ceiling", "peak MB", "its peak MB")
MARKER = re.compile(r"<!-- benchmarks: (?P<words>[^\n]*?) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)
OPENING, END = "<!-- benchmarks:", "<!-- end -->"


@dataclass(frozen=True)
class Comparison:
    """Ours and the fastest peer of one case and mode; None for what was not timed."""

    case: str
    mode: str
    ours: Row | None
    peer: Row | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer ours is."""
        return self.peer.ms / self.ours.ms if self.ours and self.peer else None


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """One for every case and mode, in the order of the rows. Our other kernels ("ours:cuda") are no peers."""
    found = []
    for case, mode in dict.fromkeys((r.case, r.mode) for r in rows):
        timed = [r for r in rows if (r.case, r.mode) == (case, mode) and r.ms is not None]
        ours = next((r for r in timed if r.impl == "ours"), None)
        peers = [r for r in timed if not r.impl.startswith("ours")]
        found.append(Comparison(case, mode, ours, min(peers, key=lambda r: r.ms, default=None)))
    return found


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits."""
    if value is None:
        return ""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits)}f}{unit}"


# --- The files.


def read(paths: Sequence[Path]) -> list[dict]:
    """The benchmark reports among the files, oldest first; other records of a results folder, such as parity's, are
    passed over. Raises ValueError for a file that is neither, and for a ``--quick`` run, whose times say nothing."""
    reports = []
    for path in paths:
        try:
            report = json.loads(path.read_text())
            rows = report["rows"]
            if rows and all("check" in row for row in rows):
                continue
            report["rows"] = [Row(**row) for row in rows]
            missing = {"gpu", "date", "commit", "versions", "ceilings", "peers", "quick"} - report.keys()
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is not a report of python -m benchmarks: {e!r}") from e
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: not a report of python -m benchmarks")
        if report["quick"]:
            raise ValueError(f"{path} is of a run with --quick; expected a full one")
        reports.append(report)
    return sorted(reports, key=lambda r: r["date"])


def by_suite(reports: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """{suite: {gpu: the newest report that has the suite}}"""
    found: dict[str, dict[str, dict]] = {}
    for report in reports:
        for suite in dict.fromkeys(row.suite for row in report["rows"]):
            found.setdefault(suite, {})[report["gpu"]] = report
    return found


# --- Markdown.


def render(names: Sequence[str], suites: dict[str, dict[str, dict]], modes: Sequence[str] = ()) -> str:
    """A table for every report that is the newest of one of the named suites, under a line that says where and with what
    it was measured. ``suites`` is of `by_suite`."""
    parts = []
    for report in {id(r): r for name in names for r in suites[name].values()}.values():
        ours = {name for name in names if suites[name].get(report["gpu"]) is report}
        rows = [r for r in report["rows"] if r.suite in ours and (not modes or r.mode in modes)]
        if rows:
            parts += [heading(report, rows), table(rows)] + ([failures(rows)] if any(r.error for r in rows) else [])
    return "\n\n".join(parts)


def heading(report: dict, rows: Sequence[Row]) -> str:
    peers = dict.fromkeys(r.impl for r in rows if not r.impl.startswith("ours"))
    versions = {n: v for n, v in report["peers"].items() if v != report["peers"].get("torch")}
    against = ", ".join(f"{name} {versions.get(name, '')}".strip() for name in peers)
    software = [f"{name} {report['versions'][name]}" for name in ("torch", "triton") if name in report["versions"]]
    limits = [
        f"copy {number(value / 1e3)} TB/s" if name == "copy_gbps" else
        f"{name.removesuffix('_tflops').replace('_', ' ').replace('gemm', 'matrix product')} {number(value)} TFLOP/s"
        for name, value in report["ceilings"].items()
    ]
    commit = re.sub("[0-9a-f]{40}", lambda m: m[0][:10], " ".join(report["commit"].split()))
    return (f"{report['gpu']}, {report['date'][:10]}, {', '.join(software)}, commit {commit}. "
            f"Ceilings: {', '.join(limits)}. " + (f"Against {against}." if against else "No peers."))


def table(rows: Sequence[Row]) -> str:
    memory = any(r.peak_mb is not None for r in rows)  # not measured on a CPU
    columns = HEAD if memory else HEAD[:-2]
    lines, last = [columns, [":--" if name in ("case", "mode", "best peer") else "--:" for name in columns]], None
    for c in comparisons(rows):
        ours, peer = c.ours, c.peer
        cells = (
            "" if c.case == last else c.case, c.mode, number(ours.ms) if ours else "failed", number(peer and peer.ms),
            peer.impl if peer else "none", "" if c.ratio is None else f"{c.ratio:.2f}",
            number(ours and ours.pct_of_ceiling), number(ours and ours.peak_mb), number(peer and peer.peak_mb),
        )
        lines.append([_escape(cell) for cell in cells[: len(columns)]])
        last = c.case
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(rows: Sequence[Row]) -> str:
    """What was not timed and why, one line for the modes that share a reason."""
    modes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.error:
            modes.setdefault((row.impl, row.case, row.error), []).append(row.mode)
    lines = [f"- {impl}, {case}, {' and '.join(names)}: {error}" for (impl, case, error), names in modes.items()]
    return "\n".join(["Not timed:", "", *map(_escape, lines)])


def _escape(text: str) -> str:
    return re.sub(r"([\\|`*<>\[\]]|\b_|_\b)", r"\\\1", text)


# --- A Markdown file with markers.


def update(text: str, suites: dict[str, dict[str, dict]]) -> tuple[str, list[str]]:
    """The text with its tables renewed, and the suites it asks for that no report has: those tables stay as they are.
    Raises ValueError for markers that do not pair up."""
    openings, pairs = text.count(OPENING), len(MARKER.findall(text))
    if pairs != openings:  # an opening inside of a table counts for none
        raise ValueError(f"{openings} markers '{OPENING} SUITE -->' on lines of their own, {pairs} closed by '{END}'")
    if not openings:
        raise ValueError(f"no marker '{OPENING} SUITE -->'")
    absent = []

    def renew(match: re.Match) -> str:
        words = match["words"].split()
        names, modes = [w for w in words if w not in MODES], [w for w in words if w in MODES]
        if missing := [name for name in names if name not in suites]:
            absent.extend(missing)
            return match[0]
        return f"{OPENING} {match['words']} -->\n{render(names, suites, modes)}\n{END}"

    return MARKER.sub(renew, text), absent


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 for files that cannot be read or used."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n\n", 1)[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what python -m benchmarks --json wrote")
    p.add_argument("--update", type=Path, metavar="FILE.md", help="renew the tables between this file's markers")
    args = p.parse_args(argv)
    try:
        suites = by_suite(read(args.files))
        if args.update is None:
            print("\n\n".join(f"### {suite}\n\n{render([suite], suites)}" for suite in suites))
            return 0
        before = args.update.read_text()
        after, absent = update(before, suites)
        if after != before:
            args.update.write_text(after)
    except (OSError, ValueError) as e:
        print(f"benchmarks.tables: error: {e}", file=sys.stderr)
        return 1
    if absent:
        print(f"{args.update}: no rows of {', '.join(absent)}; left as it was", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
