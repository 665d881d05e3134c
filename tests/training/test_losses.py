"""The losses against plain torch in float64, and what each switch does."""

import math

import pytest
import torch
from tiny_chat import model, small  # noqa: F401

from qwen3_model.model import Qwen3
from training import losses
from training.losses import Divergence, PolicyGradient, advantages, cross_entropy, preset, token_weight
from training.samples import Sample, pack


@pytest.fixture
def samples():
    g = torch.Generator().manual_seed(1)

    def one(n, prompt, advantage):
        ids = torch.randint(0, 300, (n,), generator=g).tolist()
        logprobs = [0.0] * prompt + (-5 - torch.rand(n - prompt, generator=g)).tolist()
        return Sample(ids, [0.0] * prompt + [1.0] * (n - prompt), [advantage] * n, logprobs)

    return [one(12, 4, 1.0), one(9, 5, -0.5), one(20, 3, 2.0)]


def plain_logprobs(model, sample):
    """float64 [n - 1], one sample on its own: no packing, all logits."""
    logits = model.double()(torch.tensor([sample.tokens[:-1]]))[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens[1:])[:, None])[:, 0]


def exact(model, samples, token_loss):
    """Sum over trained tokens of weight * token_loss(log p, old log p, advantage), and its gradient, in float64."""
    copy = Qwen3(small(numerics="exact"))
    copy.load_state_dict(model.state_dict())
    copy = copy.double()
    total = 0.0
    for s in samples:
        logp = plain_logprobs(copy, s)
        w, a, old = (torch.tensor(v[1:], dtype=torch.float64) for v in (s.weights, s.advantages, s.logprobs))
        total = total + (w * token_loss(logp, old, a, w))[w != 0].sum()
    total.backward()
    return total.item(), {n: p.grad for n, p in copy.named_parameters()}


def check(model, samples, loss_fn, token_loss):
    want, want_grads = exact(model, samples, token_loss)
    loss, stats = loss_fn(model, pack(samples))
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=2e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), want_grads[name], rtol=2e-4, atol=2e-5, msg=name)
    return stats


def test_cross_entropy_of_packed_samples_is_that_of_each_alone(model, samples):
    stats = check(model, samples, cross_entropy, lambda logp, old, a, w: -logp)
    assert stats["entropy"] > 0


def test_ppo_takes_the_worse_of_ratio_and_clipped_ratio(model, samples):
    loss = PolicyGradient(clip_low=0.2, clip_high=0.28)

    def token_loss(logp, old, a, w):
        ratio = (logp - old).exp()
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)

    stats = check(model, samples, loss, token_loss)
    assert 0 < stats["clipped"] < 33


def test_gspo_has_one_ratio_per_sample(model, samples):
    def token_loss(logp, old, a, w):
        ratio = ((logp - old) * w).sum().div(w.sum()).exp()
        return -torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a)

    check(model, samples, preset("gspo"), token_loss)


def test_cispo_weighs_log_p_with_a_clipped_ratio_without_gradient(model, samples):
    def token_loss(logp, old, a, w):
        return -(logp - old).exp().clamp(0, 1.1).detach() * a * logp

    stats = check(model, samples, preset("cispo", clip_high=0.1), token_loss)
    assert stats["clipped"] > 0


def test_reinforce_is_not_clipped(model, samples):
    check(model, samples, preset("reinforce"), lambda logp, old, a, w: -(logp - old).exp() * a)


@pytest.mark.parametrize("name", losses.PRESETS)
def test_on_policy_all_algorithms_have_the_gradient_of_reinforce(model, samples, name):
    """Where old and new probabilities are equal, the algorithms differ in weights and scale alone."""
    packed = pack(samples)
    with torch.no_grad():
        logp = -losses.linear_cross_entropy(packed.hidden(model), model.head_weight, packed.targets, reduction="none")
    logp = logp.requires_grad_()
    packed = losses.Packed(**{**vars(packed), "logprobs": logp.detach()})
    preset(name).of_logprobs(logp, packed)[0].backward()
    torch.testing.assert_close(logp.grad, -packed.advantages)


@pytest.mark.parametrize("name", losses.PRESETS)
def test_a_token_without_weight_cannot_make_a_nan(name):
    """inf * 0: the difference of log-probabilities of a token that is left out may be anything."""
    packed = losses.Packed(
        torch.arange(4), torch.tensor([0, 4], dtype=torch.int32), torch.arange(3), torch.arange(3),
        torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -1.0]), torch.tensor([-1.0, -math.inf, -1.0]), torch.tensor([3]),
    )
    logp = torch.tensor([-1.1, -1.0, -0.9], requires_grad=True)
    loss, stats = preset(name).of_logprobs(logp, packed)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all() and logp.grad[1] == 0
    assert all(v.isfinite() for v in stats.values())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence(model, samples, direction):
    teacher = Qwen3(small(hidden_size=64, num_hidden_layers=1)).init_weights(5)
    loss, stats = Divergence(teacher, direction)(model, pack(samples))
    want = 0.0
    for s in samples:
        tokens = torch.tensor([s.tokens[:-1]])
        p, q = (m(tokens)[0].double().log_softmax(-1) for m in (teacher, model))
        kl = (p.exp() * (p - q) if direction == "forward" else q.exp() * (q - p)).sum(-1)
        want += kl[torch.tensor(s.weights[1:]) != 0].sum().item()
    assert loss.item() == pytest.approx(want, rel=1e-4) and stats["kl"].item() == pytest.approx(want, rel=1e-4)
    loss.backward()
    assert model.head_weight.grad.abs().max() > 0 and teacher.head_weight.grad is None


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx([1, -1, -1, 1], rel=1e-5)
    assert advantages([1.0, 0.0, 0.0, 0.0], "none") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages([0.3] * 5) == [0.0] * 5


def test_token_weights():
    lengths = [2, 6]
    total = {a: sum(n * token_weight(a, length=n, lengths=lengths, max_length=10) for n in lengths) for a in
             ("token", "sequence", "constant")}
    assert total == pytest.approx({"token": 1.0, "sequence": 1.0, "constant": 0.4})
    assert token_weight("sequence", length=2, lengths=lengths, max_length=10) == 0.25


@pytest.mark.parametrize("changes, words", [
    ({"ratio": "word"}, "ratio is 'word'"), ({"clip": "yes"}, "clip is"), ({"average": "mean"}, "average is"),
    ({"clip_low": 1.5}, "clip_low is 1.5"), ({"clip_high": -1.0}, "clip_high is -1"), ({"temperature": 0.0}, "temperature is"),
    ({"scale": "max"}, "scale is"), ({"correction": math.nan}, "correction is nan"),
])
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        PolicyGradient(**changes)


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="algorithm is 'ppo2'; expected one of"):
        preset("ppo2")
