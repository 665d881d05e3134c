"""The model against transformers' and against itself: packed, cached, recomputed and compiled."""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hf import ALL, BASE, DENSE, EXPERTS, MOE, YARN, ours, relative, some_tokens, theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen3_kernels import dispatch
from qwen3_model import recompute
from qwen3_model.model import Qwen3
from qwen3_model.moe import load_balancing_loss

old_name = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # its new one is not in 5.0
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


def loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients(model, value) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True)))


def assert_same_gradients(got, want, limit=1e-5):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient is not None and gradient.abs().max() > 0, f"{name} gets no gradient: nothing is compared"
        assert relative(got[name], gradient) <= limit, name


# ---- fp32 ------------------------------------------------------------------------------------------------------------


@every
def test_fp32_logits_and_all_gradients(config):
    model, tokens = ours(config), some_tokens(config, 3, 40)
    hf = theirs(model)
    logits, want = model(tokens), hf(tokens, use_cache=False).logits
    assert logits.shape == (3, 40, config.vocab_size) and want.std() > 0.5
    assert relative(logits, want) <= 1e-5
    assert_same_gradients(gradients(model, loss(logits, tokens)), gradients(hf, loss(want, tokens)))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fp32_logits_of_random_shapes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv = draw(1, 3)
    config = replace(
        BASE, hidden_size=8 * draw(1, 8), intermediate_size=draw(1, 50), num_hidden_layers=draw(1, 3),
        num_key_value_heads=kv, num_attention_heads=kv * draw(1, 4), head_dim=2 * draw(1, 12), vocab_size=draw(2, 60),
        tie_word_embeddings=data.draw(st.booleans()), rope_theta=float(draw(100, 10**7)),
        rope_scaling=data.draw(st.sampled_from([None, YARN, YARN | {"factor": 2.5, "truncate": False}])),
    )
    if data.draw(st.booleans()):
        experts = draw(1, 7)
        config = replace(
            config, num_experts=experts, num_experts_per_tok=draw(1, experts), moe_intermediate_size=draw(1, 20),
            norm_topk_prob=data.draw(st.booleans()), decoder_sparse_step=draw(1, 2),
            mlp_only_layers=tuple(data.draw(st.sets(st.integers(0, config.num_hidden_layers - 1), max_size=1))),
        )
    model, tokens = ours(config), some_tokens(config, draw(1, 3), draw(1, 20))
    with torch.no_grad():
        assert relative(model(tokens), theirs(model)(tokens, use_cache=False).logits) <= 1e-5


def test_positions_are_angles():
    """Given positions turn q and k as in transformers, per row too."""
    model, tokens = ours(BASE), some_tokens(BASE, 2, 9)
    positions = torch.stack((torch.arange(9) + 3, torch.arange(9) * 2))
    with torch.no_grad():
        got, plain = model(tokens, positions=positions), model(tokens)
        # The mask keeps transformers from taking jumps in the positions for the starts of packed documents.
        want = theirs(model)(tokens, position_ids=positions, attention_mask=tokens * 0 + 1, use_cache=False).logits
        assert relative(got, want) <= 1e-5 and relative(plain, want) > 1e-2
        assert torch.equal(model(tokens, positions=torch.arange(9)), plain)


@every
def test_hidden_states_and_head(config):
    model, tokens = ours(config), some_tokens(config, 2, 7)
    with torch.no_grad():
        hidden = model(tokens, return_hidden=True)
        assert hidden.shape == (2, 7, config.hidden_size) and torch.equal(model.head(hidden), model(tokens))
        assert relative(hidden, theirs(model).model(tokens, use_cache=False).last_hidden_state) <= 1e-5


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@every
def test_exact_bf16_is_transformers_bit_for_bit(config):
    model, tokens = ours(config, torch.bfloat16, "exact"), some_tokens(config, 2, 33)
    with torch.no_grad():
        logits, want = model(tokens), theirs(model)(tokens, use_cache=False).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, want)


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_exact_bf16_layers_are_transformers_bit_for_bit(config):
    model, tokens = ours(config, torch.bfloat16, "exact"), some_tokens(config, 2, 33)
    states, seen = theirs(model).model(tokens, use_cache=False, output_hidden_states=True).hidden_states, []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, out: seen.append(out[0] + out[1]))
    with torch.no_grad():
        model(tokens)
    assert len(seen) == config.num_hidden_layers == len(states) - 1
    assert all(torch.equal(a, b) for a, b in zip(seen[:-1], states[1:-1]))


