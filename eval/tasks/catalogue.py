"""All tasks by name: the one place where a task is registered.

`make_task("countdown", high=30)` makes one. The command line reads this table too, so a task that
stands here can be trained on, evaluated and graded without another line of code. A name with a
colon, `my_module:MyTask`, is a task of the user's own (own.py).
"""

from dataclasses import MISSING, fields
from typing import Any

from ..plugin import is_named
from . import own
from .arithmetic import Arithmetic
from .assistant import Assistant
from .base import Task
from .countdown import Countdown
from .game24 import Game24
from .gsm8k import GSM8K
from .jsonl import JSONL
from .math import Math

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Arithmetic, Assistant, Countdown, Game24, GSM8K, JSONL, Math)
}


def find_task(name: str) -> type[Task]:
    """The class of the task called `name`; ValueError, with the known names, if there is none.

    A name `module:class` is looked up in that module; ValueError for a class that is no task.
    """
    if is_named(name):
        return own.load_task(name)
    if name not in TASKS:
        raise ValueError(
            f"there is no task {name!r}; choose one of: {', '.join(TASKS)}, or name one of your "
            "own as module:class"
        )
    return TASKS[name]


def option_types(task: type[Task]) -> dict[str, type]:
    """The options of a task: name -> int, float, str or bool."""
    return own.option_types(task, f"task {task.name}")


def make_task(name: str, **options: Any) -> Task:
    """The task called `name` with its options set. ValueError for an unknown task, option or value,
    and for a task that reads its problems from a file and is given none."""
    task = find_task(name)
    known = option_types(task)
    for option in options:
        if option not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"task {name} has no option {option!r}; it has: {has}")
    if "path" in known and "path" not in options:
        held = task.file_format or "the file of its problems"
        raise ValueError(f"--task {name} needs --data FILE (path=FILE): {held}")
    if not is_named(name):
        return task(**options)
    for field in fields(task):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if field.init and not has_default and field.name not in options:
            raise ValueError(f"--task {name} needs --options {field.name}=VALUE; it has no default")
    return own.make(task, f"--task {name}", options)
