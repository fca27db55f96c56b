"""The bounded parser, the frame of a response, and the graders of the three tasks on exact small cases."""
from fractions import Fraction

import pytest

from r1zero.eval.response import parse_response, quoted
from r1zero.eval.tasks.arithmetic import Arithmetic, ArithmeticProblem
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.eval.tasks.expression import MAX_DEPTH, MAX_LENGTH, ExpressionError, parse_expression
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem, gold_number

COUNTDOWN = Countdown(high=9)
PROBLEM = CountdownProblem((3, 7, 9), 13)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("(9-3)+7", 13, [9, 3, 7]),
        ("10-4-3", 3, [10, 4, 3]),  # left to right
        ("24/4/3", 2, [24, 4, 3]),
        ("2+3*4", 14, [2, 3, 4]),  # products first
        ("(2+3)*4", 20, [2, 3, 4]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),  # exact: in floating point this is 23.999...
        ("1/3", Fraction(1, 3), [1, 3]),
        ("3-7", -4, [3, 7]),
        ("6×4÷3−1", 7, [6, 4, 3, 1]),
        (" ( 9 -\n3 )\t+ 7\r\n", 13, [9, 3, 7]),
        ("999999999*999999999", 999999999**2, [999999999] * 2),
        ("0*5", 0, [0, 5]),
        ("((3))", 3, [3]),
    ],
)
def test_value_and_numbers(text, value, numbers):
    assert parse_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it ends at character 1"),
        ("   ", "it ends at character 4"),
        ("3+", "it ends at character 3"),
        ("(3+4", "closing bracket"),
        ("3+4)", "there is a ')' at character 4"),
        ("()", "there is a ')' at character 2"),
        ("3 4", "there is a number at character 3"),
        ("2(3)", "there is a '(' at character 2"),
        ("-3+4", "there is a '-' at character 1"),
        ("3--4", "there is a '-' at character 3"),
        ("2**3", "there is a '*' at character 3"),
        ("7//2", "there is a '/' at character 3"),
        ("3/(4-4)", "divides by zero at character 2"),
        ("1.2*5", "'.' at character 2"),
        ("1_0+3", "'_' at character 2"),
        ("1e3", "'e' at character 2"),
        ("3+4 # five", "'#' at character 5"),
        ("3+４", "'\\uff14' at character 3"),  # a full-width digit, which int() would read
        ("٣+4", "'\\u0663' at character 1"),  # an Arabic-Indic digit
        ("3²", "'\\xb2' at character 2"),
        ("3\xa0+4", "'\\xa0' at character 2"),
        ("3+4\x00", "'\\x00' at character 4"),
        ("3+\ud800", "'\\ud800' at character 3"),
        ("007", "begins with a zero"),
        ("1000000000", "more than 9 digits"),
        ("9=9", "'=' at character 2"),
    ],
)
def test_what_is_not_an_expression(text, why):
    with pytest.raises(ExpressionError) as error:
        parse_expression(text)
    assert why in str(error.value)


