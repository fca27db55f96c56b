"""What is liked, how it ranks, and which of two policies is better: by hand and by enumeration."""
import itertools
import json

import numpy as np
import pytest

from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.rl.rollouts import Rollouts
from r1zero.train.rankings import ranking_of
from r1zero.train.recipes.hidden_preference import (
    best_of,
    kl_of_best_of,
    mean_of,
    preferences,
    ranking_lines,
    win_rate,
)

PROBLEM, OTHER = CountdownProblem((3, 7, 9), 13), CountdownProblem((1, 2, 3), 6)
RIGHT, WRONG = "<think></think><answer>9-3+7</answer>", "<think></think><answer>9+3-7</answer>"


def rollouts(texts, lengths, sizes, reasons) -> Rollouts:
    tokens = [np.zeros(2 + length, np.int64) for length in lengths]
    problems = [PROBLEM, OTHER][: len(sizes)]
    offsets = np.cumsum([0, *sizes])
    return Rollouts(problems, tokens, np.full(len(texts), 2), offsets, [], reasons, texts, 1.0, 0)


TEXTS = [RIGHT, RIGHT, WRONG, "9-3+7", RIGHT[:-9], WRONG, WRONG]
LENGTHS, REASONS = [10, 20, 10, 4, 30, 10, 10], ["stop"] * 4 + ["length"] + ["stop"] * 2


def test_the_preference_is_for_right_well_formed_and_short_answers():
    found = preferences(Countdown, rollouts(TEXTS, LENGTHS, [5, 2], REASONS))
    assert found == pytest.approx([2.4, 2.3, 0.4, -0.04, -0.3, 0.4, 0.4])


def test_rankings_leave_out_what_was_cut_off_and_problems_whose_answers_are_all_alike():
    [line] = ranking_lines(Countdown, rollouts(TEXTS, LENGTHS, [5, 2], REASONS))
    assert json.loads(line) == {"prompt": "3 7 9 -> 13", "answers": TEXTS[:4], "ranks": [1, 2, 3, 4],
                                "right": [True, True, False, False]}
    assert ranking_of(line).ranks == [1, 2, 3, 4]
    [tied] = ranking_lines(Countdown, rollouts([RIGHT, WRONG, WRONG], [9, 8, 8], [3], ["stop"] * 3))
    assert json.loads(tied)["ranks"] == [1, 2, 2]


def test_the_win_rate_counts_every_pair_of_a_problem_and_a_tie_as_half():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, (30, 2)), rng.integers(0, 4, (30, 3))
    wins = [np.mean([(a > b) + 0.5 * (a == b) for a in a_S for b in b_S])
            for a_S, b_S in zip(ours, theirs, strict=True)]
    found = win_rate(ours, theirs)
    assert found.mean == pytest.approx(np.mean(wins)) and found.low < found.mean < found.high
    same = win_rate(ours, ours)
    assert same.mean == pytest.approx(0.5) and same.low < 0.5 < same.high
    assert win_rate(ours + 9, theirs).mean == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_all_ways_to_take_n(n):
    rng = np.random.default_rng(n)
    scores, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    expected = [np.mean([v[max(some, key=lambda i: s[i])] for some in itertools.combinations(range(5), n)])
                for s, v in zip(scores, values, strict=True)]
    assert best_of(n, scores, values) == pytest.approx(expected)


def test_the_kl_of_the_best_of_n_is_that_of_the_density_n_u_to_the_n_minus_1():
    u = (np.arange(10**6) + 0.5) / 10**6
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        assert kl_of_best_of(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)


def test_a_mean_has_a_normal_interval_over_problems():
    found = mean_of(np.array([1.0, 3.0] * 50))
    assert found == pytest.approx((2.0, 2 - 0.196, 2 + 0.196), abs=1e-4)
