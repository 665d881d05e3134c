"""Predicted memory of post-training against what torch's CPU allocator really gives out."""

import dataclasses
import importlib
import types
from pathlib import Path

import pytest
import torch
from test_memory import DENSE, GIB, MODELS
from tiny_chat import model_folder, tokenizer, vocabulary  # noqa: F401

from qwen3_model import load
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3
from qwen3_model.recompute import POLICIES
from training import core, distill, lora, rl, sft, stage_memory
from training.config import DTYPES
from training.distill import DistillConfig
from training.losses import Divergence, cross_entropy
from training.memory import allocated, usable
from training.optim import OPTIMIZERS, STATES, Optimizer
from training.recipes import cold_start, fusion, general_rl, reasoning_rl
from training.recipes import distill as recipes_distill
from training.rl import RLConfig
from training.rollout import Request
from training.samples import Sample, packs
from training.sft import SFTConfig
from training.stage_memory import Distillation, FineTuning, Reinforcement, advice, passing
from training.static_rollout import StaticRoller

TEACHER = dataclasses.replace(DENSE, hidden_size=160, num_hidden_layers=2)
SHORT_MODEL = dataclasses.replace(DENSE, vocab_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
SIZES = MODELS | {"short": SHORT_MODEL} | {  # of a small vocabulary, so that the loss is not the peak
    f"{name}, few words": dataclasses.replace(MODELS[name], vocab_size=32) for name in ("wide", "experts", "some experts")
}
STEPS = {"sft": FineTuning, "rl": Reinforcement, "distill": Distillation}


@pytest.fixture
def made(tmp_path, tokenizer):
    """made(stage, model, **changes): the step's sizes; its models lie in folders."""

    def make(stage, model, **changes):
        common = {"start": tmp_path / "start", "out": tmp_path / "run", "dtype": "float32", "device": "cpu"}
        common |= {"tokens_per_pack": 384}
        rollouts = {"families": ("chain",), "groups": 4, "group_size": 4, "max_prompt": 32, "max_tokens": 65, "slots": 4}
        own = {
            "sft": lambda **kw: SFTConfig(data=tmp_path / "data.jsonl", **{"rows": 8, "max_tokens": 97} | kw),
            "rl": lambda **kw: RLConfig(**rollouts | kw),
            "distill": lambda **kw: DistillConfig(teacher=tmp_path / "teacher", **rollouts | kw),
        }
        known = {f.name for f in dataclasses.fields({"sft": SFTConfig, "rl": RLConfig, "distill": DistillConfig}[stage])}
        config = own[stage](**common | {k: v for k, v in changes.items() if k in known})
        taught = dataclasses.replace(TEACHER, vocab_size=SIZES[model].vocab_size)
        for folder, sizes in (("start", SIZES[model]), ("teacher", taught)):
            load.save(Qwen3(sizes).init_weights(0), tmp_path / folder)
            tokenizer.save(tmp_path / folder / "tokenizer.json")
        return stage_memory._made(STEPS[stage], config, "cpu")

    return make


def full_packs(step):
    samples, longest = step.samples()
    tokens = torch.randint(step.model.vocab_size, (samples, longest + 1)).tolist()
    layers = sum(map(step.model.is_moe_layer, range(step.model.num_hidden_layers)))
    experts = None
    if layers and getattr(step.config, "replay_routing", False):
        experts = torch.rand(longest, layers, step.model.num_experts).topk(step.model.num_experts_per_tok).indices.short()
    ones = [0.0] + [1 / samples / longest] * longest
    return packs([Sample(t, ones, [1.0] * len(t), [-5.0] * len(t), experts) for t in tokens], step.config.tokens_per_pack)


def measured(step):
    """Bytes at the peak of an update, the second of full packs."""
    config, teacher, loss = step.config, None, cross_entropy
    if isinstance(step, Distillation):
        teacher = load.load(config.teacher, dtype=DTYPES[config.dtype]).requires_grad_(False)
        loss = Divergence(teacher, config.direction, config.temperature)
    elif isinstance(step, Reinforcement):
        loss = config.loss()
    run, batch = core.Run(config, None, None), full_packs(step)
    assert (len(batch) > 1) == step.sums and len(batch[0].tokens) == len(batch[0].where) == step.N
    run.update(batch, loss, 1e-4)
    models = [run.model, *([teacher] if teacher else [])]
    standing = [*(p for m in models for p in m.parameters()), *run.optimizer.state_tensors().values()]
    return sum(t.nbytes for t in standing) + allocated(lambda: run.update(batch, loss, 1e-4))[1]


WHOLE = {"tokens_per_pack": 8192}  # an update is one pack
LORA, SHORT = {"lora_rank": 8}, {"tokens_per_pack": 32, "max_tokens": 17}


@pytest.mark.parametrize(
    "stage, model, changes, moment",
    [
        ("sft", "tied", {}, "loss"), ("sft", "untied", WHOLE | {"dtype": "bfloat16"}, "loss"),
        ("sft", "experts", {"recompute": "norm+swiglu"}, "loss"), ("sft", "tied", LORA | {"dtype": "bfloat16"}, "loss"),
        ("sft", "wide, few words", {}, "backward of layer 2"), ("sft", "wide, few words", WHOLE, "backward of layer 2"),
        ("sft", "wide, few words", LORA, "backward of layer 2"),
        ("sft", "wide, few words", LORA | {"recompute": "norm+swiglu"}, "backward of layer 2"),
        ("sft", "wide, few words", LORA | {"recompute": "full", "dtype": "bfloat16"}, "backward of layer 2"),
        ("sft", "experts, few words", {"recompute": "full"}, "backward of layer 2"),
        ("sft", "experts, few words", LORA, "backward of layer 2"),
        ("sft", "some experts, few words", LORA | {"recompute": "norm+swiglu"}, "backward of layer 2"),
        ("sft", "some experts, few words", LORA | {"recompute": "full", "dtype": "bfloat16"}, "backward of layer 2"),
        ("sft", "experts, few words", SHORT | {"optimizer": "muon"}, "update"),
        ("sft", "tied", SHORT | {"optimizer_states": "bfloat16", "dtype": "bfloat16"}, "update"),
        ("rl", "tied", {}, "loss"), ("rl", "untied", WHOLE, "loss"), ("rl", "experts", LORA | {"dtype": "bfloat16"}, "loss"),
        ("rl", "experts, few words", {}, "backward of layer 2"), ("rl", "wide, few words", LORA, "backward of layer 2"),
        ("distill", "tied", {}, "loss"), ("distill", "untied", {"dtype": "bfloat16"}, "loss"),
        ("distill", "tied", WHOLE | LORA, "loss"), ("distill", "experts, few words", {}, "backward of layer 2"),
    ],
    ids=str,
)
def test_peak_of_a_real_update(made, stage, model, changes, moment):
    step = made(stage, model, **changes)
    bounds = ("sampling", "merging the adapters")  # not of an update
    estimate = max((e for e in step.moments() if e.moment not in bounds), key=lambda e: e.total)
    assert estimate.moment == moment, "each moment is tested where it is the peak"
    assert estimate.total == pytest.approx(measured(step), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STEPS)
def test_peak_of_a_loss_in_many_chunks(made, stage, dtype, monkeypatch):
    """Of 256 tokens, so that gradients of the head in bfloat16 are summed in float32."""
    module = importlib.import_module("qwen3_kernels.ops.linear_cross_entropy")  # the package has the function
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    step = made(stage, "short", dtype=dtype, tokens_per_pack=1344, rows=14, groups=7, optimizer_states="bfloat16")
    training = [e for e in step.moments() if e.moment != "sampling"]
    assert max(training, key=lambda e: e.total).moment in ("loss", "backward of the loss")
    assert step.total(256) == (4 * step.head if dtype == "bfloat16" else 0)
    assert max(e.total for e in training) == pytest.approx(measured(step), rel=0.02)


def test_labels_need_no_float32_sum_on_a_gpu(made):
    step = dataclasses.replace(made("distill", "short", dtype="bfloat16", tokens_per_pack=1344, groups=7), device="cuda")
    assert step.N > 4 * 256 and step.total(256) == 0 and step.total(256, labels=False) == 4 * step.head


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("model", ["untied", "some experts"])
def test_weights_and_optimizer_of_adapters_are_exact(made, model, states, kind):
    step = made("sft", model, optimizer=kind, optimizer_states=states, dtype="bfloat16", **LORA)
    qwen = lora.add(Qwen3(SIZES[model]).to(torch.bfloat16), 8)
    optimizer = Optimizer(qwen, kind=kind, states=states)
    estimate = next(step.moments())
    assert estimate.weights == sum(p.nbytes for p in qwen.parameters())
    assert estimate.optimizer == sum(t.nbytes for t in optimizer.state_tensors().values())


@pytest.mark.parametrize("model", ["tied", "experts"])
def test_merging(made, model):
    step = made("sft", model, **LORA)
    qwen = lora.add(Qwen3(SIZES[model]).init_weights(0), 8)
    (estimate,) = (e for e in step.moments() if e.moment == "merging the adapters")

    def merge():
        with lora.merged(qwen):
            pass

    assert estimate.temporary == pytest.approx(allocated(merge)[1], rel=0.02)


@pytest.mark.parametrize("model", ["tied", "some experts"])
def test_rollouts_are_what_a_static_roller_keeps(made, model):
    step, m = made("rl", model, slots=6), SIZES[model]
    qwen = Qwen3(m).init_weights(0)
    roller = StaticRoller(qwen, slots=6, max_len=97, stop_ids=(0,), capture=False)
    tensors = [t for t in (*vars(roller).values(), roller.cache.k, roller.cache.v) if type(t) is torch.Tensor]
    logits = 6 * m.vocab_size * 4
    assert step.rollouts() - logits == pytest.approx(sum(t.nbytes for t in tensors), rel=0.002)


@pytest.mark.parametrize("model", ["wide, few words", "experts, few words"])
def test_sampling_is_bounded(made, model):
    """All slots are filled with prompts as long as allowed, and drawn from."""
    step = made("rl", model, slots=8)
    qwen = Qwen3(SIZES[model]).init_weights(0)
    roller = StaticRoller(qwen, slots=8, max_len=97, stop_ids=(99,), capture=False)
    (estimate,) = (e for e in step.moments() if e.moment == "sampling")

    def play():
        return len(roller.run([Request(i, [i] * 32, i, 65) for i in range(8)]))

    play()  # with the kernels' self-checks
    roller.reset()
    assert 0.5 * estimate.temporary < allocated(play)[1] <= 1.02 * estimate.temporary


@pytest.mark.parametrize("model", ["tied", "wide", "experts"])
def test_a_forward_without_gradients_is_bounded(model):
    """And not by far, so that little is refused that would fit."""
    qwen, N = Qwen3(SIZES[model]).init_weights(0), 256
    tokens, ends = torch.randint(32, (N,)), torch.tensor([0, N], dtype=torch.int32)

    @torch.no_grad()
    def forward():
        return qwen(tokens, cu_seqlens=ends, return_hidden=True)

    forward()  # with the kernels' self-checks
    bound = N * passing(SIZES[model], 4)
    assert 0.6 * bound < allocated(forward)[1] <= 1.02 * bound


# ---- before a run ----------------------------------------------------------------------------------------------------

RUN = {"sft": sft.fine_tune, "rl": rl.reinforce, "distill": distill.distill}
LARGE = {  # beside a model of three megabytes
    "sft": {"rows": 10_000, "tokens_per_pack": 10**6}, "rl": {"groups": 2000, "tokens_per_pack": 10**6},
    "distill": {"groups": 2000, "tokens_per_pack": 10**6},
}


@pytest.fixture
def card(monkeypatch):
    """A GPU of 1.6 GB, of which 446 MB are usable."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=1_600_000_000))


@pytest.mark.parametrize("stage", STEPS)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_read_or_written(made, card, stage, monkeypatch):
    config = made(stage, "tied", device="cuda", dtype="bfloat16", **LARGE[stage]).config

    def touched(*args, **kwargs):
        raise AssertionError("nothing is to be loaded")

    for owner, name in ((load, "load"), (sft, "read"), (core, "locked"), (rl, "Pool"), (distill, "Pool")):
        monkeypatch.setattr(owner, name, touched)
    with pytest.raises(ValueError, match=r"a training step does not fit: it takes .* first: --tokens-per-pack \d+ \(") as error:
        RUN[stage](config, quiet=True)
    assert ("rollouts 0." in str(error.value)) == (stage != "sft") and not config.out.exists()
    fits = made(stage, "tied", device="cuda", dtype="bfloat16").config
    with pytest.raises(AssertionError, match="nothing is to be loaded"):
        RUN[stage](fits, quiet=True)


def test_the_kv_cache_counts(made, card):
    step = made("rl", "tied", device="cuda", slots=4096)
    with pytest.raises(ValueError, match=r"smallest change first: --slots \d+ \("):
        stage_memory.check(Reinforcement, step.config)
    assert stage_memory.check(Reinforcement, dataclasses.replace(step.config, device="cpu")) is None


def large(name, config):
    """A step of a released model on a GPU."""
    kind = FineTuning if isinstance(config, SFTConfig) else Reinforcement
    return kind(config, Qwen3Config.from_name(name), "cuda")


@pytest.mark.parametrize("room", [40, 12])
def test_advice_fits_is_minimal_and_in_order(made, room):
    sizes = {"tokens_per_pack": 16384, "groups": 32, "max_tokens": 2048, "slots": 256}
    step = large("Qwen3-1.7B", made("rl", "tied", dtype="bfloat16", device="cuda", **sizes).config)
    options = advice(step, room * GIB)
    assert options and step.peak().total > room * GIB
    for flags, estimate in options:
        words = flags.split()
        changes = {w[2:].replace("-", "_"): int(v) if v.isdigit() else v for w, v in zip(words[::2], words[1::2])}
        peak = lambda **kw: dataclasses.replace(step, config=dataclasses.replace(step.config, **kw)).peak()  # noqa: E731
        assert peak(**changes) == estimate and estimate.total <= room * GIB
        for name in changes:
            assert peak(**{k: v for k, v in changes.items() if k != name}).total > room * GIB, "one dial less does not do"
    results = [("--lora-rank" in flags, "--optimizer-states" in flags) for flags, _ in options]
    assert results == sorted(results) and results[-1][0], "adapters are the last resort"


def test_no_way_out(made):
    step = large("Qwen3-32B", made("sft", "tied", dtype="bfloat16", device="cuda").config)
    assert advice(step, 60 * GIB) == []


def test_adapters_of_8b_as_measured(made):
    """58.2 GB on an H100, 2 rows of 4,096 tokens, rank 16 (README.md)."""
    config = made("sft", "tied", dtype="bfloat16", rows=2, max_tokens=4097, tokens_per_pack=8192, lora_rank=16).config
    assert large("Qwen3-8B", config).peak().total == pytest.approx(58.2e9, rel=0.02)


def test_command_line(made, capsys):
    config = made("distill", "tied").config
    flags = ["--start", str(config.start), "--teacher", str(config.teacher), "--out", str(config.out), "--families", "chain"]
    stage_memory.main(["distill", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(POLICIES) and all("rollouts" in line for line in lines)
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        stage_memory.main(["distill", *flags, "--teacher", "/nowhere"])


RECIPES = {
    "cold start": (FineTuning, cold_start.recipe), "fusion": (FineTuning, fusion.recipe),
    "off-policy": (FineTuning, recipes_distill.off_policy), "on-policy": (Distillation, recipes_distill.on_policy),
    "reasoning": (Reinforcement, lambda start, _, out: reasoning_rl.recipe(start, out)),
    "general": (Reinforcement, lambda start, _, out: general_rl.recipe(start, out)),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_the_smallest_model_on_80_gb(recipe):
    step, make = RECIPES[recipe]
    models = [Qwen3Config.from_name(n) for n in ("Qwen3-0.6B", "Qwen3-1.7B")[: 2 if step is Distillation else 1]]
    student, *teacher = models
    config = dataclasses.replace(make(*map(Path, "abc")), dtype="bfloat16")
    assert step(config, student, "cuda", *teacher).peak().total <= usable(80 * 10**9)
