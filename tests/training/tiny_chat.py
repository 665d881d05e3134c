"""A tiny model in a folder as the post-training stages take it."""

import pytest

from qwen3_model import load
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import train_bpe

VOCAB_SIZE = 307  # bytes, the chat format's 26 tokens, and all merges that the words below give


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_bpe(["user assistant system /think /no_think\n\n"] * 50, VOCAB_SIZE, path)
    return path


@pytest.fixture
def tokenizer(vocabulary):
    from qwen3_model.tokenizer import Tokenizer

    return Tokenizer.from_file(vocabulary)


def small(**changes):
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 10_000,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "initializer_range": 0.1,
    }
    return Qwen3Config(**(sizes | changes))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}


@pytest.fixture
def model():
    return Qwen3(small()).init_weights(0)


@pytest.fixture
def model_folder(tmp_path, model, tokenizer):
    load.save(model, tmp_path / "start")
    tokenizer.save(tmp_path / "start" / "tokenizer.json")
    return tmp_path / "start"
