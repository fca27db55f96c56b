r"""Competition mathematics from a file, graded by math-verify: MATH-500, AIME, and files like them.

    --task math --data math500.jsonl
    --task math --data hub:HuggingFaceH4/MATH-500       from the Hugging Face hub (hub.py)

A line holds the problem (`problem` or `question`) and the right answer: `answer`, or what the last
\boxed{...} of `solution` holds. A right answer that cannot be read rewards nothing, so it is
refused when the file is read.

Which answer a response gives is said in math_answer.py. Numbers are compared as exact fractions:
025 is 25, and 0.333 is not 1/3. All else goes to math-verify in a process of its own, within limits
of time and memory (eval/worker.py). An answer that takes more is wrong. Several values are right
only if the right answer is all of them, and of words only units may stand beside a value
(answer_words.py). An expression that is copied from the question is wrong, though its value may be
right: 99^2 + 99 + 1 is no answer to what it is.

Left out: proofs, and partial credit.
"""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from ..lines import json_object
from ..response import quoted
from ..worker import Overrun, Worker
from . import answer_words, math_answer
from .base import Grade
from .numbers import text_of_number_field
from .problem_file import FileTask
from .prompts import TEMPLATES, Template, check_template

EXPECTED = "JSON lines with the fields problem and answer"
WORKER = "r1zero.eval.tasks.math_worker"
QUESTION_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("gold", "answer", "expected_answer", "final_answer")
BOX_ASKED = "Please reason step by step, and put your final answer within \\boxed{}."
FORMS = {
    # What Qwen2.5-Math and DeepSeek-R1 are asked with.
    "boxed": Template(
        before="",
        after=f"\n{BOX_ASKED}",
        next_question=re.compile(rf"{re.escape(BOX_ASKED)}|\n(?:Question|User|Human):[ \t]*+"),
    ),
    "r1_zero": TEMPLATES["r1_zero"],
    "r1_zero_think": TEMPLATES["r1_zero_think"],
    "plain": TEMPLATES["plain"],
}


PROSE = re.compile(r"\\(?:text|mbox)\{[^{}\\]*\}|\\l?dots")  # in a right answer


@dataclass(frozen=True)
class MathProblem:
    question: str
    gold: str
    """The right answer as written in the file."""
    template: str = "boxed"
    """How the question is put to the model."""


# ---- comparing ----

# Answers whose comparison took too much, the last ones: so a vote does not try them all again.
overran: deque[str] = deque(maxlen=1_000)


@lru_cache(maxsize=1)
def worker() -> Worker:
    """The worker of this process, which is started by the first question to it."""
    return Worker(WORKER)


@lru_cache(maxsize=10_000)
def can_read(gold: str) -> bool:
    r"""Whether a right answer can be compared with anything. RuntimeError as `Worker.ask`.

    What math-verify does not know, but is words and dots, such as 6:00 \text{ p.m.}, is compared as
    it is spelled.
    """
    if math_answer.unreadable(gold) is not None:
        return False
    if math_answer.are_equal(gold, gold):
        return True
    try:
        if worker().ask("is_right", gold, gold) is True:
            return True
    except Overrun:
        return False
    rest, n_words = PROSE.subn("", gold)
    return n_words > 0 and "\\" not in rest


@lru_cache(maxsize=10_000)
def fault(gold: str, answer: str) -> str | None:
    """What is wrong with an answer, in one sentence; None if nothing is. Both without wrappers.

    The answers of a group are often alike, so the last ones are kept.
    """
    why = math_answer.unreadable(answer) or answer_words.extra(gold, answer)
    if why is not None:
        return why
    is_right = math_answer.are_equal(gold, answer)
    if is_right is None and math_answer.spelled(gold) == math_answer.spelled(answer):
        is_right = True
    if is_right is None:
        try:
            is_right = worker().ask("is_right", gold, answer) is True
        except Overrun as overrun:
            overran.append(answer)
            return f"The answer {quoted(answer)} was not compared: {overrun}."
    return None if is_right else f"The answer is {quoted(answer)}, not {quoted(gold)}."


# ---- lines to problems ----


