"""Predicted memory against what torch's CPU allocator really gives out."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from qwen3_kernels import linear_cross_entropy, linear_kl
from qwen3_kernels.ops.linear_cross_entropy import default_chunk
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.recompute import POLICIES
from training import memory
from training.config import DTYPES, Config
from training.memory import _Step, advice, allocated, check, measured, predict, usable
from training.optim import OPTIMIZERS, STATES
from training.pretrain import next_token_loss, set_up

DENSE = Qwen3Config(
    vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
)
MODELS = {
    "tied": DENSE,
    "untied": dataclasses.replace(DENSE, tie_word_embeddings=False, num_key_value_heads=1),
    "wide": dataclasses.replace(DENSE, vocab_size=256, intermediate_size=1000, hidden_size=96),
    "experts": dataclasses.replace(DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    "some experts": dataclasses.replace(
        DENSE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=96, mlp_only_layers=(1,)
    ),
}


def settings(**changes):
    return Config(**({"data": Path(), "out": Path(), "rows": 4, "seq_len": 96, "dtype": "float32"} | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("model", ["untied", "some experts"])
def test_weights_and_optimizer_are_exact(model, kind, states, dtype):
    config = settings(optimizer=kind, optimizer_states=states, dtype=dtype, device="cpu")
    qwen, optimizer = set_up(config, MODELS[model], None)
    estimate = predict(config, MODELS[model], "cpu")
    assert estimate.weights == sum(p.nbytes for p in qwen.parameters())
    assert estimate.optimizer == sum(t.nbytes for t in optimizer.state_tensors().values())


def loss_of(model, config):
    """(loss function without arguments, model, tokens) on one micro-step."""
    qwen = Qwen3(model).init_weights(0).to(DTYPES[config.dtype])
    qwen.recompute = config.recompute
    n = config.rows * config.seq_len
    tokens = torch.randint(model.vocab_size, (2, n))
    batch = memory.Batch(*tokens, torch.arange(config.rows + 1, dtype=torch.int32) * config.seq_len)
    return qwen, lambda: next_token_loss(qwen, batch)


@pytest.mark.parametrize("model", MODELS)
def test_saved_tensors(model):
    """Of autograd, each storage once, the parameters apart."""
    config, model = settings(), MODELS[model]
    qwen, loss = loss_of(model, config)
    loss()  # with the kernels' self-checks
    own, storages = {p.untyped_storage().data_ptr() for p in qwen.parameters()}, {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # alive, so that no other gets its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss()
    saved = sum(s.nbytes() for place, s in storages.items() if place not in own)
    step = _Step(config, model, "cpu")
    N, D, V = step.N, model.hidden_size, model.vocab_size
    rest = N * (D + 1) + N * D + V * D  # the final norm's; gradients of hidden states and head
    assert saved == pytest.approx(step.kept(model.num_hidden_layers) + 4 * rest, rel=0.02)
    assert step.kept(model.num_hidden_layers) > 0.7 * saved


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "model, dtype", [*((m, "float32") for m in MODELS), ("tied", "bfloat16"), ("experts", "bfloat16")]
)
def test_memory_after_the_forward(model, dtype, policy):
    config, model = settings(dtype=dtype, recompute=policy, rows=2), MODELS[model]
    _, loss = loss_of(model, config)
    loss()
    got, _ = allocated(loss)
    step = _Step(config, model, "cpu")
    at_loss = next(step.moments())
    assert at_loss.moment == "loss"
    kept = at_loss.activations + at_loss.gradients + step.N * model.hidden_size * step.b
    assert kept == pytest.approx(got, rel=0.02)
    assert step.kept(model.num_hidden_layers) > (0.25 if policy == "full" else 0.55) * got


SHORT = {"seq_len": 32, "rows": 2}


@pytest.mark.parametrize(
    "model, changes, moment",
    [
        ("tied", {}, "loss"), ("tied", {"recompute": "norm+swiglu"}, "loss"), ("tied", {"micros": 2}, "loss"),
        ("untied", {"recompute": "full"}, "backward of layer 0"),
        ("untied", {"micros": 4, "recompute": "norm+swiglu"}, "loss"),
        ("wide", {}, "backward of layer 2"), ("wide", {"micros": 2}, "backward of layer 2"),
        ("wide", {"recompute": "norm+swiglu"}, "backward of layer 2"),
        ("wide", {"recompute": "full"}, "backward of layer 0"),
        ("wide", {"recompute": "full", "micros": 2}, "backward of layer 2"),
        ("untied", SHORT, "backward of the embedding"), ("tied", SHORT | {"optimizer_states": "bfloat16"}, "update"),
        ("wide", SHORT | {"optimizer": "muon"}, "update"), ("experts", SHORT | {"optimizer": "muon"}, "update"),
        ("experts", {}, "loss"), ("experts", {"recompute": "norm+swiglu"}, "loss"),
        ("some experts", {"micros": 2}, "backward of layer 2"),
        ("experts", {"recompute": "full"}, "backward of layer 0"),
        ("experts", {"recompute": "full", "micros": 2}, "backward of layer 2"),
        ("tied", SHORT | {"dtype": "bfloat16"}, "backward of the embedding"),
        ("untied", SHORT | {"dtype": "bfloat16", "recompute": "norm+swiglu"}, "backward of the embedding"),
        ("wide", SHORT | {"dtype": "bfloat16", "optimizer": "muon"}, "update"),
        ("wide", SHORT | {"dtype": "bfloat16", "optimizer_states": "float32-moments"}, "update"),
        ("tied", SHORT | {"dtype": "bfloat16", "optimizer_states": "bfloat16"}, "update"),
        ("tied", {"rows": 2, "dtype": "bfloat16", "recompute": "norm+swiglu"}, "loss"),
    ],
    ids=str,
)
def test_peak_of_a_real_step(model, changes, moment):
    config = settings(**changes)
    estimate = predict(config, MODELS[model], "cpu")
    assert estimate.moment == moment, "each moment is tested where it is the peak"
    assert estimate.total == pytest.approx(measured(config, MODELS[model], "cpu"), rel=0.05)


@pytest.mark.parametrize("states", STATES)
def test_adamw_needs_no_copies_on_cuda(states):
    """There its kernel reads and writes what is kept; Muon and a CPU work on float32 pieces."""
    sizes = {
        (kind, device): _Step(settings(dtype="bfloat16", optimizer=kind, optimizer_states=states), DENSE, device).update()
        for kind in OPTIMIZERS for device in ("cpu", "cuda")
    }
    assert sizes["adamw", "cuda"] == 0 < sizes["muon", "cuda"]
    assert (sizes["adamw", "cpu"] > 0) == (states != "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_peak_of_a_loss_in_many_chunks(dtype, monkeypatch):
    module = importlib.import_module("qwen3_kernels.ops.linear_cross_entropy")  # the package has the function
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # gives chunks of 256 tokens
    model = dataclasses.replace(DENSE, vocab_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = settings(rows=4, seq_len=256, dtype=dtype, optimizer_states="bfloat16")
    estimate = predict(config, model, "cpu")
    assert estimate.moment == "loss" and _Step(config, model, "cpu").chunk_tokens() == 256
    assert estimate.total == pytest.approx(measured(config, model, "cpu"), rel=0.05)


def loss_over_tokens(op, dtype, N, chunk_tokens=None, V=2048, H=8, T=16):
    """Forward and backward of a loss through heads, without arguments; and its bytes of gradients."""
    hidden, head = (torch.randn(n, H, dtype=dtype, requires_grad=True) for n in (N, V))
    if op == "linear_cross_entropy":
        function, other = linear_cross_entropy, {"labels": torch.randint(V, (N,))}
    else:
        function, direction, teacher = linear_kl, *op.split()[1:]
        taught, its_head = torch.randn(N, T), torch.randn(V, T)
        logprobs, ids = (taught @ its_head.T).log_softmax(-1).topk(5)
        other = {"teacher_hidden": taught, "teacher_head": its_head} if teacher == "head" else {"teacher_top": (ids, logprobs)}
        other["direction"] = direction
    run = lambda: torch.autograd.grad(function(hidden, head, **other, chunk_tokens=chunk_tokens), (hidden, head))  # noqa: E731
    run()  # with the kernels' self-checks
    return run, hidden.nbytes + head.nbytes


KL = [f"linear_kl {direction} {teacher}" for direction in ("forward", "reverse") for teacher in ("head", "top")]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["linear_cross_entropy", *KL])
def test_memory_of_a_loss_does_not_grow_with_the_tokens(op, dtype):
    """But for the gradient of the hidden states and numbers of each token: 64 bytes, where its logits have 8,192."""
    few, many = 512, 2048
    peaks = [allocated(loss_over_tokens(op, dtype, n, chunk_tokens=64)[0])[1] for n in (few, many)]
    assert 0 <= peaks[1] - peaks[0] <= (many - few) * (8 * dtype.itemsize + 64)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", KL)
def test_the_default_chunk_of_linear_kl_bounds_all_that_it_holds(op, dtype, monkeypatch):
    module = importlib.import_module("qwen3_kernels.ops.linear_cross_entropy")
    live = importlib.import_module("qwen3_kernels.ops.linear_kl").LIVE_LOGITS["torch"][op.endswith("top")]
    monkeypatch.setattr(module, "CHUNK_BYTES", live * 256 * 2048 * 4)
    run, gradients = loss_over_tokens(op, dtype, 1024)
    peak = allocated(run)[1]
    assert 0.9 * module.CHUNK_BYTES < peak <= 1.02 * module.CHUNK_BYTES + gradients


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_peak_of_a_real_step_on_the_gpu(policy):
    model = Qwen3Config.from_name("Qwen3-0.6B", num_hidden_layers=8)
    config = settings(rows=4, seq_len=4096, dtype="bfloat16", recompute=policy)
    assert predict(config, model).total == pytest.approx(measured(config, model, "cuda"), rel=0.05)


@pytest.mark.parametrize(
    "tokens, vocabulary, width", [(96, 1024, 128), (5000, 151_936, 64), (70_000, 5000, 96), (257, 300_000, 8)]
)
def test_chunks_are_the_losss_own(tokens, vocabulary, width):
    model = dataclasses.replace(DENSE, vocab_size=vocabulary, hidden_size=width)
    for dtype in DTYPES:
        ours = _Step(settings(rows=1, seq_len=tokens, dtype=dtype), model, "cpu").chunk_tokens()
        assert ours == min(default_chunk(tokens, vocabulary, width, 4, sums=False), tokens)


# ---- advice ----------------------------------------------------------------------------------------------------------

SMALL = Qwen3Config.from_name("Qwen3-0.6B")
GIB = 2**30


def long(**changes):
    return settings(**({"rows": 8, "seq_len": 4096, "dtype": "bfloat16"} | changes))


def test_what_fits_is_let_through():
    estimate = predict(long(), SMALL)
    assert usable(80 * GIB) == 75 * GIB and estimate.total < 75 * GIB
    assert check(long(), SMALL, 80 * GIB) == estimate


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(ValueError) as error:
        check(long(), SMALL, 44 * GIB)
    text = str(error.value)
    assert f"takes {memory.gib(predict(long(), SMALL).total)} (" in text
    assert "40.80 GiB of the device's 44.00 GiB" in text
    assert "smallest change first: --micros 2 (" in text and "; --recompute norm+swiglu (" in text


@pytest.mark.parametrize("room", [40, 25, 15, 10, 6])
def test_advice_fits_is_minimal_and_in_order(room):
    options = advice(long(), SMALL, room * GIB)
    assert options
    for flags, estimate in options:
        words = flags.split()
        changes = dict(zip((w[2:].replace("-", "_") for w in words[::2]), words[1::2]))
        changes |= {"micros": int(changes["micros"])} if "micros" in changes else {}
        assert predict(long(**changes), SMALL) == estimate and estimate.total <= room * GIB
        for name in changes:  # one dial less does not do
            less = {k: v for k, v in changes.items() if k != name}
            assert predict(long(**less), SMALL).total > room * GIB
    numerics = ["--optimizer-states" in flags for flags, _ in options]
    assert numerics == sorted(numerics)


def test_no_way_out():
    assert advice(long(), SMALL, 3 * GIB) == []
    with pytest.raises(ValueError, match="Nothing but a smaller model, shorter rows or more memory"):
        check(long(), SMALL, 4 * GIB)


def test_command_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(DENSE.to_dict()))
    memory.main(["--model", str(tmp_path / "config.json"), "--rows", "1", "--seq-len", "64", "--dtype", "float32",
                 "--device", "cpu", "--measure"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(POLICIES)
    assert all("measured" in line for line in lines[1::2])
    with pytest.raises(SystemExit, match="error: model name is 'Qwen9'"):
        memory.main(["--model", "Qwen9"])
