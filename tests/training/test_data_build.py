import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("datatrove")

from conftest import ROOT
from processes import Python

from qwen3_model.tokenizer import Tokenizer, train_bpe
from training import strict
from training.data import build as builder
from training.data import labels
from training.data.__main__ import main
from training.data.build import Build
from training.data.cells import Cell
from training.data.filters import Quality, eval_texts, normalise, run_hashes
from training.data.shards import TokenShards
from training.files import write_jsonl

WORDS = (
    "the of and to in that is with for as river mountain number proof theorem light energy history people water science "
    "school language machine garden measure question answer because therefore between under again letter music winter"
).split()
GERMAN = (
    "Der alte Mann ging langsam durch den Wald und dachte an die vielen Jahre, die er hier verbracht hatte. Die Bäume waren "
    "hoch und still, und nur der Wind erzählte von früheren Zeiten. Am Abend kehrte er in sein kleines Haus zurück, machte "
    "Feuer und las noch lange in einem Buch über die Geschichte seiner Heimat, bis ihm die Augen zufielen und er schlief. "
)
CHINESE = (
    "今天的天气非常好，我们决定去公园散步。公园里有许多人在跑步、聊天和拍照。孩子们在草地上玩耍，老人们坐在长椅上下棋。中午大家一起吃了饭，"
    "然后参观了附近新开的博物馆，看到了古代的青铜器与书画作品。"
)


def prose(seed, n=120):
    """Sentences of random words: no two seeds are near-duplicates."""
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=12)).capitalize() + f" {rng.randrange(10**6)}." for _ in range(n // 12)]
    return " ".join(sentences)


def inputs(folder):
    """Every format, with what should be dropped. Returns the sources and the evaluation."""
    docs = [prose(i) for i in range(60)]
    near = docs[0].replace("river", "lake", 1)
    write_jsonl(folder / "a" / "one.jsonl", [
        *({"text": t, "labels": {"field": "nature", "domain": "book", "educational_value": 4, "safety": "safe"}} for t in docs[:20]),
        {"text": docs[3]}, {"text": near}, {"text": "This one is too short."}, {"text": "again and again we went to the old school. " * 60},
        {"text": GERMAN}, {"text": CHINESE}, {"text": prose(900) + " " + "Which river runs between the seventh mountain and the old "
                                                      "school under the winter light of Aberfeldy?"},
    ])
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "b").mkdir()
    pq.write_table(pa.table({"content": docs[20:30]}), folder / "b" / "p.parquet")
    for name, extension, wrap in (("c", "txt", "{}"), ("d", "html", "<html><body><nav><a href='/'>Home</a> Menu Login</nav>"
                                                      "<article><h1>Title</h1><p>{}</p></article><footer>Imprint</footer></body></html>")):
        (folder / name).mkdir()
        for i in range(3):
            (folder / name / f"{i}.{extension}").write_text(wrap.format(docs[30 + 10 * (name == "d") + i]))
    (folder / "code").mkdir()
    for i in range(4):
        names = random.Random(i).choices(WORDS, k=40)
        (folder / "code" / f"{i}.py").write_text(f"class C{i}:\n" + "".join(
            f"    def {a}_{b}(self, {c}):\n        return {c} + {d}\n\n" for a, b, c, d in zip(*[iter(names)] * 4)))
    (folder / "code" / "data.py").write_text("x = '" + "ab" * 4000 + "'\n")
    (folder / "f").mkdir()
    pdf(folder / "f" / "paper.pdf", docs[50:52])
    (folder / "f" / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    write_jsonl(folder / "eval.jsonl", [
        {"question": "Which river runs between the seventh mountain and the old school under the winter light of Aberfeldy?", "answer": "The Tay"},
        {"question": "Short?", "answer": "Yes"},
    ])
    kinds = {"a": "jsonl", "b": "parquet", "c": "text", "d": "html", "code": "text", "f": "pdf"}
    return [
        {"name": n, "path": str(folder / n), "format": k}
        | ({"text_key": "content", "labels": {"field": "numbers", "domain": "web"}} if n == "b" else {})
        | ({"kind": "code", "glob": "*.py", "labels": {"field": "computing", "domain": "code", "educational_value": "2"}} if n == "code" else {})
        for n, k in kinds.items()
    ]


def pdf(path, pages):
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(path) as out:
        for text in pages:
            figure = Figure(figsize=(8, 11))
            words = text.split()
            for line in range(0, len(words), 10):
                figure.text(0.05, 0.95 - line / 10 * 0.03, " ".join(words[line : line + 10]), fontsize=9)
            out.savefig(figure)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    sources = inputs(folder)
    train_bpe([prose(i) for i in range(5)], 400, folder / "tokenizer.json")
    config = {
        "out": str(folder / "out"), "tokenizer": str(folder / "tokenizer.json"), "sources": sources, "tasks": 3, "workers": 1,
        "evals": [str(folder / "eval.jsonl")], "held_out": 0.2, "min_words": 20,
    }
    return folder, config


def no_network(*_, **__):
    raise OSError("a socket was opened")


@pytest.fixture(scope="module")
def built(raw):
    folder, config = raw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, address: no_network() if not isinstance(address, (str, bytes)) else
                      socket.socket.__mro__[1].connect(self, address))  # paths: processes of this machine
        builder.run(strict.build(Build, config), quiet=True)
    return folder / "out"


