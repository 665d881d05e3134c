"""Reward families: right replies get what they should, wrong and gamed ones nothing."""

import json
import random
import re
import string

import pytest

from qwen3_model.chat import thinking_mode
from training.rewards import EMPTY_BLOCK, Problem, Reply, format_gate, mixed_seed
from training.rewards.chains import Chain, worked
from training.rewards.families import GENERAL, MAKERS, SCORERS, make
from training.rewards.grounding import UNKNOWN, Grounding
from training.rewards.instructions import CONSTRAINTS, Instructions, followed
from training.rewards.tools import PythonTool
from training.rewards.workers import Pool

THINK, END, STOP = 1, 2, 3


def reply(text, messages=(), thinking="so"):
    return Reply(messages, text, thinking)


# ---- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids, thinking, right", [
    ([1, 9, 8, 7, 2, 9, 5, 3], True, 1), ([1, 9, 2, 9, 5, 3], False, 1), ([1, 9, 9, 2, 5, 3], False, 1),
    ([1, 9, 8, 7, 2, 9, 5, 3], False, 0),  # thought when it was not to
    ([1, 9, 2, 9, 5, 3], True, 0),  # did not think
    ([1, 9, 8, 7, 2, 3], True, 0),  # no answer
    ([1, 9, 8, 7, 2, 9, 5], True, 0),  # no end
    ([9, 8, 7, 2, 9, 5, 3], True, 0), ([1, 9, 8, 7, 9, 5, 3], True, 0),  # half a block
    ([1, 9, 8, 7, 2, 1, 5, 2, 3], True, 0), ([9, 1, 8, 7, 6, 2, 5, 3], True, 0),  # two blocks; text before
    ([], True, 0), ([3], True, 0),
])
def test_format_gate(ids, thinking, right):
    assert format_gate(ids, think=THINK, end_think=END, stop_ids=(STOP,), thinking=thinking) == right
    assert EMPTY_BLOCK == 2


def test_the_gate_multiplies():
    from training.rl import Episode

    problem = Problem("chain", (), {}, 0)
    for gate, score in ((0.0, 1.0), (1.0, 0.0), (1.0, 0.5)):
        e = Episode(problem, 0, [], 0, [], [], reply=Reply((), "", None, gate), score=score)
        assert e.reward == gate * score


# ---- all families ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("math_verify")
    with Pool(SCORERS, workers=1, deadline=20) as pool:
        yield pool


def test_there_are_twenty_families_and_more(pool):
    families = make(GENERAL, pool)
    assert len(families) >= 20
    assert all(name == family.name == family.problem(1, 0).family for name, family in families.items())
    for name, family in families.items():
        for level in range(family.max_level + 1):
            problem = family.problem(mixed_seed(name), level)
            assert problem == family.problem(mixed_seed(name), level), "a function of seed and level"
            assert problem.level == level and thinking_mode(list(problem.messages)) == problem.thinking
            json.dumps(problem.data)
        assert family.problem(1, 0) != family.problem(2, 0)


def test_gym_scores_right_and_wrong_answers(pool):
    families = make([n for n in MAKERS if n.startswith("gym/")], pool)
    assert len(families) >= 20
    for name, family in families.items():
        problem = family.problem(5, 0)
        right, wrong = family.scores([(problem, reply(str(problem.data["answer"]))), (problem, reply("zzz"))])
        assert (right, wrong) == (1.0, 0.0), name
    assert pool.timeouts == pool.crashes == 0


def test_maths(pool):
    from training.rewards.maths import LinearEquation, Maths

    family = LinearEquation(pool)
    problem = Problem("maths", (), {"reference": "\\frac{3}{4}"}, 0)
    texts = ("It is $\\boxed{0.75}$", "\\boxed{\\frac{6}{8}}", "3/4", "\\boxed{\\frac{4}{3}}", "", "no number")
    assert family.scores([(problem, reply(t)) for t in texts]) == [1, 1, 1, 0, 0, 0]
    made = family.problem(3, 1)
    assert family.scores([(made, reply(f"\\boxed{{{made.data['reference']}}}"))]) == [1]
    with pytest.raises(ValueError, match="items is empty"):
        Maths([], pool)


@pytest.mark.parametrize("names, words", [(["chain", "nope"], "family is 'nope'"), (["chain", "chain"], "expected each once")])
def test_bad_names(names, words):
    with pytest.raises(ValueError, match=words):
        make(names, None)


# ---- chains ------------------------------------------------------------------------------------------------------------


def test_chain():
    problem = Chain().problem(7, 3)
    chain = problem.data["chain"]
    plain = re.sub("[a-z]", "", chain)
    assert len(chain) == 14 and eval(plain) % 10 == int(problem.data["answer"])
    letters = re.sub("[^a-z]", "", chain)
    assert letters in string.ascii_lowercase and len(letters) == 5
    assert worked("e3f+5g-2") == "f3+5=8g8-2=6" and worked("a0b-1") == "b0-1=9"
    assert worked(chain)[-1] == problem.data["answer"] and len(worked(chain)) == 6 * 4
    family = Chain("/no_think")
    assert family.problem(7, 3).messages[0]["content"] == f"{chain} /no_think" and not family.problem(7, 3).thinking
    assert [family.score(problem, reply(t)) for t in (problem.data["answer"], f" {problem.data['answer']}\n", "x", chain)] == [1, 1, 0, 0]
    assert Chain().problem(1, Chain.max_level).data["chain"]


# ---- instructions ------------------------------------------------------------------------------------------------------

