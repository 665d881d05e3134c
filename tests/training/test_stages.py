"""The three stages over small shards: what the report says of each, and what a run leaves behind."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from qwen3_model import load
from qwen3_model.model import Qwen3
from qwen3_model.tokenizer import Tokenizer, train_bpe
from training import checkpoint, probes
from training.data import cells as cells_module
from training.data import shards as shards_module
from training.data.cells import Cell
from training.data.mixture import open_loader
from training.data.search import Point, Ridge, features, search, shares_by
from training.environment import file_sha256
from training.evaluation import HeldOut
from training.log import read_metrics
from training.moe import MoELoss
from training.pretrain import next_token_loss
from training.recipes import proxies, stage1, stage2, stage3, stages
from training.recipes.proxies import ladder, mixture_search
from training.recipes.stages import SCALES, Paths

SCALE = dataclasses.replace(
    SCALES["tiny"], tokens=(8_000, 4_000, 4_000), seq_len=32, batch_tokens=256, warmup=2, hidden_size=32, layers=2, heads=2, kv_heads=1,
    head_dim=16, intermediate_size=64, eval_tokens=256,
)
CODE, WORDS, HARD = Cell("computing", "code", "zxx", "2"), Cell("society", "news", "en", "1"), Cell("mathematics", "reasoning", "en", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(shards, tokenizer) of three cells with short and long documents; a third as much held out."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    vocabulary = {
        CODE: "def return self if else for in import class x y z = + ( ) :".split(),
        WORDS: "the of a people say that city rain will come today after vote".split(), HARD: "3 4 5 + - = so therefore answer is".split(),
    }
    texts = {c: [" ".join(rng.choices(v, k=k)) for k in [20, 60, 150, 400, 90, 300] * 8] for c, v in vocabulary.items()}
    tokenizer = train_bpe([t for ts in texts.values() for t in ts], 300, folder / "tokenizer.json")
    counts = {}
    for cell, docs in texts.items():
        counts[cell.key] = {}
        for part, own in (("train", docs[12:]), ("held_out", docs[:12])):
            pairs = [(tokenizer.encode(t), len(t)) for t in own]
            index = shards_module.write(
                folder / "shards" / part / cell.key, pairs, vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.token_id("<|endoftext|>"), tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
            )
            counts[cell.key][part] = {"tokens": index.n_tokens, "documents": len(own), "bytes": index.n_bytes}
    (folder / "shards" / cells_module.FILE).write_text(json.dumps(counts))
    return folder / "shards", folder / "tokenizer.json"


@pytest.fixture(scope="module")
def three(data, tmp_path_factory):
    """Results and folders of S1, S2 and S3 in a row."""
    out, init, found = tmp_path_factory.mktemp("stages"), None, {}
    torch.set_num_threads(1)
    for stage in (stage1.stage, stage2.stage, stage3.stage):
        s = stage(SCALE)
        found[s.name] = stages.run(s, SCALE, Paths(*data, out / s.name, init), quiet=True)
        init = out / s.name / "model"
    return found, out


def shares(file, seq_len=32):
    mixture = open_loader(file, seq_len=seq_len, rows=8, seed=0)
    found = Counter()
    for part, share in zip(mixture.parts, mixture.share):
        found[Cell.parse(part.data.path.name).domain] += share
    return mixture, found


def test_each_stage_does_what_the_report_says(three):
    found, out = three
    runs = {n: json.loads((out / n / "train" / "run.json").read_text()) for n in found}
    theta = {n: r["model"]["rope_parameters"]["rope_theta"] for n, r in runs.items()}
    assert theta == {"s1": 10_000, "s2": 10_000, "s3": 1_000_000}
    assert [runs[n]["config"]["seq_len"] for n in runs] == [32, 32, 256] and runs["s3"]["model"]["max_position_embeddings"] == 256
    rates = {n: [r["lr"] for r in read_metrics(out / n / "train") if r["kind"] == "train"] for n in found}
    assert rates["s1"][-1] == SCALE.lr == max(rates["s1"]), "S1 ends at its peak"
    assert rates["s2"][-1] < 0.35 * SCALE.lr and rates["s3"][-1] < 0.1 * SCALE.lr and max(rates["s3"]) <= 0.21 * SCALE.lr
    s1, s2 = (shares(out / n / "mixture.json")[1] for n in ("s1", "s2"))
    assert s2["reasoning"] > 1.5 * s1["reasoning"] and s2["news"] < s1["news"]
    mixture, _ = shares(out / "s3" / "mixture.json", 256)
    long = sum(s for p, s in zip(mixture.parts, mixture.share) if (p.data.lengths[p.documents] >= 128).all())
    assert long == pytest.approx(0.75, abs=1e-3)
    assert all(((n := p.data.lengths[p.documents]) >= 32).all() and ((n >= 128).all() or (n < 128).all()) for p in mixture.parts)


def test_each_stage_starts_from_the_one_before_and_learns(three):
    found, out = three
    losses = [found[n]["held_out"]["loss"] for n in found]
    assert losses[0] < 5.7 - 1 and losses[1] < losses[0], "5.7: the vocabulary's 300 tokens alike"
    for a, b in (("s1", "s2"), ("s2", "s3")):
        end = [r for r in read_metrics(out / a / "train") if r["kind"] == "train"][-1]
        start = [r for r in read_metrics(out / b / "train") if r["kind"] == "train"][0]
        assert start["loss"] < end["loss"] + 1.0
    assert found["s1"]["held_out"].keys() >= {"domain=code", "domain=news", "domain=reasoning", "language=en", "language=zxx"}
    model = load.load(out / "s3" / "model")
    last = checkpoint.latest(out / "s3" / "train" / "checkpoints").load_model("cpu").state_dict()
    assert all(torch.equal(t, last[k]) for k, t in model.state_dict().items()) and model.config.rope_theta == 1_000_000
    assert Tokenizer.from_file(out / "s3" / "model" / "tokenizer.json").vocab_size == 300
    assert set(found["s3"]["probes"]) == {"s3", "before"} and len(found["s3"]["probes"]["s3"]["many-shot"]) == 4


def test_a_finished_stage_is_left_alone(three, data, monkeypatch):
    found, out = three
    monkeypatch.setattr(stages, "train", None)
    assert stages.run(stage1.stage(SCALE), SCALE, Paths(*data, out / "s1"), quiet=True) == found["s1"]


@pytest.mark.parametrize("changed", ["scale.lr", "stage.tokens", "seed", "init", "shards", "factors"])
def test_a_result_with_other_settings_is_refused(three, data, tmp_path, changed):
    scale, paths, seed = SCALE, Paths(*data, three[1] / "s1"), 0
    if changed == "scale.lr":
        scale = dataclasses.replace(scale, lr=1e-3)
    elif changed == "stage.tokens":
        scale = dataclasses.replace(scale, tokens=(9_000, 4_000, 4_000))
    elif changed == "seed":
        seed = 1
    elif changed == "shards":
        (tmp_path / cells_module.FILE).write_text("{}")
        paths = dataclasses.replace(paths, shards=tmp_path)
    elif changed == "init":
        paths = dataclasses.replace(paths, init=three[1] / "s2" / "model")
    else:
        (tmp_path / "search.json").write_text("{}")
        paths = dataclasses.replace(paths, factors=tmp_path / "search.json")
    with pytest.raises(ValueError, match=rf"s1/result.json is of a run with other .*\b{changed}[,;]"):
        stages.run(stage1.stage(scale), scale, paths, seed=seed, quiet=True)


def test_factors_of_a_search_come_on_top(data, tmp_path):
    (tmp_path / "search.json").write_text(json.dumps({"factors": {"domain=code": 10.0, "domain=poetry": 3.0}}))
    s = dataclasses.replace(stage1.stage(SCALE), factors={"domain=code": 0.5})
    plain, _ = stages.mixture(dataclasses.replace(s, factors={}), Paths(*data, tmp_path), 100)
    mixed, record = stages.mixture(s, Paths(*data, tmp_path, None, tmp_path / "search.json"), 100)
    weight = [{Cell.parse(p.path.name).domain: p.weight for p in m.parts} for m in (plain, mixed)]
    ratio = [w["code"] / w["news"] for w in weight]
    assert ratio[1] == pytest.approx(5 * ratio[0]) and record["absent"] == ["domain=poetry"]


@pytest.mark.parametrize("stage", [stage1.stage, stage3.stage])
def test_the_record_has_the_real_passes(data, tmp_path, stage):
    """Also where tokens or long documents are too few for ``max_epochs``."""
    total = sum(cells_module.read(data[0]).values())
    s = dataclasses.replace(stage(SCALE), tokens=10.0 * total)
    found, record = stages.mixture(s, Paths(*data, tmp_path), 4.0)
    found.write(tmp_path / "mixture.json")
    mixed = open_loader(tmp_path / "mixture.json", seq_len=s.seq_len, rows=8, seed=0)
    assert record["passes"] == pytest.approx(max(share * s.tokens / p.n_tokens for p, share in zip(mixed.parts, mixed.share)))
    assert record["passes"] >= 10
    fewer = stages.mixture(dataclasses.replace(s, tokens=total), Paths(*data, tmp_path), 4.0)[1]
    assert fewer["passes"] == pytest.approx(record["passes"] / 10)


def test_experts(data, tmp_path, capsys):
    scale = dataclasses.replace(SCALE, experts=4, experts_per_token=2, expert_width=32, tokens=(4000, 0, 0))
    result = stages.run(stage1.stage(scale), scale, Paths(*data, tmp_path / "a"))
    assert f"at most {result['mixture']['passes']:.1f} passes (max_epochs 4)" in " ".join(capsys.readouterr().out.split())
    assert result["held_out"]["loss"] < 5 and result["active"] < result["parameters"]
    several = dataclasses.replace(scale, micros=2)
    again = stages.run(stage1.stage(several), several, Paths(*data, tmp_path / "b"), quiet=True)
    assert again["held_out"]["loss"] == pytest.approx(result["held_out"]["loss"], rel=0.05)


def test_moe_loss_balances_each_layer_over_the_micro_steps(data):
    """Against softmax and counts of the router's logits."""
    scale = dataclasses.replace(SCALE, experts=4, experts_per_token=2, expert_width=32, initializer_range=0.3)
    model = Qwen3(dataclasses.replace(scale.model(300, 270), router_aux_loss_coef=0.5)).init_weights(0)
    batches = [open_loader(data[0] / "train" / c.key, seq_len=32, rows=4, seed=0).batch(0) for c in (CODE, WORDS)]
    probs = [torch.stack(model(b.tokens, cu_seqlens=b.cu_seqlens, return_router_logits=True)[1]).double().softmax(-1) for b in batches]
    counts = [torch.nn.functional.one_hot(p.topk(2).indices, 4).sum((1, 2)) for p in probs]

    def want(i, count):  # mean over layers of E sum f P
        share = 2 * count / count.sum(1, keepdim=True)
        return next_token_loss(model, batches[i]).item() + 128 * 0.5 * (4 * (share * probs[i].mean(1)).sum(1).mean()).item()

    loss = MoELoss(micros=2)
    expected = [want(0, counts[0]), want(1, counts[0] + counts[1])]
    assert abs(expected[1] - want(1, counts[1])) > 1e-2, "it makes a difference"
    for _ in range(2):  # a new step begins from nothing
        assert [loss(model, b).item() for b in batches] == pytest.approx(expected, rel=1e-5)
    loss(model, batches[0]).backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_held_out_losses_add_up(three, data):
    model = load.load(three[1] / "s1" / "model")
    found = HeldOut(data[0], seq_len=32, rows=4, labels=("domain", "language"))(model)
    tokens = cells_module.read(data[0], "held_out")
    total = sum(tokens.values())
    assert found["loss"] == pytest.approx(sum(found[f"domain={c.domain}"] * n for c, n in tokens.items()) / total)
    english = sum(n for c, n in tokens.items() if c.language == "en")
    assert found["language=en"] == pytest.approx(
        sum(found[f"domain={c.domain}"] * n for c, n in tokens.items() if c.language == "en") / english)


