"""Stage 2, reasoning RL (Qwen3 technical report, section 4.2): GRPO on query-verifier pairs.

Pairs not seen in the cold start, learnable, as hard as possible; large batches, many rollouts per query and off-policy
updates for sample efficiency; entropy kept steady. The report used 3,995 pairs and 170 steps and says little of the rest:
batch and rates here are ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..rewards.gym import NAMES
from ..rl import RLConfig


def recipe(start: Path, out: Path, **changes: Any) -> RLConfig:
    return RLConfig(**({
        "start": start, "out": out,
        "families": ("linear_equation", *(f"gym/{name}" for name in NAMES)),
        "steps": 170, "groups": 64, "group_size": 16, "mini_batches": 4,
        "algorithm": "dapo",  # GRPO with a loss per token and clip-higher; groups of one reward are dropped in any case
        "lr": 1e-6, "schedule": "wsd", "warmup": 5,
        "temperature": 1.0, "max_tokens": 8192, "max_prompt": 1024, "slots": 32, "tokens_per_pack": 16_384,
        "entropy_band": (0.1, 0.8), "pass_band": (0.05, 0.95), "raise_at": 0.6, "easy_share": 0.3,
        "eval_every": 10, "workers": 8,
    } | changes))
