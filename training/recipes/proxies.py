"""Many small models: the mixture search and the scaling ladder, each run once for a data set.

    python -m training.recipes.proxies search --shards runs/data/shards --tokenizer tokenizer.json --out runs/search
    python -m training.recipes.proxies ladder --shards runs/data/shards --tokenizer tokenizer.json --out runs/ladder

Both go on where they were stopped: a model's losses are on disk when it is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

from .. import scaling
from ..data import cells as cells_module
from ..data.cells import Cell
from ..data.mixture import Mixture, of_cells, open_loader, weights
from ..data.search import search, shares_by
from ..environment import file_sha256
from ..evaluation import HeldOut
from ..files import kept, write_json
from ..optim import Optimizer, lr_scale
from ..pretrain import next_token_loss, train_step


def small(tokenizer: Tokenizer, *, hidden: int, layers: int, seq_len: int) -> Qwen3Config:
    """A dense model of heads of 32 and an initial scale near 1/sqrt(hidden)."""
    heads, end = hidden // 32, tokenizer.token_id("<|endoftext|>")
    return Qwen3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=1, head_dim=32, rope_theta=10_000, max_position_embeddings=seq_len,
        tie_word_embeddings=True, initializer_range=hidden**-0.5, bos_token_id=end, eos_token_id=end,
    )


def train_small(
    config: Qwen3Config, data: Path, *, tokens: float, batch_tokens: int, seq_len: int, lr: float, seed: int = 0,
    device: str = "cpu",
) -> Qwen3:
    """Muon, WSD with a decay over the last half, no checkpoints. Raises FloatingPointError when loss or gradient norm is
    not finite."""
    loader = open_loader(data, seq_len=seq_len, rows=batch_tokens // seq_len, seed=seed)
    model = Qwen3(config).init_weights(seed).to(device).train()
    optimizer = Optimizer(model, kind="muon", seed=seed)
    steps = max(4, round(tokens / batch_tokens))
    for step in range(steps):
        rate = lr * lr_scale(step, total=steps, warmup=steps // 10, decay=steps // 2)
        loss, norm, _ = train_step(model, optimizer, [loader.batch(step)], next_token_loss, lr=rate, max_grad_norm=1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise FloatingPointError(f"step {step + 1}: loss is {loss.item()}, gradient norm {norm.item()}; peak lr {lr:g}")
    return model.eval()


def _measure(held: HeldOut, model: Qwen3) -> dict[str, float]:
    """Held-out losses. Raises FloatingPointError when they are not finite."""
    losses = held(model)
    if not math.isfinite(losses["loss"]):
        raise FloatingPointError(f"held-out loss is {losses['loss']} after the last step")
    return losses


def _data(shards: Path, tokenizer: Path) -> dict[str, str]:
    """What tells the data of a run from others."""
    return {"shards": file_sha256(shards / cells_module.FILE), "tokenizer": file_sha256(tokenizer)}


def mixture_search(
    shards: Path, tokenizer: Path, out: Path, *, runs: int = 20, tokens: float = 100_000, hidden: int = 64, layers: int = 2,
    seq_len: int = 128, batch_tokens: int = 512, lr: float = 1.5e-2, run_tokens: float = 0, seed: int = 0, quiet: bool = False,
) -> dict[str, Any]:
    """``data.search.search`` with small models of ``tokens`` each. ``run_tokens``: of the run the mixture is for."""
    vocabulary, cells = Tokenizer.from_file(tokenizer), cells_module.read(shards)
    config = small(vocabulary, hidden=hidden, layers=layers, seq_len=seq_len)
    held = HeldOut(shards, seq_len=seq_len, rows=16, max_tokens=1024)
    options = {"tokens": tokens, "batch_tokens": batch_tokens, "seq_len": seq_len, "lr": lr}

    def train_proxy(name: str, share: Mapping[Cell, float], run_seed: int) -> dict[str, float]:
        file = out / f"{name}.mixture.json"
        Mixture(of_cells(shards, share, seq_len=seq_len, least=5e-4)).write(file)
        return _measure(held, train_small(config, file, seed=run_seed, **options))

    settings = options | {"hidden": hidden, "layers": layers} | _data(shards, tokenizer)
    result = search(
        cells, train_proxy, runs=runs, out=out, total_tokens=run_tokens, seed=seed, settings=settings, quiet=quiet
    )
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    table = Table("share of", "natural", "best", box=None, pad_edge=False)
    by = [shares_by({Cell.parse(k): w for k, w in result["shares"][n].items()}, "domain") for n in ("natural", "best")]
    for domain in by[0]:
        table.add_row(domain, *(f"{100 * b[domain]:.1f} %" for b in by))
    console.print(table)
    for n in ("natural", "best"):
        measured = ", ".join(f"{x:.4f}" for x in result["measured"][n])
        console.print(f"{n}: predicted {result['predicted'][n]:.4f}, measured {measured}")
    return result


SIZES = ((32, 2), (64, 3), (128, 4))  # hidden size, layers
LENGTHS = (40_000, 80_000, 160_000)  # tokens
RATES = (0.75e-2, 1.5e-2, 3e-2)
BATCHES = (512, 1024, 2048)  # tokens; others than the middle one in the middle rung alone


def ladder(
    shards: Path, tokenizer: Path, out: Path, *, sizes: Sequence[tuple[int, int]] = SIZES, lengths: Sequence[float] = LENGTHS,
    rates: Sequence[float] = RATES, batches: Sequence[int] = BATCHES, seq_len: int = 128, seed: int = 0, quiet: bool = False,
) -> list[scaling.Run]:
    """Trains or resumes a model per size, length and rate on the natural mixture. Each rung's size is that without
    embeddings. Raises ValueError when a loss in ``out`` is of another seed, row length or data."""
    vocabulary, data = Tokenizer.from_file(tokenizer), _data(shards, tokenizer)
    mixture = out / "mixture.json"
    Mixture(of_cells(shards, weights(cells_module.read(shards)), seq_len=seq_len)).write(mixture)
    held = HeldOut(shards, seq_len=seq_len, rows=16, max_tokens=2048)
    middle = batches[len(batches) // 2]
    plan = [(s, n, r, middle) for s in sizes for n in lengths for r in rates]
    plan += [(sizes[len(sizes) // 2], lengths[len(lengths) // 2], r, b) for b in batches if b != middle for r in rates]
    runs, console = [], Console(quiet=quiet)
    for (hidden, layers), tokens, lr, batch in track(plan, "ladder", console=console, disable=quiet or not console.is_terminal):
        config = small(vocabulary, hidden=hidden, layers=layers, seq_len=seq_len)
        options = {"tokens": tokens, "batch_tokens": batch, "seq_len": seq_len, "lr": lr, "seed": seed}
        file = out / f"h{hidden}-l{layers}-t{tokens:.0f}-r{lr:g}-b{batch}.json"
        loss = kept(file, options | data, lambda: _measure(held, train_small(config, mixture, **options))["loss"])
        runs.append(scaling.Run(config.num_params(embeddings=False), tokens, loss, lr, batch))
    return runs


def report_ladder(runs: Sequence[scaling.Run], console: Console, *, params: float, tokens: float) -> dict[str, Any]:
    """Prints and returns the law of all rungs, that of all but the largest size with its error there, and a prediction."""
    plan, law, rate = scaling.predict(runs, params=params, tokens=tokens)
    largest = max(r.params for r in runs)
    result: dict[str, Any] = {
        "law": asdict(law), "lr": asdict(rate), "prediction": asdict(plan) | {"params": params, "tokens": tokens},
    }
    console.print(f"L = {law.E:.3f} + {law.A:.3g} / N^{law.a:.3f} + {law.B:.3g} / D^{law.b:.3f}; "
                  f"off by {100 * law.error:.2f} % rms")
    console.print(f"lr = {rate.c:.3g} N^{rate.n:.3f} D^{rate.d:.3f}; the best lay inside those tried in "
                  f"{100 * plan.lr_inside:.0f} % of the rungs for the rate, {100 * plan.batch_inside:.0f} % for the batch")
    batches = [r.batch_tokens for r in runs]
    runs = [r for r in runs if r.batch_tokens == max(sorted(set(batches)), key=batches.count)]
    rest = [r for r in runs if r.params < largest]
    if len({(r.params, r.tokens) for r in rest}) >= 6:
        short = scaling.fit_loss(rest)
        real: dict[float, float] = {}
        for r in runs:
            if r.params == largest:
                real[r.tokens] = min(r.loss, real.get(r.tokens, r.loss))
        result["held back"] = [
            {"params": largest, "tokens": d, "measured": x, "predicted": short(largest, d)} for d, x in sorted(real.items())
        ]
        for row in result["held back"]:
            console.print(f"held back: N {largest:,.0f}, D {row['tokens']:,.0f}: predicted {row['predicted']:.4f}, measured "
                          f"{row['measured']:.4f}")
    console.print(f"for N {params:,.0f}, D {tokens:,.0f}: loss {plan.loss:.3f}, lr {plan.lr:.3g}, batch "
                  f"{plan.batch_tokens:,.0f} tokens")
    return result


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    torch.set_num_threads(1)  # small products: more threads would only wait for each other

    def search_(shards: Path, tokenizer: Path, out: Path, runs: int = 20, tokens: float = 100_000, seed: int = 0) -> None:
        """The mixture search."""
        mixture_search(shards, tokenizer, out, runs=runs, tokens=tokens, seed=seed)

    def ladder_(shards: Path, tokenizer: Path, out: Path, params: float = 1e6, tokens: float = 2e6, seed: int = 0) -> None:
        """The ladder, and what it predicts for a model of ``params`` (without embeddings) and ``tokens``."""
        result = report_ladder(ladder(shards, tokenizer, out, seed=seed), Console(highlight=False), params=params, tokens=tokens)
        write_json(out / "ladder.json", result)

    commands: dict[str, Callable[..., None]] = {"search": search_, "ladder": ladder_}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="python -m training.recipes.proxies", description=__doc__)
    except (ValueError, OSError, FloatingPointError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
