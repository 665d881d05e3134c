"""Worked solutions of the families' problems, in place of a strong model: reasoning that a small model can imitate.

Every step is one that stands alone (a sum, a product, a letter), written where the next one needs it. A solution is given
only where its last step comes to the family's own answer; families that no rule here solves get none.
"""

from __future__ import annotations

import ast
import calendar
import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from fractions import Fraction
from typing import Any

from ..rewards import Problem
from ..rewards.chains import worked as chain_steps
from ..rewards.grounding import UNKNOWN
from ..rewards.instructions import followed, words
from ..rewards.tools import PYTHON

Data = Mapping[str, Any]
SIGNS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub), ast.Mult: ("*", operator.mul),
         ast.Div: ("/", Fraction)}


def solution(problem: Problem) -> list[dict[str, Any]] | None:
    """The assistant's turns (and the tool's) that solve a problem, with ``reasoning_content``; None where no rule does."""
    family = problem.family.removesuffix("/think").removesuffix("/no_think")
    if family == "python_tool":
        return python_tool(problem)
    if family == "instructions":
        return instructions(problem)
    if family == "chain":
        found = chain_steps(problem.data["chain"]), problem.data["answer"]
    elif family == "grounding":
        found = grounding(problem)
    elif family == "linear_equation":
        found = linear_equation(problem)
    elif solver := GYM.get(family.removeprefix("gym/")):
        steps = solver(problem.data)
        found = steps and (steps, problem.data["answer"])
    else:
        found = None
    return found and [{"role": "assistant", "reasoning_content": found[0], "content": found[1]}]


# ---- arithmetic --------------------------------------------------------------------------------------------------------


