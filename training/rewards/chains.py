"""Chains of sums modulo 10, for models of a few hundred thousand parameters: each step is easy, the whole is not."""

from __future__ import annotations

import re
import string

from . import Problem, Reply, SingleTurn, rng_of


class Chain(SingleTurn):
    """``e3f+2g-1`` is 3 + 2 - 1: a digit and steps of 1 to 3, each behind a letter, the letters in order from a random one
    on. Level l has l + 2 numbers. The thinking that solves it looks up every term by its letter and writes the whole sum down,
    ``f3+2=5g5-1=4``: six tokens per step. The letters are there because a tiny model finds a term by what comes before it
    long before it learns to count places, the sums are whole because it learns them from where they stand alone, and the
    steps are small because sums of any two digits modulo 10, of which neither says anything alone, took it too long.
    """

    max_level = 10

    def __init__(self, flag: str = ""):
        """flag: "", "/think" or "/no_think", written behind the chain."""
        self.name, self._flag = f"chain{flag}", flag

    def problem(self, seed: int, level: int) -> Problem:
        rng = rng_of("chain", seed, level)
        value, first = rng.randrange(10), rng.randrange(26 - level - 1)
        text = f"{string.ascii_lowercase[first]}{value}"
        for letter in string.ascii_lowercase[first + 1 : first + level + 2]:
            sign, digit = rng.choice("+-"), rng.randint(1, 3)
            value = (value + digit if sign == "+" else value - digit) % 10
            text += f"{letter}{sign}{digit}"
        message = {"role": "user", "content": f"{text} {self._flag}".strip()}
        data = {"chain": text, "answer": str(value)}
        return Problem(self.name, (message,), data, level, thinking=self._flag != "/no_think")

    def score(self, problem: Problem, reply: Reply) -> float:
        return float(reply.content.strip() == problem.data["answer"])


def worked(chain: str) -> str:
    """The thinking that solves a chain."""
    value, out = int(chain[1]), ""
    for letter, sign, digit in re.findall(r"([a-z])([+-])(\d)", chain):
        before, value = value, (value + int(digit) if sign == "+" else value - int(digit)) % 10
        out += f"{letter}{before}{sign}{digit}={value}"
    return out
