"""What a run ran on, for its record."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

import qwen3_kernels
from qwen3_kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent


def kernels(device: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """{op: {"backend", "why", "error"}}: what runs each op in this process; ``error`` is the self-check's, in units of
    plain torch's error."""
    kind = torch.device(device).type
    choices = (dispatch.explain(op, kind, dtype) for op in dispatch.PREFERENCE[kind])
    return {c.op: {"backend": c.backend, "why": c.why, "error": c.error} for c in choices}


def describe(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, hardware and kernels."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
        "qwen3_kernels": qwen3_kernels.__version__, "platform": platform.platform(), "device": device_name(device),
        "threads": torch.get_num_threads(), "kernels": kernels(device, dtype),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.machine()


def commit() -> str:
    """HEAD of the repository this file is in, with ``-dirty`` when files differ; without one, ``$QWEN3_COMMIT``."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if top is None or head is None or Path(top).resolve() != ROOT:
        return os.environ.get("QWEN3_COMMIT", "unknown")
    return head + ("-dirty" if git("status", "--porcelain") else "")


def file_sha256(path: Path) -> str:
    return _sha256([Path(path)])


def weights_sha256(folder: Path) -> str:
    """Of a model's safetensors files. Raises FileNotFoundError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors; expected a model folder")
    return _sha256(files)


def _sha256(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                found.update(block)
    return found.hexdigest()
