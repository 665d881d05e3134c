"""``python -m benchmarks.parity``: the model against transformers' on the same random weights and tokens.

The 0.6B shape whole, and four layers of the 30B-A3B shape. All weights are exact in bfloat16, so the float32 and the
bfloat16 models have the same ones, and transformers' float32 logits (TF32 off) stand for the truth. Errors of a tensor:
``max`` is the largest difference over the largest value, ``rms`` is ‖got − want‖ / ‖want‖.

In float32 two orders of the same sums differ by some 1e-6; in bfloat16 by about as much as either differs from the
truth, so there the measure is our error over transformers'. Experts make bfloat16 errors jump: a near-tie in routing
falls either way. So their ``max`` is shown but not bounded, and the float32 rows are chosen without near-ties.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_kernels import dispatch
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from training.environment import commit

from . import harness
from .__main__ import align, pick_device

FP32_LOGITS, FP32_GRADIENTS, BF16_RATIO = 1e-5, 1e-4, 2.0  # the bounds

Weights = dict[str, Tensor]


@dataclass
class Row:
    """One line: a measured value and what it may be at most (None: shown, not judged)."""

    model: str
    check: str
    value: float | None = None
    bound: float | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and math.isfinite(self.value) and (self.bound is None or self.value <= self.bound)

    def to_dict(self) -> dict:
        value = None if self.value is None or not math.isfinite(self.value) else self.value  # JSON has no NaN
        return asdict(self) | {"value": value, "ok": self.ok}


# ---- the two models --------------------------------------------------------------------------------------------------


def shapes(quick: bool) -> dict[str, Qwen3Config]:
    dense, moe = Qwen3Config.from_name("Qwen3-0.6B"), Qwen3Config.from_name("Qwen3-30B-A3B", num_hidden_layers=4)
    if quick:
        small = dict(vocab_size=512, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        dense = replace(dense, **small, intermediate_size=128, num_hidden_layers=3)
        moe = replace(moe, **small, intermediate_size=128, moe_intermediate_size=32, num_experts=8,
                      num_experts_per_tok=2, num_hidden_layers=2)
    return {"0.6B": dense, f"30B-A3B, {moe.num_hidden_layers} layers": moe}


def draw(config: Qwen3Config, device: str) -> Weights:
    """Random weights in float32, rounded to bfloat16. Norms' are spread around 1, to be told from no weight at all."""
    with torch.device("meta"):
        empty = Qwen3(config).state_dict()
    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, like in empty.items():
        w = torch.randn(like.shape, device=device, generator=generator)
        w = 1 + 0.1 * w if like.dim() == 1 else w * config.initializer_range
        weights[name] = w.bfloat16().float()
    return weights


def ours(config: Qwen3Config, weights: Weights, numerics: str = "fast") -> Qwen3:
    """Our model, sharing `weights`."""
    with torch.device(weights["model.norm.weight"].device):
        model = Qwen3(replace(config, numerics=numerics))
    model.load_state_dict(weights, assign=True)
    return model.eval()


def theirs(config: Qwen3Config, weights: Weights) -> torch.nn.Module:
    """transformers' model, sharing `weights`, with the implementations that it is defined by: torch's attention and one
    expert after another."""
    import transformers

    kind = "Qwen3Moe" if config.num_experts else "Qwen3"
    hf = getattr(transformers, f"{kind}Config")(**config.to_dict())
    hf._attn_implementation = "sdpa"
    if config.num_experts:
        hf._experts_implementation = "eager"
    with torch.device(weights["model.norm.weight"].device):
        model = getattr(transformers, f"{kind}ForCausalLM")(hf)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    model.load_state_dict(weights | head, assign=True)
    model.tie_weights()
    return model.eval()


# ---- what is compared ------------------------------------------------------------------------------------------------


def max_error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


def rms_error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@torch.no_grad()
def their_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def decoded(model: Qwen3, tokens: Tensor, prompt: int) -> Tensor:
    """The logits of a prefill of `prompt` tokens and of the others one by one, through a cache."""
    cache, logits = model.new_cache(*tokens.shape), []
    for piece in tokens.split([prompt] + [1] * (tokens.shape[1] - prompt), 1):
        logits.append(model(piece, cache=cache))
        cache.advance(piece.shape[1])
    return torch.cat(logits, 1)


