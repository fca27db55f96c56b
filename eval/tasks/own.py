"""A task of the user's own: `--task my_module:MyTask`. train/recipes/own_task.py is one to copy.

Two checks come before anything is made. The class must have the members of `Task` with their
signatures (`load_task`). An instance must give a problem, a prompt and a grade, and the same
problem when it is asked again, because a run that is resumed asks again (`check_task`).

Left out: what only a longer run can show. A grader that raises later ends the run with the problem
and the response that it could not grade (eval/response.py).
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..plugin import load_named, raised
from ..response import grade_fault, quoted, share_fault
from .base import Task

FLAG = "--task"
NAME = re.compile(r"[\w.-]+")
OPTION_TYPES = (int, float, str, bool)
# Members of `Task` that a class must write itself, with the arguments that they are called with.
CALLS = {
    "problem": ("split", "index"),
    "size": ("split",),
    "prompt": ("problem",),
    "grade": ("problem", "response"),
    "problem_from_text": ("text",),
    "problem_from_record": ("record",),
}
INHERITED = {"problems": ("split", "n", "start")}  # `Task` has it whole
# None, or not there at all, where a task has none.
OPTIONAL = {
    "coherence": ("problem", "response"),
    "language": ("problem", "response"),
    "judged_by_model": ("problem",),
    "prefilled": ("problem",),
    "step_ends": ("text", "ended"),
    "check_step": ("problem", "steps"),
}
STATIC = ("grade", "problem_from_text", "problem_from_record", *OPTIONAL)
# What a base model may answer, right or wrong.
PROBES = ("", "no", "<think>a</think><answer>1</answer>", "<answer>", "\0\ud800</answer>")


def load_task(name: str) -> type[Task]:
    """The class that `module:class` names; ValueError, on one line, for one that is no task."""
    what = f"{FLAG} {name}"
    task = load_named(name, FLAG)
    if not isinstance(task, type) or not is_dataclass(task):
        raise ValueError(f"{what} is no dataclass; put @dataclass(frozen=True) above its class")
    members = (*Task.__annotations__, *CALLS, *INHERITED)
    required = [member for member in members if member not in OPTIONAL]
    missing = [member for member in required if not has_own(task, member)]
    if missing:
        raise ValueError(
            f"{what} lacks {', '.join(missing)}; let it inherit from r1zero.eval.tasks.base.Task, "
            "which says what each is, and has a default for some"
        )
    given = {name: call for name, call in OPTIONAL.items() if getattr(task, name, None) is not None}
    for member, arguments in (CALLS | INHERITED | given).items():
        check_signature(task, member, arguments, what)
    check_texts(task, what)
    option_types(task, what)
    return task


def source_of(task: type[Task]) -> Path:
    """The file that a class was written in."""
    return Path(inspect.getfile(task))


# ---- the class ----


def has_own(task: type, member: str) -> bool:
    """Whether a class has a member that is more than the outline in `Task`."""
    nothing = object()
    found = inspect.getattr_static(task, member, nothing)
    is_outline = member in CALLS and found is Task.__dict__[member]
    return found is not nothing and not is_outline


def check_signature(task: type, member: str, arguments: tuple[str, ...], what: str) -> None:
    """ValueError unless a method can be called with these arguments."""
    found = inspect.getattr_static(task, member)
    is_static = isinstance(found, staticmethod | classmethod)
    call = f"{member}({', '.join(arguments)})"
    if member in STATIC and not is_static:
        raise ValueError(
            f"{what}: {member} must be a static method, which needs no options; put @staticmethod "
            f"above it, and write def {call}"
        )
    try:
        signature = inspect.signature(getattr(task, member))
        signature.bind(*arguments if is_static else ("self", *arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {member} cannot be called as {call}: {error}") from None


def check_texts(task: type[Task], what: str) -> None:
    """ValueError for a name that no file can have, and for a flag that `r1zero grade` lacks."""
    if not isinstance(task.example, str):
        raise ValueError(f"{what}: example is {task.example!r}, expected a line of JSON")
    if not isinstance(task.name, str) or not NAME.fullmatch(task.name):
        raise ValueError(
            f"{what}: name is {task.name!r}; files are named after it, so take letters, digits, "
            "_, - and ."
        )
    flag = task.problem_flag
    if flag not in ("problem", "answer"):
        raise ValueError(f"{what}: problem_flag is {flag!r}; it must be 'problem' or 'answer'")


def option_types(task: type[Task], what: str) -> dict[str, type]:
    """The options of a task: name -> int, float, str or bool; ValueError for other types."""
    try:
        hints = get_type_hints(task)
    except (NameError, TypeError) as error:
        raise ValueError(f"{what}: the types of its options cannot be read: {error}") from None
    types = {field.name: hints[field.name] for field in fields(task) if field.init}
    for name, kind in types.items():
        if kind not in OPTION_TYPES:
            raise ValueError(
                f"{what}: its option {name} is of type {kind}; an option is an int, a float, a "
                "str or a bool"
            )
    return types


# ---- an instance ----


def make(task: type[Task], what: str, options: dict[str, Any]) -> Task:
    """An instance that has been tried; ValueError for options that it refuses, and as `check_task`.

    what: the flag with its value, for the errors.
    """
    made = attempt(lambda: task(**options), f"{what}: making the task")
    check_task(made, what)
    return made


def attempt(call: Callable[[], Any], what: str) -> Any:
    """What a call gives; ValueError, on one line, for what it raises."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # whatever the code of a user may raise
        if isinstance(error, ValueError) and type(error).__module__ == "builtins":
            raise ValueError(f"{what} refused: {error}") from error
        raise ValueError(f"{what} {raised(error)}") from error


