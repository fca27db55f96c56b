"""A task of the user's own by module:class: it is found and tried, or refused on one line."""

import math
import pickle
import subprocess
import sys

import pytest

from r1zero.eval.response import Sample, coherence_of, grade_response
from r1zero.eval.tasks.base import Grade
from r1zero.eval.tasks.catalogue import find_task, make_task, option_types
from r1zero.eval.tasks.own import check_task, source_of

TASK = """
from __future__ import annotations
from dataclasses import dataclass
from r1zero.eval.response import parse_response
from r1zero.eval.tasks.base import Grade, Task, required_fields

@dataclass(frozen=True)
class MyTask(Task):
    name = "mine"
    example = '{"word": "hi", "response": "..."}'
    words: int = 3
    loud: bool = False

    def size(self, split):
        return self.words if split == "test" else None

    def problem(self, split, index):
        return f"{split}{index % self.words}"

    def prompt(self, problem):
        return problem.upper() if self.loud else problem

    @staticmethod
    def grade(problem, response):
        answer = parse_response(response).answer
        return Grade(float(answer == problem), answer, f"The word is {problem}.")

    @staticmethod
    def problem_from_text(text):
        return text

    @staticmethod
    def problem_from_record(record):
        return required_fields(record, "word")[0]
"""


COHERENT = """
    @staticmethod
    def coherence(problem, response):
        return 0.5

    def size"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """module(text, name) writes a module into the current folder; each test has names of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(text: str) -> str:
        names.append(f"own_{abs(hash((request.node.name, len(names))))}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_task_of_the_current_folder_is_found_with_its_options_and_survives_a_spawned_process(module):
    name = f"{module(TASK)}:MyTask"
    task = make_task(name, words=4, loud=True)
    assert option_types(find_task(name)) == {"words": int, "loud": bool} and type(task) is find_task(name)
    assert (task.words, task.prompt("a"), task.size("test"), task.held_out) == (4, "A", 4, True)
    assert source_of(find_task(name)).name == f"{name.partition(':')[0]}.py"
    assert pickle.loads(pickle.dumps(task)) == task
    read = "import multiprocessing as m\nif __name__ == '__main__':\n"
    read += "    from r1zero.eval.tasks.catalogue import make_task"
    read += f"\n    with m.get_context('spawn').Pool(1) as p: print(p.map(repr, [make_task({name!r})]))\n"
    with open("read.py", "w") as file:
        file.write(read)
    done = subprocess.run([sys.executable, "read.py"], capture_output=True, text=True, timeout=120)
    assert "MyTask(words=3, loud=False)" in done.stdout, done.stderr


def refused(name: str, **options) -> str:
    with pytest.raises(ValueError) as error:
        make_task(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, why",
    [
        ("nowhere_at_all:MyTask", "there is no module nowhere_at_all, neither installed nor in"),
        ("nowhere.py:MyTask", "there is no module nowhere"),
        ("./my_task.py:MyTask", "expected module:name"),
        (":MyTask", "expected module:name"),
        ("json:", "expected module:name"),
        ("a:b:c", "expected module:name"),
        ("json:MyTask", "has no 'MyTask'; it has"),
        ("json:loads", "json:loads is no dataclass"),
        ("r1zero.eval.tasks.base:Grade", "lacks name, example"),
        ("r1zero.eval.tasks.base:Task", "is no dataclass"),
    ],
)
def test_a_name_that_leads_to_no_task(name, why, module):
    assert why in refused(name)


@pytest.mark.parametrize(
    "text, why",
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(:\n", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("import not_installed_here", "needs another module"),
        ("", "has no 'MyTask'; it has nothing"),
    ],
)
def test_a_module_that_raises_when_it_is_imported(text, why, module):
    assert why in refused(f"{module(text)}:MyTask")


def test_a_file_with_the_name_of_another_module_takes_nobodys_place(module, tmp_path):
    (tmp_path / "json.py").write_text(TASK)
    assert "json/__init__.py has no 'MyTask'; it has" in refused("json:MyTask")


def test_a_module_of_a_former_current_folder_gives_way(module, tmp_path, monkeypatch):
    name = module(TASK)
    first = find_task(f"{name}:MyTask")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"{name}.py").write_text(TASK.replace("words: int = 3", "words: int = 5"))
    assert find_task(f"{name}:MyTask") is first
    monkeypatch.chdir(tmp_path / "deep")
    assert make_task(f"{name}:MyTask").words == 5


