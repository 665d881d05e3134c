"""Peak memory of a training step, predicted from the sizes: ``python -m training.memory --model Qwen3-0.6B``.

A step has four moments at which memory may peak: the loss (all activations, and a chunk's logits), the start of the
backward (all activations, and the last layer's gradients in flight), its end (all gradients, and the embedding's in
flight) and the update. In between, layer by layer, activations make room for gradients.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3_kernels.ops.linear_cross_entropy import MAX_ROUNDED_CHUNKS, default_chunk
from qwen3_kernels.ops.swiglu_mlp import MIN_ROWS
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.recompute import POLICIES

from .config import DTYPES, Config
from .data.packing import Batch
from .optim import PIECE, STATES, is_matrix_of_a_layer

MARGIN = 0.05  # of the device's memory, for the error of the prediction and what the allocator cannot use
CONTEXT = 1 << 30  # bytes that CUDA and its libraries take beside torch's allocator
WORKSPACES = 64 << 20  # bytes of cuBLAS's workspaces on CUDA, for the threads of the forward and of the backward


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at one moment of a step."""

    moment: str
    weights: int
    optimizer: int  # master weights and moments
    gradients: int
    activations: int  # what is kept for the backward
    temporary: int
    rollouts: int = 0  # where a stage samples: the KV cache, and what it drew

    @property
    def sizes(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    def __str__(self) -> str:
        parts = (f"{name} {gib(size)}" for name, size in self.sizes.items() if size or name != "rollouts")
        return f"{gib(self.total)} ({self.moment}: {', '.join(parts)})"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def predict(config: Config, model: Qwen3Config, device: str = "cuda") -> Estimate:
    """The peak of a training step of ``pretrain`` once the run is under way; ``config.dtype`` "auto" is bfloat16.

    ``device``: "cuda" (bfloat16 on the compiled kernels) or "cpu".
    """
    return _Step(config, model, device).peak()


def usable(total: int) -> int:
    """Bytes for tensors on a CUDA device with ``total`` bytes."""
    return int(total * (1 - MARGIN)) - CONTEXT


def check(config: Config, model: Qwen3Config, total: int) -> Estimate:
    """The predicted peak, for a CUDA device of ``total`` bytes. ValueError, with what would fit, if that does not."""
    return _checked(predict(config, model), total, lambda room: advice(config, model, room), "shorter rows")


def _checked(
    estimate: Estimate, total: int, advice: Callable[[int], list[tuple[str, Estimate]]], shorter: str
) -> Estimate:
    room = usable(total)
    if estimate.total <= room:
        return estimate
    options = [f"{flags} ({gib(e.total)})" for flags, e in advice(room)]
    raise ValueError(
        f"a training step does not fit: it takes {estimate}, and {gib(room)} of the device's {gib(total)} are usable. "
        + ("What would fit, smallest change first: " + "; ".join(options) if options else
           f"Nothing but a smaller model, {shorter} or more memory would help")
    )


def advice(config: Config, model: Qwen3Config, room: int) -> list[tuple[str, Estimate]]:
    """[(flags, their peak)] of the changes that fit in ``room`` bytes and of which no part would do. First more
    micro-steps and recomputation, which change results by rounding at most, then the optimizer's states."""
    dials = {
        "optimizer_states": STATES[STATES.index(config.optimizer_states):],
        "recompute": POLICIES[POLICIES.index(config.recompute):],
        "micros": [n for n in range(config.micros, config.rows + 1) if config.rows % n == 0],
    }
    return _advice(dials, 1, lambda changes: predict(dataclasses.replace(config, **changes), model), room)


def _advice(
    dials: Mapping[str, Sequence[Any]], results: int, predict: Callable[[dict[str, Any]], Estimate], room: int
) -> list[tuple[str, Estimate]]:
    """``dials``: the values of each field from the present one on, less memory each; the first so many change results."""
    found: list[tuple[tuple[int, ...], str, Estimate]] = []
    places = product(*(range(len(values)) for values in dials.values()))
    for place in sorted(places, key=lambda place: (place[:results], sum(map(bool, place)), place)):
        if any(all(a <= b for a, b in zip(other, place)) for other, _, _ in found):
            continue  # part of it is enough
        changes = {name: values[i] for (name, values), i in zip(dials.items(), place)}
        estimate = predict(changes)
        if estimate.total <= room:
            flags = (f"--{name.replace('_', '-')} {changes[name]}" for name, i in zip(dials, place) if i)
            found.append((place, " ".join(flags), estimate))
    return [(flags, estimate) for _, flags, estimate in found]


@cache
def _parameters(model: Qwen3Config) -> dict[str, torch.Tensor]:
    """By name, without storage."""
    with torch.device("meta"):
        return dict(Qwen3(model).named_parameters())


@dataclass(frozen=True)
class _Step:
    config: Config
    model: Qwen3Config
    device: str

    @cached_property
    def N(self) -> int:
        """Tokens of a micro-step."""
        return self.config.rows // self.config.micros * self.config.seq_len

    @cached_property
    def b(self) -> int:
        """Bytes of a weight and of an activation."""
        return DTYPES.get(self.config.dtype, torch.bfloat16).itemsize

    @cached_property
    def masters(self) -> bool:
        return self.b < 4 and self.config.optimizer_states == "float32"

    @cached_property
    def g(self) -> int:
        """Bytes of a gradient that waits for the update."""
        return 4 if self.masters else self.b

    @property
    def sums(self) -> bool:
        """Whether micro-steps add up their gradients, which then are there all along."""
        return self.config.micros > 1

    @property
    def shapes(self) -> dict[str, torch.Tensor]:
        """Of what is trained."""
        return _parameters(self.model)

    @cached_property
    def count(self) -> int:
        """Elements that are trained."""
        return sum(p.numel() for p in self.shapes.values())

    @cached_property
    def head(self) -> int:
        """Elements of the head's gradient."""
        return self.model.vocab_size * self.model.hidden_size

    def weights(self) -> int:
        return self.b * self.count

    @cached_property
    def optimizer(self) -> int:
        moment = 2 if self.config.optimizer_states == "bfloat16" else 4
        return sum(
            p.numel() * (4 * self.masters + moment * (1 if self._muon(n) else 2)) for n, p in self.shapes.items()
        ) + 8  # the step

    def _muon(self, name: str) -> bool:
        return self.config.optimizer == "muon" and is_matrix_of_a_layer(name, self.shapes[name])

    # ---- activations, bytes ------------------------------------------------------------------------------------------

    def kept(self, layers: int) -> int:
        """By the first so many layers for the backward."""
        if self.config.recompute == "full":  # each layer's two inputs; the first one has one
            return self.N * self.model.hidden_size * self.b * (2 * layers - 1)
        return sum(self.layer(i, self.config.recompute) for i in range(layers))

    def layer(self, i: int, policy: str) -> int:
        """Kept by one layer that is not recomputed as a whole."""
        m, b = self.model, self.b
        D, Q, K = m.hidden_size, m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        products, cheap = 2 * D + 2 * Q + 2 * K, 2 * D + Q + K  # elements per token: of products and sums; of norms
        other = 4 * (2 + m.num_attention_heads)  # bytes per token: 1/rms, log-sum-exp
        if not m.is_moe_layer(i):
            products += 2 * m.intermediate_size
            cheap += 0 if self._fused_mlp else m.intermediate_size
        else:
            A, F, E = m.num_experts_per_tok, m.moe_intermediate_size, m.num_experts
            products += 2 * A * F + E  # gate and up of each expert; the router's logits
            other += 24 * A  # experts and weights; the plan's rows, tokens and places
        return self.N * ((products + (cheap if policy == "none" else 0)) * b + other)

    def flight(self, i: int) -> int:
        """Beyond what is kept, within one layer's backward."""
        m, b, D, policy = self.model, self.b, self.model.hidden_size, self.config.recompute
        again = self.layer(i, "none") if policy == "full" else 0
        if not m.is_moe_layer(i):  # at SwiGLU: gradients of the layer's output, of SwiGLU's output, of gate and up
            # SwiGLU's output is made again, or has just made room for one of them.
            wide = 3 if policy == "norm+swiglu" or self._fused_mlp else 2
            return again + self.N * (D + wide * m.intermediate_size) * b
        A, F, E = m.num_experts_per_tok, m.moe_intermediate_size, m.num_experts
        # The gradient of the output, that of gate_up; then either SwiGLU's part, of every expert of a token, or the sum
        # of the experts' gradients of the layer's input. On a CPU these are in float32.
        cpu = self.device == "cpu"
        acting = A * F * ((16 if b == 4 else 30) if cpu else 3 * b)
        summing = A * (2 * F + D) * b + (8 * D if cpu else D * b)
        inputs = D * b * (2 if policy == "norm+swiglu" else 1)
        gradients = (3 if self.sums else 2) * E * D * F * b  # down's, too, where it is to be added to a sum
        return again + self.N * (inputs + max(acting, summing)) + gradients

    def loss(self) -> int:
        """Within the loss: a chunk's logits and their gradient, and the sum of the head's."""
        V, D, rows, fused = self.model.vocab_size, self.model.hidden_size, self.chunk_tokens(), self._fused_loss
        # Fused: one bfloat16 tensor serves for both, the hidden states are there scaled, too, and their gradient passes through
        # float32. Else both are float32, and bfloat16 has a rounded gradient, too.
        chunk = rows * V * (2 if fused else 8 if self.b == 4 else 10) + (6 * rows * D if fused else 0)
        total = self.total(rows)
        return total + (max(chunk, 2 * V * (rows + D)) if total else chunk)  # a product is made before it is added

    def total(self, rows: int, labels: bool = True) -> int:
        """The sum of the head's gradient in float32, which then is rounded, over chunks of ``rows`` tokens. The loss of
        ``labels`` needs none on a GPU, where their part comes last."""
        rounded = self.b == 4 or self.N <= MAX_ROUNDED_CHUNKS * rows or (labels and self.device == "cuda")
        return 0 if rounded else 4 * self.head

    def chunk_tokens(self) -> int:
        m, fused = self.model, self._fused_loss
        rows = default_chunk(self.N, m.vocab_size, m.hidden_size, 2 if fused else 4, sums=fused and self.head > 0)
        return min(rows, self.N)

    @property
    def _fused_loss(self) -> bool:
        return self.device == "cuda" and self.b == 2

    @property
    def _fused_mlp(self) -> bool:
        """SwiGLU's output is not kept."""
        return self.device == "cuda" and self.b == 2 and self.N >= MIN_ROWS

    # ---- the moments -------------------------------------------------------------------------------------------------

    def peak(self) -> Estimate:
        return max(self.moments(), key=lambda estimate: estimate.total)

    def moments(self) -> Iterator[Estimate]:
        g, count, sums = self.g, self.count, self.sums
        waiting = self.b * self.head if self.model.tie_word_embeddings else 0  # until the embedding has its own
        yield from self.losses()
        done = 0 if waiting else self.head  # elements of gradients
        layers: dict[str, dict[str, int]] = defaultdict(dict)
        for name, p in self.shapes.items():
            layers[".".join(name.split(".")[:3])][name] = p.numel()
        for i in reversed(range(self.model.num_hidden_layers)):
            own = layers[f"model.layers.{i}"]
            down = sum(size for n, size in own.items() if "down_proj" in n)
            yield self.at(f"backward of layer {i}", gradients=g * (count if sums else done + down) + waiting,
                          activations=self.kept(i + 1) + self.tables(), temporary=self.flight(i))
            done += sum(own.values())
        if self.head:
            yield self.at("backward of the embedding", gradients=g * (count if sums else done) + waiting,
                          activations=self.tables(),
                          temporary=self.stream + self.b * self.head + (g * self.head if self.masters and not sums else 0))
        yield self.at("update", gradients=g * count, activations=0, temporary=self.update())

    def losses(self) -> Iterator[Estimate]:
        """The moments of the loss."""
        yield self.at("loss", gradients=self.g * self.count * self.sums + self.b * self.head,
                      activations=self.ready(), temporary=2 * self.stream + self.loss())

    @cached_property
    def stream(self) -> int:
        """Bytes of a hidden state of each token."""
        return self.N * self.model.hidden_size * self.b

    def tables(self) -> int:
        """RoPE; tokens, positions, documents, labels, weights and losses."""
        return self.N * (4 * self.model.head_dim + 8 * 6)

    def ready(self) -> int:
        """Kept by the whole model, down to the final norm."""
        return self.kept(self.model.num_hidden_layers) + self.tables() + self.stream + 4 * self.N

    def at(self, moment: str, **sizes: int) -> Estimate:
        if self.device == "cuda":
            sizes["temporary"] += WORKSPACES
        return Estimate(moment, **{"weights": self.weights(), "optimizer": self.optimizer} | sizes)

    def update(self) -> int:
        """Float32 copies of a piece of a parameter, what rounds them and what orthogonalises them. AdamW's kernel on
        CUDA needs none."""
        sizes = [0]
        for name, p in self.shapes.items():
            muon = self._muon(name)
            if self.device == "cuda" and not muon:
                continue
            copies = (1 if muon else 2) * (self.config.optimizer_states == "bfloat16")
            copies += self.b < 4 and not self.masters
            work, piece = 11 if copies else 0, PIECE
            if muon:
                halves = 2 if "gate_up_proj" in name else 1  # which are orthogonalised apart
                short, long = sorted((p.shape[-2] // halves, p.shape[-1]))
                e = 4 if self.device == "cpu" else 2  # bytes in the iteration, see optim.orthogonalised
                work, piece = max(work, 10, 4 + 2 * e + 2 * e * short // long), max(PIECE, short * long)
            sizes.append(min(p.numel(), piece) * (4 * copies + 4 * (self.g < 4) + work))
        return max(sizes)


def measured(config: Config, model: Qwen3Config, device: str) -> int:
    """Bytes at the peak of one real step, the second of a model with random weights on random tokens."""
    from .pretrain import default_loss, set_up, train_step

    config = dataclasses.replace(config, device=device)
    qwen, optimizer = set_up(config, model, None)
    loss_fn = default_loss(config, model)
    rows = config.rows // config.micros
    ends = torch.arange(rows + 1, dtype=torch.int32) * config.seq_len
    tokens = torch.randint(model.vocab_size, (2, rows * config.seq_len))

    def step() -> None:
        batch = Batch(tokens[0], tokens[1], ends)
        train_step(qwen, optimizer, [batch] * config.micros, loss_fn, lr=1e-4, max_grad_norm=1.0)

    step()
    if device == "cpu":
        standing = [*qwen.parameters(), *optimizer.state_tensors().values()]
        return sum(t.nbytes for t in standing) + allocated(step)[1]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """(bytes that torch's CPU allocator gave out and did not get back, the most at a time) while ``function`` ran. Its
    result counts as not given back."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return now, most


def report(
    model: str = "Qwen3-0.6B", rows: int = 4, seq_len: int = 4096, micros: int = 1,
    dtype: Literal["float32", "bfloat16"] = "bfloat16", optimizer: Literal["adamw", "muon"] = "adamw",
    optimizer_states: Literal["float32", "float32-moments", "bfloat16"] = "float32",
    device: Literal["cuda", "cpu"] = "cuda", measure: bool = False,
) -> None:
    """Prints the predicted peak memory of a training step under every policy of recomputation.

    Args:
        model: a released size, or the path of a config.json.
        rows: per step. seq_len: tokens per row.
        measure: also runs real steps on the device and prints what they took.
    """
    from .pretrain import named_model

    sizes = named_model(model)
    for policy in POLICIES:
        config = Config(
            data=Path(), out=Path(), rows=rows, seq_len=seq_len, micros=micros, dtype=dtype, optimizer=optimizer,
            optimizer_states=optimizer_states, recompute=policy,
        )
        estimate = predict(config, sizes, device)
        print(f"{policy:12} predicted {estimate}", flush=True)
        if measure:
            try:
                peak = measured(config, sizes, device)
                off = 100 * (estimate.total / peak - 1)
                print(f"{'':12} measured  {gib(peak)}, prediction {off:+.1f} %", flush=True)
            except torch.OutOfMemoryError:
                print(f"{'':12} measured  out of memory", flush=True)


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    try:
        tyro.cli(report, args=args, prog="python -m training.memory")
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
