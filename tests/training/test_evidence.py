"""The pieces of the evidence: worked solutions, packs, and (slow) the whole chain with a model too small to learn."""

import json
import random
import re
import shutil
import tarfile
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from qwen3_model.tokenizer import Tokenizer, train_bpe
from training import environment
from training.data import shards
from training.data.cells import Cell
from training.environment import file_sha256
from training.files import write_json
from training.filters import Candidate, query_reason, response_reason
from training.recipes import evidence, evidence_bench, evidence_data, evidence_pack, evidence_report
from training.recipes.evidence import Evidence
from training.recipes.worked import expression, solution
from training.rewards import Reply, find, reserved
from training.rewards.families import GENERAL, NO_THINK, SCORERS, make
from training.rewards.workers import Pool

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def pool():
    with Pool(SCORERS, workers=1) as pool:
        yield pool


def test_worked_solutions_are_right(pool):
    """By the families' own scorers; all but those that are too hard have some, and what is thought is never empty."""
    solved = set()
    for name, family in make([*GENERAL, "chain"], pool).items():
        pairs = []
        for seed in range(12):
            problem = find(family, 7919 * seed, min(seed // 6, family.max_level))
            if turns := solution(problem):
                assert all(t["reasoning_content"] for t in turns if t["role"] == "assistant")
                pairs.append((problem, Reply(tuple(turns), turns[-1]["content"], turns[-1]["reasoning_content"])))
        assert all(score == 1.0 for score in family.scores(pairs)), name
        solved |= {name} if pairs else set()
    assert solved >= set(evidence_bench.FAMILIES)


@pytest.mark.parametrize("name, level, ends", [
    ("gym/knights_knaves", 0, r"(.*: \w+ says what is (true|false), no\n)*.*: all fits"),
    ("gym/calendar_arithmetic", 0, r"2022: 5; \w+: \d; 5 \+ \d \+ \d+ = \d+; (\d+ % 7 = \d; )?\d \w+day"),
    ("gym/time_intervals", 1, r".*(days|hours) -?\d+ - -?\d+.* = .*; [-\d]+( days|:).*"),
    ("gym/lcm", 0, r".*; gcd \d+; \d+ / \d+ = \d+(; \d+ \* \d0* = \d+(; \d+ \+ \d+ = \d+)?)+"),
])
def test_worked_thinking_is_in_steps(name, level, ends, pool):
    """That are true, every equation of them."""
    family, solved = make([name], pool)[name], 0
    for seed in range(40):
        if turns := solution(find(family, 7919 * seed, level)):
            thought, solved = turns[0]["reasoning_content"], solved + 1
            assert re.fullmatch(ends, thought), thought
            for left, right in re.findall(r"([-\d][-+*/% \d]*) = (-?\d+)", thought):
                assert eval(re.sub(r"\b0+(?=\d)", "", left)) == int(right), thought
    assert solved > 30


def test_worked_thinking_ends_with_the_answer():
    assert expression("-( -3 * -4 ) + 2", "-10") == "-3 * -4 = 12; -(12) = -12; -12 + 2 = -10"


def test_worked_solutions_pass_the_filters(pool):
    """Of every family with solutions most do, else the cold start would lack it."""
    for name, family in make(evidence_bench.FAMILIES, pool).items():
        problems = [find(family, 7919 * seed, 0) for seed in range(16)]
        solved = [(p.messages[-1]["content"], turns) for p in problems if len(turns := solution(p) or ()) == 1]
        if name.removesuffix(NO_THINK) != "instructions" and solved and not name.endswith(NO_THINK):
            kept = [query_reason(q) or response_reason(Candidate(q, t["reasoning_content"], t["content"], True), min_thinking=4)
                    for q, [t] in solved]
            assert kept.count(None) > len(kept) / 2, (name, kept)


def test_a_wrong_solution_is_not_right(pool):
    family = make(["gym/gcd"], pool)["gym/gcd"]
    problem = find(family, 1, 0)
    assert family.scores([(problem, Reply((), f"{int(problem.data['answer']) + 1}", "x"))]) == [0.0]


def test_queries_that_need_no_thinking(pool, monkeypatch, tmp_path):
    """Right and at once; not right after other words, nor wrong, nor cut off."""
    train_bpe(["user assistant 0 1 2 3 4 5 6 7 8 9"], 282, tmp_path / "tokenizer.json")
    tok = Tokenizer.from_file(tmp_path / "tokenizer.json")
    family = make(["gym/gcd"], pool)["gym/gcd"]
    problems = [find(family, seed, 0) for seed in range(4)]
    answers = [p.data["answer"] for p in problems]
    said = [answers[0], f"so {answers[1]}", f"{int(answers[2]) + 1}", answers[3]]

    def run(asked):
        assert [r.max_tokens for r in asked] == [len(tok.encode(a)) + 8 for a in answers]
        return [SimpleNamespace(ids=[*tok.encode(t), tok.stop_ids[0]], finish_reason="length" if i == 3 else "stop")
                for i, t in enumerate(said)]

    monkeypatch.setattr(evidence_bench, "opened", lambda folder, device: (None, tok))
    bench = SimpleNamespace(families=lambda names: make(names, pool), roller=lambda *_: SimpleNamespace(run=run))
    assert evidence_bench.answered_directly(bench, tmp_path, problems, "cpu") == {problems[0].messages[-1]["content"]}


def test_the_funnel_of_the_cold_start(pool, monkeypatch, tmp_path):
    """All filters run: what a model answers at once and what is near a held-out problem is gone, and both are counted."""
    names = ("gym/basic_arithmetic", "gym/gcd", "gym/syllogism", "instructions")
    quick = set()

    def answered(bench, folder, problems, device):
        quick.update(p.messages[-1]["content"] for p in problems if p.family == "gym/gcd")
        return quick

    monkeypatch.setattr(evidence_bench, "FAMILIES", names)
    monkeypatch.setattr(evidence_bench, "answered_directly", answered)
    with closing(evidence_bench.Bench(evidence.TINY, 1)) as bench:
        bench.sizes = replace(evidence.TINY, eval_problems=64)
        talks, counts = evidence_bench.cold_talks(bench, 240, tmp_path, "cpu")
    funnel, kept = counts["funnel"], counts["conversations"]
    assert tuple(funnel) == evidence_bench.FUNNEL and funnel["query: needs no thinking"] == len(quick) == 60
    assert 0 < funnel["near a validation item"] < 20 and funnel["query: several parts"] == 0
    assert kept["gym/gcd"] == 0 and kept["gym/syllogism"] > 50 and sum(kept.values()) == len(talks)
    assert not quick & {t["messages"][0]["content"] for t in talks}


def test_a_stage_tells_its_whole_time_and_its_commit(monkeypatch, tmp_path):
    """Over all processes that worked on it."""
    def stopped(self, minutes):
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "unpacked", lambda data, out: (tmp_path, tmp_path))
    monkeypatch.setenv("QWEN3_COMMIT", "c0ffee")
    monkeypatch.setattr(environment, "ROOT", tmp_path)  # no repository
    for work in (stopped, lambda self, minutes: time.sleep(0.3) or {"x": 1}):
        monkeypatch.setattr(evidence.Course, "do_control", work)
        course = evidence.Course(Evidence(tmp_path), SimpleNamespace(sizes=evidence.TINY), Console(quiet=True))
        with nullcontext() if work is not stopped else pytest.raises(KeyboardInterrupt):
            course.run("control", 1.0)
    found = json.loads((tmp_path / "dense" / "control.json").read_text())
    assert found["x"] == 1 and 0.6 <= found["seconds"] < 5
    assert found["commit"] == "c0ffee" and found["date"] == date.today().isoformat() and found["torch"] == torch.__version__


def test_the_plan_fits_into_25_minutes():
    """With what each stage took beside its minutes on an H100."""
    seconds = 0.0
    for model in evidence_report.MODELS:
        for name, r in evidence_report.read(RESULTS / model).items():
            stage = next(n for n in evidence.NAMES if n.lower() == name.split("-")[0])
            seconds += 60 * evidence.H100.minutes[stage] + max(0.0, r["seconds"] - 60 * r["minutes"])
    assert 20 * 60 < seconds < 25 * 60


def test_problems_without_thinking(pool):
    """The same problem with the flag; held out on the same side."""
    families = make(["gym/gcd", f"gym/gcd{NO_THINK}"], pool)
    for seed in range(40):
        a, b = (f.problem(seed, 0) for f in families.values())
        assert b.messages[0]["content"] == f"{a.messages[0]['content']} {NO_THINK}" and not b.thinking and b.data == a.data
        assert b.family == f"gym/gcd{NO_THINK}" and reserved(a) == reserved(b)


def test_texts_of_problems_hold_none_that_is_held_out():
    """Also chat format without think blocks, in documents of several lengths."""
    texts = list(evidence_data.problem_texts(150, seed=3))
    assert all(t.startswith("<|im_start|>") and t.endswith("<|im_end|>") and "<think>" not in t for t in texts)
    again = list(evidence_data.problem_texts(150, seed=3))
    assert texts == again
    sizes = [d.count("<|im_start|>user\n") for d in evidence_data.documents(iter(texts), random.Random(0))]
    assert sum(sizes) >= 150 and len(set(sizes)) > 1


def test_plain_text_of_a_manual_page():
    page = '.TH LS 1\n.SH NAME\nls \\- list\n.SH OPTIONS\n.TP\n.BR \\-a ", " \\-\\-all\ndo \\fBnot\\fR ignore\n.\\" a comment\n.nf\n'
    assert evidence_data.roff(page) == "NAME\nls - list\n\nOPTIONS\n\n-a, --all\ndo not ignore"
    assert evidence_data.roff(".Dd today\n.Sh NAME\n") == ""


def test_work_of_a_token():
    """Against the plain count: 6 per weight of the layers and the head, 12 T/2 per layer and width of the heads."""
    config = evidence.H100.dense.model(8192, 0)
    weights = 9 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536) + 8192 * 512
    assert evidence.flops(config, 1000.0) == pytest.approx(6 * weights + 6 * 9 * 512 * 1000, rel=1e-3)
    assert 30e6 <= config.num_params() <= 60e6
    moe = evidence.H100.moe.model(8192, 0)
    assert moe.num_params(active=True) == pytest.approx(config.num_params(), rel=0.01)
    assert evidence.H100.student.model(8192, 0).num_params() == pytest.approx(10e6, rel=0.1)


