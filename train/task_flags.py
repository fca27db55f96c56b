"""The flags that choose a task, for every command that needs one.

They are --task, --options, --data, --skip-bad and --chat.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..eval.plugin import is_named
from ..eval.tasks.base import Task
from ..eval.tasks.catalogue import TASKS, find_task, make_task, option_types
from ..eval.tasks.own import source_of
from ..eval.tasks.problem_file import FileTask
from ..eval.tasks.prompts import check_message

TEST = "test="  # the option that names a second file
FILE_TASKS = [name for name, task in TASKS.items() if "path" in option_types(task)]


@dataclass(frozen=True)
class TaskFlags:
    """Which task, and its options."""

    # Flat flags: `--options` instead of `--task.options`, although a config has this as a field
    # `task`.
    name: Annotated[
        str,
        tyro.conf.arg(
            name="task",
            prefix_name=False,
            help=f"Name of the task: {', '.join(TASKS)}, or module:class for one of your own.",
        ),
    ] = "countdown"
    options: Annotated[tuple[str, ...], tyro.conf.arg(prefix_name=False)] = ()
    """Options of the task as name=value, such as high=30 ops=+-*; a wrong name lists them all."""
    data: Annotated[
        str | None,
        tyro.conf.arg(
            prefix_name=False,
            help=f"File of problems, or hub:OWNER/NAME for a data set of the Hugging Face hub, for "
            f"a task that reads them: {', '.join(FILE_TASKS)}.",
        ),
    ] = None
    skip_bad: Annotated[bool, tyro.conf.arg(prefix_name=False)] = False
    """Go on without the lines of --data that are bad, and say how many there are."""
    chat: Annotated[bool, tyro.conf.arg(prefix_name=False)] = False
    """Put each question through the model's chat template; mostly with --options template=chat."""

    @property
    def short_name(self) -> str:
        """The name without a module, for the names of files."""
        return self.name.rpartition(":")[2]

    @property
    def has_second(self) -> bool:
        """Whether the task can read a second file, the option `test`."""
        return self.data is not None and issubclass(find_task(self.name), FileTask)

    @property
    def files(self) -> list[str]:
        """The files that the problems are read from."""
        if not self.has_second:
            return [] if self.data is None else [self.data]
        tests = [option.removeprefix(TEST) for option in self.options if option.startswith(TEST)]
        return [self.data, *filter(None, tests)]

    @property
    def source(self) -> Path | None:
        """The file with the code of a task of the user's own; None for a task of ours."""
        return source_of(find_task(self.name)) if is_named(self.name) else None

    def make(self) -> Task:
        """The task. Raises ValueError for an unknown task or option, a wrong value, and --chat with
        a template that is no message of a user.
        """
        types = option_types(find_task(self.name))
        values = dict(self._parse(option, types) for option in self.options)
        if self.data is not None:
            if "path" not in types:
                raise ValueError(
                    f"--data is for a task that reads its problems from a file, and {self.name} "
                    f"makes its own; leave it out, or choose --task {' or '.join(FILE_TASKS)}"
                )
            values["path"] = self.data
        if self.skip_bad:
            if "skip_bad" not in types:
                raise ValueError(
                    f"--skip-bad is for a task that reads its problems from a file, and "
                    f"{self.name} makes its own; leave it out"
                )
            values["skip_bad"] = True
        task = make_task(self.name, **values)
        if self.chat:
            check_message(getattr(task, "template", None))
        return task

    @staticmethod
    def _parse(option: str, types: dict[str, type]) -> tuple[str, str | int | float | bool]:
        """(name, value) of "name=value"; a number, or true or false, where the task wants one."""
        name, equals, text = option.partition("=")
        if name == "path":
            raise ValueError("--options got a path; give the file as --data FILE")
        if not equals:
            raise ValueError(f"--options got {option!r}, expected name=value, for example high=30")
        if types.get(name) is bool:
            if text not in ("true", "false"):
                raise ValueError(f"--options {name} is {text!r}, expected true or false")
            return name, text == "true"
        if types.get(name) not in (int, float):
            return name, text
        try:
            return name, types[name](text)
        except ValueError:
            raise ValueError(f"--options {name} is {text!r}, expected a number") from None
