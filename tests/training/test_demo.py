import dataclasses
import json
import re

import pytest
from conftest import END, VOCAB

from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import train_bpe
from training.corpus import Document
from training.data import shards
from training.recipes import demo
from training.recipes.demo import Demo, Recipe

TINY = Recipe(
    corpus_bytes=1_500_000, held_out=0.05, vocab_size=512, hidden_size=64, layers=2, heads=2, kv_heads=1, head_dim=32,
    intermediate_size=128, seq_len=64, rows=8, lr=1e-2, warmup=5,
)


def test_micro_run_from_end_to_end(tmp_path):
    options = Demo(out=tmp_path / "demo", steps=120, device="cpu")
    results = demo.run(options, TINY, quiet=True)
    scores = list(results["bits_per_byte"].values())
    assert scores[0] == results["held_out"]["bits_per_byte"] < scores[1], "beats the unigram model even in 120 steps"
    assert results["held_out"]["tokens"] == results["plan"]["data"]["held_out"]["n_tokens"]
    assert results["transformers"]["checked"] and results["transformers"]["max_rel"] < 1e-5
    assert [p for p, _ in results["samples"]] == list(demo.PROMPTS) and any(t for _, t in results["samples"])

    page = (options.out / "report.html").read_text()
    assert page.count("<svg") == 2 and f"{scores[0]:.4f}" in page and "qk_norm_rope" in page
    assert not re.search(r"<script|(src|href)\s*=|url\(|@import", page), "the report must not need other files"
    assert json.loads((options.out / "results.json").read_text())["bits_per_byte"] == results["bits_per_byte"]

    # stopped before the report: the plan and the trained weights are used again, bit for bit
    (options.out / "report.html").unlink()
    again = demo.run(options, TINY, quiet=True)
    assert again["held_out"] == results["held_out"] and again["samples"] == results["samples"]
    assert "Training" in again["stages"] and not any("Corpus" in stage for stage in again["stages"])


def test_unigram_is_the_entropy_of_the_tokens(tmp_path):
    shards.write(tmp_path / "d", [([1, 1, 1, 2, 2, 3, 3], 16)], vocab_size=VOCAB, end_of_text=END)
    bits = 3 * 1.4150374992788437 + 4 * 2 + 3  # -log2 of 3/8, 2/8, 1/8
    assert demo.unigram(shards.TokenShards(tmp_path / "d")) == pytest.approx(bits / 16)


def test_compressors_use_the_training_text():
    from concurrent.futures import ThreadPoolExecutor
    from random import Random

    noise = "".join(Random(0).choices("0123456789abcdef", k=60_000))
    kept, held = [Document("s", "a", noise)], [Document("s", "b", noise[50_000:])]
    with ThreadPoolExecutor(2) as pool:
        bits = [job.result() for job in demo.compressors(pool, kept, held).values()]
    zlib, zlib_dictionary, xz, xz_behind = bits
    assert 4 < zlib < 5 and 4 < xz < 5, "hexadecimal digits hold four bits"
    assert zlib_dictionary < 0.3 and xz_behind < 0.3, "a text that was seen costs next to nothing"


def test_disagreement_with_transformers_is_an_error(tmp_path, model_config, make_data, monkeypatch):
    train_bpe(["some text"], 282, tmp_path / "tokenizer.json")
    model = Qwen3(dataclasses.replace(model_config, vocab_size=282)).init_weights(0)
    demo.export(model, tmp_path / "tokenizer.json", tmp_path / "model")
    data = shards.TokenShards(make_data([70, 80, 90, 100, 3]))
    assert demo.compare_with_transformers(tmp_path / "model", data)["max_rel"] < 1e-5

    real = demo.load.load

    def bent(path, **options):
        model = real(path, **options)
        model.model.norm.weight.data *= 1.001
        return model

    monkeypatch.setattr(demo.load, "load", bent)
    with pytest.raises(RuntimeError, match="disagrees"):
        demo.compare_with_transformers(tmp_path / "model", data)


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--epochs", "3"])
    assert stop.value.code == 2 and "--epochs" in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match="minutes 0"):
        Demo(minutes=0)
