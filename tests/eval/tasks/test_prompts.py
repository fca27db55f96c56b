"""The forms in which problems are put to real models, byte for byte, and how responses to them are read."""
import json
import time

import pytest

from r1zero.eval.response import Sample, grade_response, judged_text
from r1zero.eval.tasks.arithmetic import Arithmetic, ArithmeticProblem
from r1zero.eval.tasks.catalogue import make_task
from r1zero.eval.tasks.countdown import TOY_OR_WORDS, Countdown, CountdownProblem
from r1zero.eval.tasks.final_answer import final_answer
from r1zero.eval.tasks.game24 import Game24
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem
from r1zero.eval.tasks.prompts import TEMPLATES

from ...model.chat_cases import DATA

QUESTION = "How many eggs?"
# Table 1 of arXiv 2501.12948, with the question in its place.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: "
    "How many eggs? Assistant:")
ENDINGS = {
    "zero_shot": "Question: How many eggs?\nThink step by step, then end with a line `#### n`, "
                 "where n is the answer as a number.\nAnswer:",
    "r1_zero": R1_ZERO, "r1_zero_think": R1_ZERO + " <think>",
    "few_shot": "\n\nQuestion: How many eggs?\nAnswer:", "eight_shot": "\n\nQ: How many eggs?\nA:",
    "chat": "How many eggs?\nThink step by step, then put the answer, a number, into \\boxed{}.",
    "plain": "How many eggs?"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompts_of_gsm8k_are_these_to_the_byte(template):
    prompt = GSM8K.prompt(GSM8KProblem(QUESTION, "18", template))
    assert prompt.endswith(ENDINGS[template])
    if not template.endswith("_shot") or template == "zero_shot":
        assert prompt == ENDINGS[template]


def test_the_eight_worked_problems_are_right_by_the_grader_that_reads_them():
    prompt = GSM8K.prompt(GSM8KProblem(QUESTION, "18", "eight_shot"))
    assert prompt.count("Q: ") == 9 and prompt.count("The answer is ") == 8
    golds = [23, 19, 27, 14, 34, 18, 11, 8]
    for piece, gold in zip(prompt.split("Q: ")[1:9], golds, strict=True):
        question, _, answer = piece.strip().partition("\nA:")
        assert GSM8K.grade(GSM8KProblem(question, str(gold), "eight_shot"), answer).accuracy == 1.0


# ---- the answer of a response ----

CHAT_ANSWERS = [
    ("so \\boxed{18}", "18"), ("The answer is 18.", "18"), ("#### 18", "18"), ("18", None),
    ("\\boxed{17} no, \\boxed{18}.", "18"), ("The final answer is: $\\boxed{18}$", "18"),
    ("\\boxed{\\$1{,}018}", "1,018"), ("\\boxed{18\\text{ eggs}}", "18"), ("\\boxed{15\\%}", "15"),
    ("The answer is **$18.50**.", "18.5"), ("the answer is: $18$.", "18"), ("\\boxed{ 1 8}", None),
    ("<answer>18</answer> \\boxed{17}", "18"), ("<answer>\\boxed{18}</answer>", "18"), ("\\boxed 18", None),
    ("\\boxed{\\boxed{18}}", "18"), ("\\boxed{18} {x} and \\boxed{17", "18"), ("\\boxed{}", None),
    ("\\boxed{18 or 19}", None), ("The answer is 18 or 19.", None), ("The answer is \n18", None),
    ("#### 17\n\\boxed{18}", "18"), ("The answer is 17. \\boxed{18}", "18"),
    ("\\boxed{\\text{not }18}", None), ("\\boxed{18\\text{ is wrong}}", None), ("\\boxed{1\\text{}8}", None),
    ("\\boxed{18 \\text{ or nineteen}}", None), ("\\boxed{1\\ 8}", None), ("\\boxed{1\\,8}", None),
    ("\\boxed{18 \\text{ or 19}}", None), ("\\boxed{1\\,018}", "1018"), ("\\boxed{18\\,}", "18"),
    ("\\boxed{18 dollars}", "18"), ("\\boxed{\\text{18}}", "18"), ("\\boxed{\\$18 \\text{ per day}}", "18")]
SENTENCES = [
    ("The answer is 17. Wait, that is wrong. The answer is 18.", "18"), ("The answer is 18.The answer is 17",
    "17"),
    ("The answer is not 17. The answer is 18.", "18"), ("The answer is 17, no, the answer is 18.", "18"),
    ("The answer is 18. The answer is not 18.", None), ("The answer is 18 or the answer is 17", "17"),
    ("The answer is \\boxed{18}.", "18"), ("The answer is $\\boxed{18}$", "18"), ("The answer is 18 eggs.",
    "18"),
    ("The answer is $18 per day.", "18"), ("The answer is 18 \\text{ eggs}.", "18"),
    ("The answer is 18 dollars", "18"),
    ("The answer is \\boxed{18} or \\boxed{17}.", None), ("The answer is 18 or nineteen.", None),
    ("The answer is 18 eggs, not 17.", None), ("The answer is 18 is wrong", None),
    ("The answer is 18\nThe answer is", "18"),
    ("The answer is 18 17.", None), ("The answer is 18 e3", None)]
ANSWERS = [
    *[("chat", response, gold) for response, gold in CHAT_ANSWERS],
    *[("eight_shot", response, gold) for response, gold in SENTENCES],
    ("eight_shot", " 9 * 2 = 18. The answer is 18.", "18"), ("eight_shot", "\\boxed{18}", None),
    ("eight_shot", "The answer is 18.\n\nQ: x\nA: The answer is 3.", "18"),
    ("eight_shot", "The answer is 1,018", "1018"), ("eight_shot", "The answer is -3.", "-3"),
    ("zero_shot", "\\boxed{18}", None), ("zero_shot", "The answer is 18.", None),
    ("r1_zero", "\\boxed{18}", None), ("plain", "The answer is 18.", None),
    ("r1_zero", "<think>a</think> <answer> 18 </answer>", "18")]


@pytest.mark.parametrize("template, response, gold", ANSWERS)
def test_each_form_reads_the_answer_that_it_asked_for_and_no_other(template, response, gold):
    for wanted, right in ((gold or "18", gold is not None), ("77", False)):
        grade = GSM8K.grade(GSM8KProblem(QUESTION, wanted, template), response)
        assert grade.accuracy == float(right), grade


@pytest.mark.parametrize("piece", ["\\boxed{", "\\boxed{1}", "{", "}", "The answer is ", "The answer is 1.",
                                   "$", "*", "\\boxed", "\\text{", "####"])
def test_a_megabyte_of_marks_takes_little_time(piece):
    text = piece * (10**6 // len(piece))
    started = time.process_time()
    for marks in (("boxed", "hashes", "sentence"), ("sentence",)):
        final_answer(text, marks)
    assert time.process_time() - started < 2


# ---- thinking that the prompt begins ----


def test_a_response_behind_a_prefilled_think_is_judged_as_if_it_had_written_it():
    cases = {"a</think> <answer>18</answer>": (1.0, 1.0), "a <answer>18</answer>": (1.0, 0.0),
             "<think>a</think> <answer>18</answer>": (1.0, 0.0), "</think><answer>17</answer>": (0.0, 1.0)}
    for text, expected in cases.items():
        sample = Sample(GSM8KProblem(QUESTION, "18", "r1_zero_think"), text)
        graded = grade_response(GSM8K, sample)
        assert (graded.accuracy, graded.format) == expected and judged_text(GSM8K, sample) == f"<think>{text}"
    plain = Sample(GSM8KProblem(QUESTION, "18", "r1_zero"), "a</think> <answer>18</answer>")
    assert grade_response(GSM8K, plain).format == 0.0 and judged_text(GSM8K, plain) == plain.text


def test_every_task_with_the_template_judges_the_prefilled_think(tmp_path):
    text = "9-3=6</think> <answer>{}</answer>"
    problems = [(Countdown, CountdownProblem((3, 7, 9), 13, "r1_zero_think"), "(9-3)+7"),
                (Arithmetic, ArithmeticProblem("6+7", 13, "r1_zero_think"), "13"),
                (Game24, CountdownProblem((1, 1, 4, 6), 24, "r1_zero_think"), "4*6*1*1")]
    for task, problem, answer in problems:
        assert task.prompt(problem).endswith(" Assistant: <think>")
        graded = grade_response(task, Sample(problem, text.format(answer)))
        assert (graded.accuracy, graded.format) == (1.0, 1.0)
    equation = Sample(problems[0][1], "9-3=6,6+7=13</think>")
    assert Countdown.coherence(equation.problem, judged_text(Countdown, equation)) == 1.0


def test_a_line_of_an_evaluation_is_graded_in_the_form_that_it_was_asked_in():
    record = {"numbers": [3, 7, 9], "target": 13, "template": "r1_zero_think"}
    problem = Countdown.problem_from_record(json.loads(json.dumps(record)))
    assert problem == CountdownProblem((3, 7, 9), 13, "r1_zero_think")
    assert Arithmetic.problem_from_record({"expression": "6+7", "template": "chat"}).template == "chat"
    puzzle = {"numbers": [1, 1, 4, 6]}
    for task, more in ((Countdown, record), (Arithmetic, {"expression": "1+1"}), (Game24, puzzle)):
        with pytest.raises(ValueError, match="template is 'few'"):
            task.problem_from_record({**more, "template": "few"})


# ---- Countdown and arithmetic in words ----


@pytest.mark.parametrize("template", TOY_OR_WORDS[1:])
def test_countdown_and_arithmetic_are_asked_in_words_and_graded_as_ever(template):
    task = Countdown(template=template)
    problem = task.problem("train", 3)
    toy = Countdown().problem("train", 3)
    assert (problem.numbers, problem.target, problem.key) == (toy.numbers, toy.target, toy.key)
    a, b, c = problem.numbers
    wording = (f"Write an arithmetic expression that equals {problem.target}. Use each of the numbers {a}, "
               f"{b} and {c} exactly once, with + - * / and brackets.")
    assert wording in task.prompt(problem) and "<answer>" in task.prompt(problem)
    problem = CountdownProblem((3, 7, 9), 13, template)
    for answer, right in (("(9 - 3) + 7", 1.0), ("7 + 9 - 3 = 13", 1.0), ("9 + 7 + 3", 0.0), ("13", 0.0)):
        for text in (f"I think. <answer> {answer} </answer>", f"<think>x</think>\n<answer>{answer}</answer>"):
            assert Countdown.grade(problem, text).accuracy == right
    sum_ = Arithmetic(template=template).problem("test", 0)
    assert sum_.expression == Arithmetic().problem("test", 0).expression
    assert "What is 12 - 3 * 4?" in Arithmetic.prompt(ArithmeticProblem("12-3*4", 0, template))
    assert Arithmetic.grade(sum_, f"So <answer>{sum_.answer}</answer>").accuracy == 1.0
    assert Arithmetic.grade(sum_, f"So <answer>{sum_.answer + 1}</answer>").accuracy == 0.0
    for marked in (f"So \\boxed{{{sum_.answer}}}", f"#### {sum_.answer}"):
        assert Arithmetic.grade(sum_, marked).accuracy == float(template == "chat")


def test_a_chat_about_a_sum_that_gives_no_answer_is_told_of_every_mark_that_counts():
    whys = [Arithmetic.grade(ArithmeticProblem("6+7", 13, form), "13").why for form in ("plain", "chat")]
    assert whys[0] == "There is no complete <answer>...</answer> block."
    assert whys[1].startswith("There is neither a complete answer block nor a \\boxed{} nor a number after")


def test_a_problem_in_words_is_judged_by_its_own_answer_where_the_model_runs_on():
    problem = CountdownProblem((3, 7, 9), 13, "zero_shot")
    behind = "\nQuestion: Write an arithmetic expression.\nAnswer: <answer>1</answer>"
    assert Countdown.grade(problem, f" <answer>9-3+7</answer>{behind}").accuracy == 1.0
    assert Countdown.grade(problem, behind.replace("1<", "9-3+7<")).accuracy == 0.0
    framed = CountdownProblem((3, 7, 9), 13, "r1_zero")
    runs_on = "<answer>9-3+7</answer> User: x Assistant: <answer>1</answer>"
    assert Countdown.grade(framed, runs_on).accuracy == 1.0


def test_two_numbers_make_the_easiest_countdown_and_forms_are_checked():
    task = make_task("countdown", n_numbers=2, template="chat", ops="+")
    problem = task.problem("test", 0)
    assert len(problem.numbers) == 2 and sum(problem.numbers) == problem.target
    for name in ("countdown", "arithmetic"):
        with pytest.raises(ValueError, match="template is 'eight_shot'; it must be one of: plain, zero_shot"):
            make_task(name, template="eight_shot")


# ---- the Game of 24 ----


def test_the_game_of_24_reads_csv_and_splits_by_its_numbers(tmp_path):
    path = tmp_path / "24.csv"
    rows = [f"{n},{n} 1 {n % 9 + 1} 2,{n}%" for n in range(1, 101)]
    path.write_text("\n".join(["Rank,Puzzles,Solved", *rows]))
    task = make_task("game24", path=str(path), test_share=0.3, template="r1_zero")
    again = make_task("game24", path=str(path), test_share=0.3)
    assert task.held_out and task.size("train") + task.size("test") == 100 and task.size("test") > 10
    keys = [{task.question(p) for p in task.problems(split, task.size(split))} for split in ("train", "test")]
    assert not keys[0] & keys[1] and task.problem("test", 0).key == again.problem("test", 0).key
    assert again.prompt(again.problem("test", 0)).endswith(" -> 24")
    for text in ("1 1 4 6", "1 1 4 6 -> 24"):
        problem = Game24.problem_from_text(text)
        assert Game24.grade(problem, "<answer>6*4*1*1</answer>").accuracy == 1.0
        assert Game24.grade(problem, "<answer>6*4</answer>").accuracy == 0.0
    for bad, why in (("1 1 4 6 -> 25", "target is 25"), ("1 x", "expected number"), ("", "expected number")):
        with pytest.raises(ValueError, match=why):
            Game24.problem_from_text(bad)
    with pytest.raises(ValueError, match='"target" is 25'):
        Game24.problem_from_record({"numbers": [1], "target": 25})
    with pytest.raises(ValueError, match="--task game24 needs --data FILE"):
        make_task("game24")
    path.write_text("Puzzles\n1 1 4 6\n1 1 4\n1 1 4 x\n")
    with pytest.raises(ValueError, match="line 4"):
        make_task("game24", path=str(path))
    assert make_task("game24", path=str(path), skip_bad=True).lines_skipped == 1


@pytest.mark.skipif(not (DATA / "game24.csv").exists(), reason="game24.csv (R1ZERO_DATA) is not here")
def test_the_real_puzzles_are_read_whole():
    task = make_task("game24", path=str(DATA / "game24.csv"), template="chat")
    assert task.size("test") == 1362 and task.problem("test", 0).numbers == (1, 1, 4, 6)