# ---- probes ------------------------------------------------------------------------------------------------------------


class Copier:
    """Says what followed the last place with the same three tokens; knows nothing else."""

    head_weight = torch.zeros(1)

    def __init__(self, vocab, window=10**9):
        self.vocab, self.window = vocab, window

    def __call__(self, tokens, return_hidden):
        row = tokens[0].tolist()
        logits = torch.zeros(1, len(row), self.vocab)
        for i in range(3, len(row)):
            for j in range(i - 1, max(2, i - self.window), -1):
                if row[j - 2 : j + 1] == row[i - 2 : i + 1]:
                    logits[0, i, row[j + 1]] = 8.0
                    break
        return logits

    def head(self, hidden):
        return hidden


def test_needles_are_found_by_a_model_that_looks(data):
    tokenizer = Tokenizer.from_file(data[1])
    hay = tokenizer.encode("the city will come after rain today and so on " * 60)
    options = {"lengths": (100, 200), "depths": (0.1, 0.9), "trials": 2}
    found = probes.needle(Copier(300), tokenizer, hay, **options)
    assert set(found) == {(100, 0.1), (100, 0.9), (200, 0.1), (200, 0.9)}
    assert all(f.gain > 1 for f in found.values()) and found[200, 0.1].accuracy == 1
    near = probes.needle(Copier(300, window=60), tokenizer, hay, **options)
    assert near[200, 0.1].gain < 0.2 and near[200, 0.1].accuracy == 0 and near[200, 0.9].gain > 1, "a short memory shows"
    with pytest.raises(ValueError, match="haystack has"):
        probes.needle(Copier(300), tokenizer, hay[:50], **options)
    with pytest.raises(ValueError, match="length 20 is too short"):
        probes.needle(Copier(300), tokenizer, hay, lengths=(20,), depths=(0.5,))


