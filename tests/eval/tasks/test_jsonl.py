"""A task out of a JSONL file: the graders, the splits, the templates, and what is said of bad files."""

import json
import pickle

import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.eval.tasks.catalogue import make_task
from r1zero.eval.tasks.gsm8k import GSM8K, GSM8KProblem
from r1zero.eval.tasks.jsonl import JSONL, JSONLProblem
from r1zero.eval.tasks.prompts import TEMPLATES

ROWS = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(40)]
NEXT = {
    "r1_zero": ["\nUser: 2+2= Assistant: ", " User: 2+2="],
    "r1_zero_think": ["\nUser: 2+2= Assistant: ", " User: 2+2="],
    "eight_shot": ["\n\nQ: 2+2=\nA:"],
    "chat": [],
    "few_shot": ["\n\nQuestion: 2+2=\nAnswer:", "Question: x"],
    "plain": ["\n2+2=", " Or:", ""],
    "zero_shot": ["\n\nQuestion: 2+2=\nAnswer:"],
}


def write(path, rows) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return str(path)


def accuracy(answer: str, said: str, grader: str) -> float:
    return JSONL.grade(
        JSONLProblem("?", answer, grader), f"<think>hm</think> <answer>{said}</answer>"
    ).accuracy


@pytest.mark.parametrize(
    "grader, answer, right, wrong",
    [
        ("exact", "Paris", ["Paris", " Paris\r\n"], ["paris", "Paris.", "", "\xa0Paris", "Par is"]),
        ("exact", "a\nb", ["\na\nb\n"], ["a b"]),
        ("exact", "42", ["42"], ["42.0", "٤٢", "042"]),
        (
            "number",
            "1,234",
            ["1234", "1,234.00", "$1,234.", " 1234 "],
            ["1235", "1,23,4", "1234 eggs", "١٢٣٤", "1e3"],
        ),
        ("number", "-7", ["−7", "-7.0"], ["7", "- 7", "–7"]),
        ("regex", "[Yy]es|no+", ["Yes", " nooo "], ["yess", "Yes no", "", "n"]),
        ("regex", "(a*)*b", ["aab"], ["a" * 400 + "c", "a" * 100_000]),
    ],
)
def test_each_grader_says_what_is_right(grader, answer, right, wrong):
    assert [accuracy(answer, said, grader) for said in right] == [1.0] * len(right)
    assert [accuracy(answer, said, grader) for said in wrong] == [0.0] * len(wrong)
    for said in ("", "<answer>", answer):  # no block, no answer
        assert JSONL.grade(JSONLProblem("?", answer, grader), said).answer is None


def test_options_and_lines_choose_the_grader_and_numbers_may_be_answers(tmp_path):
    rows = [
        {"prompt": "a", "answer": 72},
        {"prompt": "b", "answer": "1/2", "grader": "exact"},
        {"prompt": "c", "answer": " 0.5 ", "template": "of another tool"},
    ]
    task = JSONL(write(tmp_path / "f.jsonl", rows), grader="number", test_share=0.0)
    assert task.problems("test", 3) == [
        JSONLProblem("a", "72", "number"),
        JSONLProblem("b", "1/2"),
        JSONLProblem("c", "0.5", "number"),
    ]
    assert pickle.loads(pickle.dumps(task)).problems("train", 9) == task.problems("train", 9)
    for problem in task.problems("test", 3):  # as the file of `r1zero eval` has it
        assert JSONL.problem_from_record(vars(problem)) == problem


