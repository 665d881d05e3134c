"""What the three pre-training stages share: their terms, their scales, and the run of one stage.

A stage file (``stage1.py``, ...) says what the report says; a ``Scale`` says how large everything is. A run takes the
shards of a build, writes the stage's mixture, trains, and leaves ``model/`` (safetensors, config, tokenizer; loads in
transformers), ``result.json`` with the held-out loss per domain and language, and for long context the probes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qwen3_model import load
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from .. import probes
from ..config import DTYPES, Config, to_json
from ..data import cells as cells_module
from ..data.mixture import LEAST, Mixture, of_cells, weights
from ..data.shards import TokenShards
from ..environment import file_sha256, weights_sha256
from ..evaluation import HeldOut
from ..files import check_settings, write_json
from ..pretrain import train
from .export import export


@dataclass(frozen=True)
class Scale:
    """Sizes of the model and of the stages. ``tokens``: of the three stages. The rows of S3 are 8 times those of S1."""

    tokens: tuple[float, float, float]
    seq_len: int
    batch_tokens: int
    lr: float
    warmup: int  # steps
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    experts: int = 0  # 0: dense
    experts_per_token: int = 0
    expert_width: int = 0
    router_z_loss: float = 0.0  # the report names none
    tie: bool = True
    initializer_range: float = 0.02
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_states: Literal["float32", "float32-moments", "bfloat16"] = "float32"
    recompute: Literal["none", "norm+swiglu", "full"] = "none"
    spike_sigma: float = 6.0  # of the guard that skips steps; 0: none. In small batches what stands out is rare, not broken
    micros: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_epochs: float = 4.0
    eval_tokens: int = 512  # per cell, while training; 8 times that at the end

    def model(self, vocab_size: int, end_of_text: int) -> Qwen3Config:
        moe = {"num_experts": self.experts, "num_experts_per_tok": self.experts_per_token,
               "moe_intermediate_size": self.expert_width} if self.experts else {}
        return Qwen3Config(
            vocab_size=vocab_size, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, rope_theta=10_000, max_position_embeddings=self.seq_len, tie_word_embeddings=self.tie,
            initializer_range=self.initializer_range, bos_token_id=end_of_text, eos_token_id=end_of_text, **moe,
        )


TINY = Scale(
    tokens=(700_000, 1_300_000, 500_000), seq_len=128, batch_tokens=2048, lr=5e-3, warmup=20, hidden_size=96, layers=3, heads=3,
    kv_heads=1, head_dim=32, intermediate_size=256, initializer_range=0.08, optimizer="muon", spike_sigma=0.0, dtype="float32",
    eval_tokens=4096,
)
SCALES = {
    # Two CPU cores and a few minutes; chosen in docs/LOG.md for the demo.
    "tiny": TINY,
    # The same with 8 experts of which a token uses 2, of equal active size.
    "tiny-moe": replace(TINY, experts=8, experts_per_token=2, expert_width=TINY.intermediate_size // 2),
    # One H100: 60M parameters. Not run at this size yet.
    "h100": Scale(
        tokens=(400e6, 150e6, 60e6), seq_len=4096, batch_tokens=1 << 19, lr=2e-3, warmup=100, hidden_size=512, layers=10,
        heads=8, kv_heads=4, head_dim=64, intermediate_size=1536, recompute="norm+swiglu", micros=4, eval_tokens=65536,
    ),
    "h100-moe": Scale(
        tokens=(400e6, 150e6, 60e6), seq_len=4096, batch_tokens=1 << 19, lr=2e-3, warmup=100, hidden_size=512, layers=10,
        heads=8, kv_heads=4, head_dim=64, intermediate_size=1536, experts=16, experts_per_token=2, expert_width=768,
        recompute="norm+swiglu", micros=1, eval_tokens=65536,
    ),
    # The report's tokens on its smallest model. Learning rate and batch are not in the report: see training/scaling.py.
    "report-0.6b": Scale(
        tokens=(30e12, 5e12, 300e9), seq_len=4096, batch_tokens=1 << 22, lr=1e-3, warmup=2000, hidden_size=1024, layers=28,
        heads=16, kv_heads=8, head_dim=128, intermediate_size=3072, recompute="norm+swiglu", micros=64, eval_tokens=65536,
    ),
}


@dataclass(frozen=True)
class Stage:
    """One stage in the report's terms."""

    name: str
    title: str
    seq_len: int
    tokens: float
    batch_tokens: int
    rope_theta: float
    lr: float  # peak
    lr_end: float  # at the end, as a share of the peak
    decay: float  # share of the steps in which the rate falls
    warmup: int
    factors: Mapping[str, float] = field(default_factory=dict)  # on the weights of what has these labels
    long_share: float = 0.0  # share of the tokens from documents of at least half a row; the rest: an eighth to a half


