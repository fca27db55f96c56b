"""Where sampled tokens come from: counter-based random numbers, and an inverted cumulative distribution."""
import math

import numpy as np
import pytest
import torch

from r1zero.model.engine.sampling import (
    NonFiniteError,
    _mix,
    counter_uniform,
    sample_seeds,
    sample_tokens,
)

MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15
EDGE_SEEDS = [0, 1, -1, 42, 2**63 - 1, -(2**63), 123456789123456789]


def splitmix_finaliser(z):
    """Steele, Lea and Flood 2014, on Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniforms(seeds, counters):
    seeds, counters = torch.broadcast_tensors(torch.as_tensor(seeds), torch.as_tensor(counters))
    return counter_uniform(seeds.contiguous(), counters.contiguous())


# ---- random numbers

def test_the_numbers_are_splitmix64_on_python_integers():
    for seed in EDGE_SEEDS:
        for counter in (0, 1, 2, 1000, 2**40):
            state = splitmix_finaliser((seed + GOLDEN) & MASK)
            expected = (splitmix_finaliser((state + (counter + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53
            assert uniforms([seed], [counter]).tolist() == [expected]


def test_splitmix64_has_the_published_first_output():
    """The first number of SplitMix64 from state 0, as its reference implementation prints it."""
    assert splitmix_finaliser(GOLDEN) == 0xE220A8397B1DCDAF
    assert int(_mix(torch.tensor([GOLDEN - 2**64]))) & MASK == 0xE220A8397B1DCDAF


def test_the_numbers_are_uniform_and_unrelated():
    n = 40_000
    seeds = sample_seeds(n, 1, 2)
    streams = {
        "one seed, counters that follow": uniforms(7, torch.arange(n)),
        "the next seed": uniforms(8, torch.arange(n)),
        "one counter, seeds that follow": uniforms(torch.arange(n), 5),
        "the next counter": uniforms(torch.arange(n), 6),
        "one counter, seeds as made": uniforms(seeds, 5),
        "the next counter, seeds as made": uniforms(seeds, 6),
        "seeds of the next step": uniforms(sample_seeds(n, 1, 3), 5),
    }
    for name, u in streams.items():
        assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1, name
        distance = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov and Smirnov
        assert distance < 1.95 / n**0.5, name  # exceeded by chance once in a thousand
        lagged = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
        assert lagged.abs() < 4 / n**0.5, name
    between = torch.corrcoef(torch.stack(list(streams.values()))) - torch.eye(len(streams))
    assert between.abs().max() < 4.5 / n**0.5


def test_sample_seeds_are_a_function_of_all_keys():
    a = sample_seeds(50, 3, 4)
    assert a.dtype == torch.int64 and torch.equal(a, sample_seeds(50, 3, 4))
    assert torch.equal(a[:20], sample_seeds(20, 3, 4))  # the number of samples does not change them
    keys = [(3, 4), (4, 3), (3, 5), (3,), (3, 0), (3, 4, 5), (-1, 0), (2**40, 1), (0, 1), (1, 0), (0, 256),
            (2**63, 7)]
    numbers = {int(x) for key in keys for x in sample_seeds(50, *key)}
    assert len(numbers) == 50 * len(keys)


# ---- tokens

def test_tokens_follow_the_softmax():
    n, temperature = 30_000, 0.8
    logits = torch.tensor([1.0, -2.0, 0.3, 3.0, -30.0, 0.0, 2.0])
    expected = (logits.double() / temperature).softmax(-1)
    cases = (sample_seeds(n, 1), torch.full((n,), 9)), (torch.full((n,), 5), torch.arange(n))
    for seeds, counters in cases:
        tokens, logp = sample_tokens(logits.expand(n, -1), temperature, counter_uniform(seeds, counters))
        counts = torch.bincount(tokens, minlength=7).double()
        likely = expected * n > 5
        chi2 = ((counts - expected * n).square() / (expected * n))[likely].sum()
        assert likely.sum() == 6 and chi2 < 20.5  # 5 degrees of freedom, passed by chance once in a thousand
        assert counts[4] == 0
        assert torch.allclose(logp, expected.log()[tokens].float(), atol=1e-5)


NEAR_ONE = 1 - 2.0**-53


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 1e-9, 0.3, 0.5, 1 - 2.0**-25, 1 - 2.0**-30, NEAR_ONE])
@pytest.mark.parametrize("wanted", [[0], [3], [6], [0, 6], [2, 4], [1, 2, 3, 5]], ids=str)
def test_a_token_of_probability_zero_is_never_sampled(u, wanted):
    logits = torch.full((3, 7), -1e4)
    logits[0, wanted] = 0.0
    logits[1, wanted] = torch.linspace(0, -12, len(wanted))
    logits[2, wanted] = torch.linspace(-7, 11, len(wanted)).flip(0)
    tokens, logp = sample_tokens(logits, 1.0, torch.full((3,), u, dtype=torch.float64))
    assert set(tokens.tolist()) <= set(wanted) and bool(torch.isfinite(logp).all())
    if u == 0:
        assert tokens.tolist() == [wanted[0]] * 3
    if u == NEAR_ONE:
        assert tokens[0] == wanted[-1]


@pytest.mark.parametrize("V", [1, 2, 1000, 50_000])
def test_large_vocabularies_at_both_ends(V):
    logits = torch.randn(4, V) * 8
    for u in (0.0, NEAR_ONE):
        tokens, logp = sample_tokens(logits, 0.5, torch.full((4,), u, dtype=torch.float64))
        assert tokens.min() >= 0 and tokens.max() < V and bool(torch.isfinite(logp).all())


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 5.0, 4.9], [-1e4, -2e4, -3e4]])
    zeros = torch.zeros(2)
    tokens, logp = sample_tokens(logits, 0.0, zeros)
    assert tokens.tolist() == [1, 0] and logp.tolist() == [0.0, 0.0]
    cold, _ = sample_tokens(logits, 1e-3, zeros)
    assert cold.tolist() == [1, 0]


def test_huge_logits_are_fine_and_broken_ones_are_counted():
    zeros = torch.zeros(3)
    for temperature in (0.0, 0.1, 1.0):
        tokens, logp = sample_tokens(torch.tensor([[1e30, -1e30, 0.0]] * 3), temperature, zeros)
        assert tokens.tolist() == [0, 0, 0] and logp.tolist() == [0.0] * 3
        for bad in (math.nan, math.inf, -math.inf):
            logits = torch.zeros(3, 4)
            logits[1, 2] = bad
            with pytest.raises(NonFiniteError, match="1 of 3 rows"):
                sample_tokens(logits, temperature, zeros)
    with pytest.raises(NonFiniteError):  # a temperature so low that the division overflows
        sample_tokens(torch.tensor([[3.0, 1.0]] * 3), 1e-39, zeros)


def test_a_token_that_is_known_beforehand():
    """Four equal tokens cut [0, 1) into quarters, so the random number shows which is sampled."""
    seeds, counters = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([9, 8, 7, 6, 5])
    tokens, logp = sample_tokens(torch.zeros(5, 4), 1.0, counter_uniform(seeds, counters))
    assert tokens.tolist() == (counter_uniform(seeds, counters) * 4).long().tolist()
    assert np.allclose(logp, -math.log(4))