@pytest.mark.parametrize(
    "row, why",
    [
        ({"question": "a", "answer": 1}, '"prompt" is missing'),
        ({"prompt": "a"}, '"answer" is missing'),
        ({"prompt": 3, "answer": 1}, "\"prompt\" is '3', expected text"),
        ({"prompt": " ", "answer": 1}, '"prompt" is empty'),
        ({"prompt": "a", "answer": " \n"}, '"answer" is empty'),
        ({"prompt": "a", "answer": True}, "text or a number"),
        ({"prompt": "a", "answer": ["1"]}, "text or a number"),
        ({"prompt": "a", "answer": "\ud800"}, "not Unicode"),
        ({"prompt": "a", "answer": "1</answer>"}, "holds </answer>"),
        ({"prompt": "a", "answer": "<answer>1"}, "holds <answer>"),
        ({"prompt": "a", "answer": "many", "grader": "number"}, "expected a number"),
        ({"prompt": "a", "answer": "٤٢", "grader": "number"}, "expected a number"),
        ({"prompt": "a", "answer": "(a", "grader": "regex"}, "no pattern that is taken: missing"),
        (
            {"prompt": "a", "answer": "a", "grader": "fuzzy"},
            "grader is 'fuzzy'; it must be one of: exact, number, regex",
        ),
        ({"prompt": "a", "answer": float("nan")}, "not a finite number"),
        ("[1]", "a JSON list"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_are_told_by_number_and_can_be_skipped(tmp_path, row, why):
    path = write(tmp_path / "f.jsonl", [ROWS[0], row, *ROWS[1:]])
    with pytest.raises(ValueError, match="line 2: ") as error:
        JSONL(path)
    assert why in str(error.value) and "\n" not in str(error.value) and "--skip-bad" in str(error.value)
    assert JSONL(path, skip_bad=True).lines_skipped == 1


def test_the_option_makes_a_text_answer_bad_in_each_line(tmp_path):
    path = write(
        tmp_path / "f.jsonl", [{"prompt": "a", "answer": text} for text in ("1", "two", "$3", "four")]
    )
    with pytest.raises(ValueError, match=r"line 2: .*'two'.*; line 4: .*'four'"):
        JSONL(path, grader="number")


# ---- the splits ----


def test_a_share_is_held_out_by_the_prompt_alone(tmp_path):
    task = JSONL(write(tmp_path / "f.jsonl", ROWS))
    n_train, n_test = task.size("train"), task.size("test")
    train, test = task.problems("train", n_train), task.problems("test", n_test)
    assert n_train + n_test == 40 and 2 <= n_test <= 16 and task.held_out
    assert sorted(int(p.answer) for p in train + test) == list(range(1, 41))
    # A file that grows, and says a prompt again with other white space, keeps what it held out.
    more = (
        [{"prompt": f"  {row['prompt']} ", "answer": "?"} for row in ROWS]
        + [{"prompt": "new", "answer": 1}]
        + ROWS
    )
    grown = JSONL(write(tmp_path / "g.jsonl", more))
    held_out = {p.prompt.strip() for p in grown.problems("test", grown.size("test"))} - {"new"}
    assert held_out == {p.prompt for p in test} and grown.size("test") in (2 * n_test, 2 * n_test + 1)


def test_training_problems_never_end_and_each_epoch_has_all_of_them_in_another_order(tmp_path):
    path = write(tmp_path / "f.jsonl", ROWS)
    task = JSONL(path, test_share=0.0)
    first, second = task.problems("train", 40), task.problems("train", 40, start=40)
    assert sorted(map(repr, first)) == sorted(map(repr, second)) and first != second
    assert JSONL(path, test_share=0.0, seed=1).problems("train", 40) != first
    assert [p.prompt for p in task.problems("test", 40)] == [
        row["prompt"] for row in ROWS
    ] and not task.held_out
    with pytest.raises(ValueError, match="test problem 40 asked for, but there are 40"):
        task.problem("test", 40)


def test_a_second_file_is_the_test_set_and_its_prompts_are_not_trained_on(tmp_path, capsys):
    train, test = write(tmp_path / "train.jsonl", ROWS), write(tmp_path / "test.jsonl", ROWS[30:])
    with pytest.raises(ValueError, match=r"10 of 40 problems of .*train.jsonl stand among those held out in "
                       r".*test.jsonl too: line 31 \(held out in line 1\), line 32 \(held out in line 2\), "
                       r"...; --options skip_held_out=true trains without them"):
        make_task("jsonl", path=train, test=test)
    task = make_task("jsonl", path=train, test=test, skip_held_out=True)
    assert (task.size("train"), task.size("test"), task.held_out) == (30, 10, True)
    assert "left out 10 of 40 problems, which stand in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing is left to train on"):
        make_task("jsonl", path=test, test=train)
    with pytest.raises(ValueError, match="absent.jsonl cannot be read"):
        make_task("jsonl", path=train, test=str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("share", [False, True])
def test_a_held_out_question_in_other_capitals_and_spaces_is_found(tmp_path, share):
    asked = [row | {"prompt": f"What is {row['prompt']}"} for row in ROWS]
    shouted = [row | {"prompt": f"  WHAT  IS {row['prompt'].upper()}\n"} for row in ROWS]
    if share:
        given = {"path": write(tmp_path / "both.jsonl", asked + shouted), "test_share": 0.5}
    else:
        given = {"path": write(tmp_path / "a.jsonl", asked + [{"prompt": "other", "answer": 1}]),
                 "test": write(tmp_path / "b.jsonl", shouted)}
    with pytest.raises(ValueError, match="skip_held_out=true"):
        make_task("jsonl", **given)
    task = make_task("jsonl", **given, skip_held_out=True)
    sides = [{" ".join(p.prompt.split()).casefold() for p in task.problems(split, task.size(split))}
             for split in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1]


@pytest.mark.parametrize(
    "rows, options, why",
    [
        ([], {}, "is empty; expected JSON lines with the fields prompt and answer"),
        (ROWS[:1], {}, "leaves no .* problem of the 1 in .*give more lines"),
        (ROWS[:1] * 9, {}, "leaves no"),
        (ROWS, {"test_share": 1.0}, "test_share is 1.0"),
        (ROWS, {"test_share": -0.1}, "test_share is -0.1"),
        (ROWS, {"test_share": float("nan")}, "test_share is nan"),
        (ROWS, {"grader": "f1"}, "jsonl: grader is 'f1'"),
        (
            ROWS,
            {"template": "zero_shot"},
            "jsonl: template is 'zero_shot'; it must be one of: plain, r1_zero, r1_zero_think, few_shot",
        ),
    ],
)
def test_files_and_options_that_cannot_be_used(tmp_path, rows, options, why):
    with pytest.raises(ValueError, match=why):
        make_task("jsonl", path=write(tmp_path / "f.jsonl", rows), **options)


def test_one_line_can_be_trained_on_if_nothing_is_held_out(tmp_path):
    task = JSONL(write(tmp_path / "f.jsonl", ROWS[:1]), test_share=0.0)
    assert task.problems("train", 3) == task.problems("test", 1) * 3


# ---- the templates ----


def test_a_template_holds_the_question_and_r1_zeros_is_the_papers():
    for name, template in TEMPLATES.items():
        prompt = template.prompt("How many?")
        assert (
            prompt.count("How many?") == 1
            and JSONL.prompt(JSONLProblem("How many?", "1", template=name)) == prompt
        )
    assert TEMPLATES["plain"].prompt("How many?\n") == "How many?\n"
    r1_zero = TEMPLATES["r1_zero"].prompt("How many?")
    assert r1_zero.startswith("A conversation between User and Assistant. The user asks a question,")
    assert r1_zero.endswith(
        "<answer> answer here </answer>. User: How many? Assistant:"
    )  # the model writes <think>
    assert TEMPLATES["few_shot"].prompt("How many?").endswith("</answer>\n\nQuestion: How many?\nAnswer:")


def test_a_worked_example_keeps_the_format_and_is_right():
    pieces = TEMPLATES["few_shot"].before.split("Question: ")[1:-1]
    for piece, right in zip(pieces, ("26", "28", "8", "350"), strict=True):
        question, _, response = piece.partition("\nAnswer:")
        graded = grade_response(GSM8K, Sample(GSM8KProblem(question, right, "few_shot"), response))
        assert (graded.accuracy, graded.format) == (1.0, 1.0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_response_that_runs_on_into_another_question_is_judged_by_its_own_answer(template):
    own = " <think>User 1:\nor <answer>5</answer>?</think> <answer>4</answer>"
    for task, of in (
        (JSONL, lambda right: JSONLProblem("2+2=?", right, "number", template)),
        (GSM8K, lambda right: GSM8KProblem("2+2=?", right, template)),
    ):
        for behind in NEXT[template]:
            text = f"{own}{behind}<think>x</think><answer>5</answer>"
            assert (task.grade(of("4"), text).accuracy, task.grade(of("5"), text).accuracy) == (1.0, 0.0)
            if template != "plain" and behind.startswith("\n"):  # without an answer of its own
                assert task.grade(of("5"), f" Hm.{behind}<answer>5</answer>").answer is None
        if template != "plain":  # the own question, said again, is no other one
            again = TEMPLATES[template].prompt("2+2=?").splitlines()[-2:]
            again = "\n".join(again) if "r1_zero" not in template else "User: 2+2=? Assistant:"
            again = again[again.index("Question:") :] if "Question:" in again else again
            if "2+2=?" in again:
                assert task.grade(of("4"), f"So\n{again} <answer>4</answer>").accuracy == 1.0


# ---- GSM8K ----


def test_gsm8k_is_trained_on_one_file_and_tested_on_another(tmp_path):
    rows = [{"question": f"{i} and 1?", "answer": f"so #### {i + 1}"} for i in range(12)]
    train, test = write(tmp_path / "train.jsonl", rows[:8]), write(tmp_path / "test.jsonl", rows[8:])
    task = make_task("gsm8k", path=train, test=test, template="r1_zero")
    assert {p.gold for p in task.problems("train", 8)} == {str(i + 1) for i in range(8)}
    assert [p.gold for p in task.problems("test", 4)] == ["9", "10", "11", "12"]
    problem = task.problem("test", 0)
    assert task.prompt(problem).endswith("User: 8 and 1? Assistant:")
    assert GSM8K.problem_from_record(vars(problem)) == problem
    with pytest.raises(
        ValueError, match="template is 'few'; it must be one of: zero_shot, r1_zero, r1_zero_think, few_"
    ):
        make_task("gsm8k", path=train, template="few")
    with pytest.raises(ValueError, match="template is 'few'"):
        GSM8K.problem_from_record({"gold": "1", "template": "few"})
    assert GSM8K.problem_from_record({"answer": 1, "question": None}).question == ""
    with pytest.raises(ValueError, match='"question" is .*expected text'):
        GSM8K.problem_from_record({"answer": 1, "question": ["How many?"]})
