"""config.json of real models and of any age, and what an absent key means."""
import pytest
import torch

from r1zero.model.config import LatentShape, ModelConfig, preset
from r1zero.model.config_experts import EXPERT_COUNTS
from r1zero.model.config_json import NEUTRAL, config_of, content_of, family_of
from r1zero.model.families import FAMILIES
from r1zero.model.layer_kinds import SLIDING
from r1zero.model.moe_config import ROUTING, MoEConfig
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import count_active_parameters, count_parameters

from .huggingface_cases import transformers


def keys(model_type, vocab, d_model, layers, heads, kv_heads, d_ff, **others) -> dict:
    return dict(model_type=model_type, vocab_size=vocab, hidden_size=d_model, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=d_ff, **others)


LLAMA3 = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, rope_type="llama3",
              original_max_position_embeddings=8192)
# The number of parameters that was published, and what the published file says.
REAL = {
    "Qwen2.5-0.5B": (494_032_768, keys(
        "qwen2", 151_936, 896, 24, 14, 2, 4864, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        sliding_window=32_768, use_sliding_window=False, max_window_layers=24, torch_dtype="bfloat16")),
    "Qwen3-0.6B": (596_049_920, keys(
        "qwen3", 151_936, 1024, 28, 16, 8, 3072, head_dim=128, rope_theta=1e6, rope_scaling=None,
        tie_word_embeddings=True, sliding_window=None, use_sliding_window=False, attention_bias=False)),
    "Llama-3.2-1B": (1_235_814_400, keys(
        "llama", 128_256, 2048, 16, 32, 8, 8192, head_dim=64, rope_theta=5e5, rms_norm_eps=1e-5,
        tie_word_embeddings=True, max_position_embeddings=131_072, rope_scaling=LLAMA3)),
    "SmolLM2-135M": (134_515_008, keys(
        "llama", 49_152, 576, 30, 9, 3, 1536, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_interleaved=False, is_llama_config=True)),
    "SmolLM3-3B": (3_075_098_624, keys(
        "smollm3", 128_256, 2048, 36, 16, 4, 11_008, rope_theta=5e6, no_rope_layer_interval=4,
        use_sliding_window=False, sliding_window=None, max_window_layers=28)),
    "OLMo-2-1B": (1_484_916_736, keys(
        "olmo2", 100_352, 2048, 16, 16, 16, 8192, rope_theta=5e5, rms_norm_eps=1e-6,
        tie_word_embeddings=False, max_position_embeddings=4096)),
    "Mistral-7B-v0.1": (7_241_732_096, keys(
        "mistral", 32_000, 4096, 32, 32, 8, 14_336, rope_theta=1e4, sliding_window=4096)),
}
YARN40 = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)
# And those that one token uses. Three totals were published rounded: 46.7, 14.3 and 671 billion.
EXPERTS = {
    "Mixtral-8x7B": (46_702_792_704, 12.9e9, keys(
        "mixtral", 32_000, 4096, 32, 32, 8, 14_336, num_local_experts=8, num_experts_per_tok=2,
        rope_theta=1e6, rms_norm_eps=1e-5, sliding_window=None, router_aux_loss_coef=0.02)),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, 2.7e9, keys(
        "qwen2_moe", 151_936, 2048, 24, 16, 16, 5632, moe_intermediate_size=1408, num_experts=60,
        num_experts_per_tok=4, shared_expert_intermediate_size=5632, norm_topk_prob=False,
        rope_theta=1e6,
        use_sliding_window=False, sliding_window=32_768, max_window_layers=21, decoder_sparse_step=1)),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704, keys(
        "qwen3_moe", 151_936, 2048, 48, 32, 4, 6144, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, rope_theta=1e6, mlp_only_layers=[], decoder_sparse_step=1,
        use_sliding_window=False, sliding_window=None, max_window_layers=48, attention_bias=False)),
    "OLMoE-1B-7B": (6_919_161_856, 1_282_017_280, keys(
        "olmoe", 50_304, 2048, 16, 16, 16, 1024, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
        rms_norm_eps=1e-5, clip_qkv=None, router_aux_loss_coef=0.01)),
    "DeepSeek-V2-Lite": (15_706_484_224, 2_661_150_208, keys(
        "deepseek_v2", 102_400, 2048, 27, 16, 16, 10_944, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, moe_layer_freq=1,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1,
        topk_group=1, topk_method="greedy", norm_topk_prob=False, scoring_func="softmax", ep_size=1,
        routed_scaling_factor=1.0, rope_scaling=YARN40 | dict(mscale=0.707, mscale_all_dim=0.707),
        aux_loss_alpha=0.001, seq_aux=True, max_position_embeddings=163_840)),
    "DeepSeek-V3": (671_026_404_352, 37e9, keys(
        "deepseek_v3", 129_280, 7168, 61, 128, 128, 18_432, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=3, moe_layer_freq=1,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        n_group=8, topk_group=4, topk_method="noaux_tc", norm_topk_prob=True, scoring_func="sigmoid",
        routed_scaling_factor=2.5, rope_scaling=YARN40 | dict(mscale=1.0, mscale_all_dim=1.0),
        num_nextn_predict_layers=1, max_position_embeddings=163_840)),
}
SMALL = dict(vocab_size=64, hidden_size=128, num_hidden_layers=5, num_attention_heads=32,
             intermediate_size=48)


