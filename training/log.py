"""Metrics to JSONL and TensorBoard, progress to the terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

FILE = "metrics.jsonl"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``; a last line cut short by a kill is left out."""
    file = out / FILE
    lines = file.read_text().splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError as e:
            if number + 1 < len(lines):
                raise ValueError(f"{file}: line {number + 1} is not JSON: {line[:60]!r}") from e
    return records


class Log:
    """Use as a context manager. ``done`` is the number of steps already done: later records, of steps that a resumed
    run repeats, are removed. ``quiet`` prints nothing."""

    def __init__(self, out: Path, *, steps: int, done: int = 0, quiet: bool = False, tensorboard: bool = True):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._file = _reopen(out, [r for r in read_metrics(out) if r["step"] <= done])
        self._board = _board(out / "tensorboard", done) if tensorboard else None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self._task = self._progress.add_task("training", total=steps, completed=done)

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One record {"kind", "step", **values}, on disk when this returns."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


def _reopen(out: Path, kept: list[dict[str, Any]]):
    tmp = out / f".{FILE}.tmp"
    with open(tmp, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in kept)
        f.flush()
        os.fsync(f.fileno())
    tmp.rename(out / FILE)
    return open(out / FILE, "a")


def _board(folder: Path, done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("TensorBoard is not installed: pip install 'qwen3-kernels[train]', or --no-tensorboard") from e
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
