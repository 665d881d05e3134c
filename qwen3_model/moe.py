"""The mixture-of-experts block, and transformers' load-balancing loss (`balance` has others).

Sources: Qwen3 technical report, section 2 (128 experts, 8 active, no shared expert); Fedus et al. 2021, Switch
Transformer (arXiv 2101.03961), equations 4 to 6, for the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_kernels import moe_experts, moe_router
from qwen3_kernels.ops import RouterStats

from .config import Qwen3Config
from .recompute import swiglu

# Shape suffixes: N tokens, D model width, E experts, K experts per token, F expert width.


class Router(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))


class Experts(nn.Module):
    """All experts' weights in two tensors, gate rows before up rows."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        return moe_experts(x_ND, self.gate_up_proj, self.down_proj, expert_NK, weight_NK)


class Routing(NamedTuple):
    """What one block's router did: for replay (`expert_ids`), losses and metrics (`balance`)."""

    logits: Tensor  # [N, E], the model's dtype
    expert_ids: Tensor  # int64 [N, K]
    stats: RouterStats | None  # when asked for


class MoE(nn.Module):
    """Each token goes through its `num_experts_per_tok` most probable experts; their outputs are summed by weight.

    The router's logits are in the model's dtype, its softmax in float32. Equal probabilities go to the lower expert
    index in "fast", to whichever torch.topk takes in "exact", as in transformers. "exact" runs one expert after another,
    with a host sync per call to size the groups: not for CUDA graphs.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.K, self.E = config.num_experts_per_tok, config.num_experts
        self.renormalise, self.exact = config.norm_topk_prob, config.numerics == "exact"
        self.gate, self.experts = Router(config), Experts(config)

    def forward(
        self, x: Tensor, expert_ids: Tensor | None = None, mask: Tensor | None = None, want_stats: bool = False
    ) -> tuple[Tensor, Routing]:
        """x [..., D] -> (output [..., D], routing).

        ``expert_ids`` int64 [N, K] replays a routing: the experts are these, their weights the present router's.
        """
        x_ND = x.reshape(-1, x.shape[-1])
        logits_NE = F.linear(x_ND, self.gate.weight)
        run = self.run_exact if self.exact else self.run_fast
        y_ND, routing = run(x_ND, logits_NE, expert_ids, mask, want_stats)
        return y_ND.view(x.shape), routing

    def run_fast(
        self, x_ND: Tensor, logits_NE: Tensor, expert_ids: Tensor | None, mask: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, Routing]:
        weight_NK, expert_NK, *stats = moe_router(
            logits_NE, self.K, renormalise=self.renormalise, expert_ids=expert_ids, mask=mask, return_stats=want_stats
        )
        return self.experts(x_ND, expert_NK, weight_NK), Routing(logits_NE, expert_NK, stats[0] if stats else None)

    # ---- exact: transformers' eager experts, rounding for rounding ---------------------------------------------------

    def run_exact(
        self, x_ND: Tensor, logits_NE: Tensor, expert_ids: Tensor | None, mask: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, Routing]:
        weight_NK, expert_NK = self.route(logits_NE, expert_ids)
        stats = None
        if want_stats:
            stats = moe_router(logits_NE, self.K, expert_ids=expert_NK, mask=mask, return_stats=True)[2]
        y_ND = self.combine(self.run_experts(x_ND, expert_NK), weight_NK, expert_NK)
        return y_ND, Routing(logits_NE, expert_NK, stats)

    def route(self, logits_NE: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [N, K] in the model's dtype, expert indices [N, K])."""
        probs_NE = logits_NE.softmax(-1, dtype=torch.float32)
        expert_NK = probs_NE.topk(self.K, dim=-1).indices if expert_ids is None else expert_ids
        weight_NK = probs_NE.gather(1, expert_NK)
        if self.renormalise:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return weight_NK.to(logits_NE.dtype), expert_NK

    def run_experts(self, x_ND: Tensor, expert_NK: Tensor) -> Tensor:
        """[N, K, D]: what each token's experts say."""
        N, K = expert_NK.shape
        if N == 0:
            return x_ND.new_zeros(0, K, x_ND.shape[-1])
        # Assignments are numbered k * N + n and grouped by expert.
        expert = expert_NK.T.flatten()
        order = expert.argsort(stable=True)
        groups = x_ND[order % N].split(torch.bincount(expert, minlength=self.E).tolist())
        # unbind rather than indexing: its backward stacks the experts' gradients once.
        weights = zip(groups, self.experts.gate_up_proj.unbind(), self.experts.down_proj.unbind())
        y_AD = torch.cat([
            F.linear(swiglu(F.linear(x, gate_up), exact=True), down) for x, gate_up, down in weights if len(x)
        ])
        return y_AD[order.argsort()].view(K, N, -1).transpose(0, 1)

    def combine(self, y_NKD: Tensor, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
        """transformers adds one expert after another, by index, into a buffer of the model's dtype."""
        by_index_NK = expert_NK.argsort(-1)
        weighted_NKD = (y_NKD * weight_NK.unsqueeze(-1)).gather(1, by_index_NK.unsqueeze(-1).expand_as(y_NKD))
        out_ND = torch.zeros_like(weighted_NKD[:, 0])
        for weighted_ND in weighted_NKD.unbind(1):
            out_ND = out_ND + weighted_ND
        return out_ND


def load_balancing_loss(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, mask: Tensor | None = None
) -> Tensor:
    """E · Σ_e f_e · P_e over the tokens of all layers: f_e the share of tokens that expert e gets (they sum to `top_k`),
    P_e its mean probability. Perfect balance gives `top_k`, as in transformers.

    Args:
        router_logits: one [N, E] per MoE layer, in any floating dtype.
        mask: [N] or [B, T] with B·T = N; 0 leaves a token (padding) out.

    Returns: float32 scalar. f carries no gradient.

    Raises ValueError: no layers, or shapes that do not fit.
    """
    if not router_logits:
        raise ValueError("load_balancing_loss: router_logits is empty; expected one tensor [N, E] per MoE layer")
    for logits in router_logits:
        if logits.dim() != 2 or logits.shape[1] != num_experts:
            raise ValueError(f"load_balancing_loss: router_logits has shape {tuple(logits.shape)}; expected "
                             f"[N, {num_experts}], num_experts wide")
        if mask is not None and mask.numel() != logits.shape[0]:
            raise ValueError(f"load_balancing_loss: mask has shape {tuple(mask.shape)}; expected {logits.shape[0]} entries")
    keep_N = torch.ones_like(router_logits[0][:, 0]) if mask is None else mask.reshape(-1)
    keep_N = keep_N.to(router_logits[0].device, torch.float32)
    count_E = prob_E = torch.zeros(num_experts, device=keep_N.device)
    for logits_NE in router_logits:
        probs_NE = logits_NE.softmax(-1)
        chosen_NK = probs_NE.topk(top_k, dim=-1).indices
        count_E = count_E + (F.one_hot(chosen_NK, num_experts).sum(1) * keep_N.unsqueeze(-1)).sum(0)
        prob_E = prob_E + (probs_NE.float() * keep_N.unsqueeze(-1)).sum(0)
    rows = keep_N.sum() * len(router_logits)
    return num_experts * (count_E / rows * (prob_E / rows)).sum()
