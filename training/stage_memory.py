"""Peak memory of post-training, predicted as in `memory`: ``python -m training.stage_memory sft``, ``rl`` or ``distill``,
and the flags of that stage.

A stage trains on packs. Predicted is a pack that is full (``tokens_per_pack``, or all that an update can have) and of
which every token is trained: shorter conversations and long prompts take less. Where an update may need several packs,
their gradients are summed, so all are there from the second one on.

Beside training there are, on a GPU, the rollouts, whose KV cache is kept with the model from one step to the next (see
`static_rollout`), and for distillation the teacher. Two moments are upper bounds: "sampling", which takes all slots to be
filled at once with prompts of ``max_prompt`` tokens, and "teacher", its forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from qwen3_kernels.ops.linear_cross_entropy import chunk_size
from qwen3_kernels.ops.linear_kl import LIVE_LOGITS
from qwen3_model.config import Qwen3Config
from qwen3_model.recompute import POLICIES

from . import lora
from .memory import Estimate, _advice, _checked, _parameters, _Step
from .optim import STATES

RANK = 16  # of the adapters that are proposed where training all weights does not fit


@cache
def _adapters(model: Qwen3Config, rank: int) -> dict[str, torch.Tensor]:
    """What `lora.add` trains, by the matrices' names, without storage."""
    found = {}
    for name, p in _parameters(model).items():
        if "layers" in name and (name.split(".")[-2] in lora.TARGETS or name.split(".")[-1] in lora.EXPERTS):
            *experts, out, into = p.shape
            found[f"{name}.lora_A"] = torch.empty(*experts, rank, into, device="meta")
            found[f"{name}.lora_B"] = torch.empty(*experts, out, rank, device="meta")
    return found


