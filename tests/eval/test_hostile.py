"""Hostile and random responses: no crash, no hang, nobody rewarded wrongly.

What is right is decided here a second time, by other means: Python's own syntax tree of the text after a
strict check of its characters, and splitting instead of searching. Both must agree on every response.
"""
import ast
import operator
import random
import re
import time
from decimal import Decimal, InvalidOperation
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1zero.eval.response import parse_response
from r1zero.eval.tasks.arithmetic import Arithmetic, ArithmeticProblem
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem, parse_prompt, solve
from r1zero.eval.tasks.expression import ExpressionError, parse_expression
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem
from r1zero.eval.tasks.numbers import read_number

TASK = Countdown(high=9)
WS = " \t\r\n"
DIGITS = "0123456789"
NODES = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def tree_value(node, numbers):
    """Value of a syntax tree of integers and + - * /; anything else is a ValueError."""
    if isinstance(node, ast.BinOp) and type(node.op) in NODES:
        left = tree_value(node.left, numbers)
        return NODES[type(node.op)](left, tree_value(node.right, numbers))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    raise ValueError(node)


SIGNS_OF = {"-": "-", "−": "-", "﹣": "-", "－": "-", "+": "+", "﹢": "+", "＋": "+"}


def oracle_answer(text):
    """The last complete block."""
    answer = None
    pieces = text.split("</answer>")
    for i, piece in enumerate(pieces):
        if i < len(pieces) - 1 and "<answer>" in piece:
            answer = piece.rsplit("<answer>", 1)[1]
    return answer


def oracle_own(text, asks):
    """The response up to the next question; asks(rest of the text): whether one begins here."""
    begins = [(n, n + 1) for n, c in enumerate(text) if c == "\n"]
    begins += [(m.end(), m.end()) for m in re.finditer("</answer>", text)]
    begins = [end for end, begin in sorted(begins) if asks(text[begin:].lstrip(" \t"))]
    before, opens, rest = text.partition("<think>")
    thoughts, closes, _ = rest.partition("</think>")
    if opens and closes and "</think>" not in before and "<think>" not in thoughts:
        if not any(end < len(before) for end in begins):
            begins = [end for end in begins if end >= len(before + opens + thoughts)]
    return text[: min(begins, default=len(text))]


def asks_countdown(problem):
    def asks(rest):
        found = re.match(r"([0-9 \t,]+)(?:->|→)[ \t]*([-−]?[0-9]*)", rest)
        if not found or rest[0] not in DIGITS:
            return False
        numbers = re.split(r"[ \t,]+", found[1].strip(" \t,"))
        target = found[2].replace("−", "-")
        return (sorted(numbers), target) != (sorted(map(str, problem.numbers)), str(problem.target))
    return asks


def asks_sum(expression):
    def asks(rest):
        left, equals, right = rest.partition("=")
        is_sum = equals and left and left[0] in DIGITS and set(left) <= set(DIGITS + "+-* \t")
        is_worked_out = right.lstrip(WS)[:1] in {*DIGITS, "-", "−"}
        return bool(is_sum) and not is_worked_out and re.sub(r"\s", "", left) != expression
    return asks


def oracle_number(text):
    """A number as all tasks read one, by splitting."""
    text = text.strip(WS)
    sign = SIGNS_OF.get(text[:1], "")
    whole, dot, decimals = (text[1:] if sign else text).partition(".")
    groups = whole.split(",")
    thousands = len(groups) == 1 or (1 <= len(groups[0]) <= 3 and all(len(g) == 3 for g in groups[1:]))
    digits = "".join(groups)
    if len(text) > 40 or not thousands or not digits or not set(digits + decimals) <= set(DIGITS):
        return None
    if (dot and not decimals) or (digits[0] == "0" and len(digits) > 1):
        return None
    return Fraction(Decimal(f"{sign}{digits}.{decimals or 0}"))


