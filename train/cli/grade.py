"""Why did this answer get that reward? Grades responses by the rules of training, without a model.

    r1zero grade --task countdown --problem "3 7 9 -> 13" --response "... <answer>(9-3)+7</answer>"
    r1zero grade --task gsm8k --answer 42 --response "... #### 42"
    r1zero grade --task countdown --input responses.jsonl > graded.jsonl

A line of the file is a JSON object with `response` and the fields of the problem; --help shows an
example for each task. The file that `r1zero eval` writes is taken too: there the problem is an
object `problem`. For each response comes one JSON object with accuracy, format, the other parts
that have a weight, reward, answer (what was read as one) and why. A line with `finish_reason`
"length" was cut off, and earns no format reward. Efficiency compares the responses to a problem, so
it needs their `n_tokens`, and several of them. The file is read whole before anything is written,
so that a bad line costs nothing; `--skip-bad` goes on without bad lines. `--out` is replaced when
all grades are written.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from ...eval.console import say
from ...eval.lines import Parsed, json_object, parse_lines, read_lines
from ...eval.response import Sample, quoted
from ...eval.result_file import ResultFile, check_result_path
from ...eval.tasks.base import Task
from ...eval.tasks.catalogue import TASKS, find_task
from ...eval.tasks.problem_file import FileTask
from ...rl.rewards import RewardConfig, check_no_model, check_parts, judge, why
from ...rl.shaping import efficiency, weighted_sum

EXAMPLES = "; ".join(f"{name}: {task.example}" for name, task in TASKS.items())


def tasks_with(flag: str) -> str:
    """The names of the tasks whose problem is given by --problem, or by --answer."""
    return " or ".join(name for name, task in TASKS.items() if task.problem_flag == flag)


@dataclass(frozen=True, kw_only=True)
class GradeConfig:
    """Say what reward a response earns, and why: one response, or a file of them."""

    task: Annotated[
        str,
        tyro.conf.arg(
            help=f"Name of the task whose rules apply: {', '.join(TASKS)}, or module:class for one "
            "of your own."
        ),
    ] = "countdown"
    input: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"File to grade, with a response and its problem in each line. Lines look like "
            f"this: {EXAMPLES}."
        ),
    ] = None
    response: str | None = None
    """Text of one response to grade, instead of a file."""
    problem: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Problem that --response answers, such as '3 7 9 -> 13'; for --task "
            f"{tasks_with('problem')}."
        ),
    ] = None
    answer: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Right answer to the problem that --response answers; for --task "
            f"{tasks_with('answer')}."
        ),
    ] = None
    out: str | None = None
    """File to write the grades to, instead of the screen."""
    skip_bad: bool = False
    """Go on without the lines of --input that are bad, and say how many there are."""
    rewards: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self):
        task = find_task(self.task)
        check_parts(task, self.rewards)
        check_no_model(self.rewards, "grade")
        if (self.input is None) == (self.response is None):
            raise ValueError("expected either --input FILE.jsonl or --response TEXT")
        given = [f"--{name}" for name in ("problem", "answer") if getattr(self, name) is not None]
        if self.input is not None and given:
            raise ValueError(
                f"{given[0]} goes with --response; in a file, each line brings its own problem"
            )
        needed = f"--{task.problem_flag}"
        if self.response is not None and given != [needed]:
            raise ValueError(
                f"--response for {self.task} needs {needed} beside it; got "
                f"{' and '.join(given) or 'neither'}"
            )
        if self.skip_bad and self.input is None:
            raise ValueError("--skip-bad is for the lines of --input; leave it out")
        if self.out is not None:
            check_result_path(self.out, [self.input] if self.input is not None else [])


def problem_of_line(task: type[Task], record: dict) -> Any:
    """The problem of a line. Raises ValueError for a field that is missing or of the wrong kind."""
    # In a line of `r1zero eval`, the problem is an object and `answer` is the model's.
    problem = record.get("problem")
    return task.problem_from_record(problem if isinstance(problem, dict) else record)


class Answer(NamedTuple):
    """What a line holds."""

    sample: Sample
    n_tokens: int | None
    """Length of the response; None where the line does not say."""


def answer_of_line(task: type[Task], line: str) -> Answer:
    """The response of a line, with its problem. Raises ValueError for a field that is missing or of
    the wrong kind."""
    record = json_object(line)
    response, finish_reason = record.get("response"), record.get("finish_reason")
    if not isinstance(response, str):
        raise ValueError('there is no text "response"')
    if not isinstance(finish_reason, str | None):
        raise ValueError(f'"finish_reason" is {quoted(repr(finish_reason))}, expected text')
    n_tokens = record.get("n_tokens")
    if n_tokens is not None and (type(n_tokens) is not int or n_tokens < 0):
        raise ValueError(f'"n_tokens" is {quoted(repr(n_tokens))}, expected a whole number')
    problem = problem_of_line(task, record)
    return Answer(Sample(problem, response, finish_reason=finish_reason), n_tokens)


def read_responses(path: str, task: type[Task], skip_bad: bool = False) -> Parsed[Answer]:
    """(number of the line, answer) of each line that holds more than white space.

    Raises ValueError for bad lines, unless they are skipped, as eval/lines.py does.
    """
    parse = partial(answer_of_line, task)
    return parse_lines(path, read_lines(path), parse, f"lines like {task.example}", skip_bad)


# ---- the parts, and their sum ----


def same_problem(task: type[Task], answer: Answer, n: int) -> str | int:
    """What answers to the same problem share: its text. An answer whose question is not known has
    its own, its index n, because equal right answers do not make one problem."""
    problem = answer.sample.problem
    is_known = not issubclass(task, FileTask) or task.question(problem).strip()
    return repr(problem) if is_known else n


def efficiency_of(
    task: type[Task], answers: Sequence[Answer], accuracy_N: np.ndarray
) -> np.ndarray | None:
    """[N]: what each answer earns for being shorter than others to the same problem; None where
    their lengths are not known, or no problem has two."""
    group_of = {}  # what answers to the same problem share -> their indices
    for n, answer in enumerate(answers):
        group_of.setdefault(same_problem(task, answer, n), []).append(n)
    lengths = [answer.n_tokens for answer in answers]
    if None in lengths or len(group_of) == len(answers):
        return None
    # Sorted by problem, as efficiency takes them, and back.
    order = np.concatenate([np.array(group) for group in group_of.values()])
    offsets = np.cumsum([0, *map(len, group_of.values())])
    earned_N = np.zeros(len(answers))
    earned_N[order] = efficiency(np.array(lengths)[order], accuracy_N[order], offsets)
    return earned_N


def grade_answers(task: type[Task], answers: Sequence[Answer], config: RewardConfig) -> list[dict]:
    """Grade the answers: a dict of each part, reward, answer and why per answer.

    Raises PluginError (rl/plugin.py).
    """
    graded, parts = judge(task, [answer.sample for answer in answers], config)
    if config.efficiency_weight > 0:
        earned_N = efficiency_of(task, answers, parts["accuracy"])
        if earned_N is None:
            say(
                "efficiency is left out: it compares the lengths of several responses to one "
                "problem, so the lines of --input need n_tokens, and problems that come twice, "
                "each with its question"
            )
        else:
            parts["efficiency"] = earned_N
    rewards_N = weighted_sum(parts, config.weights)
    return [
        {
            **{name: float(part_N[n]) for name, part_N in parts.items()},
            "reward": float(rewards_N[n]),
            "answer": grade.answer,
            "why": why(grade),
        }
        for n, grade in enumerate(graded)
    ]


def summary(graded: list[dict]) -> str:
    """One line for people: how many responses there are, and the means of what they got."""

    def mean(name: str) -> float:
        return sum(row[name] for row in graded) / len(graded)

    shown = ("line", "accuracy", "format", "reward", "answer", "why")
    others = "".join(f"{name} {mean(name):.3f}, " for name in graded[0] if name not in shown)
    return (
        f"{len(graded):,} responses: accuracy {mean('accuracy'):.1%}, "
        f"well formed {mean('format'):.1%}, {others}mean reward {mean('reward'):.3f}"
    )


def write_grades(graded: Iterable[dict], out: str | None) -> None:
    """Write the grades as lines of JSON: to `out`, or to stdout, where they are the product.

    Raises BrokenPipeError if the reader of stdout has gone, OSError for what cannot be written.
    """
    if out is not None:
        with ResultFile(out) as file:
            file.write(graded)
        return
    for row in graded:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def grade(config: GradeConfig) -> list[dict]:
    """Grade and write; returns what was written. ValueError for what cannot be read or graded."""
    task = find_task(config.task)
    if config.input is None:
        problem = task.problem_from_text(getattr(config, task.problem_flag))
        answer = Answer(Sample(problem, config.response), None)
        graded = grade_answers(task, [answer], config.rewards)
    else:
        lines = read_responses(config.input, task, config.skip_bad)
        rows = grade_answers(task, [answer for _, answer in lines], config.rewards)
        graded = [{"line": number, **row} for (number, _), row in zip(lines, rows, strict=True)]
    write_grades(graded, config.out)
    if config.input is not None:
        say(summary(graded))
    return graded
