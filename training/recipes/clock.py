"""The time that each part of a run takes, over all the processes that worked on it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..files import write_json


class Clock:
    """``seconds`` is {part: [wall, CPU]}, kept in ``file``. A run that is killed and started again adds to what it had; of
    the part in which it was killed, up to ``beat`` seconds are lost. CPU time is that of all threads and of child processes
    that have ended."""

    def __init__(self, file: Path, console: Console, *, beat: float = 5.0):
        self.file, self.console, self.beat = file, console, beat
        self.seconds: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def __call__(self, name: str, *, heading: bool = True) -> Iterator[None]:
        """Parts do not nest."""
        if heading:
            self.console.rule(name, align="left")
        had, start, done = self.seconds.get(name, [0.0, 0.0]), _now(), threading.Event()

        def note() -> None:
            self.seconds[name] = [h + now - then for h, now, then in zip(had, _now(), start)]
            write_json(self.file, self.seconds)

        def beat() -> None:
            while not done.wait(self.beat):
                note()

        thread = threading.Thread(target=beat, name=f"clock of {name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            note()

    def rows(self) -> list[tuple[str, str, str]]:
        """For a table: part, wall and CPU seconds, and their sums."""
        total = [sum(column) for column in zip(*self.seconds.values())]
        return [(name, f"{wall:.0f}", f"{cpu:.0f}") for name, (wall, cpu) in (*self.seconds.items(), ("all", total))]


def _now() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])
