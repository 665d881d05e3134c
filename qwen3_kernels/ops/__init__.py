"""The public ops, one file each: docstring, torch.library registration, autograd, and the plain-torch reference."""

from .attention import attention, attention_ref
from .cross_entropy import cross_entropy, cross_entropy_ref
from .linear_cross_entropy import TokenStats, linear_cross_entropy, linear_cross_entropy_ref
from .linear_kl import linear_kl, linear_kl_ref
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from .rms_norm import rms_norm, rms_norm_ref
from .swiglu import swiglu, swiglu_ref

__all__ = [
    "TokenStats", "attention", "attention_ref", "cross_entropy", "cross_entropy_ref", "linear_cross_entropy",
    "linear_cross_entropy_ref", "linear_kl", "linear_kl_ref", "qk_norm_rope", "qk_norm_rope_ref", "rms_norm",
    "rms_norm_ref", "swiglu", "swiglu_ref",
]