def gradients(model: torch.nn.Module, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Weights:
    """Of the mean cross-entropy of the next token."""
    loss = F.cross_entropy(forward(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@torch.no_grad()
def clearest_rows(config: Qwen3Config, model: Qwen3, tokens: Tensor, rows: int) -> Tensor:
    """The rows of `tokens` whose routing is furthest from a tie between the last expert chosen and the next one."""
    if not config.num_experts or config.num_experts_per_tok == config.num_experts:
        return tokens[:rows]
    gaps, K = [], config.num_experts_per_tok
    for row in tokens:
        logits = model(row[None], return_hidden=True, return_router_logits=True)[1]
        best = torch.stack(logits).topk(K + 1, -1).values
        gaps.append((best[..., K - 1] - best[..., K]).min())
    return tokens[torch.stack(gaps).argsort(descending=True)[:rows]]


def compare(name: str, config: Qwen3Config, device: str, length: int, rows: int = 2) -> Iterator[Row]:
    weights = draw(config, device)
    fast, reference = ours(config, weights), theirs(config, weights)
    generator = torch.Generator().manual_seed(1)
    candidates = torch.randint(config.vocab_size, (4 * rows, length), generator=generator).to(device)
    tokens, prompt = clearest_rows(config, fast, candidates, rows), length - min(64, length // 2)
    truth = their_logits(reference, tokens)

    with torch.no_grad():
        got = fast(tokens)
    yield Row(name, "fp32 logits, max", max_error(got, truth), FP32_LOGITS)
    cached = decoded(fast, tokens, prompt)
    yield Row(name, "fp32 cached against full, max", max_error(cached, got), FP32_LOGITS)
    del got, cached
    if not config.num_experts:
        want = gradients(reference, lambda t: reference(t, use_cache=False).logits, tokens)
        found = gradients(fast, fast, tokens)
        worst = torch.tensor([rms_error(found[n], want[n]) for n in want]).max().item()  # max() would pass over NaN
        yield Row(name, "fp32 gradients, worst rms", worst, FP32_GRADIENTS)
        del want, found

    del fast, reference
    weights = {n: w.bfloat16() for n, w in weights.items()}
    want = their_logits(theirs(config, weights), tokens)
    base = {"rms": rms_error(want, truth), "max": max_error(want, truth)}
    for kind, value in base.items():
        yield Row(name, f"bf16 transformers against fp32, {kind}", value)
    for numerics in ("fast", "exact"):
        model = ours(config, weights, numerics)
        with torch.no_grad():
            got = model(tokens)
        bound = BF16_RATIO if numerics == "fast" else None
        yield Row(name, f"bf16 {numerics}, rms error over theirs", rms_error(got, truth) / base["rms"], bound)
        bound = None if config.num_experts else bound
        yield Row(name, f"bf16 {numerics}, max error over theirs", max_error(got, truth) / base["max"], bound)
        yield Row(name, f"bf16 {numerics} against transformers, max", max_error(got, want))
        if numerics == "fast":
            got = decoded(model, tokens, prompt)
            yield Row(name, "bf16 fast cached, rms error over theirs", rms_error(got, truth) / base["rms"], BF16_RATIO)


# ---- the command -----------------------------------------------------------------------------------------------------


def measure(device: str, quick: bool) -> list[Row]:
    """All rows; a model that raises has a last row with the reason."""
    rows: list[Row] = []
    for name, config in shapes(quick).items():
        begin = time.perf_counter()
        try:
            rows.extend(compare(name, config, device, 48 if quick else 512))
        except Exception as e:
            traceback.print_exc()
            rows.append(Row(name, "not finished", error=harness.describe(e)))
        print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(rows: list[Row]) -> str:
    lines = [("model", "check", "value", "at most", "")]
    for r in rows:
        value, bound = ("" if x is None else f"{x:.3g}" for x in (r.value, r.bound))
        lines.append((r.model, r.check, value, bound, r.error or ("" if r.ok else "FAILED")))
    return align(lines, left=(0, 1, 4))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 when a bound does not hold or a model raised; 2 for arguments that are refused."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n", 1)[1])
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    p.add_argument("--quick", action="store_true", help="tiny shapes, on the CPU unless --device says otherwise")
    args = p.parse_args(argv)
    try:
        device = pick_device("cpu" if args.quick and args.device == "auto" else args.device)
    except ValueError as e:
        p.error(str(e))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = measure(device, args.quick)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    backends = {op: {name: dispatch.resolve(op, device, d) for name, d in dtypes.items()}
                for op in dispatch.PREFERENCE[torch.device(device).type]}
    print(table(rows))
    print("backends (fp32, bf16): " + "; ".join(f"{op} {', '.join(b.values())}" for op, b in backends.items()))
    if args.json:
        report = {
            "gpu": harness.device_name(device), "device": device, "versions": harness.versions(),
            "commit": commit(), "quick": args.quick, "backends": backends,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "rows": [r.to_dict() for r in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    failed = sum(not r.ok for r in rows)
    print(f"{failed} of {len(rows)} rows FAILED" if failed else f"all {len(rows)} rows hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
