"""Tiny models of DeepSeek-V2 and V3 made by transformers, with dense MLPs in all layers; how their weights
become ours; and what can be got wrong about latent attention."""
from functools import cache

import torch

from r1zero.model.attention import KV
from r1zero.model.config import LatentShape, ModelConfig
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.pages import PagedKV
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer

from .huggingface_cases import randomise, swap, transformers, with_config, with_weights

VOCAB, LAYERS, HEADS, NOPE, ROPE, VALUE, RANK = 288, 2, 4, 10, 8, 6, 12
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
             num_key_value_heads=HEADS, intermediate_size=48, max_position_embeddings=64, rope_theta=300.0,
             rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
             pad_token_id=None, first_k_dense_replace=LAYERS, kv_lora_rank=RANK, qk_nope_head_dim=NOPE,
             qk_rope_head_dim=ROPE, v_head_dim=VALUE)
YARN = dict(factor=8.0, original_max_position_embeddings=16, beta_fast=2, beta_slow=0.1)
# name: (class, keys of its config)
TINY = {
    "v2 lite": ("DeepseekV2", dict(q_lora_rank=None, rope_scaling=dict(type="yarn", **YARN, mscale=0.707,
                                                                       mscale_all_dim=0.9))),
    "v2": ("DeepseekV2", dict(q_lora_rank=14)),
    "v3": ("DeepseekV3", dict(q_lora_rank=14, rope_scaling=dict(type="yarn", **YARN, mscale=1.0,
                                                                mscale_all_dim=1.0))),
}


@cache
def theirs(name: str):
    """The tiny model of transformers, every parameter at random."""
    library = transformers()
    kind, keys = TINY[name]
    model = getattr(library, kind + "ForCausalLM")(getattr(library, kind + "Config")(**SHAPE, **keys)).eval()
    randomise(model)
    return model


def config_of(name: str) -> ModelConfig:
    keys = TINY[name][1]
    yarn, scaling = keys.get("rope_scaling"), None
    if yarn:
        scaling = RopeScaling("yarn", 8.0, original_max_seq_len=16, beta_fast=2.0, beta_slow=0.1,
                              mscale=yarn["mscale"], mscale_all_dim=yarn["mscale_all_dim"])
    return ModelConfig(
        vocab_size=VOCAB, n_layers=LAYERS, d_model=32, n_heads=HEADS, n_kv_heads=HEADS, head_dim=NOPE + ROPE,
        d_ff=48, rope_theta=300.0, norm_eps=1e-5, rope_scaling=scaling, tie_embeddings=False, max_seq_len=64,
        latent=LatentShape(kv_rank=RANK, q_rank=keys["q_lora_rank"], rope_dim=ROPE, value_dim=VALUE))


def halves_of_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows [heads, R, ...] whose pairs lie side by side, as our RoPE wants them: the first of each pair, then
    the second."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


def ours(name: str, permute=halves_of_pairs) -> Transformer:
    """Our model with the weights of transformers'. permute: of the rows that RoPE rotates."""
    state = theirs(name).state_dict()
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"],
               "lm_head.weight": state["lm_head.weight"]}
    for i in range(LAYERS):
        layer = {key.removeprefix(f"model.layers.{i}."): value for key, value in state.items()}
        attn = {key.removeprefix("self_attn."): value for key, value in layer.items()}
        lite = TINY[name][1]["q_lora_rank"] is None
        q = attn["q_proj.weight" if lite else "q_b_proj.weight"].unflatten(0, (HEADS, NOPE + ROPE))
        q = torch.cat([q[:, :NOPE], permute(q[:, NOPE:])], dim=1).flatten(0, 1)
        kv = attn["kv_a_proj_with_mqa.weight"]
        block = {
            "attn_norm": layer["input_layernorm.weight"],
            "mlp_norm": layer["post_attention_layernorm.weight"],
            "attn.q_up.weight": q, "attn.kv_norm": attn["kv_a_layernorm.weight"],
            "attn.kv_down.weight": torch.cat([kv[:RANK], permute(kv[None, RANK:])[0]]),
            "attn.kv_up.weight": attn["kv_b_proj.weight"], "attn.out.weight": attn["o_proj.weight"],
            "mlp.gate_up.weight": torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
            "mlp.down.weight": layer["mlp.down_proj.weight"],
        }
        if not lite:
            block |= {"attn.q_down.weight": attn["q_a_proj.weight"],
                      "attn.q_norm": attn["q_a_layernorm.weight"]}
        weights |= {f"blocks.{i}.{key}": value for key, value in block.items()}
    model = Transformer(config_of(name))
    model.load_state_dict(weights)
    return model


