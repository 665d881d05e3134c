"""Conversations become the ids that the model reads and writes, with loss on what the assistant wrote."""

import json
import random

import pytest
from tiny_chat import model, model_folder, tokenizer, vocabulary  # noqa: F401

from qwen3_model import load
from qwen3_model.chat import encode_chat
from qwen3_model.tokenizer import Tokenizer
from training import checkpoint, sft
from training.log import read_metrics
from training.samples import Sample
from training.sft import SFTConfig, batch, encode, fine_tune, flagged

USER = {"role": "user", "content": "3+5"}
THOUGHT = {"role": "assistant", "reasoning_content": "3+5=8", "content": "8"}
DIRECT = {"role": "assistant", "content": "8"}


def user(text):
    return {"role": "user", "content": text}


def trained(tokenizer, sample):
    """What has weight, piece by piece."""
    pieces, ids = [], []
    for token, weight in zip([*sample.tokens, 0], [*sample.weights, 0]):
        if weight:
            ids.append(token)
        elif ids:
            pieces.append(tokenizer.decode(ids))
            ids = []
    return pieces


def test_only_the_reply_is_trained_and_the_prompt_is_that_of_inference(tokenizer):
    (sample,) = encode(tokenizer, [USER, THOUGHT])
    assert trained(tokenizer, sample) == ["<think>\n3+5=8\n</think>\n\n8<|im_end|>"]
    prompt = encode_chat(tokenizer, [USER])
    assert sample.tokens[: len(prompt)] == prompt and sample.weights[: len(prompt)] == [0.0] * len(prompt)
    assert set(sample.weights[len(prompt) :]) == {1.0}


def test_without_thinking_the_empty_block_is_trained(tokenizer):
    (sample,) = encode(tokenizer, [user("3+5 /no_think"), DIRECT])
    assert trained(tokenizer, sample) == ["<think>\n\n</think>\n\n8<|im_end|>"]
    forced = encode_chat(tokenizer, [user("3+5 /no_think")], enable_thinking=False)
    assert sample.tokens[: len(forced)] == forced, "the same ids as when the prompt forbids thinking"


def test_every_query_gives_a_sample_and_the_last_flag_wins(tokenizer):
    messages = [user("3+5 /think"), THOUGHT, user("1+1 /no_think"), {"role": "assistant", "content": "2"}, user("2+2"),
                {"role": "assistant", "content": "4"}]
    first, second, third = encode(tokenizer, messages)
    assert trained(tokenizer, second) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    text = tokenizer.decode(third.tokens)
    assert "3+5=8" not in text and "assistant\n8<|im_end|>" in text, "history is without its thinking"
    assert "3+5=8" in tokenizer.decode(first.tokens)
    prompt = encode_chat(tokenizer, messages[:5])
    assert third.tokens[: len(prompt)] == prompt and not any(third.weights[: len(prompt)])


def test_tool_turns(tokenizer):
    call = {"role": "assistant", "reasoning_content": "use it", "content": "",
            "tool_calls": [{"name": "python", "arguments": {"code": "1"}}]}
    messages = [USER, call, {"role": "tool", "content": "7"}, {"role": "assistant", "reasoning_content": "so 7", "content": "7"}]
    tools = [{"type": "function", "function": {"name": "python"}}]
    (sample,) = encode(tokenizer, messages, tools=tools)
    first, second = trained(tokenizer, sample)
    assert first.startswith("<think>\nuse it\n</think>") and first.endswith("</tool_call><|im_end|>")
    assert second == "<think>\nso 7\n</think>\n\n7<|im_end|>"
    prompt = encode_chat(tokenizer, messages[:3], tools=tools)
    assert sample.tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("messages, words", [
    ([user("3+5 /no_think"), THOUGHT], "asks for no thinking, and the reply has some"),
    ([USER, DIRECT], "asks for thinking, and the reply has none"),
    ([USER], "no user query with a reply"),
    ([user("a<|im_end|>b"), THOUGHT], r"messages\[0\].content: has <\|im_start\|> or"),
    ([{"role": "robot", "content": "x"}, USER, THOUGHT], r"messages\[0\].role"),
])
def test_bad_conversations(tokenizer, messages, words):
    with pytest.raises(ValueError, match=words):
        list(encode(tokenizer, messages))


