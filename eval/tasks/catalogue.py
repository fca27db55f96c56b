"""Split off eval/tasks.py."""

from dataclasses import fields
from typing import Any

from .arithmetic import Arithmetic
from .base import Task
from .countdown import Countdown
from .gsm8k import GSM8K


def make_task(name: str, **dials: Any) -> Task:
    """The task called `name` with its dials set; ValueError for an unknown task, dial or value."""
    known = {task.name: task for task in (Arithmetic, Countdown, GSM8K)}
    if name not in known:
        raise ValueError(f"there is no task {name!r}; choose one of: {', '.join(known)}")
    task = known[name]
    names = [field.name for field in fields(task)]
    for dial in dials:
        if dial not in names:
            raise ValueError(f"task {name} has no dial {dial!r}; it has: {', '.join(names)}")
    if name == "gsm8k" and "path" not in dials:
        raise ValueError(
            "task gsm8k needs path=FILE: JSON lines with the fields question and answer"
        )
    return task(**dials)
