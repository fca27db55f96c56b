"""What every task offers (a prompt, a generator of problems, a grader), and shared helpers.

Problems are counter-based: problem = f(options, split, index), so runs repeat and resume exactly. A
hash of the problem alone decides its split. A held-out problem is therefore held out for every
seed, and a base model that was trained with one set of options has not seen the test problems of
another.

A task is a frozen dataclass with the members of `Task`. One of your own stands in a module of your
own, and `--task my_module:MyTask` finds it there (own.py, train/recipes/own_task.py); one of ours
has a line in `TASKS` in catalogue.py. The command line needs nothing more: the fields of the
dataclass are the task's `--options`, and a field `path` is its `--data`.

Left out: partial credit. A grader says right or wrong, and its reason.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Grade:
    accuracy: float
    """1.0 if the answer is right, else 0.0."""
    answer: str | None
    """What was read as the answer, None if nothing was."""
    why: str
    """One plain sentence: what made it right or wrong."""


class Task(Protocol):
    """What the training loops, the harness and `r1zero grade` use.

    Problems are frozen dataclasses, and each task has its own. What needs a problem but none of the
    options is a static method: the class itself can read a problem and grade a response, without a
    list of problems.
    """

    name: ClassVar[str]
    """The value of --task that chooses this task."""
    example: ClassVar[str]
    """A line of JSON that `r1zero grade --input` reads: the fields of a problem, and a response."""
    problem_flag: ClassVar[str] = "problem"
    """The flag of `r1zero grade` whose text `problem_from_text` reads: "problem", or "answer" for a
    task whose grader needs only the right answer."""
    file_format: ClassVar[str | None] = None
    """What the file of a task with an option `path` holds; None for a task without one. Such a task
    has an option `skip_bad` too."""
    coherence: ClassVar[Callable[[Any, str], float] | None] = None
    """A static method, from a problem and a response to the share of its steps that are true; None
    for a task without steps that could be checked."""
    language: ClassVar[Callable[[Any, str], float] | None] = None
    """A static method, from a problem and a response to the share of the words of its thoughts that
    are in the language that was asked for; None where the script of the question's words tells."""
    prefilled: ClassVar[Callable[[Any], str] | None] = None
    """A static method, from a problem to what of the answer its prompt holds already, such as
    `<think>`; None where no prompt does. It is put in front of the response that is judged."""
    judged_by_model: ClassVar[Callable[[Any], bool] | None] = None
    """A static method, from a problem to whether a reward model judges its answers, and no rule;
    None for a task that leaves that to the weights of the reward. Without --rewards.model it says
    nothing."""
    step_ends: ClassVar[Callable[[str, bool], list[int]] | None] = None
    """A static method, from a response and whether it ended by itself to the number of characters
    up to the end of each of its steps; None for a task whose answers have no steps that a process
    reward could judge. Such a task has `check_step(problem, steps)` too, which tells of the last of
    these texts whether it is right so far (a StepCheck: steps.py)."""
    lines_skipped: int = 0
    """How many bad lines of that file were left out."""
    held_out: bool = True
    """Whether the test problems are others than the training problems."""

    def problem(self, split: str, index: int) -> Any:
        """Problem `index` (from 0) of "train" or "test"; ValueError if there is none.

        Training problems never end: behind the last one of a list they begin again (index % size).
        """
        ...

    def problems(self, split: str, n: int, start: int = 0) -> list[Any]:
        """Problems start .. start + n - 1 of a split."""
        return [self.problem(split, index) for index in range(start, start + n)]

    def size(self, split: str) -> int | None:
        """How many different problems the split holds; None if they are not counted."""
        ...

    def prompt(self, problem: Any) -> str:
        """The text that the model continues."""
        ...

    @staticmethod
    def grade(problem: Any, response: str) -> Grade:
        """Judge one response, any text at all. Never raises; linear in the text's length.

        response: as `response_text` spells it, special tokens too. That it was cut off costs the
        reward for the form (`grade_response`), not this one.

        A base model may run on into another question of the prompt's form, and answer that: the
        answer is looked for before it (`own_response` in response.py).
        """
        ...

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two answers that `grade` has read are one and the same, for a vote among them.

        Two that are the same must have the same grade. The harness asks an instance, so this may be
        a method that looks at the options.
        """
        return answer.strip() == other.strip()

    @staticmethod
    def problem_from_text(text: str) -> Any:
        """The problem that a user typed; ValueError, with what was expected, for any other text."""
        ...

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> Any:
        """The problem in an object of JSON; ValueError for a field missing or of the wrong kind."""
        ...


def required_fields(record: Mapping[str, Any], *names: str) -> list[Any]:
    """The values of `names` in an object of JSON. ValueError for one that is missing or null."""
    values = [record.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise ValueError(f'"{name}" is missing')
    return values


def check_position(split: str, index: int) -> None:
    """ValueError unless `split` is a known one and `index` is not negative."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of: {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"problem index is {index}; it must be 0 or more")


def check_ops(task: str, ops: str, allowed: str) -> None:
    """ValueError unless `ops` is some of the `allowed` operations, each at most once."""
    chosen = set(ops)
    if not ops or not chosen <= set(allowed) or len(chosen) < len(ops):
        raise ValueError(f"{task}: ops is {ops!r}; it must be some of {allowed}, each once")


def check_test_share(task: str, test_share: float) -> None:
    """ValueError unless both splits get a share of the problems."""
    if not 0 < test_share < 1:
        raise ValueError(f"{task}: test_share is {test_share}; it must lie between 0 and 1")


def stable_hash(*key: Any) -> int:
    """64 bits of `key` (strings, integers, tuples), the same on every machine and in every run."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def is_held_out(key: Any, test_share: float) -> bool:
    """Whether `key` is in the test split. A larger share keeps what a smaller one held out."""
    return stable_hash("split", key) < test_share * 2**64


@lru_cache(maxsize=8)
def permutation(n: int, *key: Any) -> tuple[int, ...]:
    """The numbers 0 .. n - 1 in an order that is a function of `key`; the last few are kept."""
    return tuple(sorted(range(n), key=lambda i: stable_hash("order", key, i)))
