"""A task is a prompt, a generator and a grader: what every task offers, and how to make one by name.

Problems are counter-based: problem = f(dials, split, index), so runs repeat and resume exactly. The split is
decided by a hash of the problem itself and of nothing else: a problem that is held out is held out for every
seed, and a base model that was trained on one setting of the dials has not seen the test problems of another.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

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
    """What the training loops and the harness use. Problems are frozen dataclasses, each task has its own."""

    name: str

    def problem(self, split: str, index: int) -> Any:
        """Problem `index` (from 0) of "train" or "test"; ValueError if there is no such split or index."""
        ...

    def prompt(self, problem: Any) -> str:
        """The text the model continues."""
        ...

    def grade(self, problem: Any, response: str) -> Grade:
        """Judge one response. Never raises, whatever the text is, and takes time linear in its length."""
        ...

    def size(self, split: str) -> int | None:
        """How many different problems the split holds; None if they are drawn from an uncounted space."""
        ...

    def problems(self, split: str, n: int, start: int = 0) -> list[Any]:
        """Problems start .. start + n - 1 of a split."""
        return [self.problem(split, index) for index in range(start, start + n)]


def check_position(split: str, index: int) -> None:
    """ValueError unless `split` is a known one and `index` is not negative."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of: {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"problem index is {index}; it must be 0 or more")


def stable_hash(*key: Any) -> int:
    """64 bits of `key` (strings, integers, tuples of them), the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def is_held_out(key: Any, test_share: float) -> bool:
    """Whether the problem `key` is in the test split. A larger share keeps what a smaller one held out."""
    return stable_hash("split", key) < test_share * 2**64


@lru_cache(maxsize=8)
def permutation(n: int, *key: Any) -> tuple[int, ...]:
    """The numbers 0 .. n - 1 in an order that is a function of `key`; the last few are kept."""
    return tuple(sorted(range(n), key=lambda i: stable_hash("order", key, i)))
