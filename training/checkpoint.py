"""Checkpoints that are whole or absent: written aside, synced, then renamed.

``checkpoints/step-00000123/`` holds the model as transformers reads it (safetensors, config.json), ``optimizer.safetensors``
(optimizer state, master weights, RNG states) and ``state.json`` (step, the caller's fields, the size of every file).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3_model import load as model_io
from qwen3_model.model import Qwen3

from .optim import Optimizer

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. ``fields`` is what the caller stored with it."""

    path: Path
    step: int
    fields: dict[str, Any]

    def load_model(self, device: str | torch.device) -> Qwen3:
        """The model in the dtype it was saved in."""
        return model_io.load(self.path, device=device)

    def restore(self, optimizer: Optimizer) -> None:
        """Puts the optimizer and the random generators where they were. Raises ValueError for a state that does not
        fit the model or is damaged."""
        try:
            tensors = load_file(self.path / "optimizer.safetensors")
        except SafetensorError as e:
            raise ValueError(f"{self.path / 'optimizer.safetensors'} is damaged: {e}") from e
        torch.set_rng_state(tensors.pop("rng.cpu"))
        cuda = [tensors.pop(k) for k in sorted(tensors) if k.startswith("rng.cuda")]
        if cuda and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
        optimizer.load_state_tensors(tensors)


def save(
    folder: Path, step: int, model: Qwen3, optimizer: Optimizer, fields: dict[str, Any], *, keep: int = 2,
    extra_files: tuple[Path, ...] = (), save_model: Callable[[Qwen3, Path], None] | None = None,
) -> Path:
    """Writes the checkpoint of ``step`` (steps done) and deletes all but it and the newest ``keep``. ``extra_files``
    (a tokenizer) are copied in; ``save_model`` writes the model in place of `load.save`. On any failure nothing is left
    behind and the error is raised."""
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1")
    return _write(folder, step, model, optimizer.state_tensors() | _rng_states(), fields, keep, extra_files, save_model)


class Saver:
    """Saves as ``save`` does; with ``background``, from a copy in CPU memory that a thread writes while training goes on.

    One checkpoint is written at a time: the next ``save``, and the end of the ``with`` block, wait for it and raise what
    went wrong with it.
    """

    def __init__(self, folder: Path, *, background: bool, keep: int = 2, extra_files: tuple[Path, ...] = ()):
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1")
        self.folder, self.background, self.keep, self.extra_files = folder, background, keep, extra_files
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, model: Qwen3, optimizer: Optimizer, fields: dict[str, Any]) -> Path:
        """Returns the folder, which with ``background`` is there only after the next ``wait``."""
        tensors = optimizer.state_tensors() | _rng_states()
        if not self.background:
            return _write(self.folder, step, model, tensors, fields, self.keep, self.extra_files)
        self.wait()
        tensors = {k: t.detach().to("cpu", copy=True) for k, t in tensors.items()}
        args = self.folder, step, _copy_on_cpu(model), tensors, fields, self.keep, self.extra_files
        self._thread = threading.Thread(target=self._run, args=args, name=f"checkpoint {step}")
        self._thread.start()
        return self.folder / f"step-{step:08d}"

    def wait(self) -> None:
        """Until nothing is being written; raises the error of the last write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, *args: Any) -> None:
        try:
            _write(*args)
        except BaseException as e:
            self._error = e

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the training's own error is the one to raise
            self._thread.join()


def _copy_on_cpu(model: Qwen3) -> Qwen3:
    with torch.device("meta"):
        copy = Qwen3(model.config)
    copy.load_state_dict({k: t.detach().to("cpu", copy=True) for k, t in model.state_dict().items()}, assign=True)
    return copy


def _write(
    folder: Path, step: int, model: Qwen3, tensors: dict[str, Tensor], fields: dict[str, Any], keep: int,
    extra_files: tuple[Path, ...], save_model: Callable[[Qwen3, Path], None] | None = None,
) -> Path:
    final = folder / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    tmp = folder / f".{final.name}.tmp"
    try:
        (save_model or model_io.save)(model, tmp)
        save_file(_contiguous(tensors), tmp / "optimizer.safetensors")
        for file in extra_files:
            shutil.copyfile(file, tmp / file.name)
        sizes = {p.name: p.stat().st_size for p in sorted(tmp.iterdir())}
        (tmp / "state.json").write_text(json.dumps({"step": step, "fields": fields, "files": sizes}, indent=1))
        for path in (*tmp.iterdir(), tmp):
            _fsync(path)
        _remove(final)  # a run that was resumed from an older checkpoint writes this step again
        tmp.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    for old in sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))[:-keep]:
        if old != final:  # newer ones that are damaged were passed over
            _remove(old)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in ``folder``, or None. Incomplete ones are passed over with a warning."""
    if not folder.is_dir():
        return None
    for path in sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True):
        try:
            return read(path)
        except ValueError as e:
            warnings.warn(f"checkpoint passed over: {e}", stacklevel=2)
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint in one folder. Raises ValueError when it is incomplete, naming the file."""
    try:
        state = json.loads((path / "state.json").read_text())
        step, fields, files = state["step"], state["fields"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}/state.json cannot be read: {e!r}") from e
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else "no"
        if found != size:
            raise ValueError(f"{path / name} has {found} bytes; state.json says {size}")
    return Checkpoint(path, step, fields)


def _remove(path: Path) -> None:
    """Deletes a checkpoint so that a half-deleted one is never taken for complete."""
    if path.exists():
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _rng_states() -> dict[str, Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng.cpu": torch.get_rng_state()} | {f"rng.cuda.{i:03d}": s for i, s in enumerate(cuda)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().contiguous() for k, v in tensors.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
