"""Which queries and which responses go into the cold start (Qwen3 technical report, section 4.1).

A query is kept if its answer can be checked and a model does not find it without thinking. A response to it is dropped
for (1) a wrong answer, (2) much repetition, (3) a guess instead of reasoning, (4) an answer that is not what the thinking
came to, (5) mixed languages, (6) likeness to a validation item. Where the report asks a large model, `judge` may; without
one the rules below decide, which are plain and miss subtle cases.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Judge = Callable[[str], bool]
"""Answers a yes/no question about a text."""

_PARTS = re.compile(r"(?:^|\s)\(?(?:[a-h]|i{1,3}|iv)\)\s|(?:^|\n)\s*(?:part\s+\w|\d+[.)])\s", re.IGNORECASE)
_ASKED = re.compile(  # of a part, else it only tells something, as a premise or a choice does
    r"\?|^\W*(?:calculate|compute|describe|determine|draw|evaluate|explain|express|factor|find|give|how|list|name|prove|show"
    r"|simplify|sketch|solve|state|what|when|where|which|who|why|write)\b",
    re.IGNORECASE,
)
_WRITING = re.compile(
    r"\b(?:write|compose|draft|tell me)\b.{0,40}\b(?:story|poem|essay|letter|email|blog|song|article|speech)\b",
    re.IGNORECASE,
)
_GUESS = re.compile(
    r"\b(?:i(?:'ll| will)? (?:just |simply )?guess|(?:just|random|wild|lucky) guess|pick (?:one )?at random"
    r"|no idea|not sure, so)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")


@dataclass(frozen=True)
class Candidate:
    """A response to a query. ``correct``: its verifier's word."""

    query: str
    thinking: str
    answer: str
    correct: bool


@dataclass
class Funnel:
    """How many were kept and why the others were not."""

    counts: Counter = field(default_factory=Counter)

    def __call__(self, reason: str | None) -> bool:
        self.counts[reason or "kept"] += 1
        return reason is None


def query_reason(
    query: str, *, answers_directly: Callable[[str], bool] | None = None, judge: Judge | None = None
) -> str | None:
    """Why a query is dropped, or None. ``answers_directly``: whether a model gets it right without thinking."""
    if sum(bool(_ASKED.search(part)) for part in _PARTS.split(query)[1:]) >= 2 or query.count("?") >= 3:
        return "several parts"
    if _WRITING.search(query) or (judge is not None and not judge(f"Can one short answer to this be checked?\n\n{query}")):
        return "not verifiable"
    if answers_directly is not None and answers_directly(query):
        return "needs no thinking"
    return None


def response_reason(
    candidate: Candidate, validation: Validation | None = None, *, min_thinking: int = 8, judge: Judge | None = None,
) -> str | None:
    """Why a response is dropped, or None. ``min_thinking``: characters of thinking below which an answer is a guess."""
    thinking, answer = candidate.thinking, candidate.answer
    if not candidate.correct:
        return "wrong answer"
    if repetition(thinking) > 0.5 or repetition(answer) > 0.5:
        return "repetition"
    if len(thinking.strip()) < min_thinking or _GUESS.search(thinking):
        return "guesswork"
    if not consistent(thinking, answer) or (
        judge is not None and not judge(f"Does the reasoning lead to the answer?\n\n{thinking}\n\nAnswer: {answer}")
    ):
        return "inconsistent"
    if mixes_languages(f"{thinking}\n{answer}", candidate.query):
        return "language mixing"
    if validation is not None and validation.likeness(candidate.query) > validation.limit:
        return "near a validation item"
    return None


def repetition(text: str, n: int = 6) -> float:
    """Share of a text's n-grams of words that came before in it; for a text of few words and many characters the
    share that compression removes beyond that of usual prose. 0 for short texts."""
    words = text.split()
    if len(words) >= 4 * n:
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return 1 - len(set(grams)) / len(grams)
    raw = text.encode()
    if len(raw) < 200:
        return 0.0
    return max(0.0, 1 - len(zlib.compress(raw, 9)) / len(raw) / 0.3)


