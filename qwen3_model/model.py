"""Qwen3, dense and mixture of experts. Parameters are named as in the published checkpoints.

Source: Qwen3 technical report (2025), section 2: pre-norm decoder, grouped-query attention with QK-Norm and RoPE,
SwiGLU, no biases.

Shape suffixes: T tokens, [batch, time] or packed [tokens]; D model width; H query heads; K key/value heads; C head
width; F feed-forward width; V vocabulary; E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3_kernels import attention, swiglu_mlp
from qwen3_kernels.ops.linears import project
from qwen3_kernels.ops.swiglu_mlp import fuses

from . import exact, recompute, rope
from .cache import KVCache
from .config import Qwen3Config
from .inputs import Step, prepare
from .moe import MoE, Routing
from .recompute import qk_norm_attention, qk_norm_rope, rms_norm, swiglu


class Norm(nn.Module):
    def __init__(self, width: int, config: Qwen3Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.exact = config.rms_norm_eps, config.numerics == "exact"

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)"""
        if residual_TD is None:
            return rms_norm(x_TD, self.weight, self.eps, exact=self.exact), x_TD
        return rms_norm(x_TD, self.weight, self.eps, residual_TD, exact=self.exact)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        self.layer, self.C, self.eps, self.exact = layer, C, config.rms_norm_eps, config.numerics == "exact"
        self.q_proj = nn.Linear(D, config.num_attention_heads * C, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * C, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * C, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * C, D, bias=False)
        self.q_norm, self.k_norm = Norm(C, config), Norm(C, config)

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        q_THC, k_TKC, v_TKC = (
            y.unflatten(-1, (-1, self.C)) for y in project(x_TD, self.q_proj, self.k_proj, self.v_proj)
        )
        weights = self.q_norm.weight, self.k_norm.weight
        if step.cache is None and not self.exact:
            out_THC = qk_norm_attention(
                q_THC, k_TKC, v_TKC, *weights, (step.cos, step.sin), cu_seqlens=step.cu_seqlens, eps=self.eps
            )
            return self.o_proj(out_THC.flatten(-2))
        q_THC, k_TKC = qk_norm_rope(q_THC, k_TKC, *weights, step.cos, step.sin, self.eps, exact=self.exact)
        if step.cache is not None:
            step.cache.update(self.layer, k_TKC, v_TKC, *step.where)
            if step.spans is not None and not self.exact:
                return self.o_proj(step.cache.attend(self.layer, q_THC, step.spans).flatten(-2))
            if step.cu_seqlens is None:  # else a prefill, which has all its keys at hand
                k_TKC, v_TKC = step.cache.k[self.layer], step.cache.v[self.layer]
        attend = exact.attention if self.exact else attention
        out_THC = attend(q_THC, k_TKC, v_TKC, cu_seqlens=step.cu_seqlens, q_start=step.q_start)
        return self.o_proj(out_THC.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        D, width, self.exact = config.hidden_size, config.intermediate_size, config.numerics == "exact"
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if not self.exact and fuses(x_TD, *layers):
            return swiglu_mlp(x_TD, *(layer.weight for layer in layers)), None
        return self.down_proj(swiglu(*project(x_TD, self.gate_proj, self.up_proj), exact=self.exact)), None


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, config)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, step: Step, *router: Tensor | bool | None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """The stream is carried as two addends, so that each norm also does the addition before it."""
        x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD, residual_TD = self.post_attention_layernorm(self.self_attn(x_TD, step), residual_TD)
        x_TD, routing = self.mlp(x_TD, *router)
        return x_TD, residual_TD, routing


class Decoder(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config)


