"""Rotary position embedding: inverse frequencies, YaRN, and the cos/sin rows of a forward.

Sources: Su et al. 2021 (arXiv 2104.09864); Peng et al. 2023, YaRN (arXiv 2309.00071), sections 3.2 (by parts) and
3.4 (attention temperature).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Qwen3Config


def inv_freq(config: Qwen3Config) -> tuple[Tensor, float]:
    """(inverse frequencies [D/2] float32 on the CPU, factor that multiplies cos and sin)."""
    D, theta = config.head_dim, config.rope_theta
    period = theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if config.rope_scaling is None:
        return 1.0 / period, 1.0
    yarn = config.rope_scaling
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        """Index of the pair that turns `times` times over the original context."""
        return D * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(yarn.get("beta_fast", 32)), pair_turning(yarn.get("beta_slow", 1))
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    width = high - low or 0.001  # a step, when both ends meet
    # Fast pairs (ramp 0) keep their frequency, slow ones (ramp 1) are stretched by the whole factor.
    ramp = ((torch.arange(D // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * period) * (1 - keep) + 1.0 / period * keep, _attention_factor(yarn)


def _attention_factor(yarn: dict) -> float:
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(yarn["factor"]) + 1.0 if yarn["factor"] > 1 else 1.0

    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return temperature(yarn["mscale"]) / temperature(yarn["mscale_all_dim"])
    return temperature(1.0)


def rope_tables(positions: Tensor, inv_freq: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [N, D/2], of the angles `positions` (any shape, N entries) times `inv_freq` [D/2]."""
    angles = positions.reshape(-1, 1).float() * inv_freq
    return angles.cos() * factor, angles.sin() * factor
