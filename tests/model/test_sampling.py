import math
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3_model.sampling import NON_THINKING, THINKING, Sampler, SamplingParams, _hash, gumbel, keep_likely

V = 97
GREEDY = SamplingParams(temperature=0)


def transformers_scores(p: SamplingParams, prompt: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Processed scores of one row [V], by the chain that transformers' generate builds."""
    ids, scores = torch.tensor([prompt]), logits[None].clone()
    chain = []
    if p.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    chain.append(TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k:
        chain.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        chain.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        chain.append(MinPLogitsWarper(p.min_p))
    for step in chain:
        scores = step(ids, scores)
    return scores[0]


def our_scores(params: list[SamplingParams], prompts: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
    """The filtered scores [B, V] that Sampler.sample draws from."""
    seen = []

    def spy(scores, *filters):
        kept, tokens = keep_likely(scores, *filters)
        seen.append(torch.full_like(scores, -math.inf).scatter(1, tokens.expand_as(kept), kept))
        return kept, tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3_model.sampling.keep_likely", spy)
        Sampler(params, prompts, logits.shape[1]).sample(logits)
    return seen[0]


FILTERS = [
    dict(),
    dict(temperature=0.6),
    dict(top_k=1),
    dict(top_k=20),
    dict(top_k=200),
    dict(top_p=0.5),
    dict(top_p=0.95),
    dict(top_p=1e-6),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(temperature=0.6, top_k=20, top_p=0.95),
    dict(temperature=1.7, top_k=30, top_p=0.8, min_p=0.05),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7, temperature=0.5, top_k=5, min_p=0.2),
]


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "batch"])
def test_filters_equal_transformers(mixed):
    """Kept sets and probabilities; in one batch and each alone; the vocabulary is larger than the candidates."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(FILTERS), 700, generator=generator) * 3
    prompts = [torch.randint(700, (40,), generator=generator).tolist() for _ in FILTERS]
    params = [SamplingParams(**f) for f in FILTERS]
    expected = torch.stack([transformers_scores(*row) for row in zip(params, prompts, logits)])
    if mixed:
        got = our_scores(params, prompts, logits)
    else:
        got = torch.cat([our_scores([p], [ids], row[None]) for p, ids, row in zip(params, prompts, logits)])
    for f, a, b in zip(FILTERS, got, expected):
        assert torch.equal(a.isfinite(), b.isfinite()), f
    torch.testing.assert_close(got.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-8)


def test_top_k_keeps_tied_tokens_as_transformers():
    """bf16 logits tie often: 60 tokens share the 3rd value, more than the candidates beyond top_k."""
    logits = torch.cat((torch.tensor([5.0, 4.0]), torch.full((60,), 3.0), torch.linspace(2, 0, 200)))
    logits = logits[torch.randperm(262)]
    p = SamplingParams(top_k=3)
    got = our_scores([p], [[0]], logits[None])[0]
    assert torch.equal(got.isfinite(), transformers_scores(p, [0], logits).isfinite())
    assert int(got.isfinite().sum()) == 62


def test_top_p_keeps_the_tokens_tied_with_its_last():
    """transformers keeps some of them, by their place in an unstable sort; ours keeps a superset, in any order."""
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    p = SamplingParams(top_p=0.6)
    got = our_scores([p], [[0]], logits[None])[0].isfinite()
    assert got.tolist() == [True, True, True, True, False, False]
    assert not (transformers_scores(p, [0], logits).isfinite() & ~got).any()


def test_presence_penalty_counts_generated_tokens_once_and_not_the_prompt():
    sampler = Sampler([SamplingParams(presence_penalty=1.5), SamplingParams()], [[3], [3]], V)
    for ids in ([7, 7], [7, 7], [9, 9]):
        sampler.accept(torch.tensor(ids))
    logits = torch.randn(2, V)
    expected = logits.clone()
    expected[0, [7, 9]] -= 1.5
    assert torch.equal(sampler._penalise(logits), expected)


def test_repetition_penalty_counts_prompt_and_generated():
    p, logits = SamplingParams(repetition_penalty=1.3), torch.randn(1, V)
    sampler = Sampler([p], [[3, 5]], V)
    sampler.accept(torch.tensor([8]))
    assert torch.equal(sampler._penalise(logits)[0], transformers_scores(p, [3, 5, 8], logits[0]))


def test_hash_is_splitmix64():
    """The generator's published first outputs for seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [int(_hash(torch.tensor(1234567), torch.tensor(i))) % 2**64 for i in range(5)] == known


