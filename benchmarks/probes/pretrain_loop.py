"""The training driver's own speed: ``python benchmarks/probes/pretrain_loop.py --model Qwen3-0.6B --rows 8``.

`training.pretrain` on random tokens in documents longer than a row, so that its step is that of `benchmarks.train_step`;
what differs is all that the loop does beside: reading batches, logging, checking losses. bfloat16 weights and moments.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.harness import median
from benchmarks.train_step import PEAK_FLOPS, flops_per_token
from training import log, pretrain
from training.config import Config
from training.data import shards


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="Qwen3-0.6B", help="a released size, or the path of a config.json")
    p.add_argument("--rows", type=int, default=8)
    p.add_argument("--seq-len", type=int, default=4096)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    if args.steps < 20:
        p.error(f"--steps is {args.steps}; expected at least 20: the first ten are not counted")
    model, rng = pretrain.named_model(args.model), np.random.default_rng(0)
    length, tokens = 8 * args.seq_len, (args.steps + 1) * args.rows * args.seq_len
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        documents = ((rng.integers(model.vocab_size - 1, size=length), 4 * length) for _ in range(-(-tokens // length)))
        shards.write(data, documents, vocab_size=model.vocab_size, end_of_text=model.vocab_size - 1)
        config = Config(
            data=data, out=out, model=args.model, steps=args.steps, seq_len=args.seq_len, rows=args.rows, log_every=10,
            save_every=args.steps, warmup=1, optimizer_states="bfloat16", dtype="bfloat16", device=args.device,
            tensorboard=False,
        )
        pretrain.train(config, model_config=model)
        speeds = [r["tokens_per_s"] for r in log.read_metrics(out) if r["kind"] == "speed"]
    rate = median(speeds[1:])  # the first has the kernels' compilation in it
    mfu = 100 * rate * flops_per_token(model, args.seq_len) / PEAK_FLOPS
    print(f"{args.model} b{args.rows}T{args.seq_len}: {rate:,.0f} tokens/s, MFU {mfu:.1f} %")


if __name__ == "__main__":
    main()
