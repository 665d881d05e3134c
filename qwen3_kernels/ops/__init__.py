"""The public ops, one file each: docstring, torch.library registration, autograd, and the plain-torch reference."""

from .attention import attention, attention_ref
from .cross_entropy import cross_entropy, cross_entropy_ref
from .linear_cross_entropy import TokenStats, linear_cross_entropy, linear_cross_entropy_ref
from .linear_kl import linear_kl, linear_kl_ref
from .moe_experts import moe_experts, moe_experts_ref
from .moe_lora import Adapters, moe_lora, moe_lora_ref
from .moe_router import Plan, RouterStats, moe_router, moe_router_ref, routing_plan
from .paged_attention import paged_attention, paged_attention_ref, paged_write, paged_write_ref
from .qk_norm_attention import qk_norm_attention, qk_norm_attention_ref
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from .rms_norm import rms_norm, rms_norm_ref
from .scaled_dot_product_attention import scaled_dot_product_attention
from .swiglu import swiglu, swiglu_ref
from .swiglu_mlp import swiglu_mlp, swiglu_mlp_ref

__all__ = [
    "Adapters", "Plan", "RouterStats", "TokenStats", "attention", "attention_ref", "cross_entropy",
    "cross_entropy_ref", "linear_cross_entropy", "linear_cross_entropy_ref", "linear_kl", "linear_kl_ref",
    "moe_experts", "moe_experts_ref", "moe_lora", "moe_lora_ref", "moe_router", "moe_router_ref", "paged_attention",
    "paged_attention_ref", "paged_write", "paged_write_ref", "qk_norm_attention", "qk_norm_attention_ref", "qk_norm_rope",
    "qk_norm_rope_ref", "rms_norm", "rms_norm_ref", "routing_plan", "scaled_dot_product_attention", "swiglu", "swiglu_mlp",
    "swiglu_mlp_ref", "swiglu_ref",
]
