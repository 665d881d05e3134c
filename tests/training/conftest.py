import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_model.config import Qwen3Config
from training.config import Config
from training.data import shards

ROOT = Path(__file__).resolve().parents[2]
VOCAB, END = 64, 63


@pytest.fixture
def model_config():
    return Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rope_theta=10_000, max_position_embeddings=64, tie_word_embeddings=True,
    )


@pytest.fixture
def make_data(tmp_path):
    """make_data(lengths) writes documents of random tokens with these lengths (end-of-text not counted); with
    ``counting``, of ids that rise by one from a random start, which can be learnt."""

    def make(lengths, name="data", seed=0, counting=False, **options):
        rng = np.random.default_rng(seed)
        docs = [((rng.integers(END) + np.arange(n)) % END if counting else rng.integers(0, END, n), 3 * n) for n in lengths]
        shards.write(tmp_path / name, docs, vocab_size=VOCAB, end_of_text=END, **options)
        return tmp_path / name

    return make


@pytest.fixture
def run_folder(tmp_path, make_data, model_config):
    """A folder with data, held-out data and the config.json of a tiny model, for runs of the trainer."""
    make_data([37, 5, 80, 1, 16, 22, 60, 9] * 6, "train", counting=True)
    make_data([30, 11, 50], "held_out", seed=1, counting=True)
    (tmp_path / "model.json").write_text(json.dumps(model_config.to_dict()))
    return tmp_path


@pytest.fixture
def make_config(run_folder):
    def make(out="run", **changes):
        settings = {
            "steps": 12, "seq_len": 16, "rows": 4, "lr": 1e-2, "warmup": 2, "device": "cpu", "dtype": "float32",
            "log_every": 3, "eval_every": 5, "save_every": 4, "tensorboard": False, "model": str(run_folder / "model.json"),
        }
        return Config(
            data=run_folder / "train", eval_data=run_folder / "held_out", out=run_folder / out, **(settings | changes)
        )

    return make


@pytest.fixture
def trainer_command():
    """The command line of the trainer for a Config."""

    def command(config):
        args = [sys.executable, "-m", "training.pretrain"]
        for name, value in vars(config).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                args.append(flag if value else "--no-" + flag[2:])
            elif value is not None:
                args += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        return args

    return command


@pytest.fixture
def adamw_kernel(monkeypatch):
    """AdamW's kernel runs, without a GPU under Triton's interpreter; with one, on its tensors alone."""
    pytest.importorskip("triton")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr("training.adamw.runs", lambda device: device.type == kind)


@pytest.fixture(params=[False, True], ids=["torch", "kernel"])
def adamw_both(request):
    """Once with torch's steps of AdamW, once with the kernel's."""
    if request.param:
        request.getfixturevalue("adamw_kernel")
