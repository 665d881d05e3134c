"""The drop-in for transformers: losses, logits and gradients of the unpatched model, and nothing left behind."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from tiny_hf import V5, batch, check_error_rule, logits, losses, make, parametrize_dtype, parametrize_kind, step, wide
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwen3_kernels import dispatch
from qwen3_kernels.integrations import transformers as integration
from qwen3_kernels.integrations.transformers import NAME, OPS, apply, revert

PACKED = torch.cat([torch.arange(n) for n in (5, 1, 8, 7)])[None]
CU_SEQLENS = torch.tensor([0, 5, 6, 14, 21], dtype=torch.int32)


def only(*ops: str) -> dict[str, bool]:
    return {op: op in ops for op in OPS}


@pytest.fixture
def calls(monkeypatch):
    """The calls of each op: keywords, and the dtype of the first argument."""
    seen = {}

    def count(name, *stands_for):
        function = getattr(integration, name)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            for each in (name, *stands_for):
                seen.setdefault(each, []).append(kwargs | {"dtype": args[0].dtype})
            return function(*args, **kwargs)

        return counted

    for name in ("rms_norm", "qk_norm_rope", "swiglu", "linear_cross_entropy", "attention_op", "moe_experts"):
        monkeypatch.setattr(integration, name, count(name))
    monkeypatch.setattr(integration, "qk_norm_attention", count("qk_norm_attention", "qk_norm_rope", "attention_op"))
    return seen


# --- Losses, logits, gradients.


def exact_routing(kind: str, dtype: torch.dtype) -> dict:
    """All experts for all tokens where rounding would decide who is chosen."""
    return {"num_experts_per_tok": 4} if kind == "moe" and dtype == torch.bfloat16 else {}


@parametrize_dtype
@parametrize_kind
def test_error_rule(kind, dtype):
    model, inputs = make(kind, dtype, **exact_routing(kind, dtype)), batch()
    truth_model = wide(model)

    def steps(model):
        """The gradients of four steps taken together: of 16 numbers alone, the error of the unpatched model is luck."""
        rows = [step(model, {n: t.roll(shift, 1) for n, t in inputs.items()}) for shift in range(4)]
        return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}

    truth, plain = steps(truth_model), steps(model)

    def values(model):
        return {"logits": logits(model, inputs), "losses": losses(model, inputs)}

    truth_values, plain_values = values(truth_model), values(model)
    apply(model)
    check_error_rule(steps(model), plain, truth)
    check_error_rule(values(model), plain_values, truth_values)


@pytest.mark.parametrize("op", [op for op in OPS if op != "experts"])
def test_every_op_alone(op):
    model, inputs = make(dtype=torch.bfloat16), batch()
    truth, plain = step(wide(model), inputs), step(model, inputs)
    report = apply(model, **only(op))
    assert list(report.patched) == [op]
    check_error_rule(step(model, inputs), plain, truth)


@pytest.mark.skipif(not V5, reason="one module per expert in transformers 4")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_alone(implementation, calls):
    model, inputs = make("moe"), batch()
    model.config._experts_implementation = implementation
    truth, plain = step(wide(model), inputs), step(model, inputs)
    report = apply(model, **only("experts"))
    assert report.patched == {"experts": {"Qwen3MoeExperts": 1}}
    assert report.notes == ()
    check_error_rule(step(model, inputs), plain, truth)
    assert len(calls["moe_experts"]) == 1 and "swiglu" not in calls


@pytest.mark.skipif(not V5, reason="transformers 4 has no interface for experts")
def test_experts_by_name(calls):
    """After apply of anything the implementation has a name, and can be asked for alone."""
    model, inputs = make("moe"), batch()
    truth, plain = step(wide(model), inputs), step(model, inputs)
    apply()
    revert_later = model.config._experts_implementation
    model.config._experts_implementation = NAME
    check_error_rule(step(model, inputs), plain, truth)
    assert len(calls["moe_experts"]) == 1
    model.config._experts_implementation = revert_later


@pytest.mark.skipif(not V5, reason="transformers 4 has no interface for experts")
def test_experts_of_another_kind_are_left_alone(calls):
    model, inputs = make("moe", hidden_act="gelu"), batch()
    plain = step(model, inputs)
    apply(model)
    torch.testing.assert_close(step(model, inputs)["loss"], plain["loss"])
    assert "moe_experts" not in calls
    with pytest.raises(ValueError, match="experts_implementation is 'qwen3_kernels', but Qwen3MoeExperts"):
        experts, index = model.model.layers[0].mlp.experts, torch.zeros(2, 2, dtype=torch.int64)
        integration.experts_forward(experts, torch.ones(2, 64), index, torch.ones(2, 2))


@pytest.mark.skipif(not V5, reason="transformers 4 has no interface for experts")
def test_experts_of_other_ranks_add_nothing():
    """Under expert parallelism their index is the number of experts, their weight 0 or not."""
    experts = make("moe").model.layers[0].mlp.experts
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [2, 4], [4, 0], [1, 2], [4, 3]])
    x, weights = torch.randn(7, 64), torch.rand(7, 2)
    want = experts(x, index.clamp(max=3), weights * (index < 4))
    apply(None, **only("experts"))
    torch.testing.assert_close(experts(x, index, weights), want)


def test_every_op_is_used_once_a_place(calls):
    model = make()
    apply(model)
    step(model, batch())
    assert {name: len(c) for name, c in calls.items()} == {
        "rms_norm": 5, "qk_norm_rope": 2, "swiglu": 2, "linear_cross_entropy": 1, "attention_op": 2, "qk_norm_attention": 2,
    }


@parametrize_kind
def test_yarn_and_far_positions_keep_float32_angles(kind):
    """transformers rounds cos and sin to bf16; far positions show that ours does not do worse."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    changes = {"rope_parameters": rope} if V5 else {"rope_scaling": rope}
    model = make(kind, torch.bfloat16, **changes, **exact_routing(kind, torch.bfloat16))
    inputs = batch() | {"position_ids": torch.arange(21)[None] + torch.tensor([[100], [3000]])}
    truth, plain = step(wide(model), inputs), step(model, inputs)
    rotary = model.model.rotary_emb
    wanted = rotary(torch.empty(0, dtype=torch.float64), inputs["position_ids"])
    apply(model)
    check_error_rule(step(model, inputs), plain, truth)
    for a, b in zip(rotary(torch.empty(0, dtype=torch.bfloat16), inputs["position_ids"]), wanted):
        assert a.dtype == torch.float32 and torch.equal(a.double(), b[..., :8])


