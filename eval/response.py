"""What a response holds: its thoughts, its answer, and whether it keeps the format of R1-Zero.

    <think> ... </think> <answer> ... </answer>      (DeepSeek-R1, arXiv 2501.12948, section 2.2)

Format and answer are judged apart, because accuracy and format are two rewards: a right answer in a
broken frame still counts as right. Tags are case-sensitive and have no attributes: `<Answer>` and
`< answer>` are plain text.

White space is free only as far as text needs it, or a model could fill its answer with it and be
paid: 16 characters before, between and after the blocks (the paper's template has one, others two
line breaks), and 100 in one run anywhere (deeply indented code has 40).

A response that was cut off at the token limit is not well formed, whatever its text is: it never
ended. Its answer block counts as it stands.

Only fixed strings and simple patterns are searched for, so the time is linear in the text's length.
Left out: mending of broken tags, because the format reward is there to teach them.
"""

import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .language import consistency, main_script
from .tasks.base import Grade, Task

FRAME = ("<think>", "</think>", "<answer>", "</answer>")
WHITE_SPACE = " \t\r\n"  # the only white space that a format or an answer may hold
MAX_SPACE_AROUND = 16  # characters of white space before, between and after the blocks
MAX_SPACE_RUN = 100  # characters of white space in one run anywhere
LONG_RUN = re.compile(rf"(?<!\s)\s{{{MAX_SPACE_RUN + 1}}}")


@dataclass(frozen=True)
class Sample:
    """One sampled response: all that a grader or a reward may look at."""

    problem: Any
    """A problem of the task."""
    text: str
    """The response as `response_text` spells it."""
    tokens: Sequence[int] = ()
    """Token ids of the response, with the end token if it has one; empty where they are unknown."""
    finish_reason: str | None = None
    """"length" if it was cut at the token limit; another word, or None, otherwise."""

    @property
    def cut_off(self) -> bool:
        return self.finish_reason == "length"


def response_text(tokenizer, tokens: Sequence[int]) -> str:
    """The text of a response's tokens: all of it, but for the end token that stopped it.

    Any other special token is spelled, like `<|bos|>`: what was sampled must not look like the text
    without it.
    """
    ended = len(tokens) > 0 and tokens[-1] in tokenizer.eos_ids
    return tokenizer.decode(tokens[:-1] if ended else tokens, keep_special=True)


@dataclass(frozen=True)
class Response:
    think: str | None
    """Text of the last complete think block, None if there is none."""
    answer: str | None
    """Text of the last complete answer block, None if there is none; also if not well formed."""
    well_formed: bool
    """Exactly one think block, then exactly one answer block, and only white space around them, of
    which there is no more than the bounds above."""
    why: str
    """One plain sentence: what is wrong with the form, or that it is right."""


@dataclass(frozen=True)
class Graded:
    """What one response is worth by rule, before the two rewards are weighted."""

    accuracy: float
    """1.0 if the answer is right, else 0.0."""
    format: float
    """1.0 if the response is well formed, else 0.0."""
    answer: str | None
    """What the task read as the answer, None if nothing was."""
    why: str
    """The task's reason for the accuracy, in one plain sentence."""
    why_format: str
    """The reason for the format, in plain words."""


def quoted(text: str, limit: int = 40) -> str:
    """`text` in quotes for a message: short, one line, plain ASCII whatever it holds."""
    return ascii(text) if len(text) <= limit else f"{ascii(text[:limit])}..."


def _last_block(text: str, opening: str, closing: str) -> str | None:
    """The last block that is complete, None if there is none."""
    # Go back over the closing tags until one has an opening tag between itself and the closing tag
    # before.
    end = text.rfind(closing)
    while end >= 0:
        earlier = text.rfind(closing, 0, end)
        start = text.rfind(opening, max(earlier, 0), end)
        if start >= 0:
            return text[start + len(opening) : end]
        end = earlier
    return None


def _fault(text: str) -> str | None:
    """What keeps the response from being well formed, None if nothing does."""
    # 1. Each tag exactly once.
    counts = [text.count(tag) for tag in FRAME]
    for tag, count in zip(FRAME, counts, strict=True):
        if count == 0:
            return f"There is no {tag} tag."
    for tag, count in zip(FRAME, counts, strict=True):
        if count > 1:
            return f"There are {count} {tag} tags, and there should be one."
    # 2. The tags in order.
    starts = [text.find(tag) for tag in FRAME]
    if starts != sorted(starts):
        order = sorted(FRAME, key=text.find)
        return f"The tags are out of order: {' '.join(order)}."
    # 3. Nothing but a little white space outside the two blocks.
    think, think_end, answer, answer_end = starts
    outside = (
        ("before <think>", text[:think]),
        ("between </think> and <answer>", text[think_end + len("</think>") : answer]),
        ("after </answer>", text[answer_end + len("</answer>") :]),
    )
    for where, stray in outside:
        if stray.strip(WHITE_SPACE):
            return f"There is text {where}: {quoted(stray.strip(WHITE_SPACE))}."
        if len(stray) > MAX_SPACE_AROUND:
            return (
                f"There are {len(stray)} characters of white space {where}, and at most "
                f"{MAX_SPACE_AROUND} are allowed."
            )
    # 4. No padding inside of them.
    if LONG_RUN.search(text):
        return f"There are more than {MAX_SPACE_RUN} characters of white space in one run."
    return None


def parse_response(text: str) -> Response:
    """Take a response apart. Never raises, and takes time linear in the length of `text`.

    A block is complete when its closing tag follows. It begins at the last opening tag of its kind
    before that, so the answer of `<answer>1<answer>2</answer>` is `2`. With several complete blocks
    the last one counts, and an unclosed block after it (a response that was cut off) changes
    nothing. Blocks may be empty and may run over several lines.
    """
    fault = _fault(text)
    return Response(
        think=_last_block(text, "<think>", "</think>"),
        answer=_last_block(text, "<answer>", "</answer>"),
        well_formed=fault is None,
        why=fault or "One think block and one answer block, in order, and nothing else.",
    )


