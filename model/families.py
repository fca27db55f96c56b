"""Families of open models: how each names its tensors, and what an absent key of its config means.

    family        differs from Llama by
    llama         (Llama 2 and 3, SmolLM2; Mistral without a window)
    mistral       a window in every layer
    qwen2         biases on q, k and v alone
    qwen3         RMSNorm on each head of q and k
    smollm3       layers without RoPE
    olmo2         norms behind attention and MLP, RMSNorm over all heads of q and k
    mixtral       experts
    qwen2_moe     as qwen2, with experts and a shared one that has a gate
    qwen3_moe     as qwen3, with experts
    olmoe         experts, RMSNorm over all heads of q and k
    deepseek_v2   latent attention, experts, shared experts (V2 and V2-Lite)
    deepseek_v3   the same with another router (V3, R1, Moonlight)
    glm4_moe      the experts of deepseek_v3, attention as Llama's (only where it rotates whole
                  heads: the published ones rotate half of each)

config_json.py and config_experts.py read and write config.json with this table, weight_map.py the
names of the weights.

Left out: families with other activations, or scales of their own (Gemma, Granite, gpt-oss, ...).
Source: `configuration_*.py`, `modeling_*.py` and `conversion_mapping.py` of transformers 5.24.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from .layer_kinds import no_window, window_everywhere, window_if_used, window_in_every_other

# ---- names of tensors ----

LAYER = "model.layers.{}."
GATE_UP = ("gate", "up")
# Our name of a parameter -> the tensors of a file that lie in it, one below the other.
# {} stands for the number of the layer, {expert} for that of an expert.
PRE_NORM_NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "norm": ("model.norm.weight",),
    "blocks.{}.attn_norm": (LAYER + "input_layernorm.weight",),
    "blocks.{}.attn.qkv.weight": tuple(LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    "blocks.{}.attn.qkv.bias": tuple(LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"),
    "blocks.{}.attn.q_norm": (LAYER + "self_attn.q_norm.weight",),
    "blocks.{}.attn.k_norm": (LAYER + "self_attn.k_norm.weight",),
    "blocks.{}.attn.out.weight": (LAYER + "self_attn.o_proj.weight",),
    "blocks.{}.attn.out.bias": (LAYER + "self_attn.o_proj.bias",),
    "blocks.{}.mlp_norm": (LAYER + "post_attention_layernorm.weight",),
    "blocks.{}.mlp.gate_up.weight": tuple(LAYER + f"mlp.{x}_proj.weight" for x in GATE_UP),
    "blocks.{}.mlp.gate_up.bias": tuple(LAYER + f"mlp.{x}_proj.bias" for x in GATE_UP),
    "blocks.{}.mlp.down.weight": (LAYER + "mlp.down_proj.weight",),
    "blocks.{}.mlp.down.bias": (LAYER + "mlp.down_proj.bias",),
}
# OLMo-2 has no norm before attention: its norms stand behind attention and behind the MLP.
POST_NORM_NAMES = PRE_NORM_NAMES | {
    "blocks.{}.attn_norm": (LAYER + "post_attention_layernorm.weight",),
    "blocks.{}.mlp_norm": (LAYER + "post_feedforward_layernorm.weight",),
}
# Experts one by one: what we write, and what every version of every library reads.
EXPERT = LAYER + "mlp.experts.{expert}."
MOE_NAMES = PRE_NORM_NAMES | {
    "blocks.{}.mlp.router.linear.weight": (LAYER + "mlp.gate.weight",),
    "blocks.{}.mlp.router.balance_bias": (LAYER + "mlp.gate.e_score_correction_bias",),
    "blocks.{}.mlp.gate_up": tuple(EXPERT + f"{x}_proj.weight" for x in GATE_UP),
    "blocks.{}.mlp.down": (EXPERT + "down_proj.weight",),
    # Several shared experts lie side by side in one MLP, in the files too.
    "blocks.{}.mlp.shared.gate_up.weight": tuple(
        LAYER + f"mlp.shared_experts.{x}_proj.weight" for x in GATE_UP
    ),
    "blocks.{}.mlp.shared.gate_up.bias": tuple(
        LAYER + f"mlp.shared_experts.{x}_proj.bias" for x in GATE_UP
    ),
    "blocks.{}.mlp.shared.down.weight": (LAYER + "mlp.shared_experts.down_proj.weight",),
    "blocks.{}.mlp.shared.down.bias": (LAYER + "mlp.shared_experts.down_proj.bias",),
}
QWEN2_MOE_NAMES = MOE_NAMES | {
    "blocks.{}.mlp.shared.gate_up.weight": tuple(
        LAYER + f"mlp.shared_expert.{x}_proj.weight" for x in GATE_UP
    ),
    "blocks.{}.mlp.shared.down.weight": (LAYER + "mlp.shared_expert.down_proj.weight",),
    "blocks.{}.mlp.shared_gate.weight": (LAYER + "mlp.shared_expert_gate.weight",),
}
# w1 is gate, w2 down and w3 up.
BLOCK_SPARSE_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."
MIXTRAL_NAMES = MOE_NAMES | {
    "blocks.{}.mlp.router.linear.weight": (LAYER + "block_sparse_moe.gate.weight",),
    "blocks.{}.mlp.gate_up": (BLOCK_SPARSE_EXPERT + "w1.weight", BLOCK_SPARSE_EXPERT + "w3.weight"),
    "blocks.{}.mlp.down": (BLOCK_SPARSE_EXPERT + "w2.weight",),
}
DEEPSEEK_NAMES = MOE_NAMES | {
    "blocks.{}.attn.q_down.weight": (LAYER + "self_attn.q_a_proj.weight",),
    "blocks.{}.attn.q_norm": (LAYER + "self_attn.q_a_layernorm.weight",),
    "blocks.{}.attn.q_up.weight": (LAYER + "self_attn.q_b_proj.weight",),
    "blocks.{}.attn.kv_down.weight": (LAYER + "self_attn.kv_a_proj_with_mqa.weight",),
    "blocks.{}.attn.kv_norm": (LAYER + "self_attn.kv_a_layernorm.weight",),
    "blocks.{}.attn.kv_up.weight": (LAYER + "self_attn.kv_b_proj.weight",),
}
# And where a model has no latent for queries.
DIRECT_QUERY_NAMES = {"blocks.{}.attn.q_up.weight": (LAYER + "self_attn.q_proj.weight",)}
# Experts stacked in one tensor, as transformers 5 holds them in memory, whatever the family.
STACKED_EXPERTS = "mlp.experts.gate_up_proj"
STACKED_NAMES = {
    "blocks.{}.mlp.router.linear.weight": (LAYER + "mlp.gate.weight",),
    "blocks.{}.mlp.gate_up": (LAYER + STACKED_EXPERTS,),
    "blocks.{}.mlp.down": (LAYER + "mlp.experts.down_proj",),
}


def names_in_file(names: dict[str, tuple[str, ...]], parameter: str) -> tuple[str, ...]:
    """The tensors that lie in one of our parameters, such as "blocks.3.attn.qkv.weight".

    Those of experts hold {expert}, for the number.
    """
    words = parameter.split(".")
    if words[0] != "blocks":
        return names[parameter]
    pattern = ".".join(["blocks", "{}", *words[2:]])
    return tuple(name.format(words[1], expert="{expert}") for name in names[pattern])


# ---- the families ----


@dataclass(frozen=True)
class Family:
    """One kind of open model."""

    architecture: str
    """Name of its class in transformers."""
    defaults: dict
    """What an absent key of config.json means. Keys of experts and latents that are not here mean
    nothing to the family."""
    fixed: dict = field(default_factory=dict)
    """Fields of our ModelConfig that every model of the family has."""
    switches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys that are true or false, and the fields of our ModelConfig that they set."""
    neutral: dict[str, tuple] = field(default_factory=dict)
    """Keys that have one meaning only, and the values that say so; the last one is written."""
    routing: str | None = None
    """How its experts are chosen, a key of ROUTING; None: it has none."""
    window: Callable = no_window
    """From the content and the number of layers to (window, window layers)."""
    has_nope_layers: bool = False
    names: dict = field(default_factory=lambda: PRE_NORM_NAMES)


