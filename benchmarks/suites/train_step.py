"""A whole training step of the dense models, ours beside transformers with Liger, with our patch and with torch.compile.

Every implementation runs in a process of its own (see `benchmarks.train_step`), one after the other. The first loss and
gradient norm must agree with those of the first implementation within 1 and 3 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

from qwen3_model.config import Qwen3Config

from ..harness import ROOT, Row, median, percentile
from ..train_step import flops_per_token

# (model, rows, implementations). Plain transformers keeps whole logits in fp32: 4 rows fill the card.
CASES = [
    ("Qwen3-0.6B", 8, ("ours", "transformers+liger", "transformers+ours")),
    ("Qwen3-0.6B", 4, ("ours", "transformers+compile", "transformers")),
    ("Qwen3-1.7B", 4, ("ours", "transformers+liger", "transformers+ours")),
    ("Qwen3-1.7B", 8, ("ours", "transformers+liger", "transformers+ours")),
]
LENGTH = 4096
PEER_OF = {"transformers+liger": "liger", "transformers+compile": "compile", "transformers": "transformers"}


def rows(
    device: str, quick: bool, peers: list[str], ceilings: dict[str, float], say: Callable[[str], None],
    wanted: Callable[[str], bool] = lambda case: True,
) -> Iterator[Row]:
    if device != "cuda":
        say("train_step runs on CUDA only")
        return
    for model, batch, impls in CASES[:1] if quick else CASES:
        case, first = f"{model} b{batch}T{LENGTH} bf16", None
        if not wanted(case):
            continue
        config = Qwen3Config.from_name(model)
        for impl in impls:
            if impl in PEER_OF and PEER_OF[impl] not in peers:
                continue
            say(f"{case}: {impl}")
            row = Row("train_step", case, impl, "step")
            try:
                found = run(impl, model, batch, steps=3 if quick else 8)
                first = first or found
                for name, limit in (("loss", 0.01), ("grad_norm", 0.03)):
                    if not abs(found[name] - first[name]) <= limit * abs(first[name]):
                        raise ValueError(f"first {name} is {found[name]:.5g}; the others' is {first[name]:.5g}")
            except Exception as e:
                row.error = f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"
            else:
                ms = found["ms"]
                row.ms, row.ms_p20, row.ms_p80, row.turns = median(ms), percentile(ms, 0.2), percentile(ms, 0.8), len(ms)
                row.peak_mb, row.tokens_per_s, row.mfu_pct = found["peak_mb"], found["tokens_per_s"], found["mfu_pct"]
                row.tflops = found["tokens_per_s"] * flops_per_token(config, LENGTH) * 1e-12
                row.pct_of_ceiling = 100 * row.tflops / ceilings["gemm_bf16_tflops"]
            yield row


def run(impl: str, model: str, batch: int, steps: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.train_step", "--impl", impl, "--model", model, "--rows", str(batch),
               "--seq-len", str(LENGTH), "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])