def texts(out, tokenizer):
    """{cell: [documents]} of train and held-out shards."""
    tokenizer = Tokenizer.from_file(tokenizer)
    found = {}
    for path in sorted((out / "shards").glob("*/*")):
        data = TokenShards(path)
        found.setdefault(path.name, []).extend(tokenizer.decode(data.read(d)[:-1].tolist()) for d in range(len(data)))
    return found


def test_what_is_kept_and_where(built, raw):
    found = texts(built, raw[0] / "tokenizer.json")
    everything = [t for docs in found.values() for t in docs]
    assert len(everything) == len(set(everything))
    kept = {i for i in range(60) if any(prose(i)[:200] in " ".join(t.split()) for t in everything)}
    assert kept == {*range(30), 30, 31, 32, 40, 41, 42, 50, 51}, "each format; each document and each page once"
    assert not any("Login" in t or "Imprint" in t for t in everything), "a page's frame is not its text"
    assert not any("Aberfeldy" in t or "too short" in t or "again and again" in t for t in everything)
    assert not any("abab" in t for t in everything) and sum("class C" in t for t in everything) == 4
    assert sum(t == prose(0) or "lake" in t for t in everything) == 1, "of two near-duplicates one stays"
    cells = {Cell.parse(k) for k in found}
    assert {c.language for c in cells} == {"en", "de", "zh", "zxx"}
    assert {(c.field, c.domain, c.educational_value) for c in cells if c.language == "zxx"} == {("computing", "code", "2")}
    given = {c for c in cells if c.field == "nature" and c.domain == "book"}
    assert {c.educational_value for c in given} == {"4"}, "labels that came with a document stay"


def test_the_card_says_what_happened(built):
    card = json.loads((built / "card.json").read_text())
    steps = {s["step"]: s for s in card["steps"]}
    assert steps["language"]["in"] == 27 + 10 + 6 + 5 + 1, "files and lines that hold text"
    assert steps["equal to another"]["dropped"] == 1 and steps["nearly equal to another"]["dropped"] == 1
    assert steps["overlaps an evaluation"]["dropped"] == 1
    assert card["reasons"]["quality"] == {"code_long_lines": 1, "gopher_short_doc": 1, "top_2_gram": 1}
    assert card["evals"]["eval"] == {"items": 2, "too short to check": 1, "runs of words": 19 - 13 + 1, "documents that overlap": 1}
    documents = card["totals"]["train"]["documents"] + card["totals"]["held_out"]["documents"]
    assert documents == steps["language"]["in"] - sum(s["dropped"] for s in card["steps"])
    tokens = sum(TokenShards(p).index.n_tokens for p in (built / "shards").glob("*/*"))
    assert tokens == sum(card["sources"].values()) == sum(card["totals"][p]["tokens"] for p in ("train", "held_out"))
    assert card["labels"]["field_given"] == 20 + 10 + 4 and card["labels"]["field_scored"] > 0
    assert card["classifier"]["domain"]["documents"] == 34
    page = (built / "card.html").read_text()
    assert "overlaps an evaluation" in page and "too short" in page and "<script" not in page


