"""Every command takes a folder as Hugging Face has it: random weights of the true shape of Qwen3-0.6B, saved by transformers, with
the published vocabulary. Adapters keep what is trained small; pre-training starts from a model of two of its layers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from training import distill, pretrain, rl, sft
from training.config import Config
from training.core import command
from training.data import shards
from training.environment import file_sha256
from training.log import read_metrics

sys.path.append(str(Path(__file__).resolve().parents[1] / "model"))
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "qwen3_configs.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(layers) -> a folder."""
    from qwen_data import qwen3_tokenizer

    found = {}

    def make(layers):
        if layers not in found:
            folder = found[layers] = tmp_path_factory.mktemp(f"qwen3-{layers}")
            config = transformers.Qwen3Config(**(json.loads(CONFIGS.read_text())["Qwen3-0.6B"]["config"] | {"num_hidden_layers": layers}))
            config.layer_types = config.layer_types[:layers] if getattr(config, "layer_types", None) else None
            with torch.device("meta"):
                model = transformers.Qwen3ForCausalLM(config)
            model = model.to_empty(device="cpu").to(torch.bfloat16)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, 0.02, generator=generator)
            model.tie_weights()
            model.save_pretrained(folder)
            qwen3_tokenizer().save(folder / "tokenizer.json")
        return found[layers]

    return make


def flags(**settings):
    return [str(x) for k, v in settings.items() for x in (f"--{k.replace('_', '-')}", *(v if isinstance(v, tuple) else (v,)))]


COMMON = {"steps": 1, "device": "cpu", "dtype": "float32", "lora_rank": 2, "lr": 1e-3, "warmup": 0, "tokens_per_pack": 512}
ROLLOUTS = COMMON | {"groups": 1, "group_size": 2, "max_tokens": 4, "max_prompt": 160, "slots": 2, "workers": 1, "families": ("chain",)}


def trained(out):
    """The one record, and the merged model's shape as transformers reads it."""
    (record,) = [r for r in read_metrics(out) if r["kind"] == "train"]
    config = transformers.AutoConfig.from_pretrained(out / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (1024, 28, 151_936)
    assert (out / "model" / "adapter" / "adapter_model.safetensors").exists()
    shutil.rmtree(out / "model")  # gigabytes
    return record


def test_fine_tuning(published, tmp_path):
    talk = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "reasoning_content": "3+4=7", "content": "7"}]
    sft.write(tmp_path / "data.jsonl", [talk])
    args = flags(start=published(28), out=tmp_path / "out", data=tmp_path / "data.jsonl", rows=1, max_tokens=256, **COMMON)
    command(sft.SFTConfig, sft.fine_tune, "training.sft", "", ["--no-tensorboard", *args])
    assert 10 < trained(tmp_path / "out")["loss"] < 14, "about ln 151,936 for random weights"


def test_reinforcement_learning(published, tmp_path):
    args = flags(start=published(28), out=tmp_path / "out", pass_band=(0, 1), probe_groups=1, **ROLLOUTS)
    command(rl.RLConfig, rl.reinforce, "training.rl", "", ["--no-tensorboard", *args])
    assert trained(tmp_path / "out")["reward"] == 0, "random weights write no think block"


def test_distillation(published, tmp_path):
    args = flags(start=published(28), teacher=published(28), out=tmp_path / "out", **ROLLOUTS)
    command(distill.DistillConfig, distill.distill, "training.distill", "", ["--no-tensorboard", *args])
    assert trained(tmp_path / "out")["kl"] == pytest.approx(0, abs=1e-5), "the teacher is the student"


def test_pre_training_goes_on(published, tmp_path):
    folder = published(2)
    shards.write(tmp_path / "data", [(list(range(60)), 200)] * 4, vocab_size=151_936, end_of_text=151_643,
                 tokenizer_sha256=file_sha256(folder / "tokenizer.json"))
    config = Config(data=tmp_path / "data", tokenizer=folder / "tokenizer.json", init=folder, out=tmp_path / "out", steps=1, seq_len=32, rows=1,
                    warmup=0, device="cpu", dtype="float32", optimizer_states="bfloat16", tensorboard=False)
    path = pretrain.train(config, quiet=True)
    assert read_metrics(config.out)[0]["loss"] > 8 and transformers.AutoConfig.from_pretrained(path).vocab_size == 151_936
