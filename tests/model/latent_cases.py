"""Latent attention token by token, and what can be got wrong about it in tiny models of DeepSeek-V2 and V3
with dense MLPs."""
import torch

from r1zero.model.attention import KV
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.pages import PagedKV
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer
from r1zero.model.weight_map import order_of_pairs

from .huggingface_cases import LATENTS, read, saved, swap, with_config, with_weights

HEADS, NOPE, ROPE, VALUE, RANK = 4, 10, 8, 6, 12  # of the models in huggingface_cases


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


def in_file_order(*matrices):
    """The rows that RoPE rotates as the files have them: pairs side by side."""
    def change(model):
        def edit(attn):
            for name in matrices:
                weight = getattr(attn, name).weight
                weight.copy_(weight[order_of_pairs(f"attn.{name}.weight", model.config)])
        return with_attention(edit)(model)
    return change


def yarn_with(**numbers):
    def change(model):
        scaling = model.config.rope_scaling.__dict__ | numbers
        return with_config(rope_scaling=RopeScaling(**scaling))(model)
    return change


EVERYWHERE = {
    "pairs not permuted": in_file_order("q_up", "kv_down"),
    "pairs of queries not permuted": in_file_order("q_up"),
    "pairs of keys not permuted": in_file_order("kv_down"),
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
ALL_ERRORS = [(name, error) for name in LATENTS for error in (*EVERYWHERE, *ERRORS[name])]


def wrong(name: str, error: str) -> Transformer:
    """The tiny model with an error."""
    return {**EVERYWHERE, **ERRORS[name]}[error](read(saved(name)))
