"""The recipes of post-training: their data, their settings and the report's parts."""

import random
from pathlib import Path

import pytest
from tiny_chat import model, model_folder, tokenizer, vocabulary  # noqa: F401

from training.distill import DistillConfig
from training.filters import Validation
from training.log import FILE
from training.recipes import cold_start, distill, fusion, general_rl, path, raw, reasoning_rl
from training.rewards.chains import Chain, worked
from training.rl import RLConfig, held_out
from training.sft import SFTConfig, encode

A, B, C = Path("a"), Path("b"), Path("c")


def problems(count, level=2, flag=""):
    return [Chain(flag).problem(i, level) for i in range(count)]


def chain_texts(count):
    return [raw.chain(random.Random(i)) for i in range(count)]


def asked(texts):
    return {t.split("\n")[0].removesuffix("<|im_end|>") for text in texts for t in text.split("<|im_start|>user\n")[1:]}


def test_worked_chains():
    texts = chain_texts(600)
    chats = [t for t in texts if t.startswith("<|im_start|>user\n")]
    assert texts == chain_texts(600) and 320 < len(chats) < 400 and not any("think" in t for t in texts)
    for t in chats[:40]:
        for part in t.split("<|im_start|>user\n")[1:]:
            chain = part.split("\n")[0].removesuffix("<|im_end|>")
            assert f"\n{worked(chain)}\n\n{worked(chain)[-1]}<|im_end|>" in part
    assert {len(chain) for chain in asked(chats)} == {5, 8, 11, 14, 17}
    assert {t.count("<|im_start|>user") for t in chain_texts(3000)} == {0, 1, 4, 16}  # 97, 2 and 1 % of the chats
    sums = [t for t in texts if t not in chats]
    for line in "\n".join(sums).split("\n"):
        left, right = line.split("=")
        assert eval(left) % 10 == int(right)
    assert len(sums) > 80


def test_no_stage_trains_on_a_held_out_problem():
    seen = asked(chain_texts(1500))
    seen |= {path.draw(what, 0, i, name, 3).data["chain"] for what in ("cold", "off") for i in range(600) for name in path.FAMILIES}
    assert not seen & {p.data["chain"] for level in path.LEVELS for p in held_out(path.FAMILIES, level, 64)}


def test_cold_start_keeps_the_good_responses():
    candidates = cold_start.chain_candidates(problems(150), seed=0)
    kept, counts = cold_start.conversations(candidates, Validation([problems(1)[0].messages[0]["content"]]))
    assert {"kept", "wrong answer", "repetition", "guesswork", "inconsistent", "language mixing", "near a validation item"} <= counts.keys()
    right = {p.messages[0]["content"]: p.data for p in problems(150)}
    assert 100 < len(kept) < 150, "one of a query"
    for user, reply in kept:
        data = right[user["content"]]
        assert (reply["reasoning_content"], reply["content"]) == (worked(data["chain"]), data["answer"])
    assert problems(1)[0].messages[0]["content"] not in {c[0]["content"] for c in kept}


def test_fusion_conversations_can_be_trained_on(tokenizer):
    thinking = [[*p.messages, {"role": "assistant", "reasoning_content": worked(p.data["chain"]), "content": "1"}] for p in problems(40)]
    direct = [[*p.messages, {"role": "assistant", "content": "1"}] for p in problems(40)]
    made = fusion.conversations(thinking, direct, 3)
    assert made == fusion.conversations(thinking, direct, 3) and len(made) == 80
    found = [s for c in made for s in encode(tokenizer, c)]
    assert 85 < len(found) < 130, "some have two turns"
    empty = tokenizer.encode("<think>\n\n</think>\n\n")
    replies = [[t for t, w in zip(s.tokens, s.weights) if w] for s in found]
    assert 0.35 < sum(r[: len(empty)] == empty for r in replies) / len(replies) < 0.65