@dataclass(frozen=True)
class Paths:
    """Where a stage reads and writes."""

    shards: Path  # of a build: train/, held_out/, cells.json
    tokenizer: Path
    out: Path
    init: Path | None = None  # folder of the model to start from: that of the stage before, or any Qwen3 checkpoint
    factors: Path | None = None  # search.json, whose factors come on top of the stage's


def mixture(stage: Stage, paths: Paths, max_epochs: float) -> tuple[Mixture, dict[str, Any]]:
    """The stage's mixture, and a record: shares by domain, the most passes over a part, which are more than ``max_epochs``
    where the data are too few or the context is long, and factors for labels that the data do not have."""
    cells = cells_module.read(paths.shards)
    found = json.loads(paths.factors.read_text())["factors"] if paths.factors else {}
    known = {f"{name}={getattr(c, name)}" for c in cells for name in cells_module.LABELS}
    names = found.keys() | stage.factors.keys()
    factors = {k: found.get(k, 1.0) * stage.factors.get(k, 1.0) for k in names & known}
    # A long context has few documents: their passes are bounded by the run as a whole, not by cell.
    bound = 0 if stage.long_share else min(stage.tokens, max_epochs * sum(cells.values()))
    share = weights(cells, factors, total_tokens=bound, max_epochs=max_epochs)
    if not stage.long_share:
        parts = of_cells(paths.shards, share, seq_len=stage.seq_len)
    else:
        half, eighth = stage.seq_len // 2, stage.seq_len // 8
        least = LEAST / min(stage.long_share, 1 - stage.long_share)  # of the whole, behind the shares below
        long = of_cells(paths.shards, share, seq_len=stage.seq_len, min_tokens=half, least=least)
        short = of_cells(paths.shards, share, seq_len=stage.seq_len, min_tokens=eighth, max_tokens=half - 1, least=least)
        parts = (*(replace(p, weight=p.weight * stage.long_share) for p in long),
                 *(replace(p, weight=p.weight * (1 - stage.long_share)) for p in short))
    domains: dict[str, float] = {}
    for p in parts:
        domain = cells_module.Cell.parse(p.path.name).domain
        domains[domain] = domains.get(domain, 0.0) + p.weight
    passes = max(p.weight * stage.tokens / p.tokens() for p in parts)
    absent = sorted(names - known)
    return Mixture(parts), {"domains": domains, "parts": len(parts), "passes": passes, "absent": absent}


