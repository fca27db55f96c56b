"""The flags that choose a task, for every command that needs one: --task, --options and --data."""

from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from ..eval.tasks.arithmetic import Arithmetic
from ..eval.tasks.base import Task
from ..eval.tasks.catalogue import make_task
from ..eval.tasks.countdown import Countdown
from ..eval.tasks.gsm8k import GSM8K

TASKS = {"arithmetic": Arithmetic, "countdown": Countdown, "gsm8k": GSM8K}


@dataclass(frozen=True)
class TaskFlags:
    """Which task, and its options."""

    # Flat flags: `--options`, not `--task.options`, though this is a field `task` of a command's config.
    name: Annotated[str, tyro.conf.arg(name="task", prefix_name=False)] = "countdown"
    """countdown, arithmetic or gsm8k."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(prefix_name=False)] = ()
    """Options of the task as name=value, for example n_numbers=4 high=30 ops=+-*; a wrong name prints the
    list."""
    data: Annotated[str | None, tyro.conf.arg(prefix_name=False)] = None
    """File of problems, for a task that reads them (gsm8k)."""

    def make(self) -> Task:
        """Raises ValueError for an unknown task or dial, or a value that is not of the dial's type."""
        values = {}
        types = {f.name: f.type for f in fields(TASKS[self.name])} if self.name in TASKS else {}
        for option in self.options:
            name, equals, text = option.partition("=")
            if not equals:
                raise ValueError(f"--options got {option!r}, expected name=value, for example high=30")
            values[name] = text
            if types.get(name) in (int, float):
                try:
                    values[name] = types[name](text)
                except ValueError:
                    raise ValueError(f"--options {name} is {text!r}, expected a number") from None
        if self.data is not None:
            if types and "path" not in types:
                raise ValueError(
                    f"--data is for a task that reads its problems from a file, and {self.name} "
                    "makes its own; leave it out, or choose --task gsm8k"
                )
            values["path"] = self.data
        if "path" in types and "path" not in values:
            raise ValueError(
                f"--task {self.name} needs --data FILE: JSON lines with the fields question and "
                "answer"
            )
        return make_task(self.name, **values)