@pytest.mark.parametrize(
    "right, wrong, why",
    [
        ("@dataclass(frozen=True)\n", "", "is no dataclass"),
        ("(Task)", "", "lacks problem_flag, file_format"),
        ("def grade(", "def judge(", "lacks grade;"),
        ("def size(", "def length(", "lacks size;"),
        (
            "    @staticmethod\n    def grade",
            "    def grade",
            "put @staticmethod above it, and write def grade(problem, response)",
        ),
        (
            "def grade(problem, response)",
            "def grade(problem, response, strict)",
            "grade cannot be called as grade(problem, response)",
        ),
        (
            "def problem(self, split, index)",
            "def problem(self, index)",
            "problem cannot be called as problem(split, index)",
        ),
        ("def prompt(self, problem)", "def prompt(problem)", "prompt cannot be called as prompt(problem)"),
        ('name = "mine"', 'name = "my/task"', "name is 'my/task'"),
        ('name = "mine"', "name = 3", "name is 3"),
        ("words: int = 3", "words: list = None", "its option words is of type"),
        ("words: int = 3", "words: int", "needs --options words=VALUE"),
        ("words: int = 3", "path: str", "needs --data FILE (path=FILE): the file of its problems"),
        ("words: int", "words: Nowhere", "cannot be read"),
        ("return self.words if", "return -1 if", "size('test') is -1"),
        ('return self.words if split == "test" else None', "return 0", "both splits are empty"),
        (
            'return f"{split}{index % self.words}"',
            "raise KeyError(split)",
            "problem('train', 0) raised KeyError: 'train'",
        ),
        ('return f"{split}{index % self.words}"', "return {1, 2}", "cannot be written as JSON"),
        (
            'return f"{split}{index % self.words}"',
            "import random; return str(random.random())",
            "another one when it is asked again",
        ),
        (
            "return problem.upper() if self.loud else problem",
            "return None",
            "a prompt is 'None', expected text",
        ),
        ("answer = parse", "1 / len(response); answer = parse", "ZeroDivisionError"),
        ("answer = parse", "raise SystemExit(0); answer = parse", "raised SystemExit: 0"),
        ("return Grade(float(answer == problem), answer,", "return (1.0, answer,", "expected a Grade"),
        ("float(answer == problem)", "0.5", "gave an accuracy of 0.5, expected 1.0 or 0.0"),
        ("float(answer == problem)", "float('nan')", "gave an accuracy of nan"),
        ("problem), answer, f", "problem), 7, f", "gave the answer '7', expected the text of it, or None"),
        ('f"The word is {problem}."', "None", "gave the reason 'None', expected a sentence"),
        ("answer = parse", "raise SystemExit(2); answer = parse", "raised SystemExit: 2"),
        ("    def size", COHERENT.replace("    @staticmethod\n", ""), "coherence must be a static method"),
        ("    def size", COHERENT.replace(", response", ""), "coherence cannot be called as coherence("),
        (
            "    def size",
            COHERENT.replace("return 0.5", "return None"),
            "coherence(problem, '') gave 'None', expected a finite number",
        ),
        (
            "    def size",
            COHERENT.replace("0.5", "1 / len(response)"),
            "coherence('test0', '') raised ZeroDivisionError",
        ),
        (
            'return self.words if split == "test" else None',
            "return self.words",
            "training problems never end: take index % 3; problem('train', 3) raised IndexError",
        ),
    ],
)
def test_a_class_that_does_not_keep_the_outline(right, wrong, why, module):
    listed = TASK.replace("index % self.words", "list(range(self.words))[index]")
    text = (listed if "IndexError" in why else TASK).replace(right, wrong, 1)
    assert text != TASK and why in refused(f"{module(text)}:MyTask")


