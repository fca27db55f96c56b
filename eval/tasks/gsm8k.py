"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): school word problems from a file.

The file is the user's own copy: one JSON object per line with `question` and `answer`, the gold
number after the last `####` of `answer`. All of it is there to evaluate on or to train on; to do
both, give the training file and `test=gsm8k_test.jsonl` (problem_file.py).

The answer of a response is its last complete answer block, or else what follows its last `####` on
that line. A mark may stand inside the block, and one with nothing behind it changes nothing. The
templates chat and eight_shot ask for other marks, which are read too (final_answer.py). The answer
must be a number and nothing else, as people write one (numbers.py, prose): `1,234`, `$12`,
`12.50` and `12.` are numbers; `1/2` is not, and `12 eggs` only in a box or a sentence. Numbers are
compared as exact fractions.

A base model that has answered often runs on into a next question, `Question:` or another form that
its template has (prompts.py), and answers that. Its response is judged up to there. A plain
question has no form: there the first answer, a block or a mark's line, ends the response.

Left out: taking the last number of a text without a mark. It pays for numbers that were never given
as the answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..lines import json_object
from ..response import WHITE_SPACE, quoted
from .base import Grade, required_fields
from .final_answer import HASHES, behind_hashes, final_answer, in_words
from .numbers import read_number, same_number, text_of_number_field
from .problem_file import FileTask
from .prompts import TEMPLATES, check_template

EXPECTED = "JSON lines with the fields question and answer"
# A plain question has no form, so the first answer ends the response: a block, or a mark's line.
FIRST_ANSWER = re.compile(r"(?<=</answer>)|(?<!#)#{4,}+[ \t]*+[^\s#][^\n]*+(\n|\Z)")
FORMS = TEMPLATES | {"plain": replace(TEMPLATES["plain"], next_question=FIRST_ANSWER)}


@dataclass(frozen=True)
class GSM8KProblem:
    question: str
    gold: str
    """The right answer as written in the file, after the mark."""
    template: str = "zero_shot"
    """How the question is put to the model."""


def gold_number(answer: str) -> str:
    """What follows the last `####`, or all of `answer`; ValueError if that is not a number."""
    gold = answer if HASHES not in answer else behind_hashes(answer) or ""
    gold = gold.strip(WHITE_SPACE)
    if read_number(gold, prose=True) is None:
        raise ValueError(
            f"expected a number after {HASHES}, like '... {HASHES} 18'; got {quoted(gold)}"
        )
    return gold


def gold_of(record: Mapping[str, Any], name: str) -> str:
    """The gold number in a field that is text or a number of JSON; ValueError for other kinds."""
    [value] = required_fields(record, name)
    if isinstance(value, str):
        return gold_number(value)
    return text_of_number_field(name, value)


@dataclass(frozen=True)
class GSM8K(FileTask):
    """The task and its options."""

    name: ClassVar[str] = "gsm8k"
    example: ClassVar[str] = '{"answer": "#### 42", "response": "..."}'
    problem_flag: ClassVar[str] = "answer"
    file_format: ClassVar[str] = EXPECTED
    templates: ClassVar[tuple[str, ...]] = tuple(TEMPLATES)

    template: str = "zero_shot"
    """How a question is put to the model: zero_shot, r1_zero, r1_zero_think, few_shot, eight_shot,
    chat or plain (prompts.py)."""

    def parse_line(self, line: str) -> GSM8KProblem:
        """The problem of a line; ValueError, with the reason, for a bad line."""
        record = json_object(line)
        if not isinstance(record.get("question"), str):
            raise ValueError('there is no text "question"')
        return GSM8KProblem(record["question"], gold_of(record, "answer"), self.template)

    @staticmethod
    def question(problem: GSM8KProblem) -> str:
        """The word problem."""
        return problem.question

    @staticmethod
    def problem_from_text(text: str) -> GSM8KProblem:
        """A problem of which only the right answer is known, like `42` or `so #### 42`."""
        return GSM8KProblem("", gold_number(text))

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> GSM8KProblem:
        """The problem of {"answer": 42}, {"answer": "#### 42"}, or the harness's {"gold": "42"};
        `question` may stand beside it.

        ValueError for another kind of value.
        """
        name = "gold" if "gold" in record else "answer"
        question = record.get("question") or ""
        if not isinstance(question, str):
            raise ValueError(f'"question" is {quoted(repr(question))}, expected text')
        template = record.get("template", "zero_shot")
        check_template(template)
        return GSM8KProblem(question, gold_of(record, name), template)

    @staticmethod
    def prompt(problem: GSM8KProblem) -> str:
        """The question in its template; by default with how to end, and `Answer:`."""
        return TEMPLATES[problem.template].prompt(problem.question)

    @staticmethod
    def prefilled(problem: GSM8KProblem) -> str:
        """What of the answer the prompt holds already."""
        return TEMPLATES[problem.template].prefilled

    @staticmethod
    def grade(problem: GSM8KProblem, response: str) -> Grade:
        """Right if the last answer block, or else what follows the last mark, is the gold one.

        What comes behind the next question of its template is not read.
        """
        form = FORMS[problem.template]
        answer = final_answer(form.own_part(problem.question, response), form.marks)
        if answer is None:
            why = f"There is neither a complete answer block nor {in_words(form.marks)}."
            return Grade(0.0, None, why)
        value = read_number(answer, prose=True)
        if value is None:
            return Grade(0.0, answer, f"The answer {quoted(answer)} is not a number.")
        if value != read_number(problem.gold, prose=True):
            why = f"The answer is {quoted(answer.strip(WHITE_SPACE))}, not {problem.gold}."
            return Grade(0.0, answer, why)
        return Grade(1.0, answer, f"The answer is {problem.gold}.")

    @staticmethod
    def same_answer(answer: str, other: str) -> bool:
        """Whether two answers are the same number, or the same text, for a vote among them."""
        return same_number(answer, other)
