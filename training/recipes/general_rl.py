"""Stage 4, general RL (Qwen3 technical report, section 4.4): over 20 tasks with scorers of their own.

Instruction following, format following (flags and think blocks, by the gate on every reply), tool use over several turns,
answers from passages, reasoning; rewards by rule, by a model with a reference, by a reward model. The last two need an
endpoint or a local model, and queries: what makes them of `rewards.judges` is named as ``module:attribute`` in ``families``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..rewards.families import GENERAL
from ..rl import RLConfig


def recipe(start: Path, out: Path, **changes: Any) -> RLConfig:
    return RLConfig(**({
        "start": start, "out": out, "families": GENERAL,
        "steps": 100, "groups": 128, "group_size": 8, "mini_batches": 4,
        "algorithm": "dapo", "lr": 1e-6, "schedule": "wsd", "warmup": 5,
        "temperature": 1.0, "max_tokens": 8192, "max_prompt": 2048, "slots": 32, "tokens_per_pack": 16_384,
        "entropy_band": (0.1, 0.8), "pass_band": (0.05, 0.95), "eval_every": 10, "workers": 8,
    } | changes))
