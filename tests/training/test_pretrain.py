import dataclasses
import json
import math
import types

import pytest
import torch

from training import checkpoint, moe, pretrain
from training.config import Config
from training.data.mixture import Mixture, Part
from training.data.shards import TokenShards
from training.log import FILE, read_metrics
from training.pretrain import evaluate, evaluation_batches, next_token_loss, train


def records(out, kind):
    return [r for r in read_metrics(out) if r["kind"] == kind]


def weights(path):
    return checkpoint.read(path).load_model("cpu").state_dict()


class Stop(Exception):
    pass


def failing_at(step, error=Stop, micros=1):
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        if calls[0] > step * micros:
            raise error
        return next_token_loss(model, batch)

    return loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_evaluates_and_records(make_config, dtype):
    config = make_config(steps=40, dtype=dtype, eval_batches=1)
    path = train(config, quiet=True)
    got = records(config.out, "train")
    assert [r["step"] for r in got] == list(range(1, 41)) and [r["lr"] for r in got] == [config.lr_at(s) for s in range(40)]
    assert got[0]["loss"] == pytest.approx(math.log(64), rel=0.05) and got[-1]["loss"] < got[0]["loss"] - 1
    evals = records(config.out, "eval")
    assert [r["step"] for r in evals] == [*range(5, 41, 5)]
    assert "bits_per_byte" in evals[-1] and "bits_per_byte" not in evals[0]
    run = json.loads((config.out / "run.json").read_text())
    assert run["config"]["dtype"] == dtype and run["model"]["hidden_size"] == 16
    assert run["environment"]["torch"] == torch.__version__ and set(run["environment"]["kernels"]) >= {"attention", "rms_norm"}
    assert checkpoint.read(path).load_model("cpu").head_weight.dtype == getattr(torch, dtype)
    assert not (config.out / "tensorboard").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumes_bitwise_in_one_process(make_config, dtype):
    straight, broken = make_config("a", dtype=dtype), make_config("b", dtype=dtype)
    expected = train(straight, quiet=True)
    with pytest.raises(Stop):
        train(broken, loss_fn=failing_at(7), quiet=True)
    with open(broken.out / FILE, "a") as f:
        f.write('{"kind": "train", "st')  # a line cut short
    got = train(broken, quiet=True)
    for (name, a), b in zip(weights(expected).items(), weights(got).values()):
        assert torch.equal(a, b), name
    assert records(straight.out, "train") == records(broken.out, "train")
    assert records(straight.out, "eval") == records(broken.out, "eval")


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "muon"}, {"optimizer": "muon", "optimizer_states": "bfloat16"},
     {"optimizer_states": "float32-moments"}, {"optimizer_states": "bfloat16", "seed": 5}],
    ids=lambda c: " ".join(map(str, c.values())),
)
def test_every_optimizer_learns_and_resumes_bitwise(make_config, changes):
    settings = {"dtype": "bfloat16", "steps": 16, **changes}
    straight, broken = make_config("a", **settings), make_config("b", **settings)
    expected = train(straight, quiet=True)
    with pytest.raises(Stop):
        train(broken, loss_fn=failing_at(7), quiet=True)
    got = train(broken, quiet=True)
    for (name, a), b in zip(weights(expected).items(), weights(got).values()):
        assert torch.equal(a, b), name
    losses = [r["loss"] for r in records(straight.out, "train")]
    assert records(straight.out, "train") == records(broken.out, "train") and losses[-1] < losses[0] - 0.3


def test_settings_reach_model_and_optimizer(make_config, model_config):
    config = make_config(
        optimizer="muon", optimizer_states="bfloat16", recompute="norm+swiglu", dtype="bfloat16", seed=3
    )
    model, optimizer = pretrain.set_up(config, model_config, None)
    state = optimizer.state_tensors()
    assert model.recompute == "norm+swiglu"
    assert state["momentum.model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert state["exp_avg.model.norm.weight"].dtype == torch.bfloat16 and not any(k.startswith("master") for k in state)
    results = []
    for seed in (3, 3, 4):
        model, optimizer = pretrain.set_up(dataclasses.replace(config, seed=seed), model_config, None)
        for p in model.parameters():
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step(1e-3, 1.0)
        results.append(model.model.norm.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2]), "the seed, too"


