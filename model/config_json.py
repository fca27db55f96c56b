"""config.json of a Hugging Face folder to our ModelConfig, and back.

`config_of` reads the content of any age. transformers 5 moved RoPE's numbers into
`rope_parameters`; before, they were `rope_theta` and `rope_scaling`. A key that is absent means the
default of the family's class (families.py, config_keys.py). Keys that would change the numbers in a
way that we do not have are refused by name; all others are ignored. The keys of experts and of
latent attention are read in config_experts.py.

`content_of` writes the old keys and the new ones, since a reader of either age takes a default for
what it does not find.

The errors here go on after the name of the file: "has rope_type 'longrope'; ...".

Left out: a RoPE for each kind of layer, partial rotation, longrope, dynamic.
Source: `modeling_rope_utils.py` of transformers 5.24.
"""

from typing import Any

from .config import ModelConfig
from .config_experts import (
    EXPERT_COUNTS,
    experts_content,
    is_latent,
    latent_of,
    moe_of,
    with_usual_count,
)
from .config_keys import NUMBER, SIZES, Complaints, Keys, keys_of
from .families import FAMILIES, REFUSED, Family
from .layer_kinds import FULL, SLIDING, no_window, nope_layers_of, window_in_every_other
from .rope_scaling import RopeScaling

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
    "is_causal": (None, True),
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

    Raises ValueError for a family that we do not have, and one that lists all values and
    combinations that we do not have.
    """
    family = family_named(content)
    complaints = Complaints()

    # 1. What we do not compute, and one object in which every key has its value.
    complaints.of(check_architectures, content, family)
    complaints.of(refuse_unknown_numbers, content, family)
    content = complaints.of(with_usual_count, content, family) or content
    keys = keys_of(content, family.defaults, complaints)

    # 2. What follows from several keys.
    windows = complaints.of(windows_of, keys, family)
    nope_layers = complaints.of(layers_without_rope, keys, family)
    head_dim = complaints.of(head_dim_of, keys, family)
    n_kv_heads = complaints.of(kv_heads_of, keys, family)
    rope_theta = complaints.of(theta_of, keys)
    rope_scaling = complaints.of(rope_scaling_of, keys, family)
    latent = complaints.of(latent_of, keys, family)
    moe = complaints.of(moe_of, keys, family)
    complaints.raise_all()

    # 3. Everything is known.
    window, window_layers = windows
    switches = {name: keys[key] for key, names in family.switches.items() for name in names}
    return ModelConfig(
        **{ours: keys[key] for key, ours in SIZES.items()},
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        nope_layers=nope_layers,
        window=window,
        window_layers=window_layers,
        norm_eps=keys["rms_norm_eps"],
        tie_embeddings=keys["tie_word_embeddings"],
        max_seq_len=keys["max_position_embeddings"],
        latent=latent,
        moe=moe,
        **(switches | family.fixed),
    )


def family_named(content: dict) -> Family:
    """The family of a config.json. Raises ValueError for one that we do not have."""
    name = content.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        reason = REFUSED.get(name) if isinstance(name, str) else None
        raise ValueError(
            f"has model_type {name!r}{f' ({reason})' if reason else ''}; expected one of "
            f"{', '.join(FAMILIES)}, the families that r1zero has"
        )
    return family


def check_architectures(content: dict, family: Family) -> None:
    """Raise ValueError for a model of the family that is no language model."""
    classes = content.get("architectures")
    if classes is None or classes == []:
        return
    if not isinstance(classes, list) or family.architecture not in classes:
        raise ValueError(
            f"has architectures {classes!r}; expected [{family.architecture!r}], a model that "
            "predicts the next token"
        )


def refuse_unknown_numbers(content: dict, family: Family) -> None:
    """Raise ValueError for keys that change the numbers in a way that we do not have."""
    # What the family reads is checked where it is read.
    read = {*family.defaults, *(EXPERT_COUNTS if family.routing else ())}
    neutral = {key: values for key, values in NEUTRAL.items() if key not in read} | family.neutral
    found = [
        f"{key} {content[key]!r}"
        for key, values in neutral.items()
        if key in content and not is_one_of(content[key], values)
    ]
    if found:
        raise ValueError(
            f"has {', '.join(found)}, which r1zero does not compute; take a model without"
        )


def is_one_of(value: Any, values: tuple) -> bool:
    """Whether a value is among others. Python's True == 1 does not count."""
    is_bool = isinstance(value, bool)
    return any(value == same and is_bool == isinstance(same, bool) for same in values)


