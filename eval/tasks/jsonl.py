"""A task out of a file of your own: JSON lines with `prompt` and `answer`.

    {"prompt": "Capital of France? ", "answer": "Paris"}
    {"prompt": "12*12=", "answer": 144, "grader": "number"}

    r1zero grpo --task jsonl --data my.jsonl --options grader=exact test_share=0.2 ...

The answer of a response is what stands in its answer block, without the white space around it:

    exact    it is `answer`, letter for letter
    number   it is the number `answer`, as people write one (numbers.py, prose): 1,234 or $12
    regex    the pattern `answer` matches all of it (patterns.py)

A line's own `grader` goes before the option. The model is prompted with `prompt` as it stands, or
in another template (prompts.py). What the model writes behind its answer is not read: with plain
prompts, that is everything behind the first answer block; with others, another question.

Left out: partial credit, which is a reward of your own (--rewards.plugin), answers that must be
worked out to be compared, and Unicode's ways to write one letter in two (é), which are two texts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..lines import json_object
from ..response import WHITE_SPACE, parse_response, quoted
from .base import Grade, required_fields
from .numbers import read_number, same_number, text_of_number_field
from .patterns import MAX_TEXT, compile_pattern, full_match
from .problem_file import FileTask
from .prompts import TEMPLATES, check_template

TAGS = ("<answer>", "</answer>")
EXPECTED = "JSON lines with the fields prompt and answer"


@dataclass(frozen=True)
class JSONLProblem:
    prompt: str
    """As it stands in the file, before a template."""
    answer: str
    """The right answer, or a pattern for it; without white space around it."""
    grader: str = "exact"
    template: str = "plain"


# ---- the graders ----


class Grader(NamedTuple):
    """One way to compare answers."""

    check: Callable[[str], None]
    """check(answer of the file): ValueError, with the reason, if nothing could be compared."""
    fault: Callable[[str, str], str | None]
    """fault(answer of the file, answer given): what is wrong, in one sentence; None if nothing."""


def check_exact(answer: str) -> None:
    """Any text will do."""


def exact_fault(answer: str, given: str) -> str | None:
    return None if given == answer else f"The answer is {quoted(given)}, not {quoted(answer)}."


def check_number(answer: str) -> None:
    if read_number(answer, prose=True) is None:
        raise ValueError(f'"answer" is {quoted(answer)}, expected a number (the grader is number)')


def number_fault(answer: str, given: str) -> str | None:
    value = read_number(given, prose=True)
    if value is None:
        return f"The answer {quoted(given)} is not a number."
    is_right = value == read_number(answer, prose=True)
    return None if is_right else f"The answer is {quoted(given)}, not {answer}."


def check_regex(answer: str) -> None:
    try:
        compile_pattern(answer)
    except ValueError as error:
        raise ValueError(f'"answer" is no pattern that is taken: {error}') from None


def regex_fault(answer: str, given: str) -> str | None:
    if full_match(answer, given):
        return None
    if len(given) > MAX_TEXT:
        return f"The answer has more than {MAX_TEXT} characters, which is not read."
    return f"The answer {quoted(given)} does not match the pattern {quoted(answer)}."


GRADERS = {
    "exact": Grader(check_exact, exact_fault),
    "number": Grader(check_number, number_fault),
    "regex": Grader(check_regex, regex_fault),
}


def check_grader(name: Any) -> None:
    """ValueError, with the known names, for a grader that there is not."""
    if not isinstance(name, str) or name not in GRADERS:
        raise ValueError(f"grader is {name!r}; it must be one of: {', '.join(GRADERS)}")


# ---- lines to problems ----


def text_in(record: Mapping[str, Any], name: str) -> str:
    """A field that is text with something in it."""
    [value] = required_fields(record, name)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {quoted(repr(value))}, expected text')
    return checked_text(name, value)


def checked_text(name: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" is {quoted(value)}, which is not Unicode text') from None
    return value


def answer_in(record: Mapping[str, Any]) -> str:
    """The field `answer`: text, or a number of JSON as text (72.0 is "72.0")."""
    [value] = required_fields(record, "answer")
    if isinstance(value, str):
        text = checked_text("answer", value).strip(WHITE_SPACE)
    else:
        text = text_of_number_field("answer", value)
    for tag in TAGS:
        if tag in text:
            raise ValueError(f'"answer" holds {tag}, which no answer block can hold')
    return text


def problem_of(record: Mapping[str, Any], prompt: str, grader: str = "exact") -> JSONLProblem:
    """The problem of a record; ValueError, with the reason, for a bad one.

    grader: of a record that does not name its own.
    """
    grader = record.get("grader", grader)
    check_grader(grader)
    template = record.get("template", "plain")
    check_template(template, JSONL.templates)
    answer = answer_in(record)
    GRADERS[grader].check(answer)
    return JSONLProblem(prompt, answer, grader, template)


@dataclass(frozen=True)
class JSONL(FileTask):
    """The task and its options."""

    name: ClassVar[str] = "jsonl"
    example: ClassVar[str] = '{"answer": "42", "grader": "exact", "response": "..."}'
    problem_flag: ClassVar[str] = "answer"
    file_format: ClassVar[str] = EXPECTED
    # Not zero_shot, eight_shot and chat, which ask for a number behind a mark.
    templates: ClassVar[tuple[str, ...]] = ("plain", "r1_zero", "r1_zero_think", "few_shot")

    test_share: float = 0.2
    """Share of the prompts that is held out for testing; with 0, the whole file is there for
    training and for testing. Not used with `test`."""
    grader: str = "exact"
    """How answers are compared: exact, number or regex."""

    def __post_init__(self):
        """Raises ValueError for an option out of range, and for files that cannot be used."""
        try:
            check_grader(self.grader)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        super().__post_init__()

    def parse_line(self, line: str) -> JSONLProblem:
        """The problem of a line; ValueError, with the reason, for a bad line."""
        record = json_object(line)
        prompt = text_in(record, "prompt")
        return problem_of(record | {"template": self.template}, prompt, self.grader)

    @staticmethod
    def question(problem: JSONLProblem) -> str:
        """The prompt as it stands in the file."""
        return problem.prompt

    @staticmethod
    def problem_from_text(text: str) -> JSONLProblem:
        """A problem of which only the right answer is known, to be given exactly."""
        return problem_of({"answer": text}, "")

    @staticmethod
    def problem_from_record(record: Mapping[str, Any]) -> JSONLProblem:
        """The problem of {"answer": "42"}; `grader` and `prompt` may stand beside it."""
        prompt = text_in(record, "prompt") if record.get("prompt") else ""
        return problem_of(record, prompt)

    @staticmethod
    def prompt(problem: JSONLProblem) -> str:
        """The prompt in its template; plain is the prompt as it stands."""
        return TEMPLATES[problem.template].prompt(problem.prompt)

    @staticmethod
    def prefilled(problem: JSONLProblem) -> str:
        """What of the answer the prompt holds already."""
        return TEMPLATES[problem.template].prefilled

    @staticmethod
    def grade(problem: JSONLProblem, response: str) -> Grade:
        """Right if the last answer block of the response's own part is, as the grader says."""
        own = TEMPLATES[problem.template].own_part(problem.prompt, response)
        answer = parse_response(own).answer
        if answer is None:
            return Grade(0.0, None, "There is no complete <answer>...</answer> block.")
        given = answer.strip(WHITE_SPACE)
        fault = GRADERS[problem.grader].fault(problem.answer, given)
        return Grade(float(fault is None), answer, fault or "The answer is right.")

    def same_answer(self, answer: str, other: str) -> bool:
        """Whether two answers are one, for a vote: the same number, where numbers are graded.

        By the option `grader`: a line's own grader changes its grade, but not the vote.
        """
        return same_number(answer, other) if self.grader == "number" else answer == other
