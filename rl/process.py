"""Process rewards: the steps of an answer, what each is worth, and what that says of its tokens.

    1. where steps end     characters, as the task says -> tokens             `token_ends`
    2. a head learns       binary cross-entropy at the step ends              `step_loss`
    3. its scores in RL    normalised in the group, summed over what follows  `step_advantages`

A step ends with the token that begins the next: only that token tells that the step is over. (The
demo's tokens hold the mark with the number behind it: `9`, `-7`, `=2`, `,3`.) The ids are those
that were sampled. No text is cut and encoded again, which could give other tokens than those.

A label is a number from 0 to 1: 1 and 0 for what is known, or a share of completions that are right
(Math-Shepherd, arXiv 2312.08935: soft labels, eq. 4; hard ones are 1 if any is right, eq. 3). A
step without a label is no part of the loss. Labels are never cast to bool: 0.25 would become 1, and
so would a mark for "no label" such as -100.

Left out: a min over the steps instead of the sum, labels of more than one kind at a time.

Shapes: N answers, K steps of all answers, G groups, R response tokens of all answers.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..model.packed import pack
from ..model.tokenizer import Tokenizer
from .advantages import gae, group_advantages
from .heads import ValueHead
from .rewards import StepRewards
from .rollouts import Rollouts, cut_by_length

# ---- from characters to tokens ----


def token_ends(tokenizer: Tokenizer, tokens: Sequence[int], ends: Sequence[int]) -> dict[int, int]:
    """The token that ends each step, by its number in the response -> that one of `ends`.

    ends: characters of the response's text up to the end of each step, rising. It is the token with
    the first character behind the step; behind the last character, the end token. Steps that end in
    the same token become one. One that ends behind the last token has not ended.
    """
    found: dict[int, int] = {}
    waiting = list(reversed(ends))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    n_characters = 0
    for i, token in enumerate(tokens):
        if token in tokenizer.eos_ids and i == len(tokens) - 1:
            begun = np.inf  # the end token ends whatever is left
        else:
            spelled = tokenizer.name_of_special.get(token)
            raw = tokenizer.token_bytes(token) if spelled is None else spelled.encode()
            n_characters += len(decoder.decode(raw))
            # A character whose first bytes have come has begun.
            begun = n_characters + bool(decoder.getstate()[0])
        while waiting and waiting[-1] < begun:
            found[i] = waiting.pop()
    return found


# ---- a head that judges steps ----


@dataclass(frozen=True)
class Steps:
    """An answer and the labels of its steps."""

    tokens: np.ndarray
    """Token ids: prompt, answer, and its end token if it has one."""
    ends: np.ndarray
    """[K] int64: the index in `tokens` of the token that ends each step."""
    labels: np.ndarray
    """[K] float64 from 0 to 1; NaN where there is none."""
    facts: dict[str, np.ndarray]
    """[K] bool each: what a task's exact check says, such as "true"; to measure by."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)


class ProcessReward(ValueHead):
    """A value head that is read at the end of each step: is the answer right so far?"""

    def logits(self, sequences: Sequence[np.ndarray], ends: Sequence[np.ndarray]) -> torch.Tensor:
        """[K]: the values at these tokens of each sequence, one sequence after another."""
        starts = np.cumsum([0, *map(len, sequences)])[:-1]
        rows = [start + each for start, each in zip(starts, ends, strict=True)]
        rows_K = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(self.value.device)
        return self.at(pack(list(sequences), self.value.device), rows_K)

    @torch.no_grad()
    def probabilities(
        self, sequences: Sequence[np.ndarray], ends: Sequence[np.ndarray], tokens_per_batch: int
    ) -> list[np.ndarray]:
        """[K] float64 of each sequence: the chance that it is right, at these tokens."""
        found = [np.zeros(0)] * len(sequences)
        has_steps = np.flatnonzero([len(each) for each in ends])
        lengths = np.array([len(tokens) for tokens in sequences], np.int64)
        for chosen in cut_by_length(lengths, has_steps, tokens_per_batch):
            logits_K = self.logits([sequences[n] for n in chosen], [ends[n] for n in chosen])
            scores_K = torch.sigmoid(logits_K).cpu().double().numpy()
            cuts = np.cumsum([len(ends[n]) for n in chosen])[:-1]
            for n, scores in zip(chosen, np.split(scores_K, cuts), strict=True):
                found[n] = scores
        return found

    def score_steps(
        self, task, rollouts: Rollouts, tokenizer: Tokenizer, tokens_per_batch: int
    ) -> StepRewards:
        """The score of each step of each answer."""
        ends = step_ends_of(task, rollouts, tokenizer)
        in_sequence = [
            start + each for start, each in zip(rollouts.prompt_lengths, ends, strict=True)
        ]
        scores = self.probabilities(rollouts.sequences, in_sequence, tokens_per_batch)
        in_all = [
            start + each for start, each in zip(rollouts.response_offsets[:-1], ends, strict=True)
        ]
        return StepRewards(np.concatenate(scores), np.concatenate(in_all))


