"""The demo's pretraining text: worked Countdown attempts with reasoning, but not the skill of using it.

    3 7 9 -> 13<think>9+7=16,16-3=13,13-13=0 ok;9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>

Each attempt is a chain of steps that uses every number once; its last step takes the target off, so the
verdict (`=0 ok` or `no`) is a subtraction, which a small model can learn, and not a comparison, which it can
not. Attempts of one document never repeat. Three kinds of author write:
- most are careless: they stop after a random number of attempts and answer with the last, whatever its
  verdict (the document above has found the answer and walks past it);
- a small share is persistent: it goes on until a verdict says ok, and answers with that;
- independently, a share of documents has broken or missing tags, so that a format reward has something to
  teach.
So a base model trained on this text attempts, checks and answers, but stops without looking at its own
checks. What reinforcement learning must add is the use of the verdict.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ...eval.tasks.countdown import Countdown

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


@dataclass(frozen=True)
class CorpusConfig:
    """Dials of the pretraining text."""

    persistent_share: float = 0.08
    """Share of documents that go on until a verdict is ok; 0 leaves the habit out of the text altogether."""
    broken_share: float = 0.15
    """Share of documents with a broken or missing tag."""
    max_careless_attempts: int = 4
    """Careless authors stop after 1 to this many attempts, each equally likely."""
    max_attempts: int = 12
    """Nobody writes more attempts than this."""

    def __post_init__(self):
        for name in ("persistent_share", "broken_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"corpus: {name} is {getattr(self, name)}, expected a share from 0 to 1"
                )
        if not 1 <= self.max_careless_attempts <= self.max_attempts:
            raise ValueError(
                f"corpus: max_careless_attempts is {self.max_careless_attempts}, expected 1 to "
                f"max_attempts ({self.max_attempts})"
            )


def words(task: Countdown) -> list[str]:
    """Pieces that are one token each in the demo's tokenizer: tags, verdicts, and numbers with the sign
    before them."""
    top = min(99, task.n_numbers * task.high)  # larger numbers are two tokens
    signs = ["", " ", "=", "=-", "-", "+", ",", ";", "("]
    numbers = [sign + str(n) for sign in signs for n in range(top + 1)]
    return TAGS + [" ->", " ok", " no"] + [n for n in numbers if len(n) > 1]


def all_attempts(numbers, target: int, ops: str) -> list[tuple[str, str, bool]]:
    """Every attempt at a problem: (its text, the expression to answer with, whether it hits the target).

    A step takes two numbers of the pool and puts the result back; the larger is written first (but 0/7=0),
    divisions must come out even, and nothing goes below 0.
    """
    found = {}

    def step(pool, text):  # pool: (value, expression) pairs
        if len(pool) == 1:
            value, expression = pool[0]
            miss = value - target
            found[f"{text}{value}-{target}={miss} {'no' if miss else 'ok'}"] = (
                expression,
                miss == 0,
            )
            return
        for i in range(len(pool)):
            for j in range(i + 1, len(pool)):
                larger, smaller = sorted((pool[i], pool[j]), key=lambda x: -x[0])
                rest = pool[:i] + pool[i + 1 : j] + pool[j + 1 :]
                for op in ops:
                    turned = (
                        op == "/" and smaller[0] == 0
                    )  # 0 can be divided, nothing can be divided by it
                    (a, a_text), (b, b_text) = (smaller, larger) if turned else (larger, smaller)
                    if op == "/" and (b == 0 or a % b):
                        continue
                    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
                    whole = f"{a_text}{op}{b_text}"
                    step(
                        [*rest, (value, f"({whole})" if rest else whole)],
                        f"{text}{a}{op}{b}={value},",
                    )

    step([(n, str(n)) for n in numbers], "")
    return [(text, expression, ok) for text, (expression, ok) in found.items()]


def break_format(response: str, rng: np.random.Generator) -> str:
    """One of the slips that a format reward punishes: a tag left out, turned into another, or something after
    it."""
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
    """(prompt, response) number `index` of the corpus, a fixed function of (seed, index). Training problems
    only."""
    problem = task.problem("train", index)
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    attempts = all_attempts(problem.numbers, problem.target, task.ops)
    order = rng.permutation(len(attempts))[: config.max_attempts]
    if rng.random() < config.persistent_share:
        hits = [i for i, a in enumerate(order) if attempts[a][2]]
        n = hits[0] + 1 if hits else len(order)
    else:
        n = min(int(rng.integers(1, config.max_careless_attempts + 1)), len(order))
    written = [attempts[a] for a in order[:n]]
    response = f"<think>{';'.join(a[0] for a in written)}</think><answer>{written[-1][1]}</answer>"
    if rng.random() < config.broken_share:
        response = break_format(response, rng)
    return task.prompt(problem), response


def documents(task: Countdown, n: int, config: CorpusConfig, seed: int) -> list[str]:
    """The first n documents as text, with a progress bar."""
    numbers = tqdm(range(n), desc="corpus", unit="doc", dynamic_ncols=True)
    return ["".join(document(task, index, config, seed)) for index in numbers]
