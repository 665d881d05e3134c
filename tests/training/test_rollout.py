"""Rollouts: what they draw, what they record, and that the trainer's probabilities are the same bits."""

import math
from collections import Counter

import pytest
import torch
from tiny_chat import MOE, model, small  # noqa: F401

from qwen3_model.generate import generate
from qwen3_model.model import Qwen3
from qwen3_model.sampling import SamplingParams
from training.losses import preset
from training.rewards import mixed_seed
from training.rollout import MIN_ROWS, Request, Roller, invariant
from training.samples import Sample, packs

STOP = (5, 6, 7, 8, 9)


def requests(count, seed=0, max_tokens=30, longest=20):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [
        Request(i, torch.randint(10, 300, (n,), generator=g).tolist(), mixed_seed(seed, i), max_tokens) for i, n in enumerate(lengths)
    ]


def roller(model, **changes):
    return Roller(model, **({"slots": 8, "max_len": 64, "stop_ids": STOP} | changes))


def gap(model, rollouts, temperature, tokens_per_pack=500, replay=False):
    samples = [
        Sample([*r.request.prompt, *r.ids], [0.0] * len(r.request.prompt) + [1.0] * len(r.ids),
               [1.0] * (len(r.request.prompt) + len(r.ids)), [0.0] * len(r.request.prompt) + r.logprobs,
               r.experts if replay else None)
        for r in rollouts
    ]
    loss = preset("dapo", temperature=temperature)
    device = next(model.parameters()).device
    with torch.no_grad():
        return max(loss(model, p.to(device))[1]["max_gap"].item() for p in packs(samples, tokens_per_pack))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_gets_the_same_bits(model, temperature):
    """Rows come and go, prompts of one token and single rows included."""
    if not invariant(model):
        pytest.skip("this torch's matrix products depend on the other rows")
    for slots, count in ((1, 6), (8, 20)):
        rollouts = roller(model, slots=slots, temperature=temperature).run(requests(count))
        assert slots == 1 or {r.finish_reason for r in rollouts} == {"stop", "length"}
        assert gap(model, rollouts, temperature) == 0.0


def test_another_temperature_is_seen_as_a_gap(model):
    assert gap(model, roller(model, temperature=0.7).run(requests(8)), 1.0) > 1e-2


def mixture(**changes):
    return Qwen3(small(**MOE, **changes)).init_weights(0)


def test_experts_are_recorded_and_replayed():
    """The trainer's router has moved by one step's worth and would choose otherwise; with the recorded experts it does not."""
    model = mixture()
    assert not invariant(model)
    rollouts = roller(model).run(requests(20))
    for r in rollouts:
        assert r.experts.shape == (len(r.request.prompt) + len(r.ids) - 1, 2, 2) and r.experts.dtype == torch.int16
    r = rollouts[0]
    with torch.no_grad():
        _, routing = model(torch.tensor([[*r.request.prompt, *r.ids[:-1]]]), return_routing=True)
    assert torch.equal(r.experts.long(), torch.stack([x.expert_ids for x in routing], 1))
    assert gap(model, rollouts, 1.0, replay=True) < 1e-4 and gap(model, rollouts, 1.0) < 1e-4
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.02 * torch.randn(layer.mlp.gate.weight.shape, generator=torch.Generator().manual_seed(1))
    assert gap(model, rollouts, 1.0, replay=True) < 0.5 * gap(model, rollouts, 1.0)
    assert roller(model, record_experts=False).run(requests(2))[0].experts is None


def test_a_rollout_does_not_depend_on_its_batch(model):
    if not invariant(model):
        pytest.skip("this torch's matrix products depend on the other rows")
    together = roller(model).run(requests(15))
    alone = [roller(model, slots=1).run([r])[0] for r in requests(15)[::7]]
    assert [(r.ids, r.logprobs, r.entropies) for r in alone] == [(r.ids, r.logprobs, r.entropies) for r in together[::7]]


def test_it_decodes_as_generate_does(model):
    """At a temperature near zero both are greedy."""
    rs = requests(12)
    ours = roller(model, temperature=1e-4, slots=5).run(rs)
    theirs = generate(model, [r.prompt for r in rs], SamplingParams(temperature=0.0, max_tokens=30, stop_ids=STOP))
    assert [r.ids for r in ours] == [c.ids for c in theirs]
    assert [r.finish_reason for r in ours] == [c.finish_reason for c in theirs]


def test_tokens_come_as_often_as_the_model_says(model):
    prompt = [20, 30, 40]
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1].double() / 0.5).softmax(-1)
    n = 900
    drawn = roller(model, temperature=0.5, slots=64).run([Request(i, prompt, mixed_seed("f", i), 1) for i in range(n)])
    counts = Counter(r.ids[0] for r in drawn)
    for token in p.topk(8).indices.tolist():
        sigma = math.sqrt(p[token] * (1 - p[token]) / n)
        assert abs(counts[token] / n - p[token]) < 5 * sigma
    assert drawn[0].logprobs[0] == pytest.approx(p[drawn[0].ids[0]].log().item(), abs=1e-4)
    assert drawn[0].entropies[0] == pytest.approx(-(p * p.log()).sum().item(), abs=1e-3)


def test_slots_are_refilled_at_once(model):
    """One row runs for 20 tokens; beside it the others take turns, a token each."""
    r = roller(model, slots=2, stop_ids=())
    for i, n in enumerate((20, *[1] * 15)):
        r.submit(Request(i, [10, 11, 12, 13 + i], i, n))
    order, steps = [], 0
    while r.busy:
        order += [rollout.request.key for rollout in r.step()]
        steps += 1
    assert steps == 20 and order == [*range(1, 16), 0]


def test_the_weights_are_the_trainers_own(model):
    r = roller(model, temperature=1e-4)
    before = r.run(requests(4))
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    assert [x.ids for x in r.run(requests(4))] != [x.ids for x in before]


@pytest.mark.parametrize("changes, words", [
    ({"slots": 0}, "slots is 0"), ({"max_len": 1000}, "max_len is 1000; expected at most the model's 256"),
    ({"temperature": 0.0}, "temperature is 0"),
])
def test_bad_settings(model, changes, words):
    with pytest.raises(ValueError, match=words):
        roller(model, **changes)


def test_bad_requests(model):
    r = roller(model)
    for prompt, max_tokens in (([], 3), ([1] * 60, 5), ([1], 0)):
        with pytest.raises(ValueError, match="request 'x'"):
            r.submit(Request("x", prompt, 1, max_tokens))
    assert not r.busy and r.step() == [] and MIN_ROWS == 4
