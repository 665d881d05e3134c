import numpy as np
import pytest

from training.scaling import Run, best_of, fit_loss, fit_power, predict

TRUE = {"E": 1.7, "A": 400.0, "a": 0.34, "B": 410.0, "b": 0.28}


def truth(n, d):
    return TRUE["E"] + TRUE["A"] / n ** TRUE["a"] + TRUE["B"] / d ** TRUE["b"]


def ladder(noise=0.0, lrs=(1.0,), seed=0):
    """The best rate is 3 N^-0.3; a rate that is e times off costs 0.05."""
    rng = np.random.default_rng(seed)
    return [
        Run(n, d, truth(n, d) + 0.05 * np.log(m) ** 2 + noise * rng.normal(), 3 * n**-0.3 * m, 65536)
        for n in (1e7, 3e7, 1e8, 3e8) for d in (3e8, 1e9, 3e9) for m in lrs
    ]


def test_recovers_the_law_and_extrapolates():
    law = fit_loss(ladder())
    assert law.error < 1e-5 and law.E == pytest.approx(1.7, rel=1e-2) and law.a == pytest.approx(0.34, rel=2e-2)
    assert law(3e9, 6e10) == pytest.approx(truth(3e9, 6e10), rel=2e-3), "ten and twenty times beyond the ladder"
    noisy = fit_loss(ladder(noise=0.005))
    assert 5e-4 < noisy.error < 5e-3 and noisy(1e9, 1e10) == pytest.approx(truth(1e9, 1e10), rel=0.02)


def test_the_best_split_is_a_minimum():
    law = fit_loss(ladder())
    n, d = law.best_split(1e20)
    assert 6 * n * d == pytest.approx(1e20, rel=1e-6)
    assert all(law(n, d) < law(n * k, d / k) for k in (0.8, 0.95, 1.05, 1.25))


def test_best_of_a_parabola():
    values = [1.0, 2.0, 4.0, 8.0]
    best, inside = best_of(values, [(np.log(v) - np.log(3)) ** 2 for v in values])
    assert best == pytest.approx(3) and inside
    assert best_of(values, [3, 2, 1, 0.5]) == (pytest.approx(8.0), False), "the true best lies beyond"
    assert best_of(values, [0, 1, 1.5, 1.6])[1] is False
    with pytest.raises(ValueError, match="2 distinct values"):
        best_of([1, 2, 2], [1, 2, 3])


def test_power_laws():
    points = [(n, d, 5 * n**-0.3 * d**0.1) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9)]
    law = fit_power(points)
    assert (law.c, law.n, law.d) == pytest.approx((5, -0.3, 0.1))
    flat = fit_power([(n, 1e9, 7.0) for n in (1e6, 1e7)])
    assert flat.d == 0 and flat(1e9, 1e12) == pytest.approx(7)


def test_predicts_rate_batch_and_loss():
    runs = ladder(lrs=(0.5, 1.0, 2.0))
    plan, law, rates = predict(runs, params=1e9, tokens=1e10)
    assert plan.loss == pytest.approx(truth(1e9, 1e10), rel=5e-3) and plan.lr_inside == 1.0
    assert plan.lr == rates(1e9, 1e10) == pytest.approx(3 * 1e9**-0.3, rel=1e-3)
    assert plan.batch_tokens == pytest.approx(65536) and plan.batch_inside == 0.0, "no other batch was tried"
    assert predict(ladder(lrs=(2.0, 4.0, 8.0)), params=1e9, tokens=1e10)[0].lr_inside == 0, "and says when it guesses"


def test_batches_tried_in_some_rungs_do_not_bend_the_law():
    """The best batch is 65,536 sqrt(D / 1e9); others are tried in the rungs of two lengths, where some are better."""
    runs, more = ladder(lrs=(0.5, 1.0, 2.0)), []
    for d in (3e8, 3e9):
        best = 65536 * (d / 1e9) ** 0.5
        for m in (0.5, 1.0, 2.0):
            saved = 0.1 * (np.log(m) ** 2 - np.log(65536 / best) ** 2)
            more.append(Run(1e8, d, truth(1e8, d) + saved, 3 * 1e8**-0.3, best * m))
    plan, law, _ = predict(runs + more, params=1e9, tokens=1e10)
    assert law == predict(runs, params=1e9, tokens=1e10)[1] and plan.batch_inside == 1.0
    assert plan.batch_tokens == pytest.approx(65536 * 10**0.5, rel=1e-3)


def test_losses_that_do_not_fall_fit_no_law():
    with pytest.raises(ValueError, match="do not fall"):
        fit_loss([Run(n, d, 3 + 0.1 * np.log(n * d)) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)])


@pytest.mark.parametrize(
    "runs, words",
    [([], "0 rungs"), ([Run(1e6, d, 3.0) for d in range(1, 9)], "1 sizes"), (ladder()[:5], "5 rungs")], ids=["none", "one-size", "few"],
)
def test_too_few_rungs(runs, words):
    with pytest.raises(ValueError, match=words):
        fit_loss(runs)
    with pytest.raises(ValueError, match="three learning rates"):
        predict(ladder(), params=1e9, tokens=1e9)
