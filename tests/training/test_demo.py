"""The whole path as one command, with models and steps too small to learn anything, and the parts that need a model that has
learnt something replaced; what it learns at its real size is checked by ``make recipe-check``."""

import dataclasses
import json
import re

import pytest

pytest.importorskip("datatrove")

from little import little  # noqa: E402, F401

from qwen3_model.model import Qwen3
from qwen3_model.thinking import chat
from qwen3_model.load import load
from qwen3_model.sampling import SamplingParams
from qwen3_model.tokenizer import Tokenizer, train_bpe
from training import rl
from training.data import shards
from training.recipes import base, demo, export, path
from training.recipes.demo import MODEL, STUDENT, Options
from training.rewards.chains import worked

SMALL = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate_size": 64, "batch_tokens": 256,
         "eval_tokens": 64}
OPTIONS = {
    "raw": base.Raw(problems=40, chains=60, vocabulary=450, workers=1),
    "model": dataclasses.replace(MODEL, tokens=(2000, 2000, 2000), seq_len=32, **SMALL),
    "student": dataclasses.replace(STUDENT, tokens=(0, 2000, 0), seq_len=128, **SMALL),
    "sizes": path.Sizes(
        cold_queries=20, cold_steps=2, rl_steps=2, fusion_rows=8, fusion_steps=2, general_steps=2, off_policy_steps=2, student_steps=2,
        student_rl_steps=2, groups=2, group_size=2, eval_problems=2,
    ),
}


@pytest.fixture
def unlearned(monkeypatch):
    """RL may start from any pass rate, and the teacher is a solver."""
    def solver(model, tokenizer, families, problems, **_):
        return [[*p.messages, {"role": "assistant", "content": p.data["answer"]}
                 | ({"reasoning_content": worked(p.data["chain"])} if p.thinking else {})] for p in problems]

    monkeypatch.setattr(rl, "refusal", lambda episodes, band: "measured")
    monkeypatch.setattr(path, "teacher_data", solver)


@pytest.mark.slow
def test_from_raw_files_to_a_student(little, unlearned, tmp_path):  # noqa: F811
    options = Options(out=tmp_path / "demo", **OPTIONS)
    (results,) = demo.run(options, quiet=True)
    names = [c["claim"] for c in results["checks"]]
    assert [f"held-out loss falls in {s}" for s in ("S1", "S2", "S3", "cold start", "fusion")] == names[-5:]
    assert results["nll"]["S1"][0] > 5.5 and results["nll"]["S2"][0] <= results["nll"]["S1"][1]
    assert results["transformers"]["checked"] and results["transformers"]["max_rel"] < 1e-5
    assert [p for p, _ in results["continued"]] == list(demo.PROMPTS) and len(results["samples"]) == 6
    page = (options.out / "report.html").read_text()
    for part in ("Needle", "Samples in both modes", "held-out loss falls in S3", "thinking tokens allowed", "qk_norm_rope", "xz"):
        assert part in page
    assert page.count("<svg") == 8 and not re.search(r"<script|(src|href)\s*=|url\(|@import", page), "needs no other files"
    assert (options.out / "plots" / "budget.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((options.out / "results.json").read_text())
    assert saved["checks"] == results["checks"]

    folder = options.out / "model"
    reply = chat(load(folder), Tokenizer.from_file(folder / "tokenizer.json"), [{"role": "user", "content": "e3f+2"}],
                 params=SamplingParams(max_tokens=8, seed=1))
    assert reply.usage

    # stopped before the report: what is there is not done again, and the times go on
    (options.out / "report.html").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    (again,) = demo.run(options, quiet=True)
    assert (folder / "model.safetensors").read_bytes() == weights and (options.out / "report.html").exists()
    for key in ("nll", "stages", "budgets", "samples", "continued", "checks"):
        assert again[key] == results[key], key
    assert again["seconds"]["reasoning RL"][0] >= results["seconds"]["reasoning RL"][0]
    with pytest.raises(ValueError, match="options.json is of a run with other model.lr;"):
        demo.run(dataclasses.replace(options, model=dataclasses.replace(options.model, lr=1.0)), quiet=True)


def test_a_claim_that_does_not_hold_is_an_error(monkeypatch, tmp_path):
    def run_seed(options, out, seed, *, quiet):
        return {"seed": seed, "checks": [{"claim": "it learns", "measured": "no", "bound": "yes", "holds": seed != 1}]}

    monkeypatch.setattr(demo, "run_seed", run_seed)
    assert len(demo.run(Options(out=tmp_path, seeds=(0, 1)))) == 2
    assert demo.run(Options(out=tmp_path, seeds=(0, 2), check=True))
    with pytest.raises(RuntimeError, match="seed 1: it learns \\(no; bound yes\\)"):
        demo.run(Options(out=tmp_path, seeds=(0, 1), check=True))


def test_disagreement_with_transformers_is_an_error(tmp_path, model_config, make_data, monkeypatch):
    train_bpe(["some text"], 282, tmp_path / "tokenizer.json")
    model = Qwen3(dataclasses.replace(model_config, vocab_size=282)).init_weights(0)
    export.export(model, tmp_path / "tokenizer.json", tmp_path / "model")
    data = [shards.TokenShards(make_data([70, 80, 90], "a")), shards.TokenShards(make_data([100, 3], "b"))]
    assert export.compare_with_transformers(tmp_path / "model", data)["max_rel"] < 1e-5

    real = export.load.load

    def bent(folder, **options):
        model = real(folder, **options)
        model.model.norm.weight.data *= 1.001
        return model

    monkeypatch.setattr(export.load, "load", bent)
    with pytest.raises(RuntimeError, match="disagrees"):
        export.compare_with_transformers(tmp_path / "model", data)


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--epochs", "3"])
    assert stop.value.code == 2 and "--epochs" in "".join(capsys.readouterr())
    for changes in ({"seeds": ()}, {"seeds": (-1,)}, {"threads": 0}):
        with pytest.raises(ValueError, match="expected"):
            Options(**changes)
    assert all(s.model(1024, 0).num_params() <= 3_000_000 for s in (MODEL, STUDENT))