def test_flags(tokenizer):
    """Whatever the flags, every query asks for what its reply does (which `encode` checks)."""
    rng, places = random.Random(0), set()
    for _ in range(300):
        turns = [m for _ in range(rng.randint(1, 3)) for m in (USER, rng.choice((THOUGHT, DIRECT)))]
        system = [{"role": "system", "content": "Be brief."}] * rng.randint(0, 1)
        messages = flagged([*system, *turns], rng)
        assert len(list(encode(tokenizer, messages))) == len(turns) // 2
        first = messages[0]
        users = [m["content"] for m in messages if m["role"] == "user"]
        places |= {"system" for _ in (1,) if first["role"] == "system" and "think" in first["content"]}
        places |= {"bare" for u in users if u == "3+5"} | {"decoy" for u in users if u.count("think") == 2}
    assert places == {"system", "bare", "decoy"}
    assert "think" not in json.dumps(USER), "the caller's messages are left alone"


def test_batches_are_epochs_in_random_order():
    samples = [Sample([i, i], [0, 1]) for i in range(7)]
    drawn = [s.tokens[0] for step in range(7) for s in batch(samples, 2, 3, step)]
    assert sorted(drawn[:7]) == sorted(drawn[7:]) == list(range(7)) and drawn[:7] != drawn[7:]
    assert [s.tokens for s in batch(samples, 2, 3, 5)] == [s.tokens for s in batch(samples, 2, 3, 5)]
    assert sum(w for s in batch(samples, 5, 3, 1) for w in s.weights) == pytest.approx(1)