def check_task(task: Task, what: str) -> None:
    """ValueError, on one line, for a task that does not keep the outline in base.py."""

    def ask(member: str, *arguments: Any) -> Any:
        shown = ", ".join(ascii(argument)[:60] for argument in arguments)
        call = f"{what}: {member}({shown})"
        return attempt(lambda: getattr(task, member)(*arguments), call)

    # 1. How many problems there are.
    sizes = {split: ask("size", split) for split in ("train", "test")}
    for split, size in sizes.items():
        if size is not None and (type(size) is not int or size < 0):
            raise ValueError(
                f"{what}: size({split!r}) is {size!r}; it must be a whole number, or None where "
                "problems are not counted"
            )
    if not any(size is None or size for size in sizes.values()):
        raise ValueError(f"{what}: both splits are empty; it has no problems")
    # 2. The first problem of each split, twice.
    for split, size in sizes.items():
        if size == 0:
            continue
        problem, again = ask("problem", split, 0), ask("problem", split, 0)
        check_problem(problem, what)
        prompt = ask("prompt", problem)
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{what}: a prompt is {quoted(repr(prompt))}, expected text")
        if ask("prompt", again) != prompt:
            raise ValueError(
                f"{what}: problem({split!r}, 0) is another one when it is asked again; it must "
                "follow from its options, split and index alone (stable_hash in base.py)"
            )
        if getattr(task, "prefilled", None) is not None:
            prefilled = ask("prefilled", problem)
            if not isinstance(prefilled, str):
                raise ValueError(
                    f"{what}: prefilled(problem) gave {quoted(repr(prefilled))}, expected text; "
                    "it is empty where the prompt holds nothing of the answer"
                )
    # 3. Training goes on behind the last problem.
    if sizes["train"]:
        index = sizes["train"]
        hint = f"training problems never end: take index % {index}"
        attempt(lambda: task.problem("train", index), f"{what}: {hint}; problem('train', {index})")
    # 4. Grades of what a model might say.
    for response in PROBES:
        faults = {"grade": grade_fault(ask("grade", problem, response))}
        for share in ("coherence", "language"):
            if getattr(task, share, None) is not None:
                faults[share] = share_fault(ask(share, problem, response))
        for member, fault in faults.items():
            if fault:
                raise ValueError(f"{what}: {member}(problem, {quoted(response)}) {fault}")


def check_problem(problem: Any, what: str) -> None:
    """ValueError for a problem that no line of JSON can hold, as an evaluation writes one."""
    try:
        json.dumps(asdict(problem) if is_dataclass(problem) else problem)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what}: a problem cannot be written as JSON ({error}); make it a frozen dataclass of "
            "numbers, texts and lists"
        ) from None
