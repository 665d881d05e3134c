"""Low-rank adapters for every linear layer, experts too: y = x W^T + (alpha / r) (x A^T) B^T, W frozen.

Sources: Hu et al. 2021 (arXiv 2106.09685). All layers, a learning rate about ten times that of full training and a low
rank for reinforcement learning: Schulman et al. 2025, "LoRA Without Regret". The head and the embedding stay as they are.

Adapters are saved as PEFT reads them: ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen3_kernels import moe_lora
from qwen3_kernels.ops import Adapters
from qwen3_model.model import Qwen3
from qwen3_model.moe import Experts

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = ("gate_up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoRALinear(nn.Module):
    """A linear layer with an adapter. lora_A: [r, in], lora_B: [out, r], zero at first, so that nothing changes."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        out, into = base.weight.shape
        self.lora_A = nn.Parameter(_uniform((rank, into), base.weight, generator))
        self.lora_B = nn.Parameter(base.weight.new_zeros(out, rank))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def delta(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoRAExperts(nn.Module):
    """Adapters of all experts, by the op `moe_lora`. Per matrix, lora_A: [E, r, in], lora_B: [E, out, r]. As attributes,
    which `numerics="exact"` reads, the matrices are W + delta, made anew each time."""

    def __init__(self, base: Experts, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        for name in EXPERTS:
            w = getattr(base, name)
            E, out, into = w.shape
            self.register_parameter(f"{name}_A", nn.Parameter(_uniform((E, rank, into), w, generator)))
            self.register_parameter(f"{name}_B", nn.Parameter(w.new_zeros(E, out, rank)))

    def forward(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        factors = Adapters(self.gate_up_proj_A, self.gate_up_proj_B, self.down_proj_A, self.down_proj_B)
        return moe_lora(
            x_ND, self.base.gate_up_proj, self.base.down_proj, expert_NK, weight_NK, factors, scale=self.scale
        )

    def delta(self, name: str) -> Tensor:
        return self.scale * torch.bmm(getattr(self, f"{name}_B"), getattr(self, f"{name}_A"))

    @property
    def gate_up_proj(self) -> Tensor:
        return self.base.gate_up_proj + self.delta("gate_up_proj")

    @property
    def down_proj(self) -> Tensor:
        return self.base.down_proj + self.delta("down_proj")


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Kaiming's bound for the adapter's input width, drawn on the CPU so that a seed means the same everywhere."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(like.device, like.dtype)


def add(model: Qwen3, rank: int, alpha: float = 32.0, *, seed: int = 0) -> Qwen3:
    """Freezes the model and puts adapters on all linear layers of its blocks, in place. Raises ValueError for a rank below
    1 or a model that has adapters."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected at least 1")
    if any(True for _ in _adapters(model)):
        raise ValueError("the model has adapters already")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in TARGETS:
                setattr(module, name, LoRALinear(child, rank, alpha, generator))
            elif isinstance(child, Experts):
                setattr(module, name, LoRAExperts(child, rank, alpha, generator))
    model.lora_rank, model.lora_alpha = rank, alpha
    return model


def _adapters(model: Qwen3) -> Iterator[tuple[nn.Module, str, str, LoRALinear | LoRAExperts]]:
    """(parent, name in it, full name, adapter)"""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if isinstance(child, (LoRALinear, LoRAExperts)):
                yield module, name, f"{path}.{name}", child


def merge(model: Qwen3) -> Qwen3:
    """Adds every adapter to its weights and takes it off, in place."""
    with torch.no_grad():
        for parent, name, _, adapter in list(_adapters(model)):
            if isinstance(adapter, LoRALinear):
                adapter.base.weight += adapter.delta()
            else:
                for matrix in EXPERTS:
                    getattr(adapter.base, matrix).add_(adapter.delta(matrix))
            setattr(parent, name, adapter.base)
    return model.requires_grad_(True)


@contextmanager
def merged(model: Qwen3) -> Iterator[Qwen3]:
    """The merged model for as long as the block lasts; then the adapters are back and the weights as they were, bit for
    bit."""
    found = list(_adapters(model))
    weights = [p for _, _, _, a in found for p in a.base.parameters()]
    kept = [p.detach().to("cpu", copy=True) for p in weights]  # a GPU may have no room for them twice
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield merge(model)
    finally:
        with torch.no_grad():
            for p, old in zip(weights, kept):
                p.copy_(old)
        for parent, name, _, adapter in found:
            setattr(parent, name, adapter)
        for p, wanted in frozen:
            p.requires_grad_(wanted)


# ---- PEFT's files ------------------------------------------------------------------------------------------------------


def _tensors(model: Qwen3) -> dict[str, Tensor]:
    """Parameters by the names of PEFT's files. PEFT keeps the adapters of E experts as one of rank E * r: A is
    [E * r, in], and the columns of B, [out, r * E], go through the experts fastest. Of two matrices in one module the
    second one's adapter is wrapped around the first's."""
    out: dict[str, Tensor] = {}
    for _, _, name, adapter in _adapters(model):
        name = f"base_model.model.{name}"
        if isinstance(adapter, LoRALinear):
            out |= {f"{name}.lora_A.weight": adapter.lora_A, f"{name}.lora_B.weight": adapter.lora_B}
            continue
        for matrix, inner in zip(EXPERTS, (".base_layer", "")):
            out[f"{name}{inner}.lora_A.weight"] = getattr(adapter, f"{matrix}_A").flatten(0, 1)
            out[f"{name}{inner}.lora_B.weight"] = getattr(adapter, f"{matrix}_B").permute(1, 2, 0).flatten(1)
    return {k: t.detach().contiguous() for k, t in out.items()}


def save(model: Qwen3, folder: Path, *, base: str = "") -> None:
    """Writes the adapters, whole or not at all. Raises ValueError for a model without any."""
    tensors = _tensors(model)
    if not tensors:
        raise ValueError("the model has no adapters to save")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none", "r": model.lora_rank,
        "lora_alpha": model.lora_alpha, "lora_dropout": 0.0, "inference_mode": True, "fan_in_fan_out": False,
        "target_modules": sorted({n.split(".")[-3] for n in tensors} - {"experts", "base_layer"}),
    }
    if any(isinstance(a, LoRAExperts) for *_, a in _adapters(model)):
        config["target_parameters"] = [f"mlp.experts.{name}" for name in EXPERTS]
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        save_file(tensors, tmp / WEIGHTS)
        (tmp / CONFIG).write_text(json.dumps(config, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@torch.no_grad()
def load(model: Qwen3, folder: Path) -> None:
    """Reads adapters into a model that has some of the same rank. Raises ValueError naming a tensor that does not fit."""
    own, found = _tensors(model), load_file(Path(folder) / WEIGHTS)
    for name in sorted(own.keys() | found.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (own, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder}: {name} is {shapes[1]}; expected {shapes[0]}")
    for _, _, name, adapter in _adapters(model):
        name = f"base_model.model.{name}"
        if isinstance(adapter, LoRALinear):
            adapter.lora_A.copy_(found[f"{name}.lora_A.weight"])
            adapter.lora_B.copy_(found[f"{name}.lora_B.weight"])
            continue
        for matrix, inner in zip(EXPERTS, (".base_layer", "")):
            A, B = (getattr(adapter, f"{matrix}_{side}") for side in "AB")
            A.copy_(found[f"{name}{inner}.lora_A.weight"].view_as(A))
            B.copy_(found[f"{name}{inner}.lora_B.weight"].view(B.shape[1], B.shape[2], B.shape[0]).permute(2, 0, 1))
