"""Families of open models: how each names its tensors, and what an absent key of its config means.

    family     differs from Llama by
    llama      (Llama 2 and 3, SmolLM2; Mistral without a window)
    mistral    a window in every layer
    qwen2      biases on q, k and v alone
    qwen3      RMSNorm on each head of q and k
    smollm3    layers without RoPE
    olmo2      norms behind attention and MLP, RMSNorm over all heads of q and k

config_json.py reads and writes config.json with this table, huggingface.py the weights.

Left out: families with other activations, experts, or scales of their own (Gemma, Granite, ...).
Source: `configuration_*.py` and `modeling_*.py` of transformers 5.24.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

# ---- names of tensors ----

LAYER = "model.layers.{}."
# Our name of a parameter -> the tensors of a file that lie in it, one below the other.
# {} stands for the number of the layer.
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
    "blocks.{}.mlp.gate_up.weight": tuple(LAYER + f"mlp.{x}_proj.weight" for x in ("gate", "up")),
    "blocks.{}.mlp.gate_up.bias": tuple(LAYER + f"mlp.{x}_proj.bias" for x in ("gate", "up")),
    "blocks.{}.mlp.down.weight": (LAYER + "mlp.down_proj.weight",),
    "blocks.{}.mlp.down.bias": (LAYER + "mlp.down_proj.bias",),
}
# OLMo-2 has no norm before attention: its norms stand behind attention and behind the MLP.
POST_NORM_NAMES = PRE_NORM_NAMES | {
    "blocks.{}.attn_norm": (LAYER + "post_attention_layernorm.weight",),
    "blocks.{}.mlp_norm": (LAYER + "post_feedforward_layernorm.weight",),
}


def names_in_file(names: dict[str, tuple[str, ...]], parameter: str) -> tuple[str, ...]:
    """The tensors that lie in one of our parameters, such as "blocks.3.attn.qkv.weight"."""
    words = parameter.split(".")
    if words[0] != "blocks":
        return names[parameter]
    pattern = ".".join(["blocks", "{}", *words[2:]])
    return tuple(name.format(words[1]) for name in names[pattern])


# ---- layers with a window, layers without RoPE ----

SLIDING, FULL = "sliding_attention", "full_attention"


def no_window(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Llama and OLMo-2 have none. Raises ValueError if the config speaks of one all the same."""
    if content.get("sliding_window") is not None or SLIDING in layer_types_of(content, n_layers):
        raise ValueError(
            f"has a sliding window (sliding_window {content.get('sliding_window')}, layer_types "
            f"{content.get('layer_types')}), which a model of this family does not apply; "
            "take those keys out if they mean nothing"
        )
    return None, ()


def window_everywhere(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Mistral: null is no window, an absent key is one of 4096."""
    window = content["sliding_window"]
    kinds = layer_types_of(content, n_layers)
    expected = [FULL if window is None else SLIDING] * n_layers
    if kinds and kinds != expected:
        raise ValueError(
            f"has layer_types {kinds} beside sliding_window {window}; a Mistral has the window in "
            "all of its layers or in none"
        )
    return window, tuple(range(n_layers)) if window is not None else ()


def window_if_used(content: dict, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Qwen and SmolLM3: only with use_sliding_window, and in the layers that layer_types says."""
    window = content["sliding_window"] if content["use_sliding_window"] else None
    kinds = layer_types_of(content, n_layers)
    if window is None:
        if SLIDING in kinds:
            raise ValueError(
                f"has layer_types {kinds}, but use_sliding_window is "
                f"{content['use_sliding_window']} and sliding_window is "
                f"{content['sliding_window']}; the two contradict each other"
            )
        return None, ()
    if kinds:
        return window, tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)
    # Without layer_types: SmolLM3 has the window where it has no RoPE, Qwen from a layer on.
    if "no_rope_layer_interval" in content:
        return window, nope_layers_of(content, n_layers)
    return window, tuple(range(min(content["max_window_layers"], n_layers), n_layers))


def layer_types_of(content: dict, n_layers: int) -> list[str]:
    """The kind of each layer; empty if the config does not say."""
    kinds = content.get("layer_types") or []
    if kinds and (len(kinds) != n_layers or not {SLIDING, FULL}.issuperset(kinds)):
        raise ValueError(
            f"has layer_types {kinds}; expected {SLIDING} or {FULL} for each of {n_layers} layers"
        )
    return kinds


def nope_layers_of(content: dict, n_layers: int) -> tuple[int, ...]:
    """SmolLM3's layers without RoPE. In `no_rope_layers` a 1 means that RoPE is used."""
    uses_rope = content.get("no_rope_layers")
    if uses_rope is None:
        interval = content["no_rope_layer_interval"]
        uses_rope = [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(uses_rope) < n_layers or not {0, 1}.issuperset(uses_rope):
        raise ValueError(
            f"has no_rope_layers {uses_rope}; expected 0 or 1 for each of {n_layers} layers"
        )
    return tuple(layer for layer in range(n_layers) if not uses_rope[layer])


# ---- the families ----


@dataclass(frozen=True)
class Family:
    """One kind of open model."""

    architecture: str
    """Name of its class in transformers."""
    defaults: dict
    """What an absent key of config.json means."""
    fixed: dict = field(default_factory=dict)
    """Fields of our ModelConfig that every model of the family has."""
    bias_keys: tuple[str, ...] = ()
    """Which of attention_bias and mlp_bias its class reads."""
    window: Callable = no_window
    """From the content and the number of layers to (window, window layers)."""
    has_nope_layers: bool = False
    names: dict = field(default_factory=lambda: PRE_NORM_NAMES)


USUAL = dict(
    hidden_act="silu",
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

# The order is the one in which `family_of` tries them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults=USUAL | dict(max_position_embeddings=2048),
        bias_keys=("attention_bias", "mlp_bias"),
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
        bias_keys=("attention_bias",),
        window=window_if_used,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults=USUAL | dict(max_position_embeddings=2048, rms_norm_eps=1e-5),
        fixed=dict(post_norm=True, qk_norm_full_width=True),
        bias_keys=("attention_bias",),
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
        bias_keys=("attention_bias", "mlp_bias"),
        window=window_if_used,
        has_nope_layers=True,
    ),
}
