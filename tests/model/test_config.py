"""The shape of a model: presets, the depth, and shapes that do not fit."""
import json

import pytest

from r1zero.model.config import PRESETS, ModelConfig, from_depth, preset
from r1zero.model.transformer import count_parameters

from .model_cases import CONFIGS, SHAPE


def test_presets_have_the_published_sizes():
    """As the models' weight files hold them, at Qwen's vocabulary of 151,936."""
    sizes = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen3-0.6b": 596_049_920}
    assert {name: count_parameters(preset(name, 151_936)) for name in sizes} == sizes
    assert count_parameters(preset("smollm2-135m", 49_152)) == 134_515_008
    mixtures = {"qwen3-30b-a3b": (151_936, 30_532_122_624), "olmoe-1b-7b": (50_304, 6_919_161_856),
                "deepseek-v2-lite": (102_400, 15_706_484_224)}
    for name, (vocab_size, size) in mixtures.items():
        assert count_parameters(preset(name, vocab_size)) == size
    assert all(preset(name, 10).vocab_size == 10 for name in PRESETS)
    assert preset("tiny", 10, n_layers=5, rope_theta=3.0) == ModelConfig(
        **{**PRESETS["tiny"], "n_layers": 5, "rope_theta": 3.0}, vocab_size=10)


def test_depth_sets_the_whole_shape():
    assert from_depth(4, 100) == preset("depth=4", 100) == ModelConfig(
        vocab_size=100, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384)
    assert preset("depth=12", 9).head_dim == 64 and preset("depth=2", 9, max_seq_len=7).max_seq_len == 7
    counts = [count_parameters(from_depth(depth, 100)) for depth in range(1, 40)]
    assert all(a < b for a, b in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize("change,message", [
    ({"n_heads": 3}, "n_heads 3 is no multiple of n_kv_heads 2"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
    ({"n_layers": 0}, "n_layers is 0, expected a whole number above 0"),
    ({"n_layers": None}, "n_layers is None"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"d_ff": 2.5}, "d_ff is 2.5, expected a whole number"),
    ({"d_model": "12"}, "d_model is '12'"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0, expected a number above 0"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"qk_norm": True, "qk_norm_full_width": True}, "exclude each other"),
    ({"nope_layers": (2,)}, r"nope_layers is \(2,\), expected numbers of layers, 0 to 1"),
    ({"window_layers": (0,)}, "window is None, expected a whole number above 0 for the layers"),
    ({"window_layers": (0,), "window": 0}, "window is 0"),
    ({"vocab_in_use": 20}, "vocab_in_use is 20, expected 1 to vocab_size 19"),
    ({"rope_scaling": {"kind": "longrope", "factor": 2.0}},
     "rope scaling is 'longrope'; expected one of linear,"),
    ({"rope_scaling": {"kind": "yarn", "factor": 2.0, "beta_slow": 40.0}}, "beta_slow 40.0 is not below"),
    ({"rope_scaling": {"kind": "yarn", "factor": 2.0, "mscale": 0}}, "mscale is 0, expected a number"),
    ({"latent": {}}, "n_kv_heads is 2 with latent attention, .*expected n_heads, 4"),
    ({"latent": {"kv_rank": 0}}, "latent.kv_rank is 0, expected a whole number above 0"),
    ({"latent": {"q_rank": 1.5}}, "latent.q_rank is 1.5"),
    ({"latent": {"rope_dim": 3}, "n_kv_heads": 4}, "latent.rope_dim is 3, expected an even number below"),
    ({"latent": {"rope_dim": 6}, "n_kv_heads": 4}, "latent.rope_dim is 6, expected .* head_dim, 6"),
    ({"latent": {"rope_dim": 2}, "n_kv_heads": 4, "qk_norm": True, "nope_layers": (1,)},
     r"latent attention has none of qk_norm True, nope_layers \(1,\)"),
    ({"rope_scaling": {"kind": "llama3", "factor": 0.0}}, "factor is 0.0, expected a number above 0"),
    ({"rope_scaling": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 4.0}}, "not below high_freq"),
])
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **change})


def test_a_config_survives_json():
    config = CONFIGS["llama 3"]
    assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config
    windowed = CONFIGS["smollm3"]
    assert ModelConfig(**json.loads(json.dumps(windowed.to_dict()))) == windowed
    latent = CONFIGS["deepseek v3"]
    assert ModelConfig(**json.loads(json.dumps(latent.to_dict()))) == latent


def test_a_config_from_before_latents_and_yarn_is_read():
    """Checkpoints hold the fields of their day."""
    config = CONFIGS["llama 3"]
    old = config.to_dict()
    del old["latent"]
    for name in ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"):
        del old["rope_scaling"][name]
    assert ModelConfig(**old) == config


@pytest.mark.parametrize("name", ["gpt5", "", "depth=0", "depth=-1", "depth=x", "depth=", "depth=2.5"])
def test_unknown_presets(name):
    with pytest.raises(ValueError, match="depth=.*" if name.startswith("depth") else "known are .*demo,"):
        preset(name, 10)
