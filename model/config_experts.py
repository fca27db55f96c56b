"""The keys of a config.json for experts and for latent attention, and back.

    with_usual_count(content, family)  before the keys are read: one name for the number of experts
    moe_of(keys, family)               MoEConfig, or None for a dense model
    latent_of(keys, family)            LatentShape, or None for attention as Llama's
    experts_content(config, family)    the keys of both, for a config.json to write

Families have different keys for the same things; a key counts where it is among the defaults of the
family (families.py), but for the number of experts, which is taken under each of its names. What a
family's class does not read is ignored there.

The errors here go on after the name of the file: "has num_experts 8 and ...".

Source: `configuration_*.py` of transformers 5.24, and deepseek-ai/DeepSeek-V2, DeepSeek-V3.
"""

from .config import LatentShape, ModelConfig
from .config_keys import Keys, is_count
from .families import Family
from .moe_config import MOST_EXPERTS, ROUTING, MoEConfig

# transformers 5 renames the first to the second in some families; DeepSeek has the third.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
GREEDY, GROUPS_FIRST = "greedy", "group_limited_greedy"


def own_keys(keys: Keys, family: Family) -> Keys:
    """The keys that mean something to the family."""
    return Keys({key: value for key, value in keys.items() if key in family.defaults})


# ---- reading; each raises ValueError, or Unusable if a key is unusable ----


def moe_of(keys: Keys, family: Family) -> MoEConfig | None:
    """The mixture of experts. None for a dense family, and if all layers are dense."""
    if family.routing is None:
        return None
    own, n_layers = own_keys(keys, family), keys["num_hidden_layers"]
    dense_layers = tuple(layer for layer in range(n_layers) if is_dense(own, layer))
    if len(dense_layers) == n_layers:
        return None

    # 1. How many there are, how wide, and how many of them per token.
    d_expert = own["moe_intermediate_size"] if has_own_width(family) else keys["intermediate_size"]
    n_experts, n_chosen = own[count_key(family)], own["num_experts_per_tok"]
    if not 0 < n_experts <= MOST_EXPERTS:
        raise ValueError(f"has {count_key(family)} {n_experts}; expected 1 to {MOST_EXPERTS:,}")
    if n_chosen is None:
        raise ValueError("lacks num_experts_per_tok; take the whole config.json of the model")

    # 2. How they are chosen: as in the family's table, with the numbers of this model.
    routing = ROUTING[family.routing] | routing_of(own, family)
    try:
        return MoEConfig(
            n_experts=n_experts,
            experts_per_token=n_chosen,
            d_expert=d_expert,
            d_shared=shared_width(own, family, d_expert),
            dense_layers=dense_layers,
            **routing,
        )
    except ValueError as error:
        raise ValueError(f"has numbers of experts that do not fit: {error}") from None


def is_dense(own: Keys, layer: int) -> bool:
    """Whether a layer has a dense MLP all the same."""
    # DeepSeek: the first layers, and those between every n-th one.
    if "first_k_dense_replace" in own:
        step = own.get("moe_layer_freq", 1)
        return layer < own["first_k_dense_replace"] or layer % step != 0
    # Qwen: those of a list, and those between every n-th one, counted from 1.
    if "mlp_only_layers" in own:
        is_between = (layer + 1) % own["decoder_sparse_step"] != 0
        return layer in own["mlp_only_layers"] or is_between
    return False


def has_own_width(family: Family) -> bool:
    """Whether experts have another width than a dense MLP."""
    return "moe_intermediate_size" in family.defaults


def count_key(family: Family) -> str:
    """What the family calls the number of experts."""
    return next(key for key in EXPERT_COUNTS if key in family.defaults)


def with_usual_count(content: dict, family: Family) -> dict:
    """The content, with the number of experts under the family's own name for it.

    Raises ValueError if it has several names, and they disagree.
    """
    given = {key: content[key] for key in EXPERT_COUNTS if is_count(content.get(key))}
    if family.routing is None or not given:
        return content
    if len(set(given.values())) > 1:
        said = " and ".join(f"{key} {count}" for key, count in given.items())
        raise ValueError(f"has {said}, which contradict each other; take out the wrong one")
    return content | {count_key(family): next(iter(given.values()))}


def routing_of(own: Keys, family: Family) -> dict:
    """Fields of MoEConfig that the config.json of this family sets."""
    fields = {}
    if "norm_topk_prob" in family.defaults:
        fields["normalise"] = own["norm_topk_prob"]
    if "routed_scaling_factor" in family.defaults:
        fields["scale"] = own["routed_scaling_factor"]
    if "n_group" not in family.defaults:
        return fields

    # Groups: DeepSeek-V2 says whether it has them at all.
    n_groups, n_chosen = own["n_group"], own["topk_group"]
    method = own["topk_method"] if "topk_method" in family.defaults else GROUPS_FIRST
    if method == GREEDY:
        n_groups, n_chosen = 1, 1
    elif method != GROUPS_FIRST:
        raise ValueError(f"has topk_method {method!r}; expected {GREEDY} or {GROUPS_FIRST}")
    if n_groups is None or n_chosen is None:
        raise ValueError(
            f"has n_group {n_groups} and topk_group {n_chosen}; expected two numbers, 1 and 1 if "
            "there are no groups"
        )
    return fields | group_fields(n_groups, n_chosen, own, family)


