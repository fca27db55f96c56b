"""A task and a reward of your own: copy this file, and change the four things in it.

    python -m r1zero.train.recipes.own_task corpus.jsonl        # 1. text to pretrain on
    r1zero pretrain --run runs/picks --data corpus.jsonl --tokenizer bytes --steps 300
    r1zero grpo --run runs/largest --base runs/picks --max-new-tokens 60 \\
        --task r1zero.train.recipes.own_task:Largest \\
        --rewards.plugin r1zero.train.recipes.own_task:short_thoughts --rewards.plugin-weight 0.1
    r1zero eval --run runs/largest --task r1zero.train.recipes.own_task:Largest

A copy called my_task.py in the current folder is my_task:Largest. (In the copy, the imports begin
with `from r1zero.` for `from ...`.) Its task is to name the largest of some numbers. The authors of
its text know the form of an answer, and pick any of the numbers; RL finds out that picking the
largest pays.

Left out: a base that knows your task from real text. Any checkpoint will do that is right now and
then; one that is never right learns nothing.
"""

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...eval.response import Sample, parse_response, quoted
from ...eval.tasks.base import Grade, Task, is_held_out, required_fields, stable_hash
from ...eval.tasks.numbers import read_number, whole_in_file
from ...eval.tasks.prompts import TEMPLATES

MAX_TRIES = 1000
EXPECTED_THOUGHTS = 40  # characters; longer thoughts earn nothing


# ---- 1. A problem: all that the prompt and the grader need. ----


@dataclass(frozen=True)
class Numbers:
    numbers: tuple[int, ...]


# ---- 2. The task: its options, its problems, its prompt, its grader. ----


@dataclass(frozen=True)
class Largest(Task):
    """Name the largest of some numbers."""

    name: ClassVar[str] = "largest"
    example: ClassVar[str] = '{"numbers": [3, 8, 5], "response": "<answer>8</answer>"}'

    # Each field is an option: --options n_numbers=4 high=999
    n_numbers: int = 3
    """How many numbers there are."""
    high: int = 99
    """The largest number that there can be."""
    test_share: float = 0.2
    """Share of all problems that is held out for testing."""

    def __post_init__(self):
        if self.n_numbers < 2 or self.high < 9:
            raise ValueError(
                f"largest: n_numbers is {self.n_numbers} and high {self.high}; they must be 2 or "
                "more, and 9 or more"
            )

    def size(self, split: str) -> None:
        """None: problems are sampled, not listed."""

    def problem(self, split: str, index: int) -> Numbers:
        """Problem `index` of a split. It is the same each time that it is asked for."""
        for attempt in range(MAX_TRIES):
            hashes = [stable_hash(split, index, attempt, i) for i in range(self.n_numbers)]
            numbers = tuple(number % (self.high + 1) for number in hashes)
            # The same numbers in another order are on the same side.
            if is_held_out(tuple(sorted(numbers)), self.test_share) == (split == "test"):
                return Numbers(numbers)
        raise ValueError(f"largest: no {split} problem in {MAX_TRIES} tries; raise high")

    @staticmethod
    def prompt(problem: Numbers) -> str:
        """`largest of 3 8 5: `"""
        return f"largest of {' '.join(map(str, problem.numbers))}: "

    @staticmethod
    def grade(problem: Numbers, response: str) -> Grade:
        """Right if the answer is the largest. Any text may come, and none may raise."""
        # What the model writes behind its answer, perhaps to another question, is not read.
        own = TEMPLATES["plain"].own_part("", response)
        answer = parse_response(own).answer
        if answer is None:
            return Grade(0.0, None, "There is no complete <answer>...</answer> block.")
        largest = max(problem.numbers)
        if read_number(answer) != largest:
            return Grade(0.0, answer, f"The answer is {quoted(answer)}, not {largest}.")
        return Grade(1.0, answer, f"The answer is {largest}.")

    # For `r1zero grade`: a problem that was typed, and one in a line of JSON.

    @staticmethod
    def problem_from_text(text: str) -> Numbers:
        """The problem of `3 8 5`."""
        return Largest.problem_from_record({"numbers": text.split()})

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> Numbers:
        """The problem of {"numbers": [3, 8, 5]}."""
        [numbers] = required_fields(record, "numbers")
        if not isinstance(numbers, list) or not numbers:
            raise ValueError(f"expected a list of numbers, got {quoted(repr(numbers))}")
        return Numbers(tuple(whole_in_file(number) for number in numbers))


# ---- 3. A reward: one number per sample, added to those for accuracy and format. ----


def short_thoughts(samples: Sequence[Sample]) -> list[float]:
    """1 for no thoughts at all, down to 0 for those of EXPECTED_THOUGHTS characters and more."""
    lengths = [len(parse_response(sample.text).think or "") for sample in samples]
    return [max(0.0, 1.0 - length / EXPECTED_THOUGHTS) for length in lengths]


# ---- 4. Text to pretrain on: the form of an answer, without the skill. ----


def document(task: Largest, index: int) -> str:
    """A training problem, answered with any of its numbers."""
    problem = task.problem("train", index)
    rng = random.Random(index)
    seen = rng.sample(problem.numbers, rng.randint(1, task.n_numbers))
    thoughts = " ".join(map(str, seen))
    return f"{task.prompt(problem)}<think>{thoughts}</think><answer>{seen[-1]}</answer>"


def write_corpus(path: str, n_documents: int = 4000) -> None:
    """Write a file of JSON lines with `text`, as `r1zero pretrain --data` reads it."""
    task = Largest()
    with open(path, "w", encoding="utf-8") as file:
        for index in range(n_documents):
            file.write(json.dumps({"text": document(task, index)}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m r1zero.train.recipes.own_task corpus.jsonl")
    write_corpus(sys.argv[1])
