"""The sampling kernel draws what plain torch draws."""

import pytest
import torch

from training.draw import draw, draw_fused, draw_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
pytest.importorskip("triton")


@pytest.mark.parametrize("rows, width, dtype, temperature", [
    (6, 5000, torch.float32, 1.0), (5, 307, torch.bfloat16, 0.7), (3, 2048, torch.float32, 1.3), (1, 1, torch.bfloat16, 1.0),
])
def test_the_kernel_draws_the_same(rows, width, dtype, temperature):
    generator = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, width + 3, generator=generator)).to(DEVICE, dtype)[:, :width]  # rows with a stride
    seeds = torch.randint(-(1 << 62), 1 << 62, (rows, 1), generator=generator).to(DEVICE)
    for step in range(4):
        assert torch.equal(draw_fused(logits, seeds + step, temperature), draw_ref(logits, seeds + step, temperature))


def test_a_certain_token_and_an_impossible_one():
    logits = torch.full((4, 600), -50.0, device=DEVICE)
    logits[:, 300], logits[:, 200] = 50.0, float("-inf")
    seeds = torch.arange(4, device=DEVICE)[:, None]
    assert draw_fused(logits, seeds, 1.0).tolist() == [300] * 4
    assert len(set(draw_fused(0 * logits.clamp(min=0), seeds, 1.0).tolist())) == 4, "every seed draws by itself"
    assert torch.equal(draw(logits, seeds, 1.0), draw_ref(logits, seeds, 1.0)) and draw_fused(logits[:0], seeds[:0], 1.0).shape == (0,)
