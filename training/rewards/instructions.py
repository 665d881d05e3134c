"""Instructions whose observance a rule can check, composed to prompts; level is how many at once, less one.

Every constraint has a checker, and a sampler of its arguments that also says it in words. The reward is the share of the
constraints that hold, 0 if the reply is empty.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import Problem, Reply, SingleTurn, rng_of

TOPICS = (
    "the tides", "a day in autumn", "how bread is made", "why leaves change colour", "a small harbour town", "the moon",
    "learning to swim", "the history of paper", "bees", "a train journey", "winter in the mountains", "clocks",
    "how rivers form", "keeping a garden", "libraries", "volcanoes", "the smell of rain", "chess", "bridges", "lighthouses",
)
WORDS = (
    "river", "candle", "window", "mountain", "bridge", "silver", "garden", "winter", "letter", "forest", "island", "copper",
    "lantern", "meadow", "harbour", "thunder",
)


@dataclass(frozen=True)
class Constraint:
    """``sample(rng)`` gives (arguments, text); ``check(reply, **arguments)`` says whether a reply keeps it."""

    sample: Callable[[random.Random], tuple[dict[str, Any], str]]
    check: Callable[..., bool]
    excludes: frozenset[str] = frozenset()  # constraints that cannot hold beside it


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text.strip()) if p.strip()]


def bullets(text: str) -> list[str]:
    return re.findall(r"^[*-] +\S.*$", text, re.MULTILINE)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _number(name: str, low: int, high: int, text: str) -> Callable[[random.Random], tuple[dict[str, Any], str]]:
    def sample(rng: random.Random) -> tuple[dict[str, Any], str]:
        n = rng.randint(low, high)
        return {name: n}, text.format(n)

    return sample


def _word(text: str) -> Callable[[random.Random], tuple[dict[str, Any], str]]:
    def sample(rng: random.Random) -> tuple[dict[str, Any], str]:
        word = rng.choice(WORDS)
        return {"word": word}, text.format(word)

    return sample


def _fixed(text: str) -> Callable[[random.Random], tuple[dict[str, Any], str]]:
    return lambda rng: ({}, text)


def _word_times(rng: random.Random) -> tuple[dict[str, Any], str]:
    word, n = rng.choice(WORDS), rng.randint(2, 4)
    return {"word": word, "n": n}, f'Use the word "{word}" exactly {n} times.'


def _letter(rng: random.Random) -> tuple[dict[str, Any], str]:
    letter = rng.choice("jkqvwxyz")
    return {"letter": letter}, f'Do not use the letter "{letter}".'


def _phrase(rng: random.Random) -> tuple[dict[str, Any], str]:
    phrase = rng.choice(("That is all.", "Thank you for reading.", "Here my answer ends."))
    return {"phrase": phrase}, f'End with exactly this sentence: "{phrase}"'


def _count(text: str, word: str) -> int:
    return sum(w.lower() == word for w in words(text))


def _keys(rng: random.Random) -> tuple[dict[str, Any], str]:
    keys = sorted(rng.sample(("title", "summary", "year", "place", "author"), 2))
    return {"keys": keys}, f'Reply with a JSON object that has exactly the keys "{keys[0]}" and "{keys[1]}".'


_WHOLE = frozenset({
    "json_keys", "json_object", "all_caps", "all_lowercase", "quoted", "code_block", "numbered_list", "bullets",
})
_CASE = frozenset({"all_caps", "all_lowercase", "first_word", "title_line", "capital_words", "end_phrase", "section"})
_JSON = _WHOLE | frozenset({
    "paragraphs", "section", "title_line", "end_phrase", "first_word", "postscript", "capital_words", "bold", "separator",
    "sentence_count", "question_end", "no_commas", "placeholder", "min_words", "max_words",
})

CONSTRAINTS: Mapping[str, Constraint] = {
    "min_words": Constraint(_number("n", 20, 80, "Write at least {} words."), lambda t, n: len(words(t)) >= n,
                            frozenset({"max_words", "json_keys", "json_object"})),
    "max_words": Constraint(_number("n", 20, 60, "Write at most {} words."), lambda t, n: len(words(t)) <= n,
                            frozenset({"min_words", "json_keys", "json_object"})),
    "sentence_count": Constraint(_number("n", 2, 5, "Write exactly {} sentences."), lambda t, n: len(sentences(t)) == n,
                                 _WHOLE | {"paragraphs", "title_line", "postscript", "section", "separator"}),
    "paragraphs": Constraint(_number("n", 2, 4, "Write exactly {} paragraphs, with an empty line between them."),
                             lambda t, n: len(paragraphs(t)) == n, _WHOLE | {"title_line", "postscript", "sentence_count",
                                                                             "separator", "section"}),
    "bullets": Constraint(_number("n", 2, 5, 'Give exactly {} bullet points, each a line that starts with "- ".'),
                          lambda t, n: len(bullets(t)) == n, _WHOLE | {"paragraphs", "sentence_count"}),
    "numbered_list": Constraint(
        _number("n", 2, 5, 'Give a list of exactly {} items, numbered "1.", "2." and so on, each on its own line.'),
        lambda t, n: re.findall(r"^(\d+)\. +\S", t, re.MULTILINE) == [str(i) for i in range(1, n + 1)],
        _WHOLE | {"paragraphs", "sentence_count"},
    ),
    "include_word": Constraint(_word('Use the word "{}".'), lambda t, word: _count(t, word) >= 1),
    "exclude_word": Constraint(_word('Do not use the word "{}".'), lambda t, word: _count(t, word) == 0),
    "word_times": Constraint(_word_times, lambda t, word, n: _count(t, word) == n),
    "exclude_letter": Constraint(_letter, lambda t, letter: letter not in t.lower(), frozenset({
        "include_word", "word_times", "first_word", "end_phrase", "section", "json_keys", "title_line", "postscript"})),
    "all_lowercase": Constraint(_fixed("Write in lower case only."), lambda t: t == t.lower() and t != t.upper(),
                                _CASE | _JSON),
    "all_caps": Constraint(_fixed("Write in capital letters only."), lambda t: t == t.upper() and t != t.lower(),
                           _CASE | _JSON),
    "no_commas": Constraint(_fixed("Do not use any commas."), lambda t: "," not in t, frozenset({"json_keys"})),
    "question_end": Constraint(_fixed("End with a question."), lambda t: t.rstrip().endswith("?"), _WHOLE | {
        "end_phrase", "postscript"}),
    "first_word": Constraint(_word('Start with the word "{}".'), lambda t, word: [w.lower() for w in words(t)[:1]] == [word],
                             _CASE | _WHOLE),
    "end_phrase": Constraint(_phrase, lambda t, phrase: t.rstrip().endswith(phrase),
                             _CASE | _WHOLE | {"postscript", "question_end"}),
    "title_line": Constraint(_fixed("Put a title in double angle brackets on the first line, like <<title>>."),
                             lambda t: re.match(r"<<[^<>\n]+>>\s*\n", t.lstrip()) is not None,
                             _CASE | _WHOLE | {"paragraphs", "sentence_count"}),
    "quoted": Constraint(_fixed("Put your whole reply in double quotation marks."),
                         lambda t: len(t.strip()) > 2 and t.strip()[0] == '"' == t.strip()[-1], _WHOLE | {
                             "end_phrase", "first_word", "title_line", "postscript", "question_end", "section"}),
    "json_object": Constraint(_fixed("Reply with a JSON object and nothing else."), _is_json, _JSON | _CASE),
    "json_keys": Constraint(_keys, lambda t, keys: _is_json(t) and sorted(json.loads(t)) == keys, _JSON | _CASE),
    "section": Constraint(
        _number("n", 2, 3, 'Write {} sections that begin with the lines "SECTION 1", "SECTION 2" and so on.'),
        lambda t, n: re.findall(r"^SECTION (\d+)\s*$", t, re.MULTILINE) == [str(i) for i in range(1, n + 1)],
        _WHOLE | _CASE | {"paragraphs", "sentence_count"},
    ),
    "postscript": Constraint(_fixed('Add a postscript as the last line, which starts with "P.S."'),
                             lambda t: t.strip().split("\n")[-1].startswith("P.S.") and len(t.strip().split("\n")) > 1,
                             _WHOLE | {"paragraphs", "sentence_count", "question_end", "end_phrase"}),
    "capital_words": Constraint(_number("n", 2, 5, "Write at least {} words in capital letters."),
                                lambda t, n: sum(len(w) > 1 and w.isupper() for w in words(t)) >= n, _CASE | _WHOLE),
    "bold": Constraint(_number("n", 1, 3, "Set exactly {} parts in **bold**."),
                       lambda t, n: len(re.findall(r"\*\*[^*\n]+\*\*", t)) == n, frozenset({"json_object", "json_keys"})),
    "separator": Constraint(_fixed('Divide the reply in two parts by a line of exactly "***".'),
                            lambda t: len([p for p in re.split(r"^\*\*\*\s*$", t, flags=re.MULTILINE) if p.strip()]) == 2,
                            _WHOLE | {"paragraphs", "sentence_count"}),
    "placeholder": Constraint(_number("n", 1, 3, "Use at least {} placeholders in square brackets, such as [name]."),
                              lambda t, n: len(re.findall(r"\[[^\[\]\n]+\]", t)) >= n, frozenset({"json_object", "json_keys"})),
    "code_block": Constraint(_fixed("Put the whole reply in one Markdown code block."),
                             lambda t: re.fullmatch(r"```[^\n`]*\n(?:(?!```).)+\n```", t.strip(), re.DOTALL) is not None,
                             _WHOLE | {"end_phrase", "first_word", "title_line", "postscript", "question_end", "section"}),
}


class Instructions(SingleTurn):
    """A topic to write about, and 1 + level constraints that do not exclude each other."""

    max_level = 3

    def __init__(self, thinking: bool = True):
        self.name, self._thinking = "instructions" if thinking else "instructions/no_think", thinking

    def problem(self, seed: int, level: int) -> Problem:
        rng = rng_of("instructions", seed, level)
        chosen: list[str] = []
        for name in rng.sample(sorted(CONSTRAINTS), len(CONSTRAINTS)):
            apart = all(name not in CONSTRAINTS[c].excludes and c not in CONSTRAINTS[name].excludes for c in chosen)
            if apart and not _same_word(name, chosen):
                chosen.append(name)
            if len(chosen) == 1 + level:
                break
        drawn = [(name, *CONSTRAINTS[name].sample(rng)) for name in chosen]
        text = f"Write about {rng.choice(TOPICS)}. " + " ".join(said for _, _, said in drawn)
        data = {"constraints": [[name, arguments] for name, arguments, _ in drawn]}
        message = {"role": "user", "content": text if self._thinking else f"{text} /no_think"}
        return Problem(self.name, (message,), data, level, thinking=self._thinking)

    def score(self, problem: Problem, reply: Reply) -> float:
        kept = followed(reply.content, problem.data["constraints"])
        return sum(kept) / len(kept)


def _same_word(name: str, chosen: list[str]) -> bool:
    """Two constraints about words could draw the same one and contradict each other."""
    about = {"include_word", "exclude_word", "word_times", "first_word"}
    return name in about and bool(about & set(chosen))


def followed(text: str, constraints: list[list[Any]]) -> list[bool]:
    """Which of the (name, arguments) a reply keeps; an empty one keeps none."""
    return [bool(text.strip()) and CONSTRAINTS[name].check(text, **arguments) for name, arguments in constraints]
