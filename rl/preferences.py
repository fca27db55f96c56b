"""From rankings to a loss: pairs of answers, Bradley-Terry, and how well a model agrees.

    loss = - mean over the pairs of a prompt of log sigma(score of the better - score of the worse)

(InstructGPT, arXiv 2203.02155, eq. 1; then the mean over the prompts of the batch.) K answers to a
prompt make up to K (K - 1) / 2 pairs, and all of them are one element of a batch: each answer is
computed once, and no pair is a training example of its own. (With pairs as separate examples, the
paper's model overfitted within an epoch.) Two answers of equal rank are a tie, and make no pair.

A noisy judge can be imitated: each pair is turned around with probability p, so that even a perfect
model agrees with 1 - p of them.

Left out: a margin from how far apart two ranks are, ties as half a preference.

Shapes: K answers of a prompt, N answers of a batch, P pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..model.packed import pack
from .heads import RewardModel

N_BINS = 5  # of a calibration table


class Pairs(NamedTuple):
    """Which of two answers is better, by their numbers among the answers of a prompt."""

    better: np.ndarray
    """[P] int64."""
    worse: np.ndarray
    """[P] int64."""


@dataclass(frozen=True)
class Ranking:
    """The answers to one prompt, as tokens, and what somebody thinks of them."""

    sequences: list[np.ndarray]
    """K arrays of token ids: prompt, answer, end token."""
    pairs: Pairs
    """As the judge has told them, noise included."""
    clean: Pairs
    """The same pairs without noise."""
    right: np.ndarray | None = None
    """[K] bool: which answers are right; None where that is not known."""
    prompt: str = ""
    """The prompt's text, which several rankings may share."""

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))


# ---- ranks to pairs ----


def pairs_of(ranks: Sequence[int]) -> Pairs:
    """All pairs of answers whose ranks differ; rank 1 is best."""
    ranks_K = np.asarray(ranks)
    first, second = np.triu_indices(len(ranks_K), k=1)
    differ = ranks_K[first] != ranks_K[second]
    first, second = first[differ], second[differ]
    is_better = ranks_K[first] < ranks_K[second]
    return Pairs(np.where(is_better, first, second), np.where(is_better, second, first))


def with_noise(pairs: Pairs, noise: float, seed: int, index: int) -> Pairs:
    """Each pair turned around with probability `noise`, as a fixed function of (seed, index).

    index: the ranking's number in its file.
    """
    key = np.array([seed, index], np.uint64)
    raw_P = np.random.Philox(key=key).random_raw(len(pairs.better))
    # The upper 53 bits are a number from 0 to 1, as numpy makes a float.
    is_turned = (raw_P >> np.uint64(11)) * 2.0**-53 < noise
    return Pairs(
        np.where(is_turned, pairs.worse, pairs.better),
        np.where(is_turned, pairs.better, pairs.worse),
    )


# ---- pairs to a loss ----


def margins_of(scores_N: torch.Tensor, rankings: Sequence[Ranking]) -> torch.Tensor:
    """[P]: score of the better answer minus score of the worse, for all pairs of the rankings, one
    after another. scores_N: of all their answers."""
    better, worse, n_before = [], [], 0
    for ranking in rankings:
        better.append(ranking.pairs.better + n_before)
        worse.append(ranking.pairs.worse + n_before)
        n_before += len(ranking.sequences)
    assert n_before == len(scores_N)
    index = torch.from_numpy(np.stack([np.concatenate(better), np.concatenate(worse)]))
    index = index.to(scores_N.device)
    return scores_N[index[0]] - scores_N[index[1]]


def preference_loss(margins_P: torch.Tensor, rankings: Sequence[Ranking]) -> torch.Tensor:
    """The sum over the rankings of the mean of -log sigma(margin) over each one's pairs. Divided by
    the number of rankings in the batch it is eq. 1."""
    n_pairs = [len(ranking.pairs.better) for ranking in rankings]
    weights_P = np.repeat(1 / np.array(n_pairs), n_pairs)
    weights = torch.from_numpy(weights_P).to(margins_P)
    return -(weights * F.logsigmoid(margins_P)).sum()


def margins_under(model: RewardModel, rankings: Sequence[Ranking]) -> torch.Tensor:
    """`margins_of` with the model's scores."""
    sequences = [tokens for ranking in rankings for tokens in ranking.sequences]
    scores_N = model.at_ends(pack(sequences, model.value.device))
    return margins_of(scores_N, rankings)


# ---- how well a model agrees with the judge ----


def agreement(margins_P: np.ndarray) -> np.ndarray:
    """[P], or of any shape: 1 where the model prefers the answer that the judge does, 0 where it
    prefers the other, and a half where it has no preference."""
    return (1 + np.sign(margins_P)) / 2


class Bin(NamedTuple):
    """The pairs of which a model is about equally sure."""

    n_pairs: int
    predicted: float
    """Mean of sigma(|margin|): how sure the model is of the answer that it prefers."""
    agreed: float
    """Share of the pairs in which the judge prefers it too."""


def calibration(margins_P: np.ndarray, n_bins: int = N_BINS) -> list[Bin]:
    """Bins of equal width from 0.5 to 1 of sigma(|margin|); those without pairs are left out."""
    sure_P = np.array([1 / (1 + math.exp(-abs(margin))) for margin in margins_P])
    bin_P = np.minimum((2 * n_bins * (sure_P - 0.5)).astype(int), n_bins - 1)
    agreed_P = agreement(margins_P)
    return [
        Bin(int(inside.sum()), float(sure_P[inside].mean()), float(agreed_P[inside].mean()))
        for inside in (bin_P == b for b in range(n_bins))
        if inside.any()
    ]
