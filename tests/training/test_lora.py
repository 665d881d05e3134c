"""Adapters: what they change, and that PEFT reads them."""

import json

import pytest
import torch
from tiny_chat import MOE, model, model_folder, small, tokenizer, vocabulary  # noqa: F401

from qwen3_model import load
from qwen3_model.model import Qwen3
from training import checkpoint, lora, sft
from training.sft import SFTConfig, fine_tune

TOKENS = torch.arange(24).view(2, 12)


def adapted(config, seed=0):
    """With adapters that do something."""
    model = lora.add(Qwen3(config).init_weights(0), 4, 8.0, seed=seed)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad and name.endswith("_B"):
            p.data.normal_(0, 0.2, generator=g)
    return model


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_new_adapters_change_nothing_and_only_they_learn(changes):
    plain = Qwen3(small(**changes)).init_weights(0)
    want = plain(TOKENS)
    model = lora.add(plain, 4)
    torch.testing.assert_close(model(TOKENS), want, rtol=0, atol=0)
    model(TOKENS).square().mean().backward()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learnt == {n for n, p in model.named_parameters() if p.requires_grad} and all("_A" in n or "_B" in n for n in learnt)
    per_layer = 4 + (2 if changes else 3)  # matrices: gate and up are one where experts are
    assert len(learnt) == 2 * per_layer * 2


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_merge(changes):
    model = adapted(small(**changes))
    want, before = model(TOKENS), {n: p.clone() for n, p in model.named_parameters()}
    with lora.merged(model) as whole:
        assert not any(isinstance(m, (lora.LoRALinear, lora.LoRAExperts)) for m in whole.modules())
        torch.testing.assert_close(whole(TOKENS), want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n in before if n[-2:] in ("_A", "_B")]
    assert (model(TOKENS) - Qwen3(small(**changes)).init_weights(0)(TOKENS)).abs().max() > 1e-2, "the adapters matter"
    torch.testing.assert_close(lora.merge(model)(TOKENS), want, rtol=1e-4, atol=1e-5)


def test_experts_are_not_merged_for_a_step(monkeypatch):
    monkeypatch.setattr(lora.LoRAExperts, "delta", None)
    adapted(small(**MOE))(TOKENS).square().mean().backward()


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_peft_loads_them(tmp_path, changes):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = small(**changes)
    load.save(Qwen3(config).init_weights(0), tmp_path / "base")
    model = adapted(config)
    lora.save(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_round_trip(tmp_path, changes):
    model = adapted(small(**changes))
    lora.save(model, tmp_path / "a")
    again = lora.add(Qwen3(small(**changes)).init_weights(0), 4, 8.0, seed=9)
    lora.load(again, tmp_path / "a")
    assert torch.equal(again(TOKENS), model(TOKENS))
    other = lora.add(Qwen3(small(**changes)).init_weights(0), 2, 8.0)
    with pytest.raises(ValueError, match=r"lora_A.weight is \(\d+, \d+\); expected"):
        lora.load(other, tmp_path / "a")


def test_a_run_with_adapters_resumes_and_saves_both_forms(tmp_path, model_folder, monkeypatch):
    data = tmp_path / "data.jsonl"
    sft.write(data, [[{"role": "user", "content": str(i)}, {"role": "assistant", "reasoning_content": "it is", "content": str(i)}]
                     for i in range(20)])

    def config(out):
        return SFTConfig(start=model_folder, out=tmp_path / out, data=data, steps=4, lr=1e-2, rows=4, save_every=2,
                         lora_rank=4, device="cpu", dtype="float32", tensorboard=False)

    want = load.load(fine_tune(config("straight"), quiet=True)).state_dict()
    start = load.load(model_folder).state_dict()
    assert not want["model.layers.0.mlp.up_proj.weight"].equal(start["model.layers.0.mlp.up_proj.weight"])
    assert want["model.embed_tokens.weight"].equal(start["model.embed_tokens.weight"])
    stored = checkpoint.latest(tmp_path / "straight" / "checkpoints").path
    assert (stored / lora.WEIGHTS).exists() and not (stored / "model.safetensors").exists()
    adapter = json.loads((tmp_path / "straight" / "model" / "adapter" / lora.CONFIG).read_text())
    assert adapter["r"] == 4 and set(adapter["target_modules"]) == set(lora.TARGETS)

    real, calls = sft.cross_entropy, [0]

    def failing(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.raises(KeyboardInterrupt):
        fine_tune(config("broken"), loss_fn=failing, quiet=True)
    got = load.load(fine_tune(config("broken"), quiet=True)).state_dict()
    assert all(want[k].equal(got[k]) for k in want)


def test_bad_use(model, tmp_path):
    with pytest.raises(ValueError, match="rank is 0"):
        lora.add(model, 0)
    with pytest.raises(ValueError, match="no adapters to save"):
        lora.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add(lora.add(model, 2), 2)
