"""``python -m benchmarks SUITE [SUITE ...]``: ours and every installed peer, timed side by side on this machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from training.environment import commit

from . import ceilings, harness, peers, plot, suites
from .harness import Row
from .tables import comparisons, number


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {e}") from e
    return text


def parser() -> argparse.ArgumentParser:
    listing = lambda entries: "; ".join(f"{n}: {what}" for n, what in entries)  # noqa: E731
    p = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.strip("`"),
        epilog=f"Suites: {listing(suites.SUITES.items())}. "
        f"Peers: {listing((n, q.what) for n, q in peers.PEERS.items())}.",
    )
    p.add_argument("suites", nargs="+", metavar="SUITE", help=", ".join(suites.SUITES))
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    p.add_argument("--peers", default="all", help="all, none, or a comma-separated list (default all)")
    p.add_argument("--match", type=_pattern, default="", metavar="REGEX", help="only cases in whose name this is found")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all rows here, after every case")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="bars of %% of ceiling (needs matplotlib)")
    p.add_argument("--quick", action="store_true", help="tiny shapes and few turns: shows that all runs, not how fast")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 when a row of ours was wrong or raised; 2 for arguments that are refused."""
    p = parser()
    args = p.parse_args(argv)
    try:
        names, peer_names = suites.check(args.suites), peers.select(args.peers)
        device = pick_device(args.device)
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; expected at least 1")
        if args.plot:
            plot.require()
    except ValueError as e:
        p.error(str(e))
    torch.set_num_threads(args.threads)
    report = Report(device, peer_names, args)
    report.start()
    for name in names:
        report.run(name)
        report.show(name)
    if args.match and not report.rows:
        report.say(f"--match is {args.match!r}, which is found in no case of {', '.join(names)}; nothing was timed")
        return 2
    if args.plot:
        plot.save(args.plot, report.rows)
    report.finish()
    return 1 if any(r.error and r.impl.startswith("ours") for r in report.rows) else 0


def pick_device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device; use cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


class Report:
    """Runs cases, keeps their rows, and shows and stores them."""

    def __init__(self, device: str, peer_names: list[str], args: argparse.Namespace) -> None:
        self.device, self.peer_names, self.args = device, peer_names, args
        self.console = Console(stderr=True)
        self.rows: list[Row] = []
        self.peer_status = peers.status(peer_names, device)
        self.settings = harness.Settings.for_run(device, args.quick)
        self.ceilings: dict[str, float] = {}

    def start(self) -> None:
        self.say(f"{harness.device_name(self.device)}; torch {torch.__version__}; commit {commit()}")
        for name, state in self.peer_status.items():
            self.say(f"  peer {name}: {state}")
        with self.progress() as say:
            say("measuring the ceilings")
            self.ceilings = ceilings.measure(self.device, self.args.quick)
        self.say("  ceilings: " + ", ".join(f"{n} {v:.4g}" for n, v in self.ceilings.items()))

    def run(self, suite: str) -> None:
        """Every case of a suite. One that fails outside of any implementation is a row of ours with the reason."""
        where, module = "set-up", suites.module(suite)
        try:
            if hasattr(module, "rows"):
                with self.progress() as say:
                    for row in module.rows(self.device, self.args.quick, self.peer_names, self.ceilings, say, self.wanted):
                        self.rows.append(row)
                        self.store()
                return
            for case in module.cases(self.device, self.args.quick):
                where = case.name
                if self.wanted(case.name):
                    self.run_case(suite, case)
        except Exception as e:
            traceback.print_exc()
            self.rows.append(Row(suite, where, "ours", "fwd", error=harness.describe(e)))

    def wanted(self, case: str) -> bool:
        return re.search(self.args.match, case) is not None

    def run_case(self, suite: str, case: harness.Case) -> None:
        impls = harness.our_impls(case, self.device, case.context["dtype"])
        impls |= peers.impls(case, self.peer_names, self.device)
        with self.progress() as say:
            self.rows += harness.run_case(
                suite, case, impls, self.settings, self.ceilings, self.args.quick, progress=say
            )
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.store()

    def progress(self):
        return _Progress(self.console)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, suite: str) -> None:
        rows = [r for r in self.rows if r.suite == suite]
        console = Console()
        if console.is_terminal:
            console.print(rich_table(suite, rows))
        else:
            print(plain_table(rows), flush=True)

    def to_dict(self) -> dict:
        distributions = sorted({peers.PEERS[n].distribution for n in self.peer_names} - {"torch", "transformers"})
        return {
            "gpu": harness.device_name(self.device), "device": self.device,
            "versions": harness.versions(distributions), "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "threads": torch.get_num_threads(), "quick": self.args.quick, "ceilings": self.ceilings,
            "peers": self.peer_status, "rows": [r.to_dict() for r in self.rows],
        }

    def store(self) -> None:
        if self.args.json:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            part = self.args.json.with_name(self.args.json.name + ".part")
            part.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            os.replace(part, self.args.json)

    def finish(self) -> None:
        self.store()
        if not sys.stdout.isatty():
            print(short_table(self.rows), flush=True)
        if self.args.json:
            self.say(f"wrote {self.args.json}: {len(self.rows)} rows")