def test_a_pack_goes_on_elsewhere(tmp_path):
    """In parts, without checkpoints; what is there already stays; a missing one is named."""
    out = tmp_path / "out"
    for file, text in (("dense/cold.json", "{}"), ("dense/cold/model/model.safetensors", "x" * 5000), ("dense/s1/model/x", "y"),
                       ("dense/cold/metrics.jsonl", "m"), ("dense/cold/checkpoints/1/model/x", "no"), ("data/shards/x", "no")):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(text)
    (out / "dense/s1/model/noise").write_bytes(np.random.default_rng(0).bytes(4000))
    parts = evidence_pack.pack(out, tmp_path / "p.tar", ["cold", "s1"], part=1000)
    assert len(parts) > 3 and all(p.stat().st_size <= 1000 for p in parts)
    there = tmp_path / "there"
    (there / "dense").mkdir(parents=True)
    (there / "dense/cold.json").write_text("mine")
    evidence_pack.unpack(tmp_path / "p.tar", there)
    found = {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}
    assert found == {"dense/cold.json", "dense/cold/model/model.safetensors", "dense/s1/model/x", "dense/s1/model/noise",
                     "dense/cold/metrics.jsonl"}
    assert (there / "dense/cold.json").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="nothing.tar"):
        evidence_pack.unpack(tmp_path / "nothing.tar", there)


