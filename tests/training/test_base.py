"""From raw files to a base model, in small."""

import dataclasses
import json
import random
import re
import time

import pytest

pytest.importorskip("datatrove")

from little import little  # noqa: E402, F401
from rich.console import Console

from qwen3_model import load
from training.data import shards
from training.recipes import base, raw
from training.recipes.base import Raw
from training.recipes.clock import Clock
from training.recipes.stages import SCALES

TINY = dataclasses.replace(
    SCALES["tiny"], tokens=(4000, 2000, 2000), lr=1.5e-2, seq_len=32, batch_tokens=256, hidden_size=32, layers=2, heads=2, kv_heads=1,
    head_dim=16, intermediate_size=64, eval_tokens=64,
)
SIZES = Raw(problems=40, chains=60, vocabulary=450, workers=1)


def clock_in(folder):
    return Clock(folder / "seconds.json", Console(quiet=True))


def test_from_raw_files_to_a_base_model(little, tmp_path):
    out = tmp_path / "base"
    clock = clock_in(out)
    results = base.run(out, SIZES, TINY, clock, quiet=True)
    assert list(results["stages"]) == ["s1", "s2", "s3"]
    s1 = results["stages"]["s1"]
    assert s1["held_out"]["loss"] < 4 < s1["held_out before"]["loss"] and "domain=code" in s1["held_out"]
    assert set(results["card"]["tokens by"]["domain"]) == {"code", "documentation", "interface", "reasoning"}
    assert set(results["card"]["tokens by"]["language"]) == {"de", "en", "zxx"}
    assert set(results["card"]["sources"]) == {"code", "docs", "translations", "problems", "chains"}
    assert set(results["card"]["evals"]) == {"eval"} and results["card"]["classifier"]["domain"]["accuracy"] > 0.9
    assert load.load(out / "s3" / "model").config.max_position_embeddings == 256
    assert 0 < results["bits_per_byte"]["this model, after S3"] < 8
    page = "".join(f"<h2>{heading}</h2>{html}" for heading, html in base.sections(out, results))
    assert "Needle" in page and page.count("<svg") == 1 and not re.search(r"<script|(src|href)\s*=|url\(|@import", page)

    paths = base.Paths(out / "data" / "shards", out / "tokenizer.json", out)
    mixtures = [base.stages.mixture(stage(TINY), paths, 4.0)[0] for stage in base.STAGES]
    chains = [sum(p.weight for p in m.parts if p.path.name == "mathematics.reasoning.zxx.3") for m in mixtures]
    assert 0.05 < chains[0] < min(chains[1:]), "S2 and S3 have more of the skill that is built on"

    student = base.student(out, dataclasses.replace(TINY, hidden_size=16, heads=1), quiet=True)
    assert (student / "tokenizer.json").read_bytes() == (out / "s3" / "model" / "tokenizer.json").read_bytes()
    again = base.run(out, SIZES, TINY, clock_in(out), quiet=True)  # what is done is not done again
    assert again == results
    with pytest.raises(ValueError, match="result.json is of a run with other seed;"):
        base.run(out, SIZES, TINY, clock, seed=1, quiet=True)


def test_unigram_is_the_entropy_of_the_tokens(tmp_path):
    shards.write(tmp_path / "a", [([1, 1, 1, 2, 2], 10)], vocab_size=64, end_of_text=3)
    shards.write(tmp_path / "b", [([3], 6)], vocab_size=64, end_of_text=3)
    bits = 3 * 1.4150374992788437 + 2 * 2 + 3 * 1.4150374992788437  # -log2 of 3/8, 2/8, 3/8
    assert base.unigram([shards.TokenShards(tmp_path / n) for n in "ab"]) == pytest.approx(bits / 16)


def test_compressors():
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=60_000)).encode()
    gzip, xz, behind = base.compressed(noise, noise[50_000:]).values()
    assert 4 < gzip < 5 and 4 < xz < 5, "hexadecimal digits hold four bits"
    assert behind < 0.3, "a text that was seen costs next to nothing"


def test_clock_adds_up_over_processes(tmp_path):
    first = clock_in(tmp_path)
    with first("a"):
        pass
    first.seconds["a"] = [10.0, 5.0]
    with first("b"):
        first.beat = 0.01
    with pytest.raises(InterruptedError), first("c"):
        raise InterruptedError
    base.write_json(first.file, first.seconds | {"a": [10.0, 5.0]})
    again = clock_in(tmp_path)
    with again("a"):
        sum(range(10**6))
    wall, cpu = clock_in(tmp_path).seconds["a"]
    assert 10 < wall < 20 and 5 < cpu < 15 and set(again.seconds) == {"a", "b", "c"}
    rows = again.rows()
    assert rows[-1][0] == "all" and float(rows[-1][1]) >= 10


def test_clock_beats_while_a_part_runs(tmp_path):
    clock = Clock(tmp_path / "seconds.json", Console(quiet=True), beat=0.02)
    with clock("a"):
        deadline = time.monotonic() + 10
        while not clock.file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(clock.file.read_text())["a"][0] > 0, "a process that is killed now has lost little"


def test_worked_problems_are_right():
    for seed in range(200):
        for part in raw.problem(random.Random(seed)).split("\n\n"):
            question, reasoning, answer = part.split("\n")
            steps = reasoning.removeprefix("Reasoning: ").rstrip(".").split("; ")
            start = int(re.search(r"has (\d+) ", question)[1])
            for step in steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right) >= 0 and int(left.split()[0]) == start
                start = int(right)
            assert int(answer.removeprefix("Answer: ")) == start and f"{len(steps)}" and "How many" in question


def test_explained_share():
    assert raw.explained("x = 1\n") == 0 and raw.explained("# all\n") > 0.8
    assert 0.4 < raw.explained('"""One\ntwo."""\ny = "short"\n') < 0.6 and raw.explained("def (:\n  '") >= 0


def test_sizes_out_of_range():
    for changes in ({"workers": 0}, {"code_mb": -1}, {"chains": -1}):
        with pytest.raises(ValueError, match="expected"):
            Raw(**changes)


def test_raw_files_of_this_machine(tmp_path):
    sources = raw.gather(tmp_path / "raw", code_bytes=200_000, language_bytes=2_000, problems=10, chains=5)
    assert {s["name"] for s in sources} >= {"code", "docs", "problems", "chains"}
    code = [json.loads(line) for f in sorted((tmp_path / "raw" / "code").glob("*.jsonl")) for line in f.read_text().splitlines()]
    assert 0.2 < sum("labels" in c for c in code) / len(code) < 0.8 and len({c["id"].split("/")[0] for c in code}) > 2
    assert list(raw.sample(tmp_path / "raw"))
