"""What tasks share that read their problems from a file: which are trained on, which are held out.

    --data FILE --options test=FILE2     train on one file, test on the other
    --data FILE --options test_share=0.2 train on most of the file, test on the rest
    --data FILE, with a share of 0       all of the file is both: to evaluate, or to train alone

With a share, a hash of the question alone decides, as in every task: equal questions are on the
same side, and a file that grows keeps what it held out.

A training problem whose question is held out too would make the test worthless, so it is an error:
two questions are one if their words are, in capitals or not. `skip_held_out=true` leaves such
problems out of the training problems. The same question in other words is not found.

Left out: files too large for memory, and problems that are made while a run goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from ..console import say
from ..lines import Line, Parsed, parse_lines, read_lines
from .base import Task, check_position, is_held_out, permutation
from .hub import is_on_hub, read_hub
from .prompts import check_template

Numbered = Sequence[tuple[int, Any]]  # (number of the line, problem)


class Splits(NamedTuple):
    """The problems of a task."""

    train: Sequence[Any]
    test: Sequence[Any]
    n_skipped: int
    """How many bad lines were left out of the files."""


def read_problems(path: str) -> list[Line]:
    """The lines of a file, or of a data set on the Hugging Face hub; ValueError as each of them."""
    return read_hub(path) if is_on_hub(path) else read_lines(path)


@dataclass(frozen=True)
class FileTask(Task):
    """A task over one file or two, which are read at once; ValueError if they cannot be used.

    A task says how a line is read (`parse_line`) and what the question of a problem is.
    """

    templates: ClassVar[tuple[str, ...]]
    """The values of the option `template`."""

    path: str
    """A file of JSON lines, or hub:OWNER/NAME (hub.py)."""
    skip_bad: bool = False
    """Go on without the lines of the files that are bad, and count them."""
    test: str = ""
    """A second file, whose problems are the test problems; then the first is trained on whole."""
    test_share: float = 0.0
    """Share of the questions that is held out for testing. With 0, nothing is: the whole file is
    there for training and for testing. Not used with `test`."""
    template: str = "plain"
    """How a question is put to the model (prompts.py)."""
    seed: int = 0
    """Changes the order of the training problems."""
    skip_held_out: bool = False
    """Leave out training problems that are held out too, instead of an error."""

    def __post_init__(self):
        """Raises ValueError for an option out of range, and for files that cannot be used."""
        try:
            check_template(self.template, self.templates)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if not 0 <= self.test_share < 1:
            raise ValueError(
                f"{self.name}: test_share is {self.test_share}; it must be 0 or more and below 1"
            )
        # Read the files now, so that a bad one is named before the work begins.
        self.size("test")

    def parse_line(self, line: str) -> Any:
        """The problem of a line; ValueError, with the reason, for a bad line."""
        raise NotImplementedError

    @staticmethod
    def question(problem: Any) -> str:
        """What is asked: by this a problem is known on both sides of a split."""
        raise NotImplementedError

    # ---- the splits ----

    def _read(self, path: str) -> Parsed[Any]:
        lines = read_problems(path)
        return parse_lines(path, lines, self.parse_line, self.file_format, self.skip_bad)

    def _key(self, problem: Any) -> str:
        return " ".join(self.question(problem).split())

    @cached_property
    def _splits(self) -> Splits:
        given = self._read(self.path)
        if self.test:
            test = self._read(self.test)
            train = self._without_leaks(given, test)
            return Splits(train, test.values(), given.n_skipped + test.n_skipped)
        if not self.test_share:
            return Splits(given.values(), given.values(), given.n_skipped)
        train, test = [], []
        for number, problem in given:
            side = test if is_held_out(self._key(problem), self.test_share) else train
            side.append((number, problem))
        if not train or not test:
            lacking = "test" if train else "training"
            raise ValueError(
                f"{self.name}: a test_share of {self.test_share:g} leaves no {lacking} problem of "
                f"the {len(given)} in {self.path}; give more lines, another test_share (0 holds "
                "nothing out), or test=FILE"
            )
        kept = self._without_leaks(train, test)
        return Splits(kept, [problem for _, problem in test], given.n_skipped)

    def _without_leaks(self, train: Numbered, test: Numbered) -> list[Any]:
        """The training problems, none of which is held out too.

        ValueError for one that is, unless they are left out, and if nothing is left.
        """
        # The line of each question that is held out, in capitals or not.
        held_out = {self._key(problem).casefold(): number for number, problem in test}
        kept, leaks = [], []
        for number, problem in train:
            line = held_out.get(self._key(problem).casefold())
            if line is None:
                kept.append(problem)
            else:
                leaks.append((number, line))
        if not leaks:
            return kept
        where = self.test or self.path
        if not kept:
            raise ValueError(
                f"{self.name}: every problem of {self.path} stands in {where} too; nothing is "
                "left to train on"
            )
        count = f"{len(leaks):,} of {len(train):,} problems"
        if not self.skip_held_out:
            shown = ", ".join(
                f"line {number} (held out in line {line})" for number, line in leaks[:2]
            )
            raise ValueError(
                f"{self.name}: {count} of {self.path} stand among those held out in {where} too: "
                f"{shown}{', ...' if len(leaks) > 2 else ''}; --options skip_held_out=true trains "
                "without them"
            )
        say(f"{self.path}: left out {count}, which stand in {where} too")
        return kept

    # ---- what a task offers ----

    @property
    def held_out(self) -> bool:
        """Whether the test problems are others than the training problems."""
        return bool(self.test or self.test_share)

    @property
    def lines_skipped(self) -> int:
        """How many bad lines of the files were left out."""
        return self._splits.n_skipped

    def size(self, split: str) -> int:
        """How many problems the split holds."""
        check_position(split, 0)
        return len(getattr(self._splits, split))

    def problem(self, split: str, index: int) -> Any:
        """Training problems never end: each epoch has all of them, each time in another order.

        Test problems come in the order of the file, and end with it (ValueError).
        """
        check_position(split, index)
        problems = getattr(self._splits, split)
        if split == "train":
            epoch, position = divmod(index, len(problems))
            return problems[permutation(len(problems), self.seed, epoch)[position]]
        if index >= len(problems):
            raise ValueError(
                f"{self.name}: test problem {index} asked for, but there are {len(problems)}"
            )
        return problems[index]
