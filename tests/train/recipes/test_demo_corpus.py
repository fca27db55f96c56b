"""The corpus of worked attempts: true arithmetic, honest verdicts, the dials' shares, no held-out problem."""
import ast
import operator
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from r1zero.eval.response import parse_response
from r1zero.eval.tasks.base import is_held_out
from r1zero.eval.tasks.countdown import Countdown, parse_prompt
from r1zero.eval.tasks.solver import reachable
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.recipes.demo_corpus import (
    CorpusConfig,
    all_attempts,
    break_format,
    document,
    documents,
    words,
)

TASK = Countdown()
OPERATORS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub), ast.Mult: ("*", operator.mul),
             ast.Div: ("/", Fraction)}
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
CHECK = re.compile(r"(\d+)-(\d+)=(-?\d+) (ok|no)")


def steps_of_expression(text: str) -> tuple[Fraction, list, list[int]]:
    """(value, its operations as (a, op, b, result), its numbers), by Python's own parser."""
    steps, numbers = [], []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        sign, apply = OPERATORS[type(node.op)]
        a, b = value(node.left), value(node.right)
        steps.append((a, sign, b, apply(a, b)))
        return steps[-1][-1]

    return value(ast.parse(text, mode="eval").body), steps, numbers


def check_attempt(text: str, numbers, target: int) -> tuple[list, bool]:
    """Follow an attempt: each step takes its two numbers out of the pool and puts its true result back.
    Returns its steps and its verdict."""
    *steps, check = text.split(",")
    pool, done = Counter(numbers), []
    for step in steps:
        a, op, b, c = (part if part in "+-*/" else int(part) for part in STEP.fullmatch(step).groups())
        for number in (a, b):
            assert pool[number] > 0, f"{step} uses {number}, which the pool {pool} does not hold"
            pool[number] -= 1
        assert OPERATORS[{"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div}[op]][1](a, b) == c, step
        pool[c] += 1
        done.append((a, op, b, c))
    last, goal, miss, verdict = CHECK.fullmatch(check).groups()
    assert list((+pool).elements()) == [int(last)] and int(goal) == target
    assert int(miss) == int(last) - target and (verdict == "ok") == (int(last) == target)
    return done, verdict == "ok"


def check_response(prompt: str, response: str, persistent: bool | None = None) -> int:
    """An unbroken document, checked whole; returns how many attempts it has."""
    problem = parse_prompt(prompt)
    parsed = parse_response(response)
    assert parsed.well_formed
    attempts = parsed.think.split(";")
    assert len(set(attempts)) == len(attempts)
    found = [check_attempt(attempt, problem.numbers, problem.target) for attempt in attempts]
    value, steps, numbers = steps_of_expression(parsed.answer)
    assert Counter(steps) == Counter(found[-1][0]) and Counter(numbers) == Counter(problem.numbers)
    assert (value == problem.target) == found[-1][1] == (TASK.grade(problem, response).accuracy == 1)
    if persistent:
        assert not any(ok for _, ok in found[:-1])  # it stops at the first that is right
    return len(attempts)


def config(**dials) -> CorpusConfig:
    return CorpusConfig(**{"persistent_share": 0.0, "broken_share": 0.0, "max_careless_attempts": 5, **dials})


@pytest.mark.parametrize("dials", [dict(), dict(n_numbers=2, ops="+-*/"), dict(ops="+-*/", high=9),
                                   dict(n_numbers=4, ops="*-", high=9), dict(high=2, ops="+*")])
def test_every_attempt_is_true_and_the_answer_is_the_last_one(dials):
    task = Countdown(**dials)
    for index in range(80):
        check_response(*document(task, index, config(), seed=1))


def test_documents_are_a_function_of_seed_and_index():
    c = CorpusConfig()
    texts = documents(TASK, 60, c, seed=5)
    assert texts == ["".join(document(TASK, index, c, 5)) for index in range(60)]
    assert "".join(document(TASK, 37, c, 5)) == texts[37]  # whatever was asked before
    others = documents(TASK, 60, c, seed=6)
    assert sum(a == b for a, b in zip(texts, others, strict=True)) < 10


def test_persistent_authors_stop_at_the_first_ok_and_go_on_until_then():
    c = config(persistent_share=1.0, max_attempts=6)
    reached = 0
    for index in range(300):
        prompt, response = document(TASK, index, c, seed=2)
        attempts = check_response(prompt, response, persistent=True)
        problem = parse_prompt(prompt)
        ok = " ok</think>" in response
        possible = len(all_attempts(problem.numbers, problem.target, "+-"))
        assert ok or attempts == min(6, possible)
        reached += ok
    assert 100 < reached < 290


def test_careless_authors_stop_after_one_to_five_alike_and_walk_past_answers():
    counts, past = Counter(), 0
    for index in range(800):
        prompt, response = document(TASK, index, config(), seed=3)
        counts[response.count(";") + 1] += 1
        past += " ok;" in response
    assert set(counts) == {1, 2, 3, 4, 5} and all(abs(n - 160) < 4 * np.sqrt(128) for n in counts.values())
    assert past > 50


def test_share_of_persistent_authors_matches_its_dial_and_0_is_none():
    def share(**dials) -> float:  # with careless authors that stop at once, only the persistent write on
        c = config(max_careless_attempts=1, max_attempts=2, **dials)
        return np.mean([document(TASK, index, c, seed=4)[1].count(";") > 0 for index in range(600)])

    wrong_at_first = share(persistent_share=1.0)
    assert wrong_at_first > 0.7
    assert share(persistent_share=0.0) == 0
    assert abs(share(persistent_share=0.3) - 0.3 * wrong_at_first) < 4 * np.sqrt(0.3 * 0.7 / 600)


def test_share_of_broken_documents_matches_its_dial_and_0_is_none():
    def malformed(**dials) -> float:
        c = config(**dials)
        return np.mean([not parse_response(document(TASK, i, c, seed=5)[1]).well_formed for i in range(600)])

    assert malformed(broken_share=0.0) == 0
    assert malformed(broken_share=1.0) > 0.9  # a slip may put a tag in its own place
    assert abs(malformed(broken_share=0.2) - 0.2 * 15 / 16) < 4 * np.sqrt(0.2 * 0.8 / 600)


def test_slips_are_of_every_kind():
    response, rng = "<think>1</think><answer>2</answer>", np.random.default_rng(0)
    slips = {break_format(response, rng) for _ in range(500)}
    assert "1</think><answer>2</answer>" in slips and "<think>1</think>2" in slips
    assert response + "<think>" in slips and "<answer>1</think><answer>2</answer>" in slips
    assert not any(parse_response(slip).well_formed for slip in slips - {response})


@pytest.mark.parametrize("dials", [dict(), dict(n_numbers=2, high=30), dict(n_numbers=5, high=9)])
def test_no_held_out_problem_is_in_the_corpus(dials):
    task = Countdown(**dials)
    c = CorpusConfig(max_attempts=2, max_careless_attempts=1)
    n = 2000 if task.n_numbers < 5 else 40
    seen = {parse_prompt(document(task, index, c, seed=0)[0]).key for index in range(n)}
    assert len(seen) > min(n, 0.5 * (task.size("train") or n)) / 3
    assert not any(is_held_out(key, task.test_share) for key in seen)
    held_out = {problem.key for problem in task.problems("test", 50)}
    assert all(is_held_out(key, task.test_share) for key in held_out) and not held_out & seen


@pytest.mark.parametrize("numbers", [(3, 3), (6, 2), (3, 7, 9), (5, 5, 3), (1, 1, 1), (2, 3, 5), (8, 4, 2, 1),
                                     (3, 3, 5, 7), (8, 8, 8, 8), (9, 5, 3, 1)])
@pytest.mark.parametrize("ops", ["+", "-", "*", "/", "+-", "-/", "+-*", "+-*/"])
def test_attempts_cover_every_reachable_target_and_no_other(numbers, ops):
    attempts = all_attempts(numbers, 1, ops)
    assert len({text for text, _, _ in attempts}) == len(attempts)
    values = {}
    for text, expression, ok in attempts:
        steps, verdict = check_attempt(text, numbers, 1)
        value, found, used = steps_of_expression(expression)
        assert verdict == ok == (value == 1)
        assert Counter(found) == Counter(steps) and Counter(used) == Counter(numbers)
        values[value] = text
    assert {int(value) for value in values} == set(reachable(numbers, ops))


def test_the_demos_tokenizer_writes_a_document_in_few_tokens_and_back():
    tokenizer = Tokenizer.from_words(words(TASK))
    for index in range(50):
        prompt, response = document(TASK, index, CorpusConfig(), seed=0)
        ids = tokenizer.encode(prompt + response)
        assert tokenizer.decode(ids) == prompt + response
        assert tokenizer.eos_id not in ids and len(ids) < 0.55 * len(prompt + response)


@pytest.mark.parametrize("dials", [dict(persistent_share=-0.1), dict(persistent_share=1.1),
                                   dict(broken_share=-1), dict(broken_share=float("nan")),
                                   dict(max_careless_attempts=0), dict(max_careless_attempts=13),
                                   dict(max_attempts=0)])
def test_dials_out_of_range(dials):
    with pytest.raises(ValueError, match="corpus: .*expected"):
        CorpusConfig(**dials)