def test_a_stage_whose_start_is_missing(tmp_path):
    archive = small_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="s1.*run stage s1 first"):
        evidence.run(Evidence(tmp_path / "out", stage="S2", data=archive, tiny=True), quiet=True)


def small_data(folder):
    """Worked problems and made-up prose, in two cells, long documents among them."""
    texts = list(evidence_data.documents(evidence_data.problem_texts(1500, 0), random.Random(0), sizes=(2, 2, 10, 30)))
    prose = [" ".join(random.Random(i).choices("the a model reads writes one two long text of words".split(), k=40 * (1 + i % 40)))
             for i in range(150)]
    train_bpe([*texts, *prose], 700, folder / "tokenizer.json")
    tok, cells = Tokenizer.from_file(folder / "tokenizer.json"), {}
    for cell, docs in ((Cell("mathematics", "reasoning", "en", "4"), texts), (Cell("computing", "documentation", "en", "3"), prose)):
        for part, chosen in (("train", docs[10:]), ("held_out", docs[:10])):
            index = shards.write(
                folder / "shards" / part / cell.key, zip(tok.encode_batch(chosen), (len(t.encode()) for t in chosen)),
                vocab_size=tok.vocab_size, end_of_text=tok.token_id("<|endoftext|>"), tokenizer_sha256=file_sha256(folder / "tokenizer.json"))
            cells.setdefault(cell.key, vars(cell) | {})[part] = {"tokens": index.n_tokens, "documents": index.n_documents, "bytes": index.n_bytes}
    write_json(folder / "shards" / "cells.json", cells)
    with tarfile.open(folder / "data.tar.xz", "w:xz") as tar:
        for name in ("shards", "tokenizer.json"):
            tar.add(folder / name, name)
    return folder / "data.tar.xz"


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "evidence"


