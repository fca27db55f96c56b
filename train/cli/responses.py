"""A response, for people: printed as it comes, or taken apart, with the grader's remarks."""

from collections.abc import Iterator

from ...eval.harness import Sampled
from ...eval.response import grade_response, judged_text, parse_response
from ...eval.tasks.countdown import Countdown, CountdownProblem
from .main import printable


def shown(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """The parts of a response, one below the other, and the remarks about it."""
    text = sampled.text if problem is None else judged_text(Countdown, sampled.sample_of(problem))
    response = parse_response(text)
    blocks = [("think", response.think), ("answer", response.answer)]
    parts = [(name, text) for name, text in blocks if text is not None]
    if not parts:
        parts = [("text" if problem else "", sampled.text)]
    notes = remarks(problem, sampled)
    return labelled(parts) + (f"\n{notes}" if notes else "")


def remarks(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """The grade of a response to a Countdown problem, and whether it was cut off."""
    parts = []
    if problem:
        graded = grade_response(Countdown, sampled.sample_of(problem))
        parts.append(("grade", f"{'right' if graded.accuracy else 'wrong'}. {graded.why}"))
        if not graded.format:
            parts.append(("format", graded.why_format))
    if sampled.finish_reason == "length":
        parts.append(("note", f"cut off after {sampled.n_tokens} tokens"))
    return labelled(parts)


def labelled(parts: list[tuple[str, str]]) -> str:
    """Each (label, text) on lines of its own, the labels in a column."""
    return "\n".join(
        f"{label:<8}{printable(text)}" if label else printable(text) for label, text in parts
    )


def printed(stream: Iterator[tuple[str, Sampled | None]]) -> Sampled:
    """Print a response as it comes; returns the whole."""
    shown = ""
    for text, sampled in stream:
        print(printable(text), end="", flush=True)
        shown += text
        whole = sampled  # None until the last text
    print()
    if shown != whole.text:  # special tokens are not streamed, but they are graded
        print(labelled([("sampled", whole.text)]))
    return whole
