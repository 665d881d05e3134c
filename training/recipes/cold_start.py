"""Stage 1, long-CoT cold start (Qwen3 technical report, section 4.1): few samples, few steps, patterns rather than skill.

Queries whose answer can be checked, N candidate responses for each from a strong model, filters, a small fine-tuning.
What is left wrong is left to reinforcement learning, so the recipe stops early on purpose.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..filters import Candidate, Validation, cold_start, query_reason
from ..rewards import Problem
from ..rewards.chains import worked
from ..sft import SFTConfig


def recipe(start: Path, data: Path, out: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(**({
        "start": start, "data": data, "out": out,
        "steps": 150, "rows": 32,  # about 5K conversations
        "lr": 1e-5, "schedule": "cosine", "warmup": 10,
        "max_tokens": 16_384, "tokens_per_pack": 32_768,
    } | changes))


def conversations(
    candidates: Sequence[Candidate], validation: Validation, *, answers_directly: Callable[[str], bool] | None = None,
    **options: Any,
) -> tuple[list[list[dict[str, Any]]], Counter]:
    """What passes the filters, as conversations, and the counts of reasons. ``answers_directly`` as `filters.query_reason`,
    ``options`` as `filters.response_reason`."""
    queries = {c.query: query_reason(c.query, answers_directly=answers_directly) for c in candidates}
    kept, counts = cold_start([c for c in candidates if queries[c.query] is None], validation, **options)
    counts.update(f"query: {reason}" for reason in queries.values() if reason)
    return [
        [{"role": "user", "content": c.query}, {"role": "assistant", "reasoning_content": c.thinking, "content": c.answer}]
        for c in kept
    ], counts


def chain_candidates(problems: Sequence[Problem], seed: int, each: int = 3) -> list[Candidate]:
    """In place of a strong model, a solver of chains that errs in the ways the filters are for: half of its responses are
    right, the others wrong, repetitive, guessed, inconsistent or in two languages."""
    rng, out = random.Random(seed), []
    for p in problems:
        query, answer, thinking = p.messages[-1]["content"], p.data["answer"], worked(p.data["chain"])
        for _ in range(each):
            kind = rng.choice(("right",) * 5 + ("wrong", "repetitive", "guess", "inconsistent", "mixed"))
            said, reply = thinking, answer
            if kind == "wrong":
                reply = str((int(answer) + rng.randint(1, 9)) % 10)
            elif kind == "repetitive":
                said = thinking * (1 + 400 // len(thinking))
            elif kind == "guess":
                said = "?"
            elif kind == "inconsistent":
                said = thinking[:-1] + str((int(answer) + rng.randint(1, 9)) % 10)
            elif kind == "mixed":
                said = thinking + "所以答案"
            out.append(Candidate(query, said, reply, reply == answer))
    return out