@parametrize_kind
def test_autocast(kind, calls):
    model, inputs = make(kind, **exact_routing(kind, torch.bfloat16)), batch()
    truth = step(wide(model), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, inputs)
        apply(model)
        got = step(model, inputs)
    check_error_rule(got, plain, truth, torch.bfloat16)
    assert got["lm_head.weight"].dtype == torch.float32
    for op in ("linear_cross_entropy", "qk_norm_rope", "attention_op"):
        assert calls[op][0]["dtype"] == torch.bfloat16, op


# --- The loss without logits.


@parametrize_kind
def test_training_with_labels_gives_no_logits(kind, calls):
    model, inputs = make(kind), batch()
    apply(model)
    out = model(**inputs)
    assert out.logits is None and out.loss.requires_grad
    assert (getattr(out, "aux_loss", None) is not None) == (kind == "moe")
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 21, 128)
    assert model(**inputs, logits_to_keep=torch.arange(21)).logits.shape == (2, 21, 128)
    assert len(calls["linear_cross_entropy"]) == 1
    model.eval()
    assert model(**inputs).logits.shape == (2, 21, 128)
    assert model(input_ids=inputs["input_ids"], logits_to_keep=2).logits.shape == (2, 2, 128)
    assert len(calls["linear_cross_entropy"]) == 1