@pytest.mark.parametrize("name", REAL)
def test_published_models_have_their_published_number_of_parameters(name):
    expected, content = REAL[name]
    assert count_parameters(config_of(content)) == expected
    assert content_of(content["model_type"], config_of(content)).items() >= {
        key: content[key] for key in ("vocab_size", "rope_theta", "rms_norm_eps") if key in content}.items()


@pytest.mark.parametrize("name", EXPERTS)
def test_published_mixtures_have_their_published_numbers_of_parameters(name):
    expected, active, content = EXPERTS[name]
    config = config_of(content)
    assert count_parameters(config) == expected
    rel = 0 if isinstance(active, int) else 0.02  # rounded, or without the embedding
    assert count_active_parameters(config) == pytest.approx(active, rel=rel)
    assert family_of(config) == content["model_type"]
    written = content_of(content["model_type"], config)
    others = {"rope_scaling", "max_window_layers", "sliding_window", "num_nextn_predict_layers"}
    for key in content.keys() & written.keys() - others:
        assert written[key] == content[key], key


def test_published_mixtures_differ_as_they_should():
    lite, v3, qwen = (config_of(EXPERTS[name][2]) for name in
                      ("DeepSeek-V2-Lite", "DeepSeek-V3", "Qwen3-30B-A3B"))
    assert lite.latent == LatentShape() and v3.latent == LatentShape(q_rank=1536)
    assert lite.head_dim == v3.head_dim == 192 and lite.moe.d_shared == 2816
    assert lite.rope_scaling.softmax_factor == pytest.approx(1.59, abs=0.005)
    assert v3.rope_scaling.softmax_factor == pytest.approx(1.87, abs=0.005)
    assert v3.moe == MoEConfig(256, 8, 2048, d_shared=2048, dense_layers=(0, 1, 2), **ROUTING["deepseek-v3"])
    assert qwen.moe == MoEConfig(128, 8, 768, **ROUTING["qwen3-moe"]) and qwen.window is None


def test_what_other_readers_of_deepseek_look_for_is_written():
    """vLLM makes a bias only for noaux_tc, and takes softmax where no scoring_func is named."""
    v2, v3 = (content_of(kind, config_of(EXPERTS[name][2])) for kind, name in
              (("deepseek_v2", "DeepSeek-V2-Lite"), ("deepseek_v3", "DeepSeek-V3")))
    assert v3.items() >= dict(scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=0,
                              rope_interleave=True, moe_layer_freq=1).items()
    assert v2.items() >= dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False).items()
    # It would be taken for the rotated part.
    assert "head_dim" not in v2 and "head_dim" not in v3


def test_the_number_of_experts_is_read_under_each_of_its_names():
    moe = EXPERTS["OLMoE-1B-7B"][2]
    for given in (dict(num_local_experts=64), dict(n_routed_experts=64), dict(num_experts=None), {}):
        content = {key: value for key, value in moe.items() if key != "num_experts"} | given
        assert config_of(content) == config_of(moe)
    assert config_of(moe | dict(num_experts=None, num_local_experts=16)).moe.n_experts == 16
    with pytest.raises(ValueError, match="num_experts 64 and num_local_experts 16, which contradict"):
        config_of(moe | dict(num_local_experts=16))


