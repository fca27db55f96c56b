"""Mathematics: where the answer stands, what is right, what is wrong, and what costs too much."""
import json
import os
import re
import time
from pathlib import Path

import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.eval.tasks import math_answer
from r1zero.eval.tasks.answer_words import is_unit
from r1zero.eval.tasks.catalogue import make_task
from r1zero.eval.tasks.math import BOX_ASKED, WORKER, Math, MathProblem, can_read, overran, worker
from r1zero.eval.worker import Overrun, Worker

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("R1ZERO_DATA", ROOT.parent / "shared" / "data"))
# Right answers of our own, of each kind that MATH-500 and AIME have.
GOLDS = [
    "7", "-12", "0", "025", "10,\\!080", "58,500", "\\$18.90", ".0000672", "3.5", "\\frac{14}{3}",
    "-\\frac{7}9",
    "\\frac43", "\\frac 59", "1\\frac{4}{5}", "120^\\circ", "15\\mbox{ cm}", "204_5", "2516_{8}",
    "3\\sqrt{13}",
    "\\frac{3\\sqrt{3}}{4}", "-\\frac{\\pi}{6}", "18+2\\pi", "6 - 5i", "2k+2", "x^3+3x-6", "(a+5)(b+2)",
    "x=5",
    "y = 2x + 3", "(3,4]", "(-\\infty, 2) \\cup (3, \\infty)", "\\left( 3, \\frac{\\pi}{2} \\right)",
    "(6,31,-1)",
    "1,-2", "3, 5, 7", "1 \\pm \\sqrt{19}", "\\{1\\pm\\sqrt{5},-2\\}", "\\text{Evelyn}", "\\text{(C)}",
    "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\cot x", "p - q"]


def graded(gold, text):
    grade = Math.grade(MathProblem("", gold), text)
    assert isinstance(grade.why, str) and "\n" not in grade.why
    return grade.accuracy


def ways(answer):
    """A response that gives the answer, in each place that one may stand."""
    return [f"So it is $\\boxed{{{answer}}}$.", f"<think>hm</think> <answer>{answer}</answer>",
            f"<answer> ${answer}$. </answer>", f"<answer>It is \\boxed{{ {answer} }} then.</answer>",
            f"\\boxed{{1234}} no: \\fbox{{{answer}}} and so on"]


@pytest.mark.parametrize("gold", GOLDS)
def test_a_right_answer_is_right_wherever_it_stands(gold):
    assert can_read(gold) and [graded(gold, text) for text in ways(gold)] == [1.0] * 5


@pytest.mark.parametrize("gold", GOLDS)
def test_a_right_answer_that_was_changed_is_wrong(gold):
    changed = []
    for match in re.finditer(r"\d", gold):
        changed.append(f"{gold[:match.start()]}{(int(match[0]) + 1) % 10}{gold[match.end():]}")
    for match in re.finditer("[-+]", gold):
        changed.append(f"{gold[:match.start()]}{'-' if match[0] == '+' else '+'}{gold[match.end():]}")
    if not re.search(r"[,=]|text|matrix|mbox", gold):
        changed += [f"{gold}+1"] + [f"-({gold})"] * (gold != "0")
    rewarded = [answer for answer in changed if graded(gold, f"\\boxed{{{answer}}}")]
    assert rewarded == []


@pytest.mark.parametrize("gold", ["7", "0", "3\\sqrt{13}", "(3,4]", "1,-2", "15\\mbox{ cm}",
    "\\text{Evelyn}"])
def test_an_answer_with_another_beside_it_is_wrong(gold):
    for pattern in ("{}, 7777", "7777, {}", "{} \\text{{ or }} 7777", "7777 or {}", "{} = 7777", "7777 = {}",
                    "{} \\approx 7777", "not {}", "{} \\text{{ or not}}", "{} 7777", "7777 {}",
                    "{} \\ne 7777",
                    "\\{{{}, 7777\\}}", "{}; 7777", "{}\n7777"):
        answer = pattern.format(gold)
        assert graded(gold, f"<answer>{answer}</answer>") == 0.0, answer
    assert graded(gold, f"<answer>\\boxed{{{gold}}} \\boxed{{7777}}</answer>") == 0.0