def test_a_run_that_does_not_fit_on_the_gpu_is_refused(make_config, monkeypatch):
    card = types.SimpleNamespace(total_memory=1_600_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    big = make_config(device="cuda", dtype="bfloat16", seq_len=64, rows=10_000)
    with pytest.raises(ValueError, match="a training step does not fit: it takes .* smallest change first: --"):
        train(big, quiet=True)


def test_recomputation_changes_no_bit_even_within_a_run(make_config):
    kept, less, mixed = (make_config(out, recompute=r) for out, r in zip("abc", ("none", "norm+swiglu", "none")))
    want, got = weights(train(kept, quiet=True)), weights(train(less, quiet=True))
    with pytest.raises(Stop):
        train(mixed, loss_fn=failing_at(7), quiet=True)
    resumed = weights(train(make_config("c", recompute="full"), quiet=True))
    assert all(torch.equal(want[n], t[n]) for t in (got, resumed) for n in want)


def test_logits_are_never_whole(make_config, model_config, monkeypatch):
    """Neither in training nor in evaluation: the head is applied in linear_cross_entropy alone."""
    monkeypatch.setattr(pretrain.Qwen3, "head", None)
    path = train(make_config(steps=2), quiet=True)
    assert path.exists()


def test_a_finished_run_is_left_alone(make_config):
    config = make_config(steps=4)
    first = train(config, quiet=True)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert train(config, loss_fn=failing_at(0), quiet=True) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_settings_that_touch_the_weights_cannot_change_on_resume(make_config):
    train(make_config(steps=4), quiet=True)
    with pytest.raises(ValueError, match=r"config.lr: 0.01 in the checkpoint, now 0.02"):
        train(make_config(steps=4, lr=0.02), quiet=True)
    train(make_config(steps=4, log_every=1, keep=5), quiet=True)


def test_micro_steps_change_nothing_but_rounding(make_config):
    one, four = make_config("one", steps=6), make_config("four", steps=6, micros=4)
    train(one, quiet=True)
    train(four, quiet=True)
    for a, b in zip(records(one.out, "train"), records(four.out, "train")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(make_config, value):
    config, calls = make_config(steps=12, save_every=4, log_every=12), [0]

    def loss(model, batch):
        calls[0] += 1
        return next_token_loss(model, batch) * (value if calls[0] == 6 else 1)

    with pytest.raises(FloatingPointError, match="step 6: loss is (nan|inf)"):
        train(config, loss_fn=loss, quiet=True)
    assert checkpoint.latest(config.out / "checkpoints").step == 4
    assert [r["step"] for r in records(config.out, "train")] == [1, 2, 3, 4, 5]


def test_a_shard_that_is_damaged_while_it_is_read_stops_the_run_and_costs_nothing(make_config):
    want = weights(train(make_config("straight"), quiet=True))
    config, calls = make_config("damaged"), [0]
    (shard,) = config.data.glob("*.tok")
    whole = shard.read_bytes()

    def loss(model, batch):
        calls[0] += 1
        if calls[0] == 6:  # in place, as a failing disk does: the file is mapped already
            with open(shard, "r+b") as f:
                f.seek(len(whole) // 3)
                f.write(b"\xff" * (len(whole) - len(whole) // 3))
        return next_token_loss(model, batch)

    with pytest.raises(ValueError, match=r"train: document \d+ has token id 65535; the vocabulary has 64"):
        train(config, loss_fn=loss, quiet=True)
    assert checkpoint.latest(config.out / "checkpoints").step == 4
    shard.write_bytes(whole)
    got = weights(train(config, quiet=True))
    assert all(want[k].equal(got[k]) for k in want)


def test_evaluation_is_the_mean_over_all_tokens(make_config, model_config):
    config = make_config()
    model = checkpoint.read(train(config, quiet=True)).load_model("cpu")
    data = TokenShards(config.eval_data)
    got = evaluate(model, data, evaluation_batches(data, seq_len=16, rows=2))
    nats = 0.0
    stream = [(d, i) for d in range(len(data)) for i in range(int(data.lengths[d]))]
    for row in range(0, len(stream), 16):
        for d in {d for d, _ in stream[row : row + 16]}:
            places = [i for e, i in stream[row : row + 16] if e == d]
            tokens = [63, *data.read(d)][places[0] : places[-1] + 1]
            log_probs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
            nats -= sum(log_probs[k, data.read(d)[i]].item() for k, i in enumerate(places))
    assert got["tokens"] == data.index.n_tokens == 94 and got["loss"] == pytest.approx(nats / 94, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / data.index.n_bytes, rel=1e-5)


def test_tensorboard_has_the_scalars(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(steps=6, tensorboard=True)
    train(config, quiet=True)
    board = EventAccumulator(str(config.out / "tensorboard"))
    board.Reload()
    scalars = board.Scalars("train/loss")
    assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
    assert [s.value for s in scalars] == pytest.approx([r["loss"] for r in records(config.out, "train")])


def test_two_trainers_cannot_share_a_folder(make_config):
    config = make_config(steps=2)
    with pretrain.locked(config.out), pytest.raises(BlockingIOError, match="another process is training"):
        train(config, quiet=True)


def test_data_tokenizer_and_model_must_match(make_config, run_folder, make_data):
    (run_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="do not belong together"):
        train(make_config(tokenizer=run_folder / "tokenizer.json"), quiet=True)
    model = json.loads((run_folder / "model.json").read_text()) | {"vocab_size": 32}
    (run_folder / "small.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match="has a vocabulary of 64, the model's is 32"):
        train(make_config(model=str(run_folder / "small.json")), quiet=True)


def test_command_line(make_config, trainer_command, capsys):
    args = trainer_command(make_config(steps=2))[3:]
    pretrain.main(args)
    assert "held-out" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*args, "--learning-rate", "1"])
    assert stop.value.code == 2 and "--learning-rate" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*args, "--lr", "-1"])
    assert stop.value.code == 2 and "lr is -1.0; expected above 0" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="error: .*index.json does not exist"):
        pretrain.main(["--data", "/nowhere", "--out", str(make_config().out)])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "steps is 0"), ({"rows": 6, "micros": 4}, "rows is 6; expected a multiple of micros = 4"),
        ({"lr": math.nan}, "lr is nan"), ({"dtype": "float16"}, "dtype is 'float16'"), ({"seed": -1}, "seed is -1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of"),
        ({"optimizer_states": "int8"}, "optimizer_states is 'int8'"),
        ({"recompute": "some"}, "recompute is 'some'; expected one of"),
        ({"schedule": "step"}, "schedule is 'step'"), ({"decay": 1.5}, "decay is 1.5"),
        ({"warmup": 13}, "warmup is 13; expected 0 to steps = 12"),
        ({"router_z_loss": -1e-3}, "router_z_loss is -0.001"),
        ({"lr_floor": 2.0}, "floor 2.0"), ({"betas": (0.9, 1.0)}, "betas is"), ({"max_grad_norm": 0}, "max_grad_norm is 0"),
    ],
    ids=str,
)
def test_bad_settings(make_config, changes, words):
    with pytest.raises(ValueError, match=words):
        make_config(**changes)


