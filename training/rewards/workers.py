"""Scorers in processes that can be killed.

A scorer may hang or eat all memory on what a model writes. Signals (SIGALRM) are no way out: they work in the main thread
only and not inside C code. So every call runs in a worker process with a deadline; one that misses it is killed and
replaced, and the call counts as a time-out.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTRA = "pip install 'qwen3-kernels"  # in the message of a scorer whose library is missing
MEMORY = 4 << 30  # bytes of address space of one worker
_PDEATHSIG = 1  # sys/prctl.h


@dataclass(frozen=True)
class Result:
    """``value`` of the call, or ``error``: "timeout", "crash", or the exception's text."""

    value: Any = None
    error: str | None = None


class _Worker:
    def __init__(self, functions: Sequence[str]):
        code = f"from training.rewards.workers import serve; serve({list(functions)!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, start_new_session=True,
        )
        self.buffer = b""

    def send(self, call: Any) -> bool:
        try:
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def receive(self) -> tuple[bool, Any]:
        """(whether there is an answer or an end, the answer or None for the end); only when the pipe is readable."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return True, None
        self.buffer += data
        if b"\n" not in self.buffer:
            return False, None
        line, self.buffer = self.buffer.split(b"\n", 1)
        return True, json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass


class Pool:
    """Worker processes for the functions named ("package.module:function"), which take and give JSON.

    deadline: seconds for one call. start: seconds for a worker to import what it needs, which does not count as a call.
    ``timeouts``, ``crashes`` and ``errors`` (exceptions) count; the pool goes on after each. Close it, or use it as a
    context manager. Raises ImportError when a worker cannot start or what a function needs is not installed.
    """

    def __init__(self, functions: Sequence[str], *, workers: int = 2, deadline: float = 5.0, start: float = 120.0):
        if workers < 1 or not deadline > 0:
            raise ValueError(f"workers is {workers}, deadline {deadline}; expected at least 1 and above 0")
        self.functions, self.workers, self.deadline, self.start = tuple(functions), workers, deadline, start
        self.timeouts = self.crashes = self.errors = 0
        self._idle: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._idle:
            worker.kill()
        self._idle.clear()

    def map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Result]:
        """Results of function(*args) for all calls, in their order."""
        if function not in self.functions:
            raise ValueError(f"function is {function!r}; expected one of {self.functions}")
        results: list[Result | None] = [None] * len(calls)
        self._idle += self._started(max(0, min(self.workers, len(calls)) - len(self._idle)))
        waiting = list(range(len(calls)))[::-1]
        active: dict[int, tuple[_Worker, int, float]] = {}  # by file descriptor
        try:
            while waiting or active:
                while waiting and len(active) < min(self.workers, len(calls)):
                    worker, index = self._worker(), waiting.pop()
                    if worker.send([function, list(calls[index])]):
                        active[worker.process.stdout.fileno()] = worker, index, time.monotonic() + self.deadline
                    else:
                        worker.kill()
                        waiting.append(index)
                soonest = min(until for _, _, until in active.values())
                readable, _, _ = select.select([*active], [], [], max(0.0, soonest - time.monotonic()))
                for descriptor in readable:
                    worker, index, until = active[descriptor]
                    complete, answer = worker.receive()
                    if not complete:
                        continue
                    del active[descriptor]
                    if answer is None:
                        self.crashes += 1
                        worker.kill()
                        results[index] = Result(error="crash")
                    else:
                        self._idle.append(worker)
                        results[index] = Result(*answer)
                        self.errors += results[index].error is not None
                        if results[index].error and EXTRA in results[index].error:  # no reply's fault
                            raise ImportError(results[index].error)
                for descriptor, (worker, index, until) in list(active.items()):
                    if time.monotonic() >= until:
                        self.timeouts += 1
                        worker.kill()
                        del active[descriptor]
                        results[index] = Result(error="timeout")
        finally:
            for worker, _, _ in active.values():
                worker.kill()
        return results

    def _worker(self) -> _Worker:
        return self._idle.pop() if self._idle else self._started(1)[0]

    def _started(self, count: int) -> list[_Worker]:
        """New workers, which start side by side."""
        workers, until = [_Worker(self.functions) for _ in range(count)], time.monotonic() + self.start
        for worker in workers:
            while True:
                readable, _, _ = select.select([worker.process.stdout], [], [], max(0.0, until - time.monotonic()))
                complete, answer = worker.receive() if readable else (True, None)
                if complete:
                    break
            if answer != ["ready", None]:
                for w in workers:
                    w.kill()
                raise ImportError(
                    answer[1] if answer else f"a worker for {self.functions} did not start in {self.start:g} s")
        return workers


def serve(functions: Sequence[str]) -> None:
    """The worker's side: one line of JSON in, one out. What a function prints goes nowhere."""
    if sys.platform == "linux":  # a call that hangs would outlive a trainer that was killed
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w")
    sys.stdout = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = {}

    def answer(value: Any, error: str | None) -> None:
        out.write(json.dumps([value, error]) + "\n")
        out.flush()

    try:
        for name in functions:
            module, _, attribute = name.partition(":")
            known[name] = getattr(importlib.import_module(module), attribute)
            getattr(sys.modules[module], "warm_up", lambda: None)()
    except ImportError as e:
        return answer(None, str(e))
    answer("ready", None)
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            value, error = known[name](*args), None
        except Exception as e:  # a scorer may raise anything on what a model writes
            value, error = None, f"{type(e).__name__}: {e}"[:500]
        answer(value, error)
