"""Rollouts with fixed buffers: the same as those of `Roller`, bit for bit on a CPU; captured in a CUDA graph on a GPU."""

import pytest
import torch
from test_rollout import STOP, gap, mixture, requests, roller
from tiny_chat import model, small  # noqa: F401

from qwen3_model.model import Qwen3
from training.rollout import Request, Roller, invariant
from training.static_rollout import StaticRoller, roller_for


def static(model, **changes):
    return StaticRoller(model, **({"slots": 8, "max_len": 64, "stop_ids": STOP, "chunk": 4} | changes))


def told(rollouts):
    return [(r.request.key, r.ids, r.logprobs, r.entropies, r.finish_reason) for r in rollouts]


@pytest.mark.parametrize("slots, chunk, temperature", [(8, 4, 1.0), (3, 7, 0.7), (1, 1, 1.0), (32, 5, 1.0)])
def test_the_same_rollouts_bit_for_bit(model, slots, chunk, temperature):
    """More and fewer requests than slots, stops in every place of a chunk, limits of one token."""
    if not invariant(model):
        pytest.skip("this torch's matrix products depend on the other rows")
    asked = [*requests(12), *(Request(f"short {i}", [20 + i], i, 1 + i % 3) for i in range(6))]
    wanted = roller(model, slots=slots, temperature=temperature).run(asked)
    found = static(model, slots=slots, chunk=chunk, temperature=temperature).run(asked)
    assert {r.finish_reason for r in wanted} == {"stop", "length"} and len({len(r.ids) for r in wanted}) > 5
    assert told(found) == told(wanted)
    assert gap(model, found, temperature) == 0.0


def test_a_row_may_fill_the_cache_to_its_end(model):
    asked = [Request(i, [10 + i] * 40, i, 24) for i in range(9)]
    found, wanted = (make(model, stop_ids=()).run(asked) for make in (static, roller))
    assert [r.ids for r in found] == [r.ids for r in wanted] and {len(r.ids) for r in found} == {24}


def test_experts_are_recorded():
    """As Roller records them; in slots that are used again, too."""
    model = mixture()
    found, wanted = (make(model).run(requests(30)) for make in (static, roller))
    for a, b in zip(found, wanted):
        assert a.ids == b.ids and torch.equal(a.experts, b.experts) and a.experts.dtype == torch.int16
    assert gap(model, found, 1.0, replay=True) < 1e-4


def test_new_requests_while_others_run(model):
    """As the turns of a conversation come."""
    r = static(model, slots=4)
    asked = requests(12)
    for request in asked[:6]:
        r.submit(request)
    done, waiting = [], asked[6:]
    while r.busy:
        done += r.step()
        if waiting:
            r.submit(waiting.pop())
    assert {x.request.key: x.ids for x in done} == {x.request.key: x.ids for x in roller(model).run(asked)}


def test_a_slot_that_was_idle_for_long(model):
    """It went on decoding all the time; a request that comes late finds it as new."""
    r = static(model, slots=4, stop_ids=())
    late, long = Request("late", [20, 21], 5, 6), Request("long", [30], 6, 40)
    r.submit(long)
    done = [x for _ in range(4) for x in r.step()]
    r.submit(late)
    while r.busy:
        done += r.step()
    assert told(sorted(done, key=lambda x: x.request.key)) == told(roller(model, stop_ids=()).run([late, long]))


def test_a_stop_token_at_the_limit_is_a_stop(model):
    ids = roller(model, stop_ids=()).run([Request(0, [20, 30], 3, 12)])[0].ids
    n = next(i for i in range(3, 12) if ids[i] not in ids[:i])  # in every place of a chunk, and no stop before it
    for chunk in (1, 2, 3, 4, 16):
        (found,) = static(model, stop_ids=[ids[n]], chunk=chunk).run([Request(0, [20, 30], 3, n + 1)])
        assert found.ids == ids[: n + 1] and found.finish_reason == "stop"
        (short,) = static(model, stop_ids=[ids[n]], chunk=chunk).run([Request(0, [20, 30], 3, n)])
        assert short.ids == ids[:n] and short.finish_reason == "length"


def test_reset_forgets(model):
    r = static(model)
    fresh = told(r.run(requests(10)))
    for request in requests(10, seed=3):
        r.submit(request)
    r.step()
    r.reset()
    assert not r.busy and r.step() == []
    assert told(r.run(requests(10))) == fresh


def test_bad_settings(model):
    for changes, words in (({"slots": 0}, "slots is 0"), ({"chunk": 0}, "chunk is 0"), ({"temperature": 0.0}, "temperature"),
                           ({"max_len": 1000}, "max_len is 1000")):
        with pytest.raises(ValueError, match=words):
            static(model, **changes)
    with pytest.raises(ValueError, match="request 'x'"):
        static(model).submit(Request("x", [1] * 60, 1, 5))


def test_on_a_cpu_it_is_the_plain_one(model):
    assert type(roller_for(model, slots=2, max_len=64, temperature=1.0, stop_ids=STOP, record_experts=False)) is Roller


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [0, 8])
def test_the_graph_on_a_gpu(experts):
    """In bfloat16: the graph's tokens are those of the same steps without a graph, a second run's those of the first, the
    weights are the trainer's own, and the recorded probabilities are near the trainer's."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    moe = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 256} if experts else {}
    model = Qwen3(small(**sizes, **moe)).init_weights(0).to("cuda", torch.bfloat16)
    options = {"slots": 64, "max_len": 128, "temperature": 1.0, "stop_ids": STOP}
    graphed = roller_for(model, record_experts=True, **options)
    assert isinstance(graphed, StaticRoller) and graphed._graph is not None
    asked = requests(200, longest=60)
    first = graphed.run(asked)
    plain = StaticRoller(model, capture=False, **options)
    assert [r.ids for r in first] == [r.ids for r in plain.run(asked)]
    again = roller_for(model, record_experts=False, **options)
    assert again is graphed and [r.ids for r in again.run(asked)] == [r.ids for r in first]
    assert gap(model, first, 1.0, replay=bool(experts)) < 0.2
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    assert [r.ids for r in graphed.run(asked)] != [r.ids for r in first]
