"""Sampling: per-request parameters, and a batched sampler whose draws depend on nothing but the request.

Noise is a counter-based hash of (seed, number of the token, token id), so a request draws the same whoever shares its
batch, on any device, and a token's noise does not move when filters or the order of ties change. Taking the argmax of
score + Gumbel noise is sampling from the softmax of the scores (Maddison et al. 2014, arXiv 1411.0030).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), constants as signed 64-bit.
_GOLDEN, _MUL_1, _MUL_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
# Candidates looked at beyond top_k, as tokens tied with the k-th are kept too; more ties than that cost a full sort.
_TIES = 32


def _number(name: str, value: Any, expected: str, right) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}; expected a number {expected}")
    if not (math.isfinite(value) and right(value)):
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    expected = f"an integer, {low} or more" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}; expected {expected}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def _tuple(name: str, value: Any) -> tuple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {value!r}; expected a sequence")
    return tuple(value)


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples and when it ends. Raises ValueError or TypeError naming the field, its value and range.

    Filters apply in transformers' order: penalties, temperature, top_k, top_p, min_p.

    Attributes:
        temperature: divides the logits; 0 is greedy, and then the filters do nothing.
        top_k: keep the k most likely tokens, and those tied with the k-th; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to top_p, and those tied with the last.
        min_p: keep the tokens at least min_p times as likely as the most likely one.
        presence_penalty: subtracted from the logits of tokens already generated (not of those in the prompt).
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or generated
            (Keskar et al. 2019, arXiv 1909.05858).
        seed: fixes the draws, whatever the batch; None takes a fresh one from torch's generator.
        max_tokens: most tokens to generate.
        stop_ids: generating one of these ends the request; None means the tokenizer's, else the model's, end tokens.
        stop: generating one of these strings ends the request; the text ends before it. Needs a tokenizer.
        logprobs: True reports each token's log-probability, an integer n also those of the n most likely tokens. They
            are of the model's own distribution: temperature 1, before penalties and filters.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop_ids: Sequence[int] | None = None
    stop: Sequence[str] | str = ()
    logprobs: bool | int = False

    def __post_init__(self):
        _number("temperature", self.temperature, "0 (greedy) or 1e-5 and more", lambda t: t == 0 or t >= 1e-5)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
        _number("min_p", self.min_p, "in [0, 1]", lambda p: 0 <= p <= 1)
        _number("presence_penalty", self.presence_penalty, "in [-2, 2]", lambda p: -2 <= p <= 2)
        _number("repetition_penalty", self.repetition_penalty, "over 0", lambda p: p > 0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**63 - 1)
        _integer("max_tokens", self.max_tokens, 1)
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _tuple("stop_ids", self.stop_ids))
            for token in self.stop_ids:
                _integer("stop_ids", token, 0)
        object.__setattr__(self, "stop", _tuple("stop", [self.stop] if isinstance(self.stop, str) else self.stop))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: got {text!r}; expected non-empty strings")
        if not isinstance(self.logprobs, bool):
            _integer("logprobs", self.logprobs, 1)

    @property
    def top_logprobs(self) -> int:
        """How many alternatives to report per token."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs


THINKING = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=32_768)
"""Qwen3's settings for thinking (Qwen3 Technical Report, section 4.6). Greedy decoding repeats endlessly there."""
NON_THINKING = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5, max_tokens=32_768)
"""Qwen3's settings without thinking (Qwen3 Technical Report, section 4.6)."""


