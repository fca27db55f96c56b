"""A process reward: is an answer right so far, at the end of each of its steps?

    r1zero collect --run runs/sft --out steps.jsonl --keep all --label-steps 8
    r1zero process-reward --run runs/prm --base runs/sft --data steps.jsonl --labels soft
    r1zero grpo --run runs/rl --base runs/sft --rewards.process runs/prm

It is the base with a value head (rl/heads.py) that is read at the token that ends a step, trained
by cross-entropy (rl/process.py) on one of four kinds of labels (step_file.py). Afterwards a table
shows how well it does on answers to prompts that it has not seen:

    AUC           does a good step have a higher score than a bad one? By its own labels, by the
                  task's exact check, and by where the step stands in its answer
    first error   of answers with a step that is not true, is the first one named; and are the
                  others left alone? (ProcessBench, arXiv 2412.06559, F1 of both.) The last step is
                  the answer itself, and easier: so once with it, and once without

Intervals are by resampling whole answers. Left out: adapters, and a loss at every token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..eval.console import say, show
from ..model.checkpoint import Checkpoint
from ..model.precision import Precision
from ..model.tokenizer import Tokenizer
from ..rl.process import (
    FirstErrors,
    ProcessReward,
    Steps,
    auc,
    first_error,
    first_errors,
    step_loss,
)
from .fit_head import (
    HeadConfig,
    fit_head,
    load_head,
    open_base,
    read_files,
    split_into_batches,
)
from .machine import reuse_memory
from .mixture import parse_sources
from .run import Run, at_least
from .step_file import LABELS, encode_steps, read_steps

LOOP = "process-reward"
N_RESAMPLED = 200  # for an interval
# Steps that have a line of their own in the table.
PLACES = {
    "step 1": slice(0, 1),
    "step 2": slice(1, 2),
    "step 3": slice(2, 3),
    "last step": slice(-1, None),
    "before it": slice(0, -1),
}
EVERY_STEP = slice(None)


@dataclass(frozen=True, kw_only=True)
class ProcessRewardConfig(HeadConfig):
    """Train a process reward on answers with labelled steps."""

    LOOP: ClassVar[str] = LOOP

    data: tuple[str, ...]
    """The .jsonl files of answers with labelled steps, as r1zero collect --label-steps writes them.
    A number behind a file, as in a.jsonl:3 b.jsonl:1, is its share of the answers."""
    labels: str = "true"
    """Which label of a step to learn: true (the step is true), reaches (the target can still be
    reached, too), hard (a completion from there was right) or soft (the share of right ones)."""
    answers_per_step: int = 64
    """Number of answers per optimizer step, each with all of its steps."""

    def __post_init__(self):
        HeadConfig.__post_init__(self)
        at_least(self, 1, "answers_per_step")
        if self.labels not in LABELS:
            expected = ", ".join(LABELS)
            raise ValueError(f"--labels is {self.labels!r}, expected one of {expected}")


def load_process_reward(
    folder: str, device: torch.device, precision: Precision | None = None
) -> tuple[ProcessReward, Tokenizer, Checkpoint]:
    """The process reward of a run's folder; see `load_head`."""
    return load_head(folder, LOOP, ProcessReward, device, precision)


# ---- what it learns ----


class StepLabelsLoss:
    """The cross-entropy of labelled steps, and those held out: an Objective (fit_head.py)."""

    def __init__(self, answers_held_out: list[Steps], config: ProcessRewardConfig):
        self.answers_held_out, self.config = answers_held_out, config

    def loss(self, model: ProcessReward, answers: list[Steps]) -> tuple[torch.Tensor, np.ndarray]:
        return step_loss(model, answers)

    def count(self, answers: list[Steps]) -> int:
        """The number of labelled steps: each counts the same, in whichever answer it is."""
        return sum(int((~np.isnan(answer.labels)).sum()) for answer in answers)

    def begin(self, model: ProcessReward) -> None:
        """A probability has no centre."""

    def finish(self, model: ProcessReward) -> None:
        """A probability needs no centre."""

    def held_out(self, model: ProcessReward) -> dict[str, float]:
        judged = Judged(model, self.answers_held_out, self.config.micro_tokens)
        return {"held_out_auc": judged.auc("its labels", judged.everything)}


# ---- how good it is ----


