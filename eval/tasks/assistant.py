"""The toy world of R1's later stages: sums to think about in two languages, and plain requests.

    a puzzle     3 7 9 -> 13        <think>9+7=16,16-3=13,13-13=0 ok</think><answer>(9+7)-3</answer>
    the same     3 7 9 → 13         <think>9+7=16,16-3=13,13-13=0 对</think><answer>(9+7)-3</answer>
    a request    say 3 7 9:         <think></think><answer>3, 7, 9 thanks</answer>

A puzzle is Countdown. Its arrow tells the language in which to think: the words of the two
languages are the verdicts, `ok` and `no`, or `对` and `错`. A request needs no thoughts, and its
answer has more than one right form, so there is something to prefer (train/recipes/r1_corpus.py).

A request is right if its answer says the numbers in their order, joined by commas, with or without
words of thanks behind them. There is no rule for which of the right ones is better.

Left out: requests in the second language.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ..language import share_of_words
from ..response import (
    WHITE_SPACE,
    own_response,
    parse_response,
    quoted,
    without_last_answer,
)
from .base import Grade, Task, check_position, is_held_out, required_fields, stable_hash
from .countdown import Countdown, CountdownProblem
from .numbers import whole_in_file

ARROWS = {"en": "->", "zh": "→"}
# The words of each language. Each is one token of the toy's tokenizer.
WORDS = {"en": ("ok", "no"), "zh": ("对", "错")}
LANGUAGE_OF = {word: language for language, words in WORDS.items() for word in words}
WORD = re.compile("|".join(LANGUAGE_OF))
KINDS = ("puzzles", "requests", "both")
LANGUAGES = (*ARROWS, "both")
MAX_SAID = 5  # numbers in a request
MAX_TRIES = 10_000
QUESTION = re.compile(r"(?:\n|(?<=</answer>))[ \t]*+(?:say [0-9]|[0-9][0-9 ]*+(?:->|→))")
SAID = re.compile(r"say((?: [0-9]{1,9}){1,5}):?")
# What may stand behind the numbers of a right answer, any number of times.
THANKS = " thanks"


@dataclass(frozen=True)
class Puzzle:
    """A problem to think about."""

    countdown: CountdownProblem
    language: str = "en"
    """The language to think in: en or zh."""


@dataclass(frozen=True)
class Request:
    """Something to say, without a thought."""

    numbers: tuple[int, ...]


def without_thanks(answer: str) -> tuple[str, int]:
    """(the answer without the thanks at its end, how often they stood there)."""
    text = answer.strip(WHITE_SPACE)
    end, n_thanks = len(text), 0
    while text.endswith(THANKS, 0, end):
        end, n_thanks = end - len(THANKS), n_thanks + 1
    return text[:end], n_thanks


def word_counts(text: str) -> Counter:
    """The number of words of each language in a text."""
    return Counter(LANGUAGE_OF[word] for word in WORD.findall(text))


@dataclass(frozen=True)
class Assistant(Task):
    """Puzzles and requests, and their options."""

    name: ClassVar[str] = "assistant"
    example: ClassVar[str] = '{"numbers": [3, 7, 9], "target": 13, "response": "..."}'

    kinds: str = "both"
    """Which problems: puzzles, requests, or both in turn."""
    requests_from: int = 0
    """Index of the first training problem that may be a request, where the kinds take turns; all
    before it are puzzles."""
    languages: str = "both"
    """The language that puzzles are to be thought about in: en, zh, or both in turn."""
    n_numbers: int = 3
    """How many numbers a puzzle has, 2 to 6."""
    high: int = 20
    """The largest number that can be given."""
    ops: str = "+-"
    """The operations that puzzles are made with."""
    seed: int = 0
    """Changes the order of the training problems; the test problems are the same for every seed."""

    def __post_init__(self):
        """Raises ValueError for an option out of range."""
        for option, known in (("kinds", KINDS), ("languages", LANGUAGES)):
            given = getattr(self, option)
            if given not in known:
                raise ValueError(
                    f"assistant: {option} is {quoted(given)}; it must be one of {', '.join(known)}"
                )
        if self.requests_from < 0:
            raise ValueError(
                f"assistant: requests_from is {self.requests_from}; it must be 0 or more"
            )
        assert self.countdown is not None  # which checks the other options

    @cached_property
    def countdown(self) -> Countdown:
        """Where the puzzles come from."""
        return Countdown(n_numbers=self.n_numbers, high=self.high, ops=self.ops, seed=self.seed)

    def size(self, split: str) -> int | None:
        """As many as there are puzzles, in as many turns as have one; requests never end."""
        check_position(split, 0)
        n_puzzles = self.countdown.size(split)
        if self.kinds == "requests" or n_puzzles is None:
            return None
        return 2 * n_puzzles if self.kinds == "both" else n_puzzles

    def problem(self, split: str, index: int) -> Puzzle | Request:
        """Puzzles and requests take turns, and so do the languages of the puzzles."""
        check_position(split, index)
        if self.kinds == "both":
            n_puzzles = self.requests_from if split == "train" else 0
            if index < n_puzzles:
                return self._puzzle(split, index)
            pair, turn = divmod(index - n_puzzles, 2)
            return self._request(split, pair) if turn else self._puzzle(split, n_puzzles + pair)
        return (
            self._puzzle(split, index) if self.kinds == "puzzles" else self._request(split, index)
        )

    def _puzzle(self, split: str, index: int) -> Puzzle:
        languages = list(ARROWS) if self.languages == "both" else [self.languages]
        problem = self.countdown.problem(split, index)
        return Puzzle(problem, languages[index % len(languages)])

    def _request(self, split: str, index: int) -> Request:
        seed = self.seed if split == "train" else "test"
        for attempt in range(MAX_TRIES):
            hashes = (stable_hash("say", seed, index, attempt, i) for i in range(MAX_SAID + 1))
            n_numbers = 2 + next(hashes) % (MAX_SAID - 1)
            numbers = tuple(1 + next(hashes) % self.high for _ in range(n_numbers))
            if is_held_out(("say", numbers), 0.2) == (split == "test"):
                return Request(numbers)
        raise ValueError(f"assistant: no {split} request in {MAX_TRIES:,} tries; raise high")

    @staticmethod
    def problem_from_text(text: str) -> Puzzle | Request:
        """The problem of `say 3 7 9:`, or of `3 7 9 -> 13` with either arrow."""
        said = SAID.fullmatch(text.strip())
        if said:
            return Request(tuple(map(int, said[1].split())))
        language = "zh" if ARROWS["zh"] in text else "en"
        return Puzzle(Countdown.problem_from_text(text), language)

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> Puzzle | Request:
        """The problem of {"say": [3, 7, 9]}, or of {"numbers": [3, 7, 9], "target": 13} with or
        without "language"."""
        if "say" in record:
            [numbers] = required_fields(record, "say")
            if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_SAID:
                given = quoted(repr(numbers))
                raise ValueError(f'"say" is {given}, expected a list of 1 to {MAX_SAID} numbers')
            return Request(tuple(whole_in_file(number) for number in numbers))
        language = record.get("language", "en")
        if language not in ARROWS:
            raise ValueError(f'"language" is {quoted(repr(language))}, expected en or zh')
        return Puzzle(Countdown.problem_from_record(record), language)

    @staticmethod
    def prompt(problem: Puzzle | Request) -> str:
        """`3 7 9 -> 13`, `3 7 9 → 13` or `say 3 7 9:`."""
        if isinstance(problem, Request):
            return f"say {' '.join(map(str, problem.numbers))}:"
        return Countdown.prompt(problem.countdown).replace(ARROWS["en"], ARROWS[problem.language])

    @staticmethod
    def grade(problem: Puzzle | Request, response: str) -> Grade:
        """A puzzle as Countdown does; a request by the numbers that its answer says."""
        if isinstance(problem, Puzzle):
            return Countdown.grade(problem.countdown, response)
        answer = parse_response(own_response(response, QUESTION)).answer
        if answer is None:
            return Grade(0.0, None, "There is no complete <answer>...</answer> block.")
        said, _ = without_thanks(answer)
        wanted = ", ".join(map(str, problem.numbers))
        if said == wanted:
            return Grade(1.0, answer, f"The answer says {wanted}.")
        return Grade(0.0, answer, f"The answer is {quoted(said)}, expected {wanted}.")

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two answers are the same expression, or say the same, for a vote among them."""
        if without_thanks(answer)[0] == without_thanks(other)[0]:
            return True
        return Countdown.same_answer(answer, other)

    @staticmethod
    def language(problem: Puzzle | Request, response: str) -> float:
        """The share of the words around the answer that are in the puzzle's language, from 0 to 1.

        They count wherever they stand: whoever closes his thoughts at once and thinks behind them
        has thought all the same. 1 for a response without words, and for a request.
        """
        if isinstance(problem, Request):
            return 1.0
        counts = word_counts(without_last_answer(response))
        return share_of_words(counts, problem.language)

    @staticmethod
    def judged_by_model(problem: Puzzle | Request) -> bool:
        """Whether no rule tells which right answer is better, so that a reward model is asked."""
        return isinstance(problem, Request)