USUAL = dict(
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    head_dim=None,
    num_key_value_heads=None,
)
QWEN = dict(
    max_position_embeddings=32_768,
    num_key_value_heads=32,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
QWEN_MOE = dict(mlp_only_layers=[], decoder_sparse_step=1, norm_topk_prob=False)
DEEPSEEK = dict(
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_layer_freq=1,
)
ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "out_bias")}
MLP_BIAS = {"mlp_bias": ("mlp_bias",)}
# The router of DeepSeek-V3, under the names that other libraries look for.
SIGMOID_ROUTER = {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}

# The order is the one in which `family_of` tries them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=USUAL | dict(max_position_embeddings=2048),
        switches=ATTENTION_BIAS | MLP_BIAS,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=USUAL
        | dict(max_position_embeddings=131_072, num_key_value_heads=8, sliding_window=4096),
        window=window_everywhere,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=USUAL | QWEN,
        fixed=dict(qkv_bias=True),
        window=window_if_used,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=USUAL | QWEN | dict(head_dim=128),
        fixed=dict(qk_norm=True),
        switches=ATTENTION_BIAS,
        window=window_if_used,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults=USUAL | dict(max_position_embeddings=2048, rms_norm_eps=1e-5),
        fixed=dict(post_norm=True, qk_norm_full_width=True),
        switches=ATTENTION_BIAS,
        names=POST_NORM_NAMES,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=USUAL
        | dict(
            max_position_embeddings=32_768,
            num_key_value_heads=4,
            rope_theta=2e6,
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layer_interval=4,
        ),
        switches=ATTENTION_BIAS | MLP_BIAS,
        window=window_if_used,
        has_nope_layers=True,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults=USUAL
        | dict(
            max_position_embeddings=131_072,
            num_key_value_heads=8,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
            sliding_window=None,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        routing="mixtral",
        window=window_everywhere,
        names=MIXTRAL_NAMES,
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        defaults=USUAL
        | QWEN
        | QWEN_MOE
        | dict(
            num_key_value_heads=16,
            qkv_bias=True,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        switches={"qkv_bias": ("qkv_bias",)},
        routing="qwen2-moe",
        window=window_in_every_other,
        names=QWEN2_MOE_NAMES,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults=USUAL
        | QWEN_MOE
        | dict(
            max_position_embeddings=32_768,
            num_key_value_heads=4,
            use_sliding_window=False,
            sliding_window=4096,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        fixed=dict(qk_norm=True),
        switches=ATTENTION_BIAS,
        routing="qwen3-moe",
        window=window_everywhere,
        names=MOE_NAMES,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        defaults=USUAL
        | dict(
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        fixed=dict(qk_norm_full_width=True),
        switches=ATTENTION_BIAS,
        routing="olmoe",
        names=MOE_NAMES,
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        defaults=USUAL
        | DEEPSEEK
        | dict(
            max_position_embeddings=2048,
            n_routed_experts=64,
            num_experts_per_tok=None,
            moe_intermediate_size=1407,
            n_shared_experts=2,
            first_k_dense_replace=0,
            topk_method="greedy",
            n_group=None,
            topk_group=None,
            routed_scaling_factor=1.0,
        ),
        switches=MLP_BIAS,
        # transformers never normalises; DeepSeek's own code would, and leave the scale out.
        neutral={
            "scoring_func": (None, "softmax"),
            "norm_topk_prob": (None, False),
            "rope_interleave": (None, True),
            "attention_bias": (None, False),
        },
        routing="deepseek-v2",
        names=DEEPSEEK_NAMES,
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        defaults=USUAL
        | DEEPSEEK
        | dict(
            max_position_embeddings=4096,
            rope_interleave=True,
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_shared_experts=1,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
        ),
        neutral=SIGMOID_ROUTER | {"attention_bias": (None, False)},
        routing="deepseek-v3",
        names=DEEPSEEK_NAMES,
    ),
    "glm4_moe": Family(
        architecture="Glm4MoeForCausalLM",
        defaults=USUAL
        | dict(
            max_position_embeddings=131_072,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            partial_rotary_factor=0.5,
            use_qk_norm=False,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1408,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            num_nextn_predict_layers=1,
        ),
        switches={"attention_bias": ("qkv_bias",), "use_qk_norm": ("qk_norm",)},
        neutral=SIGMOID_ROUTER,
        routing="glm-4.5",
        names=MOE_NAMES,
    ),
}
# Kinds of models that are not read, though much of them is here; and why.
REFUSED: dict[str, str] = {
    "gpt_oss": "its experts have biases and a clamped activation, its attention a sink per head",
    "deepseek_v32": "its attention is sparse",
    "qwen3_next": "most of its layers have linear attention",
    "qwen3_5_moe": "most of its layers have linear attention",
}
