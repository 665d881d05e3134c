"""Problems with a formula as answer, verified by math-verify in killable workers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from . import Problem, Reply, SingleTurn, rng_of
from .workers import Pool

SCORER = "training.rewards.scorers:math"
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's for mathematics


class Maths(SingleTurn):
    """Queries with reference answers given as (query, reference); level is not theirs, so it is ignored."""

    name = "maths"

    def __init__(self, items: Sequence[tuple[str, str]], pool: Pool):
        if not items:
            raise ValueError("items is empty; expected pairs of query and reference")
        self._items, self._pool = list(items), pool

    def problem(self, seed: int, level: int) -> Problem:
        query, reference = self._items[seed % len(self._items)]
        message = {"role": "user", "content": f"{query}\n{INSTRUCTION}"}
        return Problem(self.name, (message,), {"reference": reference}, level)

    def scores(self, pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        results = self._pool.map(SCORER, [(reply.content, problem.data["reference"]) for problem, reply in pairs])
        return [result.value or 0.0 for result in results]


class LinearEquation(Maths):
    """a x + b = c with a fractional answer: for runs without a data set."""

    name, max_level = "linear_equation", 3

    def __init__(self, pool: Pool):
        self._pool = pool

    def problem(self, seed: int, level: int) -> Problem:
        rng, top = rng_of(self.name, seed, level), 10 ** (level + 1)
        a, b, c = rng.randint(2, top), rng.randint(-top, top), rng.randint(-top, top)
        x = Fraction(c - b, a)
        query = f"Solve for x: {a}x {'+' if b >= 0 else '-'} {abs(b)} = {c}"
        reference = str(x.numerator) if x.denominator == 1 else f"\\frac{{{x.numerator}}}{{{x.denominator}}}"
        message = {"role": "user", "content": f"{query}\n{INSTRUCTION}"}
        return Problem(self.name, (message,), {"reference": reference}, level)
