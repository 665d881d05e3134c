"""The pre-training loss of a mixture of experts, and what its routers do."""

from __future__ import annotations

from torch import Tensor

from qwen3_kernels import linear_cross_entropy
from qwen3_model.balance import GlobalCounts, balance_loss, expert_counts, load, z_loss
from qwen3_model.model import Qwen3

from .data.packing import IGNORE, Batch


class MoELoss:
    """Next-token loss, the experts' balancing loss of each layer over the global batch and the router's z-loss
    (`qwen3_model.balance`), summed over the kept labels. A step is ``micros`` calls; each counts the tokens of those before
    it and of all processes.

    Args:
        z_loss: weight of logsumexp² of the head's logits. router_z_loss: the same of the routers' logits. The weight of the
            balancing loss is the model's `router_aux_loss_coef`.
    """

    def __init__(self, micros: int = 1, z_loss: float = 0.0, router_z_loss: float = 0.0):
        self.micros, self.z_loss, self.router_z_loss = micros, z_loss, router_z_loss
        self._counts, self._calls = GlobalCounts(), 0

    def __call__(self, model: Qwen3, batch: Batch) -> Tensor:
        if self._calls % self.micros == 0:
            self._counts.reset()
        self._calls += 1
        hidden, routing = model(batch.tokens, cu_seqlens=batch.cu_seqlens, return_hidden=True, return_routing=True)
        nats = linear_cross_entropy(
            hidden, model.head_weight, batch.labels, ignore_index=IGNORE, reduction="sum", z_loss=self.z_loss
        )
        routers = model.config.router_aux_loss_coef * balance_loss(routing, self._counts.add(expert_counts(routing)))
        if self.router_z_loss:
            routers = routers + self.router_z_loss * z_loss(routing)
        return nats + routers * (batch.labels != IGNORE).sum()

    def metrics(self) -> dict[str, float]:
        """Of the tokens of the last step, with a host sync:

        load_max_over_mean: tokens of the busiest expert over the average, in the layer where that is largest; 1 is balance
        load_entropy: of the distribution of tokens over experts, in nats, in the layer where it is smallest; log E is balance
        dead_experts: those without a token, of all layers together
        """
        found = load(self._counts.total)
        return {"load_max_over_mean": found.max_over_mean.max().item(), "load_entropy": found.entropy.min().item(),
                "dead_experts": int(found.dead.sum())}