def test_shots_help_a_model_that_looks(data):
    found = probes.many_shot(Copier(300), Tokenizer.from_file(data[1]), shots=(0, 4, 16), trials=4)
    assert found[0].gain == 0 and found[4].gain > 0.5 and found[0].accuracy == 0 < found[4].accuracy

    class Former:  # knows that digits come, not which
        head_weight, head = torch.zeros(1), staticmethod(lambda hidden: hidden)

        def __call__(self, tokens, return_hidden):
            return torch.where(torch.arange(300) < 40, 5.0, 0.0).expand(1, tokens.shape[1], 300) * (tokens.shape[1] > 20)

    form = probes.many_shot(Former(), Tokenizer.from_file(data[1]), shots=(0, 16), trials=4)
    assert abs(form[16].gain) < 1e-5, "the form alone is no gain"


# ---- mixture search and ladder -----------------------------------------------------------------------------------------


def made_up_loss(share):
    """Each domain's loss falls with its share; reasoning also needs code."""
    part = shares_by(share, "domain")
    return {f"domain={d}": 3 * (w + 0.02) ** -0.15 for d, w in part.items() if d != "reasoning"} | {
        "domain=reasoning": 2 * (part["reasoning"] + 0.02) ** -0.1 * (part["code"] + 0.02) ** -0.3}


