"""The parity check on tiny shapes: it passes, and every kind of fault makes it fail."""

import json

import pytest
import torch

from benchmarks import parity
from qwen3_model.cache import KVCache
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3


def run(tmp_path, capsys) -> tuple[int, dict, str]:
    status = parity.main(["--quick", "--json", str(tmp_path / "out" / "parity.json")])
    return status, json.loads((tmp_path / "out" / "parity.json").read_text()), capsys.readouterr().out


def failed(report: dict) -> set[str]:
    return {row["check"] for row in report["rows"] if not row["ok"]}


def test_quick_run_holds_all_bounds(tmp_path, capsys):
    status, report, text = run(tmp_path, capsys)
    assert status == 0 and not failed(report) and "all 23 rows hold" in text
    assert report["quick"] and report["device"] == "cpu"
    assert set(report["backends"]["rms_norm"]) == {"float32", "bfloat16"}
    values = {(row["model"][:4], row["check"]): row for row in report["rows"]}
    for model in ("0.6B", "30B-"):
        assert 0 < values[model, "fp32 logits, max"]["value"] < 2e-6
        assert values[model, "bf16 exact against transformers, max"]["value"] == 0
        assert values[model, "bf16 fast, rms error over theirs"]["bound"] == 2
    assert [line for line in text.splitlines() if "fp32 gradients" in line and line.startswith("0.6B")]


def test_a_wrong_weight_fails_in_both_dtypes(tmp_path, capsys, monkeypatch):
    original = parity.ours

    def ours(config, weights, numerics="fast"):
        name = "model.layers.1.self_attn.q_norm.weight"
        return original(config, weights | {name: weights[name] * 1.5}, numerics)

    monkeypatch.setattr(parity, "ours", ours)
    status, report, text = run(tmp_path, capsys)
    assert status == 1 and "rows FAILED" in text and text.count("  FAILED") == len(failed(report)) + 3
    assert failed(report) == {
        "fp32 logits, max", "fp32 gradients, worst rms", "bf16 fast, rms error over theirs",
        "bf16 fast, max error over theirs", "bf16 fast cached, rms error over theirs",
    }


def test_a_wrong_cache_fails_only_when_decoding(tmp_path, capsys, monkeypatch):
    original = KVCache.update
    monkeypatch.setattr(KVCache, "update", lambda self, layer, k, v, *at: original(self, layer, k, v * 1.01, *at))
    status, report, _ = run(tmp_path, capsys)
    assert status == 1 and "fp32 cached against full, max" in failed(report)
    assert not [check for check in failed(report) if "cached" not in check]


def test_nan_and_a_model_that_raises_fail(tmp_path, capsys, monkeypatch):
    """NaN in one gradient only; then the second model raises, and the rows of the first are kept."""
    original = parity.gradients

    def gradients(model, forward, tokens):
        found = original(model, forward, tokens)
        if isinstance(model, Qwen3):
            found["model.norm.weight"] = found["model.norm.weight"] * float("nan")
        return found

    def theirs(config, weights, original=parity.theirs):
        if config.num_experts:
            raise RuntimeError("no room")
        return original(config, weights)

    monkeypatch.setattr(parity, "gradients", gradients)
    monkeypatch.setattr(parity, "theirs", theirs)
    status, report, text = run(tmp_path, capsys)
    assert status == 1 and failed(report) == {"fp32 gradients, worst rms", "not finished"}
    assert "RuntimeError: no room" in text and len(report["rows"]) == 13


def test_full_shapes_are_the_released_ones():
    dense, moe = parity.shapes(quick=False).values()
    assert dense == Qwen3Config.from_name("Qwen3-0.6B")
    assert moe == Qwen3Config.from_name("Qwen3-30B-A3B", num_hidden_layers=4) and moe.num_params() < 3.2e9


def test_weights_are_exact_in_bfloat16_and_shared():
    config = parity.shapes(quick=True)["0.6B"]
    weights = parity.draw(config, "cpu")
    assert all(torch.equal(w, w.bfloat16().float()) for w in weights.values())
    for model in (parity.ours(config, weights), parity.theirs(config, weights)):
        own = dict(model.named_parameters())
        assert own.keys() == weights.keys()
        assert all(own[n].data_ptr() == w.data_ptr() for n, w in weights.items())


def test_rows_without_near_ties_are_chosen(monkeypatch):
    """Of four rows the two with the widest gap between the K-th and the next expert, widest first."""
    config = parity.shapes(quick=True)["30B-A3B, 2 layers"]
    gap = torch.tensor([0.1, 0.3, 0.0, 0.2])

    def model(row, **_):
        logits = torch.arange(8.0).repeat(3, 1)  # experts 7 and 6 are taken, 5 is next
        logits[1, 5] = 6 - gap[row[0, 0]]
        return None, (torch.arange(8.0).repeat(3, 1), logits)

    assert parity.clearest_rows(config, model, torch.arange(4)[:, None].repeat(1, 3), 2)[:, 0].tolist() == [1, 3]


def test_refused_arguments(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        parity.main(["--device", "cuda"])
    assert "--device is cuda, but torch finds no CUDA device" in capsys.readouterr().err