def consistent(thinking: str, answer: str) -> bool:
    """Whether the last number of the answer is one of the last three of the thinking, of a fraction both parts among the last
    four; for an answer without numbers, whether it has a word of five letters or more in common with the thinking. Short
    answers pass."""
    numbers = _numbers(answer)
    if numbers:
        reached, last = [part for n in _numbers(thinking) for part in n.split("/")], numbers[-1].split("/")
        return not reached or set(last) <= set(reached[-2 - len(last) :])
    words = set(re.findall(r"\w{5,}", answer.lower()))
    return not words or bool(words & set(re.findall(r"\w{5,}", thinking.lower())))


def _numbers(text: str) -> list[str]:
    """With a sign that stands apart from its number ("2 - 5i"), and fractions of LaTeX as a/b."""
    return _NUMBER.findall(_FRACTION.sub(r"\1/\2", text).replace("- ", "-"))


def scripts(text: str) -> Counter:
    """Letters per script ("LATIN", "CJK", "CYRILLIC", ...)."""
    found = Counter(unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha())
    for kana in ("HIRAGANA", "KATAKANA"):  # Japanese writes three scripts
        if found["CJK"] and found[kana]:
            found["CJK"] += found.pop(kana)
    found.pop("GREEK", None)  # of formulas
    return found


def mixes_languages(text: str, query: str, share: float = 0.02) -> bool:
    """Whether over ``share`` of the letters are in a script that the query does not use. Languages of one script are not
    told apart."""
    found, known = scripts(text), scripts(query)
    total = sum(found.values())
    foreign = sum(n for script, n in found.items() if script not in known)
    return bool(known) and foreign > max(share * total, 1)


class Validation:
    """Held-out queries, to keep training data away from. ``limit``: likeness above which a query is too near."""

    def __init__(self, queries: Iterable[str], limit: float = 0.6, n: int = 5):
        self.limit, self._n = limit, n
        self._shingles = [self._of(q) for q in queries]
        self._index: dict[str, list[int]] = {}
        for i, shingles in enumerate(self._shingles):
            for s in shingles:
                self._index.setdefault(s, []).append(i)

    def _of(self, text: str) -> set[str]:
        text = re.sub(r"\W+", " ", text.lower()).strip() if re.search(r"\w{2,} \w", text) else re.sub(r"\s+", "", text)
        return {text[i : i + self._n] for i in range(max(1, len(text) - self._n + 1))}

    def likeness(self, query: str) -> float:
        """The largest Jaccard index of the character n-grams of ``query`` and of a validation item."""
        own = self._of(query)
        shared = Counter(i for s in own for i in self._index.get(s, ()))
        return max((n / (len(own) + len(self._shingles[i]) - n) for i, n in shared.items()), default=0.0)


class Contents(Validation):
    """Held-out problems of one template, which are all alike by `Validation`. Compared are words, numbers and signs, in any
    order, without those that over half of the problems have: the same problem with its terms in another order, or put
    otherwise, is near; another one is not. Opposites such as 2 - 1 and 1 - 2 count as near, too."""

    def __init__(self, queries: Iterable[str], limit: float = 0.9):
        queries, self._template = [*queries], frozenset()
        counts = Counter(w for q in queries for w in self._of(q))
        self._template = frozenset(w for w, n in counts.items() if n > len(queries) / 2)
        super().__init__(queries, limit)

    def _of(self, text: str) -> set[tuple[str, int]]:
        words = Counter(re.findall(r"\w+|[^\w\s]", text.lower()))
        return {(w, i) for w, n in words.items() for i in range(n)} - self._template


def cold_start(
    candidates: Sequence[Candidate], validation: Validation | None = None, *, per_query: int = 1, **options: object
) -> tuple[list[Candidate], Counter]:
    """The responses kept, at most ``per_query`` of each query (the shortest thinking first), and the counts of reasons."""
    funnel, kept = Funnel(), []
    good = [c for c in candidates if funnel(response_reason(c, validation, **options))]
    taken: Counter = Counter()
    for c in sorted(good, key=lambda c: len(c.thinking)):
        taken[c.query] += 1
        if taken[c.query] <= per_query:
            kept.append(c)
    return kept, funnel.counts
