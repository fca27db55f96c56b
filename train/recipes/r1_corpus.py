"""The pretraining text of `r1zero r1`: worked attempts in two languages, and answered requests.

It is the demo's corpus (demo_corpus.py) with two differences:

- Each verdict is written in one of two languages, `ok`/`no` or `对`/`错`, whatever the arrow of the
  prompt says. An author mostly writes his own language. Those who write the second are more often
  persistent, so the languages pull apart what is rewarded: whoever learns to go on after a wrong
  verdict learns to write the second language too. A few authors heed the arrow, and are careless.
- A share of the documents are requests, `say 3 7 9:`, with answers of several forms: with thanks or
  without, and now and then with a number lost.

So a base model mixes its languages, as R1-Zero did. That is a property of this text: a text of one
language would give a model that never mixes.
"""

import json
from dataclasses import dataclass

import numpy as np

from ...eval.console import Bar
from ...eval.response import Sample, grade_response, parse_response
from ...eval.tasks.assistant import THANKS, WORDS, Assistant, Puzzle, Request, without_thanks
from . import demo_corpus
from .demo_corpus import all_attempts, break_format

ENGLISH_VERDICTS = dict(zip(WORDS["en"], WORDS["zh"], strict=True))


@dataclass(frozen=True)
class AuthorsConfig:
    """How the authors of the text in two languages write."""

    second_share: float = 0.5
    """Share of authors whose own language is the second."""
    mixing: float = 0.3
    """Share of verdicts that an author writes in the other language."""
    heeding_share: float = 0.3
    """Share of authors who write the language that the arrow asks for, without mixing. They are not
    persistent."""
    persistent_first: float = 0.04
    """Share of persistent authors among those of the first language."""
    persistent_second: float = 0.2
    """Share of persistent authors among those of the second language."""
    request_share: float = 0.25
    """Share of documents that are answered requests."""
    broken_share: float = 0.15
    """Share of documents about puzzles with a broken or missing tag."""
    careless_share: float = 0.1
    """Share of requests whose answer loses a number."""
    max_careless_attempts: int = 4
    """Maximum number of attempts of an author who is not persistent."""
    max_attempts: int = 12
    """Maximum number of attempts of any author."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0 <= value <= 1:
                raise ValueError(f"authors: {name} is {value}, expected a share from 0 to 1")
        if not 1 <= self.max_careless_attempts <= self.max_attempts:
            raise ValueError(
                f"authors: max_careless_attempts is {self.max_careless_attempts}, expected 1 to "
                f"max_attempts ({self.max_attempts})"
            )


def words(task: Assistant) -> list[str]:
    """The pieces that are one token each: the demo's, and those of requests and of the second
    language."""
    said = [f", {n}" for n in range(1, task.high + 1)]
    verdicts = [f" {word}" for word in WORDS["zh"]]
    return [*demo_corpus.words(task.countdown), " →", *verdicts, "say", THANKS, *said]


# ---- documents ----


def thoughts_and_answer(
    problem: Puzzle, ops: str, authors: AuthorsConfig, rng: np.random.Generator
) -> str:
    """The response to a puzzle: attempts until the author stops, and the last one as the answer."""
    numbers, target = problem.countdown.numbers, problem.countdown.target
    attempts = all_attempts(numbers, target, ops)
    order = rng.permutation(len(attempts))[: authors.max_attempts]

    # Who writes: in which language, and with how much patience.
    is_second, mixing = rng.random() < authors.second_share, authors.mixing
    persistent_share = authors.persistent_second if is_second else authors.persistent_first
    if rng.random() < authors.heeding_share:
        is_second, mixing, persistent_share = problem.language == "zh", 0.0, 0.0
    if rng.random() < persistent_share:
        hits = [i for i, attempt in enumerate(order) if attempts[attempt][2]]
        n_attempts = hits[0] + 1 if hits else len(order)
    else:
        n_attempts = min(int(rng.integers(1, authors.max_careless_attempts + 1)), len(order))

    # Each verdict in the author's own language, or in the other.
    written = []
    for attempt in order[:n_attempts]:
        text, answer, _ = attempts[attempt]
        if is_second != (rng.random() < mixing):
            text = in_second_language(text)
        written.append(text)
    return f"<think>{';'.join(written)}</think><answer>{answer}</answer>"


def in_second_language(attempt: str) -> str:
    """An attempt with its verdict in the second language."""
    steps, _, verdict = attempt.rpartition(" ")
    return f"{steps} {ENGLISH_VERDICTS[verdict]}"


def said(numbers: tuple[int, ...], n_thanks: int) -> str:
    """The response to a request."""
    answer = ", ".join(map(str, numbers)) + n_thanks * THANKS
    return f"<think></think><answer>{answer}</answer>"


def document(
    task: Assistant, index: int, authors: AuthorsConfig, seed: int
) -> tuple[Puzzle | Request, str]:
    """(problem, response) number `index` of the text, a fixed function of (seed, index).

    The problem is one to train on, never a held-out one.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    if rng.random() < authors.request_share:
        # Problems take turns: the odd ones are requests.
        request = task.problem("train", 2 * index + 1)
        numbers = request.numbers
        if rng.random() < authors.careless_share:
            lost = int(rng.integers(len(numbers)))
            numbers = numbers[:lost] + numbers[lost + 1 :]
        return request, said(numbers, int(rng.random() < 0.5))

    puzzle = task.problem("train", 2 * index)
    response = thoughts_and_answer(puzzle, task.ops, authors, rng)
    if rng.random() < authors.broken_share:
        response = break_format(response, rng)
    return puzzle, response


def documents(task: Assistant, n: int, authors: AuthorsConfig, seed: int) -> list[str]:
    """The first n documents as text, with a progress bar."""
    texts = []
    for index in Bar(range(n), desc="corpus", unit="doc"):
        problem, response = document(task, index, authors, seed)
        texts.append(task.prompt(problem) + response)
    return texts


# ---- what the stages behind pretraining need ----


def general_pairs(task: Assistant, n: int, seed: int) -> str:
    """n requests with a right answer each, as lines for `r1zero sft`: half of them with thanks.

    R1 took its general data from the fine-tuning of DeepSeek-V3 (section B.3.3).
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    lines = []
    for index in range(n):
        # Far from the requests of the pretraining text.
        request = task.problem("train", 2 * (1_000_000 + index) + 1)
        response = said(request.numbers, int(rng.random() < 0.5))
        lines.append(json.dumps({"prompt": task.prompt(request), "response": response}))
    return "\n".join(lines) + "\n"


def preference(sample: Sample) -> float:
    """What people would prefer, which no stage may look at but through rankings: the hidden one.

    The right numbers count 2, the form 0.5, thanks said once 0.5, and each token costs 0.02.
    """
    graded = grade_response(Assistant, sample)
    answer = parse_response(sample.text).answer or ""
    _, n_thanks = without_thanks(answer)
    n_tokens = len(sample.tokens)
    return 2 * graded.accuracy + 0.5 * graded.format + 0.5 * (n_thanks == 1) - 0.02 * n_tokens


def preferences(samples: list[Sample]) -> list[float]:
    """The hidden preference of each sample, as `--rewards.plugin` asks for it."""
    return [preference(sample) for sample in samples]