@pytest.mark.parametrize("options", [
    {"num_items_in_batch": 50}, {"num_items_in_batch": torch.tensor(50)}, {"ignore_index": 7}, {"shift": True},
], ids=["int", "tensor", "ignore_index", "shift_labels"])
def test_options_of_the_loss(options, calls):
    model, inputs = make(), batch()
    options = dict(options)
    if options.pop("shift", False):
        options["shift_labels"] = inputs["labels"].roll(2, 1)
    if "ignore_index" in options:
        inputs["labels"][:, :9] = 7
    plain, truth = step(model, inputs | options), step(wide(model), inputs | options)
    assert abs(plain["loss"] - step(model, batch())["loss"]) > 1e-3
    apply(model)
    check_error_rule(step(model, inputs | options), plain, truth)
    assert len(calls["linear_cross_entropy"]) == 1


def test_positional_arguments_and_tuples():
    model, inputs = make(), batch()
    names = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels"]
    plain = model(*[inputs.get(name) for name in names]).loss
    apply(model)
    torch.testing.assert_close(model(*[inputs.get(name) for name in names]).loss, plain)
    out = model(**inputs, return_dict=False)
    assert isinstance(out, tuple)
    torch.testing.assert_close(out[0], plain)


def test_hidden_states_are_returned():
    model, inputs = make(), batch()
    plain = model(**inputs, output_hidden_states=True).hidden_states
    apply(model)
    got = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(plain) == 3
    for a, b in zip(got, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_hidden_states():
    """They leave the residual stream where it forks."""
    model, inputs = make(), batch()

    def gradients(model):
        model.zero_grad()
        hidden = model.model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states
        weights = torch.linspace(-1, 1, hidden[0].numel(), dtype=torch.float64).view_as(hidden[0])
        sum((h.square() * weights.to(h.dtype)).sum() for h in hidden).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    truth, plain = gradients(wide(model)), gradients(model)
    apply(model)
    check_error_rule(gradients(model), plain, truth)


def test_a_loss_of_ones_own_gets_its_logits(calls):
    model, inputs = make(), batch()
    apply(model)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    assert model(**inputs).logits is not None
    assert "linear_cross_entropy" not in calls


def test_signature_stays():
    import inspect

    model = make()
    before = inspect.signature(model.forward)
    apply(model)
    assert inspect.signature(model.forward) == before  # Trainer reads from it what the model accepts


# --- Before and after construction, wrappers, counts.


@parametrize_kind
def test_before_construction_equals_after(kind):
    inputs = batch()
    report = apply()
    before = make(kind)
    assert report.model is None and "Qwen3RMSNorm (class)" in str(report)
    assert before.config._attn_implementation == NAME
    got = step(before, inputs)
    assert before(**inputs).logits is None
    revert()
    assert before.config._attn_implementation == "sdpa"
    assert before(**inputs).logits is not None
    after = make(kind)
    apply(after)
    for name, value in step(after, inputs).items():
        assert torch.equal(value, got[name]), name


def test_an_attention_that_was_named_is_kept():
    apply()
    assert make(attn_implementation="eager").config._attn_implementation == "eager"


@parametrize_kind
def test_report_counts(kind):
    model = make(kind)
    report = apply(model)
    p = "Qwen3Moe" if kind == "moe" else "Qwen3"
    expected = {
        "rms_norm": {f"{p}RMSNorm": 9, f"{p}DecoderLayer": 2},
        "qk_norm_rope": {f"{p}Attention": 2, f"{p}RotaryEmbedding": 1},
        "swiglu": {f"{p}MLP": 1 if kind == "moe" else 2},
        "linear_cross_entropy": {f"{p}ForCausalLM": 1},
        "attention": {f"{p}Attention": 2},
    }
    if kind == "moe":
        expected["experts"] = {"Qwen3MoeExperts": 1} if V5 else {"Qwen3MoeMLP": 5}
        expected["swiglu"] = {"Qwen3MoeMLP": 1 if V5 else 5}
    assert report.patched == expected
    assert f"{p}RMSNorm: 9 instances" in str(report)
    assert apply(model) == report  # again, and the same


def test_a_model_without_dense_layers_has_no_swiglu():
    report = apply(make("moe", mlp_only_layers=[]))
    assert ("swiglu" in report.patched) == (not V5)
    assert "experts" in report.patched


def test_submodules_and_other_heads():
    model = make()
    report = apply(model.model, linear_cross_entropy=False)
    assert report.model == "Qwen3Model"
    head = transformers.Qwen3ForSequenceClassification(model.config)
    with pytest.raises(ValueError, match="nothing to patch for linear_cross_entropy in Qwen3ForSequenceClassification"):
        apply(head)
    assert apply(head, linear_cross_entropy=False).patched["rms_norm"]["Qwen3RMSNorm"] == 9


def test_loud_failures():
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Qwen3"):
        apply(llama)
    with pytest.raises(ValueError, match="Linear is not a Qwen3"):
        apply(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no op was asked for"):
        apply(make(), **only())
    with pytest.raises(ValueError, match="nothing to patch for experts in Qwen3ForCausalLM"):
        apply(make(), **only("experts"))
    model = make()
    foreign = model.model.layers[1].mlp
    foreign.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"layers.1.mlp \(Qwen3MLP\) was replaced by code in .*test_transformers.py"):
        apply(model)
    assert "forward" not in vars(model.model.layers[0].mlp), "nothing may be patched by an apply that fails"
    assert apply(model, swiglu=False)


def test_another_activation_is_left_alone(calls):
    model, inputs = make(hidden_act="gelu"), batch()
    plain = step(model, inputs)
    report = apply(model)
    assert any("not SiLU" in note for note in report.notes)
    torch.testing.assert_close(step(model, inputs)["loss"], plain["loss"])
    assert "swiglu" not in calls


def test_subclass_with_its_own_forward_is_left_alone():
    class Other(modeling_qwen3.Qwen3MLP):
        def forward(self, x):
            return 0 * x

    model = make()
    model.model.layers[0].mlp = Other(model.config)
    assert apply(model).patched["swiglu"] == {"Qwen3MLP": 1}
    assert model.model.layers[0].mlp(torch.ones(1, 64)).abs().sum() == 0


def test_copies_work():
    model, inputs = make(), batch()
    apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert logits(twin, inputs).abs().sum() > 0, "the copy must use its own weights"


# --- PEFT, accelerate.


def lora(model, **changes):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **targets | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("when, saved", [
    ("after", None), ("before", ["lm_head"]),
    ("after", ["q_norm", "input_layernorm", "post_attention_layernorm", "lm_head"]),
], ids=["lora", "before", "norms and head"])
def test_peft(saved, when, calls):
    inputs = batch()
    plain_model = lora(make(), modules_to_save=saved)
    plain, truth = step(plain_model, inputs), step(wide(plain_model), inputs)
    base = make()
    if when == "before":
        apply(base)
    model = lora(base, modules_to_save=saved)
    if when == "after":
        report = apply(model)
        assert report.model == "PeftModelForCausalLM" and report.patched["rms_norm"]["Qwen3RMSNorm"] >= 9
    got = step(model, inputs)
    assert any(".lora_A." in name for name in got) and (saved is None or any("modules_to_save" in name for name in got))
    check_error_rule(got, plain, truth)
    assert len(calls["qk_norm_rope"]) == 2 and len(calls["linear_cross_entropy"]) == 1


def test_lora_on_the_head_keeps_the_logits(calls):
    inputs = batch()
    model = lora(make(), target_modules=["q_proj", "lm_head"])
    plain = step(model, inputs)
    report = apply(model)
    assert any("lm_head" in note and "logits" in note for note in report.notes)
    torch.testing.assert_close(step(model, inputs)["loss"], plain["loss"])
    assert "linear_cross_entropy" not in calls


def test_accelerate_hooks(calls):
    hooks = pytest.importorskip("accelerate.hooks")

    class Seen(hooks.ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.count += 1
            return args, kwargs

    model, inputs = make(), batch()
    plain = step(model, inputs)
    for module in model.modules():
        if list(module.parameters()):  # not the activation: the op is in its place
            hooks.add_hook_to_module(module, Seen())
    step(model, inputs)
    before, Seen.count = Seen.count, 0
    apply(model)
    got = step(model, inputs)
    assert Seen.count == before, "every hook must still run"
    assert len(calls["swiglu"]) == 2 and len(calls["linear_cross_entropy"]) == 1
    torch.testing.assert_close(got["loss"], plain["loss"])
    revert()
    for module in model.modules():
        hooks.remove_hook_from_module(module)
    calls.clear()
    assert torch.equal(step(model, inputs)["loss"], plain["loss"]) and not calls


def test_revert_under_hooks_added_after(calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = make(), batch()
    plain = step(model, inputs)
    apply(model)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    revert()
    calls.clear()
    assert torch.equal(step(model, inputs)["loss"], plain["loss"]) and not calls


def test_revert_says_what_it_cannot_take_back():
    model = make()
    apply(model)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.warns(UserWarning, match="forward of Qwen3ForCausalLM was wrapped after apply"):
        revert()


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_hooks_of_a_norm_run(norm):
    model, inputs, seen = make(), batch(), []
    apply(model)
    plain = step(model, inputs)
    hook = getattr(model.model.layers[0], norm).register_forward_hook(lambda *_: seen.append(1))
    got = step(model, inputs)
    hook.remove()
    assert len(seen) == 1
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


# --- The residual stream.


class Adds(TorchDispatchMode):
    """How many sums of hidden states [2, 21, 64] run inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sums = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
        self.count += func in sums and args[0].shape == (2, 21, 64)
        return func(*args, **(kwargs or {}))


def stream(model, inputs: dict) -> tuple[int, int, int]:
    """Sums over the hidden states in the forward and in the backward, and the bytes kept between them."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with Adds() as forward, saved_tensors_hooks(keep, lambda t: t):
        loss = model(**inputs).loss
    with Adds() as backward:
        loss.backward()
    return forward.count, backward.count, sum(t.untyped_storage().nbytes() for t in kept.values())


def test_sums_of_the_stream_are_in_the_norms(monkeypatch):
    """One sum a layer is left, its last, and no more is kept for the backward than where autograd does the sums."""
    model, inputs = make(), batch()
    before = stream(model, inputs)[:2]
    apply(model)
    forward, backward, kept = stream(model, inputs)
    assert (forward, backward) == (2, 0)
    norm = integration.rms_norm

    def apart(x, *args, fork=False):
        return (norm(x, *args), x) if fork else norm(x, *args)

    monkeypatch.setattr(integration, "rms_norm", apart)
    assert stream(model, inputs) == (2, 2, kept)
    revert()
    assert stream(model, inputs)[:2] == before and before[0] == 4 and before[1] > 4


# --- Attention: cache, packed documents, masks.


@pytest.mark.parametrize("kind, cache", [("dense", "dynamic"), ("moe", "dynamic"), ("dense", "static")])
def test_generate(kind, cache):
    model = make(kind, use_cache=True, output_router_logits=False).eval()
    ids = batch()["input_ids"][:, :9]
    options = dict(max_new_tokens=12, do_sample=False, disable_compile=True)
    if cache == "static":
        options["cache_implementation"] = "static"
    plain = model.generate(ids, **options)
    apply(model)
    assert torch.equal(model.generate(ids, **options), plain)
    padded = torch.cat([ids.new_zeros(2, 3), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], plain)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@parametrize_kind
def test_packed_documents_do_not_see_each_other(kind, how, calls):
    model, inputs = make(kind, output_router_logits=False), batch(rows=1)
    inputs["labels"] = inputs["labels"].masked_fill(PACKED == 0, -100)
    packed = inputs | {"position_ids": PACKED}
    if how == "cu_seq_lens":
        packed |= {"cu_seq_lens_q": CU_SEQLENS, "cu_seq_lens_k": CU_SEQLENS, "max_length_q": 8, "max_length_k": 8}
    truth, plain = step(wide(model), packed), step(model, packed)
    apply(model)
    check_error_rule(step(model, packed), plain, truth)
    assert len(calls["attention_op"]) == 2
    assert all(torch.equal(call["cu_seqlens"], CU_SEQLENS) for call in calls["attention_op"])
    alone = [logits(model, {"input_ids": inputs["input_ids"][:, a:b]}) for a, b in zip(CU_SEQLENS, CU_SEQLENS[1:])]
    together = logits(model, {k: v for k, v in packed.items() if k != "labels"})
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def test_packed_rows_of_a_batch(calls):
    model, inputs = make(), batch(rows=2)
    second = torch.cat([torch.arange(11), torch.arange(10)])[None]
    packed = inputs | {"position_ids": torch.cat([PACKED, second])}
    truth, plain = step(wide(model), packed), step(model, packed)
    apply(model)
    check_error_rule(step(model, packed), plain, truth)
    assert calls["attention_op"][0]["cu_seqlens"].tolist() == [0, 5, 6, 14, 21, 32, 42]


def test_documents_are_counted_once_a_step(monkeypatch):
    model = make()
    apply(model)
    seen = []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: seen.append(1) or nonzero(self))
    model(**batch(rows=1), position_ids=PACKED)
    assert len(seen) == 1
    model(**batch(rows=1), position_ids=PACKED, cu_seq_lens_q=CU_SEQLENS)
    assert len(seen) == 1, "with cu_seq_lens nothing is left to count"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_falls_back(side, calls):
    model, inputs = make(), batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}
    truth, plain = step(wide(model), inputs), step(model, inputs)
    apply(model)
    check_error_rule(step(model, inputs), plain, truth)
    assert "attention_op" not in calls
    step(model, inputs | {"attention_mask": torch.ones_like(mask)})
    assert len(calls["attention_op"]) == 2, "a mask of ones is no mask"


@pytest.mark.parametrize("changes", [
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {"attention_dropout": 0.5},
], ids=["sliding window", "dropout"])
def test_what_the_op_cannot_do_falls_back(changes, calls):
    model = make(**changes)
    packed = batch(rows=1) | {"position_ids": PACKED}
    for inputs in (batch(), packed):
        torch.manual_seed(5)
        plain = step(model, inputs)
        apply(model)
        torch.manual_seed(5)
        torch.testing.assert_close(step(model, inputs), plain, rtol=1e-4, atol=1e-5)
        revert()
    used = len(calls.get("attention_op", ()))
    assert used == (2 if "sliding_window" in changes else 0)  # the full layer, of two


def test_four_dimensional_masks_fall_back(calls):
    model, inputs = make(), batch()
    mask = torch.ones(21, 21, dtype=torch.bool).tril().triu(-5).expand(2, 1, 21, 21)
    plain = step(model, inputs | {"attention_mask": mask})
    apply(model)
    torch.testing.assert_close(step(model, inputs | {"attention_mask": mask}), plain, rtol=1e-4, atol=1e-5)
    assert "attention_op" not in calls


# --- Checkpointing, compile.


@parametrize_kind
def test_gradient_checkpointing(kind, calls):
    model, inputs = make(kind), batch()
    apply(model)
    plain = step(model, inputs)
    before = len(calls["qk_norm_rope"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(model, inputs), plain, rtol=1e-4, atol=1e-5)
    assert len(calls["qk_norm_rope"]) - before == 4, "each layer runs twice"


def test_first_use_in_a_checkpointed_layer_under_autocast():
    """The self-check of an op runs at its first call, and must leave no trace in what surrounds that."""
    model, inputs = make(), batch()
    apply(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, inputs)
        dispatch.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = step(model, inputs)
    for name, value in got.items():
        assert torch.equal(value, plain[name]), name


@parametrize_kind
def test_gradient_checkpointing_of_patched_classes(kind, calls):
    apply()
    model, inputs = make(kind), batch()
    plain = step(model, inputs)
    before = len(calls["qk_norm_rope"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(model, inputs), plain, rtol=1e-4, atol=1e-5)
    assert len(calls["qk_norm_rope"]) - before == 4, "each layer runs twice"


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_layers_checkpointed_from_outside(implementation, calls):
    """As torch's own wrapper does it: the patched forward is what runs twice."""
    model, inputs = make(), batch()
    apply(model)
    plain = step(model, inputs)
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: isinstance(m, modeling_qwen3.Qwen3DecoderLayer)
    )
    calls.clear()
    got = {n.replace("_checkpoint_wrapped_module.", ""): t for n, t in step(model, inputs).items()}
    assert got.keys() == plain.keys() and [c.get("fork", False) for c in calls["rms_norm"]].count(True) == 4
    for name, value in got.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("kind, packing", [("dense", False), ("moe", True)], ids=["causal", "packed moe"])
def test_compile(kind, packing):
    if kind == "moe" and not V5:
        pytest.skip("transformers 4 loops over the experts that were hit, which no full graph can hold")
    model, inputs = make(kind), batch(rows=1)
    if packing:
        inputs |= {"position_ids": PACKED, "cu_seq_lens_q": CU_SEQLENS, "cu_seq_lens_k": CU_SEQLENS}
    apply(model)
    plain = step(model, inputs)
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(loss, plain["loss"], rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-4, atol=1e-5)


# --- Revert.


def everything() -> dict:
    """What apply may touch outside of instances."""
    state = {}
    for module in (modeling_qwen3, modeling_qwen3_moe):
        for name, cls in vars(module).items():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                # transformers notes on the class whether the implementation may be set
                state |= {(name, k): v for k, v in vars(cls).items() if not k.endswith("_cached_value")}
    state["attention"] = dict(transformers.AttentionInterface._global_mapping)
    state["masks"] = dict(transformers.masking_utils.AttentionMaskInterface._global_mapping)
    if V5:
        state["experts"] = dict(transformers.integrations.moe.ExpertsInterface._global_mapping)
    return state


@parametrize_kind
def test_revert_restores_everything(kind):
    model, inputs = make(kind), batch()
    plain = step(model, inputs)
    before = everything()
    owned = {name: set(vars(m)) for name, m in model.named_modules()}
    apply(model, swiglu=False)
    apply()
    apply()
    apply(model)
    apply(model)
    assert everything() != before
    revert()
    after = everything()
    assert after.keys() == before.keys() and all(after[k] is before[k] or after[k] == before[k] for k in before)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == owned
    assert model.config._attn_implementation == "sdpa"
    for name, value in step(model, inputs).items():
        assert torch.equal(value, plain[name]), name
    revert()  # nothing left, nothing done
    apply(model)
    assert model(**inputs).logits is None


def test_revert_keeps_no_model_alive():
    import gc
    import weakref

    model = make()
    apply(model)
    reference = weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert reference() is None
    revert()


def test_eager_attention_is_put_back():
    model = make(attn_implementation="eager")
    apply(model)
    assert model.config._attn_implementation == NAME
    revert()
    assert model.config._attn_implementation == "eager"


# --- Imports.


def test_imports_are_fast():
    code = """
import time, torch, numpy
def seconds(name):
    start = time.perf_counter()
    __import__(name)
    return time.perf_counter() - start
first = seconds("qwen3_kernels")
import transformers
print(first, seconds("qwen3_kernels.integrations.transformers"))
assert not torch.cuda.is_initialized()
"""
    for _ in range(3):  # a busy machine may need another try
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        if max(map(float, out.split())) < 1.0:
            return
    pytest.fail(f"seconds to import qwen3_kernels and its integration: {out}")
