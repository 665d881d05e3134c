import pytest
import torch

from benchmarks import train_step
from benchmarks.suites import train_step as suite
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3

FOUND = {"ms": [10.0, 12.0, 11.0], "loss": 12.0, "grad_norm": 2.0, "peak_mb": 5.0, "tokens_per_s": 1e5, "mfu_pct": 50.0}


def test_flops_of_the_06b_model():
    """6 x 596,049,920 parameters, and 28 layers of 16 heads of 128 over 4,096 tokens."""
    flops = train_step.flops_per_token(Qwen3Config.from_name("Qwen3-0.6B"), 4096)
    assert flops == 6 * 596_049_920 + 28 * 6 * 16 * 128 * 4096
    frozen = train_step.flops_per_token(Qwen3Config.from_name("Qwen3-0.6B"), 4096, frozen=True)
    assert flops - frozen == 2 * 596_049_920


@pytest.mark.parametrize("args", [["--impl", "ours", "--lora-rank", "-1"], ["--impl", "transformers", "--lora-rank", "8"]])
def test_adapters_are_for_ours(args, capsys):
    with pytest.raises(SystemExit):
        train_step.main(args)
    assert "--lora-rank is" in capsys.readouterr().err


def test_all_implementations_start_from_the_same_weights():
    from transformers import Qwen3Config as HFConfig
    from transformers import Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    ours, theirs = Qwen3(config), Qwen3ForCausalLM(HFConfig(**config.to_dict()))
    for model in (ours, theirs):
        train_step.fill(model)
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    tokens = torch.randint(48, (2, 6))
    torch.testing.assert_close(loss_of(ours, tokens), theirs(input_ids=tokens, labels=tokens).loss)


def loss_of(model, tokens):
    from qwen3_kernels import linear_cross_entropy

    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    return linear_cross_entropy(model(tokens, return_hidden=True), model.head_weight, labels)


def rows(monkeypatch, found):
    monkeypatch.setattr(suite, "run", lambda impl, *args, **kwargs: found(impl))
    return list(suite.rows("cuda", True, ["liger"], {"gemm_bf16_tflops": 700.0}, lambda text: None))


def test_rows(monkeypatch):
    ours, liger, patched = rows(monkeypatch, lambda impl: FOUND)
    assert [r.impl for r in (ours, liger, patched)] == ["ours", "transformers+liger", "transformers+ours"]
    assert (ours.ms, ours.mode, ours.mfu_pct, ours.peak_mb, ours.error) == (11.0, "step", 50.0, 5.0, None)
    assert ours.tflops == pytest.approx(498.5, abs=0.1)


@pytest.mark.parametrize("name, value", [("loss", 12.2), ("grad_norm", 2.1), ("loss", float("nan"))])
def test_a_step_that_computes_something_else_is_not_timed(monkeypatch, name, value):
    _, liger, _ = rows(monkeypatch, lambda impl: FOUND | ({name: value} if "liger" in impl else {}))
    assert liger.ms is None and f"first {name}" in liger.error


def test_a_process_that_fails_is_a_row_with_its_last_line(monkeypatch):
    def found(impl):
        if impl == "ours":
            raise RuntimeError("torch.OutOfMemoryError: no")
        return FOUND

    ours, liger, _ = rows(monkeypatch, found)
    assert "OutOfMemoryError" in ours.error and liger.ms == 11.0
