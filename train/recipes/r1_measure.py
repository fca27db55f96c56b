"""What is measured of each stage of `r1zero r1`, on held-out problems, and what is compared.

    measure     accuracy, form and language of puzzles, and how requests are answered
    win_rate    how often one model's answer to a request is preferred to another's
    reached     how many steps of reinforcement learning it takes to an accuracy

Puzzles of both languages and requests are sampled at temperature 1, each problem the same number of
times. Intervals are 95 %, over different problems (eval/harness.py): the same sum in two languages
is one problem, and so is a request that comes twice.

The hidden preference (r1_corpus.py) is looked at here, to judge what the stages came to. Only the
rankings are made from it; no stage sees it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...eval.harness import Estimate, interval
from ...eval.response import Sample, grade_response
from ...eval.sampler import ModelSampler
from ...eval.tasks.assistant import ARROWS, Assistant, Puzzle, without_thanks
from ...model.checkpoint import Checkpoint
from ...model.files import atomic_write_text
from ...model.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ...rl.preferences import agreement
from ..log import read_metrics
from .r1_corpus import preference

WINDOW = 3  # steps of reinforcement learning over which an accuracy is averaged


def sample_held_out(
    loaded: tuple[Transformer, Tokenizer, Checkpoint],
    tasks: dict[str, Assistant],
    n_problems: int,
    n_samples: int,
    tokens: int,
    seed: int,
) -> list[list[Sample]]:
    """For each held-out problem of each task in turn, the samples of a model, as `load_model` gives
    it."""
    model, tokenizer, _ = loaded
    groups = []
    for task in tasks.values():
        sampler = ModelSampler(model, tokenizer, tokens, seed=seed)
        problems = task.problems("test", n_problems)
        answered = sampler([task.prompt(problem) for problem in problems], n_samples)
        groups += [
            [each.sample_of(problem) for each in group]
            for problem, group in zip(problems, answered, strict=True)
        ]
    return groups


def held_out_tasks(n_numbers: int, high: int, ops: str) -> dict[str, Assistant]:
    """The three kinds of held-out problems: puzzles of either language, and requests."""
    options = {"n_numbers": n_numbers, "high": high, "ops": ops}
    tasks = {name: Assistant(kinds="puzzles", languages=name, **options) for name in ARROWS}
    return tasks | {"requests": Assistant(kinds="requests", **options)}


# ---- one model ----


def share(groups: Sequence[Sequence[float]]) -> list[float]:
    """[mean, low, high] of numbers from 0 to 1, given as a list per problem."""
    means = [float(np.mean(group)) for group in groups]
    return list(interval(means, min(map(len, groups))))


def by_problem(groups: list[list[Sample]]) -> list[list[Sample]]:
    """The groups, those of the same sum in one, and those of the same request."""
    found: dict[Any, list[Sample]] = {}
    for group in groups:
        problem = group[0].problem
        key = problem.countdown if isinstance(problem, Puzzle) else problem.numbers
        found.setdefault(key, []).extend(group)
    return list(found.values())


def measure(groups: list[list[Sample]]) -> dict:
    """What was measured of one model, as JSON types; shares are [mean, low, high].

    groups: the samples of each problem, as `sample_held_out` gives them.
    """
    distinct = by_problem(groups)
    puzzles = [group for group in distinct if isinstance(group[0].problem, Puzzle)]
    requests = [group for group in distinct if not isinstance(group[0].problem, Puzzle)]
    graded = [[grade_response(Assistant, sample) for sample in group] for group in puzzles]
    found = {
        "accuracy": share([[grade.accuracy for grade in group] for group in graded]),
        "format": share([[grade.format for grade in group] for group in graded]),
        "tokens": mean_tokens(puzzles),
    }
    for language in ARROWS:
        spoken = [[s for s in group if s.problem.language == language] for group in puzzles]
        found[f"consistency_{language}"] = share([languages_of(group) for group in spoken if group])
    found["consistency"] = share([languages_of(group) for group in puzzles])
    if requests:
        graded = [[grade_response(Assistant, sample) for sample in group] for group in requests]
        exact = [[grade.accuracy * grade.format for grade in group] for group in graded]
        found |= {
            "general": share(exact),
            "thanks_once": share(
                [[n_thanks(sample) == 1 for sample in group] for group in requests]
            ),
            "general_tokens": mean_tokens(requests),
            "preference": float(np.mean([preference(s) for group in requests for s in group])),
        }
    return found


def languages_of(group: list[Sample]) -> list[float]:
    """The consistency of the language of each sample of a puzzle."""
    return [Assistant.language(sample.problem, sample.text) for sample in group]


def n_thanks(sample: Sample) -> int:
    """How often the answer to a request says thanks at its end."""
    answer = Assistant.grade(sample.problem, sample.text).answer
    return without_thanks(answer or "")[1]


def mean_tokens(groups: list[list[Sample]]) -> float:
    """The mean number of tokens of all samples."""
    return float(np.mean([len(sample.tokens) for group in groups for sample in group]))


def write_samples(path: Path, groups: list[list[Sample]]) -> None:
    """One line of JSON per sample: the prompt, the response, and its grade."""
    lines = []
    for sample in (sample for group in groups for sample in group):
        grade = grade_response(Assistant, sample)
        lines.append(
            {
                "prompt": Assistant.prompt(sample.problem),
                "response": sample.text,
                "accuracy": grade.accuracy,
                "format": grade.format,
                "language": Assistant.language(sample.problem, sample.text),
                "preference": preference(sample),
                "n_tokens": len(sample.tokens),
            }
        )
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


# ---- two models ----


def requests_in(path: Path) -> dict[str, list[float]]:
    """The hidden preference of the answers to each request in a file of `write_samples`."""
    found: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["prompt"].startswith("say "):
            found.setdefault(record["prompt"], []).append(record["preference"])
    return found


def win_rate(path: Path, other: Path) -> Estimate:
    """The share of pairs of answers to the same request in which the first file's is preferred.

    A tie counts half. Every answer of one is compared with every answer of the other.
    """
    mine, theirs = requests_in(path), requests_in(other)
    assert mine.keys() == theirs.keys(), "the same held-out requests"
    shares = []
    for prompt, worth in mine.items():
        difference = np.subtract.outer(worth, theirs[prompt])
        shares.append(float(agreement(difference.round(9)).mean()))
    return interval(shares, len(worth))


def reached(run: Path, accuracy: float) -> int | None:
    """The number of steps after which a run's samples were at least so often right, in the mean of
    WINDOW steps; None if they never were."""
    rows = read_metrics(run)
    right = [row["accuracy"] for row in rows]
    for step in range(WINDOW, len(right) + 1):
        if np.mean(right[step - WINDOW : step]) >= accuracy:
            return step
    return None
