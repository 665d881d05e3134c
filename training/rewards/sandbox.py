"""A Python tool that runs what a model writes: a process of its own with limits, a deadline and no network.

What holds it: an empty temporary folder as home and working directory; limits on CPU time, memory, processes, files and
their size; a network namespace without interfaces where the system allows one; and an audit hook that refuses sockets,
new processes, ctypes and writing outside of its folder, from before the code starts. This keeps a model's mistakes and
cheap tricks in; it is no wall against an attacker (run untrusted models in a container or a virtual machine).
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache

_NEWUSER, _NEWNET = 0x10000000, 0x40000000  # sched.h
MAX_OUTPUT = 4000  # characters that the model gets to see

# Runs before the code, in the same process. Opening for reading stays allowed: imports need it.
_GUARD = """
import sys, os
def _guard(folder=os.path.realpath(os.getcwd()), os=os):
    banned = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "os.putenv",
              "ctypes.", "os.chmod", "os.chown", "os.link", "os.symlink", "shutil.", "pty.", "webbrowser.", "urllib.",
              "ftplib.", "sqlite3.")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    real, isdir, sep, fspath = os.path.realpath, os.path.isdir, os.sep, os.fspath
    def inside(path):
        if isinstance(path, int):
            return True
        path = real(os.fsdecode(fspath(path)))
        return path == folder or path.startswith(folder + sep)
    def hook(event, args):
        if event.startswith(banned):
            raise PermissionError(event + " is not allowed here")
        if event == "open" and (args[2] & writes) and not inside(args[0]):
            raise PermissionError("writing outside of the working directory is not allowed here")
        if event == "open" and args[1] is None and isdir(args[0]):  # as dir_fd it would lead out, and no event names it
            raise PermissionError("opening a folder is not allowed here")
        paths = args[: 2 if event == "os.rename" else 1]
        if event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate") and not all(map(inside, paths)):
            raise PermissionError(event + " is not allowed there")
    sys.addaudithook(hook)
_guard()
del _guard
code = sys.stdin.read()
sys.stdin.close()
exec(compile(code, "<tool>", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Output:
    """``text``: what was printed, the end of a traceback included. ``status``: "ok", "error" or "timeout"."""

    text: str
    status: str


@cache
def isolates_network() -> bool:
    """Whether a network namespace can be made here."""
    check = subprocess.run([sys.executable, "-c", ""], preexec_fn=_probe, capture_output=True)
    return check.returncode == 0


def _probe() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWUSER | _NEWNET) != 0:
        os._exit(1)


def run(code: str, *, seconds: float = 5.0, memory: int = 512 << 20) -> Output:
    """Runs ``code`` to its end or to the deadline (wall clock; then the whole process group is killed)."""
    isolate, libc = isolates_network(), ctypes.CDLL(None, use_errno=True)

    def limits() -> None:
        if isolate:
            libc.unshare(_NEWUSER | _NEWNET)
        for what, limit in (
            (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_FSIZE, 1 << 20),
            (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 64),
        ):
            resource.setrlimit(what, (limit, limit))

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _GUARD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=folder, env={"HOME": folder, "PATH": "", "PYTHONHASHSEED": "0"},
            preexec_fn=limits, start_new_session=True,
        )
        try:
            text, timed_out = _talk(process, code.encode(), seconds)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            process.stdout.close()
    if timed_out:
        return Output(f"{text}\nstopped after {seconds:g} seconds".strip(), "timeout")
    return Output(text, "ok" if process.returncode == 0 else "error")


def _talk(process: subprocess.Popen, code: bytes, seconds: float) -> tuple[str, bool]:
    """(output, whether the deadline passed). Reads while it runs, and no more than is kept."""
    until, chunks, size = time.monotonic() + seconds, [], 0
    try:
        process.stdin.write(code)
        process.stdin.close()
    except BrokenPipeError:
        pass
    while True:
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        if not readable:
            break
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            break
        if size < 16 * MAX_OUTPUT:
            chunks.append(chunk)
        size += len(chunk)
    timed_out = not readable
    if not timed_out:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            timed_out = True
    text = b"".join(chunks).decode("utf-8", "replace").strip()
    if len(text) > MAX_OUTPUT:  # the end of a traceback says most
        text = f"{text[: MAX_OUTPUT // 2]}\n...\n{text[-MAX_OUTPUT // 2 :]}"
    return text, timed_out
