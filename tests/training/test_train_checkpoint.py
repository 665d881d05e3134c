"""Checkpoints are whole or absent, and a run that is killed at any moment ends in the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from processes import Python

from qwen3_model.model import Qwen3
from training import checkpoint, pretrain
from training.checkpoint import latest, read, save
from training.log import FILE, read_metrics
from training.optim import Optimizer


@pytest.fixture
def trained(model_config):
    """A model and an optimizer after one step."""

    def make(seed=0, dtype=torch.bfloat16):
        model = Qwen3(model_config).init_weights(seed).to(dtype)
        optimizer = Optimizer(model)
        model(torch.arange(12).view(1, 12)).float().square().mean().backward()
        optimizer.step(1e-3, 1.0)
        return model, optimizer

    return make


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path, trained):
    model, optimizer = trained()
    torch.manual_seed(7)
    path = save(tmp_path, 3, model, optimizer, {"a": [1, "x"]})
    drawn = torch.rand(3)
    found = latest(tmp_path)
    again = found.load_model("cpu")
    fresh = Optimizer(again)
    found.restore(fresh)
    assert (found.path, found.step, found.fields) == (path, 3, {"a": [1, "x"]})
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(model.parameters(), again.parameters()))
    old, new = optimizer.state_tensors(), fresh.state_tensors()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert torch.equal(torch.rand(3), drawn), "the generator is where it was"


def test_transformers_reads_it(tmp_path, trained):
    import transformers

    model, optimizer = trained(dtype=torch.float32)
    path = save(tmp_path, 1, model, optimizer, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_keeps_the_newest(tmp_path, trained):
    model, optimizer = trained()
    for step in (5, 10, 90, 100):
        save(tmp_path, step, model, optimizer, {}, keep=2)
    assert names(tmp_path) == ["step-00000090", "step-00000100"]
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 110, model, optimizer, {}, keep=0)


def test_extra_files_travel(tmp_path, trained):
    (tmp_path / "tokenizer.json").write_text("{}")
    path = save(tmp_path / "c", 1, *trained(), {}, extra_files=(tmp_path / "tokenizer.json",))
    assert (path / "tokenizer.json").read_text() == "{}" and "tokenizer.json" in json.loads((path / "state.json").read_text())["files"]


def test_no_checkpoints(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "no-state", "bad-state"])
def test_incomplete_ones_are_passed_over(tmp_path, trained, damage):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, {})
    broken = save(tmp_path, 2, model, optimizer, {})
    weights = broken / "model.safetensors"
    {
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-8]),
        "missing": weights.unlink,
        "no-state": (broken / "state.json").unlink,
        "bad-state": lambda: (broken / "state.json").write_text('{"step": 2'),
    }[damage]()
    with pytest.warns(UserWarning, match="passed over"):
        assert latest(tmp_path).step == 1
    with pytest.raises(ValueError, match="step-00000002"):
        read(broken)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_cost_the_one_just_written(tmp_path, trained, keep):
    model, optimizer = trained()
    for step in range(4, 4 + keep):
        (save(tmp_path, step, model, optimizer, {}, keep=keep) / "state.json").unlink()
    assert save(tmp_path, 3, model, optimizer, {}, keep=keep).is_dir()
    with pytest.warns(UserWarning, match="passed over"):
        assert latest(tmp_path).step == 3


def test_damaged_state_is_named(tmp_path, trained):
    model, optimizer = trained()
    path = save(tmp_path, 1, model, optimizer, {}) / "optimizer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match="optimizer.safetensors is damaged"):
        latest(tmp_path).restore(optimizer)


@pytest.mark.parametrize("failing", ["model_io.save", "save_file", "shutil.copyfile", "_fsync"])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path, trained, monkeypatch, failing):
    model, optimizer = trained()
    (tmp_path / "t.json").write_text("{}")
    folder = tmp_path / "c"
    save(folder, 1, model, optimizer, {})
    owner, _, name = failing.rpartition(".")

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, no_space)
    with pytest.raises(OSError, match="No space"):
        save(folder, 2, model, optimizer, {}, extra_files=(tmp_path / "t.json",))
    assert names(folder) == ["step-00000001"] and latest(folder).step == 1


# ---- kill -9 -----------------------------------------------------------------------------------------------------------

# Runs the trainer and kills itself, as kill -9 would, on the n-th call of a function of training.checkpoint.
SUICIDE = """
import os, signal, sys
from training import checkpoint, pretrain
owner, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = getattr(checkpoint, owner) if owner else checkpoint
real, calls = getattr(target, name), [0]
def stand_in(*args, **kw):
    calls[0] += 1
    if calls[0] == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kw)