def test_limits_of_length_and_depth():
    parse_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)
    with pytest.raises(ExpressionError, match="nested"):
        parse_expression("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1))
    parse_expression("1" + "+1" * 99 + " ")
    with pytest.raises(ExpressionError, match=f"{MAX_LENGTH + 1} characters"):
        parse_expression("1" + "+1" * 100)


@pytest.mark.parametrize(
    ("text", "think", "answer", "well_formed"),
    [
        ("<think>a</think><answer>b</answer>", "a", "b", True),
        (" \n<think>a\nb</think>\n\n<answer>\nc\nd</answer>\n", "a\nb", "\nc\nd", True),
        ("<think></think><answer></answer>", "", "", True),
        ("", None, None, False),
        ("b", None, None, False),
        ("<answer>b</answer>", None, "b", False),
        ("<think>a</think>", "a", None, False),
        ("<think>a<answer>b</answer>", None, "b", False),
        ("<think>a</think><answer>b", "a", None, False),
        ("a</think><answer>b</answer>", None, "b", False),
        ("x<think>a</think><answer>b</answer>", "a", "b", False),
        ("<think>a</think>x<answer>b</answer>", "a", "b", False),
        ("<think>a</think><answer>b</answer>.", "a", "b", False),
        ("<think>a</think><answer>b</answer>\xa0", "a", "b", False),
        ("<answer>b</answer><think>a</think>", "a", "b", False),
        ("<think>a<answer>b</think></answer>", "a<answer>b", "b</think>", False),
        ("<think><answer>b</answer></think>", "<answer>b</answer>", "b", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "a", "c", False),  # the last one counts
        ("<think>a</think><answer>b</answer><answer>c", "a", "b", False),  # if complete
        ("<think>a</think><think>d</think><answer>b</answer>", "d", "b", False),
        ("<think>a</think><answer>b<answer>c</answer>", "a", "c", False),
        ("<think>a</think><answer>b</answer>c</answer>", "a", "b", False),
        ("<think>a</think><answer>b<think>c</answer>", "a", "b<think>c", False),
        ("</answer>b<answer>", None, None, False),
        ("<Think>a</Think><Answer>b</Answer>", None, None, False),
        ("<think>a</think>< answer>b</answer>", "a", None, False),
        ("<think>a</think><answer >b</answer>", "a", None, False),
    ],
)
def test_frame_of_a_response(text, think, answer, well_formed):
    response = parse_response(text)
    assert (response.think, response.answer, response.well_formed) == (think, answer, well_formed)
    assert response.why.endswith(".") and "\n" not in response.why


def test_the_frame_says_what_is_wrong():
    assert parse_response("<answer>1</answer>").why == "There is no <think> tag."
    assert "2 <answer> tags" in parse_response("<think></think><answer><answer>2</answer>").why
    assert parse_response("<think></think><answer>1</answer> so").why.endswith("text after </answer>: 'so'.")
    assert "out of order" in parse_response("<answer>1</answer><think></think>").why
    assert quoted("\x1b[31m\ud800" + "x" * 100) == "'\\x1b[31m\\ud800" + "x" * 34 + "'..."


@pytest.mark.parametrize(
    ("answer", "accuracy", "why"),
    [
        ("(9-3)+7", 1.0, "The answer uses every number once and equals 13."),
        ("\n 7 + 9 - 3 \n", 1.0, ""),
        ("7−3+9", 1.0, ""),
        ("(3-7)+9*1", 0.0, "The answer uses 1, which is not given."),
        ("9-3+7 = 13", 1.0, ""),
        ("9-3+7 = 14", 0.0, "The right side of the answer is ' 14', not 13."),
        ("9-3+7 = 13 = 13", 0.0, "The right side"),
        ("9-3+7 = 26/2", 0.0, "The right side"),
        ("9-3+7 =", 0.0, "The right side"),
        ("13 = 9-3+7", 0.0, "The answer uses 13, which is not given."),
        ("9+7+3", 0.0, "The answer equals 19, not 13."),
        ("3-7-9", 0.0, "The answer equals -13, not 13."),
        ("7/9/3", 0.0, "The answer equals 7/27, not 13."),
        ("9+7", 0.0, "The answer does not use 3."),
        ("9+7-3+7-7", 0.0, "The answer uses 7 three times, but it is given once."),
        ("9-3+7-7", 0.0, "The answer uses 7 twice, but it is given once."),
        ("13", 0.0, "The answer uses 13, which is not given."),
        ("93-7", 0.0, "The answer uses 93, which is not given."),
        ("", 0.0, "The answer block is empty."),
        (" \n", 0.0, "The answer block is empty."),
        ("nine", 0.0, "The answer 'nine' is not valid arithmetic: 'n' at character 1 is not a digit"),
        ("9-3+7+0/0", 0.0, "divides by zero"),
        ("9-3+7 # ok", 0.0, "not valid arithmetic"),
    ],
)
def test_countdown_grades(answer, accuracy, why):
    grade = COUNTDOWN.grade(PROBLEM, f"<think>..</think><answer>{answer}</answer>")
    assert (grade.accuracy, grade.answer) == (accuracy, answer)
    assert why in grade.why


def test_countdown_rules_beyond_the_generator():
    game24 = CountdownProblem((3, 3, 8, 8), 24)
    assert COUNTDOWN.grade(game24, "<answer>8/(3-8/3)</answer>").accuracy == 1.0  # fractions on the way
    assert COUNTDOWN.grade(PROBLEM, "<answer>(3-9)+7+12</answer>").accuracy == 0.0
    assert COUNTDOWN.grade(PROBLEM, "<answer>(3-9)+7</answer>").why == "The answer equals 1, not 13."
    assert COUNTDOWN.grade(PROBLEM, "<answer>(7-3)+9</answer>").accuracy == 1.0
    assert COUNTDOWN.grade(PROBLEM, "<answer>7-(3-9)</answer>").accuracy == 1.0  # negative on the way
    twice = CountdownProblem((4, 4, 5), 13)
    assert COUNTDOWN.grade(twice, "<answer>4+4+5</answer>").accuracy == 1.0
    assert COUNTDOWN.grade(twice, "<answer>4+5+4</answer>").accuracy == 1.0
    assert "4 once, but it is given twice" in COUNTDOWN.grade(twice, "<answer>4+5</answer>").why


def test_countdown_without_a_complete_answer():
    for response in ("", "9-3+7", "<answer>9-3+7", "9-3+7</answer>", "<answer>9<answer"):
        grade = COUNTDOWN.grade(PROBLEM, response)
        assert grade.accuracy == 0.0 and grade.answer is None
        assert grade.why == "There is no complete <answer>...</answer> block."


def test_the_last_answer_counts_for_countdown():
    right, wrong = "<answer>9-3+7</answer>", "<answer>9+3+7</answer>"
    assert COUNTDOWN.grade(PROBLEM, wrong + right).accuracy == 1.0
    assert COUNTDOWN.grade(PROBLEM, right + wrong).accuracy == 0.0


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [("-7", 1), (" -7\n", 1), ("7", 0), ("-07", 0), ("--7", 0), ("−7", 1), ("-7.0", 1), ("", 0), ("-٧", 0),
     ("–7", 0), ("-7.", 0), ("-7%", 0), ("-$7", 0), ("-7.5", 0)],
)
def test_arithmetic_grades(answer, accuracy):
    grade = Arithmetic().grade(ArithmeticProblem("5-12", -7), f"<answer>{answer}</answer>")
    assert (grade.accuracy, grade.answer) == (accuracy, answer)


