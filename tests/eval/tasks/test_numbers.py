"""The one reader of numbers: what it takes, what it refuses, and that every task and file uses it."""
import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.eval.tasks.arithmetic import Arithmetic, ArithmeticProblem
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.eval.tasks.expression import parse_expression
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem
from r1zero.eval.tasks.numbers import number_in_file, read_number, whole_in_file

PLAIN = [("18", 18), ("1,234", 1234), ("1,234,567.50", Fraction(123456750, 100)), (" 7\n", 7), ("0", 0),
         ("-0", 0), ("0.5", Fraction(1, 2)), ("9" * 30, 10**30 - 1), ("-12.50", Fraction(-25, 2)), ("+3", 3)]
MINUSES, PLUSES = "-−﹣－", "+﹢＋"
PROSE = [("$12", 12), ("-$12.50", Fraction(-25, 2)), ("$-3", -3), ("€1,000", 1000), ("12.", 12), ("15%", 15),
         ("0012", 12), ("−$3", -3), ("$−3", -3), ("+$3.00.", 3), ("0,123", 123)]
NEVER = ["", "-", "$", ".", "-.5", ".5", "--3", "-$-3", "+-3", "−-3", "12 eggs", "1 2", "1,23", "1,2345",
         "1234,567", ",123", "1/2", "1e3", "1_000", "١٢", "３", "²", "½", "inf", "nan", "12..", "1.2.3",
         "9" * 41, "0x10", "–3", "—3", "3–7", "- 3", "12 %", "$$3", "3$", "\xa03", "3\u200b", "1\u202f000",
         "True"]


@pytest.mark.parametrize("text, value", PLAIN)
def test_numbers_that_all_tasks_read(text, value):
    assert read_number(text) == read_number(text, prose=True) == value


@pytest.mark.parametrize("text, value", PROSE)
def test_numbers_as_people_write_them_are_read_only_where_a_task_says_so(text, value):
    assert read_number(text) is None and read_number(text, prose=True) == value


@pytest.mark.parametrize("text", NEVER)
def test_what_is_no_number_anywhere(text):
    assert read_number(text) is None is read_number(text, prose=True) is read_number(text, leading_zeros=True)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3), st.sampled_from(MINUSES),
       st.sampled_from(["", *PLUSES]))
def test_every_way_to_write_a_number_has_its_value(n, places, minus, plus):
    value = Decimal(n).scaleb(-places)
    for text in (f"{value:f}", f"{value:,f}"):
        text = text.replace("-", minus) if n < 0 else plus + text
        assert read_number(text) == Fraction(value), text


@pytest.mark.parametrize("minus", MINUSES)
def test_every_minus_counts_in_every_task_and_in_the_files(minus):
    assert Arithmetic.grade(ArithmeticProblem("5-12", -7), f"<answer>{minus}7</answer>").accuracy == 1.0
    assert GSM8K.grade(GSM8KProblem("", "-7"), f"#### {minus}7").accuracy == 1.0
    assert GSM8K.grade(GSM8KProblem("", f"{minus}7"), "#### -7").accuracy == 1.0
    problem = Countdown.problem_from_record({"numbers": [3, 7], "target": f"{minus}4"})
    assert problem == CountdownProblem((3, 7), -4) == Countdown.problem_from_text(f"3 7 -> {minus}4")
    assert Countdown.grade(problem, f"<answer>3{minus}7={minus}4</answer>").accuracy == 1.0
    assert parse_expression(f"3{minus}7") == (-4, [3, 7])


@pytest.mark.parametrize("right_side, accuracy", [
    ("-4", 1), (" −4\n", 1), ("-4.0", 1), ("4", 0), ("--4", 0), ("-04", 0), ("-$4", 0), ("3-7", 0), ("", 0)])
def test_a_negative_target_on_the_right_side(right_side, accuracy):
    grade = Countdown.grade(CountdownProblem((3, 7), -4), f"<answer>3-7 = {right_side}</answer>")
    assert grade.accuracy == accuracy and grade.why.isascii()


@pytest.mark.parametrize("value, number", [
    (72, 72), (72.0, 72), ("72", 72), ("72.0", 72), (72.5, Fraction(145, 2)), ("-72", -72), (-72, -72),
    ("007", 7), (0.1, Fraction(1, 10)), (1e22, 10**22), ("1,000", 1000), (10**39, 10**39)])
def test_numbers_of_files(value, number):
    assert number_in_file(value) == number
    if number == int(number):
        assert whole_in_file(value) == number


@pytest.mark.parametrize("value, why", [
    (True, "'True' is not a number"), (None, "not a number"), ([7], "not a number"), ({}, "not a number"),
    ("x", "'x' is not a number"), ("", "not a number"), ("1e3", "not a number"), ("nan", "not a number"),
    (float("nan"), "nan is not a finite"), (float("inf"), "inf is not"), (json.loads("1e400"), "inf is not"),
    (10**400, "more than 40 characters"), (10**4000, "more than 40"), (1e300, "more than 40"),
    (1e-300, "more than")])
def test_values_of_files_that_are_no_numbers_are_refused_with_the_reason(value, why):
    for read in (number_in_file, whole_in_file):
        with pytest.raises(ValueError, match=why) as error:
            read(value)
        assert len(str(error.value)) < 100


@pytest.mark.parametrize("value", [3.5, "3.5", 1e-7, "-0.1"])
def test_a_number_that_must_be_whole(value):
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_in_file(value)


def test_problems_whose_numbers_are_text_or_decimal_are_the_same_problems():
    expected = CountdownProblem((3, 7, 9), 13)
    for target in (13, 13.0, "13", "13.0"):
        assert Countdown.problem_from_record({"numbers": ["3", 7, 9.0], "target": target}) == expected
    for answer in (72, 72.0, "72", "#### 72", "so\n#### 72.00", "$72"):
        problem = GSM8K.problem_from_record({"answer": answer})
        assert GSM8K.grade(problem, "#### 72").accuracy == 1.0
