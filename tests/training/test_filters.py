import pytest

from training.filters import (
    Candidate, Contents, Funnel, Validation, cold_start, consistent, mixes_languages, query_reason, repetition, response_reason,
)

GOOD = Candidate("What is 12 * 11?", "12 * 11 is 12 * 10 plus 12, so 120 + 12 = 132.", "The answer is 132.", True)


def changed(**fields):
    return Candidate(**(vars(GOOD) | fields))


@pytest.mark.parametrize("query, reason", [
    ("What is 12 * 11?", None),
    ("Let f(x) = x^2. (a) Find f'. (b) Find the minimum.", "several parts"),
    ("1. What is x? 2. What is y? 3. What is z?", "several parts"),
    ("Given:\n1. All fish are chefs\n2. No chefs are kings\nDoes it follow that no fish are kings?", None),
    ("How many legs has a spider? (a) 6 (b) 8 (c) 10", None),
    ("Write a short poem about the sea.", "not verifiable"), ("Tell me a story of a fox.", "not verifiable"),
    ("Write 12 in base 3.", None),
])
def test_queries(query, reason):
    assert query_reason(query) == reason


def test_queries_by_models():
    assert query_reason("2+2", answers_directly=lambda q: True) == "needs no thinking"
    assert query_reason("Why?", judge=lambda text: "Why?" not in text) == "not verifiable"


@pytest.mark.parametrize("candidate, reason", [
    (GOOD, None), (changed(correct=False), "wrong answer"),
    (changed(thinking="so we try again and again to get it. " * 20), "repetition"),
    (changed(thinking="132"), "guesswork"), (changed(thinking="Hard. I'll just guess: 132, as 120 + 12 = 132."), "guesswork"),
    (changed(thinking="12 * 11 is 12 * 10 plus 12, so 120 + 12 = 133."), "inconsistent"),
    (changed(thinking=GOOD.thinking + " 所以答案是一百三十二。"), "language mixing"),
    (changed(query="十二乘十一是多少？", thinking="十乘十二加十二等于120+12=132，所以答案是这个。", answer="答案是132"), None),
])
def test_responses(candidate, reason):
    assert response_reason(candidate, Validation(["How tall is the tower in the old town?"])) == reason


def test_near_validation_items():
    validation = Validation(["A train leaves at noon with 40 passengers; how many are left after 3 stops?", "3+5-2"])
    near = changed(query="A train leaves at noon with 41 passengers; how many are left after 3 stops?")
    assert response_reason(near, validation) == "near a validation item"
    assert response_reason(GOOD, validation) is None
    assert validation.likeness("3+5-2") == 1 and validation.likeness("3+5-4") < 1


def test_near_validation_items_of_a_template():
    """Only what differs between the held-out problems counts, in any order."""
    asked = "Calculate from left to right: {}.".format
    held = [asked(f"{a} + {b} - {a * b}") for a, b in ((12, 7), (3, 45), (6, 8), (9, 2))]
    validation, same, other = Contents(held), asked("7 + 12 - 84"), asked("4 + 5 - 20")
    assert Validation(held).likeness(other) > 0.6
    assert validation.likeness(held[0]) == validation.likeness(same) == 1
    assert validation.likeness(asked("7 + 12 - 85")) <= 0.5 and validation.likeness(asked("")) == 0
    assert response_reason(changed(query=same), validation) == "near a validation item"
    assert response_reason(changed(query=other), validation) is None


def test_repetition():
    assert repetition("short") == 0 and repetition("one two three four five six " * 12) > 0.7
    assert repetition("3+5=8" * 200) > 0.5
    prose = " ".join(f"word{i * 7919 % 1000}" for i in range(200))
    assert repetition(prose) < 0.05


def test_consistency():
    assert consistent("so it is 132", "132") and not consistent("so it is 131", "132")
    assert consistent("15 - 121 = -106; x = -106/77", r"\boxed{\frac{-106}{77}}") and not consistent("x = 106/77", r"\frac{-106}{77}")
    assert consistent("1454 / 2 = 727; 1504 / 2 = 752", "$727/752$") and not consistent("1454 / 2 = 726; 1504 / 2 = 752", "$727/752$")
    assert consistent("-3.0 - 9.0 = -12.0; -5.0 - 0.0 = -5.0", "-12.0 - 5.0i") and not consistent("0.0 + 5.0 = 5.0", "-12.0 - 5.0i")
    assert consistent("the capital must be Paris then", "Paris") and not consistent("it must be London then", "Paris")


def test_languages():
    assert mixes_languages("Это the answer", "What is it?") and not mixes_languages("the angle α is small", "What is it?")
    assert not mixes_languages("答えは三です", "日本の首都はどこですか")


def test_cold_start_counts_every_reason_and_takes_few_per_query():
    candidates = [GOOD, changed(thinking=GOOD.thinking + " Checked: 132."), changed(correct=False)]
    kept, counts = cold_start(candidates)
    assert kept == [GOOD] and counts == {"kept": 2, "wrong answer": 1}
    assert Funnel()(None) and not Funnel()("x")
