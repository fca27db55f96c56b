"""What tasks share that read their problems from a file: which are trained on, which are held out.

    --data FILE --options test=FILE2     train on one file, test on the other
    --data FILE --options test_share=0.2 train on most of the file, test on the rest
    --data FILE, with a share of 0       all of the file is both: to evaluate, or to train alone

With a share, a hash of the question alone decides, as in every task: equal questions are on the
same side, and a file that grows keeps what it held out. With two files, a training problem whose
question stands in the test file too is left out. Two questions are equal if their words are.

Left out: files too large for memory, and problems that are made while a run goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from ..console import say
from ..lines import Kept, parse_lines, read_lines
from .base import Task, check_position, is_held_out, permutation
from .prompts import check_template


class Splits(NamedTuple):
    """The problems of a task."""

    train: Sequence[Any]
    test: Sequence[Any]
    n_skipped: int
    """How many bad lines were left out of the files."""


@dataclass(frozen=True)
class FileTask(Task):
    """A task over one file or two, which are read at once; ValueError if they cannot be used.

    A task says how a line is read (`parse_line`) and what the question of a problem is.
    """

    templates: ClassVar[tuple[str, ...]]
    """The values of the option `template`."""

    path: str
    """A file of JSON lines."""
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

    def _read(self, path: str) -> Kept[Any]:
        lines = read_lines(path)
        return parse_lines(path, lines, self.parse_line, self.file_format, self.skip_bad).values()

    def _key(self, problem: Any) -> str:
        return " ".join(self.question(problem).split())

    @cached_property
    def _splits(self) -> Splits:
        given = self._read(self.path)
        if self.test:
            return self._without_leaks(given, self._read(self.test))
        if not self.test_share:
            return Splits(given, given, given.n_skipped)
        train, test = [], []
        for problem in given:
            side = test if is_held_out(self._key(problem), self.test_share) else train
            side.append(problem)
        if not train or not test:
            lacking = "test" if train else "training"
            raise ValueError(
                f"{self.name}: a test_share of {self.test_share:g} leaves no {lacking} problem of "
                f"the {len(given)} in {self.path}; give more lines, another test_share (0 holds "
                "nothing out), or test=FILE"
            )
        return Splits(train, test, given.n_skipped)

    def _without_leaks(self, train: Kept[Any], test: Kept[Any]) -> Splits:
        """Both files, without the training problems that are test problems too."""
        held_out = {self._key(problem) for problem in test}
        kept = [problem for problem in train if self._key(problem) not in held_out]
        if not kept:
            raise ValueError(
                f"{self.name}: every problem of {self.path} stands in {self.test} too; nothing is "
                "left to train on"
            )
        if len(kept) < len(train):
            say(
                f"{self.path}: left out {len(train) - len(kept):,} of {len(train):,} problems, "
                f"which stand in {self.test} too"
            )
        return Splits(kept, test, train.n_skipped + test.n_skipped)

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
