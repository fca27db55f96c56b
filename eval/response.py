"""What a response holds: its thoughts, its answer, and whether it keeps the format of R1-Zero.

    <think> ... </think> <answer> ... </answer>      (DeepSeek-R1, arXiv 2501.12948, section 2.2)

Format and answer are judged apart, because accuracy and format are two rewards: a right answer in a
broken frame still counts as right. Tags are case-sensitive and have no attributes: `<Answer>` and
`< answer>` are plain text. Only fixed strings are searched for, so each character is looked at a
few times at most.

Left out: mending of broken tags, because the format reward is there to teach them.
"""

from dataclasses import dataclass
from typing import Any

from .tasks.base import Task

FRAME = ("<think>", "</think>", "<answer>", "</answer>")
WHITE_SPACE = " \t\r\n"  # the only white space that a format or an answer may hold


@dataclass(frozen=True)
class Response:
    think: str | None
    """Text of the last complete think block, None if there is none."""
    answer: str | None
    """Text of the last complete answer block, None if there is none; also if not well formed."""
    well_formed: bool
    """Exactly one think block, then exactly one answer block, and only white space around them."""
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
    """The reason for the format, in one plain sentence."""


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
    # 3. Nothing but white space outside the two blocks.
    think, think_end, answer, answer_end = starts
    outside = (
        ("before <think>", text[:think]),
        ("between </think> and <answer>", text[think_end + len("</think>") : answer]),
        ("after </answer>", text[answer_end + len("</answer>") :]),
    )
    for where, stray in outside:
        if stray.strip(WHITE_SPACE):
            return f"There is text {where}: {quoted(stray.strip(WHITE_SPACE))}."
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


def grade_response(task: Task | type[Task], problem: Any, text: str) -> Graded:
    """Grade a response: is it right, and is it well formed? A task's class is enough."""
    grade = task.grade(problem, text)
    response = parse_response(text)
    return Graded(
        accuracy=grade.accuracy,
        format=float(response.well_formed),
        answer=grade.answer,
        why=grade.why,
        why_format=response.why,
    )
