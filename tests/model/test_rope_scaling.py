"""yarn's frequencies and factors, pair by pair; the other kinds are held inside whole models."""
import pytest
import torch

from r1zero.model.rope_scaling import RopeScaling

from .model_cases import naive_yarn

CASES = {
    "DeepSeek-V3": (RopeScaling("yarn", 40.0, original_max_seq_len=4096), 64, 1e4),
    "not truncated": (RopeScaling("yarn", 32.0, original_max_seq_len=4096, truncate=False), 64, 150_000.0),
    "all pairs slow": (RopeScaling("yarn", 4.0, original_max_seq_len=4), 16, 1e4),
    "all pairs fast": (RopeScaling("yarn", 4.0, original_max_seq_len=10**6), 8, 100.0),
    "a blend past the last": (RopeScaling("yarn", 4.0, original_max_seq_len=3000, beta_fast=9.0), 8, 9.0),
    "two pairs": (RopeScaling("yarn", 4.0, original_max_seq_len=64), 4, 50.0),
    "one pair": (RopeScaling("yarn", 4.0, original_max_seq_len=64), 2, 50.0),
}


@pytest.mark.parametrize("scaling, width, theta", CASES.values(), ids=CASES)
def test_yarn_is_its_formula_pair_by_pair(scaling, width, theta):
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    expected = [naive_yarn(scaling, f, theta, width) for f in frequencies.tolist()]
    torch.testing.assert_close(scaling.rescale(frequencies), torch.tensor(expected, dtype=torch.float64))


def test_the_factors_are_those_of_the_published_models():
    lite = RopeScaling("yarn", 40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707)
    v3 = RopeScaling("yarn", 40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
    assert (lite.table_factor, v3.table_factor) == (1, 1)
    assert lite.softmax_factor == pytest.approx(1.59, abs=0.005)
    assert v3.softmax_factor == pytest.approx(1.87, abs=0.005)
    gpt_oss = RopeScaling("yarn", 32.0, original_max_seq_len=4096)
    assert gpt_oss.table_factor == pytest.approx(1.3466, abs=1e-4) and gpt_oss.softmax_factor == 1
    assert RopeScaling("yarn", 0.5).table_factor == 1  # a shorter context is no reason
    assert RopeScaling("yarn", 8.0, attention_factor=1.5, mscale=2.0, mscale_all_dim=1.0).table_factor == 1.5
    llama3 = RopeScaling("llama3", 8.0)
    assert (llama3.table_factor, llama3.softmax_factor) == (1, 1)