# ---- what follows from several keys; each raises ValueError, or Unusable if a key is unusable ----


def windows_of(keys: Keys, family: Family) -> tuple[int | None, tuple[int, ...]]:
    """(window, the layers that have it)."""
    window, layers = family.window(keys, keys["num_hidden_layers"])
    # Some libraries write 0 where it is not used.
    if layers and not window:
        raise ValueError(
            f"has sliding_window {window} for {len(layers)} layers; expected 1 or more"
        )
    return window, layers


def layers_without_rope(keys: Keys, family: Family) -> tuple[int, ...]:
    return nope_layers_of(keys, keys["num_hidden_layers"]) if family.has_nope_layers else ()


def head_dim_of(keys: Keys, family: Family) -> int:
    """The width of a head: its own key, or the width of the model over the heads."""
    # With latent attention both parts of a key count; head_dim is only one of them there.
    if is_latent(family):
        return keys["qk_nope_head_dim"] + keys["qk_rope_head_dim"]
    head_dim, where = keys["head_dim"], ""
    if head_dim is None:
        d_model, n_heads = keys["hidden_size"], keys["num_attention_heads"]
        if d_model % n_heads:
            raise ValueError(
                f"has no head_dim, and hidden_size {d_model} is no multiple of num_attention_heads "
                f"{n_heads}; add head_dim"
            )
        head_dim, where = d_model // n_heads, " (hidden_size / num_attention_heads)"
    if head_dim % 2:
        raise ValueError(f"has head_dim {head_dim}{where}, which is odd; RoPE rotates pairs")
    return head_dim


def kv_heads_of(keys: Keys, family: Family) -> int:
    """The number of key/value heads. None means one for each head."""
    n_heads, n_kv_heads = keys["num_attention_heads"], keys["num_key_value_heads"]
    if n_kv_heads is None:
        return n_heads
    if is_latent(family) and n_kv_heads != n_heads:
        raise ValueError(
            f"has num_key_value_heads {n_kv_heads} beside num_attention_heads {n_heads}; with "
            "latent attention each head has keys of its own"
        )
    if n_heads % n_kv_heads:
        raise ValueError(
            f"has num_attention_heads {n_heads}, no multiple of num_key_value_heads {n_kv_heads}; "
            "each key/value head serves the same number of heads"
        )
    return n_kv_heads


def theta_of(keys: Keys) -> float:
    """The base of RoPE's frequencies: from the new place, an old one, or the top."""
    for place in ("rope_parameters", "rope_scaling"):
        theta = keys.get(place, {}).get("rope_theta")
        if theta is None:
            continue
        if not NUMBER.fits(theta):
            raise ValueError(f"has rope_theta {theta!r} in {place}; expected {NUMBER.expected}")
        return theta
    return keys["rope_theta"]


def rope_scaling_of(keys: Keys, family: Family) -> RopeScaling | None:
    """How RoPE is stretched: from the new place or the old one."""
    new, old = keys.get("rope_parameters", {}), keys.get("rope_scaling", {})
    if {SLIDING, FULL} & new.keys():
        raise ValueError(
            f"has rope_parameters {new}, one RoPE for each kind of layer; r1zero has one for all"
        )
    share = "partial_rotary_factor"
    # What is inside goes before the default that some families have at the top.
    inside = [place[share] for place in (new, old) if place.get(share) is not None]
    at_top = keys[share] if share in family.defaults else None
    if not all(is_one_of(value, NEUTRAL[share]) for value in inside or [at_top]):
        raise ValueError(
            f"has (or means) {share} {(inside or [at_top])[0]!r}; r1zero rotates whole heads"
        )
    scaling_new, scaling_old = scaling_of(new, keys), scaling_of(old, keys)
    if new and old and scaling_new != scaling_old:
        raise ValueError(
            f"has rope_parameters {new} and rope_scaling {old}, which contradict each other; take "
            "out the wrong one"
        )
    return scaling_new or scaling_old


