"""The demo's pretraining text: worked Countdown attempts, not the skill of using their verdicts.

    3 7 9 -> 13
    <think>9+7=16,16-3=13,13-13=0 ok;9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>

In the text that is one line. Each attempt is a chain of steps that uses each number once. Its last
step subtracts the target. So the verdict (`=0 ok` or `no`) is a subtraction, which a small model
can learn, and not a comparison, which it cannot. The attempts of one document never repeat.

- Most authors are careless. They stop after a random number of attempts and answer with the last
  one, whatever its verdict. The author above has found the answer and walks past it.
- A small share is persistent. They go on until a verdict says ok, and answer with that attempt.
- Independently, a share of documents has broken or missing tags, so that a format reward has
  something to teach.

A base model trained on this text attempts, checks and answers, but stops without looking at its own
checks. What reinforcement learning must add is the use of the verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...eval.console import Bar
from ...eval.tasks.countdown import Countdown

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class CorpusConfig:
    """How the authors of the pretraining text write."""

    persistent_share: float = 0.08
    """Share of documents that go on until a verdict is ok; 0 leaves the habit out of the text."""
    broken_share: float = 0.15
    """Share of documents with a broken or missing tag."""
    max_careless_attempts: int = 4
    """Maximum number of attempts of a careless author, who stops at a random one."""
    max_attempts: int = 12
    """Maximum number of attempts of any author."""

    def __post_init__(self):
        for name in ("persistent_share", "broken_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"corpus: {name} is {share}, expected a share from 0 to 1")
        if not 1 <= self.max_careless_attempts <= self.max_attempts:
            raise ValueError(
                f"corpus: max_careless_attempts is {self.max_careless_attempts}, expected 1 to "
                f"max_attempts ({self.max_attempts})"
            )


def words(task: Countdown) -> list[str]:
    """The pieces that are one token each in the demo's tokenizer.

    They are tags, verdicts, and numbers with the sign before them. Single characters are bytes
    already.
    """
    top = min(99, task.n_numbers * task.high)  # larger numbers are two tokens
    signs = ["", " ", "=", "=-", "-", "+", ",", ";", "("]
    numbers = [sign + str(n) for sign in signs for n in range(top + 1)]
    return TAGS + [" ->", " ok", " no"] + [number for number in numbers if len(number) > 1]


# ---- attempts at a problem ----


class Term(NamedTuple):
    """A number of the pool, and the expression that made it."""

    value: int
    expression: str


def combine(larger: Term, smaller: Term, op: str) -> tuple[Term, Term, int] | None:
    """(left, right, value) of a step with two terms of the pool, None if the step is not allowed.

    The larger term is written first, but 0 is divided by the other one: nothing can be divided by
    0. Divisions must come out even.
    """
    left, right = larger, smaller
    if op == "/" and smaller.value == 0:
        left, right = smaller, larger
    if op == "+":
        return left, right, left.value + right.value
    if op == "-":
        return left, right, left.value - right.value
    if op == "*":
        return left, right, left.value * right.value
    if right.value == 0 or left.value % right.value:
        return None
    return left, right, left.value // right.value


def all_attempts(numbers: Sequence[int], target: int, ops: str) -> list[tuple[str, str, bool]]:
    """Every attempt at a problem: (its text, the expression to answer with, is it right?).

    A step takes two numbers of the pool and puts the result back; nothing goes below 0. Two orders
    of the same steps are two attempts.
    """
    found = {}

    def take_steps(pool: list[Term], text: str) -> None:
        # One number is left: subtract the target, and write the verdict.
        if len(pool) == 1:
            value, expression = pool[0]
            miss = value - target
            verdict = "no" if miss else "ok"
            found[f"{text}{value}-{target}={miss} {verdict}"] = expression, miss == 0
            return

        # Otherwise take each pair and each operation, and go on with what is left.
        for i in range(len(pool)):
            for j in range(i + 1, len(pool)):
                larger, smaller = sorted((pool[i], pool[j]), key=lambda term: -term.value)
                rest = pool[:i] + pool[i + 1 : j] + pool[j + 1 :]
                for op in ops:
                    step = combine(larger, smaller, op)
                    if step is None:
                        continue
                    left, right, value = step
                    expression = f"{left.expression}{op}{right.expression}"
                    if rest:
                        expression = f"({expression})"
                    written = f"{text}{left.value}{op}{right.value}={value},"
                    take_steps([*rest, Term(value, expression)], written)

    take_steps([Term(number, str(number)) for number in numbers], "")
    return [(text, expression, ok) for text, (expression, ok) in found.items()]


# ---- documents ----


def break_format(response: str, rng: np.random.Generator) -> str:
    """One of the slips that a format reward punishes.

    A tag is left out or replaced by another, the answer has no tags, or a tag follows it.
    """
    slip = rng.integers(4)
    tag = TAGS[rng.integers(4)]
    if slip == 0:
        return response.replace(tag, "")
    if slip == 1:
        return response.replace(tag, TAGS[rng.integers(4)])
    if slip == 2:
        return response.replace("<answer>", "").replace("</answer>", "")
    return response + TAGS[rng.integers(4)]


def document(task: Countdown, index: int, config: CorpusConfig, seed: int) -> tuple[str, str]:
    """(prompt, response) number `index` of the corpus, a fixed function of (seed, index).

    The problem is one to train on, never a held-out one.
    """
    problem = task.problem("train", index)
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    attempts = all_attempts(problem.numbers, problem.target, task.ops)
    order = rng.permutation(len(attempts))[: config.max_attempts]

    # How many attempts the author writes: up to the first ok, or a random number.
    if rng.random() < config.persistent_share:
        hits = [i for i, attempt in enumerate(order) if attempts[attempt][2]]
        n_attempts = hits[0] + 1 if hits else len(order)
    else:
        n_attempts = int(rng.integers(1, config.max_careless_attempts + 1))
        n_attempts = min(n_attempts, len(order))

    written = [attempts[attempt] for attempt in order[:n_attempts]]
    think = ";".join(text for text, _, _ in written)
    _, answer, _ = written[-1]
    response = f"<think>{think}</think><answer>{answer}</answer>"
    if rng.random() < config.broken_share:
        response = break_format(response, rng)
    return task.prompt(problem), response


def documents(task: Countdown, n: int, config: CorpusConfig, seed: int) -> list[str]:
    """The first n documents as text, with a progress bar."""
    indexes = Bar(range(n), desc="corpus", unit="doc")
    return ["".join(document(task, index, config, seed)) for index in indexes]