def evaluate(node: ast.AST, steps: list[str]) -> int | Fraction | None:
    """Value of an expression; every operation becomes a step. None for what is not of integers and + - * /."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = evaluate(node.operand, steps)
        if value is not None and not isinstance(node.operand, ast.Constant):
            steps.append(f"-({value}) = {-value}")
        return None if value is None else -value
    if not isinstance(node, ast.BinOp) or type(node.op) not in SIGNS:
        return None
    left, right = evaluate(node.left, steps), evaluate(node.right, steps)
    sign, act = SIGNS[type(node.op)]
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    value = act(left, right)
    value = int(value) if value == int(value) else value
    if sign == "*" and min(abs(left), abs(right)) > 9:
        steps += product(left, right)
    steps.append(f"{left} {sign} {right} = {value}")
    return value


def product(a: int, b: int) -> list[str]:
    """Partial products by the digits of b."""
    parts = [(int(d) * 10**i) for i, d in enumerate(reversed(str(abs(b)))) if d != "0"][::-1]
    steps, total = [], 0
    for part in parts:
        steps.append(f"{abs(a)} * {part} = {abs(a) * part}")
        if total:
            steps.append(f"{total} + {abs(a) * part} = {total + abs(a) * part}")
        total += abs(a) * part
    return steps


def expression(text: str, answer: str) -> str | None:
    steps: list[str] = []
    try:
        value = evaluate(ast.parse(text.strip(), mode="eval").body, steps)
    except SyntaxError:
        return None
    return "; ".join(steps) if steps and str(value) == answer else None


def running_sum(terms: list[int]) -> list[str]:
    steps, total = [], terms[0]
    for t in terms[1:]:
        steps.append(f"{total} + {t} = {total + t}")
        total += t
    return steps


def euclid(a: int, b: int) -> tuple[int, list[str]]:
    a, b, steps = max(a, b), min(a, b), []
    while b:
        steps.append(f"{a} % {b} = {a % b}")
        a, b = b, a % b
    return a, [*steps, f"gcd {a}"]


def gcd(d: Data) -> str:
    numbers = d["metadata"]["numbers"]
    found, steps = numbers[0], []
    for n in numbers[1:]:
        found, more = euclid(found, n)
        steps += more
    return "; ".join(steps)


def lcm(d: Data) -> str:
    numbers = d["metadata"]["numbers"]
    found, steps = numbers[0], []
    for n in numbers[1:]:
        g, more = euclid(found, n)
        steps += [*more, f"{n} / {g} = {n // g}", *product(found, n // g)]
        found = found * n // g
    return "; ".join(steps)


def prime_factorization(d: Data) -> str:
    left, steps = d["metadata"]["number"], []
    for p in d["metadata"]["factors"]:
        if left != p:
            steps.append(f"{left} / {p} = {left // p}")
            left //= p
    return "; ".join([*steps, f"{left} is prime"])


def fraction_simplification(d: Data) -> str:
    a, b = d["metadata"]["numerator"], d["metadata"]["denominator"]
    g, steps = euclid(a, b)
    return "; ".join([*steps, f"{a} / {g} = {a // g}", f"{b} / {g} = {b // g}"])


def simple_equations(d: Data) -> str | None:
    x = d["metadata"]["variable"]
    found = re.fullmatch(rf"(\d+)\*{x}(?: ([+-]) (\d+))? = (-?\d+)", d["metadata"]["equation"])
    if not found:
        return None
    a, sign, b, c = int(found[1]), found[2], int(found[3] or 0), int(found[4])
    right = c - b if sign == "+" else c + b
    steps = [f"{c} {'-' if sign == '+' else '+'} {b} = {right}"] if sign else []
    return "; ".join([*steps, f"{a}*{x} = {right}", f"{right} / {a} = {right // a}"]) if right % a == 0 else None


def linear_equation(problem: Problem) -> tuple[str, str]:
    a, sign, b, c = re.match(r"Solve for x: (\d+)x ([+-]) (\d+) = (-?\d+)", problem.messages[-1]["content"]).groups()
    a, b, c = int(a), int(sign + b), int(c)
    right = c - b
    g = math.gcd(a, right)
    steps = [f"{c} {'-' if b >= 0 else '+'} {abs(b)} = {right}", f"x = {right}/{a}"]
    steps += [f"divide by {g}: {right // g}/{a // g}"] if g > 1 else []
    return "; ".join(steps), f"\\boxed{{{problem.data['reference']}}}"


def simple_geometry(d: Data) -> str:
    sides, known = d["metadata"]["n_sides"], [round(a) for a in d["metadata"]["known_angles"]]
    left = (sides - 2) * 180
    steps = [f"{sides} - 2 = {sides - 2}", f"{sides - 2} * 180 = {left}"]
    for a in known:
        steps.append(f"{left} - {a} = {left - a}")
        left -= a
    return "; ".join(steps)


def complex_arithmetic(d: Data) -> str | None:
    (a, b), (c, e), sign = d["metadata"]["num1"], d["metadata"]["num2"], d["metadata"]["operation"]
    if sign not in "+-":
        return None
    re_, im = (a + c, b + e) if sign == "+" else (a - c, b - e)
    return f"{a} {sign} {c} = {re_}; {b} {sign} {e} = {im}"


def decimal_arithmetic(d: Data) -> str | None:
    found = re.search(r"\n\(?(-?[\d.]+)\s*([+-])\s*(-?[\d.]+)\)? = \?", d["question"])
    if not found:  # more than two terms, or a product
        return None
    places = max(len(t.partition(".")[2]) for t in (found[1], found[3]))
    a, b = (f"{float(t):.{places}f}" for t in (found[1], found[3]))
    return f"{a} {found[2]} {b} = {d['answer']}"


def base_conversion(d: Data) -> str:
    m = d["metadata"]
    value, steps = 0, []
    for digit in m["source_repr"]:
        n = int(digit, 36)
        steps.append(f"{value} * {m['source_base']} + {n} = {value * m['source_base'] + n}")
        value = value * m["source_base"] + n
    return "; ".join([*steps, *divisions(value, m["target_base"]), d["answer"]])


def divisions(value: int, base: int) -> list[str]:
    steps = []
    while value:
        steps.append(f"{value} = {value // base} * {base} + {value % base}")
        value //= base
    return steps


def count_bits(d: Data) -> str:
    ones, steps = 0, []
    for step in divisions(d["metadata"]["number"], 2):
        ones += step.endswith("1") and step.endswith("+ 1")
        steps.append(f"{step} ({ones})")
    return "; ".join(steps)


# ---- dates and times ---------------------------------------------------------------------------------------------------


def calendar_arithmetic(d: Data) -> str | None:
    m = d["metadata"]
    if m["task"] == "is_leap_year":
        year = m["year"]
        rests = [f"{year} % {n} = {year % n}" for n in ((4,) if year % 4 else (4, 100) if year % 100 else (4, 100, 400))]
        return "; ".join([*rests, "leap year" if calendar.isleap(year) else "no leap year"])
    if m["task"] == "weekday_of_date":
        return "; ".join(weekday(date.fromisoformat(m["target_date"])))
    if m["task"] != "weekday_offset":
        return None
    day, days = date.fromisoformat(m["start_date"]).isoweekday() % 7, m["offset_days"]
    rest, sign = abs(days) % 7, "+" if days > 0 else "-"
    total = day + rest if days > 0 else day - rest
    steps = [f"{DAYS[day]} {day}", f"{abs(days)} % 7 = {rest}", f"{day} {sign} {rest} = {total}"]
    return "; ".join([*steps, *within_week(total)])


DAYS = ("Sunday", *calendar.day_name[:6])


def weekday(day: date) -> list[str]:
    """By the weekdays of the days before the year and before the month, of Sunday 0."""
    year = date(day.year, 1, 1).toordinal() - 1
    month = (day.replace(day=1).toordinal() - 1 - year) % 7
    total = year % 7 + month + day.day
    steps = [f"{day.year}: {year % 7}", f"{calendar.month_name[day.month]}: {month}"]
    return [*steps, f"{year % 7} + {month} + {day.day} = {total}", *within_week(total)]


def within_week(total: int) -> list[str]:
    turned = [] if 0 <= total < 7 else [f"{total} + 7 = {total + 7}"] if total < 0 else [f"{total} % 7 = {total % 7}"]
    return [*turned, f"{total % 7} {DAYS[total % 7]}"]


UNITS = (("days", "D ", "none", 0), ("hours", "HH", "none", 24), ("minutes", "MM", "none", 60), ("seconds", "SS", "%S", 60),
         ("milliseconds", "mmm", "%f", 1000))  # name, in the answer's format, in the question's format, size


def time_intervals(d: Data) -> str | None:
    """From the smallest unit to the largest, with what is borrowed. None where the data set's own answer is another (it cuts
    milliseconds off, and loses times behind a weekday in brackets), or the dates are not of one month or the next."""
    m = d["metadata"]
    asked, given = m["expected_format"], m["format"]
    start, end = (datetime.fromisoformat(m[k]) for k in ("start_time", "end_time"))
    months = 12 * (end.year - start.year) + end.month - start.month
    if "(%A) %H" in given or months not in (0, 1):
        return None
    a, b, steps, found, borrowed = by_unit(start), by_unit(end), [], {}, 0
    for t, own in ((start, a), (end, b)):
        if zone := t.hour - own["hours"]:
            steps.append(f"{t.hour} {'+' if zone < 0 else '-'} {abs(zone)} = {own['hours']}")
    if months:
        length = calendar.monthrange(start.year, start.month)[1]
        steps.append(f"{b['days']} + {length} = {b['days'] + length}")
        b["days"] += length
    for name, _, _, size in (u for u in reversed(UNITS) if u[1] in asked or u[2] in given):
        value = b[name] - a[name] - borrowed
        steps.append(f"{name} {b[name]} - {a[name]}{f' - {borrowed}' if borrowed else ''} = {value}")
        borrowed = -(value // size) if size else 0
        if borrowed:
            steps.append(f"{value} {'+' if borrowed > 0 else '-'} {abs(borrowed) * size} = {value + borrowed * size}")
        found[name] = value + borrowed * size
    clock = ":".join(f"{found[name]:02d}" for name, code, _, _ in UNITS[1:4] if code in asked)
    clock += f".{found['milliseconds']:03d}" if "mmm" in asked else ""
    answer = ", ".join([*([f"{found['days']} days"] if "D " in asked else []), *([clock] if clock else [])])
    return "; ".join([*steps, answer]) if answer == d["answer"] else None


def by_unit(t: datetime) -> dict[str, int]:
    """By unit, hours those of UTC and so perhaps of another day."""
    zone = t.utcoffset().total_seconds() // 3600 if t.tzinfo else 0
    return {"days": t.day, "hours": t.hour - int(zone), "minutes": t.minute, "seconds": t.second,
            "milliseconds": t.microsecond // 1000}


# ---- words -------------------------------------------------------------------------------------------------------------


def letter_counting(d: Data) -> str:
    letter, total, steps = d["metadata"]["target_letter"].lower(), 0, []
    for word in d["metadata"]["span"]:
        total += word.lower().count(letter)
        steps.append(f"{' '.join(word.lower())}: {total}")
    return "\n".join(steps)


def spell_backward(d: Data) -> str:
    word = d["metadata"]["word"]
    return f"{' '.join(word)}; {' '.join(reversed(word))}"


def word_sorting(d: Data) -> str:
    return "\n".join(f"{w[0]}: {w}" for w in d["metadata"]["sorted_words"])


def leg_counting(d: Data) -> str | None:
    steps, terms = [], []
    for animal, count in d["metadata"]["animals"].items():
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        terms.append(count * ANIMALS[animal])
        steps.append(f"{animal}: {ANIMALS[animal]} legs, {count} * {ANIMALS[animal]} = {terms[-1]}")
    return "; ".join([*steps, *running_sum(terms)]) if str(sum(terms)) == d["answer"] else None


def aiw(d: Data) -> str | None:
    found = re.search(r"has (\d+) (male|female)?.*?(\d+)", d["question"])
    brothers = re.search(r"(\d+) brothers", d["question"])
    sisters = re.search(r"(\d+) sisters", d["question"])
    if not (found and brothers and sisters):
        return None
    b, s, answer = int(brothers[1]), int(sisters[1]), int(d["answer"])
    for name, n in (("sisters", s), ("brothers", b)):
        if n + 1 == answer and f"many {name}" in d["question"]:
            return f"{b} brothers, {s} sisters; {name}: {n} + 1 = {n + 1}"
    return None


def family_relationships(d: Data) -> str:
    m = d["metadata"]
    told = [s for s in d["question"].replace("\n", " ").split(". ") if m["person1"] in s or m["person2"] in s]
    return f"{'. '.join(told[:2])}. {m['person1']} is the {m['relationship']} of {m['person2']}"


def knights_knaves(d: Data) -> str:
    """One assignment after another, until what each says is true of the knights and false of the knaves."""
    m = d["metadata"]
    names, terms, lines = m["names"], m["knight_knave_terms"], []
    for kinds in itertools.product((True, False), repeat=len(names)):
        supposed = ", ".join(f"{n} {terms['knight' if k else 'knave']}" for n, k in zip(names, kinds))
        said = [holds(s, kinds) for s in m["statements"]]
        wrong = next((i for i, (k, s) in enumerate(zip(kinds, said)) if k != s), None)
        if wrong is None:
            return "\n".join([*lines, f"{supposed}: all fits"])
        lines.append(f"{supposed}: {names[wrong]} says what is {'true' if said[wrong] else 'false'}, no")
    raise ValueError(f"{d['question']!r} has no solution")


def holds(statement: Any, kinds: tuple[bool, ...]) -> bool:
    sign, *parts = statement
    if sign in ("telling-truth", "lying"):
        return kinds[parts[0]] == (sign == "telling-truth")
    values = [holds(p, kinds) for p in parts]
    return {"not": not values[0], "and": all(values), "or": any(values), "->": not values[0] or values[-1],
            "<=>": values[0] == values[-1]}[sign]


def syllogism(d: Data) -> str:
    m = d["metadata"]
    return f"{m['premise1']}. {m['premise2']}. {m['conclusion']}: {'follows' if m['is_valid'] else 'does not follow'}"


GYM: dict[str, Callable[[Data], str | None]] = {
    "aiw": aiw, "base_conversion": base_conversion,
    "basic_arithmetic": lambda d: expression(d["metadata"]["expression"], d["answer"]),
    "calendar_arithmetic": calendar_arithmetic,
    "chain_sum": lambda d: expression(d["metadata"]["expression"], d["answer"]),
    "complex_arithmetic": complex_arithmetic, "count_bits": count_bits, "decimal_arithmetic": decimal_arithmetic,
    "family_relationships": family_relationships, "fraction_simplification": fraction_simplification, "gcd": gcd,
    "knights_knaves": knights_knaves, "lcm": lcm, "leg_counting": leg_counting, "letter_counting": letter_counting,
    "prime_factorization": prime_factorization,
    "products": lambda d: expression(d["metadata"]["expression"], d["answer"]),
    "simple_equations": simple_equations, "simple_geometry": simple_geometry, "spell_backward": spell_backward,
    "syllogism": syllogism, "time_intervals": time_intervals, "word_sorting": word_sorting,
}


# ---- families of our own -----------------------------------------------------------------------------------------------


def grounding(problem: Problem) -> tuple[str, str]:
    passages, question = problem.messages[-1]["content"].split("\n\n")[1:]
    answer, number = problem.data["answer"], problem.data["passage"]
    passage = passages.split("\n")[number - 1]
    if answer is None:
        return f"{passage} That is all it says.", UNKNOWN
    return passage, f"{answer} [{number}]"


def python_tool(problem: Problem) -> list[dict[str, Any]] | None:
    text, answer = problem.messages[-1]["content"], str(problem.data["answer"])
    if found := re.search(r"(\d+) times (\d+), modulo (\d+)", text):
        code = f"print({found[1]} * {found[2]} % {found[3]})"
    elif found := re.search(r"from 1 to (\d+), modulo (\d+)", text):
        code = f"print(sum(i * i for i in range(1, {found[1]} + 1)) % {found[2]})"
    elif found := re.search(r"digit 7 occur in (\d+)", text):
        code = f'print(str({found[1]}).count("7"))'
    else:
        return None
    call = {"name": PYTHON["function"]["name"], "arguments": {"code": code}}
    return [
        {"role": "assistant", "reasoning_content": "Python can compute this.", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": answer},
        {"role": "assistant", "reasoning_content": f"The tool says {answer}.", "content": answer},
    ]


OPENINGS = ("There is much to say about {}", "Many people like to think about {}", "We can learn a lot from {}",
            "This is a short text about {}", "Not everyone knows about {}")
MORE = ("It is old and new at the same time", "Some find it hard and some find it easy", "It takes time to see how it works",
        "Every year there is something new to find", "Children often ask about it", "It has changed over the years",
        "A good book can help to understand it", "There are many ways to look at it")


def instructions(problem: Problem) -> list[dict[str, Any]] | None:
    """A text of stock sentences bent to the constraints, where that keeps them all."""
    text, constraints = problem.messages[-1]["content"], problem.data["constraints"]
    topic = re.match(r"Write about (.+?)\. ", text)[1]
    rng = random.Random(text)
    for _ in range(4):
        reply = written(topic, constraints, rng)
        if all(followed(reply, constraints)):
            names = ", ".join(name.replace("_", " ") for name, _ in constraints)
            return [{"role": "assistant", "reasoning_content": f"Topic: {topic}. Keep: {names}.", "content": reply}]
    return None


def written(topic: str, constraints: list[Any], rng: random.Random) -> str:
    a = {name: arguments for name, arguments in constraints}
    count = a.get("sentence_count", {}).get("n", 2 if "max_words" in a else 3)
    said = [rng.choice(OPENINGS).format(topic), *rng.sample(MORE, len(MORE))][: max(count, 1)]
    if "min_words" in a:
        while len(words(" ".join(said))) < a["min_words"]["n"]:
            said.append(rng.choice(MORE))
    lines = [f"{s}." for s in said]
    if "word_times" in a:
        lines[0] = lines[0][:-1] + f" and {a['word_times']['word']}" * a["word_times"]["n"] + "."
    if "include_word" in a:
        lines[-1] = lines[-1][:-1] + f" with a {a['include_word']['word']}."
    if "first_word" in a:
        lines[0] = f"{a['first_word']['word'].capitalize()} is a word: {lines[0]}"
    if "capital_words" in a:
        lines[0] = " ".join(["VERY"] * a["capital_words"]["n"]) + " well: " + lines[0]
    if "bold" in a:
        lines[0] = " ".join(["**note**"] * a["bold"]["n"]) + " " + lines[0]
    if "placeholder" in a:
        lines[-1] = lines[-1][:-1] + " [name]" * a["placeholder"]["n"] + "."
    if "question_end" in a:
        lines[-1] = "What do you think?"
    if "end_phrase" in a:
        lines.append(a["end_phrase"]["phrase"])
    body = " ".join(lines)
    if "exclude_letter" in a:
        letter = a["exclude_letter"]["letter"]
        body = " ".join(w for w in body.split() if letter not in w.lower())
    if "paragraphs" in a:
        n = a["paragraphs"]["n"]
        body = "\n\n".join((lines + [f"{m}." for m in MORE])[:n])
    if "bullets" in a:
        body = "\n".join(f"- {s}" for s in (said + list(MORE))[: a["bullets"]["n"]])
    if "numbered_list" in a:
        body = "\n".join(f"{i}. {s}" for i, s in enumerate((said + list(MORE))[: a["numbered_list"]["n"]], 1))
    if "section" in a:
        n = a["section"]["n"]
        body = "\n".join(f"SECTION {i}\n{(lines * n)[i - 1]}" for i in range(1, n + 1))
    if "separator" in a:
        body = f"{body}\n***\n{MORE[0]}."
    if "title_line" in a:
        body = f"<<{topic}>>\n{body}"
    if "postscript" in a:
        body += "\nP.S. That was short."
    if "json_object" in a:
        body = f'{{"topic": "{topic}"}}'
    if "json_keys" in a:
        body = "{" + ", ".join(f'"{k}": "{topic}"' for k in a["json_keys"]["keys"]) + "}"
    if "no_commas" in a:
        body = body.replace(",", "")
    if "quoted" in a:
        body = f'"{body}"'
    if "code_block" in a:
        body = f"```\n{body}\n```"
    return body.lower() if "all_lowercase" in a else body.upper() if "all_caps" in a else body