@pytest.mark.parametrize("gold", ["5", "3\\sqrt{13}", "(3,4]"])
def test_words_and_marks_beside_a_value_are_no_way_to_give_two_answers(gold):
    for beside in ("\\text{ or 6}", "\\text{, or 6, or 7}", "\\mathrm{or6}", "\\mbox{ or six}", "\\text{6}",
                   "\\text{ is wrong; the answer is 6}", "\\text{ apples and } 6 \\text{ pears}",
                   "\\textit{ or 6}",
                   "\\text{ is incorrect}", "\\text{ false }", "\\text{ never}", "\\text{ or maybe } x",
                   "_{7777}",
                   "\\text{ a {b} or 6}", "_6", " _{66}", "'", "^\\prime", "^{\\prime}", "\\quad\\text{6}",
                   "\\text{ if lucky, else x}", "\\text{\\textbf{6}}", "\\text{}6", "\\operatorname{or6}"):
        assert graded(gold, f"\\boxed{{{gold}{beside}}}") == 0.0, beside
    for before in ("x \\in ", "\\text{6 or }", "\\text{no }", "\\text{not }"):
        assert graded(gold, f"\\boxed{{{before}{gold}}}") == (before == "x \\in " and gold == "(3,4]"), before
    assert graded("x \\in 5", "\\boxed{x \\in 5}") == graded("x_1'", "\\boxed{x_1'}") == 1.0
    assert graded("\\pi", "\\boxed{\\pi'}") == 0.0 and graded("2x", "\\boxed{f'(x) = 2x}") == 1.0


@pytest.mark.parametrize("unit", ["cm", "square units", "dollars per hour", "m/s", "p.m.", "degrees", "th",
    "apples"])
def test_a_unit_may_stand_behind_a_value(unit):
    assert is_unit(unit) and is_unit(f" {unit} ") and graded("5", f"\\boxed{{5\\text{{ {unit}}}}}") == 1.0
    assert graded("3\\sqrt{13}", f"\\boxed{{3\\sqrt{{13}}\\,\\mathrm{{{unit}}}}}") == 1.0
    assert not is_unit(f"{unit} or six") and not is_unit(f"not {unit}") and not is_unit(f"{unit} 6")


@pytest.mark.parametrize("question, gold, answer, is_right", [
    ("What is $99^2 + 99 + 1$?", "9901", "99^2+99+1", 0), ("What is $99^2 + 99 + 1$?", "9901", "9901", 1),
    ("What is $\\dbinom{9}{8}$?", "9", "\\binom{9}{8}", 0),
    ("What is $\\dbinom{9}{8}$?", "9", "\\dbinom 98", 0), ("What is $\\binom{9}{8}$?", "9",
    "\\binom{9}{8}", 0),
    ("Simplify $\\frac{36}{48}$.", "\\frac{3}{4}", "\\frac{36}{48}", 0),
    ("Which is more, $\\frac{3}{4}$ or 1/2?", "\\frac{3}{4}", "\\dfrac34", 1),
    ("Which is less, 3/4 or 1/2?", "\\frac12", "1/2", 1), ("Which is it: (A) or (B)?", "\\text{(A)}",
    "(A)", 1),
    ("Who is older, Ann or Bob?", "\\text{Ann}", "Ann", 1), ("Is it $x = 5$ or $x = 6$?", "5", "x=5", 1),
    ("What is 0.\\overline{3}?", "\\frac13", "0.\\overline{3}", 0), ("Solve $(x-1)(x+1)=0$", "(x-1)(x+1)",
    "(x-1)(x + 1)", 1),
    ("Is $\\left( 0, 1 \\right)$ it?", "(0,1)", "\\left(0, 1\\right)", 1), ("Is it 11/2?", "0.5", "1/2", 1),
    ("Is it $90^\\circ$?", "90",
    "90^\\circ", 1)])
def test_an_expression_that_is_copied_from_the_question_is_no_answer(question, gold, answer, is_right):
    grade = Math.grade(MathProblem(question, gold), f"\\boxed{{{answer}}}")
    assert grade.accuracy == is_right and ("copied from the question" in grade.why) != bool(is_right)


@pytest.mark.parametrize("gold, same, other", [
    ("0.\\overline{3}", "\\frac13", "0.3"), ("-0.1\\overline{6}", "-\\frac{1}{6}", "\\frac16"),
    ("\\frac{7}{11}", "0.\\overline{63}", "0.\\overline{36}"), ("\\log_2 3", "\\log_{2} 3", "\\log_3 2"),
    ("6:00 \\text{ p.m.}", "6:00\\text{ p.m.}", "6:00\\text{ a.m.}"), ("BEE_{16}", "BEE", "BED"),
    ("1, 3, 5, \\ldots", "1,3,5,\\ldots", "1,3,5"), ("\\frac{\\text{1}}{2}", "0.5", "2")])