setattr(target, name, stand_in)
pretrain.main(sys.argv[4:])
"""


def start(args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(args, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen | Python, code):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors


def losses(out):
    return [r for r in read_metrics(out) if r["kind"] != "speed"]


@pytest.mark.parametrize(
    "changes",
    [{"async_save": True, "spike_sigma": 6.0}, pytest.param({}, marks=pytest.mark.slow)], ids=["async-guarded", "plain"],
)
def test_killed_and_resumed_runs_end_in_the_same_bits(make_config, trainer_command, changes):
    settings = {"steps": 60, "dtype": "bfloat16", "log_every": 1, "save_every": 3, "eval_every": 20, "micros": 2} | changes
    straight, broken = make_config("straight", **settings), make_config("broken", **settings)
    reference = start(trainer_command(straight))

    args = trainer_command(broken)
    victim, stop_at = start(args), random.randrange(4, 30)
    metrics, deadline = broken.out / FILE, time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count('"train"') >= stop_at:
            victim.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    finish(victim, -signal.SIGKILL)
    before = latest(broken.out / "checkpoints")
    assert before is not None and before.step < 60, f"killed after {stop_at} steps"

    # inside the writing of a checkpoint: before the optimizer's file, and with all files written but not renamed
    for owner, name, n in (("", "save_file", 2), ("", "_fsync", 4)):
        finish(Python("-c", SUICIDE, owner, name, str(n), *args[3:]), -signal.SIGKILL)
        assert any(p.name.startswith(".") for p in (broken.out / "checkpoints").iterdir()), "nothing was half written"
    finish(Python(*args[1:]), 0)
    finish(reference, 0)

    a, b = latest(straight.out / "checkpoints"), latest(broken.out / "checkpoints")
    assert a.step == b.step == 60 and a.fields["model"] == b.fields["model"]
    assert names(straight.out / "checkpoints") == names(broken.out / "checkpoints")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (a.path / file).read_bytes() == (b.path / file).read_bytes(), f"{file}, killed after {stop_at} steps"
    assert losses(straight.out) == losses(broken.out), f"killed after {stop_at} steps"
    assert [r["step"] for r in losses(straight.out) if r["kind"] == "train"] == list(range(1, 61))


def test_background_saves_hold_the_state_of_their_step(make_config, model_config, tmp_path):
    """The weights change while the thread writes: what is on disk is what they were."""
    model, optimizer = pretrain.set_up(make_config(dtype="bfloat16"), model_config, None)
    started, go = threading.Event(), threading.Event()
    real = checkpoint.model_io.save

    def slow(*args, **kw):
        started.set()
        assert go.wait(20)
        return real(*args, **kw)

    want = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch, checkpoint.Saver(tmp_path / "c", background=True) as saver:
        patch.setattr(checkpoint.model_io, "save", slow)
        path = saver.save(3, model, optimizer, {"a": 1})
        assert started.wait(20) and not path.exists(), "save has returned, the writing goes on"
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        next(iter(optimizer.state_tensors().values())).add_(1)
        go.set()
        saver.wait()
        found = checkpoint.read(path)
        assert found.step == 3 and found.fields == {"a": 1}
        got = found.load_model("cpu").state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
        stored = checkpoint.load_file(path / "optimizer.safetensors")
        assert torch.equal(stored["master.model.norm.weight"], want["model.norm.weight"].float())


def test_an_error_of_a_background_save_is_raised_by_the_next(make_config, model_config, tmp_path, monkeypatch):
    model, optimizer = pretrain.set_up(make_config(), model_config, None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    saver = checkpoint.Saver(tmp_path / "c", background=True)
    saver.save(1, model, optimizer, {})
    saver.wait()
    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.save(2, model, optimizer, {})
    with pytest.raises(OSError, match="No space left"):
        saver.save(3, model, optimizer, {})
    saver.wait()
    with pytest.raises(OSError, match="No space left"), saver:
        saver.save(4, model, optimizer, {})
    with pytest.raises(KeyError), saver:
        saver.save(5, model, optimizer, {})
        raise KeyError("the training's own error comes first")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"], "nothing half-written is left"


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "dtype": "bfloat16"}], ids=str)
def test_background_or_not_gives_the_same_files(make_config, changes):
    here, there = make_config("a", **changes), make_config("b", async_save=True, **changes)
    a, b = pretrain.train(here, quiet=True), pretrain.train(there, quiet=True)
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert sorted(p.name for p in a.parent.iterdir()) == sorted(p.name for p in b.parent.iterdir())