def test_keys_of_another_familys_experts_mean_nothing():
    moe = EXPERTS["Mixtral-8x7B"][2]
    others = dict(norm_topk_prob=False, moe_intermediate_size=7, n_shared_experts=2, first_k_dense_replace=3,
                  mlp_only_layers=[1], n_group=4, topk_group=2, routed_scaling_factor=3.0, kv_lora_rank=8,
                  router_jitter_noise=0.1, output_router_logits=True)
    assert config_of(moe | others) == config_of(moe)


def test_one_error_names_all_that_is_wrong_with_experts_and_latents():
    with pytest.raises(ValueError) as caught:
        config_of(EXPERTS["DeepSeek-V3"][2] | dict(
            scoring_func="softmax", qk_rope_head_dim=63, n_group=7, norm_topk_prob="no", attention_bias=True,
            num_key_value_heads=1, hidden_act="gelu", v_head_dim=0))
    for what in ("scoring_func 'softmax'", "attention_bias True", "hidden_act 'gelu'", "norm_topk_prob 'no'",
                 "qk_rope_head_dim 63, which is odd", "num_key_value_heads 1", "v_head_dim 0; expected"):
        assert str(caught.value).count(what) == 1, what
    with pytest.raises(ValueError, match="v_head_dim 0; expected .*256 experts do not divide into 7 groups"):
        config_of(EXPERTS["DeepSeek-V3"][2] | dict(n_group=7, v_head_dim=0))


def test_published_models_differ_as_they_should():
    llama, mistral, smollm3 = (config_of(REAL[name][1]) for name in
                               ("Llama-3.2-1B", "Mistral-7B-v0.1", "SmolLM3-3B"))
    assert llama.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert mistral.window == 4096 and mistral.window_layers == tuple(range(32))
    assert smollm3.nope_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35) and smollm3.tie_embeddings
    assert config_of(REAL["Qwen2.5-0.5B"][1]).window is None


