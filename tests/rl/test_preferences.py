"""Rankings to pairs to a loss, held against double loops and finite differences; noise; calibration."""
import math

import numpy as np
import pytest
import torch

from r1zero.rl.heads import RewardModel
from r1zero.rl.preferences import (
    Ranking,
    agreement,
    calibration,
    margins_of,
    margins_under,
    pairs_of,
    preference_loss,
    with_noise,
)

from .cases import tiny

RANKS = [[2, 1, 3, 3], [1, 1, 2], [5, 4, 3, 2, 1]]


def ranking(ranks, seed=0) -> Ranking:
    """As many answers of random tokens as there are ranks."""
    rng = np.random.default_rng(seed)
    sequences = [np.append(rng.integers(0, 256, rng.integers(2, 9)), 257) for _ in ranks]
    return Ranking(sequences, pairs_of(ranks), pairs_of(ranks))


def naive_loss(scores: list[list[float]], ranks: list[list[int]]) -> float:
    """InstructGPT's eq. 1, pair by pair, and the mean over the prompts."""
    of_prompts = []
    for s, r in zip(scores, ranks, strict=True):
        losses = [-math.log(1 / (1 + math.exp(-(s[i] - s[j]))))
                  for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]]
        of_prompts.append(sum(losses) / len(losses))
    return sum(of_prompts) / len(of_prompts)


def loss_of(scores: list[list[float]], ranks: list[list[int]]) -> torch.Tensor:
    rankings = [ranking(r) for r in ranks]
    scores_N = torch.tensor(sum(scores, []), dtype=torch.float64)
    return preference_loss(margins_of(scores_N, rankings), rankings) / len(rankings)


def test_a_ranking_makes_all_pairs_but_the_ties():
    found = pairs_of(RANKS[0])
    pairs = set(zip(found.better.tolist(), found.worse.tolist(), strict=True))
    assert pairs == {(1, 0), (0, 2), (0, 3), (1, 2), (1, 3)} and len(found.better) == 5
    assert len(pairs_of([1, 1, 1]).better) == 0 and len(pairs_of(range(9)).better) == 36


def test_the_loss_is_the_mean_over_the_pairs_of_a_prompt_and_then_over_prompts():
    scores = [list(np.random.default_rng(i).normal(size=len(r))) for i, r in enumerate(RANKS)]
    assert float(loss_of(scores, RANKS)) == pytest.approx(naive_loss(scores, RANKS), abs=1e-12)
    assert float(loss_of([[0.0] * len(r) for r in RANKS], RANKS)) == pytest.approx(math.log(2))


def test_the_order_of_the_answers_changes_nothing():
    scores = list(np.random.default_rng(0).normal(size=5))
    order = [3, 0, 4, 1, 2]
    found = loss_of([[scores[i] for i in order]], [[RANKS[2][i] for i in order]])
    assert float(found) == pytest.approx(float(loss_of([scores], [RANKS[2]])), abs=1e-12)


def test_the_gradient_of_a_model_is_that_of_finite_differences():
    model = RewardModel(tiny(dtype=torch.float64)).double()
    with torch.no_grad():
        model.value.normal_(generator=torch.Generator().manual_seed(0))
    rankings = [ranking(r, seed) for seed, r in enumerate(RANKS)]

    def loss() -> torch.Tensor:
        return preference_loss(margins_under(model, rankings), rankings) / len(rankings)

    loss().backward()
    for parameter in (model.value, model.trunk.norm, model.trunk.embed):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in gradient.abs().topk(3).indices:
            kept, found = float(flat[i]), []
            for step in (1e-5, -1e-5):
                flat[i] = kept + step
                found.append(float(loss().detach()))
            flat[i] = kept
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(gradient[i]), rel=1e-5)


def test_noise_turns_a_share_of_the_pairs_around_as_a_function_of_seed_and_ranking():
    pairs = pairs_of(range(64))
    turned = [with_noise(pairs, 0.2, 1, index).better != pairs.better for index in range(10)]
    assert np.mean(turned) == pytest.approx(0.2, abs=0.01)
    again = with_noise(pairs, 0.2, 1, 3)
    assert (again.better != pairs.better).tolist() == turned[3].tolist() != turned[4].tolist()
    assert (with_noise(pairs, 0.2, 2, 3).better != again.better).any()
    for a, b, c, d in zip(*pairs, *again, strict=True):
        assert {a, b} == {c, d}
    same = with_noise(pairs, 0.0, 1, 0)
    assert (same.better == pairs.better).all() and (same.worse == pairs.worse).all()


def test_no_preference_counts_half():
    assert agreement(np.array([0.3, -2.0, 0.0])).tolist() == [1, 0, 0.5]


def test_a_model_that_is_as_sure_as_it_is_right_lies_on_the_diagonal():
    rng = np.random.default_rng(0)
    margins = np.abs(rng.normal(size=40_000) * 2)
    margins *= np.where(rng.random(len(margins)) < 1 / (1 + np.exp(-margins)), 1, -1)
    bins = calibration(margins)
    assert len(bins) == 5 and sum(b.n_pairs for b in bins) == len(margins)
    for found, low in zip(bins, (0.5, 0.6, 0.7, 0.8, 0.9), strict=True):
        assert low <= found.predicted <= low + 0.1
        assert found.agreed == pytest.approx(found.predicted, abs=0.02)
    [certain] = calibration(np.array([50.0, 60.0, -800.0]))
    assert certain.predicted == 1.0 and certain.agreed == pytest.approx(2 / 3)