def test_the_search_finds_a_better_mixture_and_resumes(data, tmp_path):
    cells, calls = cells_module.read(data[0]), []

    def proxy(name, share, seed):
        calls.append(name)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return made_up_loss(share)

    options = {"runs": 16, "out": tmp_path, "checks": 1, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        search(cells, proxy, **options)
    result = search(cells, proxy, **options)
    assert len(calls) == 1 + 16 + 2 and sorted(calls).count("proxy-03") == 1, "what was done is not done again"
    best, natural = result["measured"]["best"][0], result["measured"]["natural"][0]
    assert best < natural and result["predicted"]["best"] == pytest.approx(best, rel=0.02)
    code = shares_by({Cell.parse(k): w for k, w in result["shares"]["best"].items()}, "domain")["code"]
    assert code > 0.4, "code helps two domains"
    errors = result["regression"]
    assert all(e["leave-one-out error"] < 0.5 * e["spread"] for e in errors.values())


@pytest.mark.parametrize(
    "changes, words", [({"seed": 1}, "seed, shares"), ({"settings": {"tokens": 2}}, "tokens"), ({"spread": 0.4}, "shares")], ids=str)
def test_losses_of_another_search_are_refused(data, tmp_path, changes, words):
    options = {"runs": 5, "out": tmp_path, "checks": 1, "quiet": True, "settings": {"tokens": 1}}
    first = search(cells_module.read(data[0]), lambda name, share, seed: made_up_loss(share), **options)
    with pytest.raises(ValueError, match=f"proxy-00.json is of a run with other .*{words};"):
        search(cells_module.read(data[0]), None, **options | changes)
    assert search(cells_module.read(data[0]), None, **options) == first


def test_points_give_every_label_vector_a_weight():
    cells = {CODE: 900, WORDS: 300, HARD: 50}
    factors = Point({"code": 0.0, "news": 1.0, "reasoning": -1.0}, slope=0.2, evenness=0.5).factors(cells)
    assert factors["domain=news"] == pytest.approx(2.718, abs=1e-3) and factors["language=zxx"] == 1.0
    assert factors["language=en"] == pytest.approx((350 / 900) ** -0.5)
    assert factors["educational_value=4"] / factors["educational_value=1"] == pytest.approx(1.822, abs=1e-3)
    assert features({CODE: 0.5, HARD: 0.5})["educational value"] == pytest.approx(3.0)


def test_leave_one_out_is_what_it_says():
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [{"a": x, "b": y} for x, y in rng.normal(size=(12, 2))]
    losses = np.exp([[0.3 * r["a"] - 0.2 * r["b"] + 0.05 * rng.normal()] for r in rows])
    whole = Ridge.fit(rows, losses, penalty=0.0)
    missed = [np.log(Ridge.fit(rows[:i] + rows[i + 1 :], np.delete(losses, i, 0), penalty=0.0)([rows[i]])[0, 0] / losses[i, 0]) for i in range(12)]
    assert whole.error[0] == pytest.approx(np.sqrt(np.mean(np.square(missed))), rel=1e-6)
    with pytest.raises(ValueError, match="3 runs"):
        Ridge.fit(rows[:3], losses[:3])


def test_real_proxies_and_a_real_ladder_run(data, tmp_path):
    result = mixture_search(*data, tmp_path / "search", runs=5, tokens=1500, hidden=32, layers=1, seq_len=32, batch_tokens=128, quiet=True)
    assert len(result["proxies"]) == 5 and len(result["measured"]["best"]) == 2
    assert all(2 < x < 6 for r in result["measured"].values() for x in r)
    options = {"sizes": ((32, 1), (64, 1)), "lengths": (1000, 4000), "rates": (5e-3, 2e-2), "batches": (128,), "seq_len": 32, "quiet": True}
    runs = ladder(*data, tmp_path / "ladder", **options)
    assert len(runs) == 8 and len({r.params for r in runs}) == 2 and ladder(*data, tmp_path / "ladder", **options) == runs
    for changes, words in (({"seed": 1}, "seed"), ({"seq_len": 16}, "seq_len")):
        with pytest.raises(ValueError, match=f"h32-l1-t1000-r0.005-b128.json is of a run with other {words};"):
            ladder(*data, tmp_path / "ladder", **options | changes)
    with pytest.raises(ValueError, match="proxy-00.json is of a run with other tokens;"):
        mixture_search(*data, tmp_path / "search", runs=5, tokens=1600, hidden=32, layers=1, seq_len=32, batch_tokens=128, quiet=True)
    best = {n: min(r.loss for r in runs if r.tokens == n) for n in (1000, 4000)}
    assert best[4000] < best[1000]


@pytest.mark.parametrize("at_the_end, words", [(False, "step 2: .* gradient norm nan"), (True, "held-out loss is nan")])
def test_a_proxy_that_diverges_stops_the_run(data, tmp_path, monkeypatch, at_the_end, words):
    if at_the_end:
        def spoilt(config, *_, **__):
            model = Qwen3(config).init_weights(0)
            model.model.norm.weight.data.fill_(float("nan"))
            return model

        monkeypatch.setattr(proxies, "train_small", spoilt)
    options = {"sizes": ((32, 1),), "lengths": (1024,), "rates": (1e38,), "batches": (128,), "seq_len": 32, "quiet": True}
    with pytest.raises(FloatingPointError, match=words):
        ladder(*data, tmp_path, **options)
    assert [f.name for f in tmp_path.iterdir()] == ["mixture.json"], "no loss is kept"


def test_options(capsys):
    with pytest.raises(SystemExit) as stop:
        stages.command(stage1.stage, "stage1", "S1", ["--shards", "a", "--tokenizer", "b", "--out", "c", "--epochs", "3"])
    assert stop.value.code == 2 and "--epochs" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit):
        stages.command(stage1.stage, "stage1", "S1", ["--shards", "a", "--tokenizer", "b", "--out", "c", "--scale", "huge"])
    with pytest.raises(ValueError, match="expected at least a row of 32 tokens"):
        small = dataclasses.replace(SCALE, batch_tokens=16)
        stages.config_of(stage1.stage(small), small, Paths(*map(Path, "abc")), seed=0, device="cpu")
