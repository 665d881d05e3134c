"""The patch under real trainers: transformers' Trainer, TRL's SFT and GRPO trainers, FSDP2 on two processes."""

import json
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from processes import Python
from tiny_hf import make, parametrize_kind

from qwen3_kernels.integrations import transformers as integration
from qwen3_kernels.integrations.transformers import apply, revert

datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")
os.environ.setdefault("WANDB_DISABLED", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COMMON = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1, learning_rate=1e-3,
    report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
)


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch):
    """transformers 4.57 leaves the precision of one trainer in the environment, where the next one finds it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(125)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts(n: int = 16) -> list[str]:
    generator = torch.Generator().manual_seed(2)
    words = [torch.randint(0, 125, (4 + k % 9,), generator=generator).tolist() for k in range(n)]
    return [" ".join(f"w{i}" for i in row) for row in words]


def history(trainer, *keys: str) -> list[list[float]]:
    trainer.train()
    rows = [[row[key] for key in keys] for row in trainer.state.log_history if keys[0] in row]
    assert len(rows) == 3
    return rows


@pytest.fixture
def counted(monkeypatch):
    """Calls of the fused head and loss, and of attention with norm and RoPE, in one op or in two."""
    seen = {"linear_cross_entropy": 0, "attention_op": 0, "qk_norm_rope": 0}

    def count(name, *counted_as):
        function = getattr(integration, name)

        def counting(*args, **kwargs):
            for each in counted_as:
                seen[each] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(integration, name, counting)

    for name in seen:
        count(name, name)
    count("qk_norm_attention", "attention_op", "qk_norm_rope")
    return seen


def check_same(run, counted, *used: str) -> None:
    """The same numbers step after step: without the patch, with it before construction, with it on the instance."""
    plain = run(make)
    assert len({row[0] for row in plain}) > 1 and not any(counted.values())

    def instance():
        model = make()
        apply(model)
        return model

    for build, patch in ((make, apply), (instance, lambda: None)):
        patch()
        torch.testing.assert_close(torch.tensor(run(build)), torch.tensor(plain), rtol=2e-4, atol=2e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainers wrap the instance, which stays as it is
            revert()
        assert all(counted[name] for name in used), counted
        for name in counted:
            counted[name] = 0


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_trainer(precision, counted, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer()(t)["input_ids"][:4] for t in texts())]
    data = datasets.Dataset.from_list(rows)

    def run(build):
        args = TrainingArguments(output_dir=str(tmp_path), bf16=precision == "autocast", **COMMON)
        return history(Trainer(model=build(), args=args, train_dataset=data), "loss", "grad_norm")

    if precision == "fp32":
        check_same(run, counted, "linear_cross_entropy", "attention_op", "qk_norm_rope")
        return
    plain = run(make)
    apply()
    patched = run(make)
    torch.testing.assert_close(torch.tensor(patched), torch.tensor(plain), rtol=2e-2, atol=2e-2)
    assert counted["linear_cross_entropy"] == 6


def test_trainer_evaluates_with_logits(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer()(t)["input_ids"][:4] for t in texts())]
    data = datasets.Dataset.from_list(rows)
    model = make()
    apply(model)
    shapes = []
    args = TrainingArguments(output_dir=str(tmp_path), **COMMON)
    trainer = Trainer(model=model, args=args, eval_dataset=data,
                      compute_metrics=lambda out: shapes.append(out.predictions.shape) or {})
    assert trainer.evaluate()["eval_loss"] > 0
    assert shapes == [(16, 4, 128)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft(packing, counted, tmp_path):
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"text": t} for t in texts()])

    def run(build):
        args = trl.SFTConfig(output_dir=str(tmp_path), max_length=24, packing=packing, bf16=False, **COMMON)
        trainer = trl.SFTTrainer(model=build(), args=args, train_dataset=data, processing_class=tokenizer())
        return history(trainer, "loss", "entropy", "grad_norm")

    used = ["qk_norm_rope"] + (["attention_op"] if packing else [])
    check_same(run, counted, *used)  # TRL has a fused head of its own


def test_sft_lora(counted, tmp_path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    data = datasets.Dataset.from_list([{"text": t} for t in texts()])

    def run(build):
        torch.manual_seed(0)
        args = trl.SFTConfig(output_dir=str(tmp_path), max_length=24, bf16=False, **COMMON)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        trainer = trl.SFTTrainer(
            model=build(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=lora
        )
        return history(trainer, "loss", "grad_norm")

    check_same(run, counted, "qk_norm_rope")


def test_grpo(counted, tmp_path):
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"prompt": t} for t in texts()])

    def reward(completions, **kwargs):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def run(build):
        sizes = dict(num_generations=2, max_completion_length=6)
        args = trl.GRPOConfig(output_dir=str(tmp_path), bf16=False, **sizes, **COMMON)
        trainer = trl.GRPOTrainer(model=build(), args=args, train_dataset=data, processing_class=tokenizer(),
                                  reward_funcs=reward)
        return history(trainer, "grad_norm", "loss", "reward", "entropy")

    check_same(run, counted, "qk_norm_rope")


def test_trl_after_its_trainer_is_made_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"text": t} for t in texts()])
    args = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **COMMON)
    model = make()
    trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
    with pytest.raises(RuntimeError, match=r"forward of the model \(Qwen3ForCausalLM\) was replaced by code in .*trl"):
        apply(model)
    assert apply(model, linear_cross_entropy=False).patched["rms_norm"]["Qwen3RMSNorm"] == 9


@pytest.mark.parametrize(
    "version, noted",
    [("0.29.1", True), ("1.6.0", True), ("1.14.2", True), ("1.14rc1", True), ("1.15.0.dev0", False), ("2.0", False)],
)
def test_a_trl_that_reads_logits_is_noted(version, noted, monkeypatch):
    """What it does with the patch is a TypeError; seen with 1.6 and 1.14."""
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(__version__=version))
    model = make()
    notes = " ".join(apply(model).notes)
    assert (f"the SFTTrainer of trl {version} reads the logits" in notes) == noted
    assert "trl" not in " ".join(apply(model, linear_cross_entropy=False).notes)
    monkeypatch.delitem(sys.modules, "trl")
    assert "trl" not in " ".join(apply(model).notes)


@parametrize_kind
def test_fsdp2_equals_one_process(kind, tmp_path):
    worker = Path(__file__).with_name("fsdp2_worker.py").read_text()
    store, out = f"file://{tmp_path}/store", tmp_path / "out.json"
    ranks = [Python("-c", worker, str(rank), store, kind, str(out)) for rank in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-3000:]
    found = json.loads(out.read_text())
    for case, error in found.items():
        assert error < 1e-5, f"{case}: relative error {error}"
    assert len(found) == 2