def test_auto_is_resolved():
    config = Config("d", "o").resolved()
    assert config.device in ("cpu", "cuda") and config.dtype in ("float32", "bfloat16")


def test_trains_on_a_mixture_and_resumes_bitwise(make_config, make_data, run_folder):
    make_data([200] * 8, "long", seed=3, counting=True)
    mixture = Mixture((Part("train", 0.75), Part("long", 0.25, min_tokens=100)))
    mixture.write(run_folder / "mixture.json")
    straight, broken = (dataclasses.replace(make_config(out), data=run_folder / "mixture.json") for out in "ab")
    expected = train(straight, quiet=True)
    with pytest.raises(Stop):
        train(broken, loss_fn=failing_at(7), quiet=True)
    got = train(broken, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(expected).values(), weights(got).values()))
    run = json.loads((straight.out / "run.json").read_text())
    assert [p["share"] for p in run["data"]["mixture"]] == [0.75, 0.25]
    Mixture((Part("train", 0.5), Part("long", 0.5))).write(run_folder / "mixture.json")
    with pytest.raises(ValueError, match="data.mixture: .* in the checkpoint, now"):
        train(straight, quiet=True)


def test_starts_from_the_weights_of_another_run(make_config, model_config):
    first = train(make_config("a", steps=20), quiet=True)
    longer = dataclasses.replace(model_config, rope_theta=1_000_000, max_position_embeddings=512)
    second = make_config("b", steps=4, init=first, lr=1e-9, seq_len=64, rows=1)
    path = train(second, model_config=longer, quiet=True)
    was, now = weights(first), weights(path)
    assert all((was[k] - now[k]).abs().max() < 1e-6 for k in was)
    model = checkpoint.read(path).load_model("cpu")
    assert model.config.rope_theta == 1_000_000 and model.config.max_position_embeddings == 512
    fresh = pretrain.Qwen3(longer)
    started, _ = pretrain.set_up(second, longer, None)
    assert torch.equal(started.inv_freq, fresh.inv_freq), "the new angles, not the old"
    with pytest.raises(ValueError, match="hidden_size is 32, the weights have 16"):
        train(make_config("c", init=first), model_config=dataclasses.replace(model_config, hidden_size=32), quiet=True)
    loss = records(make_config("a").out, "train")[-1]["loss"]
    assert train(make_config("d", steps=2, init=first), quiet=True) and records(make_config("d").out, "train")[0]["loss"] < loss + 0.5
    assert json.loads((make_config("d").out / "run.json").read_text())["model"]["rope_parameters"]["rope_theta"] == 10_000