def test_options_are_refused_by_name_and_by_what_the_task_says(module):
    assert "has no option 'high'; it has: words, loud" in refused(f"{module(TASK)}:MyTask", high=1)
    said = "    def __post_init__(self):\n        raise ValueError('mine: words is too many')\n"
    text = TASK.replace("    def size", f"{said}\n    def size", 1)
    assert "making the task refused: mine: words is too many" in refused(f"{module(text)}:MyTask")


def test_a_task_with_coherence_of_its_own_is_tried_and_taken(module):
    text = TASK.replace("    def size", COHERENT)
    assert make_task(f"{module(text)}:MyTask").coherence("a", "") == 0.5


def test_a_class_that_inherits_nothing_may_leave_out_what_a_task_may_be_without(module):
    whole = """
    problem_flag, file_format, lines_skipped, held_out = "problem", None, 0, True

    def problems(self, split, n, start=0):
        return [self.problem(split, index) for index in range(start, start + n)]

    def size"""
    text = TASK.replace("(Task)", "").replace("    def size", whole, 1)
    task = make_task(f"{module(text)}:MyTask")
    graded = grade_response(task, Sample("train0", "<answer>train0</answer>"))
    assert graded.accuracy == 1.0 and not hasattr(task, "prefilled") and not hasattr(task, "coherence")


@pytest.mark.parametrize(
    "right, wrong, why",
    [
        ("return '<think>'", "return None", "prefilled(problem) gave 'None', expected text"),
        ("return '<think>'", "return problem.absent", "prefilled('train0') raised AttributeError"),
        ("(problem)", "()", "prefilled cannot be called as prefilled(problem)"),
        ("@staticmethod", "", "prefilled must be a static method"),
    ],
)
def test_what_the_prompt_holds_of_the_answer_is_tried_and_is_text(right, wrong, why, module):
    prefilled = "    @staticmethod\n    def prefilled(problem):\n        return '<think>'\n"
    texts = [TASK.replace("    def size", f"{p}\n    def size", 1)
             for p in (prefilled, prefilled.replace(right, wrong))]
    assert make_task(f"{module(texts[0])}:MyTask").prefilled("a") == "<think>"
    assert why in refused(f"{module(texts[1])}:MyTask")


class Moody:
    """Grades well at first."""

    name = "moody"

    @staticmethod
    def coherence(problem, response):
        return {"ok": 0.5, "half": math.nan, "none": None}[response]

    @staticmethod
    def grade(problem, response):
        if response == "quit":
            sys.exit(0)
        return {"ok": Grade(1.0, None, "ok"), "half": Grade(0.5, None, "half"), "none": None}[response]


@pytest.mark.parametrize(
    "response, why",
    [
        ("boom", "raised KeyError: 'boom'"),
        ("half", "gave an accuracy of 0.5"),
        ("none", "gave 'None', expected a Grade"),
        ("quit", "raised SystemExit: 0"),
    ],
)
def test_a_grader_that_fails_later_is_told_with_the_problem_and_the_response(response, why):
    assert grade_response(Moody, Sample("2+2", "ok")).accuracy == 1.0
    with pytest.raises(ValueError, match="the grader of moody ") as error:
        grade_response(Moody, Sample("2+2", response))
    assert why in str(error.value) and "2+2" in str(error.value) and repr(response) in str(error.value)


@pytest.mark.parametrize(
    "response, why",
    [
        ("boom", "raised KeyError: 'boom'"),
        ("half", "gave 'nan', expected a finite number"),
        ("none", "gave 'None', expected a finite number"),
    ],
)
def test_coherence_that_fails_later_is_told_with_the_problem_and_the_response(response, why):
    assert coherence_of(Moody, Sample("2+2", "ok")) == 0.5
    with pytest.raises(ValueError, match="the coherence of moody ") as error:
        coherence_of(Moody, Sample("2+2", response))
    assert why in str(error.value) and "2+2" in str(error.value) and repr(response) in str(error.value)


def test_our_own_tasks_keep_the_outline():
    for name in ("arithmetic", "countdown"):
        check_task(make_task(name), name)