def config_of(stage: Stage, scale: Scale, paths: Paths, *, seed: int, device: str) -> Config:
    steps = max(2, round(stage.tokens / stage.batch_tokens))
    rows = stage.batch_tokens // stage.seq_len
    if rows < 1:
        raise ValueError(f"batch_tokens is {stage.batch_tokens}; expected at least a row of {stage.seq_len} tokens")
    return Config(
        data=paths.out / "mixture.json", out=paths.out / "train", tokenizer=paths.tokenizer, init=paths.init, steps=steps,
        seq_len=stage.seq_len, rows=rows, micros=min(scale.micros, rows), lr=stage.lr, schedule="wsd",
        warmup=min(stage.warmup, steps // 4), decay=stage.decay, lr_floor=stage.lr_end, optimizer=scale.optimizer,
        optimizer_states=scale.optimizer_states, router_z_loss=scale.router_z_loss, recompute=scale.recompute,
        spike_sigma=scale.spike_sigma, spike_window=64, async_save=True, seed=seed, device=device, dtype=scale.dtype,
        eval_every=max(1, steps // 2), log_every=max(1, steps // 20), save_every=max(1, steps // 3),
        tensorboard=importlib.util.find_spec("tensorboard") is not None,
    )


def settings_of(stage: Stage, scale: Scale, paths: Paths, seed: int) -> dict[str, Any]:
    """What tells a stage's result from others; of files their content."""
    own = {f"{kind}.{k}": v for kind, x in (("stage", stage), ("scale", scale)) for k, v in to_json(x).items()}
    return own | {
        "seed": seed, "init": weights_sha256(paths.init) if paths.init else None,
        "factors": file_sha256(paths.factors) if paths.factors else None,
        "shards": file_sha256(paths.shards / cells_module.FILE), "tokenizer": file_sha256(paths.tokenizer),
    }


def run(
    stage: Stage, scale: Scale, paths: Paths, *, seed: int = 0, device: str = "auto", quiet: bool = False,
) -> dict[str, Any]:
    """Runs or resumes a stage and returns what ``result.json`` holds. Raises ValueError when that is of another stage,
    scale, seed, init, factors or data."""
    done, settings = paths.out / "result.json", settings_of(stage, scale, paths, seed)
    if done.exists():
        check_settings(done, settings)
        return json.loads(done.read_text())
    tokenizer = Tokenizer.from_file(paths.tokenizer)
    if paths.init is not None:
        base = Qwen3Config.from_file(paths.init)
    else:
        base = scale.model(tokenizer.vocab_size, tokenizer.token_id("<|endoftext|>"))
    positions = max(base.max_position_embeddings, stage.seq_len)
    model_config = replace(base, rope_theta=stage.rope_theta, max_position_embeddings=positions)
    config = config_of(stage, scale, paths, seed=seed, device=device)
    mixed, record = mixture(stage, paths, scale.max_epochs)
    mixed.write(config.data)
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    shown = ", ".join(f"{d} {100 * w:.0f} %" for d, w in sorted(record["domains"].items(), key=lambda kv: -kv[1]))
    console.print(f"{stage.name}: {stage.title}; {stage.tokens:,.0f} tokens in rows of {stage.seq_len:,}; {shown}; "
                  f"at most {record['passes']:.1f} passes (max_epochs {scale.max_epochs:g})", markup=False)
    rows = max(1, 4096 // stage.seq_len)
    held = HeldOut(paths.shards, seq_len=stage.seq_len, rows=rows, max_tokens=scale.eval_tokens)
    final = train(config, model_config=model_config, eval_fn=held, quiet=quiet)

    config = config.resolved()
    model = load.load(final, device=config.device)
    export(model, paths.tokenizer, paths.out / "model")
    if paths.init is not None:
        before = load.load(paths.init, device=config.device)
    else:
        before = Qwen3(model_config).init_weights(seed).to(config.device, DTYPES[config.dtype])
    more = HeldOut(paths.shards, seq_len=stage.seq_len, rows=rows, max_tokens=8 * scale.eval_tokens)
    result = {
        "settings": settings, "stage": asdict(stage), "mixture": record, "steps": config.steps,
        "parameters": model_config.num_params(), "active": model_config.num_params(active=True),
        "held_out before": more(before), "held_out": more(model),
    }
    if stage.long_share:
        models = {stage.name: model, "before": before}
        result["probes"] = {k: long_context(m, tokenizer, paths.shards, stage.seq_len, seed) for k, m in models.items()}
    write_json(done, result)
    return result


def long_context(model: Qwen3, tokenizer: Tokenizer, shards: Path, seq_len: int, seed: int) -> dict[str, Any]:
    """Needles at three depths of three lengths, many shots, and the loss by position in long held-out documents."""
    largest = max(cells_module.read(shards, "held_out").items(), key=lambda kv: kv[1])[0]
    data = TokenShards(shards / "held_out" / largest.key)
    haystack = [t for d in range(len(data)) for t in data.read(d)[:-1].tolist()]
    lengths = [n for n in (seq_len // 8, seq_len // 2, seq_len) if n <= len(haystack) and n >= 64]
    where = {"lengths": lengths, "depths": (0.1, 0.5, 0.9)}
    found = probes.needle(model, tokenizer, haystack, **where, trials=3, seed=seed) if lengths else {}
    shots = probes.many_shot(model, tokenizer, shots=(0, 4, 16, 64), trials=8, seed=seed)
    return {
        "needle": [{"length": n, "depth": d, **asdict(f)} for (n, d), f in found.items()],
        "many-shot": [{"shots": n, **asdict(f)} for n, f in shots.items()],
    }


@dataclass(frozen=True)
class Options:
    """Options of a stage's command line."""

    shards: Path
    tokenizer: Path
    out: Path
    scale: str = "tiny"
    init: Path | None = None
    factors: Path | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}; expected one of {tuple(SCALES)}")


def command(stage: Any, name: str, description: str | None, args: Sequence[str] | None = None) -> None:
    """The command line of a stage file."""
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    o = tyro.cli(Options, args=args, prog=f"python -m training.recipes.{name}", description=description)
    scale = SCALES[o.scale]
    try:
        result = run(stage(scale), scale, Paths(o.shards, o.tokenizer, o.out, o.init, o.factors), seed=o.seed, device=o.device)
    except (ValueError, OSError, FloatingPointError) as e:
        raise SystemExit(f"error: {e}") from e
    print(f"held-out loss {result['held_out']['loss']:.4f} nats per token; model: {o.out / 'model'}")
