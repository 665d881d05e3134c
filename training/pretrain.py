"""Next-token training from token shards: ``python -m training.pretrain --data DIR --out DIR``.

The loop knows batches and a loss, no algorithm. A run is a function of its config, data and seed: killed at any moment
and started again, it gives the same weights, bit for bit, on the same machine with the same number of threads.

Precision: "float32", or "bfloat16" for weights and activations, by default with float32 master weights, optimizer state
and gradient sums (see ``optim.Optimizer``); no autocast. Logits are never held as a whole.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_kernels import linear_cross_entropy
from qwen3_model import load as model_io
from qwen3_model import rope
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3

from . import checkpoint, environment, memory, report
from .config import DTYPES, FREE, Config, to_json
from .data.mixture import data_sets, describe, open_loader
from .data.packing import IGNORE, Batch, Loader, evaluation_batches
from .data.shards import TokenShards
from .files import write_json
from .log import Log
from .moe import MoELoss
from .optim import Optimizer, SpikeGuard

LossFn = Callable[[Qwen3, Batch], Tensor]
"""Sum of the loss over a batch's kept labels; the trainer divides by their number over all micro-steps."""
EvalFn = Callable[[Qwen3], dict[str, float]]
SKIPS_IN_A_ROW = 16  # after which a run stops: the model or the data is broken, or the guard too strict


def next_token_loss(model: Qwen3, batch: Batch, z_loss: float = 0.0) -> Tensor:
    """Sum of the negative log-likelihoods of the kept labels, in nats, float32."""
    hidden = model(batch.tokens, cu_seqlens=batch.cu_seqlens, return_hidden=True)
    return linear_cross_entropy(
        hidden, model.head_weight, batch.labels, ignore_index=IGNORE, reduction="sum", z_loss=z_loss
    )


def default_loss(config: Config, model: Qwen3Config) -> LossFn:
    """`next_token_loss`, for a mixture of experts `MoELoss`. Raises ValueError: a weight for routers that are not there."""
    if any(map(model.is_moe_layer, range(model.num_hidden_layers))):
        return MoELoss(config.micros, config.z_loss, config.router_z_loss)
    if config.router_z_loss:
        raise ValueError(f"router_z_loss is {config.router_z_loss}; expected 0 for a model without experts")
    return partial(next_token_loss, z_loss=config.z_loss)