@pytest.mark.parametrize("name", FAMILIES)
def test_an_absent_key_means_what_it_means_to_transformers(name):
    small = SMALL | (dict(num_experts_per_tok=2) if name == "deepseek_v2" else {})
    theirs = transformers().AutoConfig.for_model(name, **small)
    if name == "glm4_moe":
        assert theirs.rope_parameters["partial_rotary_factor"] == 0.5  # which is refused
        small = small | dict(partial_rotary_factor=1.0)
    ours = config_of({"model_type": name, **small})
    assert (ours.norm_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    n_kv_heads = 32 if ours.latent else theirs.num_key_value_heads
    assert (ours.n_kv_heads, ours.max_seq_len) == (n_kv_heads, theirs.max_position_embeddings)
    head_dim = getattr(theirs, "qk_head_dim", None) or getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or 128 // 32)
    assert ours.window == (getattr(theirs, "sliding_window", None) or None)
    uses_rope = getattr(theirs, "no_rope_layers", [1] * 5)
    assert ours.nope_layers == tuple(i for i, used in enumerate(uses_rope) if not used)
    check_experts_and_latents(ours, theirs)


def check_experts_and_latents(ours, theirs) -> None:
    if ours.latent:
        latent = ours.latent
        assert (latent.kv_rank, latent.q_rank) == (theirs.kv_lora_rank, theirs.q_lora_rank)
        assert (latent.rope_dim, latent.value_dim) == (theirs.qk_rope_head_dim, theirs.v_head_dim)
    if ours.moe:
        moe, d_expert = ours.moe, getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        shared = getattr(theirs, "n_shared_experts", 0) * d_expert
        n_experts = next(getattr(theirs, key) for key in EXPERT_COUNTS if hasattr(theirs, key))
        assert (moe.n_experts, moe.experts_per_token) == (n_experts, theirs.num_experts_per_tok)
        assert (moe.d_expert, moe.d_shared) == (
            d_expert, getattr(theirs, "shared_expert_intermediate_size", shared))
        assert moe.dense_layers == tuple(range(getattr(theirs, "first_k_dense_replace", 0)))
        assert moe.normalise == getattr(theirs, "norm_topk_prob", True)
        assert moe.scale == getattr(theirs, "routed_scaling_factor", 1.0)
        assert moe.n_groups == (getattr(theirs, "n_group", None) or 1)


WINDOW = dict(use_sliding_window=True, sliding_window=8, max_window_layers=3)


def test_an_old_qwen2_moe_without_layer_types_has_the_window_in_every_other_layer():
    content = {"model_type": "qwen2_moe", **SMALL, "num_attention_heads": 16, **WINDOW}
    theirs = transformers().AutoConfig.for_model(**content).layer_types
    config = config_of(content)
    assert config.window_layers == tuple(i for i, kind in enumerate(theirs) if kind == SLIDING) == (0, 2)
    written = content_of("qwen2_moe", config)
    assert config_of({k: v for k, v in written.items() if k != "layer_types"}) == config
    assert config_of(content | dict(use_sliding_window=False, sliding_window=0)).window is None


def test_a_qwen3_moe_has_the_window_in_all_layers_or_in_none():
    content = {"model_type": "qwen3_moe", **SMALL, **WINDOW}
    assert config_of(content).window_layers == (0, 1, 2, 3, 4)
    assert config_of(content | dict(use_sliding_window=False)).window is None


@pytest.mark.parametrize("keys", [
    dict(model_type="qwen3_moe", decoder_sparse_step=2),
    dict(model_type="qwen2_moe", decoder_sparse_step=3),
    dict(model_type="qwen3_moe", mlp_only_layers=[0, 3]),
    dict(model_type="qwen2_moe", mlp_only_layers=[1], decoder_sparse_step=2),
    dict(model_type="deepseek_v2", first_k_dense_replace=2),
    dict(model_type="deepseek_v3", first_k_dense_replace=5),
    dict(model_type="glm4_moe", first_k_dense_replace=0, partial_rotary_factor=1.0)], ids=str)
def test_the_layers_without_experts_are_those_of_transformers(keys):
    keys = SMALL | dict(num_key_value_heads=32, num_experts_per_tok=2) | keys
    with torch.device("meta"):
        layers = transformers().AutoModelForCausalLM.from_config(
            transformers().AutoConfig.for_model(**keys)).model.layers
    dense = tuple(i for i, layer in enumerate(layers) if not hasattr(layer.mlp, "experts"))
    config = config_of(keys)
    assert (config.moe.dense_layers if config.moe else tuple(range(5))) == dense
    assert config_of(content_of(keys["model_type"], config)) == config


def test_deepseeks_own_step_between_layers_with_experts_counts():
    keys = EXPERTS["DeepSeek-V2-Lite"][2] | dict(num_hidden_layers=6, moe_layer_freq=2)
    assert config_of(keys).moe.dense_layers == (0, 1, 3, 5)


@pytest.mark.parametrize("name", ["qwen2", "mistral", "smollm3"])
def test_a_null_for_key_value_heads_is_one_for_each_head(name):
    content = {"model_type": name, **SMALL, "num_attention_heads": 16, "num_key_value_heads": None}
    assert config_of(content).n_kv_heads == 16


def scaled(**content):
    return config_of({"model_type": "llama", **SMALL, "max_position_embeddings": 256, **content})


def test_rope_is_read_from_old_and_new_keys_in_their_order():
    assert scaled(rope_theta=5.0).rope_theta == 5.0
    assert scaled(rope_theta=5.0, rope_parameters={"rope_theta": 7.0}).rope_theta == 7.0
    for kind in ("type", "rope_type"):
        linear = scaled(rope_scaling={kind: "linear", "factor": 2.0})
        assert (linear.rope_scaling, linear.rope_theta) == (RopeScaling("linear", 2.0), 10_000.0)
    # Without a number of its own, the original context is the whole one; a number at the top goes first.
    inside = {**LLAMA3, "original_max_position_embeddings": 32}
    without = {**LLAMA3, "original_max_position_embeddings": None}
    assert scaled(rope_scaling=without).rope_scaling.original_max_seq_len == 256
    assert scaled(rope_parameters=inside).rope_scaling.original_max_seq_len == 32
    top = scaled(rope_parameters=inside, original_max_position_embeddings=64)
    assert top.rope_scaling.original_max_seq_len == 64


def test_yarn_is_read_with_the_defaults_of_what_it_leaves_out():
    least = scaled(rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 0, "beta_fast": None}).rope_scaling
    assert least == RopeScaling("yarn", 4.0, original_max_seq_len=256)
    every = dict(factor=40, beta_fast=16, beta_slow=2, attention_factor=1.5, mscale=0.7, mscale_all_dim=0.8)
    whole = scaled(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 64,
                                    "truncate": False, **every}).rope_scaling
    assert whole == RopeScaling("yarn", original_max_seq_len=64, truncate=False, **every)
    with pytest.raises(ValueError, match="expected numbers above 0, for factor"):
        scaled(rope_scaling={"type": "yarn"})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "mrope", "proportional"])
