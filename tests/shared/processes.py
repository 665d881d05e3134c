"""Python in processes of their own, forked from one that has torch imported: to import it anew takes seconds each time.

They share that one's hash seed. Where the order of a set might matter, one of two processes should be a fresh interpreter.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed"])


class Python:
    """What ``python -m MODULE ARGS`` or ``python -c CODE ARGS`` does, in the repository's root, with this process's path for
    imports, on one thread. With what tests want of subprocess.Popen; output goes to files, so that none waits for a reader."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]
        self.process = CONTEXT.Process(target=_run, args=(args, environment, [f.name for f in self.files]), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The negative signal where one ended it."""
        return self.process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Its output and errors, once it has ended; TimeoutError where it does not."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} seconds: {self._read()}")
        return self._read()

    def _read(self) -> tuple[str, str]:
        return tuple(Path(f.name).read_text() for f in self.files)


def _run(args: tuple[str, ...], environment: dict[str, str], files: list[str]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    how, what, *rest = args
    sys.argv = [how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