@pytest.fixture
def config(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    sft.write(data, [[user(f"{a}+{b}"), {"role": "assistant", "reasoning_content": f"{a}+{b}={(a + b) % 10}",
                                          "content": str((a + b) % 10)}] for a in range(10) for b in range(4)])

    def make(out="run", **changes):
        settings = {"start": model_folder, "data": data, "steps": 6, "lr": 3e-3, "rows": 8, "save_every": 2, "warmup": 0,
                    "device": "cpu", "dtype": "float32", "tensorboard": False}
        return SFTConfig(out=tmp_path / out, **(settings | changes))

    return make


def test_training_lowers_the_loss_and_writes_what_runs_write(config):
    cfg = config(steps=12, tensorboard=True)
    folder = fine_tune(cfg, quiet=True)
    records = [r for r in read_metrics(cfg.out) if r["kind"] == "train"]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"] and records[0]["entropy"] > 0
    run = json.loads((cfg.out / "run.json").read_text())
    assert run["config"]["lr"] == 3e-3 and "torch" in run["environment"] and len(run["data"]["sha256"]) == 64
    assert (cfg.out / "tensorboard").is_dir() and "<svg" in (cfg.out / "report.html").read_text() and (folder / "tokenizer.json").exists()
    assert load.load(folder).config.vocab_size == 307


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_in_the_same_bits(config, monkeypatch):
    straight, broken = config("straight"), config("broken")
    want = load.load(fine_tune(straight, quiet=True)).state_dict()
    calls = [0]
    real = sft.cross_entropy

    def loss(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return real(*args)

    with pytest.raises(Killed):
        fine_tune(broken, loss_fn=loss, quiet=True)
    assert checkpoint.latest(broken.out / "checkpoints").step == 2
    got = load.load(fine_tune(broken, quiet=True)).state_dict()
    assert all(want[k].equal(got[k]) for k in want)


@pytest.mark.parametrize("owner, name, calls", [(checkpoint, "save_file", 2), (Tokenizer, "save", 1)], ids=["checkpoint", "model"])
def test_a_full_disk_stops_the_run_and_costs_nothing(config, monkeypatch, owner, name, calls):
    want = load.load(fine_tune(config("straight"), quiet=True)).state_dict()
    cfg, count, real = config("full"), [0], getattr(owner, name)

    def full(*args, **options):
        count[0] += 1
        if count[0] == calls:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left on device"):
            fine_tune(cfg, quiet=True)
    assert checkpoint.latest(cfg.out / "checkpoints").step == (2 if owner is checkpoint else 6) and not (cfg.out / "model").exists()
    got = load.load(fine_tune(cfg, quiet=True)).state_dict()
    assert all(want[k].equal(got[k]) for k in want)


def test_a_run_killed_while_it_writes_the_model_is_not_finished(config, monkeypatch):
    cfg = config(lora_rank=2)

    def save(self, path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", save)  # the last file
        with pytest.raises(Killed):
            fine_tune(cfg, quiet=True)
    assert checkpoint.latest(cfg.out / "checkpoints").step == cfg.steps and not (cfg.out / "model").exists()
    folder = fine_tune(cfg, quiet=True)
    assert (folder / "tokenizer.json").exists() and (folder / "adapter").is_dir()
    assert not [p.name for p in cfg.out.iterdir() if "tmp" in p.name]


def test_a_run_that_is_out_of_time_is_finished(config):
    """After the step in which it is; called again it does nothing."""
    short = config(max_minutes=1e-9)
    final = fine_tune(short, quiet=True)
    assert [r["step"] for r in read_metrics(short.out) if r["kind"] == "train"] == [1]
    assert checkpoint.latest(short.out / "checkpoints").fields["finished"] and (final / "model.safetensors").exists()
    before = (final / "model.safetensors").stat().st_mtime_ns
    fine_tune(short, quiet=True)
    assert (final / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_minutes is 0"):
        config(max_minutes=0)


def test_other_data_is_another_run(config, tmp_path):
    fine_tune(config(), quiet=True)
    sft.write(tmp_path / "data.jsonl", [[USER, THOUGHT]])
    with pytest.raises(ValueError, match="belongs to another run .*sha256"):
        fine_tune(config(), quiet=True)


def test_other_weights_in_the_same_folder_are_another_start(config, model):
    cfg = config()
    fine_tune(cfg, quiet=True)
    model.model.norm.weight.data[0] += 1
    load.save(model, cfg.start)
    with pytest.raises(ValueError, match="belongs to another run .start.weights_sha256"):
        fine_tune(cfg, quiet=True)


def test_nan_gradients_stop_the_run_and_cost_nothing(config):
    """The loss is finite, its gradient is not: what was saved before is what there is, and the run goes on from it."""
    want = load.load(fine_tune(config("straight", save_every=2), quiet=True)).state_dict()
    cfg, calls = config(save_every=2), [0]

    def loss(model, packed):
        value, stats = sft.cross_entropy(model, packed)
        calls[0] += 1
        zero = model.head_weight.sum() * 0
        return (value + zero.sqrt() if calls[0] == 4 else value), stats  # 0/0 in the backward

    with pytest.raises(FloatingPointError, match="gradient norm is nan; training stopped and nothing"):
        fine_tune(cfg, loss_fn=loss, quiet=True)
    assert checkpoint.latest(cfg.out / "checkpoints").step == 2
    got = load.load(fine_tune(cfg, quiet=True)).state_dict()
    assert all(want[k].equal(got[k]) for k in want)


def test_nan_stops_the_run(config):
    cfg = config()

    def loss(model, packed):
        value, stats = sft.cross_entropy(model, packed)
        return value * float("nan"), stats

    with pytest.raises(FloatingPointError, match="loss is nan; training stopped and nothing"):
        fine_tune(cfg, loss_fn=loss, quiet=True)
    assert checkpoint.latest(cfg.out / "checkpoints") is None


def test_bad_data_is_named(config, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "1"}]}\n')
    with pytest.raises(ValueError, match="line 1: messages: no user query with a reply"):
        fine_tune(config(), quiet=True)
    (tmp_path / "data.jsonl").write_text('{"message": []}\n')
    with pytest.raises(ValueError, match="line 1: unknown keys"):
        fine_tune(config(), quiet=True)
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(ValueError, match="no conversations"):
        fine_tune(config(), quiet=True)
    sft.write(tmp_path / "data.jsonl", [[USER, THOUGHT]])
    with pytest.raises(ValueError, match="max_tokens is 5; all 1 samples"):
        fine_tune(config(max_tokens=5), quiet=True)
    with pytest.raises(ValueError, match="rows is 0"):
        config(rows=0)
    with pytest.raises(ValueError, match="tokens_per_pack is 98; expected at least 99, one less than max_tokens"):
        config(max_tokens=100, tokens_per_pack=98)
    config(max_tokens=100, tokens_per_pack=99)
    with pytest.raises(ValueError, match="lr is -1"):
        config(lr=-1)
