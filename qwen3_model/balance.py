"""Keeping experts busy: losses on what the routers did, and numbers that show it.

Both losses read `Routing.stats`, so with the router's weights they give the logits one gradient, written once. Padding is
left out by the `token_mask` that the model was called with.

Sources: Qiu et al. 2025, "Demons in the Detail" (arXiv 2501.11873), equations 4 to 6, for balance over the global batch;
Zoph et al. 2022, ST-MoE (arXiv 2202.08906), equation 5, for the z-loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .moe import Routing

# Shape suffixes: L MoE layers, N tokens, E experts, K experts per token.


def expert_counts(routing: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """int64 [L, E]: how many of the kept tokens each expert got. No host sync.

    Raises ValueError: no layers, or a mask that does not fit.
    """
    _check("expert_counts", routing, mask)
    E = routing[0].logits.shape[1]
    counts = torch.zeros(len(routing), E, dtype=torch.int64, device=routing[0].logits.device)
    for count_E, r in zip(counts, routing):
        kept = torch.ones_like(r.expert_ids) if mask is None else _flat(mask, r).long().unsqueeze(1).expand_as(r.expert_ids)
        count_E.scatter_add_(0, r.expert_ids.flatten(), kept.flatten())  # integers: any order gives the same
    return counts


class GlobalCounts:
    """Tokens each expert got in the whole batch: over the processes of a group, and over the micro-steps since `reset`.

    A micro-step's loss uses the counts of all micro-steps up to it: the later ones are not known yet.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, distributed: bool | None = None):
        """``distributed``: sum over the group's processes; default: when torch.distributed is initialised."""
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized() if distributed is None else distributed
        self.total: Tensor | None = None

    def add(self, counts_LE: Tensor) -> Tensor:
        """The counts of a micro-step on this process -> those of all so far, int64 [L, E]."""
        counts_LE = counts_LE.clone()
        if self.distributed:
            dist.all_reduce(counts_LE, group=self.group)
        self.total = counts_LE if self.total is None else self.total + counts_LE
        return self.total

    def reset(self) -> None:
        """After the optimizer's step."""
        self.total = None


def balance_loss(routing: Sequence[Routing], counts: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over layers of E · Σ_e f_e · P_e: f_e the share of tokens that went to expert e, by ``counts``, times K; P_e its
    mean probability over this process's kept tokens. Perfect balance gives K, as in `moe.load_balancing_loss`.

    Args:
        routing: with `stats`, one per MoE layer.
        counts: [L, E], `GlobalCounts.add` for balance over the global batch, `expert_counts` for this micro-batch alone.
        mask: the ``token_mask`` of the forward.

    Returns: float32 scalar; f carries no gradient.

    Raises ValueError: no layers, no stats, or shapes that do not fit.
    """
    _check("balance_loss", routing, mask, stats=True)
    (N, K), E = routing[0].expert_ids.shape, routing[0].logits.shape[1]
    if counts.shape != (len(routing), E):
        raise ValueError(f"balance_loss: counts has shape {tuple(counts.shape)}; expected ({len(routing)}, {E})")
    share_LE = counts.float() / counts.sum(1, keepdim=True).clamp(min=1) * K
    prob_LE = torch.stack([r.stats.prob_sum for r in routing]) / _kept(N, mask, routing[0])
    return E * (share_LE * prob_LE).sum(1).mean()


def z_loss(routing: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """Mean over kept tokens and layers of the squared logsumexp of the router's logits: float32 scalar.

    Raises ValueError: as `balance_loss`.
    """
    _check("z_loss", routing, mask, stats=True)
    squares_LN = torch.stack([r.stats.lse for r in routing]).square()
    if mask is not None:
        squares_LN = squares_LN * _flat(mask, routing[0]).float()
    return squares_LN.sum(1).mean() / _kept(squares_LN.shape[1], mask, routing[0])


class Load(NamedTuple):
    """Of each layer, [L]."""

    max_over_mean: Tensor  # the busiest expert's tokens over the average: 1 is perfect, E the worst
    entropy: Tensor  # of the distribution of tokens over experts, in nats: log E is perfect
    dead: Tensor  # int64: experts without a token


def load(counts: Tensor) -> Load:
    """Metrics of counts [L, E]. No host sync. A layer without tokens: 0, 0 and E."""
    share_LE = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    entropy_L = torch.special.entr(share_LE).sum(1)
    return Load((share_LE.amax(1) * counts.shape[1]).float(), entropy_L.float(), (counts == 0).sum(1))


def _check(name: str, routing: Sequence[Routing], mask: Tensor | None, stats: bool = False) -> None:
    if not routing:
        raise ValueError(f"{name}: routing is empty; expected one entry per MoE layer")
    if mask is not None and mask.numel() != routing[0].logits.shape[0]:
        raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}; expected {routing[0].logits.shape[0]} entries")
    if stats and any(r.stats is None for r in routing):
        raise ValueError(f"{name}: routing has no stats; expected those of Qwen3.forward(..., return_routing=True)")


def _flat(mask: Tensor, routing: Routing) -> Tensor:
    return mask.reshape(-1).to(routing.logits.device) != 0


def _kept(N: int, mask: Tensor | None, routing: Routing) -> Tensor | int:
    return max(N, 1) if mask is None else _flat(mask, routing).sum().clamp(min=1)