# ---- token by token ----

def empty_cache(model: Transformer, n_tokens: int, n_rows: int = 1):
    """(caches, page table) for rows of so many tokens; what nobody has written is NaN."""
    width = -(-n_tokens // PAGE)
    table = 1 + torch.randperm(n_rows * width).view(n_rows, width).int()
    caches = []
    for block in model.blocks:
        n_heads, *widths = block.attn.cache_shape
        caches.append([torch.full((1 + n_rows * width, n_heads, PAGE, w), float("nan"),
                                  dtype=model.compute_dtype) for w in widths])
    return caches, table


def absorbed_hidden_states(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """[T, M] of one sequence, each token decoded from the pages of those before it."""
    caches, table = empty_cache(model, len(tokens))
    hidden = []
    for t, token in enumerate(tokens):
        kv: KV = PagedKV(caches, table, torch.tensor([t], dtype=torch.int32))
        hidden.append(model(torch.tensor([token]), kv.positions, kv))
    return torch.cat(hidden)


# ---- what can be got wrong: from a right model to a wrong one ----

def with_attention(edit):
    """Each layer's attention, changed."""
    return with_weights(lambda block: edit(block.attn))


def set_scale(scale_of):
    return with_attention(lambda attn: setattr(attn, "scale", scale_of(attn)))


def kv_up_as(order):
    """The rows of kv_up in another order. order: from [H, N + E, L]."""
    def edit(attn):
        rows = attn.kv_up.weight.unflatten(0, (HEADS, NOPE + VALUE)).clone()
        attn.kv_up.weight.copy_(order(rows))
    return with_attention(edit)


def rope_first(attn) -> None:
    """The rotated part before the other one in each query."""
    q = attn.q_up.weight.unflatten(0, (HEADS, NOPE + ROPE)).clone()
    attn.q_up.weight.copy_(q.roll(NOPE, 1).flatten(0, 1))


def rotated_before_latent(attn) -> None:
    attn.kv_down.weight.copy_(attn.kv_down.weight.roll(RANK, 0).clone())


def norm_forgotten(attn) -> None:
    attn.kv_norm.fill_(1)


def yarn_with(**numbers):
    def change(model):
        scaling = model.config.rope_scaling.__dict__ | numbers
        return with_config(rope_scaling=RopeScaling(**scaling))(model)
    return change


EVERYWHERE = {
    "scale of the latent's width": set_scale(
        lambda attn: attn.scale * ((NOPE + ROPE) / (RANK + ROPE)) ** 0.5),
    "scale of the unrotated part": set_scale(lambda attn: attn.scale * ((NOPE + ROPE) / NOPE) ** 0.5),
    "eps of the other norms": with_attention(lambda attn: setattr(attn, "norm_eps", 1e-5)),
    "weight of the latent's norm forgotten": with_attention(norm_forgotten),
    "values before keys in each head": kv_up_as(lambda w: w.roll(VALUE, 1).flatten(0, 1)),
    "all keys, then all values": kv_up_as(
        lambda w: w.flatten(0, 1).unflatten(0, (-1, HEADS)).transpose(0, 1).flatten(0, 1)),
    "rotated part first in queries": with_attention(rope_first),
    "rotated part first in the latent's product": with_attention(rotated_before_latent),
    "the two norms swapped": with_weights(lambda block: swap(block.attn_norm, block.mlp_norm)),
}
YARN_ERRORS = {
    "no factor on the scores": set_scale(lambda attn: (NOPE + ROPE) ** -0.5),
    "the factor, not its square": set_scale(lambda attn: (attn.scale * (NOPE + ROPE) ** -0.5) ** 0.5),
    "yarn not applied": with_config(rope_scaling=None),
    "the factor on cosines and sines of other models": yarn_with(attention_factor=1.2079),
    "linear frequencies": yarn_with(beta_fast=1e9, beta_slow=1e8),
    "betas of others": yarn_with(beta_fast=32.0, beta_slow=1.0),
    "not truncated": yarn_with(truncate=False),
}
ERRORS = {
    "v2 lite": {"no factor on cosines and sines": yarn_with(attention_factor=1.0), **YARN_ERRORS},
    "v2": {"yarn": with_config(rope_scaling=RopeScaling("yarn", 8.0, original_max_seq_len=16))},
    "v3": YARN_ERRORS,
}
ALL_ERRORS = [(name, error) for name in TINY for error in (*EVERYWHERE, *ERRORS[name])]


def wrong(name: str, error: str) -> Transformer:
    """Our tiny model with an error."""
    return {**EVERYWHERE, **ERRORS[name]}[error](ours(name))