def own_response(
    text: str, question: re.Pattern, is_own: Callable[[re.Match], bool] = lambda match: False
) -> str:
    """The response without what a base model runs on into: the next question of the prompt's form.

    question: matches such a question, from the line break or the closing tag before it; a pattern
    with a group matches what stands before too, and the group is where the question begins. is_own:
    whether a match only says the problem again that was asked. What stands inside the think block
    that the response begins with is thought, not asked. Linear in the length of `text`.
    """
    # Where the thoughts end, if they do before another think block begins.
    opening, closing = text.find("<think>"), text.find("</think>")
    begins_with_thoughts = 0 <= opening < closing and all(
        is_own(match) for match in question.finditer(text, 0, opening)
    )
    if not begins_with_thoughts or "<think>" in text[opening + 1 : closing]:
        closing = 0
    for match in question.finditer(text, closing):
        if not is_own(match):
            return text[: match.start(match.lastindex or 0)]
    return text


def grade_fault(grade: Any) -> str | None:
    """What keeps a grader's word from being a `Grade` that says right or wrong."""
    if not isinstance(grade, Grade):
        return f"gave {quoted(repr(grade))}, expected a Grade (eval/tasks/base.py)"
    if grade.accuracy not in (0.0, 1.0):
        return (
            f"gave an accuracy of {grade.accuracy!r}, expected 1.0 or 0.0; partial credit is a "
            "reward of its own"
        )
    if not isinstance(grade.answer, str | None):
        return f"gave the answer {quoted(repr(grade.answer))}, expected the text of it, or None"
    if not isinstance(grade.why, str):
        return f"gave the reason {quoted(repr(grade.why))}, expected a sentence"
    return None


def share_fault(share: Any) -> str | None:
    """What keeps a task's word on the coherence or language of a response from being a number."""
    if isinstance(share, numbers.Real) and math.isfinite(share):
        return None
    return f"gave {quoted(repr(share))}, expected a finite number"


def judged_text(task: Task | type[Task], sample: Sample) -> str:
    """The text that is judged: what of the answer stands in the prompt already, then the response.

    So a response is judged alike, whether its `<think>` was sampled or given.
    """
    prefilled = getattr(task, "prefilled", None)
    return sample.text if prefilled is None else prefilled(sample.problem) + sample.text


def asked(
    task: Task | type[Task], member: str, sample: Sample, fault_of: Callable[[Any], str | None]
) -> Any:
    """What a grader of a task, `grade`, `coherence` or `language`, gives for a response.

    Raises ValueError, with the problem and the response, for one that raises or gives what has a
    fault. None of ours does; a task of the user's own may.
    """
    cause = None
    try:
        given = getattr(task, member)(sample.problem, judged_text(task, sample))
        fault = fault_of(given)
    except (Exception, SystemExit) as error:  # whatever the code of a user may raise
        cause = error
        fault = f"raised {type(error).__name__}: {error}"
    if fault is None:
        return given
    problem, response = quoted(repr(sample.problem), 200), quoted(sample.text, 200)
    word = "grader" if member == "grade" else member
    raise ValueError(
        f"the {word} of {task.name} {fault}, for the problem {problem} and the response {response}"
    ) from cause


def verdict(task: Task | type[Task], sample: Sample) -> Grade:
    """The task's word on a response; ValueError as `asked`."""
    return asked(task, "grade", sample, grade_fault)


def coherence_of(task: Task | type[Task], sample: Sample) -> float:
    """The share of true steps of a response; ValueError as `asked`."""
    return asked(task, "coherence", sample, share_fault)


def question_of(task: Task | type[Task], problem: Any) -> str:
    """The question of a problem without its template, where the task tells; else the prompt."""
    return getattr(task, "question", task.prompt)(problem)


def has_language(task: Task) -> bool:
    """Whether a task's problems tell the language of their answers, by a rule or by their words."""
    if getattr(task, "language", None) is not None:
        return True
    return main_script(question_of(task, task.problem("train", 0))) is not None


def without_last_answer(text: str) -> str:
    """The text around its last answer block; all of it if that is not closed. Thoughts that stand
    behind an earlier, empty block are thoughts."""
    before, _, rest = text.rpartition("<answer>")
    _, closed, behind = rest.partition("</answer>")
    return f"{before} {behind}" if closed else text


def language_of(task: Task | type[Task], sample: Sample) -> float:
    """The share of the words of a response's thoughts that are in the language of its question.

    A task may have a rule of its own; else the script of most words decides (language.py), of all
    that stands outside the last answer block. ValueError as `asked`.
    """
    if getattr(task, "language", None) is not None:
        return asked(task, "language", sample, share_fault)
    thoughts = without_last_answer(judged_text(task, sample))
    for tag in FRAME:
        thoughts = thoughts.replace(tag, " ")
    return consistency(question_of(task, sample.problem), thoughts)


def grade_response(task: Task | type[Task], sample: Sample) -> Graded:
    """Grade a response: is it right, and is it well formed? A task's class is enough."""
    grade = verdict(task, sample)
    response = parse_response(judged_text(task, sample))
    why_format = response.why
    if sample.cut_off:
        fault = "" if response.well_formed else f" {response.why}"
        why_format = f"It was cut off at the token limit.{fault}"
    return Graded(
        accuracy=grade.accuracy,
        format=float(response.well_formed and not sample.cut_off),
        answer=grade.answer,
        why=grade.why,
        why_format=why_format,
    )