class Qwen3(nn.Module):
    """A Qwen3 language model. Weights are uninitialised until `init_weights` or `load.load`; a tied model has no
    `lm_head`. Set `recompute` to one of `recompute.POLICIES` to keep less of each layer for the backward.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config, self.recompute = config, "none"
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        inv_freq, self.rope_factor = rope.inv_freq(config)
        self.register_buffer("inv_freq", inv_freq.to(self.head_weight.device), persistent=False)

    def forward(
        self, tokens: Tensor, *, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None, expert_ids: Sequence[Tensor] | None = None, token_mask: Tensor | None = None,
        return_hidden: bool = False, return_router_logits: bool = False, return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]] | tuple[Tensor, tuple[Routing, ...]]:
        """Next-token logits.

        Args:
            tokens: int64 [B, T]; or packed documents [N] with `cu_seqlens`.
            positions: integers [T] or [B, T], or [N] when packed: the angles of RoPE. Default: 0, 1, ... in each row or
                document, after the cached tokens. What a token sees depends on its place, not on `positions`.
            cu_seqlens: int32 [documents + 1], cumulative lengths from 0 to N.
            cache: see `KVCache`; the caller advances it afterwards.
            expert_ids: routing replay: the experts each token is to go through, int64 [N, K] for every MoE layer (as
                `Routing.expert_ids`); their weights are those of the present router.
            token_mask: [B, T] or [N]; 0 leaves a token (padding) out of the routers' statistics.
            return_hidden: the states after the final norm (what `head` turns into logits) in place of the logits.
            return_router_logits: also a tuple with [N, E] of every MoE layer, for `moe.load_balancing_loss`.
            return_routing: also a tuple with the `Routing` of every MoE layer, for `balance` and replay.

        Returns: [..., V] (or [..., D]) in the model's dtype, leading dimensions as tokens.

        Raises ValueError, TypeError: shapes, dtypes or devices that do not fit. On the CPU also: ids out of range,
        cu_seqlens that do not rise from 0 to N, a cache that overflows; on CUDA these would need a sync.
        """
        step = prepare(self.config, tokens, positions, cu_seqlens, cache, self.inv_freq, self.rope_factor)
        replay, mask_N = self._router_inputs(tokens, expert_ids, token_mask, return_router_logits and return_routing)
        x_TD, residual_TD, routings = self.model.embed_tokens(tokens), None, []
        for layer in self.model.layers:
            router = (next(replay), mask_N, return_routing) if isinstance(layer.mlp, MoE) else ()
            x_TD, residual_TD, routing = recompute.run(self.recompute, layer, x_TD, residual_TD, step, *router)
            routings += [] if routing is None else [routing]
        x_TD, _ = self.model.norm(x_TD, residual_TD)
        out = x_TD if return_hidden else self.head(x_TD)
        if return_router_logits:
            return out, tuple(r.logits for r in routings)
        return (out, tuple(routings)) if return_routing else out

    def _router_inputs(
        self, tokens: Tensor, expert_ids: Sequence[Tensor] | None, token_mask: Tensor | None, both: bool
    ) -> tuple[Iterator[Tensor | None], Tensor | None]:
        """(one layer's experts after another's, the mask [N])"""
        layers = sum(isinstance(layer.mlp, MoE) for layer in self.model.layers)
        if both:
            raise ValueError("Qwen3: return_router_logits and return_routing are both set; expected one of them")
        if expert_ids is not None and len(expert_ids) != layers:
            raise ValueError(f"Qwen3: expert_ids has {len(expert_ids)} entries; expected one for each of {layers} MoE "
                             "layers")
        if token_mask is not None and token_mask.shape != tokens.shape:
            raise ValueError(f"Qwen3: token_mask is {tuple(token_mask.shape)}; expected tokens' shape "
                             f"{tuple(tokens.shape)}")
        return iter(expert_ids or [None] * layers), None if token_mask is None else token_mask.reshape(-1)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's own matrix, or the embedding when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        return KVCache(self.config, batch, max_len, self.head_weight.device, self.head_weight.dtype)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Qwen3:
        """normal(0, initializer_range) for matrices, ones for norms; drawn in fp32 on the CPU, so that a seed gives the
        same weights (up to rounding to the dtype) on every device."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                p.copy_(torch.empty(p.shape).normal_(0.0, self.config.initializer_range, generator=generator))
        return self

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # `.to(bfloat16)` must not round the frequencies, nor `.to_empty()` lose them.
        self.inv_freq = rope.inv_freq(self.config)[0].to(self.inv_freq.device)
        return self
