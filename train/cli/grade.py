"""Why did this answer get that reward? Grades responses by the rules of training, without a model.

    r1zero grade --task countdown --problem "3 7 9 -> 13" --response "... <answer>(9-3)+7</answer>"
    r1zero grade --task gsm8k --answer 42 --response "... #### 42"
    r1zero grade --task countdown --input responses.jsonl > graded.jsonl

A line of the file is a JSON object with `response` and the fields of the problem; --help shows an
example for each task. The file that `r1zero eval` writes is taken too: there the problem is an
object `problem`. For each response comes one JSON object with accuracy, format, reward, answer
(what was read as one) and why. The file is read whole before anything is written, so that a bad
line costs nothing.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

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
        str, tyro.conf.arg(help=f"Name of the task whose rules apply: {', '.join(TASKS)}.")
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
        if self.out and self.input and Path(self.out).resolve() == Path(self.input).resolve():
            raise ValueError(
                f"--out {self.out} is the --input file, which would be lost; give another one"
            )


def problem_of_line(task: type[Task], record: dict) -> Any:
    """The problem of a line. Raises ValueError for a field that is missing or of the wrong kind."""
    # In a line of `r1zero eval`, the problem is an object and `answer` is the model's.
    problem = record.get("problem")
    return task.problem_from_record(problem if isinstance(problem, dict) else record)


def read_responses(path: str, task: type[Task]) -> Iterator[tuple[int, Any, str]]:
    """Yield (number of the line, problem, response); lines of white space are left out.

    Raises ValueError, with the line's number and an example, for a file or line that cannot be
    used.
    """
    try:
        # Not splitlines(), which would cut at U+2028 too.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # bytes that are not UTF-8, or a null byte in the path
        raise ValueError(f"cannot read {path}: it is not UTF-8 text ({error})") from None
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("response"), str):
                raise ValueError('there is no text "response"')
            problem = problem_of_line(task, record)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; expected a line like {task.example}"
            ) from None
        yield number, problem, record["response"]
    if empty:
        raise ValueError(f"{path} is empty; expected lines like {task.example}")


def summary(graded: list[dict]) -> str:
    """One line for people: how many responses there are, and the means of what they got."""

    def mean(name: str) -> float:
        return sum(row[name] for row in graded) / len(graded)

    return (
        f"{len(graded):,} responses: accuracy {mean('accuracy'):.1%}, "
        f"well formed {mean('format'):.1%}, mean reward {mean('reward'):.3f}"
    )


def grade(config: GradeConfig) -> list[dict]:
    """Grade and write; returns what was written. ValueError for what cannot be read."""
    task = find_task(config.task)
    if config.input is None:
        problem = task.problem_from_text(getattr(config, task.problem_flag))
        graded = [reward_one(task, problem, config.response, config.rewards)]
    else:
        graded = [
            {"line": number, **reward_one(task, problem, response, config.rewards)}
            for number, problem, response in read_responses(config.input, task)
        ]
    with open(config.out, "w", encoding="utf-8") if config.out else nullcontext(sys.stdout) as file:
        for row in graded:
            file.write(json.dumps(row) + "\n")
    if config.input is not None:
        print(summary(graded), file=sys.stderr)
    return graded