def test_right_answers_of_rarer_kinds_are_read(gold, same, other):
    gold = math_answer.unwrapped(gold)
    assert can_read(gold) and graded(gold, f"\\boxed{{{same}}}") == graded(gold, f"\\boxed{{{gold}}}") == 1.0
    assert graded(gold, f"\\boxed{{{other}}}") == 0.0


@pytest.mark.parametrize("gold, answer", [
    ("5", "5\\%"), ("5", "500\\%"), ("7:30", "\\frac{7}{30}"), ("10\\text{ cm}", "10\\text{ m}"),
    ("\\pi", "3.14159265358979"), ("(1,2)", "1,2"), ("1,2", "\\{1,2\\}")])
def test_what_is_chosen_to_be_right_as_math_verify_does(gold, answer):
    assert graded(gold, f"\\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("gold, answer", [
    ("25", "025"), ("025", "25"), ("\\frac12", "0.5"), ("\\frac12", "1/2"), ("\\frac12", "50\\%"), ("10",
    "10\\%"),
    ("1\\frac45", "1.8"), ("-\\frac12", "\\frac{-1}{2}"), ("10{,}080", "10 080"), ("10080", "10\\,080"),
    ("15\\mbox{ cm}^2", "15\\text{ cm}^{2}"), ("15", "15~\\mathrm{cm}"), ("90", "90^{\\circ}"), ("\\$36",
    "36 \\text{ dollars}"), ("36", "$36"),
    ("52_8", "52"), ("-5", "\u22125"), ("5", "2+3 = 5"), ("5", "x = 5"), ("x=5", "5"), ("x \\in [-2,7]",
    "[-2,7]"),
    ("1,2", "2 \\text{ and } 1"), ("1,2", "x=1 \\text{ or } x=2"), ("2k+2", "2(k+1)"), ("\\sqrt{8}",
    "2\\sqrt2"),
    ("\\text{(B)}", "B"), ("\\text{Evelyn}", "Evelyn"), ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("3\\sqrt{13}", "3\\sqrt{13} \\approx 10.817"), ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
    ("5", "{5}")])
def test_another_way_to_write_it_is_right(gold, answer):
    assert graded(gold, f"\\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("gold, answer", [
    ("\\frac13", "0.333333"), ("2", "2.0000000001"), ("\\pi", "3.14159"), (".0000672", ".0000673"),
    ("52_8", "52_9"), ("10", "1010_2"), ("(3,4]", "(3,4)"), ("(3,4)", "(4,3)"), ("5", "\\pm 5"),
    ("15\\mbox{ cm}^2", "15\\text{ cm}^{3}"), ("(2,\\infty)", "(2,\\infty]"), ("(-\\infty, 2]",
    "\\left[ -\\infty, 2\\right]"),
    ("12", "1 2"), ("12", "1\\ 2"), ("12", "1\\,2"), ("18", "1\\text{}8"), ("1200", "1, 200"), ("5",
    "7 = 5"), ("5", "7 = 2+3"), ("5", "5 \\approx 6"), ("5", "3, 5"),
    ("3", "The answer is 3"),
    ("3", "$2$ or $3$"), ("5", ""), ("5", "\\boxed{}"), ("5", "\\frac{5}{0}"), ("0", "\\text{not } 0")])
def test_what_is_not_the_right_answer_is_wrong(gold, answer):
    assert graded(gold, f"\\boxed{{{answer}}}") == graded(gold, f"<answer>{answer}</answer>") == 0.0


@pytest.mark.parametrize("answer", ["5}{", "5}", "{5", "\\{5}", "5\\}{", "5}\\\\{"])
def test_braces_without_partners_are_not_mended(answer):
    assert "without its partner" in Math.grade(MathProblem("", "5"), f"<answer>{answer}</answer>").why


def test_a_right_answer_may_say_what_is_not():
    assert graded("x \\ne 2", "\\boxed{x \\neq 2}") == 1.0 and graded("x \\ne 2", "\\boxed{x \\ne 3}") == 0.0
    assert graded("2", "\\boxed{x \\ne 2}") == 0.0 and can_read("x \\ne 2")


