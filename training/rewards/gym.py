"""Task families of reasoning-gym: procedural problems with its own scorers and curricula (extra "rl")."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from . import Problem, Reply, SingleTurn
from .scorers import NEEDS
from .workers import Pool

# Those with short prompts and answers, a canonical answer, and under 10 ms to make a problem of any level up to MAX_LEVEL.
# coin_flip has too few problems to hold any out (`rewards.reserved`); number_sequence looks for some without an end.
NAMES = (
    "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum",
    "complex_arithmetic", "count_bits", "count_primes", "decimal_arithmetic", "dice", "family_relationships",
    "fraction_simplification", "gcd", "knights_knaves", "lcm", "leg_counting", "letter_counting", "polynomial_equations",
    "prime_factorization", "products", "simple_equations", "simple_geometry", "spell_backward",
    "syllogism", "time_intervals", "word_sorting",
)
MAX_LEVEL = 2
SEEDS = 2**31
SCORER = "training.rewards.scorers:gym"


class Gym(SingleTurn):
    """One data set of reasoning-gym; its level raises all attributes of its curriculum together."""

    max_level = MAX_LEVEL

    def __init__(self, name: str, pool: Pool):
        if name not in NAMES:
            raise ValueError(f"family is {name!r}; expected one of {NAMES}")
        self.name, self._gym, self._pool = f"gym/{name}", name, pool

    def problem(self, seed: int, level: int) -> Problem:
        entry = _dataset(self._gym, level)[seed % SEEDS]
        text = entry["question"].strip() + "\nGive only the answer after thinking."
        data = {k: entry[k] for k in ("question", "answer", "metadata")}
        return Problem(self.name, ({"role": "user", "content": text},), json.loads(json.dumps(data)), level)

    def scores(self, pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        calls = [(self._gym, reply.content.strip(), dict(problem.data)) for problem, reply in pairs]
        return [_unit(result.value) for result in self._pool.map(SCORER, calls)]


@cache
def _dataset(name: str, level: int) -> Any:
    """All problems of a level: each is made when it is asked for, from a seed that is its index."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import create_curriculum
    except ImportError as e:
        raise ImportError(NEEDS.format("reasoning-gym")) from e
    curriculum = create_curriculum(name)
    for _ in range(level):
        curriculum.increment_global_level()
    config = vars(curriculum.generate_configuration()) | {"seed": 0, "size": SEEDS}
    return reasoning_gym.create_dataset(name, **config)


def _unit(value: Any) -> float:
    """Partial credit of 0.01 to 0.1 that some scorers give for anything at all is none."""
    return 0.0 if value is None or value < 0.2 else min(float(value), 1.0)
