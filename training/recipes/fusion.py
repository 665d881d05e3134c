"""Stage 3, thinking mode fusion (Qwen3 technical report, section 4.3): continual fine-tuning of the model of stage 2.

Thinking data by rejection sampling of that model itself on stage 1's queries, so that its skill is kept; non-thinking
data with an empty think block; /think and /no_think in user or system turns, some thinking samples without a flag, and in
conversations of several turns the last flag decides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..sft import Messages, SFTConfig, flagged


def recipe(start: Path, data: Path, out: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(**({
        "start": start, "data": data, "out": out,
        "steps": 1000, "rows": 128, "lr": 7e-6, "schedule": "cosine", "warmup": 20,
        "max_tokens": 16_384, "tokens_per_pack": 32_768,
    } | changes))


def conversations(
    thinking: Sequence[Messages], direct: Sequence[Messages], seed: int, *, several: float = 0.2,
) -> list[list[dict[str, Any]]]:
    """Both kinds with flags, in random order; a share ``several`` behind another conversation of either kind."""
    rng = random.Random(seed)
    pool = [list(map(dict, c)) for c in (*thinking, *direct)]
    out = [flagged([*(rng.choice(pool) if rng.random() < several else ()), *c], rng) for c in pool]
    rng.shuffle(out)
    return out