@every
def test_fast_bf16_is_as_near_the_truth_as_transformers(config):
    """Truth: the same weights in fp64 (norms in fp32), by transformers. The factor is the project's rule."""
    fast, tokens = ours(config, torch.bfloat16), some_tokens(config, 4, 48)
    with torch.no_grad():
        want = theirs(fast)(tokens, use_cache=False).logits
        truth = theirs(fast).double()(tokens, use_cache=False).logits
        errors = [(x.double() - truth).norm().item() for x in (fast(tokens), want)]
    assert 0 < errors[0] <= 2 * errors[1]


@every
def test_fast_bf16_gradients_are_as_near_the_truth_as_transformers(config):
    fast, tokens = ours(config, torch.bfloat16), some_tokens(config, 4, 48)
    hf, wide = theirs(fast), theirs(fast).double()
    truth = gradients(wide, loss(wide(tokens, use_cache=False).logits.double(), tokens))
    got = gradients(fast, loss(fast(tokens), tokens))
    base = gradients(hf, loss(hf(tokens, use_cache=False).logits, tokens))

    def error(grads):
        return sum(((grads[n].double() - truth[n]).norm() / truth[n].norm()) ** 2 for n in truth).sqrt().item()
    assert 0 < error(got) <= 2 * error(base)


# ---- load-balancing loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MOE.values(), ids=MOE)
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_is_transformers(config, masked):
    model, tokens = ours(config), some_tokens(config, 3, 20)
    mask = torch.ones(3, 20, dtype=torch.int64)
    if masked:
        mask[0, 15:], mask[2, 1:] = 0, 0
    _, router_logits = model(tokens, return_router_logits=True)
    hf = theirs(model)
    their_logits = hf(tokens, use_cache=False, output_router_logits=True).router_logits
    assert len(router_logits) == len(their_logits) == sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    assert all(relative(a, b) <= 1e-5 for a, b in zip(router_logits, their_logits))
    E, K = config.num_experts, config.num_experts_per_tok
    got = load_balancing_loss(router_logits, E, K, mask if masked else None)
    want = load_balancing_loss_func(their_logits, E, K, mask if masked else None)
    assert got.dtype == torch.float32 and got.shape == () and abs(got - want) <= 1e-5 * want
    ours_gradients, their_gradients = gradients(model, got), gradients(hf, want)
    for name, gradient in their_gradients.items():
        assert (ours_gradients[name] is None) == (gradient is None), name
        # With K = E all experts are used alike, whatever the router says.
        if gradient is not None and K < E:
            assert relative(ours_gradients[name], gradient) <= 1e-4, name


# ---- packed documents ------------------------------------------------------------------------------------------------