LONG = "The tide turns twice a day. " * 3
# Per constraint: arguments, a text that keeps it and one that does not.
CASES = {
    "min_words": ({"n": 4}, "one two three four", "one two three"),
    "max_words": ({"n": 2}, "one two", "one two three"),
    "sentence_count": ({"n": 2}, "One. Two!", "One. Two! Three?"),
    "paragraphs": ({"n": 2}, "a\n\nb", "a\nb"),
    "bullets": ({"n": 2}, "- a\n- b", "- a\n- b\n- c"),
    "numbered_list": ({"n": 2}, "1. a\n2. b", "1. a\n3. b"),
    "include_word": ({"word": "river"}, "A River runs.", "Rivers run."),
    "exclude_word": ({"word": "river"}, "Rivers run.", "A river runs."),
    "word_times": ({"word": "river", "n": 2}, "river to river", "river"),
    "exclude_letter": ({"letter": "z"}, "plain", "Zebra"),
    "all_lowercase": ({}, "all low 1", "Not low"),
    "all_caps": ({}, "ALL HIGH 1", "NOt"),
    "no_commas": ({}, "none here", "one, here"),
    "question_end": ({}, "Is it?", "Is it? Yes."),
    "first_word": ({"word": "river"}, "River, wide.", "The river."),
    "end_phrase": ({"phrase": "That is all."}, "So. That is all.", "That is all. So."),
    "title_line": ({}, "<<Tides>>\nThey turn.", "Tides\n<<They>> turn."),
    "quoted": ({}, '"They turn."', '"They" turn.'),
    "json_object": ({}, '{"a": 1}', '[1]'),
    "json_keys": ({"keys": ["a", "b"]}, '{"b": 1, "a": 2}', '{"a": 1}'),
    "section": ({"n": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na\nSECTION 3\nb"),
    "postscript": ({}, "Tides turn.\nP.S. Twice.", "P.S. Twice.\nTides turn."),
    "capital_words": ({"n": 2}, "THE tide TURNS", "THE tide I turn"),
    "bold": ({"n": 1}, "a **b** c", "a **b** **c**"),
    "separator": ({}, "a\n***\nb", "a *** b"),
    "placeholder": ({"n": 2}, "[name] and [place]", "[name] and place"),
    "code_block": ({}, "```text\na\n```", "a\n```\nb\n```"),
}


def test_there_are_25_constraints_and_all_are_tested():
    assert len(CONSTRAINTS) >= 25 and CASES.keys() == CONSTRAINTS.keys()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraint(name):
    arguments, kept, broken = CASES[name]
    assert followed(kept, [[name, arguments]]) == [True]
    assert followed(broken, [[name, arguments]]) == [False]
    assert followed(" \n", [[name, arguments]]) == [False], "an empty reply keeps nothing"
    sampled, text = CONSTRAINTS[name].sample(random.Random(1))
    assert sampled.keys() == arguments.keys() and text
    assert all(e in CONSTRAINTS for e in CONSTRAINTS[name].excludes)


def test_instructions():
    family = Instructions()
    sizes = {len(family.problem(s, 3).data["constraints"]) for s in range(50)}
    assert max(sizes) == 4 and min(sizes) >= 2
    for seed in range(200):
        names = [name for name, _ in family.problem(seed, 3).data["constraints"]]
        assert not any(b in CONSTRAINTS[a].excludes for a in names for b in names if a != b), names
    problem = Problem("instructions", (), {"constraints": [["no_commas", {}], ["question_end", {}]]}, 1)
    assert [family.score(problem, reply(t)) for t in ("Is it?", "Well, is it?", "Well, yes.")] == [1, 0.5, 0]
    quiet = Instructions(thinking=False).problem(1, 0)
    assert quiet.messages[0]["content"].endswith(" /no_think") and not quiet.thinking


# ---- grounding ---------------------------------------------------------------------------------------------------------


def test_grounding():
    family = Grounding()
    seen = set()
    for seed in range(40):
        problem = family.problem(seed, 1)
        answer, passage = problem.data["answer"], problem.data["passage"]
        seen.add(answer is None)
        other = passage % 4 + 1
        if answer is None:
            texts = (UNKNOWN, f"It is {UNKNOWN}.", f"{UNKNOWN} [1]", "1204 [1]")
            assert [family.score(problem, reply(t)) for t in texts] == [1, 1, 0, 0]
        else:
            texts = (f"It is {answer} [{passage}].", f"It is {answer}.", f"{answer} [{passage}] [{other}]", f"[{passage}]", UNKNOWN)
            assert [family.score(problem, reply(t)) for t in texts] == [1, 0.5, 0.5, 0, 0]
            for wrong in problem.data["others"]:
                assert family.score(problem, reply(f"{answer} or {wrong} [{passage}]")) == 0, "naming all is no answer"
    assert seen == {True, False}


# ---- tools -------------------------------------------------------------------------------------------------------------


def call(code, name="python"):
    return {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": {"code": code}}]}


def test_python_tool():
    family = PythonTool()
    problem = family.problem(4, 0)
    assert problem.tools and family.turns > 1
    said = family.respond(problem, call("print(6 * 7)"))
    assert said == [{"role": "tool", "content": "42"}]
    assert family.respond(problem, {"role": "assistant", "content": "42"}) == []
    assert family.respond(problem, call("1/0"))[0]["content"].endswith("ZeroDivisionError: division by zero")
    assert family.respond(problem, call("x", "shell"))[0]["content"].startswith("failed: unknown call 'shell'")
    answer = str(problem.data["answer"])
    used, failed = (call("print(1)"), *said), (call("1/0"), *family.respond(problem, call("1/0")))
    assert [family.score(problem, reply(answer, m)) for m in (used, failed, ())] == [1, 0.5, 0.5]
    assert family.score(problem, reply("not it", used)) == 0