@pytest.mark.parametrize("text, answer", [
    ("<answer>7</answer> \\boxed{8}", "7"), ("\\boxed{8} <answer>7", "8"),
    ("<answer>\\boxed{7}. Yes</answer>", "7"),
    ("\\boxed{\\frac{1}{2}} and \\boxed{3", "\\frac{1}{2}"), ("\\boxed{1 and \\boxed{2}", "2"),
    ("<answer>\\boxed{x=\\boxed{7}}</answer>", "x=\\boxed{7}"),
    ("\\boxed{\\boxed{7}}", "7"), ("\\boxed {7}", "7"), ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("{ \\boxed{7}", "7"),
    ("<answer>\\boxed{1} or \\boxed{2}</answer>", "1, 2"), ("<answer>\\boxed{1} = \\boxed{1}</answer>", "1"),
    ("<answer>\\(7\\)</answer>", "7"),  ("<answer>\\[ 7. \\]</answer>",
    "7"), ("<answer>$$7$$</answer>", "7"),
    ("the answer is 7", None), ("\\boxed 7", None), ("\\boxed{7", None), ("", None)])
def test_where_the_answer_stands(text, answer):
    assert math_answer.given(text) == answer


@pytest.mark.parametrize("text", [
    "[" * 10**6, "\\boxed{" * 150_000, "\\boxed{" + "{" * 10**6, "\\boxed{" + "(" * 10**6 + "}", "}" * 10**6,
    "<answer>" + "(" * 10**6 + "</answer>", "\\boxed{" * 70_000 + "}" * 70_000, "$" * 10**6,
    "<answer>" + "$" * 10**6 + "</answer>", "\\boxed{1}" * 100_000,
    "<answer>" + "\\boxed{1}" * 100_000 + "</answer>",
    "<answer>" + "".join(f"\\boxed{{{i}}}" for i in range(80_000)) + "</answer>",
    "\\boxed{5}" + "\\" * 10**6])
def test_a_megabyte_takes_no_time(text):
    for gold in ("\\sqrt{2}", "1"):
        start = time.process_time()
        graded(gold, text)
        assert time.process_time() - start < 2


@pytest.mark.parametrize("answer", ["10^{10^{10}}", "1000000000!", "\\sum_{n=1}^{1000000000}\\frac{1}{n^3}"])
def test_an_answer_that_would_take_for_ever_is_ended(answer):
    hasty = Worker(WORKER, seconds=0.3)
    with pytest.raises(Overrun, match="0.3 seconds of processor time"):
        hasty.ask("is_right", "\\sqrt{2}", answer)
    hasty.close()


def test_an_answer_that_was_ended_is_wrong_and_the_next_is_graded(monkeypatch):
    worker().close()  # the next one has less time
    monkeypatch.setattr(worker(), "seconds", 0.3)
    grade = Math.grade(MathProblem("", "\\sqrt{2}"), "\\boxed{10^{10^{10}}}")
    assert grade.accuracy == 0.0 and "was not compared: it took more than" in grade.why
    assert graded("\\sqrt{8}", "\\boxed{\\sqrt{4} \\cdot \\sqrt{2}}") == 1.0


def test_a_vote_does_not_try_again_what_took_too_much(monkeypatch):
    worker().close()
    monkeypatch.setattr(worker(), "seconds", 0.3)
    costly = [f"10^{{10^{{10+{i}i}}}}" for i in range(2)]
    for answer in costly:
        assert graded("\\sqrt{3}", f"\\boxed{{{answer}}}") == 0.0 and answer in overran
    monkeypatch.setattr(worker(), "ask", None)  # it would raise
    assert not Math.same_answer(*costly) and not Math.same_answer("\\sqrt{3}", costly[0])
    assert Math.same_answer(costly[0], costly[0]) and "\\sqrt{3}" not in overran


@pytest.mark.parametrize("answer", [
    "\0", "\ud800", "\\", "{", "}", "\\frac", "\\frac{1}", "^", "_", "&", "\\\\", "x" * 400, "(" * 12,
    "1" * 400, "\\left(",
    "\\begin{pmatrix}", "\\text{", "%", "\\infty", "\\emptyset", "NaN", "nan", "True", "__import__('os')",
    "1e400", "\u0661",
    "'", '"', "#", "\\sqrt", "\\int", "\\sum", "x=", "=", ",", ";", "\\boxed", "\n", "\u2028", "a,b;c|d",
    "\\in", "<answer>"])
def test_no_text_raises_or_is_rewarded(answer):
    for gold in ("\\sqrt{2}", "\\text{Evelyn}"):
        for text in (f"\\boxed{{{answer}}}", f"<answer>{answer}</answer>"):
            assert graded(gold, text) == 0.0