@every
def test_packed_documents_are_separate_rows(config):
    """Logits and gradients, an empty document and one of one token among them."""
    model, lengths = ours(config), [7, 0, 1, 22, 10]
    documents = [some_tokens(config, n, seed=n) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = model(torch.cat(documents), cu_seqlens=cu_seqlens)
    alone = torch.cat([model(d[None])[0] for d in documents])
    assert packed.shape == alone.shape == (40, config.vocab_size) and relative(packed, alone) <= 1e-5
    probe = torch.randn_like(packed)
    assert_same_gradients(gradients(model, (packed * probe).sum()), gradients(model, (alone * probe).sum()))


def test_a_document_does_not_see_its_neighbours():
    model = ours(BASE)
    a, b, c = (some_tokens(BASE, 9, seed=s) for s in range(3))
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    with torch.no_grad():
        first, second = (model(torch.cat((x, b)), cu_seqlens=cu_seqlens) for x in (a, c))
    assert torch.equal(first[9:], second[9:]) and not torch.equal(first[:9], second[:9])


def test_packed_exact_bf16_is_near_transformers():
    model, lengths = ours(BASE, torch.bfloat16, "exact"), [5, 12, 3]
    documents = [some_tokens(BASE, n, seed=n) for n in lengths]
    with torch.no_grad():
        packed = model(torch.cat(documents), cu_seqlens=torch.tensor([0, 5, 17, 20], dtype=torch.int32))
        hf = theirs(model)
        alone = torch.cat([hf(d[None], use_cache=False).logits[0] for d in documents])
    # Products over 20 rows and over 5 may sum in another order; each row is close, and rounding is all that differs.
    assert relative(packed, alone) <= 2**-6


# ---- decoding --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_cached_decoding_equals_the_full_forward(config, numerics):
    """A prompt, pieces of several tokens, then one by one."""
    model, tokens = ours(config, numerics=numerics), some_tokens(config, 3, 24)
    cache, logits = model.new_cache(3, 30), []
    with torch.no_grad():
        for piece in tokens.split([11, 4, 1, 5, 1, 1, 1], 1):
            logits.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
        assert cache.lengths.tolist() == [24] * 3
        assert relative(torch.cat(logits, 1), model(tokens)) <= 1e-5


@old_name
@pytest.mark.parametrize("config", [BASE, EXPERTS], ids=["dense", "experts"])
def test_cached_decoding_equals_transformers_cache(config):
    model, tokens = ours(config), some_tokens(config, 2, 12)
    hf, cache = theirs(model), model.new_cache(2, 12)
    with torch.no_grad():
        past = hf(tokens[:, :8], use_cache=True).past_key_values
        model(tokens[:, :8], cache=cache)
        cache.advance(8)
        for t in range(8, 12):
            want = hf(tokens[:, t : t + 1], past_key_values=past, use_cache=True).logits
            assert relative(model(tokens[:, t : t + 1], cache=cache), want) <= 1e-5
            cache.advance(1)


@old_name
def test_exact_bf16_decodes_as_transformers():
    """Rows of one length, token by token: bitwise, as both then make the same calls."""
    model, tokens = ours(BASE, torch.bfloat16, "exact"), some_tokens(BASE, 2, 12)
    hf, cache = theirs(model), model.new_cache(2, 16)
    with torch.no_grad():
        past = hf(tokens[:, :8], use_cache=True).past_key_values
        model(tokens[:, :8], cache=cache)
        cache.advance(8)
        for t in range(8, 12):
            want = hf(tokens[:, t : t + 1], past_key_values=past, use_cache=True).logits
            assert torch.equal(model(tokens[:, t : t + 1], cache=cache), want)
            cache.advance(1)


# ---- recomputation and compilation -----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("policy", ["norm+swiglu", "full"])
def test_recomputation_gives_the_same_gradients(config, policy):
    model, tokens = ours(config), some_tokens(config, 2, 13)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    want = gradients(model, loss(model(tokens), tokens))
    assert len(calls) == 1
    model.recompute = policy
    got = gradients(model, loss(model(tokens), tokens))
    assert len(calls) == (3 if policy == "full" else 2), "full: the forward, and once more in the backward"
    assert all(torch.equal(got[n], want[n]) for n in want)
    calls.clear()
    with torch.no_grad():
        model(tokens)
    assert len(calls) == 1


@every
def test_norms_and_swiglu_are_made_once_more_and_matrix_products_are_not(config, monkeypatch):
    """Per layer two norms, one of q and k, one SwiGLU an expert; no linear map, no attention."""
    model, tokens = ours(config), some_tokens(config, 2, 13)
    model.recompute = "norm+swiglu"
    counts = dict.fromkeys(("rms_norm", "qk_norm_rope", "swiglu"), 0)
    for name in counts:

        def counted(*args, name=name, real=getattr(recompute.kernels, name), **options):
            counts[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(recompute.kernels, name, counted)
    value = loss(model(tokens), tokens)
    forwards = counts.copy()
    counts.update(dict.fromkeys(counts, 0))
    monkeypatch.setattr(F, "linear", None)
    gradients(model, value)
    assert counts == forwards | {"rms_norm": forwards["rms_norm"] - 1}, "but for the final norm"


def test_recomputed_tensors_are_let_go_and_can_be_made_twice(monkeypatch):
    model, tokens = ours(BASE), some_tokens(BASE, 2, 13)
    model.recompute = "norm+swiglu"
    made, real = [], recompute.kernels.swiglu
    monkeypatch.setattr(recompute.kernels, "swiglu", lambda *a, **kw: made.append(real(*a, **kw)) or made[-1])
    value = loss(model(tokens), tokens)
    parameters = list(model.parameters())
    for n in (2, 3):
        made[:] = [weakref.ref(t) if isinstance(t, torch.Tensor) else t for t in made]
        first = torch.autograd.grad(value, parameters, retain_graph=True)
        assert len(made) == n * BASE.num_hidden_layers
    made[:] = [weakref.ref(t) if isinstance(t, torch.Tensor) else t for t in made]
    assert all(t() is None for t in made)
    model.recompute = "none"
    want = torch.autograd.grad(loss(model(tokens), tokens), parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, want))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", ["norm+swiglu", "full"])
def test_recomputation_in_the_first_forward_of_a_process(policy):
    """The kernels' self-checks, with backwards of their own, are not mixed up with the layer."""
    model, tokens = ours(BASE), some_tokens(BASE, 2, 13)
    want = gradients(model, loss(model(tokens), tokens))
    model.recompute = policy
    dispatch.reset()
    got = gradients(model, loss(model(tokens), tokens))
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_unknown_policy():
    model = ours(BASE)
    model.recompute = "some"
    with pytest.raises(ValueError, match="recompute is 'some'; expected one of .*norm.swiglu"):
        model(some_tokens(BASE, 1, 3))


@pytest.mark.parametrize("name, packed", [("tied", True), ("yarn", False)])
def test_compiles_without_graph_breaks(name, packed):
    """Forward and backward of the dense model, through our ops where a kernel runs and plain torch where none."""
    config = DENSE[name]
    if packed and dispatch.resolve("attention", "cpu", torch.float32) == "torch":
        pytest.skip("packed attention in plain torch on the CPU splits by the values of cu_seqlens")
    model, tokens = ours(config), some_tokens(config, 24)
    arguments = {"cu_seqlens": torch.tensor([0, 10, 24], dtype=torch.int32)} if packed else {}
    tokens = tokens if packed else tokens.view(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, got = model(tokens, **arguments), compiled(tokens, **arguments)
    assert relative(got, want) <= 1e-6
    probe = torch.randn_like(want)
    assert_same_gradients(gradients(model, (got * probe).sum()), gradients(model, (want * probe).sum()), 1e-6)


def test_every_backend_gives_the_same_logits():
    """Whatever kernels run here, against plain torch."""
    model, tokens = ours(BASE), some_tokens(BASE, 2, 20)
    with torch.no_grad():
        got = model(tokens)
        with dispatch.use("torch"):
            assert relative(got, model(tokens)) <= 1e-6


# ---- arguments -------------------------------------------------------------------------------------------------------

T = some_tokens(BASE, 2, 6)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"tokens": T.int()}, TypeError, "tokens is torch.int32; expected torch.int64"),
        ({"tokens": T[0]}, ValueError, r"tokens is \(6,\); expected \[B, T\]"),
        ({"cu_seqlens": CU}, ValueError, r"tokens is \(2, 6\); expected \[N\] with cu_seqlens"),
        ({"tokens": T + 96}, ValueError, r"tokens is in \[\d+, \d+\]; expected ids in \[0, 96\)"),
        ({"tokens": T - 96}, ValueError, "tokens is in .-"),
        ({"positions": torch.zeros(6)}, TypeError, "positions is torch.float32; expected integers"),
        ({"positions": torch.arange(5)}, ValueError, r"positions is \(5,\); expected shape \(2, 6\) or \(6,\)"),
        ({"tokens": T[0], "cu_seqlens": CU.long()}, TypeError, "cu_seqlens is torch.int64; expected torch.int32"),
        ({"tokens": T[0], "cu_seqlens": CU[:2]}, ValueError, r"cu_seqlens is \[0, 2\]; expected cumulative lengths"),
        ({"tokens": T[0], "cu_seqlens": CU[[0, 2, 1, 2]]}, ValueError, r"cu_seqlens is \[0, 6, 2, 6\]; expected cumul"),
        ({"tokens": T[0], "cu_seqlens": CU[:0]}, ValueError, r"cu_seqlens is \(0,\); expected \[documents \+ 1\]"),
        ({"tokens": T[0], "cu_seqlens": CU, "positions": T}, ValueError, r"positions is \(2, 6\); expected shape .6,."),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match="Qwen3: " + message):
        ours(BASE)(**{"tokens": T, **arguments})


@pytest.mark.parametrize("config", [BASE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_smallest_batches(config, shape):
    tokens = some_tokens(config, *shape)
    logits = ours(config)(tokens)
    assert logits.shape == (*shape, config.vocab_size)
    logits.sum().backward()
    if 0 in shape:
        for numerics in ("fast", "exact"):
            empty = ours(config, numerics=numerics)(tokens.flatten(), cu_seqlens=torch.tensor([0], dtype=torch.int32))
            assert empty.shape == (0, config.vocab_size)


def test_init_weights():
    """The same for a seed, on every dtype up to rounding; spread as asked; norms at one."""
    config = replace(BASE, vocab_size=2000)
    one, again, other, half = (Qwen3(config).to(d).init_weights(s).state_dict() for s, d in
                               ((3, torch.float32), (3, torch.float32), (4, torch.float32), (3, torch.bfloat16)))
    for name, w in one.items():
        assert torch.equal(w, again[name]) and torch.equal(w.bfloat16(), half[name])
        if w.dim() == 1:
            assert w.eq(1).all()
        else:
            assert not torch.equal(w, other[name])
            assert w.std().item() == pytest.approx(config.initializer_range, rel=0.1) and abs(w.mean()) < 0.01
