"""Reinforcement learning: conversations, the state between steps, and that it learns."""

import dataclasses
import math
import statistics

import pytest
import torch
from tiny_chat import model, model_folder, tokenizer, vocabulary  # noqa: F401

from qwen3_model import load
from training import rl
from training.distill import DistillConfig, distill, teacher_data
from training.log import read_metrics
from training.losses import preset
from training.rewards import Problem, Reply, SingleTurn
from training.rewards.tools import PYTHON
from training.rl import RLConfig, draw, held_out, learn, play, raised, reinforce, summary, tilt_advantage, tilted
from training.rollout import invariant


class Length(SingleTurn):
    """A toy that an untrained model can be rewarded for: few tokens before the end."""

    name, max_level = "chain", 3

    def problem(self, seed, level):
        return Problem(self.name, ({"role": "user", "content": "abc"[seed % 3]},), {}, level)

    def score(self, problem, reply):
        return float(len(reply.content) < 12)


@pytest.fixture
def config(tmp_path, model_folder):
    def make(out="run", **changes):
        settings = {
            "start": model_folder, "families": ("chain",), "steps": 4, "lr": 3e-3, "groups": 4, "group_size": 4, "slots": 16,
            "max_tokens": 12, "max_prompt": 40, "probe_groups": 4, "pass_band": (0.0, 1.0), "save_every": 2, "warmup": 0,
            "device": "cpu", "dtype": "float32", "tensorboard": False,
        }
        return RLConfig(out=tmp_path / out, **(settings | changes))

    return make


@pytest.fixture
def ungated(monkeypatch):
    """An untrained model writes no think blocks; here every reply that the toy likes counts."""
    monkeypatch.setattr(rl, "format_gate", lambda ids, **_: 1.0)
    real = rl._continues

    def ended(e, rollout, *rest):
        out = real(e, rollout, *rest)
        e.reply = dataclasses.replace(e.reply, format=1.0)
        return out

    monkeypatch.setattr(rl, "_continues", ended)