def scaling_of(rope: dict, keys: Keys) -> RopeScaling | None:
    """The scaling that a dict of RoPE's numbers describes; None for none."""
    kind = rope_type_of(rope)
    if kind == "default":
        return None
    if kind not in list(SCALING_KEYS):
        raise ValueError(
            f"has rope_type {kind!r}, which r1zero does not compute; expected default, "
            f"{' or '.join(SCALING_KEYS)}"
        )
    numbers = {key: rope.get(key) for key in SCALING_KEYS[kind]}
    if kind != "linear":
        # A number at the top goes before the one inside; without any, it is the whole context.
        inside = rope.get("original_max_position_embeddings") or keys["max_position_embeddings"]
        numbers["original_max_seq_len"] = keys.get("original_max_position_embeddings", inside)
    truncate = {}
    if kind == "yarn":
        numbers |= {key: rope[key] for key in YARN_KEYS if rope.get(key)}
        truncate = {"truncate": rope.get("truncate", True)}
    if not all(NUMBER.fits(number) for number in numbers.values()):
        raise ValueError(
            f"has {rope} for RoPE; expected numbers above 0, for {', '.join(SCALING_KEYS[kind])}"
        )
    try:
        return RopeScaling(kind=kind, **numbers, **truncate)
    except ValueError as error:
        raise ValueError(f"has {rope} for RoPE: {error}") from None


def rope_type_of(rope: dict) -> Any:
    """The kind of a scaling, under its new key or its old one."""
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if not kinds and rope.keys() & {*SCALING_KEYS["llama3"], *YARN_KEYS}:
        raise ValueError(f"has {rope} for RoPE, numbers without a rope_type; add it")
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise ValueError(
            f"has rope_type {kinds[0]!r} and type {kinds[1]!r}, which contradict each other; take "
            "out the wrong one"
        )
    return kinds[0] if kinds else "default"


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
    family = FAMILIES[name]
    rope = rope_content(config.rope_scaling)
    if "partial_rotary_factor" in family.defaults:
        rope["partial_rotary_factor"] = 1.0
    content = {
        "architectures": [family.architecture],
        "model_type": name,
        **{key: getattr(config, ours) for key, ours in SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
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
        # Where several fields are one key, they must agree to be read back.
        **{key: getattr(config, names[-1]) for key, names in family.switches.items()},
        **{key: values[-1] for key, values in family.neutral.items()},
        **experts_content(config, family),
        **layers_content(config, family),
    }
    # Readers of latent attention take head_dim for the part of a head that is rotated.
    if not is_latent(family):
        content["head_dim"] = config.head_dim
    if "partial_rotary_factor" in family.defaults:
        content["partial_rotary_factor"] = 1.0
    return content


def layers_content(config: ModelConfig, family: Family) -> dict:
    """The keys that say which layers have a window, and which have no RoPE."""
    content, layers = {}, range(config.n_layers)
    has_window = [config.window_of(layer) is not None for layer in layers]
    if family.window is not no_window:
        content["sliding_window"] = config.window
    if "use_sliding_window" in family.defaults:
        content["use_sliding_window"] = config.window is not None
        content["layer_types"] = [SLIDING if yes else FULL for yes in has_window]
        # What readers without layer_types know: the first layer with a window, or the last.
        bounds = [i for i in layers if has_window[i]] or [config.n_layers]
        from_first = family.window is not window_in_every_other
        content["max_window_layers"] = bounds[0] if from_first else bounds[-1] + 1
    if family.has_nope_layers:
        content["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in layers]
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
