"""All tasks by name: the one place where a task is registered.

`make_task("countdown", high=30)` makes one. The command line reads this table too, so a task that
stands here can be trained on, evaluated and graded without another line of code.
"""

from dataclasses import fields
from typing import Any

from .arithmetic import Arithmetic
from .base import Task
from .countdown import Countdown
from .gsm8k import GSM8K

TASKS: dict[str, type[Task]] = {task.name: task for task in (Arithmetic, Countdown, GSM8K)}


def find_task(name: str) -> type[Task]:
    """The class of the task called `name`; ValueError, with the known names, if there is none."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of: {', '.join(TASKS)}")
    return TASKS[name]


def option_types(task: type[Task]) -> dict[str, type]:
    """The options of a task: name -> int, float or str."""
    return {field.name: field.type for field in fields(task)}


def make_task(name: str, **options: Any) -> Task:
    """The task called `name` with its options set. ValueError for an unknown task, option or value,
    and for a task that reads its problems from a file and is given none."""
    task = find_task(name)
    known = option_types(task)
    for option in options:
        if option not in known:
            raise ValueError(f"task {name} has no option {option!r}; it has: {', '.join(known)}")
    if "path" in known and "path" not in options:
        raise ValueError(f"--task {name} needs --data FILE (path=FILE): {task.file_format}")
    return task(**options)