@dataclass(frozen=True)
class FineTuning(_Step):
    """A step of `sft`; ``config`` is its config."""

    def samples(self) -> tuple[int, int]:
        """(most samples of an update, most input tokens of one)"""
        return self.config.rows, self.config.max_tokens - 1

    @property
    def longest(self) -> int:
        return self.samples()[1]

    @cached_property
    def N(self) -> int:
        """Tokens of a pack."""
        samples, tokens = self.samples()
        return min(samples * tokens, self.config.tokens_per_pack)

    @property
    def sums(self) -> bool:
        samples, tokens = self.samples()
        return samples * tokens > self.config.tokens_per_pack

    # ---- adapters ----------------------------------------------------------------------------------------------------

    @property
    def r(self) -> int:
        return self.config.lora_rank

    @property
    def shapes(self) -> dict[str, torch.Tensor]:
        return _adapters(self.model, self.r) if self.r else super().shapes

    @cached_property
    def head(self) -> int:
        return 0 if self.r else self.model.vocab_size * self.model.hidden_size

    def weights(self) -> int:
        return self.b * (self.model.num_params() + (self.count if self.r else 0))

    @property
    def _fused_mlp(self) -> bool:
        return not self.r and super()._fused_mlp

    def layer(self, i: int, policy: str) -> int:
        kept = super().layer(i, policy)
        if not self.r:
            return kept
        m, moe = self.model, self.model.is_moe_layer(i)
        low = 4 + (m.num_experts_per_tok if moe else 3)  # A x of each adapter; of experts' the second one is made again
        frozen = m.hidden_size if i == 0 and policy == "none" else 0  # no gradient goes to the embedding
        return kept + self.N * (low * self.r - frozen) * self.b

    def flight(self, i: int) -> int:
        m, b, policy = self.model, self.b, self.config.recompute
        if not self.r or not m.is_moe_layer(i):
            return super().flight(i)
        # In `moe_lora` SwiGLU's backward is in float32 and plain torch. Its parts, with copies of gate and up if those
        # are not in float32, stay while the layer's input gets its gradient.
        again = self.layer(i, "none") if policy == "full" else 0
        D, A, F = m.hidden_size, m.num_experts_per_tok, m.moe_intermediate_size
        own = sum(p.numel() for n, p in self.shapes.items() if n.startswith(f"model.layers.{i}.mlp"))
        copies = 8 if b < 4 else 0
        acting, summing = (28 + copies) * F, (8 + copies + 3 * b) * F + 2 * D * b
        inputs = D * b * (2 if policy == "norm+swiglu" else 1)
        return again + self.N * (inputs + A * max(acting, summing)) + own * b

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def entropy(self) -> int:
        """A chunk's logits, log-probabilities and products of them in float32. The fused kernel has no such tensors."""
        return 0 if self._fused_loss else 20 * self.chunk_tokens() * self.model.vocab_size

    def loss(self) -> int:
        return max(super().loss(), self.entropy() + self.total(self.chunk_tokens()))

    # ---- the moments -------------------------------------------------------------------------------------------------

    def moments(self) -> Iterator[Estimate]:
        yield from super().moments()
        if self.r:  # at the end of a run; see `lora.merged`
            sizes = [p.numel() for n, p in _parameters(self.model).items() if f"{n}.lora_A" in self.shapes]
            kept = 0 if self.device == "cuda" else sum(sizes)
            yield self.at("merging the adapters", gradients=0, activations=0, temporary=self.b * (kept + 2 * max(sizes)))

    def dials(self) -> dict[str, list[Any]]:
        """See `memory._advice`."""
        c, halves = self.config, [self.N]
        while halves[-1] > self.longest:
            halves.append(max(halves[-1] // 2, self.longest))
        return {
            "lora_rank": [c.lora_rank] if self.r else [0, RANK],
            "optimizer_states": STATES[STATES.index(c.optimizer_states):],
            "recompute": POLICIES[POLICIES.index(c.recompute):],
            "tokens_per_pack": halves,
        }


@dataclass(frozen=True)
class Reinforcement(FineTuning):
    """A step of `rl`. Its loss is per token, so head and hidden states get their gradients in the backward."""

    def samples(self) -> tuple[int, int]:
        c = self.config
        return -(-c.groups * c.group_size // c.mini_batches), c.max_prompt + c.max_tokens - 1

    def losses(self) -> Iterator[Estimate]:
        sums = self.g * self.count * self.sums
        yield self.at("loss", gradients=sums, activations=self.ready(), temporary=self.stream + self.entropy())
        yield self.at("backward of the loss", gradients=sums + self.b * self.head, activations=self.ready(),
                      temporary=2 * self.stream + _Step.loss(self))

    def tables(self) -> int:
        """With the experts that are replayed, int16 and int64."""
        replays = getattr(self.config, "replay_routing", False)
        return super().tables() + self.N * (10 * self.model.num_experts_per_tok * self._sparse if replays else 0)

    @property
    def _sparse(self) -> int:
        return sum(map(self.model.is_moe_layer, range(self.model.num_hidden_layers)))

    def rollouts(self) -> int:
        """Bytes that `static_rollout.StaticRoller` keeps: keys and values, hidden states, tokens, experts; and what its
        graph holds, the logits above all."""
        m, c, b = self.model, self.config, self.b
        rows, length = max(c.slots, 4), min(c.max_prompt + c.max_tokens, m.max_position_embeddings)
        token = b * (2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim + m.hidden_size) + 8
        if self._sparse:
            token += 2 * self._sparse * m.num_experts_per_tok
        return rows * (length * token + m.vocab_size * b)

    def at(self, moment: str, **sizes: int) -> Estimate:
        kept = {"rollouts": self.rollouts()} if self.device == "cuda" else {}  # a `Roller` lives as long as it plays
        return super().at(moment, **kept | sizes)

    def moments(self) -> Iterator[Estimate]:
        yield from super().moments()
        c, V = self.config, self.model.vocab_size
        drawn = c.slots * c.max_tokens * self.stream // self.N + self.entropy()  # their log-probabilities
        prompts = c.slots * (c.max_prompt * passing(self.model, self.b) + V * self.b)
        yield self.at("sampling", gradients=0, activations=0, temporary=max(prompts, drawn), rollouts=self.rollouts())

    def dials(self) -> dict[str, list[Any]]:
        slots = [self.config.slots]
        while slots[-1] > 1:
            slots.append(slots[-1] // 2)
        return super().dials() | {"slots": slots}


@dataclass(frozen=True)
class Distillation(Reinforcement):
    """A step of `distill`. The loss holds logits of both models."""

    teacher: Qwen3Config

    def weights(self) -> int:
        return super().weights() + self.b * self.teacher.num_params()

    def losses(self) -> Iterator[Estimate]:
        taught = self.N * self.teacher.hidden_size * self.b
        sums = self.g * self.count * self.sums
        yield self.at("teacher", gradients=sums, activations=self.tables(),
                      temporary=self.N * passing(self.teacher, self.b))
        yield self.at("loss", gradients=sums + self.b * self.head, activations=self.ready(),
                      temporary=taught + 2 * self.stream + max(self.divergence(), self.entropy()))

    def divergence(self) -> int:
        """Within `linear_kl`."""
        V, live = self.model.vocab_size, LIVE_LOGITS["triton" if self.device == "cuda" else "torch"][0]
        rows = min(chunk_size(self.N, V, 4 * live), self.N)
        return 4 * live * rows * V + self.total(rows, labels=False)


def passing(model: Qwen3Config, b: int) -> int:
    """Bytes of a token in a forward without gradients, of ``b`` bytes an element: the stream before and within a layer,
    the layer's widest part, and RoPE."""
    Q, K = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    widths = [3 * (Q + K)]
    for i in range(model.num_hidden_layers):
        A, F = model.num_experts_per_tok, model.moe_intermediate_size
        widths.append(A * (3 * F + model.hidden_size) if model.is_moe_layer(i) else 3 * model.intermediate_size)
    return b * (4 * model.hidden_size + max(widths)) + 4 * model.head_dim


def predict(step: type[FineTuning], config: Any, device: str = "cuda") -> Estimate:
    """The peak of a run of a stage whose models lie in ``config.start`` and, for distillation, ``config.teacher``."""
    return _made(step, config, device).peak()


def check(step: type[FineTuning], config: Any) -> Estimate | None:
    """The predicted peak on a GPU, None on a CPU. ``config``: resolved. ValueError, with what would fit, for a run that
    does not."""
    if not config.device.startswith("cuda"):
        return None
    total = torch.cuda.get_device_properties(config.device).total_memory
    return _checked(predict(step, config), total, lambda room: advice(_made(step, config, "cuda"), room), "shorter samples")


def advice(step: FineTuning, room: int) -> list[tuple[str, Estimate]]:
    """As `memory.advice`, with smaller packs in place of micro-steps, fewer slots, and adapters as the last resort."""
    def changed(changes: dict[str, Any]) -> Estimate:
        return dataclasses.replace(step, config=dataclasses.replace(step.config, **changes)).peak()

    return _advice(step.dials(), 2, changed, room)


def _made(step: type[FineTuning], config: Any, device: str) -> FineTuning:
    models = [Qwen3Config.from_file(folder) for folder in (config.start, getattr(config, "teacher", None)) if folder]
    return step(config, models[0], device, *models[1:])


def main(args: Sequence[str] | None = None) -> None:
    """Prints the peak under every policy of recomputation, on a GPU unless ``--device cpu`` is among the flags."""
    from .distill import DistillConfig
    from .rl import RLConfig
    from .sft import SFTConfig

    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    stages = {"sft": (SFTConfig, FineTuning), "rl": (RLConfig, Reinforcement), "distill": (DistillConfig, Distillation)}
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {name: config for name, (config, _) in stages.items()}, args=args, prog="python -m training.stage_memory",
            description=__doc__,
        )
        step = next(step for found, step in stages.values() if found is type(config))
        for policy in POLICIES:
            changed = dataclasses.replace(config, recompute=policy)
            print(f"{policy:12} predicted {predict(step, changed, 'cpu' if config.device == 'cpu' else 'cuda')}")
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