def group_fields(n_groups: int, n_chosen: int, own: Keys, family: Family) -> dict:
    """Fields of MoEConfig for experts in groups."""
    # DeepSeek-V3 adds up the two best of a group. Without groups there is nothing to add up.
    is_v3 = ROUTING[family.routing]["scores"] == "sigmoid"
    score = "top2" if is_v3 and n_groups > 1 else "max"
    key = count_key(family)
    if score == "top2" and n_groups == own[key]:
        raise ValueError(
            f"has n_group {n_groups} beside {key} {own[key]}; expected 2 experts or more per group"
        )
    return dict(n_groups=n_groups, groups_per_token=n_chosen, group_score=score)


def shared_width(own: Keys, family: Family, d_expert: int) -> int:
    """The width of the MLP that all tokens go through; 0: there is none."""
    key = "shared_expert_intermediate_size"
    if key in family.defaults:
        if own[key] == 0:
            raise ValueError(f"has {key} 0; expected a number above 0: its gate needs a shared MLP")
        return own[key]
    if "n_shared_experts" in family.defaults:
        return (own["n_shared_experts"] or 0) * d_expert
    return 0


def is_latent(family: Family) -> bool:
    return "kv_lora_rank" in family.defaults


def latent_of(keys: Keys, family: Family) -> LatentShape | None:
    """The widths of latent attention; None if the family has another."""
    if not is_latent(family):
        return None
    rope_dim = keys["qk_rope_head_dim"]
    if rope_dim % 2:
        raise ValueError(f"has qk_rope_head_dim {rope_dim}, which is odd; RoPE rotates pairs")
    return LatentShape(
        kv_rank=keys["kv_lora_rank"],
        q_rank=keys["q_lora_rank"],
        rope_dim=rope_dim,
        value_dim=keys["v_head_dim"],
    )


def has_pairs_side_by_side(content: dict, family: Family) -> bool:
    """Whether the numbers that RoPE rotates together are neighbours in the files."""
    # null is no: whoever reads it takes it for false.
    return is_latent(family) and bool(content.get("rope_interleave", True))


# ---- writing ----


def experts_content(config: ModelConfig, family: Family) -> dict:
    """The keys of experts and of latent attention that the family has."""
    content = moe_content(config, family)
    if is_latent(family) and config.latent is not None:
        latent = config.latent
        content |= {
            "kv_lora_rank": latent.kv_rank,
            "q_lora_rank": latent.q_rank,
            "qk_nope_head_dim": config.head_dim - latent.rope_dim,
            "qk_rope_head_dim": latent.rope_dim,
            "v_head_dim": latent.value_dim,
        }
    if "rope_interleave" in family.defaults:
        content["rope_interleave"] = True
    # The layers that predict further tokens are not read, so there are none to write.
    if "num_nextn_predict_layers" in family.defaults:
        content["num_nextn_predict_layers"] = 0
    return content


def moe_content(config: ModelConfig, family: Family) -> dict:
    """The keys of experts. Where all layers are dense, only that.

    Raises ValueError for a model that a dense family describes.
    """
    if family.routing is None:
        return {}
    if config.moe is None and config.latent is None:
        raise ValueError("a model without experts and latents is written as one of a dense family")
    moe, dense_layers = config.moe, range(config.n_layers)
    content = {}
    if moe is not None:
        dense_layers = moe.dense_layers
        content = {
            count_key(family): moe.n_experts,
            "num_experts_per_tok": moe.experts_per_token,
            "moe_intermediate_size": moe.d_expert,
            "shared_expert_intermediate_size": moe.d_shared,
            "n_shared_experts": moe.d_shared // moe.d_expert,
            "norm_topk_prob": moe.normalise,
            "routed_scaling_factor": float(moe.scale),
            "n_group": moe.n_groups,
            "topk_group": moe.groups_per_token,
            "topk_method": GREEDY if moe.n_groups == 1 else GROUPS_FIRST,
        }
    # How many dense layers come first. Others are none that DeepSeek's keys could name.
    n_first = next((i for i in range(config.n_layers) if i not in dense_layers), config.n_layers)
    content |= {
        "first_k_dense_replace": n_first,
        "moe_layer_freq": 1,
        "mlp_only_layers": list(dense_layers),
        "decoder_sparse_step": 1,
    }
    return {key: value for key, value in content.items() if key in family.defaults}