def field_of(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some fields that is there and not null, whatever its case; None without one."""
    by_name = {name.lower(): value for name, value in record.items()}
    return next((by_name[name] for name in names if by_name.get(name) is not None), None)


def gold_of(record: Mapping[str, Any]) -> str:
    """The right answer of a record; ValueError for one that is missing or cannot be read."""
    answer, solution = field_of(record, ANSWER_FIELDS), field_of(record, ("solution",))
    if answer is None and isinstance(solution, str):
        answer = next(reversed(math_answer.boxed(solution)), None)
        if answer is None:
            raise ValueError('"solution" has no \\boxed{...}, and there is no "answer"')
    if answer is None:
        raise ValueError('"answer" is missing')
    if not isinstance(answer, str):
        answer = text_of_number_field("answer", answer)
    return checked_gold(answer)


def checked_gold(text: str) -> str:
    """The right answer in a text; ValueError for one that nothing could be compared with."""
    boxes = math_answer.boxed(text)
    gold = math_answer.unwrapped(boxes[-1] if boxes else text)
    if not can_read(gold):
        raise ValueError(f"the right answer {quoted(gold)} cannot be read as mathematics")
    return gold


@dataclass(frozen=True)
class Math(FileTask):
    """The task and its options."""

    name: ClassVar[str] = "math"
    example: ClassVar[str] = r'{"answer": "\\frac{1}{2}", "response": "... \\boxed{0.5}"}'
    problem_flag: ClassVar[str] = "answer"
    file_format: ClassVar[str] = EXPECTED
    templates: ClassVar[tuple[str, ...]] = tuple(FORMS)

    template: str = "boxed"
    r"""How a question is put to the model: boxed (asks for \boxed{}), r1_zero, r1_zero_think or
    plain."""

    def parse_line(self, line: str) -> MathProblem:
        """The problem of a line; ValueError, with the reason, for a bad line."""
        record = json_object(line)
        question = field_of(record, QUESTION_FIELDS)
        if not isinstance(question, str) or not question.strip():
            raise ValueError('there is no text "problem" or "question"')
        return MathProblem(question, gold_of(record), self.template)

    @staticmethod
    def question(problem: MathProblem) -> str:
        """The problem as it stands in the file."""
        return problem.question

    @staticmethod
    def problem_from_text(text: str) -> MathProblem:
        r"""A problem of which only the right answer is known, like `\frac{1}{2}`."""
        return MathProblem("", checked_gold(text))

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> MathProblem:
        """The problem of {"answer": "42"}, or of the harness's {"gold": "42"}.

        ValueError for another kind of value.
        """
        question = field_of(record, QUESTION_FIELDS) or ""
        if not isinstance(question, str):
            raise ValueError(f'"problem" is {quoted(repr(question))}, expected text')
        template = record.get("template", "boxed")
        check_template(template, Math.templates)
        return MathProblem(question, gold_of(record), template)

    @staticmethod
    def prompt(problem: MathProblem) -> str:
        r"""The question in its template; by default with the wish for a \boxed{}."""
        return FORMS[problem.template].prompt(problem.question)

    @staticmethod
    def prefilled(problem: MathProblem) -> str:
        """What of the answer the prompt holds already."""
        return FORMS[problem.template].prefilled

    @staticmethod
    def grade(problem: MathProblem, response: str) -> Grade:
        r"""Right if the last answer block, or else the last \boxed{...}, equals the right answer.

        What comes behind the next question of its template is not read.
        """
        own = FORMS[problem.template].own_part(problem.question, response)
        answer = math_answer.given(own)
        if answer is None:
            why = "There is neither a complete answer block nor a complete \\boxed{...}."
            return Grade(0.0, None, why)
        if math_answer.is_copied(problem.question, problem.gold, answer):
            why = f"The answer {quoted(answer)} is copied from the question."
        else:
            why = fault(problem.gold, answer)
        return Grade(float(why is None), answer, why or "The answer is right.")

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two answers are one and the same value, for a vote among them.

        One that took too much when it was compared before is compared as text.
        """
        if answer == other:
            return True
        if answer in overran or other in overran or math_answer.unreadable(answer) is not None:
            return False
        return fault(answer, other) is None
