"""The trainer of all post-training stages: samples and a loss in, an update out. It knows no algorithm.

A stage is a function ``step(run, n) -> metrics`` that makes samples, calls `Run.update` and returns what is to be logged.
When all it draws is a function of (seed, n) and of ``run.state``, which checkpoints hold, a run that is killed and
started again ends in the same weights, bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_model import load as model_io
from qwen3_model.model import Qwen3
from qwen3_model.recompute import POLICIES
from qwen3_model.tokenizer import Tokenizer

from . import checkpoint, environment, lora, report
from .config import DTYPES, Config, require, to_json
from .files import write_json
from .log import Log
from .losses import LossFn
from .optim import OPTIMIZERS, SCHEDULES, STATES, Optimizer, lr_scale
from .pretrain import check_same_run, locked
from .samples import Packed, Sample, packs


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every stage's config has. Raises ValueError naming a field out of range."""

    start: Path  # folder of the model to start from: config.json, safetensors and tokenizer.json, ours or Hugging Face's
    out: Path  # checkpoints, logs and the finished model; an unfinished run found here is resumed
    steps: int = 100
    max_minutes: float = math.inf  # a process that has trained for so long ends the run as if this had been its last step
    lr: float = 1e-5
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: int = 5  # steps
    decay: float = 0.0  # share of the steps in which "wsd" decays
    lr_floor: float = 0.0  # final learning rate as a share of lr
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_states: Literal["float32", "float32-moments", "bfloat16"] = "float32"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    tokens_per_pack: int = 8192  # most tokens of one forward and backward; more are accumulated
    lora_rank: int = 0  # 0 trains all weights
    lora_alpha: float = 32.0
    seed: int = 0
    device: str = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA and on CPUs with AMX
    recompute: Literal["none", "norm+swiglu", "full"] = "none"
    log_every: int = 10
    save_every: int = 50
    keep: int = 2  # checkpoints kept
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_pack", "log_every", "save_every", "keep"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "max_grad_norm", "lora_alpha", "max_minutes"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("weight_decay", "seed", "lora_rank", "warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(0 <= self.decay <= 1, "decay", self.decay, "a share in [0, 1]")
        for name, known in (("schedule", SCHEDULES), ("dtype", ("auto", *DTYPES)), ("optimizer", OPTIMIZERS),
                            ("optimizer_states", STATES), ("recompute", POLICIES)):
            require(getattr(self, name) in known, name, repr(getattr(self, name)), f"one of {known}")
        self.lr_at(0)

    def require_pack(self, tokens: int, what: str) -> None:
        """Raises ValueError when a sample of ``tokens``, the last of which is no input, does not fit into a pack."""
        wanted = f"at least {tokens - 1}, one less than {what}: a sample is not split"
        require(self.tokens_per_pack >= tokens - 1, "tokens_per_pack", self.tokens_per_pack, wanted)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step in [0, steps)."""
        warmup = min(self.warmup, self.steps)
        decay = min(round(self.decay * self.steps), self.steps - warmup) if self.schedule == "wsd" else None
        return self.lr * lr_scale(
            step, total=self.steps, warmup=warmup, schedule=self.schedule, decay=decay, floor=self.lr_floor
        )

    def resolved(self) -> TrainConfig:
        """With "auto" replaced by what this machine has."""
        found = Config(self.start, self.out, device=self.device, dtype=self.dtype).resolved()
        return dataclasses.replace(self, device=found.device, dtype=found.dtype)


class Run:
    """Model, optimizer, log and checkpoints of one run. Use `train`."""

    def __init__(self, config: TrainConfig, log: Log, resumed: checkpoint.Checkpoint | None):
        self.config, self.log = config, log
        torch.manual_seed(config.seed)
        plain = resumed is not None and not config.lora_rank  # with adapters the base model stays where it was
        source = resumed.path if plain else config.start
        self.model: Qwen3 = model_io.load(source, device=config.device, dtype=DTYPES[config.dtype])
        self.model.recompute = config.recompute
        self.tokenizer = Tokenizer.from_file(config.start / "tokenizer.json")
        if config.lora_rank:
            lora.add(self.model, config.lora_rank, config.lora_alpha, seed=config.seed)
            if resumed is not None:
                lora.load(self.model, resumed.path)
        self.optimizer = Optimizer(
            self.model.train(), kind=config.optimizer, states=config.optimizer_states, betas=config.betas,
            weight_decay=config.weight_decay, seed=config.seed,
        )
        self.state: dict[str, Any] = {}  # what else a stage needs to go on, as JSON
        if resumed is not None:
            resumed.restore(self.optimizer)
            self.state = resumed.fields["state"]

    def update(self, samples: Sequence[Sample] | Sequence[Packed], loss_fn: LossFn, lr: float) -> dict[str, float]:
        """One step of the optimizer on the sum of the loss over all samples. Returns the loss, the gradient norm before
        clipping and the loss function's statistics per trained token. FloatingPointError, before anything has changed,
        for a loss that is not finite; for such a gradient after the step, which then is not saved."""
        cfg, device = self.config, self.model.head_weight.device
        batches = samples if isinstance(samples[0], Packed) else packs(samples, cfg.tokens_per_pack)
        total, tokens, stats = torch.zeros((), device=device), 0, {}
        for packed in batches:
            loss, found = loss_fn(self.model, packed.to(device))
            loss.backward()
            total += loss.detach()
            tokens += len(packed.where)
            for name, value in found.items():
                merge = torch.maximum if name.startswith("max_") else torch.add
                stats[name] = merge(stats[name], value) if name in stats else value
        names, values = [*stats], torch.stack([total, *(v.float() for v in stats.values())]).tolist()
        check_finite(values[0], "loss", cfg)
        norm = float(self.optimizer.step(lr, cfg.max_grad_norm))
        check_finite(norm, "gradient norm", cfg)
        per_token = {n: v if n.startswith("max_") else v / tokens for n, v in zip(names, values[1:])}
        return {"loss": values[0], "grad_norm": norm, "lr": lr, "tokens": tokens, **per_token}

    def save_model(self, folder: Path) -> None:
        """As transformers reads it; with adapters, also merged into the base."""
        if self.config.lora_rank:
            lora.save(self.model, folder / "adapter", base=str(self.config.start))
            with lora.merged(self.model) as whole:
                model_io.save(whole, folder)
        else:
            model_io.save(self.model, folder)
        self.tokenizer.save(folder / "tokenizer.json")


def check_finite(value: float, name: str, config: TrainConfig) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value}; training stopped and nothing of this step was saved. Try a lower lr (now {config.lr:g}) "
            f"or dtype float32 ({config.dtype})."
        )


def train(
    config: TrainConfig, step_fn: Callable[[Run, int], dict[str, float]], *, data: dict[str, Any] | None = None,
    begin: Callable[[Run], None] | None = None, quiet: bool = False,
) -> Path:
    """Runs or resumes a stage and returns the folder of the finished model, ``out/model``, beside which there are then
    run.json, metrics.jsonl, TensorBoard's files and report.html.

    Args:
        step_fn: does step n (from 0) and returns its metrics. begin: called once before the first step of a new run.
        data: a description of what is trained on; a run that is resumed with another is refused.

    Raises ValueError (settings, data or an earlier run in ``out`` do not fit), FloatingPointError, BlockingIOError
    (another process trains in ``out``), and what the stage raises.
    """
    config = config.resolved()
    start = {"weights_sha256": environment.weights_sha256(config.start)}
    identity = {"config": to_json(config), "data": data or {}, "start": start}
    final = config.out / "model"
    with locked(config.out):
        resumed = checkpoint.latest(config.out / "checkpoints")
        if resumed is not None:
            check_same_run(resumed, identity)
            if resumed.fields["finished"] and final.is_dir():
                return final
        record = identity | {"environment": environment.describe(config.device, DTYPES[config.dtype])}
        write_json(config.out / "run.json", record)
        done = resumed.step if resumed else 0
        with Log(config.out, steps=config.steps, done=done, quiet=quiet, tensorboard=config.tensorboard) as log:
            run = Run(config, log, resumed)
            log.say(f"{config.out}: {sum(p.numel() for p in run.model.parameters() if p.requires_grad):,} parameters to "
                    f"train, {config.dtype} on {config.device}" + (f", resumed after step {done}" if done else ""))
            if resumed is None and begin is not None:
                begin(run)
            until = time.monotonic() + 60 * config.max_minutes
            last = resumed is not None and resumed.fields["finished"]
            for step in range(done, done if last else config.steps):
                clock = time.perf_counter()
                metrics = step_fn(run, step)
                log.write("train", step + 1, metrics)
                log.write("speed", step + 1, {"seconds": time.perf_counter() - clock})
                last = step + 1 == config.steps or time.monotonic() >= until
                if last or (step + 1) % config.log_every == 0:
                    log.say(f"step {step + 1}/{config.steps}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
                    log.advance(step + 1)
                if last or (step + 1) % config.save_every == 0:
                    checkpoint.save(
                        config.out / "checkpoints", step + 1, run.model, run.optimizer,
                        identity | {"state": run.state, "finished": last}, keep=config.keep,
                        save_model=lora.save if config.lora_rank else None,
                    )
                if last:
                    break
            tmp = config.out / ".model.tmp"  # a folder of the final name is taken for finished
            shutil.rmtree(tmp, ignore_errors=True)
            run.save_model(tmp)
            shutil.rmtree(final, ignore_errors=True)
            report.of_run(config.out, f"{type(config).__name__.removesuffix('Config')}: {config.out.name}")
            tmp.rename(final)
    return final


def command(config_type: type, run: Callable[[Any], Any], module: str, description: str, args=None) -> None:
    """The command line of a stage: one flag per field, unknown ones refused, errors in one line."""
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    config = tyro.cli(config_type, args=args, prog=f"python -m {module}", description=description)
    try:
        print(run(config))
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as e:
        raise SystemExit(f"error: {e}") from e
