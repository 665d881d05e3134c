"""A decoding step of a whole model, weights made on the GPU: ``python -m benchmarks.decode_step --model Qwen3-30B-A3B``.

A step takes one token a row through all layers, over a cache with ``--context`` tokens, to the greedy choice of the next, and
is one CUDA graph. Its floor: the bytes that it must read (all matrices but the embedding, of a mixture the experts that this
step's tokens go to, and the cache) over the copy bandwidth measured in the same process. Its logits are compared with those
of the plain torch ops on the same routing: where that is free, a router's ties, which rounding decides, send a random model
of 48 layers elsewhere altogether. Prints one line of JSON for each number of rows.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from qwen3_kernels import dispatch
from qwen3_model.cache import KVCache
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from training.environment import commit

from . import ceilings, harness
from .train_step import fill


def model_of(config: Qwen3Config) -> Qwen3:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen3(config).eval()
    finally:
        torch.set_default_dtype(before)
    fill(model)
    return model


@torch.no_grad()
def measure(model: Qwen3, rows: int, context: int, turns: int) -> dict:
    """Median milliseconds of a step, bytes that it reads, the logits' distance from the plain torch ops'."""
    cache = model.new_cache(rows, context + 1)
    generator = torch.Generator("cuda").manual_seed(1)
    cache.k.normal_(generator=generator), cache.v.normal_(generator=generator)
    cache.lengths.fill_(context)
    tokens = torch.randint(model.config.vocab_size, (rows, 1), device="cuda", generator=generator)

    def logits() -> Tensor:
        return model.head(model(tokens, cache=cache, return_hidden=True)[:, -1])

    expected = logits()  # also what has to be compiled before a capture
    experts = routing_of(model, tokens, cache)
    plain = plain_logits(model, tokens, cache, experts)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = logits()
        chosen = found.argmax(-1)
    graph.replay()
    if not torch.equal(found, expected):
        raise RuntimeError("the graph's logits are not those of the step without one")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(turns + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return {
        "rows": rows, "context": context, "ms": harness.median([a.elapsed_time(b) for a, b in zip(marks, marks[1:])]),
        "bytes": bytes_read(model, experts) + 2 * cache.k[:, :, :context].numel() * 2,
        "relative_difference": ((found.float() - plain).norm() / plain.norm()).item(),
        "same_choice": (chosen == plain.argmax(-1)).float().mean().item(),
    }


def routing_of(model: Qwen3, tokens: Tensor, cache: KVCache) -> list[Tensor]:
    """The experts [N, K] of every mixture, in order."""
    return [r.expert_ids for r in model(tokens, cache=cache, return_routing=True)[1]]


def plain_logits(model: Qwen3, tokens: Tensor, cache: KVCache, experts: list[Tensor]) -> Tensor:
    with dispatch.use("torch"):
        hidden = model(tokens, cache=cache, return_hidden=True, expert_ids=experts or None)
        return model.head(hidden[:, -1]).float()


def bytes_read(model: Qwen3, experts: list[Tensor]) -> int:
    """Of weights, by a step whose tokens go to these experts [N, K] in the mixtures of the layers, in order."""
    total, used = 0, iter(experts)
    for layer in model.model.layers:
        weights = list(layer.named_parameters())
        total += sum(p.nbytes for name, p in weights if ".experts." not in name)
        stacked = [p for name, p in weights if ".experts." in name]  # [E, ...]
        if stacked:
            total += next(used).unique().numel() * sum(p[0].nbytes for p in stacked)
    return total + model.head_weight.nbytes


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.decode_step", description=__doc__.splitlines()[0])
    p.add_argument("--model", default="Qwen3-0.6B", help="a released size")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--turns", type=int, default=30)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all rows here, with versions and commit")
    args = p.parse_args(argv)
    for name, values in (("rows", args.rows), ("context", [args.context]), ("turns", [args.turns])):
        if min(values) < 1:
            p.error(f"--{name} is {min(values)}; expected at least 1")
    if not torch.cuda.is_available():
        p.error("torch finds no CUDA device")
    copy = ceilings.measure("cuda")["copy_gbps"]
    config = Qwen3Config.from_name(args.model)
    model, results = model_of(config), []
    for rows in args.rows:
        r = {"model": args.model} | measure(model, rows, args.context, args.turns)
        r |= {"tokens_per_s": rows / r["ms"] * 1e3, "pct_of_floor": 100 * r["bytes"] / (copy * 1e6) / r["ms"],
              "copy_gbps": copy, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        print(json.dumps(r), flush=True)
        results.append(r)
        if args.json:
            args.json.write_text(json.dumps({
                "gpu": harness.device_name("cuda"), "versions": harness.versions([]), "commit": commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
