"""Decoding over a KV cache on a GPU: apart from `test_cache`, whose packages a GPU machine may not have."""

import pytest
import torch

from qwen3_kernels.ops import attention, attention_ref
from qwen3_model.cache import KVCache
from qwen3_model.config import Qwen3Config


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_decoding_by_flash_attention_on_a_gpu(width):
    """Against float64: at most twice the error of scaled_dot_product_attention; slots beyond a row's length are not read."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=width, max_position_embeddings=512,
    )
    cache = KVCache(config, 5, 300, "cuda", torch.bfloat16)
    assert cache.flash()
    for t in (cache.k, cache.v):
        t.normal_()
    cache.lengths.copy_(torch.tensor([0, 1, 63, 128, 299]))
    q = torch.randn(5, 1, 8, width, device="cuda", dtype=torch.bfloat16)
    wanted = attention_ref(q.double(), cache.k[1].double(), cache.v[1].double(), q_start=cache.lengths)
    plain = attention(q, cache.k[1], cache.v[1], q_start=cache.lengths)
    for row, n in enumerate(cache.lengths.tolist()):
        cache.k[:, row, n + 1 :], cache.v[:, row, n + 1 :] = float("nan"), float("nan")
    ours = cache.attend(1, q, cache.spans())
    assert (ours - wanted).abs().max() <= 2 * (plain - wanted).abs().max()