class Sampler:
    """Draws the next token of every row of a batch, each by its own parameters.

    Args:
        params: one per row.
        prompts: ids of each row's prompt, which the repetition penalty counts.
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(
        self, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int,
        device: torch.device | str = "cpu",
    ):
        if len(params) != len(prompts):
            raise ValueError(f"params: got {len(params)} for {len(prompts)} prompts; expected one per prompt")
        for p in params:
            if p.top_logprobs > vocab_size:
                raise ValueError(f"logprobs: got {p.top_logprobs}; expected at most the vocabulary, {vocab_size}")
        self.params, self.vocab_size = list(params), vocab_size
        fresh = torch.randint(2**63 - 1, (len(params),)).tolist() if any(p.seed is None for p in params) else ()

        def column(dtype: torch.dtype, values: list) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self._rows = {  # [B, 1] each
            "seed": column(torch.int64, [fresh[i] if p.seed is None else p.seed for i, p in enumerate(params)]),
            "step": column(torch.int64, [0] * len(params)),
            "greedy": column(torch.bool, [p.temperature == 0 for p in params]),
            "temperature": column(torch.float32, [p.temperature or 1.0 for p in params]),
            "top_k": column(torch.int64, [_candidates(p, vocab_size) for p in params]),
            "top_p": column(torch.float32, [p.top_p for p in params]),
            "min_p": column(torch.float32, [p.min_p for p in params]),
            "presence": column(torch.float32, [p.presence_penalty for p in params]),
            "repetition": column(torch.float32, [p.repetition_penalty for p in params]),
        }
        if any(p.presence_penalty for p in params):
            self._rows["generated"] = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
        if any(p.repetition_penalty != 1 for p in params):
            self._rows["seen"] = torch.zeros(len(params), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in zip(self._rows["seen"], prompts):
                row[torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True
        self._plan()

    def _plan(self) -> None:
        """What the rows need as a whole, known without reading the device."""
        sampled = [p for p in self.params if p.temperature]
        self._all_greedy = not sampled
        self._any_logprobs = any(p.logprobs is not False for p in self.params)
        self._max_top = max((p.top_logprobs for p in self.params), default=0)
        self._width = None  # most likely tokens to order: none without top_k and top_p
        if any(p.top_k or p.top_p < 1 for p in sampled):
            bounded = all(p.top_k for p in sampled)
            widest = max(p.top_k for p in sampled) + _TIES if bounded else self.vocab_size
            self._width = min(widest, self.vocab_size)

    def sample(self, logits: Tensor) -> Tensor:
        """Next tokens, int64 [B], from logits [B, V] of any floating dtype. Follow with `accept`.
        Raises ValueError for a row whose largest logit is not finite."""
        scores = self._penalise(logits.float())
        peak, best = scores.max(-1, keepdim=True)
        if not bool(peak.isfinite().all()):
            row = int((~peak.isfinite()).nonzero()[0, 0])
            raise ValueError(f"logits: the largest of row {row} is {float(peak[row])}; expected finite logits")
        if self._all_greedy:
            return best[:, 0]
        r = self._rows
        scores = (scores - peak) / r["temperature"]
        scores, tokens = keep_likely(scores, r["top_k"], r["top_p"], r["min_p"], self._width)
        key = _hash(r["seed"], r["step"])
        drawn = (scores + gumbel(key, tokens)).argmax(-1, keepdim=True)
        return torch.where(r["greedy"], best, tokens.expand_as(scores).gather(1, drawn))[:, 0]

    def accept(self, ids: Tensor) -> None:
        """Records the tokens [B] that the rows continue with, those sampled or others in their place."""
        self._rows["step"] += 1
        for name in ("generated", "seen"):
            if name in self._rows:
                self._rows[name].scatter_(1, ids[:, None], True)

    def logprobs(self, logits: Tensor, ids: Tensor) -> list[tuple[float, list[tuple[int, float]]] | None]:
        """Per row: the log-probability of ids[row] and the (id, log-probability) of the most likely tokens, or None
        where not asked for. Of softmax(logits): temperature 1, no penalties, no filters."""
        if not self._any_logprobs:
            return [None] * len(self.params)
        logp = logits.float().log_softmax(-1)
        chosen = logp.gather(1, ids[:, None])[:, 0].tolist()
        top_logp, top_ids = (t.tolist() for t in logp.topk(self._max_top))
        return [
            None if p.logprobs is False else (chosen[b], list(zip(top_ids[b], top_logp[b]))[: p.top_logprobs])
            for b, p in enumerate(self.params)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves only the named rows, in that order."""
        self.params = [self.params[row] for row in rows]
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._rows["seed"].device)
        self._rows = {name: t.index_select(0, index) for name, t in self._rows.items()}
        self._plan()

    def _penalise(self, scores: Tensor) -> Tensor:
        r = self._rows
        if "seen" in r:
            penalised = torch.where(scores < 0, scores * r["repetition"], scores / r["repetition"])
            scores = torch.where(r["seen"], penalised, scores)
        if "generated" in r:
            scores = scores - r["presence"] * r["generated"]
        return scores


def keep_likely(
    scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int | None
) -> tuple[Tensor, Tensor]:
    """Filters scores [B, V] by top_k (int64, V keeps all), top_p and min_p, each [B, 1].

    Returns candidates' scores [B, W], -inf for the dropped, and their token ids [B or 1, W]. `width` bounds the
    candidates of every row: V with top_p alone, None when no row has top_k < V or top_p < 1. Every filter is a
    threshold on the score, so tied tokens stay or go together, whatever order they are found in.
    """
    vocab_size = scores.shape[-1]
    if width is None:
        tokens = torch.arange(vocab_size, device=scores.device)[None]
        floor = scores.amax(-1, keepdim=True) + min_p.log()
        return scores.masked_fill(scores < floor, -math.inf), tokens
    ordered, tokens = scores.sort(-1, descending=True) if width == vocab_size else scores.topk(width)
    kth = ordered.gather(1, top_k.clamp(max=width) - 1)
    if width < vocab_size and bool((ordered[:, -1:] == kth).any()):  # ties may reach beyond the candidates
        return keep_likely(scores, top_k, top_p, min_p, vocab_size)
    dropped = ordered < kth
    probs = ordered.masked_fill(dropped, -math.inf).softmax(-1)
    more_likely = probs.cumsum(-1) - probs
    nucleus = ((more_likely < top_p) | (top_p >= 1)).sum(-1, keepdim=True).clamp(min=1)
    floor = torch.maximum(ordered.gather(1, nucleus - 1), ordered[:, :1] + min_p.log())
    return ordered.masked_fill(dropped | (ordered < floor), -math.inf), tokens


def _candidates(p: SamplingParams, vocab_size: int) -> int:
    """top_k with V for none; 1 for greedy rows, so that they do not make the others sort the whole vocabulary."""
    return min(p.top_k or vocab_size, vocab_size) if p.temperature else 1


def gumbel(key: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of each token id [B or 1, W] under the int64 keys [B, 1]."""
    bits = (_hash(key, tokens) >> 12) & (2**52 - 1)
    uniform = (bits.double() + 0.5) * 2.0**-52  # exact, and never 0 or 1
    return -(-torch.log1p(-uniform)).log()  # log1p keeps the small values exact that decide about unlikely tokens


def _hash(key: Tensor, counter: Tensor) -> Tensor:
    """Output number `counter` of the splitmix64 generator with state `key`; int64 arithmetic wraps around."""
    x = key + (counter + 1) * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MUL_1
    x = (x ^ _shift(x, 27)) * _MUL_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)
