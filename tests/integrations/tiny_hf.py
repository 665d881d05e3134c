"""Tiny random models of transformers, and what a training step of one gives."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor

from qwen3_kernels.selfcheck import LIMIT, error_ratio

V5 = int(transformers.__version__.split(".")[0]) >= 5
SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.15, use_cache=False,
)
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, output_router_logits=True, router_aux_loss_coef=0.1,
)
DENSE_LAYER = dict(EXPERTS, mlp_only_layers=[1])  # a dense layer among the sparse ones
KINDS = {"dense": {}, "moe": DENSE_LAYER}


def make(kind: str = "dense", dtype: torch.dtype = torch.float32, **changes) -> transformers.PreTrainedModel:
    """The norms' weights are random too, so that one that is left out is seen."""
    name = "Qwen3Moe" if kind == "moe" else "Qwen3"
    config = getattr(transformers, f"{name}Config")(**SIZES | KINDS[kind] | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1, 0.3)
            if n.endswith("gate.weight"):
                p.normal_(0, 0.3)
    return cast(model, dtype).train()


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The parameters alone: ``.to(dtype)`` would round the frequencies of RoPE as well."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def batch(rows: int = 2, tokens: int = 21) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SIZES["vocab_size"], (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: torch.nn.Module, inputs: dict) -> dict[str, Tensor]:
    """The loss and the gradients of one step."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | named


def logits(model: torch.nn.Module, inputs: dict) -> Tensor:
    training = model.training
    with torch.no_grad():
        out = model.eval()(**inputs).logits
    model.train(training)
    return out


def losses(model: torch.nn.Module, inputs: dict) -> Tensor:
    """Of many label sets: the error of one number is luck."""
    with torch.no_grad():
        return torch.stack([model(**inputs | {"labels": inputs["labels"].roll(n, 1)}).loss for n in range(8)])


def check_error_rule(got: dict, plain: dict, truth: dict, dtype: torch.dtype | None = None) -> None:
    """Error at most twice the unpatched model's, for every gradient; and for the one loss, where that error counts as
    at least a unit in the last place of the dtype the model computes in. Truth is fp64."""
    assert got.keys() == plain.keys() == truth.keys()
    if "loss" in plain:
        lowest = dtype or max((t.dtype for t in plain.values()), key=lambda d: torch.finfo(d).eps)
        plain = plain | {"loss": plain["loss"].to(lowest)}
    ratios = {n: error_ratio(got[n], plain[n], truth[n]) for n in got}
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= LIMIT, f"{worst}: error {ratios[worst]:.3g} times that of the unpatched model"


def wide(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in fp64; torch has no grouped products in it."""
    twin = cast(copy.deepcopy(model), torch.float64)
    twin.config._experts_implementation = "eager"
    return twin


parametrize_kind = pytest.mark.parametrize("kind", KINDS)
parametrize_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
