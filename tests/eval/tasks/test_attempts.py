"""Reading attempts: where thoughts end, which equations are true, which attempts are valid, hostile text."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.eval.tasks.attempts import Attempt, Step, follows, is_valid, parse_attempts, thoughts
from r1zero.eval.tasks.countdown import CountdownProblem
from r1zero.eval.tasks.expression import MAX_LENGTH

PROBLEM = CountdownProblem((3, 7, 9), 13)
OK = "9+7=16,16-3=13,13-13=0 ok"
NO = "9-7=2,3+2=5,5-13=-8 no"


def only_attempt(text: str) -> Attempt:
    [attempt] = parse_attempts(f"<think>{text}</think><answer>(9+7)-3</answer>")
    return attempt


@pytest.mark.parametrize("response, stops", [
    (f"<think>{NO};{OK}</think><answer>1", [False, True]),
    (f"<think>{NO};{OK}", [False, None]),  # cut at a verdict: no decision
    (f"<think>{NO};9+7=16,16-3=1", [False]),  # cut inside an attempt: it had gone on
    (f"<think>{NO};", [False]),
    (f"<think>{NO}</think>", [True]),
    (f"<think>{NO};9+7=16,16-3=13</think>", [False, True]),  # no verdict, but whole
    (f"{NO};{OK}</think><answer>1</answer>", [False, True]),  # <think> left out
    (f"<answer>{NO};{OK}</think><answer>1</answer>", [False, True]),  # ... turned into another
    (f"</think>{NO};{OK}</think>", [False, True]),
    (f"<think>{NO};{OK}<answer>1</answer>", [False, True]),  # </think> left out
    (f"<think>{NO};{OK}<think><answer>1</answer>", [False, True]),
    (f"<think>{NO};{OK}</think>1", [False, True]),
    (f"<think>{NO};hm;;{OK}</think>", [False, True]),  # not every piece is an attempt
    ("<answer>9+7-3=13</answer>", []),
    ("<think></think><answer>9+7-3=13</answer>", []),
    ("hello", []),
])
def test_where_thoughts_end(response, stops):
    assert [attempt.ends_thoughts for attempt in parse_attempts(response)] == stops


def test_an_attempt_is_steps_a_check_and_a_verdict():
    attempt = only_attempt(OK)
    assert attempt.text == OK and attempt.verdict == "ok" and attempt.check == Step(13, "-", 13, 0)
    assert attempt.steps == [Step(9, "+", 7, 16), Step(16, "-", 3, 13), Step(13, "-", 13, 0)]
    assert ",".join(step.spelled() for step in attempt.steps) == OK.removesuffix(" ok")


@pytest.mark.parametrize("text, verdict, check", [
    ("9+7=16,16-3=13,13-13=0", None, None),  # a check counts before a verdict only
    ("9+7=16,=0 ok", "ok", None), ("9+7=16,6+7=13 ok", "ok", None), ("1-1=0 no", "no", Step(1, "-", 1, 0)),
    ("1-1=0 None", None, None), ("1-1=0ok", None, None),
])
def test_a_verdict_and_a_check_are_read_apart(text, verdict, check):
    attempt = only_attempt(text)
    assert attempt.verdict == verdict and attempt.check == check
    assert attempt.text == text


@pytest.mark.parametrize("equation, true", [
    ("3+4=7", True), ("3+4=8", False), ("3-4=-1", True), ("-1+4=3", True), ("3*4=12", True), ("3*4=7", False),
    ("8/2=4", True), ("7/2=3", False), ("7/0=0", False), ("0/0=3", False),
    ("0/7=0", True), ("999999999*999999999=0", False),
])
def test_an_equation_is_true_or_false_exactly(equation, true):
    [step] = only_attempt(equation).steps
    assert step.true == true


@pytest.mark.parametrize("not_one", [
    "3+4=", "3+4+5=12", "3 +4=7", "3**2=9", "3+4=7.0", "٣+4=7", "3+4=" + "9" * 5000, "1+1=2 None",
])
def test_what_is_no_equation_of_two_whole_numbers_is_no_step(not_one):
    assert only_attempt(not_one).steps == [None]


@pytest.mark.parametrize("text", [
    "9+8=17,17-3=14,14-13=1 no", "9+7=16,16-13=3 no", "9+7=16,16+9=25,25-13=12 no",
    "7+9=16,16-3=13,13-13=0 ok", "9+7=16,16-3=12,12-13=-1 no", "9+7=16,16-3=13,13-13=0 no",
    "9+7=16,16-3=13,13-14=-1 no", "13-13=0 ok", "9+8=17,17-7=10,10-3=7,7-13=-6 no",
    "9+7=16,16-3=13", "9+7=16,16-3=13,13-13=0", "09+7=16,16-3=13,13-13=0 ok", "9+7=16,16-3=13,13-13=-0 ok",
    "9+7=16,,16-3=13,13-13=0 ok", "9+7=16,16-3=13,16-3=13,13-13=0 ok", "3-7=-4,9+-4=5,5-13=-8 no",
    "9+7=16,16-3=13,13-13=0  ok", "9+7=16,16-3=13,13+13=26 no",
])
def test_an_attempt_with_a_fault_is_not_valid(text):
    assert not is_valid(only_attempt(text), PROBLEM)


@pytest.mark.parametrize("text", [OK, NO, "9-3=6,7-6=1,1-13=-12 no", "9/3=3,7-3=4,4-13=-9 no"])
def test_an_attempt_without_a_fault_is_valid_for_its_problem_alone(text):
    attempt = only_attempt(text)
    assert is_valid(attempt, PROBLEM)
    assert not is_valid(attempt, CountdownProblem((3, 7, 9), 14))
    assert not is_valid(attempt, CountdownProblem((3, 7, 8), 13))


def test_answers_that_do_not_follow():
    attempt = only_attempt(OK)
    assert follows("(9+7)-3", attempt) and follows(" (9 + 7) - 3 ", attempt)
    for answer in ("", "13", "9+7-3", "(7+9)-3", "((9+7)-3)", "(9+7)-3=13", "(9+7)-(9+7)", "16-3", "(9-7)+3"):
        assert not follows(answer, attempt)
    assert not follows("3+", only_attempt(NO))
    assert not follows("1", Attempt("13-13=0 ok", [Step(13, "-", 13, 0)], "ok", True))


@pytest.mark.parametrize("n, is_read", [(3, True), (45, True), (60, False)])
def test_an_answer_longer_than_the_grader_reads_follows_nothing(n, is_read):
    steps, expression = [], "1"
    for i in range(1, n):
        steps.append(f"{i}+1={i + 1}")
        expression = f"({expression})+1" if i > 1 else "1+1"
    attempt = only_attempt(",".join([*steps, f"{n}-13={n - 13} no"]))
    assert (len(expression) <= MAX_LENGTH) == is_read == follows(expression, attempt)


PIECES = ["<think>", "</think>", "<answer>", "</answer>", ";", ",", " ok", " no", "=", "-", "+", "/", "*",
          "(", ")", "0", "9", "13", "9+7=16", OK, NO, " ", "\n", "\x00", "\ud800", "٣", "=0 ok", "<",
          "1" * 5000]
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=200)


@given(HOSTILE, HOSTILE)
def test_hostile_text_never_raises(response, answer):
    assert thoughts(response)[0] in response
    for attempt in parse_attempts(response):
        assert attempt.text in response and attempt.steps
        assert is_valid(attempt, PROBLEM) in (True, False) and follows(answer, attempt) in (True, False)


@pytest.mark.parametrize("text", [
    "<think>" * 50_000, ";" * 200_000, "1+1=2," * 20_000, f"{OK};" * 3_000, " " * 300_000 + "x",
    "=0 ok" * 50_000, f"<think>{'2-1=1,' * 20_000}1-13=-12 no</think><answer>{'(2-1)' * 20_000}</answer>",
    "<answer>" * 50_000 + "=" + "</answer>",
])
def test_long_text_is_quick(text):
    for attempt in parse_attempts(text):
        is_valid(attempt, PROBLEM)
        follows(text, attempt)