def test_recipes_are_configs():
    assert isinstance(cold_start.recipe(A, B, C), SFTConfig) and isinstance(fusion.recipe(A, B, C), SFTConfig)
    assert isinstance(distill.off_policy(A, B, C), SFTConfig) and isinstance(distill.on_policy(A, B, C), DistillConfig)
    rl, general = reasoning_rl.recipe(A, B), general_rl.recipe(A, B, steps=7)
    assert isinstance(rl, RLConfig) and len(rl.families) >= 20 and len(general.families) >= 20 and general.steps == 7
    with pytest.raises(TypeError, match="stepz"):
        reasoning_rl.recipe(A, B, stepz=7)


def test_the_budget_cuts_the_thinking(model, tokenizer, monkeypatch):
    seen = []
    real = path.generate

    def spy(*args, **options):
        done = real(*args, **options)
        seen.append((options["guides"][0], done))
        return done

    monkeypatch.setattr(path, "generate", spy)
    curve = path.budget_curve(model, tokenizer, 4, levels=(0,))
    assert curve["budgets"] == [0, 3, 6, 9, 12] and len(curve["mean"]) == 5 and curve["count"] == 4
    ends = tokenizer.encode("\n</think>\n\n")
    for budget, (guide, done) in zip(curve["budgets"], seen):
        assert guide([1] * (2 + budget)) == ends and guide([1] * (1 + budget)) == ()
        assert guide([1, tokenizer.end_think_id] + [1] * budget) == ()
        for c in done:
            if c.forced:
                assert c.ids[2 + budget :][: len(ends)] == ends


def test_plots(tmp_path):
    path.png(tmp_path / "p.png", {"a": [(0, 1.0), (1, 2.0)], "none": []}, "x", "y")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG" and [p.name for p in tmp_path.iterdir()] == ["p.png"]


def results(**changes):
    """What `checks` reads, of a run in which all holds."""
    def stage(reward, no_thinking=0.0):
        return {"reward": reward, "no_thinking": no_thinking}

    base = {
        "stages": {
            "cold start": {"chain": stage(0.4)}, "reasoning RL": {"chain": stage(0.6)},
            **{n: {"chain/think": stage(0.7), "chain/no_think": stage(0.3, 1.0)} for n in ("fusion", "general RL")},
        },
        "budgets": {"mean": [0.2, 0.4, 0.39, 0.7], "count": 256}, "invariant": True, "nll": {"fusion": (1.0, 0.5)},
        "no_cold_start": "sampled pass rate 0.000 over 256 conversations. too hard",
    }
    return base | changes


@pytest.mark.parametrize("changes, broken", [
    ({}, []),
    ({"budgets": {"mean": [0.2, 0.6, 0.4, 0.7], "count": 256}}, ["accuracy rises with the thinking budget"]),
    ({"nll": {"fusion": (1.0, 1.1)}}, ["held-out loss falls in fusion"]),
    ({"no_cold_start": "it started"}, ["reasoning RL refuses a model without cold start"]),
    ({"stages": results()["stages"] | {"reasoning RL": {"chain": {"reward": 0.49}}}}, ["reasoning RL raises the held-out reward"]),
    ({"stages": results()["stages"] | {"fusion": {"chain/think": {"reward": 0.2}, "chain/no_think": {"reward": 0.3, "no_thinking": 0.98}}}},
     ["/no_think has 0 thinking tokens after fusion", "/think beats /no_think after fusion"]),
])
def test_claims_can_fail(tmp_path, changes, broken):
    for name in ("rl", "general", "student_rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text('{"kind": "train", "step": 1, "max_gap": 0.0, "sampled_entropy": 0.1}\n')
    assert [c["claim"] for c in path.checks(results(**changes), tmp_path) if not c["holds"]] == broken
    (tmp_path / "general" / FILE).write_text('{"kind": "train", "step": 1, "max_gap": 1e-6, "sampled_entropy": 0.1}\n')
    found = path.checks(results(**changes), tmp_path)
    assert "max |d log p| of sampler and trainer" in [c["claim"] for c in found if not c["holds"]]
