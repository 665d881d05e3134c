import math

import pytest
import torch
from transformers import Qwen3Config as HFConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.rope import inv_freq, rope_tables

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARNS = [
    YARN, YARN | {"factor": 2.0}, YARN | {"factor": 1.0}, YARN | {"truncate": False}, YARN | {"attention_factor": 1.5},
    YARN | {"beta_fast": 16, "beta_slow": 4}, YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}, YARN | {"mscale": 2.0},
    YARN | {"original_max_position_embeddings": 64}, YARN | {"factor": 31.0, "beta_fast": 8.0, "beta_slow": 8.0},
]  # fmt: skip


def config(scaling=None, theta=1_000_000, head_dim=128, **changes) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, **changes,
    )


def theirs(c: Qwen3Config) -> Qwen3RotaryEmbedding:
    return Qwen3RotaryEmbedding(HFConfig(**c.to_dict()))


@pytest.mark.parametrize("scaling", [None, *YARNS])
@pytest.mark.parametrize("theta, head_dim", [(1_000_000, 128), (1e4, 64), (5e6, 128), (1e7, 96)])
def test_inv_freq_is_transformers_bit_for_bit(scaling, theta, head_dim):
    c = config(scaling, theta, head_dim, max_position_embeddings=131072)
    frequencies, factor = inv_freq(c)
    hf = theirs(c)
    assert frequencies.dtype == torch.float32 and frequencies.shape == (head_dim // 2,)
    assert torch.equal(frequencies, hf.inv_freq) and factor == hf.attention_scaling


def test_frequencies_of_the_definition():
    """theta^(-2i/D), from fp64."""
    frequencies, factor = inv_freq(config())
    exact = torch.tensor([1_000_000 ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
    assert ((frequencies.double() - exact) / exact).abs().max() < 2e-7 and factor == 1.0


def test_yarn_values():
    """Hand-computed: pairs below 23 keep their frequency, those from 40 on turn four times slower."""
    plain, (yarn, factor) = inv_freq(config())[0], inv_freq(config(YARN))
    assert factor == pytest.approx(1.1386294, abs=1e-7) == 0.1 * math.log(4) + 1
    assert torch.equal(yarn[:24], plain[:24])
    torch.testing.assert_close(yarn[40:], plain[40:] / 4, rtol=2e-7, atol=0)
    for i, value in ((24, 5.3753215e-3), (32, 6.0294118e-4), (40, 4.4456985e-5), (63, 3.1023444e-7)):
        assert yarn[i].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("scaling", [None, YARN])
def test_tables_are_transformers(scaling):
    """cos and sin at scattered positions; theirs hold each value twice."""
    c = config(scaling)
    positions = torch.tensor([[0, 1, 2, 1000], [32767, 40959, 131071, 999_999]])
    cos, sin = rope_tables(positions, *inv_freq(c))
    their_cos, their_sin = theirs(c)(torch.zeros(1), positions)
    assert cos.shape == sin.shape == (8, 64) and cos.dtype == torch.float32
    for ours, other in ((cos, their_cos), (sin, their_sin)):
        assert torch.equal(ours.repeat(1, 2).view(2, 4, 128), other)


@pytest.mark.parametrize("scaling", [None, YARN])
def test_positions_up_to_a_million(scaling):
    """Against fp64: the angle is one fp32 product, so it is off by at most its half ulp, 2^-24 of itself, and by what
    the frequency itself is off; cos and sin add about an ulp."""
    positions = torch.tensor([0, 1, 4095, 131_072, 262_143, 999_999, 1_000_000])
    frequencies, factor = inv_freq(config(scaling))
    angles = positions.double()[:, None] * frequencies.double()
    cos, sin = rope_tables(positions, frequencies, factor)
    bound = angles * 2.0**-24 + 2.0**-22
    for got, want in ((cos, angles.cos()), (sin, angles.sin())):
        assert ((got.double() - want * factor).abs() <= bound * factor).all()
    assert cos[0].eq(factor).all() and sin[0].eq(0).all()


def test_rotation_depends_on_the_difference_of_positions_only():
    """q at 1,000,000 against k at 999,990 as q at 10 against k at 0, as far as fp32 angles allow."""
    from qwen3_kernels import qk_norm_rope

    q, k, w = torch.randn(2, 1, 128), torch.randn(2, 1, 128), torch.ones(128)
    frequencies, factor = inv_freq(config())

    def scores(at_q, at_k):
        tables = [rope_tables(torch.tensor([p]), frequencies, factor) for p in (at_q, at_k)]
        rotated_q = qk_norm_rope(q, k, w, w, *tables[0])[0]
        rotated_k = qk_norm_rope(q, k, w, w, *tables[1])[1]
        return (rotated_q * rotated_k).sum(-1)

    torch.testing.assert_close(scores(1_000_000, 999_990), scores(10, 0), rtol=0, atol=0.5)
    torch.testing.assert_close(scores(1010, 1000), scores(10, 0), rtol=0, atol=2e-3)
    assert (scores(20, 0) - scores(10, 0)).abs().max() > 1


def test_module_keeps_frequencies_in_fp32():
    """Through .to(bfloat16), to_empty and a move between devices; and they are no part of a checkpoint."""
    expected = inv_freq(config(YARN))[0]
    model = Qwen3(config(YARN))
    assert "inv_freq" not in model.state_dict()
    for moved in (model, model.to(torch.bfloat16), model.half().float(), model.to("meta").to_empty(device="cpu")):
        assert torch.equal(moved.inv_freq, expected)
    with torch.device("meta"):
        assert Qwen3(config(YARN)).to_empty(device="cpu").inv_freq.equal(expected)
