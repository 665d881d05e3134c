"""Probes of long context: a needle in a haystack, and many shots of a made-up task.

Small models answer neither right, so beside the accuracy each tells how much the context lowers the loss of the answer,
in nats per token: 0 is a model that does not use its context at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer

NAMES = "amber birch cedar delta ember flint grove heron islet jetty kelp larch maple north olive pearl quartz raven".split()


@dataclass(frozen=True)
class Found:
    """Means over the trials of a place. ``gain``: nats per token that the context saves on the answer."""

    accuracy: float
    gain: float


@torch.no_grad()
def answer_loss(model: Qwen3, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
    """(nats per token of the answer behind the context, whether each of its tokens is the likeliest)"""
    device = model.head_weight.device
    tokens = torch.tensor([[*context, *answer]], device=device)
    hidden = model(tokens, return_hidden=True)[0, len(context) - 1 : -1]  # the head on these alone: a row can be long
    logits, wanted = model.head(hidden).float(), tokens[0, len(context) :]
    return F.cross_entropy(logits, wanted).item(), bool((logits.argmax(-1) == wanted).all())


def needle(
    model: Qwen3, tokenizer: Tokenizer, haystack: Sequence[int], *, lengths: Sequence[int], depths: Sequence[float],
    trials: int = 4, seed: int = 0,
) -> dict[tuple[int, float], Found]:
    """{(length, depth): found}: a number said once at ``depth`` (0: the start) of ``length`` tokens, and asked at the end.
    ``gain`` is against the same text with another number in that place.

    Raises ValueError when the haystack is too short.
    """
    if len(haystack) < max(lengths):
        raise ValueError(f"haystack has {len(haystack)} tokens; expected at least the longest length, {max(lengths)}")
    end, result = tokenizer.token_id("<|endoftext|>"), {}
    for length in lengths:
        for depth in depths:
            losses, right = [], []
            for trial in range(trials):
                rng = random.Random(f"{seed} {length} {depth} {trial}")
                name, (number, other) = rng.choice(NAMES), (str(rng.randrange(10_000, 100_000)) for _ in range(2))
                query, answer = tokenizer.encode(f"\nThe pass number of {name} is"), tokenizer.encode(f" {number}")
                start = rng.randrange(len(haystack) - length + 1)
                for said in (number, other):
                    fact = tokenizer.encode(f"\nThe pass number of {name} is {said}.\n")
                    room = length - len(fact) - len(query) - len(answer) - 1
                    if room < 1:
                        raise ValueError(f"length {length} is too short for the needle; expected at least {length - room + 1}")
                    hay, cut = list(haystack[start : start + room]), round(depth * room)
                    loss, ok = answer_loss(model, [end, *hay[:cut], *fact, *hay[cut:], *query], answer)
                    losses.append(loss)
                    right.append(ok)
            result[length, depth] = Found(float(np.mean(right[::2])), float(np.mean(losses[1::2]) - np.mean(losses[::2])))
    return result


def many_shot(
    model: Qwen3, tokenizer: Tokenizer, *, shots: Sequence[int], pairs: int = 8, trials: int = 4, seed: int = 0
) -> dict[int, Found]:
    """{shots: found}: ``pairs`` made-up words each stand for a number; after so many lines "word = number", drawn at
    random, one of the words that were shown is asked. ``gain`` is against the same lines with other numbers, so it is not
    for having seen the form."""
    end, result = tokenizer.token_id("<|endoftext|>"), {}
    for count in shots:
        losses, right, other = [], [], []
        for trial in range(trials):
            rng = random.Random(f"{seed} {trial}")  # the same task for every number of shots
            words = ["".join(rng.choices("bdfgklmnprstvz", k=2)) + str(i) for i in range(pairs)]
            meaning, wrong = ({w: str(rng.randrange(100, 1000)) for w in words} for _ in range(2))
            lines = [rng.choice(words) for _ in range(max(shots))][:count]
            asked = rng.choice(lines or words)
            answer = tokenizer.encode(f" {meaning[asked]}")
            for told, kept in ((meaning, losses), (wrong, other)):
                context = "".join(f"{w} = {told[w]}\n" for w in lines)
                loss, ok = answer_loss(model, [end, *tokenizer.encode(f"{context}{asked} =")], answer)
                kept.append(loss)
                right += [ok] if told is meaning else []
        result[count] = Found(float(np.mean(right)), float(np.mean(other) - np.mean(losses)))
    return result