def test_other_scalings_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"rope_type '{kind}'"):
        scaled(rope_scaling={"type": kind, "factor": 2.0})


def test_the_theta_inside_an_old_rope_scaling_counts():
    linear = {"type": "linear", "factor": 2.0}
    assert scaled(rope_theta=5.0, rope_scaling=linear).rope_theta == 5.0
    assert scaled(rope_theta=5.0, rope_scaling=linear | {"rope_theta": 7.0}).rope_theta == 7.0
    with pytest.raises(ValueError, match="rope_theta True in rope_scaling"):
        scaled(rope_scaling=linear | {"rope_theta": True})


def test_a_scaling_without_a_type_or_with_two_is_refused():
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match="numbers without a rope_type"):
            scaled(**{key: {"factor": 8}})
        with pytest.raises(ValueError, match="'linear' and type 'llama3', which contradict"):
            scaled(**{key: LLAMA3 | {"rope_type": "linear", "type": "llama3"}})
    assert scaled(rope_parameters={"rope_theta": 7.0}).rope_scaling is None


# What other families of transformers have, and Llama does not.
CHANGING = """hidden_act partial_rotary_factor attention_multiplier query_pre_attn_scalar embedding_multiplier
    residual_multiplier logits_scaling logit_scale scale_emb scale_depth attn_logit_softcapping
    final_logit_softcapping clip_qkv num_experts num_local_experts n_routed_experts rope_interleaved
    rope_interleave use_bidirectional_attention is_causal is_encoder_decoder add_cross_attention""".split()


@pytest.mark.parametrize("key", CHANGING)
def test_every_key_that_changes_the_numbers_is_refused_by_name(key):
    with pytest.raises(ValueError, match=f"has {key} 7, which r1zero does not compute"):
        scaled(**{key: 7})
    other = key != "is_causal"
    with pytest.raises(ValueError, match=f"has {key} {other}, which"):
        scaled(**{key: other})
    assert all(scaled(**{key: value}) == scaled() for value in NEUTRAL[key])


def test_keys_that_change_nothing_are_ignored():
    harmless = dict(attention_dropout=0.1, initializer_range=1.0, use_cache=False, pretraining_tp=2,
                    transformers_version="9", attention_multiplier=None, clip_qkv=None, logits_scaling=1.0,
                    partial_rotary_factor=1.0, hidden_act="silu", num_experts=None, auto_map={"A": "b.C"})
    assert scaled(**harmless) == scaled()


def test_an_old_qwen_without_layer_types_has_the_window_from_a_layer_on():
    window = dict(use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert config_of({"model_type": "qwen2", **SMALL, **window}).window_layers == (3, 4)
    assert config_of({"model_type": "qwen2", **SMALL, **window, "max_window_layers": 9}).window_layers == ()
    written = content_of("qwen2", config_of({"model_type": "qwen2", **SMALL, **window}))
    assert config_of({k: v for k, v in written.items() if k != "layer_types"}).window_layers == (3, 4)


def test_an_old_smollm3_without_layer_types_has_the_window_in_its_layers_without_rope():
    window = dict(use_sliding_window=True, sliding_window=8, no_rope_layer_interval=2)
    config = config_of({"model_type": "smollm3", **SMALL, **window})
    assert config.window_layers == config.nope_layers == (1, 3)
    window |= {"no_rope_layers": [1, 1, 0, 1, 1]}
    assert config_of({"model_type": "smollm3", **SMALL, **window}).window_layers == (2,)


def test_every_config_that_can_be_written_comes_back():
    for config in (preset("qwen3-0.6b", 100), preset("qwen2.5-1.5b", 100), preset("demo", 100),
                   ModelConfig(100, n_layers=2, post_norm=True, qk_norm_full_width=True, vocab_in_use=90)):
        content = content_of(family_of(config), config)
        back = config_of(content).to_dict()
        assert back | {"vocab_in_use": config.vocab_in_use} == config.to_dict()