def shard_bytes(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "shards").rglob("*")) if p.is_file()}


def test_a_killed_build_goes_on_to_the_same_bytes(built, raw, tmp_path):
    """A process killed while it works, then one that ends."""
    folder, config = raw
    (tmp_path / "build.json").write_text(json.dumps(config | {"out": str(tmp_path / "out")}))
    command = ["-m", "training.data", "build", "--config", str(tmp_path / "build.json")]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("work/logs/*/completions/00001")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "shards").exists()
    again = Python(*command)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert shard_bytes(tmp_path / "out") == shard_bytes(built)


@pytest.mark.slow
def test_a_build_goes_on_from_any_stage(built, raw, tmp_path):
    """What a kill leaves: output of a task, whole or cut short, without its mark, and nothing of later stages' marks."""
    config = strict.build(Build, raw[1] | {"out": str(tmp_path / "out")})
    wanted, card = shard_bytes(built), json.loads((built / "card.json").read_text())
    for number, stage in enumerate(builder.stages(config)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(built, tmp_path / "out")
        for log in (tmp_path / "out" / "work" / "logs").iterdir():
            later = int(log.name.split("-")[0]) > number
            for mark in sorted((log / "completions").iterdir())[-1 if log.name.endswith(stage.name) else 0 if later else 10**6 :]:
                mark.unlink()
        for cut in sorted((tmp_path / "out" / "work" / stage.name).glob("*.jsonl.gz"))[-1:]:
            cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        builder.run(config, quiet=True)
        assert shard_bytes(tmp_path / "out") == wanted, stage.name
        assert json.loads((tmp_path / "out" / "card.json").read_text()) == card, "counts of tasks done before are in it"


@pytest.mark.slow
def test_workers_do_not_change_the_result(built, raw, tmp_path):
    builder.run(strict.build(Build, raw[1] | {"out": str(tmp_path / "out"), "workers": 2}), quiet=True)
    assert shard_bytes(tmp_path / "out") == shard_bytes(built)


def test_a_task_that_keeps_nothing_does_not_shift_the_others(raw, tmp_path):
    """Later stages find a task's duplicates by its number. Task 1 drops all it reads; there are more tasks than files, too."""
    write_jsonl(tmp_path / "in" / "0.jsonl", [{"text": prose(i)} for i in range(3)])
    write_jsonl(tmp_path / "in" / "1.jsonl", [{"text": "This one is too short."}])
    write_jsonl(tmp_path / "in" / "2.jsonl", [{"text": prose(i)} for i in (10, 10, 11, 12)])
    write_jsonl(tmp_path / "in" / "3.jsonl", [{"text": t} for t in (prose(20), prose(21), prose(20).replace("river", "lake", 1), prose(22))])
    source = {"name": "in", "path": str(tmp_path / "in"), "format": "jsonl"}
    config = raw[1] | {"out": str(tmp_path / "out"), "tasks": 6, "sources": [source], "evals": [], "scorer": "none"}
    builder.run(strict.build(Build, config), quiet=True)
    found = [t for docs in texts(tmp_path / "out", raw[0] / "tokenizer.json").values() for t in docs]
    assert {prose(i) for i in (0, 1, 2, 10, 11, 12, 21, 22)} <= set(found) and len(found) == 9


def test_a_changed_build_or_input_is_refused(built, raw):
    folder, config = raw
    with pytest.raises(ValueError, match="differs in min_words"):
        builder.run(strict.build(Build, config | {"min_words": 21}), quiet=True)
    extra = folder / "c" / "new.txt"
    extra.write_text(prose(77))
    try:
        with pytest.raises(ValueError, match="differs in the content of files, the content of sha256"):
            builder.run(strict.build(Build, config), quiet=True)
    finally:
        extra.unlink()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"min_word": 3}, "min_word is not known; expected min_words?"), ({"held_out": 1.0}, "held_out is 1.0"),
        ({"tasks": 0}, "tasks is 0"), ({"tasks": "3"}, "tasks is '3'; expected int"), ({"sources": []}, "at least one"),
        ({"sources": [{"name": "x", "path": "/nowhere", "format": "text"}]}, "path of source 'x' is /nowhere"),
        ({"sources": [{"name": "x", "path": "/", "format": "doc"}]}, r"sources\[0\].format is 'doc'; expected one of"),
        ({"sources": [{"name": "x", "path": "/", "format": "text", "labels": {"educational_value": "9"}}]}, "expected 0 to 5"),
        ({"sources": [{"name": "x", "path": "/", "format": "synthetic"}]}, "synthetic, but has no endpoint"),
        ({"scorer": "endpoint"}, "judge is not given"), ({"executor": "slurm"}, "time among them"),
        ({"evals": ["/nowhere"]}, "/nowhere does not exist"),
        ({"judge": {"url": "localhost", "model": "m"}}, "url is 'localhost'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_bad_configs(raw, tmp_path, changes, words):
    (tmp_path / "build.json").write_text(json.dumps(raw[1] | changes))
    with pytest.raises(SystemExit, match=words.replace("?", r"\?")):
        main(["build", "--config", str(tmp_path / "build.json")])


def test_nothing_left_is_an_error(raw, tmp_path):
    build = strict.build(Build, raw[1] | {"out": str(tmp_path / "out"), "languages": ["xx"], "scorer": "none"})
    with pytest.raises(ValueError, match="nothing is left to train on"):
        builder.run(build, quiet=True)
    assert not (tmp_path / "out" / "shards").exists()


def test_no_labels_to_fit_on_is_an_error(raw, tmp_path):
    only = [s for s in raw[1]["sources"] if s["name"] == "c"]
    with pytest.raises(ValueError, match="no document came with labels"):
        builder.run(strict.build(Build, raw[1] | {"out": str(tmp_path / "out"), "sources": only}), quiet=True)


def test_slurm_jobs_give_the_same_shards(built, raw, tmp_path, monkeypatch):
    """No Slurm here: sbatch is a script that notes its arguments, and the test runs what it was to run, job by job."""
    import dill

    tool, calls = tmp_path / "bin" / "sbatch", tmp_path / "calls"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\necho Submitted batch job $(wc -l < {calls})\n")
    (tool.parent / "scontrol").write_text("#!/bin/sh\necho one\n")
    for file in tool.parent.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("SLURM_NODELIST", "one")
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))  # Slurm's own logs
    slurm = {"time": "1:00:00", "partition": "cpu"}
    build = strict.build(Build, raw[1] | {"out": str(tmp_path / "out"), "executor": "slurm", "slurm": slurm})
    builder.run(build, quiet=True)
    submitted = [c for c in calls.read_text().splitlines() if "RUN_OFFSET" in c]
    assert len(submitted) == len(builder.stages(build)) == 9 and all("afterok" in c for c in submitted[1:])
    for log in sorted((tmp_path / "out" / "work" / "logs").iterdir()):
        assert "1:00:00" in (log / "launch_script.slurm").read_text()
        for rank in json.loads((log / "ranks_to_run.json").read_text()):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            with open(log / "executor.pik", "rb") as f:
                dill.load(f).run()
    assert shard_bytes(tmp_path / "out") == shard_bytes(built)


