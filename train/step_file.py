"""Steps for process rewards: lines of JSON -> tokens, ends and labels.

The lines are those of `r1zero collect --label-steps` (step_labels.py). Which label is trained on is
a choice:

    true      the task's check: is the step true?
    reaches   the task's check: is it true, and can the target still be reached?
    hard      1 if any of the completions from there is right, else 0     (Math-Shepherd, eq. 3)
    soft      the share of them                                           (eq. 4)

A step whose label is null is left out of the loss. A label is never cast to bool: then 0.25 would
be 1. (In TRL a mask of -100 was once cast so; huggingface/trl, pull request 2127.) Anything but
true, false, null and a number from 0 to 1 is refused.

The ids are those that were sampled, so nothing is encoded but the prompt. They must spell the
line's `response`: under another tokenizer they are other words.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..eval.lines import Kept, json_object, parse_lines, read_lines
from ..eval.response import quoted, response_text
from ..model.chat_template import encode_prompts
from ..model.config import ModelConfig
from ..model.tokenizer import Tokenizer
from ..rl.process import Steps
from .rankings import check_sequences, checked_list, prompt_in

FACTS = ("true", "reaches")
LABELS = (*FACTS, "hard", "soft")
EXPECTED = "lines that r1zero collect --label-steps wrote"


class StepLine(NamedTuple):
    """A line of the file."""

    prompt: str
    tokens: list[int]
    response: str | None
    """What the tokens spell; None where the line does not say."""
    ends: list[int]
    labels: dict[str, list[float]]
    """By their names; NaN where there is none."""


def read_steps(path: str | Path, skip_bad: bool = False) -> Kept[StepLine]:
    """The lines of a .jsonl file. Raises ValueError, which names up to ten bad lines with their
    reasons; see `parse_lines`."""
    return parse_lines(path, read_lines(path), steps_of, EXPECTED, skip_bad).values()


def steps_of(line: str) -> StepLine:
    """The answer in a line of JSON. Raises ValueError for a line that is none."""
    record = json_object(line)
    prompt = prompt_in(record)
    tokens = checked_list(record, "tokens", int, "a list of token ids")
    if any(not 0 <= token < 2**31 for token in tokens):
        raise ValueError("`tokens` has a number that is no token id")
    response = record.get("response")
    if not isinstance(response, str | None):
        raise ValueError("`response` is no text, expected what the tokens spell")
    steps = checked_list(record, "steps", dict, "a list of objects")
    if not steps:
        raise ValueError("`steps` is empty, so there is nothing to learn")
    ends = [step.get("end") for step in steps]
    if any(type(end) is not int for end in ends):
        raise ValueError("the `end` of a step is missing or no whole number")
    if ends[0] < 0 or ends[-1] >= len(tokens) or any(np.diff(ends) <= 0):
        raise ValueError(f"the ends of the steps, {ends}, do not rise within {len(tokens)} tokens")
    labels = {name: [label_of(step, name) for step in steps] for name in FACTS}
    shares = [label_of(step, "share") for step in steps]
    # NaN is not above 0, and must not become a label of 0.
    labels["hard"] = [share if math.isnan(share) else float(share > 0) for share in shares]
    labels["soft"] = shares
    return StepLine(prompt, tokens, response, ends, labels)


def label_of(step: dict, name: str) -> float:
    """A label as a number from 0 to 1; NaN for null or none. Raises ValueError otherwise."""
    value = step.get(name)
    if value is None:
        return math.nan
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise ValueError(
            f"`{name}` of a step is {value!r}, expected true, false, null or a share from 0 to 1"
        )
    return float(value)


def encode_steps(
    tokenizer: Tokenizer,
    lines: Sequence[StepLine],
    shape: ModelConfig,
    name: str,
    path: str | Path = "the data",
) -> list[Steps]:
    """The answers of a file with their labels of this name. shape: of the model that is to read
    them. path: the file, for messages.

    Raises ValueError if no step has such a label, or, with the answer's number, for an answer that
    the model cannot read or that is of another tokenizer.
    """
    prompts = encode_prompts(tokenizer, [line.prompt for line in lines], chat=False)
    found = []
    for number, (line, prompt) in enumerate(zip(lines, prompts, strict=True)):
        tokens = np.array([*prompt, *line.tokens], np.int64)
        what = f"answer {number} of {path} (the first is 0)"
        check_sequences([tokens], shape, what)
        check_spelling(tokenizer, line, what)
        known = {
            fact: np.array(line.labels[fact]) == 1
            for fact in FACTS
            if not np.isnan(line.labels[fact]).any()
        }
        found.append(
            Steps(
                tokens,
                np.array(line.ends, np.int64) + len(prompt),
                np.array(line.labels[name]),
                known,
            )
        )
    if all(np.isnan(answer.labels).all() for answer in found):
        advice = "collect with --label-steps 8" if name in ("hard", "soft") else "give others"
        asked = f"the label that --labels {name} asks for"
        raise ValueError(f"no step in {path} has {asked}; {advice}, or leave it out")
    return found


def check_spelling(tokenizer: Tokenizer, line: StepLine, what: str) -> None:
    """Raise ValueError for tokens that do not spell their response. what: the answer, in words."""
    if line.response is None:
        return
    spelled = response_text(tokenizer, line.tokens)
    if spelled != line.response:
        same = len(os.path.commonprefix([spelled, line.response]))
        raise ValueError(
            f"the tokens of {what} spell {quoted(spelled[same:])} under the tokenizer of --base "
            f"where its `response` says {quoted(line.response[same:])}; give the base that the "
            "answers were sampled with, or collect with this one"
        )