def test_what_a_base_model_runs_on_into_is_not_read():
    for template, text in (
        ("boxed", f"So \\boxed{{7}}.\n\nWhat is 4 + 4?\n{BOX_ASKED}\n\\boxed{{8}}"),
        ("boxed", "So \\boxed{7}.\n\nQuestion: What is 4 + 4?\n\\boxed{8}"),
        ("r1_zero", "<think></think><answer>7</answer>\nUser: What is 4 + 4? Assistant: <answer>8</answer>"),
        ("plain", "<think></think><answer>7</answer> and <answer>8</answer>"),
    ):
        assert Math.grade(MathProblem("What is 3 + 4?", "7", template), text).accuracy == 1.0
        assert Math.grade(MathProblem("What is 3 + 4?", "8", template), text).accuracy == 0.0


# ---- files ----


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("row, gold", [
    ({"problem": "?", "answer": "\\frac{1}{2}", "solution": "\\boxed{3}"}, "\\frac{1}{2}"),  # MATH-500
    ({"problem": "?", "solution": "\\boxed{3}, no, $\\boxed{\\frac{1}{2}}$.", "level": "Level 5"},
    "\\frac{1}{2}"),
    ({"id": 60, "problem": "?", "question": "?", "answer": "025"}, "025"),  # AIME 2024
    ({"problem_idx": 1, "problem": "?", "answer": 70}, "70"), ({"Problem": "?", "Answer": 204},
    "204"),  # AIME 2025
    ({"question": "?", "answer": "$\\boxed{17}$."}, "17"), ({"prompt": "?", "expected_answer": 2.5}, "2.5")])
def test_the_usual_fields_of_a_line_are_read(tmp_path, row, gold):
    task = make_task("math", path=write(tmp_path / "a.jsonl", [row]))
    problem = task.problem("test", 0)
    assert problem == MathProblem("?", gold) and task.prompt(problem) == f"?\n{BOX_ASKED}"
    assert task.grade(problem, f"<answer>{gold}</answer>").accuracy == 1.0
    written = {"problem": {"question": "?", "gold": gold, "template": "boxed"}}  # as an evaluation writes it
    assert Math.problem_from_record(written["problem"]) == problem


@pytest.mark.parametrize("row, why", [
    ({"problem": "?", "answer": "\\frac{"}, "'\\\\\\\\frac{' cannot be read as mathematics"),
    ({"problem": "?", "answer": ""}, "cannot be read"),
    ({"problem": "?", "answer": "$2$ or so $3$"}, "cannot be read"),
    ({"problem": "?"}, '"answer" is missing'),
    ({"problem": "?", "solution": "it is 3"}, '"solution" has no'), ({"answer": "3"}, 'no text "problem"'),
    ({"problem": " ", "answer": "3"}, 'no text "problem"'), ({"problem": "?", "answer": True},
    "'True' is not a number"),
    ({"problem": "?", "answer": ["3"]}, "is not a number"), ({"problem": "?", "answer": None}, "is missing")])
def test_a_line_whose_answer_rewards_nothing_is_refused(tmp_path, row, why):
    path = write(tmp_path / "a.jsonl", [{"problem": "1?", "answer": 1}, row])
    with pytest.raises(ValueError, match=f"line 2: .*{why}"):
        make_task("math", path=path)
    task = make_task("math", path=path, skip_bad=True)
    assert task.size("test") == task.lines_skipped == 1


def test_votes_are_by_value_and_frame_and_answer_are_two_things():
    assert Math.same_answer("\\frac12", "0.5") and Math.same_answer("\\sqrt8", "2\\sqrt2")
    assert not Math.same_answer("1", "2") and not Math.same_answer("((", "1") and Math.same_answer("((", "((")
    grade = grade_response(Math, Sample(MathProblem("", "5"), "\\boxed{5}"))
    assert (grade.accuracy, grade.format, grade.answer) == (1.0, 0.0, "5")
    with pytest.raises(ValueError, match="'few_shot'; it must be one of: boxed, r1_zero, r1_zero_think"):
        make_task("math", path="a.jsonl", template="few_shot")


@pytest.mark.skipif(not (DATA / "math500.jsonl").exists(), reason="needs the files of MATH-500 and AIME 2024")
def test_real_right_answers_are_right():
    """All of AIME 2024, and each 25th of MATH-500."""
    lines = (DATA / "math500.jsonl").read_text(encoding="utf-8").splitlines()[::25]
    problems = [Math.problem_from_record(json.loads(line)) for line in lines]
    aime = make_task("math", path=str(DATA / "aime24.jsonl"))
    assert aime.size("test") == 30
    for problem in [*problems, *aime.problems("test", 30)]:
        assert [graded(problem.gold, text) for text in ways(problem.gold)] == [1.0] * 5