def test_the_page_shows_the_committed_results(tmp_path):
    evidence.run(Evidence(RESULTS, report=tmp_path / "RECIPE.md"), quiet=True)
    assert (tmp_path / "RECIPE.md").read_text() == (ROOT / "docs" / "RECIPE.md").read_text(), (
        f"stale: python -m training.recipes.evidence --out {RESULTS.relative_to(ROOT)} --report docs/RECIPE.md")
    for name in re.findall(r"\]\((.*\.png)\)", (tmp_path / "RECIPE.md").read_text()):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and (ROOT / "docs" / name).stat().st_size < 150_000


def test_the_page_says_what_does_not_hold(tmp_path):
    """The sentences follow the results: those of a copy in which all went wrong say so."""
    def page():
        evidence.run(Evidence(tmp_path, report=tmp_path / "RECIPE.md"), quiet=True)
        return (tmp_path / "RECIPE.md").read_text()

    def change(name, edit):
        file = tmp_path / f"{name}.json"
        found = json.loads(file.read_text())
        edit(found)
        file.write_text(json.dumps(found))

    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
    good = page()
    assert "student is ahead of RL" in good and "not fall" not in good and "said right in up to 0.0 %" in good
    assert "general RL gains" in good and "fusion costs" in good
    change("dense/s2", lambda r: r["held_out"].update(loss=9.5))
    change("dense/s3", lambda r: r["probes"]["s3"]["needle"][0].update(accuracy=2 / 3))
    change("dense/distill", lambda r: [m.update(reward=0.0) for m in r["on_policy"]["measured"].values()])
    change("dense/general", lambda r: [m.update(reward=0.0) for m in r["think"].values()])
    change("dense/general", lambda r: r["budget"]["curve"][-1].update(reward=0.0))
    change("dense/cold", lambda r: r["funnel"].update({"query: needs no thinking": 0}))
    change("dense/cold", lambda r: r.update(conversations={"gym/gcd": 3, "gym/lcm": 0}, commit="c0ffee"))
    bad = page()
    assert "| query: needs no thinking | 0 |" in bad and "without a conversation: gym/lcm.\n" in bad
    assert "commit c0ffee, ecac7872f772adf65c49561af77ac32996f25d0e, date 2026-11-26;" in bad
    assert "query: needs no thinking" not in good and "of the process that finished it" in good
    assert "Pre-training, dense: the held-out loss does not fall in S2." in bad and "falls in S1 9.418 to 1.928, S3" in bad
    assert "student is not ahead of RL" in bad and "distillation (0.0) is not ahead of RL" in bad and "up to 66.7 %" in bad
    assert "general RL costs 46.3 points" in bad and "largest fall on the way is 51.1 points" in bad
    assert "gym/chain_sum" in bad.split("Never learnt")[1].splitlines()[0]
    (tmp_path / "dense" / "control.json").unlink()
    shutil.rmtree(tmp_path / "moe")
    assert "Without a cold start" not in page() and "moe" not in page().split("## Pre-training")[1].split("Not by the first")[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_the_whole_chain(tmp_path, monkeypatch, model):
    """Every stage runs, is not done twice, goes into a pack from which another folder goes on, and into the report."""
    archive, out = small_data(tmp_path), tmp_path / "out"
    quick = replace(evidence.TINY, minutes={k: v / 4 for k, v in evidence.TINY.minutes.items()})
    monkeypatch.setattr(evidence, "TINY", quick)
    options = {"data": archive, "tiny": True, "workers": 1, "model": model}
    evidence.run(Evidence(out, pack=tmp_path / "p.tar", keep=("cold",), **options), quiet=True)
    found = evidence_report.read(out / model)
    assert found.keys() == {"s1", "s2", "s3", "cold", "rl-0", "fusion", "general", "distill", "control"}
    assert found["s2"]["held_out"]["loss"] < 6.5 and found["s3"]["seq_len"] == 2048
    assert tuple(found["cold"]["funnel"]) == evidence_bench.FUNNEL and found["cold"]["funnel"]["kept"] > 0
    assert "too hard" in found["control"]["refusal"] and found["s3"]["without_think"] == 0
    assert len(found["general"]["families"]) >= 20 and found["general"]["steps"] >= 1
    before = (out / model / "s1.json").stat().st_mtime_ns
    evidence.run(Evidence(out, stage="S1", **options), quiet=True)
    assert (out / model / "s1.json").stat().st_mtime_ns == before

    there = tmp_path / "there"
    evidence.run(Evidence(there, stage="rl", seed=1, start=tmp_path / "p.tar", **options), quiet=True)
    assert json.loads((there / model / "rl-1.json").read_text())["steps"] >= 1
    evidence.run(Evidence(out, report=tmp_path / "RECIPE.md"), quiet=True)
    text = (tmp_path / "RECIPE.md").read_text()
    assert f"| {model}, S3 |" in text and "nan" not in text and "over all processes that worked on it" in text