def test_another_evaluation_is_logged(make_config):
    config = make_config()
    train(config, eval_fn=lambda model: {"needle": 0.5, "size": model.config.hidden_size}, quiet=True)
    assert [(r["step"], r["needle"], r["size"]) for r in records(config.out, "groups")] == [(s, 0.5, 16) for s in (5, 10, 12)]


@pytest.fixture
def experts(model_config, run_folder):
    """The config of a mixture whose second layer alone is dense, which is also what ``make_config`` trains."""
    config = dataclasses.replace(
        model_config, num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=(1,),
        initializer_range=0.3, router_aux_loss_coef=0.01,
    )
    (run_folder / "model.json").write_text(json.dumps(config.to_dict()))
    return config


def test_what_routers_do_is_logged(make_config, experts, monkeypatch):
    """Of the last step before each record, over its micro-steps, and the same after a resumption."""
    straight, broken, seen = make_config("a", micros=2), make_config("b", micros=2), []
    counted = moe.expert_counts
    monkeypatch.setattr(moe, "expert_counts", lambda routing: seen.append(counted(routing)) or seen[-1])
    train(straight, quiet=True)
    got = records(straight.out, "router")
    assert [r["step"] for r in got] == [3, 4, 5, 6, 8, 9, 10, 12]  # where something is logged, evaluated or saved
    for r in got:
        counts = sum(seen[2 * r["step"] - 2 : 2 * r["step"]]).tolist()  # [layers, experts]
        assert len(counts) == 2 and all(sum(c) == 4 * 16 * 2 for c in counts)
        assert r["load_max_over_mean"] == pytest.approx(max(max(c) / 16 for c in counts))
        assert r["load_entropy"] == pytest.approx(min(-sum(n / 128 * math.log(n / 128) for n in c if n) for c in counts))
        assert r["dead_experts"] == sum(n == 0 for c in counts for n in c)
    assert any(r["dead_experts"] for r in got) and len({r["load_entropy"] for r in got}) > 1, "it makes a difference"

    def stops(model, batch, right=moe.MoELoss.__call__, calls=[0]):
        calls[0] += 1
        if calls[0] == 14:
            raise Stop
        return right(broken_loss, model, batch)

    broken_loss = moe.MoELoss(2)
    with pytest.raises(Stop):
        train(broken, loss_fn=stops, quiet=True)
    train(broken, quiet=True)
    assert records(straight.out, "train") == records(broken.out, "train")
    assert records(broken.out, "router") == [r for r in got if r["step"] > 4], "a loss without metrics has none"


def test_a_dense_model_has_no_routers(make_config):
    config = make_config(steps=3)
    train(config, quiet=True)
    assert not records(config.out, "router")
    with pytest.raises(ValueError, match="router_z_loss is 0.001; expected 0 for a model without experts"):
        train(make_config("other", router_z_loss=1e-3), quiet=True)


def test_the_z_loss_of_routers_is_in_the_loss_and_works(make_config, experts):
    configs = {z: make_config(str(z), router_z_loss=z, steps=30) for z in (0.0, 0.5)}
    ends = {z: checkpoint.read(train(c, quiet=True)).load_model("cpu") for z, c in configs.items()}
    batch = pretrain.open_loader(configs[0.0].data, seq_len=16, rows=4, seed=0).batch(0)

    def squares(model):  # mean of logsumexp^2 over tokens and layers
        logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens, return_router_logits=True)[1]
        return torch.stack(logits).double().logsumexp(-1).square().mean().item()

    first = [records(c.out, "train")[0]["loss"] for c in configs.values()]
    assert first[1] - first[0] == pytest.approx(0.5 * squares(pretrain.Qwen3(experts).init_weights(0)), rel=1e-5)
    assert squares(ends[0.5]) < 0.7 * squares(ends[0.0])