class _Progress:
    """A spinner with the current step on a terminal, a line per step elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("") if console.is_terminal else None

    def __enter__(self):
        if self.status is None:
            return lambda text: self.console.print(f"  {text}", highlight=False, soft_wrap=True, markup=False)
        self.status.start()
        return lambda text: self.status.update(text)

    def __exit__(self, *exc) -> None:
        if self.status is not None:
            self.status.stop()


COLUMNS = ("case", "mode", "impl", "ms", "p20-p80", "rate", "% ceiling", "peak MB", "note")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, by `COLUMNS`."""
    rate = number(row.tbps * 1e3, " GB/s") if row.tbps is not None else number(row.tflops, " TFLOP/s")
    speed = f"{number(row.tokens_per_s)} tokens/s" if row.tokens_per_s else ""
    note = row.error or (f"{speed}, MFU {row.mfu_pct:.1f} %" if row.mfu_pct else speed) or (row.backend or "")
    spread = f"{number(row.ms_p20)}-{number(row.ms_p80)}" if row.ms_p20 is not None else ""
    return (row.case, row.mode, row.impl, number(row.ms), spread, rate, number(row.pct_of_ceiling), number(row.peak_mb),
            note)


def fastest(rows: list[Row]) -> set[int]:
    """ids of the fastest row of every case and mode."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.case, row.mode)
        if row.ms is not None and (key not in best or row.ms < best[key].ms):
            best[key] = row
    return {id(r) for r in best.values()}


def rich_table(suite: str, rows: list[Row]) -> Table:
    table = Table(title=suite, caption="green: fastest of its case and mode; bold: ours")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("case", "mode", "impl", "note") else "right")
    best, last = fastest(rows), None
    for row in rows:
        if last is not None and (row.case, row.mode) != last:
            table.add_section()
        style = " ".join(("bold" if row.impl.startswith("ours") else "", "green" if id(row) in best else "",
                          "red" if row.error else "")).strip()
        values = cells(row)
        table.add_row(*(("", "", *values[2:]) if (row.case, row.mode) == last else values), style=style or None)
        last = (row.case, row.mode)
    return table


def plain_table(rows: list[Row]) -> str:
    """The same without colour: a star marks the fastest."""
    best = fastest(rows)
    lines = [COLUMNS]
    for row in rows:
        values = cells(row)
        lines.append((*values[:2], values[2] + ("*" if id(row) in best else ""), *values[3:8], values[8][:120]))
    return align(lines, left=(0, 1, 2, 8))


def short_table(rows: list[Row]) -> str:
    """A line per case and mode: ours beside the fastest peer. Problems come last, where a log is read first."""
    lines = [("case", "mode", "ours ms", "% ceiling", "best peer", "its ms", "peer/ours")]
    for c in comparisons(rows):
        lines.append((
            c.case, c.mode, number(c.ours and c.ours.ms), number(c.ours and c.ours.pct_of_ceiling),
            c.peer.impl if c.peer else "", number(c.peer and c.peer.ms), number(c.ratio),
        ))
    problems = [f"{r.case} {r.mode} {r.impl}: {r.error[:160]}" for r in rows if r.error]
    return "\n".join(["", align(lines, left=(0, 1, 4)), *(["", "not timed:", *problems] if problems else [])])


def align(lines: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Columns of equal width; those in ``left`` begin at the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


if __name__ == "__main__":
    sys.exit(main())