def test_it_raises_the_reward(config, ungated):
    """12 steps of a few conversations: replies that end early are rewarded, so more of them do."""
    class Early(Length):
        def score(self, problem, reply):
            return float("a" in reply.content)

    cfg = config(steps=14, lr=1e-2, groups=6, group_size=8)
    reinforce(cfg, families={"chain": Early()}, quiet=True)
    rewards = [r["reward"] for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert statistics.fmean(rewards[-3:]) > statistics.fmean(rewards[:3]) + 0.2, rewards


def test_the_gap_is_measured_and_zero_where_it_can_be(config, ungated, model):
    cfg = config(mini_batches=3)
    reinforce(cfg, families={"chain": Length()}, quiet=True)
    records = [r for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert all(r["max_gap"] == 0.0 if invariant(model) else r["max_gap"] < 1e-4 for r in records)
    assert any(r.get("max_ratio", 1) > 1 for r in records), "later mini-batches are off-policy"
    assert all(k in records[0] for k in ("entropy", "sampled_entropy", "kept_groups", "length", "level/chain", "timeouts"))


def test_a_killed_run_goes_on_in_the_same_bits(config, ungated, monkeypatch):
    families = {"chain": Length()}
    want = load.load(reinforce(config("straight"), families=families, quiet=True)).state_dict()
    real, calls = rl.learn, [0]

    def failing(*args, **options):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(rl, "learn", failing)
    with pytest.raises(KeyboardInterrupt):
        reinforce(config("broken"), families=families, quiet=True)
    monkeypatch.setattr(rl, "learn", real)
    got = load.load(reinforce(config("broken"), families=families, quiet=True)).state_dict()
    assert all(want[k].equal(got[k]) for k in want)


def test_adapters_are_sampled_with_and_learn(config, ungated, model_folder):
    cfg = config(lora_rank=2, lr=1e-2, steps=3)
    folder = reinforce(cfg, families={"chain": Length()}, quiet=True)
    assert all(r["max_gap"] < 1e-4 for r in read_metrics(cfg.out) if r["kind"] == "train"), "the adapters sample, too"
    before, after = (load.load(f).state_dict() for f in (model_folder, folder))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not before[name].equal(after[name]) and (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_experts_are_replayed_in_a_run(config, ungated, tokenizer, tmp_path, lora_rank):
    from tiny_chat import MOE, small

    from qwen3_model.model import Qwen3

    load.save(Qwen3(small(**MOE)).init_weights(0), tmp_path / "mixture")
    tokenizer.save(tmp_path / "mixture" / "tokenizer.json")
    cfg = config(start=tmp_path / "mixture", steps=3, lr=1e-2, lora_rank=lora_rank)
    folder = reinforce(cfg, families={"chain": Length()}, quiet=True)
    assert all(r["max_gap"] < 1e-4 for r in read_metrics(cfg.out) if r["kind"] == "train")
    before, after = (load.load(f).state_dict() for f in (tmp_path / "mixture", folder))
    assert all(not before[k].equal(after[k]) for k in before if "experts" in k), "they learn"


def test_all_general_families_can_be_played(tokenizer):
    """With replies of an untrained model, which are worth nothing."""
    pytest.importorskip("reasoning_gym")
    from tiny_chat import small

    from qwen3_model.model import Qwen3
    from training.rewards.families import GENERAL, SCORERS, make
    from training.rewards.workers import Pool

    model = Qwen3(small(max_position_embeddings=4096)).init_weights(0)
    with Pool(SCORERS, workers=1, deadline=20) as pool:
        families = make(GENERAL, pool)
        problems = [family.problem(3, 0) for family in families.values()]
        found = play(model, tokenizer, families, problems, repeats=1, seed=0, max_tokens=6, max_prompt=3000, slots=8)
    assert len(found) == len(GENERAL) >= 20 and all(e.reward == 0 for e in found)
    assert {e.problem.family for e in found} == set(GENERAL)


def test_it_refuses_what_cannot_be_learnt(config):
    with pytest.raises(RuntimeError, match=r"sampled pass rate 0.000 over 16 conversations \(chain 0.00\); right format .*"
                                           r"groups with different rewards 0.00. Expected a pass rate in \[0.05, 0.95\]; .*too hard"):
        reinforce(config(pass_band=(0.05, 0.95)), quiet=True)


def test_it_refuses_what_is_learnt(config, ungated):
    class Easy(Length):
        def score(self, problem, reply):
            return 1.0

    with pytest.raises(RuntimeError, match="pass rate 1.000 .*too easy"):
        reinforce(config(pass_band=(0.05, 0.95)), families={"chain": Easy()}, quiet=True)


# ---- conversations -----------------------------------------------------------------------------------------------------


class Scripted:
    """In place of the sampler: says what it is told, turn by turn."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.queue, self.max_len, self.prompts = tokenizer, list(turns), [], 10_000, []

    @property
    def busy(self):
        return bool(self.queue)

    def submit(self, request):
        self.queue.append(request)
        self.prompts.append(list(request.prompt))

    def step(self):
        request, text = self.queue.pop(0), self.turns.pop(0)
        ids = self.tokenizer.encode(text)
        reason = "stop" if text.endswith("<|im_end|>") else "length"
        turn = torch.full((len(request.prompt) + len(ids) - 1, 1, 1), len(self.prompts))
        return [rl.Rollout(request, ids, [-0.5] * len(ids), [0.1] * len(ids), reason, turn)]


class Tool(SingleTurn):
    name, turns = "tool", 3

    def problem(self, seed, level):
        return Problem(self.name, ({"role": "user", "content": "6*7?"},), {}, 0, tools=(PYTHON,))

    def respond(self, problem, message):
        return [{"role": "tool", "content": "42<|im_end|>"} for _ in message.get("tool_calls") or ()]

    def score(self, problem, reply):
        return float(reply.content == "42")


CALL = '<think>\nuse it\n</think>\n\n<tool_call>\n{"name": "python", "arguments": {"code": "6*7"}}\n</tool_call><|im_end|>'
ANSWER = "<think>\nit says so\n</think>\n\n42<|im_end|>"


def scripted(monkeypatch, model, tokenizer, turns, **options):
    sampler = Scripted(tokenizer, turns)
    monkeypatch.setattr(rl, "roller_for", lambda *args, **kw: sampler)
    tool = Tool()
    (episode,) = play(model, tokenizer, {"tool": tool}, [tool.problem(0, 0)], repeats=1, seed=0, max_prompt=2000, max_tokens=2000,
                      **options)
    return episode, sampler


def test_turns_of_a_tool(monkeypatch, model, tokenizer):
    e, sampler = scripted(monkeypatch, model, tokenizer, [CALL, ANSWER])
    assert e.reward == 1 and [m["role"] for m in e.messages] == ["assistant", "tool", "assistant"]
    assert e.messages[0]["tool_calls"][0]["arguments"] == {"code": "6*7"}
    written = tokenizer.decode([t for t, m in zip(e.tokens, e.mask) if m])
    assert written == CALL + ANSWER, "only what the model wrote is learnt"
    assert len(e.tokens) == len(e.mask) == len(e.logprobs)
    given = tokenizer.decode(sampler.prompts[1][len(sampler.prompts[0]) :])
    assert given == CALL + (
        "\n<|im_start|>user\n<tool_response>\n42< |im_end|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    ), "the tool cannot speak the chat format"
    assert sampler.prompts[1][: len(sampler.prompts[0])] == sampler.prompts[0]
    first = len(sampler.prompts[0]) + len(e.turns[0]) - 1
    assert e.experts[:, 0, 0].tolist() == [1] * first + [2] * (len(e.tokens) - 1 - first), "each token's first routing"
    assert e.sample(1.0, 1.0).experts is e.experts


def test_a_conversation_that_runs_out_gets_nothing(monkeypatch, model, tokenizer):
    assert scripted(monkeypatch, model, tokenizer, [ANSWER.removesuffix("<|im_end|>")])[0].reward == 0
    e, _ = scripted(monkeypatch, model, tokenizer, [CALL, CALL, CALL])
    assert e.reward == 0 and len(e.turns) == 3, "no more turns than the family's"


def test_no_reward_for_a_right_answer_in_a_wrong_format(monkeypatch, model, tokenizer):
    e, _ = scripted(monkeypatch, model, tokenizer, ["42<|im_end|>"])
    assert e.score == 0 and e.reward == 0 and e.reply.content == "42"


def test_a_prompt_that_is_too_long_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="a problem of tool has .* tokens; expected at most max_prompt 10"):
        play(model, tokenizer, {"tool": Tool()}, [Tool().problem(0, 0)], repeats=1, seed=0, max_prompt=10)


# ---- the state between steps ------------------------------------------------------------------------------------------


def episodes(rewards, level=1):
    out = []
    for group, members in enumerate(rewards):
        for r in members:
            e = rl.Episode(Problem("chain", (), {}, level), group, [1, 2, 3, 4], 2, [0, 0, 1, 1], [0, 0, -1.0, -1.0], [0.5, 0.5])
            e.reply, e.score = Reply((), "", None, 1.0), r
            out.append(e)
    return out


def test_levels_rise_when_the_frontier_is_mastered():
    families = {"chain": Length()}

    def after(steps, levels, level=1):
        levels, recent = {"chain": levels}, {}
        for _ in range(steps):
            levels, recent = raised(levels, recent, episodes([[1, 1], [1, 0]], level), families, 0.6)
        return levels["chain"], len(recent["chain"])

    assert after(rl.WINDOW - 1, 1) == (1, rl.WINDOW - 1), "one lucky step is not enough"
    assert after(rl.WINDOW, 1) == (2, 0)
    assert after(rl.WINDOW, 1, level=0) == (1, 0), "easier ones do not count"
    assert after(rl.WINDOW, 3, level=3)[0] == 3, "the highest"
    low = raised({"chain": 1}, {"chain": [0.5] * rl.WINDOW}, episodes([[1, 0], [1, 0]]), families, 0.6)
    assert low == ({"chain": 1}, {"chain": [0.5] * rl.WINDOW})


def test_the_mix_keeps_easier_levels(config):
    cfg = config(groups=400, easy_share=0.3)
    levels = [p.level for p in draw(cfg, {"chain": Length()}, {"chain": 2}, 5)]
    assert 60 < sum(level < 2 for level in levels) < 180 and set(levels) == {0, 1, 2}
    assert draw(cfg, {"chain": Length()}, {"chain": 2}, 5) == draw(cfg, {"chain": Length()}, {"chain": 2}, 5)
    from training.rewards.chains import Chain

    trained = {p.data["chain"] for s in range(15) for p in draw(cfg, {"chain": Chain()}, {"chain": 0}, s)}
    modes = {f.name: f for f in map(Chain, ("", "/think", "/no_think"))}
    assert len(trained) > 1200, "nearly all of the 1,500 of two numbers, less one in 16"
    assert not trained & {p.data["chain"] for p in held_out(modes, 0, 100)}, "in no mode"
    with pytest.raises(ValueError, match="tool, level 0: none of 400 draws is a problem held out"):
        held_out({"tool": Tool()}, 0, 1)


def test_evaluation_is_of_held_out_problems(config, ungated, monkeypatch):
    from training.rewards import reserved
    from training.rewards.chains import Chain

    seen, real = {}, rl.play  # by the conversations per problem: one in evaluations

    def spy(model, tokenizer, families, problems, **options):
        seen.setdefault(options["repeats"], []).extend(problems)
        return real(model, tokenizer, families, problems, **options)

    monkeypatch.setattr(rl, "play", spy)
    cfg = config(eval_every=2, eval_problems=5)
    reinforce(cfg, families={"chain": Chain()}, quiet=True)
    records = [r for r in read_metrics(cfg.out) if r["kind"] == "eval"]
    assert [r["step"] for r in records] == [2, 4] and all("chain/reward" in r for r in records)
    assert len(seen[1]) == 10 and all(map(reserved, seen[1])) and not any(map(reserved, seen[cfg.group_size]))


def test_shares(config):
    cfg = config(families=("chain", "chain/think"), shares=(1.0, 3.0), groups=400)
    names = [p.family for p in draw(cfg, {"chain": Length(), "chain/think": type("T", (Length,), {"name": "t"})()},
                                    {"chain": 0, "chain/think": 0}, 0)]
    assert 60 < names.count("chain") < 140


def test_entropy_band():
    band = (0.2, 0.5)
    assert tilted(0.0, 0.1, band) == 0.1 and tilted(0.0, 0.9, band) == -0.1 and tilted(0.0, 0.3, band) == 0
    assert tilted(0.9, 0.0, band) == rl.MAX_TILT and tilted(0.3, 0.3, band) == pytest.approx(0.2)
    assert tilt_advantage(2.0, 0.5) == 1.0 and tilt_advantage(-2.0, 0.5) == -2.0, "too low: what sharpens is damped"
    assert tilt_advantage(2.0, -0.5) == 2.0 and tilt_advantage(-2.0, -0.5) == -1.0


class Recorder:
    """In place of a run: keeps the batches."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def update(self, batch, loss, lr):
        self.batches.append(batch)
        return {"loss": 0.0, "max_gap": float(len(self.batches))}


def test_groups_of_one_reward_are_left_out(config, model):
    run = Recorder(model)
    found = learn(run, episodes([[1, 1], [0, 0], [1, 0], [0, 1]]), config(mini_batches=1), 0)
    assert found["kept_groups"] == 0.5 and found["max_gap"] == 1.0
    (packed,) = run.batches[0]
    assert packed.lengths.tolist() == [2] * 4 and packed.weights.sum().item() == pytest.approx(1)
    assert sorted(packed.advantages.tolist()) == pytest.approx([-1] * 4 + [1] * 4, rel=1e-3)
    assert learn(run, episodes([[1, 1], [0, 0]]), config(), 0) == {"kept_groups": 0.0, "max_gap": 0.0}


def test_every_conversation_is_in_one_mini_batch(config, model):
    run = Recorder(model)
    found = learn(run, episodes([[1, 0, 1], [0, 1, 1], [1, 0, 0]]), config(mini_batches=2), 0)
    assert [sum(len(p.lengths) for p in b) for b in run.batches] == [5, 4]
    assert found["max_gap"] == 1.0, "that of the first"
    for batch in run.batches:
        assert sum(p.weights.sum().item() for p in batch) == pytest.approx(1)


def test_truncated_conversations_can_be_left_out(config, model):
    members = episodes([[1, 0, 1]])
    members[1].truncated = True
    run = Recorder(model)
    learn(run, members, config(mini_batches=1, skip_truncated=True), 0)
    assert sum(len(p.lengths) for p in run.batches[0]) == 2


def test_correction_puts_the_trainers_probabilities_in_place(model):
    from training.samples import Sample, pack

    tokens = [5, 6, 7, 8]
    packed = pack([Sample(tokens, [0, 1, 1, 1], [1.0] * 4, [0, -50.0, -1e-3, -3.0])])
    fixed, gap = rl.corrected(model, packed, preset("dapo", correction=2.0))
    with torch.no_grad():
        want = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(fixed.logprobs, want, rtol=1e-4, atol=1e-4)
    ratio = (want - packed.logprobs).exp()
    torch.testing.assert_close(fixed.weights, ratio.clamp(max=2.0), rtol=1e-3, atol=1e-5)
    assert fixed.weights[0] == 2.0 and fixed.weights[1] < 0.1
    assert gap == pytest.approx((want - packed.logprobs).abs().max().item(), rel=1e-4)


def test_correction_does_not_hide_the_gap(config, model):
    members = episodes([[1, 0], [0, 1]])
    members[1].logprobs = [p - 5.0 for p in members[1].logprobs]
    found = learn(Recorder(model), members, config(mini_batches=2, correction=2.0), 0)
    assert found["max_gap"] > 1


def test_summary():
    found = summary(episodes([[1, 0], [0.5, 0.25]]))
    assert found["reward"] == 0.4375 and found["pass_rate"] == 0.5 and found["length"] == 2 and found["sampled_entropy"] == 0.5


@pytest.mark.parametrize("changes, words", [
    ({"families": ()}, "families is"), ({"families": ("nope",)}, "family is 'nope'; expected one of .* or module:attribute"), ({"group_size": 1}, "group_size is 1"),
    ({"shares": (1.0, 2.0)}, "shares is"), ({"pass_band": (0.9, 0.1)}, "pass_band is"), ({"entropy_band": (0.5, 0.5)}, "entropy_band"),
    ({"algorithm": "ppo"}, "algorithm is 'ppo'"), ({"raise_at": 2.0}, "raise_at is 2"), ({"clip_low": 3.0}, "clip_low is 3"),
    ({"max_prompt": 90, "max_tokens": 60, "tokens_per_pack": 148}, "tokens_per_pack is 148; expected at least 149, one less"),
    ({"deadline": 0.0}, "deadline is 0"), ({"level": -1}, "level is -1"), ({"lr": math.nan}, "lr is nan"),
])
def test_bad_settings(config, changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


OWN = '''
from training.rewards import Problem, SingleTurn

class Odd(SingleTurn):
    name, max_level = "odd", 0

    def __init__(self, pool):
        self.pool = pool

    def problem(self, seed, level):
        return Problem(self.name, ({"role": "user", "content": str(seed % 999)},), {}, level)

    def score(self, problem, reply):
        return float(len(reply.content) % 2)

class Half(Odd):
    problem = turns = None

number = 3
'''


def test_a_family_of_ones_own_by_its_path(config, ungated, tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config(families=("own_rewards:Odd", "chain"), steps=1, groups=12)
    reinforce(cfg, quiet=True)
    (record,) = [r for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert record["level/own_rewards:Odd"] == 0 and 0 < record["reward"] < 1
    for name, words in (
        ("own_rewards:Long", "family is 'own_rewards:Long', which cannot be imported: .*no attribute 'Long'"),
        ("no_rewards:Odd", "cannot be imported: No module named 'no_rewards'"), ("own_rewards:number", "an? int; expected a class"),
        (":Odd", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=words):
            config(families=(name,))
    with pytest.raises(ValueError, match="family 'own_rewards:Half' gives a Half without problem, turns; expected"):
        reinforce(config("half", families=("own_rewards:Half",)), quiet=True)


JUDGES = '''
from training.rewards.judges import RewardModel, WithReference

ITEMS, asked = [(f"Capital of number {i}?", str(i)) for i in range(99)], {"judge": 0, "model": 0}

def ask(prompt):
    asked["judge"] += 1
    return f"Grade: {len(prompt) % 2 * 10}"

def scalar(messages):
    asked["model"] += 1
    return len(messages[-1]["content"]) - 6.0

def judge(pool):
    return WithReference(ITEMS, ask, workers=2)

def reward_model(pool):
    return RewardModel([query for query, _ in ITEMS], scalar, workers=2)
'''


def test_a_run_over_all_three_kinds_of_reward(config, ungated, tmp_path, monkeypatch):
    """By rule, by a judge with a reference, by a reward model, all named in the config."""
    (tmp_path / "judging.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("chain", "judging:judge", "judging:reward_model")
    cfg = config(families=names, steps=1, groups=12, eval_every=1, eval_problems=3, probe_groups=1)
    reinforce(cfg, quiet=True)
    import judging

    (held,) = [r for r in read_metrics(cfg.out) if r["kind"] == "eval"]
    (record,) = [r for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert {f"{name}/reward" for name in names} <= held.keys() and 0 < held["judging:reward_model/reward"] < 1
    assert record["kept_groups"] > 0.3 and min(judging.asked.values()) > 3


HANGING = '''
import time
from training.rewards import Problem, SingleTurn

def slow(text):
    time.sleep(1000 * ("a" in text))
    return 1.0

class Checked(SingleTurn):
    name, max_level = "checked", 0

    def __init__(self, pool):
        self.pool = pool

    def problem(self, seed, level):
        return Problem(self.name, ({"role": "user", "content": str(seed % 999)},), {}, level)

    def scores(self, pairs):
        found = self.pool.map("hanging_rewards:slow", [[reply.content] for _, reply in pairs])
        return [r.value or 0.0 for r in found]
'''


def test_a_hanging_verifier_costs_its_deadline_and_no_more(config, ungated, tmp_path, monkeypatch):
    (tmp_path / "hanging_rewards.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rl, "SCORERS", ("hanging_rewards:slow",))
    cfg = config(families=("hanging_rewards:Checked",), steps=2, deadline=0.2, workers=4)
    folder = reinforce(cfg, quiet=True)
    records = [r for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert len(records) == 2 and records[1]["timeouts"] > records[0]["timeouts"] > 0 and folder.is_dir()
    assert all(0 < r["reward"] < 1 for r in records), "the others have their rewards"


def test_command_line(config, capsys):
    from training.core import command

    with pytest.raises(SystemExit) as stop:
        command(RLConfig, reinforce, "training.rl", "x", ["--start", "a", "--out", "b", "--families", "chain", "--learning-rate", "1"])
    assert stop.value.code == 2 and "--learning-rate" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="error: /nowhere has no .*safetensors"):
        command(RLConfig, reinforce, "training.rl", "x", ["--start", "/nowhere", "--out", str(config().out), "--families", "chain",
                                                          "--no-tensorboard"])


# ---- distillation --------------------------------------------------------------------------------------------------------


def test_distillation_draws_the_student_to_the_teacher(config, tmp_path, tokenizer):
    from tiny_chat import small

    from qwen3_model.model import Qwen3

    load.save(Qwen3(small(hidden_size=48, num_hidden_layers=1)).init_weights(7), tmp_path / "teacher")
    tokenizer.save(tmp_path / "teacher" / "tokenizer.json")
    shared = {f.name for f in dataclasses.fields(rl.RolloutConfig)}
    base = {k: v for k, v in vars(config("distilled", steps=24, lr=1e-2)).items() if k in shared}
    cfg = DistillConfig(teacher=tmp_path / "teacher", **base)
    distill(cfg, families={"chain": Length()}, quiet=True)
    kl = [r["kl"] for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert kl[-1] < 0.6 * kl[0] and kl[-1] > 0

    changes = {"out": tmp_path / "adapters", "lora_rank": 4, "lora_alpha": 16.0, "steps": 12}
    adapters = DistillConfig(teacher=tmp_path / "teacher", **(base | changes))
    folder = distill(adapters, families={"chain": Length()}, quiet=True)
    kl = [r["kl"] for r in read_metrics(adapters.out) if r["kind"] == "train"]
    assert kl[-1] < 0.9 * kl[0] and (folder / "adapter" / "adapter_model.safetensors").exists()

    load.save(Qwen3(small(hidden_size=48, num_hidden_layers=1)).init_weights(8), tmp_path / "teacher")
    with pytest.raises(ValueError, match="belongs to another run .data.teacher"):
        distill(cfg, families={"chain": Length()}, quiet=True)
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="has another tokenizer.json"):
        distill(cfg, families={"chain": Length()}, quiet=True)


def test_distillation_refuses_what_only_rl_has(tmp_path):
    from training.distill import DistillConfig

    settings = {"start": tmp_path, "out": tmp_path, "teacher": tmp_path, "families": ("chain",)}
    assert DistillConfig(**settings, group_size=1).group_size == 1
    for name in ("algorithm", "clip_low", "correction", "skip_truncated", "pass_band", "raise_at", "eval_every"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            DistillConfig(**settings, **{name: 1})


def test_teacher_data_are_the_right_replies(model, tokenizer, monkeypatch):
    tool = Tool()
    for turns, count in (([ANSWER], 1), ([ANSWER.replace("42", "41")], 0)):
        sampler = Scripted(tokenizer, turns)
        monkeypatch.setattr(rl, "roller_for", lambda *args, sampler=sampler, **kw: sampler)
        found = teacher_data(model, tokenizer, {"tool": tool}, [tool.problem(0, 0)], max_prompt=2000, max_tokens=2000)
        assert len(found) == count
    assert found == []