def test_noise_is_gumbel():
    """Mean and variance of a million, and the Kolmogorov distance to exp(-exp(-x)) at the 0.1 % level."""
    x = gumbel(torch.tensor([[42]]), torch.arange(1_000_000)[None])[0].sort().values
    assert abs(float(x.mean()) - 0.5772157) < 5e-3 and abs(float(x.var()) - math.pi**2 / 6) < 2e-2
    n = len(x)
    distance = ((-(-x).exp()).exp() - torch.arange(n) / n).abs().max()
    assert float(distance) < 1.95 / math.sqrt(n)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """The statistic, and its 99.9 % quantile by the Wilson-Hilferty approximation."""
    expected = probs * counts.sum()
    df = int((probs > 0).sum()) - 1
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-30))[probs > 0].sum())
    return statistic, df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6, top_k=8, top_p=0.9), dict(min_p=0.05)], ids=str)
@pytest.mark.parametrize("over", ["seeds", "steps"])
def test_draws_follow_the_distribution(how, over):
    """40,000 draws over a vocabulary of 12, by as many seeds or by successive tokens of 40 requests."""
    logits = torch.linspace(2, -2, 12)
    p = SamplingParams(**how)
    probs = transformers_scores(p, [0], logits).softmax(-1)
    counts = torch.zeros(12, dtype=torch.float64)
    rows, steps = (40_000, 1) if over == "seeds" else (40, 1000)
    sampler = Sampler([replace(p, seed=i) for i in range(rows)], [[0]] * rows, 12)
    for _ in range(steps):
        ids = sampler.sample(logits.expand(rows, 12))
        sampler.accept(ids)
        counts += torch.bincount(ids, minlength=12)
    assert counts[probs == 0].sum() == 0
    statistic, limit = chi_square(counts, probs.double())
    assert statistic < limit


@pytest.mark.slow
def test_successive_draws_are_independent():
    """Pairs (token, next token) of a uniform vocabulary of 5."""
    sampler = Sampler([SamplingParams(seed=3)], [[0]], 5)
    draws = []
    for _ in range(20_000):
        ids = sampler.sample(torch.zeros(1, 5))
        sampler.accept(ids)
        draws.append(int(ids))
    pairs = torch.tensor([a * 5 + b for a, b in zip(draws[::2], draws[1::2])])
    statistic, limit = chi_square(torch.bincount(pairs, minlength=25).double(), torch.full((25,), 1 / 25).double())
    assert statistic < limit


def test_a_row_draws_the_same_in_any_batch():
    """Each row's parameters need another path (plain, candidates, full sort); alone, together, and after rows left."""
    generator = torch.Generator().manual_seed(1)
    params = [SamplingParams(seed=7, **f) for f in FILTERS] + [GREEDY]
    prompts = [[i] for i in range(len(params))]
    steps = torch.randn(6, len(params), V, generator=generator)

    def draws(rows: list[int], leave_after: dict[int, int]) -> dict[int, list[int]]:
        sampler = Sampler([params[r] for r in rows], [prompts[r] for r in rows], V)
        out = {r: [] for r in rows}
        for n, logits in enumerate(steps):
            gone = [r for r in rows if leave_after.get(r) == n]
            if gone:
                stay = [i for i, r in enumerate(rows) if r not in gone][::-1]
                sampler.keep(stay)
                rows = [rows[i] for i in stay]
            ids = sampler.sample(logits[rows])
            sampler.accept(ids)
            for r, token in zip(rows, ids.tolist()):
                out[r].append(token)
        return out

    alone = {r: draws([r], {})[r] for r in range(len(params))}
    together = draws(list(range(len(params))), {2: 1, 5: 3, 11: 3, 0: 5})
    for r, tokens in together.items():
        assert tokens == alone[r][: len(tokens)], FILTERS[r] if r < len(FILTERS) else "greedy"


def test_seeds():
    logits = torch.zeros(1, 1000)

    def draw(seed):
        sampler = Sampler([SamplingParams(seed=seed)], [[0]], 1000)
        out = []
        for _ in range(4):
            ids = sampler.sample(logits)
            sampler.accept(ids)
            out.append(int(ids))
        return out

    assert draw(5) == draw(5) and draw(5) != draw(6)
    assert len(set(draw(5))) > 1, "successive tokens draw anew"
    fresh = draw(None)
    assert draw(None) != fresh
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert draw(None) == first, "an unset seed comes from torch's generator"