def oracle_right(problem, answer):
    if answer is None:
        return False
    if "=" in answer:
        answer, right_side = answer.split("=", 1)
        if oracle_number(right_side) != problem.target:
            return False
    if len(answer) > 200 or not set(answer) <= set("0123456789*/()×÷" + WS) | set(SIGNS_OF):
        return False
    text = answer.translate(str.maketrans("×÷\t\r\n", "*/   ") | str.maketrans(SIGNS_OF)).strip()
    depths = [text[:i].count("(") - text[:i].count(")") for i in range(len(text) + 1)]
    if max(depths) > 20 or re.search(r"[0-9]{10}|(?<![0-9])0[0-9]", text):
        return False
    numbers = []
    try:
        value = tree_value(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return value == problem.target and sorted(numbers) == sorted(problem.numbers)


def oracle_well_formed(whole):
    text = whole.strip(WS)
    inside, _, after = text.partition("</think>")
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    answer = after.strip(WS)
    framed = answer.startswith("<answer>") and answer.endswith("</answer>")
    around = max(len(whole) - len(whole.lstrip(WS)), len(whole) - len(whole.rstrip(WS)),
                 len(after) - len(after.lstrip(WS)))
    runs = "".join("s" if c.isspace() else "x" for c in whole).split("x")
    return once and inside.startswith("<think>") and framed and around <= 16 and max(map(len, runs)) <= 100


def check(problem, text):
    """Grade `text` by every task and compare with the oracles; returns (right, well formed)."""
    grade, response = TASK.grade(problem, text), parse_response(text)
    assert response.answer == oracle_answer(text), text
    assert grade.answer == oracle_answer(oracle_own(text, asks_countdown(problem))), text
    assert grade.accuracy == float(oracle_right(problem, grade.answer)), text
    assert response.well_formed == oracle_well_formed(text), text
    for why in (grade.why, response.why):
        assert why.isascii() and why.isprintable() and why.endswith(".") and len(why) < 400

    arithmetic = Arithmetic().grade(ArithmeticProblem("7+6", 13), text)
    assert arithmetic.answer == oracle_answer(oracle_own(text, asks_sum("7+6"))), text
    assert arithmetic.accuracy == float(oracle_number(arithmetic.answer or "") == 13)
    gsm8k = GSM8K.grade(GSM8KProblem("", "13"), text)
    if gsm8k.accuracy:  # what remains without the trimmings is thirteen, as another reader of numbers sees it
        assert Decimal(re.sub(r"[$€£¥,%+﹢＋]|\.$", "", gsm8k.answer.strip(WS))) == 13
    return grade.accuracy == 1.0, response.well_formed


TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<Answer>", "<", ">", "</", "think>", "answer"]
SIGNS = ["(", ")", "+", "-", "*", "/", "=", "×", "÷", "−", "－", " ", "\n", "\t", "13", "1", "0", "**", "//",
         "()", " " * 17, "\xa0" * 101, "\n3 4 -> 7\n", "\n7+6=", "\n1+2=", " 1+2="]
STRANGE = ["#", "_", "e", ".", "３", "٧", "²", "\x00", "\ud800", "####", "$", "ok", ";", "\u2028", "\xa0"]
PIECES = TAGS + SIGNS + STRANGE


def salad(rng, problem, solutions):
    """A response built from pieces of right ones: about a quarter stays right, the rest is nearly so."""
    expression = re.findall(r"\d+|.", rng.choice(solutions))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        mutate(rng, expression, [*map(str, problem.numbers), *"+-*/()"])
    ending = rng.choice(("", "", "", f"={problem.target}", f" = {problem.target + 1}", "="))
    opening, closing = "<think>a</think><answer>", "</answer>"
    whole = [*re.findall(r"<[^>]*>|.", opening), *expression, ending, closing]
    for _ in range(rng.choice((0, 0, 0, 1, 2, 5))):
        mutate(rng, whole, PIECES)
    if rng.random() < 0.05:
        whole += rng.choices(PIECES, k=rng.randrange(60))
    return "".join(whole)


def mutate(rng, pieces, others):
    """Insert, drop, replace, double or swap one piece in place."""
    i = rng.randrange(len(pieces) + 1)
    kind = rng.randrange(5)
    if kind == 0 or i == len(pieces):
        pieces.insert(i, rng.choice(others))
    elif kind == 1:
        del pieces[i]
    elif kind == 2:
        pieces[i] = rng.choice(others)
    elif kind == 3:
        pieces.insert(i, pieces[i])
    else:
        j = rng.randrange(len(pieces))
        pieces[i], pieces[j] = pieces[j], pieces[i]


def grade_salads(n, seed):
    rng = random.Random(seed)
    problems = [(problem, list(solve(problem))) for problem in TASK.problems("test", 40)]
    counts = {}
    for _ in range(n):
        problem, solutions = rng.choice(problems)
        verdict = check(problem, salad(rng, problem, solutions))
        counts[verdict] = counts.get(verdict, 0) + 1
    for verdict in ((False, False), (False, True), (True, False), (True, True)):
        assert counts[verdict] > n / 100  # each kind is there in numbers
    assert counts[True, True] + counts[True, False] < n / 2


def test_nearly_right_responses():
    grade_salads(5_000, seed=0)


@pytest.mark.slow
def test_100_000_nearly_right_responses():
    grade_salads(100_000, seed=1)


CHARACTERS = st.characters(exclude_categories=())  # lone surrogates too
SALADS = st.lists(st.sampled_from(PIECES + ["3", "9", "(9-3)+7", "<answer>(9-3)+7</answer>"]) | CHARACTERS)


@settings(max_examples=300)
@given(SALADS.map("".join) | st.text(CHARACTERS))
def test_any_text(text):
    problem = CountdownProblem((3, 7, 9), 13)
    check(problem, text)
    check(problem, f"<think>{text}</think>\n<answer>{text}</answer>")
    check(problem, f"<think>a</think><answer>(9-3)+7{text}</answer>")


@settings(max_examples=300)
@given(st.text(CHARACTERS) | st.text("0123456789+-*/() ×÷−._"))
def test_any_expression_number_and_prompt(text):
    try:
        value, numbers = parse_expression(text)
        assert isinstance(value, Fraction) and all(type(number) is int for number in numbers)
    except ExpressionError as error:
        assert str(error).isascii()
    assert read_number(text) == oracle_number(text)
    number = read_number(text, prose=True)
    try:
        plain = Decimal(text.strip(WS))
    except InvalidOperation:
        plain = None
    if number is not None and plain is not None:
        assert number == Fraction(plain)
    try:
        parse_prompt(text)
    except ValueError as error:
        assert str(error).isascii()


INSIDE = {
    "power": "99**98**97",
    "floor": "7//2*1",
    "decimal": "1.2*5",
    "comment": "(9-3)+7#",
    "nested 10^5": "(" * 10**5 + "9" + ")" * 10**5,
    "nested 30": "(" * 30 + "(9-3)+7" + ")" * 30,
    "open 10^5": "(" * 10**5,
    "minus 10^6": "-" * 10**6,
    "spaces 10^6": "(9-3)+7" + " " * 10**6,
    "digits 10^6": "9" * 10**6,
    "commas 10^6": "1,000" * 10**5,
    "long sum": "9-3" + "+7" * 10**5,
    "wide digits": "(９-３)+７",
    "Arabic digits": "(٩-٣)+٧",
    "Devanagari digits": "(९-३)+७",
    "superscript": "9-3+7²",
    "circled": "⑨-③+⑦",
    "null bytes": "(9-3)+\x007",
    "surrogates": "(9-3)+7\ud800\udfff",
    "no-break space": "(9-3)\xa0+7",
    "direction marks": "\u202e(9-3)+7",
    "underscore": "9-3+0_7",
    "code": "__import__('os').system('true')",
    "walrus": "(a:=9)-3+7",
    "bool": "(9-3)+7 == 13 or True",
    "unary": "9-3--7",
    "implied": "(9-3)(7)",
    "zero": "(9-3)+7+0*1/0",
    "equals": "=" * 10**6,
    "equals 13": "(9-3)+7=" + "0" * 10**6 + "13",
    "exponent": "1e999999999",
    "nan": "nan",
}
AROUND = {
    "answers 10^5": "<answer>" * 10**5,
    "closings 10^5": "</answer>" * 10**5,
    "pairs 10^5": "<answer></answer>" * 10**5,
    "right, then pairs": "<answer>(9-3)+7</answer>" + "<answer></answer>" * 10**5,
    "openings, then closings": "<answer>" * 10**5 + "</answer>" * 10**5,
    "thinks 10^5": "<think>" * 10**5 + "</think>" * 10**5,
    "interleaved": "<think><answer></think></answer>" * 10**5,
    "halves of tags": "<ans" * 10**5 + "wer>" * 10**5,
    "brackets": "<" * 10**6,
    "slashes": "</" * 10**5,
    "split tag": "<ans\nwer>(9-3)+7</answer>",
    "tag inside a tag": "<answer<answer>>(9-3)+7</answer</answer>>",
    "marks 10^5": "####" * 10**5,
    "attributes": '<answer type="sum">(9-3)+7</answer>',
    "entities": "&lt;answer&gt;(9-3)+7&lt;/answer&gt;",
    "questions 10^5": "<answer>1</answer>" + "\n3 7 9" * 10**5,
    "spaced questions": "<answer>1</answer>\n" + " " * 10**6 + "3" * 10**6,
    "question marks 10^5": "\nQuestion" * 10**5,
    "runs of spaces": ("x" + " " * 100) * 10**4,
    "full-width tags": "＜answer＞(9-3)+7＜/answer＞",
}


@pytest.mark.parametrize("name", [*INSIDE, *AROUND])
def test_nasty_responses(name):
    """None of them is right, and each is graded by all tasks in well under a second."""
    text = f"<think>a</think><answer>{INSIDE[name]}</answer>" if name in INSIDE else AROUND[name]
    problem = CountdownProblem((3, 7, 9), 13)
    start = time.process_time()  # of this process alone: other work on the machine must not fail it
    graded = [
        TASK.grade(problem, text),
        Arithmetic().grade(ArithmeticProblem("7+6", 13), text),
        GSM8K.grade(GSM8KProblem("", "13"), text),
    ]
    response = parse_response(text)
    assert time.process_time() - start < 2.0
    assert sum(grade.accuracy for grade in graded) == 0.0
    assert max(len(grade.why) for grade in graded) < 300 and len(response.why) < 300
    assert response.well_formed == (name in INSIDE and name != "spaces 10^6")  # which is padding
