"""Behaviour measures: small responses counted by hand, the corpus's own attempts as oracle, hostile text."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.eval.tasks.attempts import follows, is_valid, parse_attempts
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.train.recipes.demo_corpus import CorpusConfig, all_attempts, break_format, document
from r1zero.train.report.behaviour import measure

PROBLEM = CountdownProblem((3, 7, 9), 13)
OK = "9+7=16,16-3=13,13-13=0 ok"
NO = "9-7=2,3+2=5,5-13=-8 no"
OTHER_NO = "9-3=6,7-6=1,1-13=-12 no"


def framed(think: str, answer: str = "(9+7)-3") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def measured(*responses: str, problem=PROBLEM):
    return measure([problem] * len(responses), responses)


def test_two_answers_counted_by_hand():
    b = measured(framed(f"{NO};{OK}"), framed(f"{OK};{NO};{NO}", "3+(9-7)"))
    assert (b.n_answers, b.n_attempts, b.attempts_per_answer) == (2, 5, 2.5)
    assert (b.p_stop_after_ok, b.n_ok) == (1 / 2, 2)  # the first answer stops, the second walks past
    assert (b.p_stop_after_no, b.n_no) == (1 / 3, 3)
    assert (b.verdict_accuracy, b.n_checks) == (1.0, 5)
    assert (b.arithmetic_accuracy, b.n_equations) == (1.0, 15)
    assert b.valid_attempts == 1.0 and b.repeated_attempts == 1 / 5
    assert (b.answer_follows_last, b.n_answered) == (1.0, 2)
    assert (b.right_after_ok, b.n_last_ok) == (1.0, 1)


def test_nothing_is_none_and_json():
    for b in (measured(), measured(""), measured("<think></think><answer>9-3+7</answer>")):
        shares = {name: value for name, value in b.to_dict().items() if not name.startswith("n_")}
        assert shares.pop("attempts_per_answer") == (0.0 if b.n_answers else None)
        assert set(shares.values()) == {None}


def test_a_cut_verdict_is_no_decision():
    b = measured(f"<think>{OK};{NO}", f"<think>{OK}")
    assert (b.n_ok, b.p_stop_after_ok, b.n_no, b.p_stop_after_no) == (1, 0.0, 0, None)
    assert b.n_attempts == b.n_checks == 3 and b.n_answered == 0 and b.answer_follows_last is None


@pytest.mark.parametrize("attempt, right", [
    ("13-13=0 ok", True), ("13-13=0 no", False), ("12-13=-1 no", True), ("12-13=-1 ok", False),
    ("12-13=0 ok", False),  # false arithmetic does not make it right
    ("9-9=0 ok", False), ("9-9=0 no", True),  # checked against another target
    ("13-13=7 ok", True),
])
def test_verdict_accuracy(attempt, right):
    b = measured(framed(f"9+7=16,16-3=13,{attempt}"))
    assert (b.verdict_accuracy, b.n_checks) == (float(right), 1)


def test_a_verdict_without_a_readable_check_still_stops():
    b = measured(framed("9+7=16,=0 ok"), framed("9+7=16,6+7=13 ok"))
    assert (b.n_checks, b.verdict_accuracy) == (0, None)
    assert (b.n_ok, b.p_stop_after_ok) == (2, 1.0)


@pytest.mark.parametrize("equation, true", [
    ("3+4=7", True), ("3+4=8", False), ("3-4=-1", True), ("-1+4=3", True), ("3*4=12", True), ("3*4=7", False),
    ("8/2=4", True), ("7/2=3", False), ("7/0=0", False), ("0/0=3", False),
    ("0/7=0", True), ("999999999*999999999=0", False),
])
def test_arithmetic(equation, true):
    assert measured(framed(equation)).arithmetic_accuracy == float(true)


@pytest.mark.parametrize("not_one", [
    "3+4", "3+4+5=12", "3 +4=7", "3**2=9", "3+4=7.0", "٣+4=7", "3+4=" + "9" * 5000,
])
def test_what_is_no_equation_is_not_counted(not_one):
    assert measured(framed(f"{not_one},1+1=2")).n_equations == 1


@pytest.mark.parametrize("text", [
    "9+8=17,17-3=14,14-13=1 no", "9+7=16,16-13=3 no", "9+7=16,16+9=25,25-13=12 no",
    "7+9=16,16-3=13,13-13=0 ok", "9+7=16,16-3=12,12-13=-1 no", "9+7=16,16-3=13,13-13=0 no",
    "9+7=16,16-3=13,13-14=-1 no", "13-13=0 ok", "9+8=17,17-7=10,10-3=7,7-13=-6 no",
    "9+7=16,16-3=13", "9+7=16,16-3=13,13-13=0", "09+7=16,16-3=13,13-13=0 ok", "9+7=16,16-3=13,13-13=-0 ok",
    "9+7=16,,16-3=13,13-13=0 ok", "9+7=16,16-3=13,16-3=13,13-13=0 ok", "3-7=-4,9+-4=5,5-13=-8 no",
    "9+7=16,16-3=13,13-13=0  ok", "9+7=16,16-3=13,13+13=26 no",
])
def test_attempts_with_a_fault_are_not_valid(text):
    assert measured(framed(text)).valid_attempts == 0.0
    assert text not in [a[0] for a in all_attempts(PROBLEM.numbers, 13, "+-*/")]


@pytest.mark.parametrize("numbers, target", [
    ((3, 7, 9), 13), ((6, 3, 3), 6), ((5, 5, 5), 5), ((8, 2, 1, 1), 9),
])
def test_every_attempt_of_the_corpus_is_valid_and_followed_by_its_own_answer(numbers, target):
    problem = CountdownProblem(numbers, target)
    every = all_attempts(numbers, target, "+-*/")
    parsed = [parse_attempts(f"<think>{text}</think>")[0] for text, _, _ in every]
    for (text, expression, _), attempt in zip(every, parsed, strict=True):
        assert attempt.text == text and is_valid(attempt, problem)
        assert follows(expression, attempt) and follows(expression.replace("+", " + "), attempt)
        other = replace(problem, target=target + 1)
        assert not is_valid(attempt, other)
    for attempt in parsed[:40]:  # no other answer follows, unless the same steps in another order make it
        for (text, expression, _) in every[:40]:
            if follows(expression, attempt) and text != attempt.text:
                assert sorted(text.split(",")) == sorted(attempt.text.split(","))


def test_answers_that_do_not_follow_count_against_the_share():
    b = measured(framed(OK, "3+(9-7)"), framed(OK), framed(f"{OK};{NO}"))
    assert (b.answer_follows_last, b.n_answered) == (1 / 3, 3)


def test_the_answer_is_the_one_that_the_grader_reads():
    """A response that runs on into the next problem is measured by its own answer."""
    own = "<think>9-3=6,6+7=13,13-13=0 ok</think><answer>(9-3)+7</answer>"
    [alone, running] = [measure([CountdownProblem((3, 7, 9), 13)], [own + behind])
                        for behind in ("", "\n1 2 -> 3\n<think>1+2=3</think><answer>1+2</answer>")]
    assert alone.answer_follows_last == running.answer_follows_last == 1.0
    assert alone.right_after_ok == running.right_after_ok == 1.0


def test_right_after_ok():
    wrong_ok = "9+7=16,16-7=9,9-13=-4 ok"
    b = measured(framed(OK), framed(wrong_ok, "(9+7)-7"), framed(NO, "(9+7)-3"), f"<think>{OK}")
    assert (b.right_after_ok, b.n_last_ok) == (1 / 2, 2)


def test_the_corpus_shows_the_habits_that_its_dials_set():
    task = Countdown(high=9)
    persistent, careless = CorpusConfig(1.0, 0.0), CorpusConfig(0.0, 0.0, max_careless_attempts=1)
    for config, p_no in ((persistent, 0.0), (careless, 1.0)):
        problems = [task.problem("train", i) for i in range(60)]
        b = measure(problems, [document(task, i, config, seed=1)[1] for i in range(60)])
        assert b.p_stop_after_ok == 1.0 and b.p_stop_after_no == pytest.approx(p_no, abs=0.05)
        assert b.verdict_accuracy == b.arithmetic_accuracy == b.valid_attempts == b.answer_follows_last == 1.0
        assert b.right_after_ok == 1.0 and b.repeated_attempts == 0.0


def test_broken_tags_hide_no_attempt():
    rng, whole = np.random.default_rng(0), framed(f"{NO};{OTHER_NO};{OK}")
    for _ in range(100):
        broken = break_format(whole, rng)
        assert [a.text for a in parse_attempts(broken)] == [NO, OTHER_NO, OK]
        assert [a.ends_thoughts for a in parse_attempts(broken)] == [False, False, True]


PIECES = ["<think>", "</think>", "<answer>", "</answer>", ";", ",", " ok", " no", "=", "-", "+", "/", "*",
          "(", ")", "0", "9", "13", "9+7=16", OK, NO, " ", "\n", "\x00", "\ud800", "٣", "=0 ok", "<",
          "1" * 5000]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=200)


@given(st.lists(HOSTILE, max_size=4))
def test_hostile_text_never_raises_and_shares_are_shares(responses):
    b = measured(*responses)
    for name, value in b.to_dict().items():
        assert value is None or value >= 0 and (name.startswith(("n_", "attempts_per")) or value <= 1)


@pytest.mark.parametrize("text", [
    "<think>" * 50_000, ";" * 200_000, "1+1=2," * 20_000, f"{OK};" * 3_000, " " * 300_000 + "x",
    "=0 ok" * 50_000, f"<think>{'2-1=1,' * 20_000}1-13=-12 no</think><answer>{'(2-1)' * 20_000}</answer>",
    "<answer>" * 50_000 + "=" + "</answer>",
])
def test_long_text_is_quick(text):
    measured(text)


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        measure([PROBLEM], [])
