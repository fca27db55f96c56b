"""Why did this answer get that reward? Grades responses by the rules of training, without a model.

    r1zero grade --task countdown --problem "3 7 9 -> 13" --response "... <answer>(9-3)+7</answer>"
    r1zero grade --task gsm8k --answer 42 --response "... #### 42"
    r1zero grade --task countdown --input responses.jsonl > graded.jsonl

A line of the file is a JSON object with `response` and the fields of the problem; --help shows an
example for each task. The file that `r1zero eval` writes is taken too: there the problem is an
object `problem`. For each response comes one JSON object with accuracy, format, reward, answer
(what was read as one) and why. A line with `finish_reason` "length" was cut off, and earns no
format reward. The file is read whole before anything is written, so that a bad line costs nothing;
`--skip-bad` goes on without bad lines. `--out` is replaced when all grades are written.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import tyro

from ...eval.console import say
from ...eval.lines import Parsed, json_object, parse_lines, read_lines
from ...eval.response import Sample, quoted
from ...eval.result_file import ResultFile, check_result_path
from ...eval.tasks.base import Task
from ...eval.tasks.catalogue import TASKS, find_task
from ...rl.rewards import RewardConfig, reward_one

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


def sample_of_line(task: type[Task], line: str) -> Sample:
    """The response of a line, with its problem. Raises ValueError for a field that is missing or of
    the wrong kind."""
    record = json_object(line)
    response, finish_reason = record.get("response"), record.get("finish_reason")
    if not isinstance(response, str):
        raise ValueError('there is no text "response"')
    if not isinstance(finish_reason, str | None):
        raise ValueError(f'"finish_reason" is {quoted(repr(finish_reason))}, expected text')
    return Sample(problem_of_line(task, record), response, finish_reason=finish_reason)


def read_responses(path: str, task: type[Task], skip_bad: bool = False) -> Parsed[Sample]:
    """(number of the line, sample) of each line that holds more than white space.

    Raises ValueError for bad lines, unless they are skipped, as eval/lines.py does.
    """
    parse = partial(sample_of_line, task)
    return parse_lines(path, read_lines(path), parse, f"lines like {task.example}", skip_bad)


def summary(graded: list[dict]) -> str:
    """One line for people: how many responses there are, and the means of what they got."""

    def mean(name: str) -> float:
        return sum(row[name] for row in graded) / len(graded)

    return (
        f"{len(graded):,} responses: accuracy {mean('accuracy'):.1%}, "
        f"well formed {mean('format'):.1%}, mean reward {mean('reward'):.3f}"
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
    """Grade and write; returns what was written. ValueError for what cannot be read."""
    task = find_task(config.task)
    if config.input is None:
        problem = task.problem_from_text(getattr(config, task.problem_flag))
        graded = [reward_one(task, Sample(problem, config.response), config.rewards)]
    else:
        graded = [
            {"line": number, **reward_one(task, sample, config.rewards)}
            for number, sample in read_responses(config.input, task, config.skip_bad)
        ]
    write_grades(graded, config.out)
    if config.input is not None:
        say(summary(graded))
    return graded
