"""kill -9 at a random step of a post-training command: the same command goes on and ends in the same bits. For pre-training see
test_train_checkpoint.py, for data test_data_build.py."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_chat import model, model_folder, small, tokenizer, vocabulary  # noqa: F401

from qwen3_model import load
from qwen3_model.model import Qwen3
from training import checkpoint, sft
from training.log import FILE, read_metrics
from training.rewards.chains import Chain, worked

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# An untrained model writes no think blocks; here every reply counts, and those with an "a" are good.
OWN = '''
import sys

from training.rewards import Problem, SingleTurn

rl = sys.modules["__main__"]  # python -m training.rl

rl.format_gate = lambda ids, **_: 1.0
real = rl._continues

def ended(e, rollout, *rest):
    out = real(e, rollout, *rest)
    e.reply = rl.dataclasses.replace(e.reply, format=1.0)
    return out

rl._continues = ended

class Early(SingleTurn):
    name, max_level = "early", 2

    def __init__(self, pool):
        pass

    def problem(self, seed, level):
        return Problem(self.name, ({"role": "user", "content": str(seed % 999)},), {}, level)

    def score(self, problem, reply):
        return float("a" in reply.content)
'''


@pytest.fixture
def arguments(tmp_path, model_folder, tokenizer):
    """Of each command."""
    sft.write(tmp_path / "data.jsonl", [
        [{"role": "user", "content": p.data["chain"]}, {"role": "assistant", "reasoning_content": worked(p.data["chain"]), "content": "1"}]
        for p in (Chain().problem(i, 2) for i in range(60))
    ])
    (tmp_path / "own_rewards.py").write_text(OWN)
    load.save(Qwen3(small(num_hidden_layers=1)).init_weights(1), tmp_path / "teacher")
    tokenizer.save(tmp_path / "teacher" / "tokenizer.json")
    rollouts = ["--groups", "3", "--group-size", "4", "--max-tokens", "12", "--max-prompt", "40", "--slots", "8", "--workers", "1"]
    return {
        "sft": ["--data", str(tmp_path / "data.jsonl"), "--rows", "4"],
        "rl": ["--families", "own_rewards:Early", "--pass-band", "0", "1", "--probe-groups", "2", "--entropy-band", "4", "5", *rollouts],
        "distill": ["--families", "chain", "chain/no_think", "--teacher", str(tmp_path / "teacher"), *rollouts],
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl", "distill"])
def test_a_run_that_is_killed_goes_on_in_the_same_bits(tmp_path, model_folder, arguments, stage):
    def start(out):
        common = {"start": model_folder, "out": out, "steps": STEPS, "lr": "1e-3", "save-every": 3, "device": "cpu", "dtype": "float32"}
        flags = [str(x) for k, v in common.items() for x in (f"--{k}", v)]
        return subprocess.Popen(
            [sys.executable, "-m", f"training.{stage}", "--no-tensorboard", *flags, *arguments[stage]], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
        )

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    reference, victim = start(straight), start(broken)
    stop_at, deadline = random.randrange(4, 16), time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline:
        metrics = broken / FILE
        if metrics.exists() and metrics.read_text().count('"train"') >= stop_at:
            victim.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    _, errors = victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL, errors
    assert checkpoint.latest(broken / "checkpoints").step < STEPS, f"killed after {stop_at}"
    for process in (start(broken), reference):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    a, b = (checkpoint.latest(out / "checkpoints").path for out in (straight, broken))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes(), f"{file}, killed after {stop_at} steps"
    before = load.load(model_folder).state_dict()
    assert any(not before[k].equal(v) for k, v in load.load(a).state_dict().items()), "it has learnt nothing"
    one, other = ([r for r in read_metrics(out) if r["kind"] == "train"] for out in (straight, broken))
    assert one == other and len(one) == STEPS
