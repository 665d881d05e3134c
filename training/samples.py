"""Samples of tokens with a weight per token, and their packing: all that the trainer knows about an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qwen3_model.model import Qwen3


@dataclass(frozen=True)
class Sample:
    """One sequence to train on.

    Attributes:
        tokens: [n] ids, n >= 2.
        weights: [n] factor of the loss of predicting each token from those before it; 0 leaves it out (prompts, forced
            tokens, tool results). The first must be 0. The trainer sums weight times loss and divides by nothing, so
            every normalisation lies in the weights.
        advantages: [n] for policy gradients.
        logprobs: [n] log-probabilities as recorded when the tokens were drawn; 0 for those that were not.
        experts: integers [n - 1, MoE layers, K], the experts of each input token as routed when it was drawn, to be
            replayed (`Qwen3.forward`, ``expert_ids``); None routes afresh.

    Raises ValueError for fewer than two tokens, lengths that differ, or a weight on the first token.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    advantages: Sequence[float] | None = None
    logprobs: Sequence[float] | None = None
    experts: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n < 2:
            raise ValueError(f"tokens has {n} entries; expected at least 2")
        for name in ("weights", "advantages", "logprobs"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} has {len(value)} entries; expected {n}, one per token")
        if self.weights[0] != 0:
            raise ValueError(f"weights[0] is {self.weights[0]}; expected 0, as nothing comes before the first token")
        if self.experts is not None and len(self.experts) != n - 1:
            raise ValueError(f"experts has {len(self.experts)} entries; expected {n - 1}, one per input token")

    @property
    def trained(self) -> int:
        """Number of tokens with a weight."""
        return sum(w != 0 for w in self.weights)


@dataclass(frozen=True)
class Packed:
    """Samples end to end, without padding; attention and positions restart at each (`cu_seqlens`).

    tokens: int64 [N] inputs; cu_seqlens: int32 [samples + 1]; where: int64 [K], the inputs whose next token is trained;
    targets: int64 [K], those next tokens; weights, advantages, logprobs: float32 [K] as in Sample; lengths: int64
    [samples], how many of the K belong to each sample; experts: [N, MoE layers, K] or None.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    where: Tensor
    targets: Tensor
    weights: Tensor
    advantages: Tensor
    logprobs: Tensor
    lengths: Tensor
    experts: Tensor | None = None

    def to(self, device: torch.device | str) -> Packed:
        values = (getattr(self, f.name) for f in fields(self))
        return Packed(*(None if t is None else t.to(device, non_blocking=True) for t in values))

    def hidden(self, model: Qwen3) -> Tensor:
        """[K, D]: the states from which the trained tokens are predicted."""
        replay = {} if self.experts is None else {"expert_ids": self.experts.long().unbind(1)}
        states = model(self.tokens, cu_seqlens=self.cu_seqlens, return_hidden=True, **replay)
        return states[self.where]


def pack(samples: Sequence[Sample]) -> Packed:
    """Raises ValueError when some samples have expert ids and others have not, or no token is trained."""
    if not any(s.trained for s in samples):
        raise ValueError(f"none of the {len(samples)} samples has a token with a weight")
    if len({s.experts is None for s in samples}) > 1:
        raise ValueError("some samples have experts and others have none; expected all or none")
    tokens, where, targets, lengths, ends = [], [], [], [], [0]
    streams: dict[str, list[float]] = {"weights": [], "advantages": [], "logprobs": []}
    for s in samples:
        kept = [i for i in range(1, len(s.tokens)) if s.weights[i] != 0]
        where += [len(tokens) + i - 1 for i in kept]
        targets += [s.tokens[i] for i in kept]
        for name, stream in streams.items():
            values = getattr(s, name)
            stream += [0.0] * len(kept) if values is None else [values[i] for i in kept]
        tokens += s.tokens[:-1]
        lengths.append(len(kept))
        ends.append(len(tokens))
    return Packed(
        torch.tensor(tokens), torch.tensor(ends, dtype=torch.int32), torch.tensor(where), torch.tensor(targets),
        *(torch.tensor(stream, dtype=torch.float32) for stream in streams.values()), torch.tensor(lengths),
        None if samples[0].experts is None else torch.cat([s.experts for s in samples]),
    )


def packs(samples: Sequence[Sample], max_tokens: int) -> list[Packed]:
    """Packs of at most ``max_tokens`` input tokens, few and full: the longest sample first, each into the first pack with
    room for it. Samples without a trained token are left out. Raises ValueError for a sample that is longer."""
    bins: list[tuple[int, list[Sample]]] = []
    for s in sorted((s for s in samples if s.trained), key=lambda s: -len(s.tokens)):
        need = len(s.tokens) - 1
        if need > max_tokens:
            raise ValueError(f"a sample has {need} input tokens; expected at most tokens_per_pack {max_tokens}")
        for i, (used, members) in enumerate(bins):
            if used + need <= max_tokens:
                bins[i] = used + need, [*members, s]
                break
        else:
            bins.append((need, [s]))
    return [pack(members) for _, members in bins]
