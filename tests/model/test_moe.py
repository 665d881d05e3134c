from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hf import EXPERTS, ours, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_model.moe import MoE, load_balancing_loss


def moe(seed=0, dtype=torch.float32, numerics="fast", **changes) -> MoE:
    model = MoE(replace(EXPERTS, numerics=numerics, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model.to(dtype)


def by_hand(block: MoE, x):
    """Token by token, expert by expert, in fp64; equal probabilities to the lower index."""
    weights = (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
    gate_up, down, router = (w.double() for w in weights)
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        probs = (router @ token).softmax(0)
        chosen = sorted(range(block.E), key=lambda e: (-probs[e].item(), e))[: block.K]
        total = sum(probs[e] for e in chosen) if block.renormalise else 1.0
        gates = [(gate_up[e] @ token).chunk(2) for e in chosen]
        rows.append(sum(probs[e] / total * (down[e] @ (F.silu(g) * u)) for e, (g, u) in zip(chosen, gates)))
    return torch.stack(rows).view(x.shape)


# ---- the block -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 8), data=st.data())
def test_against_the_definition(experts, data):
    K = data.draw(st.integers(1, experts))
    shape = data.draw(st.sampled_from([(1,), (2, 3), (17,), (1, 1), (3, 1, 2)]))
    numerics, norm = data.draw(st.sampled_from(["fast", "exact"])), data.draw(st.booleans())
    block = moe(num_experts=experts, num_experts_per_tok=K, norm_topk_prob=norm, numerics=numerics)
    x = torch.randn(*shape, 48, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    y, routing = block(x)
    logits = routing.logits
    assert y.shape == x.shape and logits.shape == (x.numel() // 48, experts)
    assert relative(y, by_hand(block, x)) <= 1e-5
    assert relative(logits, x.double().reshape(-1, 48) @ block.gate.weight.double().T) <= 1e-5


def test_gradients_against_the_definition():
    block, x = moe(), torch.randn(11, 48, requires_grad=True)
    probe = torch.randn(11, 48)
    inputs = (x, *block.parameters())
    got = torch.autograd.grad((block(x)[0] * probe).sum(), inputs)
    want = torch.autograd.grad((by_hand(block, x) * probe).sum(), inputs)
    assert all(w.abs().max() > 0 and relative(g, w) <= 1e-5 for g, w in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_index(dtype):
    """All equal; and equal in two groups, the better one at the end."""
    def chosen(router_row):
        """What a block with an identity for router, and this row as its token, chooses."""
        block = moe(dtype=dtype, num_experts=8, num_experts_per_tok=3)
        with torch.no_grad():
            block.gate.weight.zero_()[:, :8] = torch.eye(8)
        return block(torch.cat((router_row.to(dtype), torch.zeros(40, dtype=dtype)))[None])[1].expert_ids.tolist()

    assert chosen(torch.zeros(8)) == [[0, 1, 2]]
    assert chosen(torch.tensor([0.0, 1, 0, 0, 0, 0, 1, 0])) == [[1, 6, 0]]
    assert chosen(torch.full((8,), -3e4).index_fill_(0, torch.tensor([5]), 0.0)) == [[5, 0, 1]]


def test_ties_of_a_whole_block():
    """A router of zeros: every token goes to the first experts, with equal weights."""
    block, x = moe(), torch.randn(6, 48)
    with torch.no_grad():
        block.gate.weight.zero_()
    assert relative(block(x)[0], by_hand(block, x)) <= 1e-5
    gradient = torch.autograd.grad(block(x)[0].sum(), block.experts.down_proj)[0]
    assert [bool(g.any()) for g in gradient] == [True, True, False, False, False, False]


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_one_expert_takes_all_tokens(numerics):
    """The others are empty: no tokens, zero gradients, nothing undefined."""
    block, x = moe(num_experts_per_tok=1, numerics=numerics), torch.randn(9, 48).abs()
    with torch.no_grad():
        block.gate.weight.fill_(-1)
        block.gate.weight[4] = 1
    y, _ = block(x)
    assert relative(y, by_hand(block, x)) <= 1e-5
    for gradient in torch.autograd.grad(y.sum(), tuple(block.experts.parameters())):
        assert gradient.isfinite().all() and [bool(g.any()) for g in gradient] == [e == 4 for e in range(6)]


def test_all_experts_chosen_is_a_dense_mixture():
    """K = E: weights are the softmax, renormalised or not, and in the order of their size."""
    for norm in (True, False):
        block, logits = moe(num_experts_per_tok=6, norm_topk_prob=norm, numerics="exact"), torch.randn(7, 6)
        weight, expert = block.route(logits)
        assert torch.equal(expert.sort(1).values, torch.arange(6).expand(7, 6))
        torch.testing.assert_close(weight, logits.softmax(-1).gather(1, expert))
        assert (weight.diff(dim=1) <= 0).all()


def test_weights_sum_to_one_only_when_renormalised():
    logits = torch.randn(20, 6) * 3
    torch.testing.assert_close(moe(numerics="exact").route(logits)[0].sum(1), torch.ones(20))
    assert (moe(norm_topk_prob=False, numerics="exact").route(logits)[0].sum(1) < 1).all()


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5), (1, 1)])
def test_no_token_and_one_token(shape, numerics):
    block, x = moe(numerics=numerics), torch.randn(*shape, 48, requires_grad=True)
    y, routing = block(x)
    assert y.shape == x.shape and routing.logits.shape == (x.numel() // 48, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_tokens_do_not_depend_on_their_batch():
    """Their order, and who else is there, changes nothing but rounding."""
    block, x = moe(), torch.randn(40, 48)
    order = torch.randperm(40)
    y = block(x)[0]
    assert relative(block(x[order])[0], y[order]) <= 1e-6
    assert relative(torch.cat([block(row[None])[0] for row in x]), y) <= 1e-6


def test_exact_sums_in_the_models_dtype():
    """1 + 2^-8 + 2^-8 in bfloat16 loses both small ones, (1 + 2^-7)^2 - (1 + 2^-6) the square's last digit."""

    def total(y, weight) -> float:
        y, weight = (torch.tensor([t], dtype=torch.bfloat16) for t in (y, weight))
        return moe(numerics="exact").combine(y.unsqueeze(-1), weight, torch.arange(weight.shape[1])[None]).item()

    assert total([1.0, 2**-8, 2**-8], [1.0, 1.0, 1.0]) == 1.0
    assert total([1 + 2**-7, -1.0], [1 + 2**-7, 1 + 2**-6]) == 0.0


def test_exact_adds_in_the_order_of_the_experts():
    """Not in the order of the weights."""
    y = torch.tensor([[[2**-8], [2**-8], [1.0]]], dtype=torch.bfloat16)
    weight = torch.ones(1, 3, dtype=torch.bfloat16)
    block = moe(numerics="exact", num_experts_per_tok=3)
    assert block.combine(y, weight, torch.tensor([[3, 4, 5]])).item() == 1 + 2**-7
    assert block.combine(y, weight, torch.tensor([[4, 5, 3]])).item() == 1.0


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_replay_of_the_own_routing_changes_nothing(numerics):
    model, tokens = ours(EXPERTS, numerics=numerics), torch.randint(96, (2, 7))
    logits, routing = model(tokens, return_routing=True)
    assert [r.expert_ids.shape for r in routing] == [(14, 2)] * 3
    again, replayed = model(tokens, expert_ids=[r.expert_ids for r in routing], return_routing=True)
    assert torch.equal(again, logits)
    assert all(torch.equal(a.expert_ids, b.expert_ids) for a, b in zip(replayed, routing))


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_replayed_experts_get_the_weights_of_the_present_router(numerics):
    block, x = moe(numerics=numerics), torch.randn(9, 48, requires_grad=True)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    y, routing = block(x, ids)
    assert torch.equal(routing.expert_ids, ids)
    gate_up, down, router = (w.double() for w in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight))
    want = []
    for token, chosen in zip(x.double(), ids):
        probs = (router @ token).softmax(0)[chosen]
        halves = [(gate_up[e] @ token).chunk(2) for e in chosen]
        want.append(sum(p / probs.sum() * (down[e] @ (F.silu(g) * u)) for p, e, (g, u) in zip(probs, chosen, halves)))
    want = torch.stack(want)
    assert relative(y, want) <= 1e-5
    inputs = (x, *block.parameters())
    for g, w in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(want.sum(), inputs)):
        assert w.abs().max() > 0 and relative(g, w) <= 1e-5


def test_bad_replay():
    model, tokens = ours(EXPERTS), torch.randint(96, (2, 7))
    ids = [torch.zeros(14, 2, dtype=torch.int64)] * 3
    for arguments, message in (
        ({"expert_ids": ids[:2]}, "expert_ids has 2 entries; expected one for each of 3 MoE layers"),
        ({"expert_ids": [ids[0][:13]] * 3}, r"expert_ids is \(13, 2\); expected \(14, 2\)"),
        ({"token_mask": torch.ones(14)}, r"token_mask is \(14,\); expected tokens' shape \(2, 7\)"),
        ({"return_routing": True, "return_router_logits": True}, "both set"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **arguments)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_balanced_and_collapsed_routing():
    """K when all experts get the same; E times the probability of the one that gets everything at worst."""
    E, K, N = 6, 2, 30
    balanced = torch.zeros(N, E)
    for n in range(N):
        balanced[n, [n % E, (n + 1) % E]] = 5.0
    assert load_balancing_loss([balanced], E, K).item() == pytest.approx(K, rel=1e-6)
    collapsed = torch.zeros(N, E)
    collapsed[:, 0] = 50.0
    assert load_balancing_loss([collapsed], E, 1).item() == pytest.approx(E, rel=1e-6)
    both = load_balancing_loss([balanced, balanced], E, K)
    assert both.item() == pytest.approx(K, rel=1e-6)


def test_loss_against_the_definition():
    layers, mask = [torch.randn(12, 6) for _ in range(3)], torch.arange(12) % 3 > 0
    kept = torch.cat([layer[mask] for layer in layers]).double()
    probs = kept.softmax(-1)
    share = F.one_hot(probs.topk(2, -1).indices, 6).sum((0, 1)) / len(kept)
    want = 6 * (share * probs.mean(0)).sum()
    for form in (mask, mask.float(), mask.view(3, 4), mask.long()):
        assert load_balancing_loss(layers, 6, 2, form).item() == pytest.approx(want.item(), rel=1e-6)


def test_loss_gradient_pulls_towards_balance():
    logits = torch.zeros(10, 4).index_fill_(1, torch.tensor([1]), 1.0).requires_grad_()
    (gradient,) = torch.autograd.grad(load_balancing_loss([logits], 4, 1), logits)
    assert (gradient[:, 1] > 0).all() and (gradient[:, [0, 2, 3]] < 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], 6, 2), "router_logits is empty; expected one tensor"),
        (([torch.zeros(3, 5)], 6, 2), r"router_logits has shape \(3, 5\); expected \[N, 6\]"),
        (([torch.zeros(1, 3, 6)], 6, 2), r"router_logits has shape \(1, 3, 6\)"),
        (([torch.zeros(3, 6)], 6, 2, torch.ones(4)), r"mask has shape \(4,\); expected 3 entries"),
    ],
)
def test_bad_loss_arguments(arguments, message):
    with pytest.raises(ValueError, match="load_balancing_loss: " + message):
        load_balancing_loss(*arguments)


def test_model_returns_one_router_per_expert_layer():
    config = replace(EXPERTS, mlp_only_layers=(1,))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    logits, routers = ours(config)(tokens, return_router_logits=True)
    assert logits.shape == (2, 5, 96) and [r.shape for r in routers] == [(10, 6)] * 2
    assert ours(replace(EXPERTS, num_experts=0))(tokens, return_router_logits=True)[1] == ()