class Judged:
    """The scores of the steps held out, beside what is known of them."""

    def __init__(self, model: ProcessReward, answers: list[Steps], micro_tokens: int):
        self.answers = answers
        ends = [answer.ends for answer in answers]
        sequences = [answer.tokens for answer in answers]
        self.scores = model.probabilities(sequences, ends, micro_tokens)
        self.everything = np.arange(len(answers))

    def truth(self, n: int, by: str) -> np.ndarray:
        """[K] float64 of answer n: 1 for a good step, 0 for a bad one, NaN where it is not known.
        A share counts as good from a half on."""
        if by != "its labels":
            return self.answers[n].facts[by].astype(float)
        labels_K = self.answers[n].labels
        return np.where(np.isnan(labels_K), np.nan, labels_K >= 0.5)

    def auc(self, by: str, chosen: np.ndarray, which: slice = EVERY_STEP) -> float:
        """The AUC over the steps of the chosen answers. which: of these of each answer alone."""
        scores_K = np.concatenate([self.scores[n][which] for n in chosen])
        truths_K = np.concatenate([self.truth(n, by)[which] for n in chosen])
        is_known = ~np.isnan(truths_K)
        return auc(scores_K[is_known], truths_K[is_known] == 1)

    def first_errors(self, chosen: np.ndarray, which: slice = EVERY_STEP) -> FirstErrors:
        """Found and spared, by whether a step is true."""
        named = [first_error(self.scores[n][which] >= 0.5) for n in chosen]
        real = [first_error(self.answers[n].facts["true"][which]) for n in chosen]
        return first_errors(named, real)

    def known(self, fact: str) -> bool:
        """Whether that fact is known of all answers."""
        return all(fact in answer.facts for answer in self.answers)


def resampled(value_of: Callable[[np.ndarray], float], n: int) -> list[float]:
    """[value, low, high]: of all n answers, and the 95 % interval of answers sampled with
    replacement; values that are NaN are left out."""
    rng = np.random.default_rng(0)
    values = [value_of(rng.integers(0, n, n)) for _ in range(N_RESAMPLED)]
    values = [value for value in values if not np.isnan(value)] or [np.nan]
    return [value_of(np.arange(n)), *np.quantile(values, (0.025, 0.975)).tolist()]


def measure(judged: Judged) -> dict[str, list[float]]:
    """What the table shows, each as [value, low, high]."""
    n = len(judged.answers)
    found = {"AUC, its labels": resampled(lambda chosen: judged.auc("its labels", chosen), n)}
    for fact in ("true", "reaches"):
        if judged.known(fact):
            found[f"AUC, {fact}"] = resampled(lambda chosen, by=fact: judged.auc(by, chosen), n)
    for place, which in PLACES.items():
        found[f"AUC, {place}"] = resampled(
            lambda chosen, which=which: judged.auc("its labels", chosen, which), n
        )
    if judged.known("true"):
        for part in ("found", "spared", "f1"):
            found[f"first error, {part}"] = resampled(
                lambda chosen, part=part: getattr(judged.first_errors(chosen), part), n
            )
        found["first error before it, f1"] = resampled(
            lambda chosen: judged.first_errors(chosen, PLACES["before it"]).f1, n
        )
    return {name: values for name, values in found.items() if not np.isnan(values[0])}


def report(run: Run, model: ProcessReward, held_out: list[Steps], config) -> None:
    """Write what was measured to run.json, and show it as a table."""
    found = measure(Judged(model, held_out, config.micro_tokens))
    n_steps = sum(len(answer.ends) for answer in held_out)
    run.note(
        process_reward={
            "labels": config.labels,
            "answers": len(held_out),
            "steps": n_steps,
            "measured": found,
        }
    )
    lines = [f"{len(held_out):,} held-out answers with {n_steps:,} steps, labels {config.labels}"]
    for name, (value, low, high) in found.items():
        lines.append(f"  {name:<27}{value:7.3f}   [{low:.3f}, {high:.3f}]")
    show("\n".join(lines))


# ---- the whole ----


def process_reward(config: ProcessRewardConfig) -> ProcessReward:
    """Run the loop; returns the trained process reward.

    Raises ValueError for bad flags or data, and Stopped after Ctrl-C.
    """
    reuse_memory()
    run, trunk, tokenizer = open_base(config, "process reward")
    files = read_files(config, read_steps)
    prompts, answers = [], []
    for source, lines in zip(parse_sources(config.data), files, strict=True):
        encoded = encode_steps(tokenizer, lines, trunk.config, config.labels, source.path)
        # An answer without a label has nothing to teach.
        labelled = [n for n, one in enumerate(encoded) if not np.isnan(one.labels).all()]
        if n_without := len(lines) - len(labelled):
            say(
                f"{source.path}: {n_without:,} answers without a label {config.labels} are left out"
            )
        prompts.append([lines[n].prompt for n in labelled])
        answers += [encoded[n] for n in labelled]
    batches, trained, held_out = split_into_batches(
        config, prompts, answers, config.answers_per_step, "answers"
    )
    say(
        f"{len(trained):,} answers with {sum(len(a.ends) for a in trained):,} steps to train on, "
        f"{len(held_out):,} held out"
    )
    model = ProcessReward(trunk)
    with run:
        objective = StepLabelsLoss(held_out, config)
        fit_head(run, model, tokenizer, batches, config, objective)
        report(run, model, held_out, config)
    return model
