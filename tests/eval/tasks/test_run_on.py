"""A base model that runs on into the next question of its prompt's form is judged by its own answer."""
import random
import time

import pytest

from r1zero.eval.response import parse_response
from r1zero.eval.tasks.arithmetic import Arithmetic, ArithmeticProblem
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem
from r1zero.eval.tasks.prompts import TEMPLATES
from r1zero.train.recipes.demo_corpus import CorpusConfig, document

NEXT = "\n\nQuestion: Ann has 2 pens and buys 3. How many?\nAnswer: 2+3=5\n"
OWN_72 = [" Half of 48 is 24, and 48 more is 72.\n#### 72",
          "<think>\nQuestion: how many?\n</think><answer>72</answer>",
          "#### 71\nNo.\n#### 72", "<answer>72</answer>\n<answer>7"]


@pytest.mark.parametrize("own", OWN_72)
@pytest.mark.parametrize("behind", [
    "", f"{NEXT}#### 5", f"{NEXT}####", f"{NEXT}#### 5{NEXT}#### 6", f"{NEXT}<answer>5</answer>",
    f"{NEXT}<think>x</think><answer>5</answer>", "\nQuestion:", "\n####", "\n#### \n####"])
def test_gsm8k_is_judged_by_its_own_answer(own, behind):
    assert GSM8K.grade(GSM8KProblem("", "72"), own + behind).accuracy == 1.0
    assert GSM8K.grade(GSM8KProblem("", "5"), own + behind).accuracy == 0.0


@pytest.mark.parametrize("own", ["", " I do not know.", "<think>hm", "#### ", "<answer>"])
def test_gsm8k_without_an_answer_of_its_own_earns_nothing_for_the_next_one(own):
    for ending in ("#### 5", "<answer>5</answer>", "<think>a</think><answer>5</answer>"):
        grade = GSM8K.grade(GSM8KProblem("", "5"), own + NEXT + ending)
        assert (grade.accuracy, grade.answer) == (0.0, None)


SUMS = [("<answer>42</answer>", "\n3+4=<think>x</think><answer>7</answer>"),
        ("<think>17+25=42\n1+1=2</think><answer>42</answer>", "\n\n 3 + 4 = <answer>7</answer>"),
        ("<answer>41</answer>\nNo: <answer>42</answer>",
         "\n12*3-4=<answer>32</answer>\n1+1=<answer>2</answer>")]


@pytest.mark.parametrize("own, behind", SUMS)
def test_arithmetic_is_judged_by_its_own_answer(own, behind):
    for text in (own, own + behind):
        grade = Arithmetic.grade(ArithmeticProblem("17+25", 42), text)
        assert (grade.accuracy, grade.answer) == (1.0, "42")
    last = parse_response(own + behind).answer
    assert Arithmetic.grade(ArithmeticProblem("5+5", int(last)), own + behind).accuracy == 0.0


COUNTDOWN_BEHIND = ["\n3 4 -> 7\n<think>x</think><answer>3+4</answer>", "\n\n 3, 4 → 7<answer>3+4</answer>",
                    "\r\n9 7 3 -> −1\n<answer>9-7-3</answer>\n3 4 -> 7\n<answer>3+4</answer>"]


@pytest.mark.parametrize("behind", COUNTDOWN_BEHIND)
@pytest.mark.parametrize("own", [
    "<think>3 7 9 -> 13\n3 7 9 -> 13</think><answer>9-3+7</answer>", "<answer>9-3+7</answer>",
    "<answer>9+3+7</answer> no\n<answer>9-3+7</answer>"])
def test_countdown_is_judged_by_its_own_answer(own, behind):
    for text in (own, own + behind):
        grade = Countdown.grade(CountdownProblem((3, 7, 9), 13), text)
        assert (grade.accuracy, grade.answer) == (1.0, "9-3+7")
    assert not parse_response(own + behind).well_formed  # the form is of the whole response


def test_another_form_or_the_own_problem_said_again_is_no_question():
    for stray in ("\nSo 3 7 9 -> 13", "\n-> 13", "\n3 7 9", "\n3 x -> 4", " 3 7 9 -> 13", "\n=5", "\n5",
                  "\n3 7 9 -> 13", "\n9 7 3 -> 13", "\nWait:\n17+25=42 so ", "\n17+25=",
                  "\n40+2=42\n"):
        text = f"<answer>1</answer>{stray}<answer>9-3+7</answer>"
        assert Countdown.grade(CountdownProblem((3, 7, 9), 13), text).accuracy == 1.0
        text = f"<answer>1</answer>{stray}<answer>42</answer>"
        assert Arithmetic.grade(ArithmeticProblem("17+25", 42), text).accuracy == 1.0


def test_what_the_thoughts_hold_is_no_answer_and_no_question():
    text = "<think>maybe <answer>3+7</answer>\n3 7 -> 10 no</think><answer>(9-3)+7</answer>"
    assert Countdown.grade(CountdownProblem((3, 7, 9), 13), text).accuracy == 1.0
    text = "<think>maybe <answer>3</answer>\n1+2=<answer>3</answer></think><answer>42</answer>"
    assert Arithmetic.grade(ArithmeticProblem("17+25", 42), text).accuracy == 1.0


