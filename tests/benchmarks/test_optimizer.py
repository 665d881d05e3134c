"""The suite `optimizer`, with AdamW's kernel under Triton's interpreter."""

import pytest
import torch

from benchmarks.harness import Settings
from benchmarks.suites import optimizer as suite

SHAPES = [torch.Size(s) for s in ((40, 12), (70, 30), (16,), (5, 33))]


def compare(kind, monkeypatch):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr("training.adamw.runs", lambda device: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(device, turns=2, seconds=0.1)
    return suite.compare("case", suite.KINDS[kind], SHAPES, True, settings, {"copy_gbps": 10.0}, lambda text: None)


@pytest.mark.parametrize("kind, size, torch_too", [
    ("bf16", 14, True), ("bf16 stochastic", 14, False), ("bf16, fp32 moments", 22, False), ("fp32 masters", 30, True),
])
def test_every_kind_is_right_and_timed(kind, size, torch_too, monkeypatch):
    rows = compare(kind, monkeypatch)
    assert [r.impl for r in rows] == ["ours", "torch"][: 1 + torch_too]
    for row in rows:
        assert row.error is None and row.turns == 2 and row.mode == "step"
        assert row.tbps == pytest.approx(size * sum(s.numel() for s in SHAPES) / row.ms * 1e-9)
        assert row.pct_of_ceiling == pytest.approx(row.tbps * 1e4)


@pytest.mark.parametrize("kind", suite.KINDS)
def test_a_wrong_step_is_not_timed(kind, monkeypatch):
    right = suite.after_a_step
    monkeypatch.setattr(suite, "after_a_step", lambda w, g, scale: right(w, -g, scale))
    assert all(r.ms is None and "wrong weights" in r.error for r in compare(kind, monkeypatch))