def test_greedy_ignores_the_filters_but_not_the_penalties():
    logits = torch.zeros(1, V)
    logits[0, 3], logits[0, 4] = 2.0, 1.5
    assert int(Sampler([replace(GREEDY, top_k=1, top_p=0.1)], [[3]], V).sample(logits)) == 3
    assert int(Sampler([replace(GREEDY, repetition_penalty=2.0)], [[3]], V).sample(logits)) == 4


def test_tiny_temperature_is_nearly_greedy_and_finite():
    logits = torch.randn(4, V) * 1e4
    ids = Sampler([SamplingParams(temperature=1e-5, seed=i) for i in range(4)], [[0]] * 4, V).sample(logits)
    assert torch.equal(ids, logits.argmax(-1))


def test_logprobs_are_of_the_raw_distribution():
    params = [
        SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.5, logprobs=3),
        SamplingParams(),
        SamplingParams(logprobs=True),
    ]
    logits = torch.randn(3, V, dtype=torch.bfloat16)
    sampler = Sampler(params, [[0, 1, 2]] * 3, V)
    ids = sampler.sample(logits)
    expected = logits.double().log_softmax(-1)
    three, none, one = sampler.logprobs(logits, ids)
    assert none is None and one[1] == [] and len(three[1]) == 3
    assert three[0] == pytest.approx(float(expected[0, ids[0]]), abs=1e-5)
    assert one[0] == pytest.approx(float(expected[2, ids[2]]), abs=1e-5)
    assert [token for token, _ in three[1]] == expected[0].topk(3).indices.tolist()
    assert [logp for _, logp in three[1]] == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise(bad):
    logits = torch.zeros(2, V)
    logits[1, 4] = bad
    for p in (GREEDY, SamplingParams()):
        with pytest.raises(ValueError, match="row 1"):
            Sampler([p, p], [[0], [0]], V).sample(logits)
    with pytest.raises(ValueError, match="row 0 is -inf"):
        Sampler([GREEDY], [[0]], V).sample(torch.full((1, V), -math.inf))


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("temperature", -0.1, ValueError),
        ("temperature", 1e-9, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "hot", TypeError),
        ("temperature", True, TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 2.0, TypeError),
        ("top_k", True, TypeError),
        ("top_p", 0, ValueError),
        ("top_p", 1.01, ValueError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("presence_penalty", 2.1, ValueError),
        ("repetition_penalty", 0, ValueError),
        ("repetition_penalty", math.inf, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", 1.5, TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", 1.0, TypeError),
        ("stop_ids", [-1], ValueError),
        ("stop_ids", 5, TypeError),
        ("stop_ids", [True], TypeError),
        ("stop", ["a", ""], ValueError),
        ("stop", [5], ValueError),
        ("stop", 5, TypeError),
        ("logprobs", -1, ValueError),
        ("logprobs", 0, ValueError),
        ("logprobs", 1.0, TypeError),
    ],
)
def test_bad_values_name_field_value_and_range(field, value, error):
    with pytest.raises(error, match=f"^{field}: got .*expected"):
        SamplingParams(**{field: value})


def test_bad_sampler_arguments():
    with pytest.raises(ValueError, match="params: got 1 for 2 prompts"):
        Sampler([GREEDY], [[0], [1]], V)
    with pytest.raises(ValueError, match="logprobs: got 98"):
        Sampler([SamplingParams(logprobs=V + 1)], [[0]], V)


def test_params_are_values():
    p = SamplingParams(stop="end", stop_ids=[3])
    assert (p.stop, p.stop_ids) == (("end",), (3,)) and hash(p) == hash(SamplingParams(stop=("end",), stop_ids=(3,)))
    assert (SamplingParams(logprobs=True).top_logprobs, SamplingParams(logprobs=1).top_logprobs) == (0, 1)


def test_presets():
    """The settings of the Qwen3 Technical Report, section 4.6."""
    assert (THINKING.temperature, THINKING.top_k, THINKING.top_p, THINKING.presence_penalty) == (0.6, 20, 0.95, 0)
    assert (NON_THINKING.temperature, NON_THINKING.top_k, NON_THINKING.top_p) == (0.7, 20, 0.8)
    assert NON_THINKING.presence_penalty == 1.5 and THINKING.max_tokens == NON_THINKING.max_tokens == 32_768
