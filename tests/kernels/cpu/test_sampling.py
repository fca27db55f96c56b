"""Sampling from logits: the compiled loop and the reference, against the cumulative sum in fp64."""
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.sampling import sample_logits

from ..naive_ops import assert_close, same

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
NAN, INF, NEAR_ONE, f64 = torch.nan, torch.inf, 1 - 2.0**-53, torch.float64


@pytest.mark.parametrize("V", [1, 31, 32, 33, 1000])
def test_tokens_are_where_the_cumulative_sum_passes(V):
    for spread in (1.0, 8.0, 60.0):
        logits, u = torch.randn(V) * spread, torch.rand(20_000, dtype=f64)
        u[:4] = torch.tensor([0.0, NEAR_ONE, 0.5, 2.0**-53], dtype=f64)
        tokens, logp = sample_logits(logits.expand(len(u), V), u, "cpu")
        log_p = logits.double().log_softmax(-1)
        mean, sums = log_p.exp() * len(u), log_p.exp().cumsum(-1)
        expected = torch.searchsorted(sums / sums[-1], u, right=True).clamp_(max=V - 1)
        edge = (sums - u[:, None]).abs().amin(-1) < 5e-7  # either side of it will do
        plain, plain_logp = sample_logits(logits.expand(len(u), V), u, "reference")
        assert edge.double().mean() < 0.01 and all(((x == expected) | edge).all() for x in (tokens, plain))
        assert_close([logp, plain_logp], [log_p[tokens], log_p[plain]], 2e-6)
        counts = torch.bincount(tokens, minlength=V)
        assert ((counts - mean).abs() <= 5 * mean.sqrt())[mean > 20].all()


@pytest.mark.parametrize("V", [1, 31, 32, 33, 65, 200])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_probability_zero_is_never_sampled_and_a_broken_row_gives_no_token(V, impl):
    u = torch.rand(21, dtype=f64)
    u[:5] = torch.tensor([0.0, NEAR_ONE, 0.5, 1 - 2.0**-25, 1 - 2.0**-24], dtype=f64)
    for first in {0, V - 1, V // 2, min(31, V - 1), min(32, V - 1)}:
        for wanted in ({first}, {first, (first + 1) % V}, {first, (first + 32) % V}):
            logits = torch.full((V, 29), -1e4).t()[4:25]  # tokens first in memory
            logits[:, sorted(wanted)] = torch.rand(len(wanted))
            clean = tokens, logp = sample_logits(logits, u, impl)
            assert set(tokens.tolist()) == wanted and bool(logp.isfinite().all())
            assert tokens[0] == min(wanted) and tokens[1] == max(wanted)
            assert same(sample_logits(logits.contiguous(), u, impl), clean)
        for bad in (NAN, INF, -INF):
            logits[9, first] = bad
            sampled, others = sample_logits(logits, u, impl), torch.arange(21) != 9
            assert sampled[0][9] == -1 and same([x[others] for x in sampled], [x[others] for x in clean])


def test_who_is_served_and_what_is_refused(monkeypatch):
    logits, u = torch.randn(5, 40), torch.rand(5, dtype=f64)
    loop, plain = (sample_logits(logits, u, impl) for impl in ("cpu", "reference"))
    assert same(sample_logits(logits, u), loop) and loop[0].dtype == plain[0].dtype == torch.int64
    assert sample_logits(logits.double(), u)[1].dtype == f64
    with pytest.raises(ValueError, match="float32.*torch.float64 on cpu"):
        sample_logits(logits.double(), u, "cpu")
    with pytest.raises(ValueError, match="impl is 'cuda'; expected \"cpu\", \"reference\" or None"):
        sample_logits(logits, u, "cuda")
    with pytest.raises(ValueError, match=r"logits \(5, 40\), uniforms \(4,\); expected \[B, V\] and \[B\]"):
        sample_logits(logits, u[:4])
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    assert same(sample_logits(logits, u), plain)
    with pytest.raises(ValueError, match="missing: pip install numba"):
        sample_logits(logits, u, "cpu")
