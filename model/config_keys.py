"""The keys of a config.json: their types, and what an absent or null key means.

    complaints = Complaints()
    keys = keys_of(content, defaults, complaints)       every key has its value here
    head_dim = complaints.of(head_dim_of, keys)         None if that is impossible
    complaints.raise_all()                              one error for all that is wrong

A key that is wrong or missing is complained of once, and is no part of `keys`. A step that asks for
it raises Unusable, and adds nothing to the complaints.

The texts go on after the name of the file: "has head_dim 15; ...".
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# ---- all that is wrong ----


class Unusable(LookupError):
    """A key is wrong or missing, which is complained of already."""


class Complaints:
    """What is wrong with a file."""

    def __init__(self):
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)

    def of(self, step: Callable, *arguments) -> Any:
        """What a step returns; None if it raises ValueError, whose text is a complaint then."""
        try:
            return step(*arguments)
        except Unusable:
            return None
        except ValueError as error:
            self.add(str(error))
            return None

    def raise_all(self) -> None:
        """Raise ValueError with all complaints, if there are any."""
        if self.texts:
            raise ValueError("; it also ".join(self.texts))


class Keys(dict):
    """Keys and their values; those that are wrong or missing raise Unusable."""

    def __missing__(self, key: str):
        raise Unusable(key)


# ---- types ----

MOST = 2**31 - 1
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Kind:
    """What a value must be."""

    expected: str
    fits: Callable[[Any], bool]


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0; true is none."""
    return type(value) is int and 0 < value <= MOST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number above 0; true is none."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def is_layers(value: Any) -> bool:
    return is_count(value) and value <= MOST_LAYERS


def is_index(value: Any) -> bool:
    return value == 0 and type(value) is int or is_count(value)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_layer_list(value: Any) -> bool:
    return isinstance(value, list) and all(is_index(item) for item in value)


def is_bits(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item in (0, 1) for item in value)


COUNT = Kind("a whole number above 0 and below 2^31", is_count)
LAYERS = Kind(f"a whole number above 0, at most {MOST_LAYERS}", is_layers)
INDEX = Kind("a whole number from 0 to below 2^31", is_index)
NUMBER = Kind("a number above 0", is_number)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXTS = Kind("a list of texts", is_texts)
LAYER_LIST = Kind("a list of numbers of layers", is_layer_list)
BITS = Kind("a list of 0 or 1 for each layer", is_bits)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

# Sizes that no default could guess, and their names here.
SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(SIZES, COUNT),
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": COUNT,
    "original_max_position_embeddings": COUNT,
    "sliding_window": INDEX,
    "max_window_layers": INDEX,
    "no_rope_layer_interval": COUNT,
    "no_rope_layers": BITS,
    "layer_types": TEXTS,
    "rope_theta": NUMBER,
    "rms_norm_eps": NUMBER,
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "use_sliding_window": SWITCH,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), INDEX),
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": COUNT,
    "shared_expert_intermediate_size": INDEX,
    "n_shared_experts": INDEX,
    "mlp_only_layers": LAYER_LIST,
    "decoder_sparse_step": COUNT,
    "first_k_dense_replace": INDEX,
    "moe_layer_freq": COUNT,
    "norm_topk_prob": SWITCH,
    "routed_scaling_factor": NUMBER,
    "n_group": COUNT,
    "topk_group": COUNT,
    "qkv_bias": SWITCH,
    "use_qk_norm": SWITCH,
    # latent attention
    "kv_lora_rank": COUNT,
    "q_lora_rank": COUNT,
    "qk_nope_head_dim": COUNT,
    "qk_rope_head_dim": COUNT,
    "v_head_dim": COUNT,
    "rope_interleave": SWITCH,
}
# Where a null is a value of its own: no window, as many key/value heads as heads, no latent for
# queries, no shared experts, no groups of experts.
NULL_IS_NONE = (
    "sliding_window",
    "num_key_value_heads",
    "q_lora_rank",
    "n_shared_experts",
    "n_group",
    "topk_group",
)


# ---- keys with their values ----


def keys_of(content: dict, defaults: dict, complaints: Complaints) -> Keys:
    """The keys of a config.json. An absent key, or a null, has its default.

    defaults: of the family. Complains of values of another type, and of sizes that are missing.
    """
    # 1. One object of what is given and what is not.
    given = {k: v for k, v in content.items() if v is not None or k in NULL_IS_NONE}
    keys = Keys(defaults | given)
    if missing := [key for key in SIZES if key not in keys]:
        complaints.add(f"lacks {', '.join(missing)}; take the whole config.json of the model")

    # 2. Without what has another type. A null that is left here is none.
    for key, kind in KINDS.items():
        value = keys.get(key)
        if value is not None and not kind.fits(value):
            complaints.add(f"has {key} {value!r}; expected {kind.expected}")
            del keys[key]
    return keys