def step_ends_of(task, rollouts: Rollouts, tokenizer: Tokenizer) -> list[np.ndarray]:
    """[K] int64 of each answer: which of its response tokens end its steps."""
    found = []
    for sample in rollouts.samples():
        ends = task.step_ends(sample.text, not sample.cut_off)
        found.append(np.array([*token_ends(tokenizer, sample.tokens, ends)], np.int64))
    return found


def step_loss(model: ProcessReward, answers: Sequence[Steps]) -> tuple[torch.Tensor, np.ndarray]:
    """(the sum over the labelled steps of the cross-entropy; [K] 1 where the head is on the side of
    the label, else 0).

    -y log sigma(v) - (1 - y) log(1 - sigma(v)) for the label y     (Math-Shepherd, eq. 2)
    """
    labels_K = np.concatenate([answer.labels for answer in answers])
    has_label = ~np.isnan(labels_K)
    logits_K = model.logits([a.tokens for a in answers], [a.ends for a in answers])
    logits_K = logits_K[torch.from_numpy(has_label).to(logits_K.device)]
    labels = torch.from_numpy(labels_K[has_label]).to(logits_K)
    loss = F.binary_cross_entropy_with_logits(logits_K, labels, reduction="sum")
    is_same_K = (logits_K > 0) == (labels > 0.5)
    return loss, is_same_K.cpu().double().numpy()


# ---- from the scores of steps to advantages ----


def step_advantages(
    steps: StepRewards, response_offsets: np.ndarray, group_offsets: np.ndarray
) -> np.ndarray:
    """[R]: the sum of the normalised scores of the steps that end at this token or later.

        r~ = (r - mean(R)) / std(R)        A_t = sum over steps j with index(j) >= t of r~_j

    R are the scores of all steps of all answers of the group (DeepSeekMath, arXiv 2402.03300,
    section 4.1.3). Where all are alike, all are 0.

    The sum pays for steps of more than the mean, and charges for others: an answer of many good
    steps earns more than one of few, so a policy can learn to write more of them.
    """
    if not len(steps.tokens):
        return np.zeros(response_offsets[-1])
    offsets_G = steps.group_offsets(response_offsets, group_offsets)
    earned_R = np.zeros(response_offsets[-1])
    earned_R[steps.tokens] = group_advantages(steps.scores, offsets_G)
    to_go_R, _ = gae(earned_R, np.zeros_like(earned_R), response_offsets, gamma=1.0, lam=1.0)
    return to_go_R


def weighted_steps(rewards, rollouts: Rollouts, weight: float) -> tuple[np.ndarray, dict]:
    """([R] what the steps add to the advantages, metrics for the log); for `Credit`."""
    steps = rewards.steps
    found_R = step_advantages(steps, rollouts.response_offsets, rollouts.group_offsets)
    mean = float(steps.scores.mean()) if len(steps.scores) else 0.0
    n_steps = len(steps.scores) / len(rollouts.sequences)
    return weight * found_R, {"reward_process": mean, "steps_per_answer": n_steps}


# ---- how good a head is ----


def auc(scores_K: np.ndarray, positive_K: np.ndarray) -> float:
    """The chance that a positive has a higher score than a negative, ties half: the area under the
    ROC curve, by ranks (Mann and Whitney). NaN without one of each."""
    positive_K = np.asarray(positive_K, bool)
    n_positive, n_negative = int(positive_K.sum()), int((~positive_K).sum())
    if not n_positive or not n_negative:
        return float("nan")
    # Equal scores share the mean of their ranks.
    _, which_K, counts = np.unique(scores_K, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    ranks = mean_ranks[which_K][positive_K]
    return float((ranks.sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def first_error(is_good_K: np.ndarray) -> int:
    """The number of the first step that is not good; -1 if all are."""
    bad = np.flatnonzero(~np.asarray(is_good_K, bool))
    return int(bad[0]) if len(bad) else -1


class FirstErrors(NamedTuple):
    """How well first errors are found (ProcessBench, arXiv 2412.06559)."""

    found: float
    """Of the answers with an error, the share whose first one is named."""
    spared: float
    """Of the answers without, the share in which none is named."""

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        total = self.found + self.spared
        return 0.0 if total == 0 else 2 * self.found * self.spared / total


def first_errors(named: Sequence[int], real: Sequence[int]) -> FirstErrors:
    """named, real: of each answer the number of its first error, -1 for none."""
    named, real = np.asarray(named), np.asarray(real)
    has_error = real >= 0
    same = named == real
    return FirstErrors(
        float(same[has_error].mean()) if has_error.any() else float("nan"),
        float(same[~has_error].mean()) if (~has_error).any() else float("nan"),
    )