def train_step(
    model: Qwen3, optimizer: Optimizer, batches: Sequence[Batch], loss_fn: LossFn, *, lr: float, max_grad_norm: float
) -> tuple[Tensor, Tensor, int]:
    """One update from the micro-steps' ``batches``. Returns mean loss per kept label and gradient norm before clipping,
    both still on the device, and the number of kept labels."""
    device = model.head_weight.device
    kept = sum(int((b.labels != IGNORE).sum()) for b in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        loss = loss_fn(model, batch.to(device)) / kept
        loss.backward()
        total += loss.detach()
    return total, optimizer.step(lr, max_grad_norm, loss=total), kept


@torch.no_grad()
def evaluate(model: Qwen3, data: TokenShards, batches: Iterable[Batch]) -> dict[str, float]:
    """{"loss": nats per token, "tokens": labels counted} over ``batches``, and "bits_per_byte" when they cover ``data``:
    the bits of all tokens, end-of-text included, over the UTF-8 bytes of the text."""
    device = model.head_weight.device
    nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        tokens += int((batch.labels != IGNORE).sum())
        nats += next_token_loss(model, batch.to(device))
    result = {"loss": nats.item() / tokens, "tokens": tokens}
    if tokens == data.index.n_tokens:
        result["bits_per_byte"] = nats.item() / math.log(2) / data.index.n_bytes
    return result


def train(
    config: Config, *, model_config: Qwen3Config | None = None, loss_fn: LossFn | None = None, eval_fn: EvalFn | None = None,
    quiet: bool = False,
) -> Path:
    """Runs or resumes a training run and returns its final checkpoint.

    Args:
        model_config: the architecture, instead of ``config.model`` or that of ``config.init``.
        loss_fn: default that of `default_loss`. If it has ``metrics()``, what that returns is logged every ``log_every`` steps
            as "router". eval_fn: what to log every ``eval_every`` steps beside ``eval_data``'s loss.

    Raises:
        ValueError: settings, data, tokenizer or an earlier run in ``out`` do not fit together, or a step not in memory.
        FloatingPointError: loss or gradient norm is not finite, or the guard skipped too many steps in a row; the
            message names the step. Nothing is saved from it.
        BlockingIOError: another process trains in ``out``.
    """
    config = config.resolved()
    loader = open_loader(config.data, seq_len=config.seq_len, rows=config.rows, seed=config.seed)
    eval_data = TokenShards(config.eval_data) if config.eval_data else None
    model_config = model_config or (Qwen3Config.from_file(config.init) if config.init else named_model(config.model))
    check_vocabulary(config, [*data_sets(loader), *([eval_data] if eval_data else [])], model_config)
    if loss_fn is None:
        loss_fn = default_loss(config, model_config)
        if config.device.startswith("cuda"):  # what another loss takes is not known
            memory.check(config, model_config, torch.cuda.get_device_properties(config.device).total_memory)
    run = {"config": to_json(config), "model": model_config.to_dict(), "data": describe(loader)}
    if config.init:
        run["start"] = {"weights_sha256": environment.weights_sha256(config.init)}

    with locked(config.out):
        resumed = checkpoint.latest(config.out / "checkpoints")
        if resumed is not None:
            check_same_run(resumed, run)
        record = run | {"environment": environment.describe(config.device, DTYPES[config.dtype])}
        write_json(config.out / "run.json", record)
        model, optimizer = set_up(config, model_config, resumed)
        done, final = (resumed.step, resumed.path) if resumed else (0, None)

        pending: list[tuple[int, Tensor, Tensor, Tensor]] = []  # losses, norms, skips not yet read from the device
        skipped = 0  # in a row
        extra = (config.tokenizer,) if config.tokenizer else ()
        saver = checkpoint.Saver(
            config.out / "checkpoints", background=config.async_save, keep=config.keep, extra_files=extra
        )
        with Log(config.out, steps=config.steps, done=done, quiet=quiet, tensorboard=config.tensorboard) as log, saver:
            n_tokens = sum(d.index.n_tokens for d in {d.path: d for d in data_sets(loader)}.values())
            log.say(f"{config.out}: {model_config.num_params():,} parameters, {n_tokens:,} tokens, "
                    f"{config.steps * config.rows * config.seq_len:,} to train on, {config.dtype} on {config.device}"
                    + (f", resumed after step {done}" if done else ""))
            clock, seen = time.perf_counter(), 0
            for step, batches in ahead(loader, config, done):
                loss, norm, kept = train_step(
                    model, optimizer, batches, loss_fn, lr=config.lr_at(step), max_grad_norm=config.max_grad_norm
                )
                skip = torch.zeros_like(loss) if optimizer.guard is None else optimizer.guard.skip.clone()
                pending.append((step + 1, loss, norm, skip))
                seen += kept

                last = step + 1 == config.steps
                saving, evaluating = (last or (step + 1) % n == 0 for n in (config.save_every, config.eval_every))
                if saving or evaluating or (step + 1) % config.log_every == 0:
                    skipped = flush(log, pending, config, skipped)
                    rate = seen / (time.perf_counter() - clock)
                    log.write("speed", step + 1, {"tokens_per_s": rate})
                    if hasattr(loss_fn, "metrics"):
                        log.write("router", step + 1, loss_fn.metrics())
                    log.say(f"step {step + 1}/{config.steps}  loss {loss:.4f}  grad norm {norm:.3f}  "
                            f"lr {config.lr_at(step):.2e}  {rate:,.0f} tokens/s")
                    log.advance(step + 1)
                if evaluating and eval_data is not None:
                    rows = evaluation_batches(eval_data, seq_len=config.seq_len, rows=config.rows // config.micros)
                    result = evaluate(model, eval_data, rows if last else islice(rows, config.eval_batches or None))
                    log.write("eval", step + 1, result)
                    log.say(f"step {step + 1}/{config.steps}  held-out " + "  ".join(f"{k} {v:.6g}" for k, v in result.items()))
                if evaluating and eval_fn is not None:
                    log.write("groups", step + 1, eval_fn(model))
                if saving:
                    final = saver.save(step + 1, model, optimizer, run)
                if not pending:
                    clock, seen = time.perf_counter(), 0
        report.of_run(config.out, f"Pre-training: {config.out.name}")
    return final


def ahead(loader: Loader, config: Config, done: int) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its micro-steps' batches) from ``done`` on, each made in a thread while the step before it runs; for a GPU in
    pinned memory, from where they are copied without a stop."""

    def make(step: int) -> list[Batch]:
        batches = [loader.batch(step, micro=m, micros=config.micros) for m in range(config.micros)]
        return [Batch(*(t.pin_memory() for t in vars(b).values())) for b in batches] if pin else batches

    pin = config.device.startswith("cuda")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, done) if done < config.steps else None
        for step in range(done, config.steps):
            batches = coming.result()
            coming = pool.submit(make, step + 1) if step + 1 < config.steps else None
            yield step, batches


def set_up(config: Config, model_config: Qwen3Config, resumed: checkpoint.Checkpoint | None) -> tuple[Qwen3, Optimizer]:
    """Model, optimizer and torch's random generators at the start of a run, or as a checkpoint left them."""
    torch.manual_seed(config.seed)
    if resumed is not None:
        model = resumed.load_model(config.device)
    elif config.init is not None:
        model = with_config(model_io.load(config.init, device=config.device, dtype=DTYPES[config.dtype]), model_config)
    else:
        model = Qwen3(model_config).init_weights(config.seed).to(config.device, DTYPES[config.dtype])
    model.recompute = config.recompute
    optimizer = Optimizer(
        model.train(), kind=config.optimizer, states=config.optimizer_states, betas=config.betas,
        weight_decay=config.weight_decay, seed=config.seed,
        guard=SpikeGuard(config.spike_sigma, config.spike_window, config.device) if config.spike_sigma else None,
    )
    if resumed is not None:
        resumed.restore(optimizer)
    return model, optimizer


def with_config(model: Qwen3, config: Qwen3Config) -> Qwen3:
    """The weights of ``model`` under another config, which may differ in RoPE, context, and constants of training, but not in
    shape. Raises ValueError naming what differs."""
    free = {"rope_theta", "rope_scaling", "max_position_embeddings", "router_aux_loss_coef", "initializer_range", "numerics",
            "bos_token_id", "eos_token_id"}
    was, now = vars(model.config), vars(config)
    if wrong := [f"{k} is {now[k]}, the weights have {was[k]}" for k in now if k not in free and now[k] != was[k]]:
        raise ValueError(f"the model to start from does not fit: {'; '.join(wrong)}")
    with torch.device("meta"):
        other = Qwen3(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.inv_freq = rope.inv_freq(config)[0].to(model.inv_freq.device)
    return other


def flush(log: Log, pending: list[tuple[int, Tensor, Tensor, Tensor]], config: Config, skipped: int = 0) -> int:
    """Reads the pending losses from the device in one go and writes them; stops at the first that is not finite. Steps
    that the guard skipped are written as such, with the rows they were made of: ``loader.batch(step - 1)`` gives them
    again. ``skipped``: how many in a row were, before and (returned) after."""
    values = torch.stack([torch.stack((loss, norm.float(), skip)) for _, loss, norm, skip in pending]).tolist()
    for (step, *_), (loss, norm, skip) in zip(pending, values):
        if skip:
            skipped += 1
            rows = {"first_row": (step - 1) * config.rows, "rows": config.rows, "seed": config.seed}
            log.write("skipped", step, {"loss": loss, "grad_norm": norm, **rows})
            log.say(f"step {step}: skipped, loss {loss:.4f}, gradient norm {norm:.3g}")
            if skipped >= SKIPS_IN_A_ROW:
                raise FloatingPointError(
                    f"step {step}: {skipped} steps in a row were skipped, the last with loss {loss} and gradient norm {norm}; "
                    f"training stopped. Try a lower lr (now {config.lr:g}) or a larger spike_sigma ({config.spike_sigma:g})."
                )
            continue
        skipped = 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss is {loss}, gradient norm is {norm}; training stopped and nothing of it was saved. "
                f"Try a lower lr (now {config.lr:g}), a longer warmup ({config.warmup}) or dtype float32 ({config.dtype})."
            )
        log.write("train", step, {"loss": loss, "grad_norm": norm, "lr": config.lr_at(step - 1)})
    pending.clear()
    return skipped


def named_model(name: str) -> Qwen3Config:
    return Qwen3Config.from_file(name) if name.endswith(".json") else Qwen3Config.from_name(name)


def check_vocabulary(config: Config, data: Sequence[TokenShards], model: Qwen3Config) -> None:
    """Raises ValueError unless shards, tokenizer and model use one vocabulary."""
    for d in data:
        if d.index.vocab_size > model.vocab_size:
            raise ValueError(f"{d.path} has a vocabulary of {d.index.vocab_size}, the model's is {model.vocab_size}")
    hashes = {str(d.path): d.index.tokenizer_sha256 for d in data}
    if config.tokenizer is not None:
        hashes[str(config.tokenizer)] = environment.file_sha256(config.tokenizer)
    if len(set(hashes.values())) > 1:
        raise ValueError(f"data and tokenizer do not belong together; tokenizer hashes: {hashes}")


def check_same_run(found: checkpoint.Checkpoint, run: dict[str, Any]) -> None:
    """Raises ValueError naming the settings in which a checkpoint differs from the run that would go on from it."""
    differences = [
        f"{part}.{key}: {was.get(key)!r} in the checkpoint, now {now.get(key)!r}"
        for part, now in run.items()
        for was in [found.fields.get(part, {})]
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not (part == "config" and key in FREE)
    ]
    if differences:
        raise ValueError(f"{found.path} belongs to another run ({'; '.join(differences)}); choose another out folder")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Creates ``out`` and holds it for this process; a killed process lets go."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BlockingIOError(f"another process is training in {out}") from e
        yield


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    config = tyro.cli(Config, args=args, prog="python -m training.pretrain", description=__doc__)
    try:
        print(train(config))
    except (ValueError, OSError, FloatingPointError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
