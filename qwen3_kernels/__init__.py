"""Drop-in kernels for the Qwen3 family. Each op works on CPU and CUDA, under autograd and torch.compile."""

from .ops import (
    attention, cross_entropy, linear_cross_entropy, linear_kl, moe_experts, moe_lora, moe_router, paged_attention,
    paged_write, qk_norm_attention, qk_norm_rope, rms_norm, routing_plan, scaled_dot_product_attention, swiglu,
    swiglu_mlp,
)
from .version import __version__

__all__ = [
    "attention", "cross_entropy", "linear_cross_entropy", "linear_kl", "moe_experts", "moe_lora", "moe_router",
    "paged_attention", "paged_write", "qk_norm_attention", "qk_norm_rope", "rms_norm", "routing_plan",
    "scaled_dot_product_attention", "swiglu", "swiglu_mlp", "__version__",
]