def test_classifier_learns_and_reports_honestly(tmp_path):
    rng = random.Random(0)
    maths, law = "theorem proof lemma integral prime".split(), "court judge appeal statute contract".split()
    docs = []
    for i in range(120):
        own = maths if i % 2 else law
        docs.append((" ".join(rng.choices(own + WORDS, k=60)), {"field": "mathematics" if i % 2 else "law", "safety": "safe"}))
    noise = [(prose(i), {"field": rng.choice("ab")}) for i in range(120)]
    classifier, report = labels.Classifier.fit(docs)
    assert report["field"]["accuracy"] > 0.9 > report["field"]["majority"] and report["field"]["documents"] == 120
    assert labels.Classifier.fit(noise)[1]["field"]["accuracy"] < 0.75, "noise cannot be learnt"
    classifier.save(tmp_path / "c.safetensors")
    again = labels.Classifier.load(tmp_path / "c.safetensors")
    unseen = [" ".join(rng.choices(own + WORDS, k=60)) for own in (maths, law, maths)]
    assert [s["field"] for s in again.score(unseen)] == ["mathematics", "law", "mathematics"]
    assert again.score(unseen) == [again.score([t])[0] for t in unseen], "whatever the batch"


def test_labels_that_came_stay_and_others_are_scored():
    from training.data.blocks import Document

    class Scorer:
        def score(self, texts):
            return [{"field": "law", "domain": "web", "safety": "unsafe" if "bomb" in t else "safe"} for t in texts]

    docs = [Document("a", "1", metadata={"labels": {"field": "nature"}}), Document("a bomb", "2", metadata={}),
            Document("a bomb", "3", metadata={"labels": {"safety": "safe"}})]
    assert labels.Label(Scorer()).filter_batch(docs) == [True, (False, "unsafe"), True]
    assert docs[0].metadata["labels"] == {"educational_value": "unknown", "field": "nature", "domain": "web", "safety": "safe"}
    with pytest.raises(ValueError, match=r"has labels \['quality'\]; expected some of"):
        labels.Label(None).filter(Document("a", "1", metadata={"labels": {"quality": 1}, "source": "s"}))