def test_arithmetic_reads_the_answer_block_only():
    problem = ArithmeticProblem("17+25", 42)
    assert Arithmetic().grade(problem, "<think>17+25=41</think><answer>42</answer>").accuracy == 1.0
    assert Arithmetic().grade(problem, "42").accuracy == 0.0
    assert Arithmetic().grade(problem, "<answer>41</answer>").why == "The answer is '41', not 42."
    assert Arithmetic().grade(problem, "<answer>ten</answer>").why == "The answer 'ten' is not a number."


@pytest.mark.parametrize(
    ("response", "accuracy"),
    [
        ("so she has 1,234 left.\n#### 1234", 1.0),
        ("#### 1,234.00\n\nQuestion: what next?", 1.0),
        ("#### 7\n#### 1234", 1.0),  # the last mark counts
        ("#### 1234\n#### 7", 0.0),
        ("<think>#### 7</think><answer>$1,234</answer>", 1.0),
        ("<answer>#### 1234</answer>", 1.0),  # a mark may stand inside a block
        ("<answer>it is\n#### 1234</answer>", 1.0),
        ("<answer>#### 7</answer> #### 1234", 0.0),
        ("<answer>#### </answer> #### 1234", 0.0),
        ("<answer>7</answer>\n#### 1234", 0.0),  # an answer block goes before the mark
        ("1234", 0.0),
        ("#### 1234 dollars", 0.0),
        ("#### about 1234", 0.0),
        ("####\n1234", 0.0),
        ("#### 1234\n####", 1.0),  # a mark with nothing behind it changes nothing
        ("#### 1234 ####", 1.0),
        ("#### 1234\n#### \t\r\n########", 1.0),
        ("#### −1234", 0.0),
        ("####", 0.0),
    ],
)
def test_gsm8k_grades(response, accuracy):
    assert GSM8K.grade(GSM8KProblem("?", "1,234"), response).accuracy == accuracy


def test_gold_numbers():
    assert gold_number("3*6 = <<3*6=18>>18\n#### 18") == "18"
    assert gold_number("#### 1\n#### $2,125 ") == "$2,125"
    assert gold_number("18") == "18"
    with pytest.raises(ValueError, match="expected a number after ####"):
        gold_number("no mark here")
