"""The doctor: which backend would run each op here, why, and the error of its self-check."""

from __future__ import annotations

import platform
import warnings

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, dispatch

DTYPES = (torch.float32, torch.bfloat16)


def choices() -> list[dispatch.Choice]:
    """The choice for every op, device of this machine and dtype, with a self-check of every compiled or Triton kernel."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failed self-check is a row of the table
        return [dispatch.explain(op, device, dtype) for device in devices for op in dispatch.PREFERENCE[device] for dtype in DTYPES]


def environment() -> dict[str, str]:
    """Versions and hardware, one line each."""
    rows = {"qwen3-kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        rows["triton"] = triton.__version__
    except ImportError:
        rows["triton"] = "not installed"
    try:
        from . import _cpu

        rows["C++ core"] = f"built, runs {_cpu.isa()}"
    except ImportError as e:
        rows["C++ core"] = f"not built ({e})"
    try:
        from . import _cuda  # noqa: F401

        rows["CUDA core"] = "built"
    except ImportError as e:
        rows["CUDA core"] = f"not built ({e})"
    rows["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        rows["gpu"] = f"{torch.cuda.get_device_name()}, capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    else:
        rows["gpu"] = "none"
    return rows


def main(console: Console | None = None) -> int:
    """Print the tables; 1 when a kernel that should run fails its self-check, else 0."""
    console = console or Console()
    versions = Table(show_header=False, box=None)
    for name, value in environment().items():
        versions.add_row(name, value)
    table = Table(title="kernels (error: that of a self-check, in multiples of plain torch's; the limit is 2)")
    for column in ("op", "device", "dtype", "backend", "error", "why"):
        table.add_column(column)
    failed = False
    for c in choices():
        failed |= "self-check error" in c.why
        error = "-" if c.error is None else f"{c.error:.2f}x"
        table.add_row(c.op, c.device, str(c.dtype).removeprefix("torch."), c.backend, error, c.why)
    console.print(versions, table)
    return int(failed)