def test_the_problem_said_again_before_the_thoughts_leaves_them_thoughts():
    text = "\n3 7 9 -> 13\n<think>like\n1 2 -> 3\nso</think><answer>(9-3)+7</answer>"
    assert Countdown.grade(CountdownProblem((3, 7, 9), 13), text).accuracy == 1.0


RUNS_ON = [(Arithmetic, ArithmeticProblem("40+2", 42), "17+25=<answer>42</answer>"),
           (Countdown, CountdownProblem((3, 7, 9), 13), "4 9 -> 13\n<think>x</think><answer>9-3+7</answer>"),
           (GSM8K, GSM8KProblem("How many?", "42"), "Question: And now?\nAnswer: #### 42")]


@pytest.mark.parametrize("task, problem, behind", RUNS_ON)
def test_an_answer_to_the_next_question_alone_earns_nothing(task, problem, behind):
    for own in ("", "I do not know.", "<think>hm</think>", "<answer>"):
        grade = task.grade(problem, f"{own}\n{behind}")
        assert (grade.accuracy, grade.answer) == (0.0, None)
    assert task.grade(problem, f"<answer>0</answer>\n{behind}").accuracy == 0.0


def test_a_next_question_needs_no_line_break_behind_an_answer_block():
    for task, problem, behind in RUNS_ON[:2]:
        for gap in ("", " "):
            assert task.grade(problem, f"<answer>0</answer>{gap}{behind}").accuracy == 0.0


FRAME = TEMPLATES["r1_zero"].prompt("How many hens?")
RUNS_ON_IN_ITS_LINE = [
    ("r1_zero", "#### 18 User: How many hens? Assistant: <answer>5</answer>"),
    ("r1_zero", "#### 18\n\n" + FRAME + "<think>a</think> <answer>5</answer>"),
    ("r1_zero", "<answer>18</answer>\n\nA conversation between User and Assistant. User: <answer>5</answer>"),
    ("r1_zero", "<answer>18</answer> Then User: How many hens? Assistant: <answer>5</answer>"),
    ("r1_zero", "<think>The User: eggs. #### 1 User: <answer>1</answer> User: no</think><answer>18</answer>"),
    ("r1_zero", "The User: asks for eggs. <answer>18</answer>"),
    ("r1_zero", "<answer>1</answer> No. User: How many eggs? Assistant: <answer>18</answer>"),
    ("plain", "#### 18\n\nHow many cats?\n2+3=5\n#### 5"),
    ("plain", "####\n#### #### 18\n#### 5"),
    ("plain", "<think>#### 1\nno</think>\n#### 18\n<answer>5</answer>")]


@pytest.mark.parametrize("template, text", RUNS_ON_IN_ITS_LINE)
def test_a_next_question_needs_no_form_of_its_own_behind_an_answer(template, text):
    assert GSM8K.grade(GSM8KProblem("How many eggs?", "18", template), text).accuracy == 1.0


@pytest.mark.parametrize("piece", ["#", "####", "#### ", "#### a ", "</answer>", "</answer>User ", "</a <",
                                   "A conversation between User and Assistant ", "#### #### 1\n", "User:\n"])
def test_long_texts_of_marks_take_little_time(piece):
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    for template in ("r1_zero", "plain"):
        GSM8K.grade(GSM8KProblem("How many eggs?", "18", template), text)
    assert time.process_time() - started < 2


def test_the_question_said_again_is_the_own_one():
    problem = GSM8KProblem("How many eggs?\nAnd hens?", "18")
    text = "Restating.\nQuestion: How many eggs?\nAnd hens?\nAnswer: #### 18\nQuestion: And now?\n#### 5"
    assert GSM8K.grade(problem, text).accuracy == 1.0
    assert GSM8K.grade(GSM8KProblem("", "18"), text).accuracy == 0.0  # where the question is not known


@pytest.mark.parametrize("broken", [0.0, 1.0])
def test_the_demos_documents_are_graded_as_before_alone_and_run_together(broken):
    """Their answer is the last complete block, and stays it with the next documents behind a line break."""
    task, config, rng = Countdown(), CorpusConfig(broken_share=broken), random.Random(0)
    n_right = n_answered = 0
    for index in range(300):
        response = document(task, index, config, seed=1)[1]
        problem = task.problem("train", index)
        grade = task.grade(problem, response)
        assert grade.answer == parse_response(response).answer
        n_right += grade.accuracy
        if grade.answer is None:
            continue
        n_answered += 1
        if "</think>" not in response:  # then the thoughts seem to end in a document behind
            continue
        behind = ["".join(document(task, rng.randrange(10**4), config, seed=1)) for _ in range(3)]
        assert task.grade(problem, "\n".join([response, *behind])) == grade
    assert n_answered > 150 and 30 < n_right < n_answered
