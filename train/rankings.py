"""Rankings for reward models: lines of JSON -> pairs of answers -> tokens.

    {"prompt": "3 7 9 -> 13", "answers": ["...", "...", "..."], "ranks": [1, 3, 2]}

Rank 1 is best, and equal ranks are a tie. `right` may stand beside them: for each answer whether it
is right, so that a table can tell right against wrong from the pairs within a class. Other fields
are not read.

The prompt becomes tokens as in sampling, and the end token follows each answer. Which prompts are
held out follows from a prompt's text alone, so no prompt is on both sides.

Left out: chat templates, pairs of conversations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..eval.lines import Kept, json_object, parse_lines, read_lines
from ..model.chat_template import encode_prompts
from ..model.config import ModelConfig
from ..model.tokenizer import Tokenizer
from ..rl.preferences import Ranking, pairs_of, with_noise
from .conversations import check_characters

FEWEST, MOST = 2, 64  # answers per prompt
EXPECTED = 'lines like {"prompt": "...", "answers": ["...", "..."], "ranks": [1, 2]}'


class Ranked(NamedTuple):
    """A line of a file of rankings."""

    prompt: str
    answers: list[str]
    ranks: list[int]
    right: list[bool] | None


# ---- files to text ----


def read_rankings(path: str | Path, skip_bad: bool = False) -> Kept[Ranked]:
    """The rankings of a .jsonl file. Raises ValueError, which names up to ten bad lines with their
    reasons; see `parse_lines`."""
    return parse_lines(path, read_lines(path), ranking_of, EXPECTED, skip_bad).values()


def ranking_of(line: str) -> Ranked:
    """The ranking in a line of JSON. Raises ValueError for a line that is none, or that prefers no
    answer to another."""
    record = json_object(line)
    prompt = prompt_in(record)
    answers = checked_list(record, "answers", str, "a list of texts")
    if not FEWEST <= len(answers) <= MOST:
        raise ValueError(f"{len(answers)} answers, expected {FEWEST} to {MOST} to be compared")
    for number, answer in enumerate(answers, 1):
        check_characters(f"answer {number}", answer)
    ranks = checked_list(record, "ranks", int, "a list of whole numbers")
    right = None
    if record.get("right") is not None:
        right = checked_list(record, "right", (int, float), "true/false")
        if not all(value in (0, 1) for value in right):
            raise ValueError("`right` holds other numbers than 0 and 1, expected true/false")
        right = [bool(value) for value in right]
    for name, values in (("ranks", ranks), ("right", right)):
        if values is not None and len(values) != len(answers):
            raise ValueError(f"{len(answers)} answers and {len(values)} {name}, expected as many")
    if len(set(ranks)) == 1:
        raise ValueError(f"all {len(ranks)} ranks are equal, so no answer is preferred; drop it")
    return Ranked(prompt, answers, ranks, right)


def prompt_in(record: dict) -> str:
    """The field `prompt`. Raises ValueError unless it is text with something in it."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("`prompt` is missing, empty or no text")
    check_characters("`prompt`", prompt)
    return prompt


def checked_list(record: dict, name: str, kind, expected: str) -> list:
    """A field that is a list of values of one kind. Raises ValueError for anything else."""
    values = record.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"`{name}` is missing or another kind, expected {expected}")
    if kind is int and any(isinstance(value, bool) for value in values):
        raise ValueError(f"`{name}` holds true or false, expected {expected}")
    return values


# ---- text to tokens ----


def encode_rankings(
    tokenizer: Tokenizer, rankings: Sequence[Ranked], shape: ModelConfig, noise: float, seed: int
) -> list[Ranking]:
    """The rankings as tokens and pairs, each pair turned around with probability `noise`.

    shape: of the model that is to read them. Raises ValueError, with the ranking's number, for an
    answer that is too long for it, or has a token that it does not know.
    """
    prompts = encode_prompts(tokenizer, [ranked.prompt for ranked in rankings], chat=False)
    # All answers at once, in the order in which they are taken up again below.
    texts = [answer for ranked in rankings for answer in ranked.answers]
    encoded = iter(tokenizer.encode_batch(texts))
    found = []
    for number, (ranked, prompt) in enumerate(zip(rankings, prompts, strict=True)):
        sequences = [
            np.array([*prompt, *next(encoded), tokenizer.eos_id], np.int64) for _ in ranked.answers
        ]
        check_sequences(sequences, shape, f"ranking {number} (the first is 0)")
        clean = pairs_of(ranked.ranks)
        right = None if ranked.right is None else np.array(ranked.right)
        noisy = with_noise(clean, noise, seed, number)
        found.append(Ranking(sequences, noisy, clean, right, ranked.prompt))
    return found


def check_sequences(sequences: Sequence[np.ndarray], shape: ModelConfig, what: str) -> None:
    """Raise ValueError for an answer that the model cannot read."""
    longest, largest = max(map(len, sequences)), max(ids.max() for ids in sequences)
    if longest > shape.max_seq_len:
        raise ValueError(
            f"{what} has an answer of {longest} tokens with its prompt, and the model has room for "
            f"{shape.max_seq_len}; drop it, or take a model for longer sequences"
        )
    if largest >= shape.vocab_size:
        raise ValueError(
            f"{what} has the token id {largest}, and the model's vocabulary has ids from 0 to "
            f"{shape.vocab_size - 1}; is this the tokenizer that it was made with?"
        )
