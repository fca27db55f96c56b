"""config.json of a Hugging Face folder to our ModelConfig, and back.

`config_of` reads the content of any age. transformers 5 moved RoPE's numbers into
`rope_parameters`; before, they were `rope_theta` and `rope_scaling`. A key that is absent means the
default of the family's class (families.py). Keys that would change the numbers in a way that we do
not have are refused by name; all others are ignored.

`content_of` writes the old keys and the new ones, since a reader of either age takes a default for
what it does not find.

The errors here go on after the name of the file: "has rope_type 'longrope'; ...".

Left out: a RoPE for each kind of layer, partial rotation, longrope, dynamic.
Source: `modeling_rope_utils.py` of transformers 5.24.
"""

from numbers import Real

from .config import ModelConfig
from .families import FAMILIES, FULL, SLIDING, Family, no_window, nope_layers_of, window_if_used
from .rope_scaling import RopeScaling

# Sizes that no default could guess, and their names here.
SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_ff",
}
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# Keys of other families that change the numbers, and the values that change nothing.
NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (None, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "rope_interleaved": (None, False),
    "rope_interleave": (None, False),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# yarn's other numbers, which a config.json may leave out; 0 and null mean the default.
YARN_KEYS = (
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


# ---- reading ----


def config_of(content: dict) -> ModelConfig:
    """The config that the content of a config.json describes.

    Raises ValueError for a family, a value or a combination that we do not have.
    """
    family = family_named(content)
    refuse_unknown_numbers(content)

    # 1. A key that is absent means the default of its class. So does a null, except for a window.
    keys = dict(family.defaults)
    keys |= {k: v for k, v in content.items() if v is not None or k == "sliding_window"}
    check_types(keys)

    # 2. Biases, windows, layers without RoPE: where the family has them.
    n_layers = keys["num_hidden_layers"]
    attention_bias = "attention_bias" in family.bias_keys and keys["attention_bias"]
    window, window_layers = family.window(keys, n_layers)
    differs = dict(
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias="mlp_bias" in family.bias_keys and keys["mlp_bias"],
        window=window,
        window_layers=window_layers,
        nope_layers=nope_layers_of(keys, n_layers) if family.has_nope_layers else (),
    )

    # 3. And the numbers that all have.
    rope_theta, rope_scaling = rope_of(content, keys)
    return ModelConfig(
        **{ours: keys[key] for key, ours in SIZES.items()},
        n_kv_heads=kv_heads_of(content, keys),
        head_dim=head_dim_of(keys),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=keys["rms_norm_eps"],
        tie_embeddings=keys["tie_word_embeddings"],
        max_seq_len=keys["max_position_embeddings"],
        **(differs | family.fixed),
    )


def family_named(content: dict) -> Family:
    """The family of a config.json. Raises ValueError for one that we do not have."""
    name = content.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"has model_type {name!r}; expected one of {', '.join(FAMILIES)}, the families that "
            "r1zero has"
        )
    classes = content.get("architectures")
    if classes and family.architecture not in classes:
        raise ValueError(
            f"has architectures {classes}; expected {family.architecture}, a model that predicts "
            "the next token"
        )
    return family


def refuse_unknown_numbers(content: dict) -> None:
    """Raise ValueError for keys that change the numbers in a way that we do not have."""
    found = [
        f"{key} {content[key]!r}"
        for key, neutral in NEUTRAL.items()
        if key in content and content[key] not in neutral
    ]
    if found:
        raise ValueError(
            f"has {', '.join(found)}, which r1zero does not compute; take a model without"
        )


def check_types(keys: dict) -> None:
    """Raise ValueError for a size that is missing or no size, and for a switch that is no bool."""
    if missing := [key for key in SIZES if key not in keys]:
        raise ValueError(f"lacks {', '.join(missing)}; take the whole config.json of the model")
    for key in (*SIZES, "max_position_embeddings"):
        if type(keys[key]) is not int or keys[key] < 1:
            raise ValueError(f"has {key} {keys[key]!r}; expected a whole number above 0")
    for key in SWITCHES:
        if key in keys and not isinstance(keys[key], bool):
            raise ValueError(f"has {key} {keys[key]!r}; expected true or false")


def head_dim_of(keys: dict) -> int:
    """The width of a head: its own key, or the width of the model over the heads."""
    if keys["head_dim"] is not None:
        return keys["head_dim"]
    d_model, n_heads = keys["hidden_size"], keys["num_attention_heads"]
    if d_model % n_heads:
        raise ValueError(
            f"has no head_dim, and hidden_size {d_model} is no multiple of num_attention_heads "
            f"{n_heads}; add head_dim"
        )
    return d_model // n_heads


def kv_heads_of(content: dict, keys: dict) -> int:
    """The number of key/value heads. A null means one for each head, in every family."""
    is_null = "num_key_value_heads" in content and content["num_key_value_heads"] is None
    if is_null or keys["num_key_value_heads"] is None:
        return keys["num_attention_heads"]
    return keys["num_key_value_heads"]


def rope_of(content: dict, keys: dict) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). keys: the content with the family's defaults."""
    new, old = content.get("rope_parameters") or {}, content.get("rope_scaling") or {}
    if {SLIDING, FULL} & new.keys():
        raise ValueError(
            f"has rope_parameters {new}, one RoPE for each kind of layer; r1zero has one for all"
        )
    scaling_new, scaling_old = scaling_of(new, keys), scaling_of(old, keys)
    if new and old and scaling_new != scaling_old:
        raise ValueError(
            f"has rope_parameters {new} and rope_scaling {old}, which contradict each other; take "
            "out the wrong one"
        )
    theta = new.get("rope_theta") or old.get("rope_theta") or keys["rope_theta"]
    return theta, scaling_new or scaling_old


