"""Answers from given passages (retrieval-augmented): right, cited, and silent about what is not there."""

from __future__ import annotations

import re

from . import Problem, Reply, SingleTurn, rng_of

NAMES = ("Arden", "Belmar", "Corvo", "Dunmore", "Elsin", "Farrow", "Galten", "Hollis", "Irel", "Jorvik", "Kelda", "Lorne")
RIVERS, TRADES = ("Ouse", "Tarn", "Leve", "Mira", "Sorn"), ("glass", "salt", "wool", "paper", "bells")
FACTS = {
    "founded": ("was founded in {}", "In which year was {} founded?", lambda rng: str(rng.randint(1100, 1900))),
    "bridges": ("has {} bridges", "How many bridges does {} have?", lambda rng: str(rng.randint(2, 60))),
    "river": ("lies on the river {}", "On which river does {} lie?", lambda rng: rng.choice(RIVERS)),
    "trade": ("is known for its {}", "What is {} known for?", lambda rng: rng.choice(TRADES)),
}
UNKNOWN = "not in the passages"


class Grounding(SingleTurn):
    """Passages about made-up towns, so that nothing can be known beforehand; one in four questions has no answer there.

    1 for the right fact with the number of its passage alone as [n]; half of it for the right fact without; for a question
    without an answer, 1 for saying so and nothing else cited. A right fact beside another town's is worth nothing.
    """

    name, max_level = "grounding", 3

    def problem(self, seed: int, level: int) -> Problem:
        rng = rng_of(self.name, seed, level)
        towns = rng.sample(NAMES, 2 + 2 * level)
        known = {town: rng.sample(sorted(FACTS), 2) for town in towns}
        values = {town: {fact: FACTS[fact][2](rng) for fact in known[town]} for town in towns}
        passages = [
            f"[{i}] {town} " + " and ".join(FACTS[fact][0].format(values[town][fact]) for fact in known[town]) + "."
            for i, town in enumerate(towns, 1)
        ]
        town = rng.choice(towns)
        if rng.random() < 0.25:
            fact, answer, others = rng.choice([f for f in sorted(FACTS) if f not in known[town]]), None, []
        else:
            fact = rng.choice(known[town])
            answer = values[town][fact]
            others = [v[fact] for t, v in values.items() if t != town and fact in v and v[fact] != answer]
        text = (
            "Answer from the passages alone, in one sentence, and cite the passage as [n]. If they do not say, answer: "
            f"{UNKNOWN}.\n\n" + "\n".join(passages) + f"\n\n{FACTS[fact][1].format(town)}"
        )
        data = {"answer": answer, "passage": towns.index(town) + 1, "others": others}
        return Problem(self.name, ({"role": "user", "content": text},), data, level)

    def score(self, problem: Problem, reply: Reply) -> float:
        text, data = reply.content, problem.data
        cited = [int(n) for n in re.findall(r"\[(\d+)\]", text)]
        plain = re.sub(r"\[\d+\]", " ", text).lower()
        if data["answer"] is None:
            return float(UNKNOWN in plain and not cited)
        said = set(re.findall(r"\w+", plain))
        if data["answer"].lower() not in said or UNKNOWN in plain or said & {o.lower() for o in data["others"]}:
            return 0.0
        return 1.0 if set(cited) == {data["passage"]} else 0.5