def test_quality_rules_by_kind_and_language():
    from training.data.blocks import Document

    quality = Quality(min_words=20)
    verdict = lambda text, **meta: quality.filter(Document(text, "x", metadata=meta))  # noqa: E731
    code = "for i in range(10):\n    print(i)\n" * 3
    assert verdict(prose(1), language="en") is True
    assert verdict(code, language="en") is not True and verdict(code, kind="code", language="zxx") == (False, "code_short")
    assert verdict(code * 4, kind="code", language="zxx") is True
    assert verdict("2 + 2 = 4", kind="curated", language="en") is True
    assert verdict("#" * 400 + "\n" + "=" * 300, kind="code", language="zxx")[1] in ("code_few_letters", "code_long_lines")
    assert verdict(CHINESE, language="zh") is True and verdict(GERMAN, language="de") is True
    assert verdict(GERMAN, language="en")[1] == "gopher_enough_stop_words"


def test_normalise():
    assert normalise("\ufeffe\u0301a \t\r\nb\x00\x07\rc\n\n\n\n\n\nd\n") == "\u00e9a\nb\nc\n\n\nd"


def test_runs_of_words_ignore_case_and_marks(tmp_path):
    a, b = "One, two; THREE four.", "zero one two three four five"
    assert run_hashes(a, 4) <= run_hashes(b, 4) and len(run_hashes(b, 4)) == 3 and not run_hashes("one two", 4)
    (tmp_path / "e.txt").write_text("first item\n\nsecond item\n")
    assert len(eval_texts(tmp_path / "e.txt")) == 2