def scaling_of(rope: dict, keys: dict) -> RopeScaling | None:
    """The scaling that a dict of RoPE's numbers describes; None for none."""
    if rope.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise ValueError(
            f"has partial_rotary_factor {rope['partial_rotary_factor']}; r1zero rotates whole heads"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in SCALING_KEYS:
        raise ValueError(
            f"has rope_type {kind!r}, which r1zero does not compute; expected default, "
            f"{' or '.join(SCALING_KEYS)}"
        )
    numbers = {key: rope.get(key) for key in SCALING_KEYS[kind]}
    if kind != "linear":
        # A number at the top goes before the one inside; without any, it is the whole context.
        inside = rope.get("original_max_position_embeddings") or keys["max_position_embeddings"]
        numbers["original_max_seq_len"] = keys.get("original_max_position_embeddings", inside)
    if kind == "yarn":
        numbers |= {key: rope[key] for key in YARN_KEYS if rope.get(key)}
        numbers["truncate"] = rope.get("truncate", True)
    if not all(isinstance(number, Real) for number in numbers.values()):
        raise ValueError(
            f"has {rope} for RoPE; expected numbers for {', '.join(SCALING_KEYS[kind])}"
        )
    return RopeScaling(kind=kind, **numbers)


# ---- writing ----


def family_of(config: ModelConfig) -> str:
    """The model_type as which a model can be written: the first family that computes the same.

    Raises ValueError if there is none.
    """
    for name in FAMILIES:
        # transformers takes no Llama whose width is no multiple of its heads.
        if name == "llama" and config.d_model % config.n_heads:
            continue
        try:
            back = config_of(content_of(name, config))
        except ValueError:
            continue
        # How many rows are in use is the tokenizer's business.
        if back.to_dict() | {"vocab_in_use": config.vocab_in_use} == config.to_dict():
            return name
    raise ValueError(
        f"no family of open models computes the same as {config}; the families that can be "
        f"written are {', '.join(FAMILIES)}"
    )


def content_of(name: str, config: ModelConfig) -> dict:
    """What a config.json of a family holds, with the keys of old and new readers."""
    family, n_layers = FAMILIES[name], config.n_layers
    rope = rope_content(config.rope_scaling)
    content = {
        "architectures": [family.architecture],
        "model_type": name,
        **{key: getattr(config, ours) for key, ours in SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": float(config.norm_eps),
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_theta": float(config.rope_theta), **rope},
        "rope_theta": float(config.rope_theta),
        "rope_scaling": rope if config.rope_scaling else None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if "attention_bias" in family.bias_keys:
        content["attention_bias"] = config.out_bias
    if "mlp_bias" in family.bias_keys:
        content["mlp_bias"] = config.mlp_bias
    if family.window is not no_window:
        content["sliding_window"] = config.window
    if family.window is window_if_used:
        has_window = [config.window_of(layer) is not None for layer in range(n_layers)]
        content["use_sliding_window"] = config.window is not None
        content["layer_types"] = [SLIDING if yes else FULL for yes in has_window]
        # What readers without layer_types know: the first layer with a window.
        content["max_window_layers"] = has_window.index(True) if any(has_window) else n_layers
    if family.has_nope_layers:
        uses_rope = [layer not in config.nope_layers for layer in range(n_layers)]
        content["no_rope_layers"] = [int(yes) for yes in uses_rope]
    return content


def rope_content(scaling: RopeScaling | None) -> dict:
    """The type of RoPE and the numbers of its scaling, for a config.json."""
    if scaling is None:
        return {"rope_type": "default"}
    numbers = {key: float(getattr(scaling, key)) for key in SCALING_KEYS[scaling.kind]}
    if scaling.kind == "yarn":
        given = {key: getattr(scaling, key) for key in YARN_KEYS}
        numbers |= {key: float(number) for key, number in given.items() if number is not None}
        numbers["truncate"] = scaling.truncate
    if scaling.kind != "linear":
        numbers["original_max_position_embeddings"] = scaling.original_max_seq_len
    return {"rope_type": scaling.kind, **numbers}
