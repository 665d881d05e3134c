"""The settings of one training run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_model.recompute import POLICIES

from .optim import OPTIMIZERS, SCHEDULES, STATES, lr_scale

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What may differ between a run and its resumption: none of it touches the weights.
FREE = frozenset({
    "out", "data", "eval_data", "tokenizer", "eval_every", "eval_batches", "log_every", "save_every", "keep", "tensorboard",
    "recompute", "async_save",
})


@dataclass(frozen=True)
class Config:
    """One training run. Sizes are per step, over all micro-steps. Raises ValueError naming a field out of range."""

    data: Path  # token shards to train on, or the JSON file of a mixture of them
    out: Path  # checkpoints and logs; an unfinished run found here is resumed
    model: str = "Qwen3-0.6B"  # a released size, or the path of a config.json; starts from random weights
    init: Path | None = None  # folder of a model to start from, as published or as saved here; its config replaces model
    eval_data: Path | None = None  # token shards to evaluate on
    tokenizer: Path | None = None  # tokenizer.json, checked against the shards and stored with each checkpoint
    steps: int = 1000
    seq_len: int = 1024  # tokens per row
    rows: int = 32  # rows per step
    micros: int = 1  # micro-steps per step; gradients are summed over them
    lr: float = 1e-3
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: int = 50  # steps
    decay: float = 0.3  # share of the steps in which "wsd" decays
    lr_floor: float = 0.0  # final learning rate as a share of lr
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, adamw for the rest
    # float32: master weights and moments; float32-moments: no masters; bfloat16: moments, too (see optim.Optimizer)
    optimizer_states: Literal["float32", "float32-moments", "bfloat16"] = "float32"
    weight_decay: float = 0.1  # of matrices; vectors have none
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    max_grad_norm: float = 1.0  # of all gradients together; a longer one is scaled down
    z_loss: float = 0.0  # weight of logsumexp^2
    router_z_loss: float = 0.0  # the same of the routers' logits, for mixtures of experts
    # skip steps whose loss or gradient norm is so many standard deviations above the mean of the last spike_window; 0: none
    spike_sigma: float = 0.0
    spike_window: int = 128  # steps
    seed: int = 0  # of the weights, the order of the data, stochastic rounding
    device: str = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA and on CPUs with AMX
    recompute: Literal["none", "norm+swiglu", "full"] = "none"  # instead of keeping for the backward; no bit changes
    eval_every: int = 200
    eval_batches: int = 0  # batches of an evaluation before the last one; 0: all
    log_every: int = 10
    save_every: int = 200
    keep: int = 2  # checkpoints kept
    async_save: bool = False  # copy the state to CPU memory and write it from a thread while training goes on
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "rows", "micros", "eval_every", "log_every", "save_every", "keep", "spike_window"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "max_grad_norm"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "z_loss", "router_z_loss", "eval_batches", "seed", "spike_sigma"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(0 <= self.warmup <= self.steps, "warmup", self.warmup, f"0 to steps = {self.steps}")
        require(0 <= self.decay <= 1, "decay", self.decay, "a share in [0, 1]")
        require(self.rows % self.micros == 0, "rows", self.rows, f"a multiple of micros = {self.micros}")
        for name, known in (
            ("schedule", SCHEDULES), ("dtype", ("auto", *DTYPES)), ("optimizer", OPTIMIZERS),
            ("optimizer_states", STATES), ("recompute", POLICIES),
        ):
            require(getattr(self, name) in known, name, repr(getattr(self, name)), f"one of {known}")
        self.lr_at(0)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step in [0, steps)."""
        decay = min(round(self.decay * self.steps), self.steps - self.warmup) if self.schedule == "wsd" else None
        return self.lr * lr_scale(
            step, total=self.steps, warmup=self.warmup, schedule=self.schedule, decay=decay, floor=self.lr_floor
        )

    def resolved(self) -> Config:
        """With "auto" replaced by what this machine has."""
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        fast_bf16 = device != "cpu" or torch.cpu._is_amx_tile_supported()
        dtype = self.dtype if self.dtype != "auto" else "bfloat16" if fast_bf16 else "float32"
        return dataclasses.replace(self, device=device, dtype=dtype)


def to_json(value: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back: paths as text, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


def require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; expected {wanted}")
