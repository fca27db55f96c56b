"""Tiny open models made by transformers, one for each family, whose every parameter matters; and what can be
got wrong about them.

A fresh model hides errors: norms of 1 and biases of 0 do nothing. Half of the embeddings here are very small,
so that the eps of the norms counts."""
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from einops import rearrange

from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope
from r1zero.model.config_experts import is_latent
from r1zero.model.families import FAMILIES
from r1zero.model.huggingface import read_config, read_weights
from r1zero.model.packed import pack
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer
from r1zero.model.weight_map import names_of, parts_of

TOLERANCE = 1e-4
VOCAB = 288  # more than the 258 ids of bytes: the other rows are padding
LENGTHS = 41, 23  # past each window and each original context
# Real files, which are not part of the repository.
DATA = Path(os.environ.get("R1ZERO_DATA", Path(__file__).parents[3] / "shared" / "data"))
CPU = torch.device("cpu")

SHAPE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, rope_theta=300.0,
             rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
# pairs of a head of 8 lie 0, 1/3, 2/3 and all the way from kept to divided at theta 300
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.1)
# name: (model_type, keys of its config)
TINY = {
    "llama": ("llama", dict(rope_scaling=LLAMA3)),
    "llama with biases": ("llama", dict(rope_scaling=dict(type="linear", factor=4.0), attention_bias=True,
                                        mlp_bias=True, tie_word_embeddings=True)),
    "llama with yarn": ("llama", dict(rope_scaling=YARN, rms_norm_eps=1e-6)),
    "mistral": ("mistral", dict(sliding_window=8, head_dim=16)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-6)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, num_hidden_layers=4, tie_word_embeddings=True,
                                use_sliding_window=True, sliding_window=8)),
    "olmo2": ("olmo2", dict()),
}
each_family = pytest.mark.parametrize("name", TINY)
# Those with experts, and what can be got wrong about them, are in expert_cases.py.
LATENT = dict(num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6,
              num_experts_per_tok=3, moe_intermediate_size=12, n_routed_experts=8, first_k_dense_replace=1)
EXPERTS = {
    # as wide as the model, so that no shape tells w1, w2 and w3 apart
    "mixtral": ("mixtral", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=8,
                                intermediate_size=32)),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12,
                                    shared_expert_intermediate_size=20, use_sliding_window=True,
                                    sliding_window=8, max_window_layers=2, rms_norm_eps=1e-6)),
    "qwen3-moe": ("qwen3_moe", dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12,
                                    head_dim=16, norm_topk_prob=True, mlp_only_layers=[1])),
    "olmoe": ("olmoe", dict(num_experts=6, num_experts_per_tok=3, rms_norm_eps=1e-6)),
    "deepseek-v2-lite": ("deepseek_v2", LATENT | dict(
        q_lora_rank=None, n_shared_experts=2, rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.9))),
    "deepseek-v2": ("deepseek_v2", LATENT | dict(
        q_lora_rank=14, topk_method="group_limited_greedy", n_group=4, topk_group=2, n_shared_experts=1,
        routed_scaling_factor=1.7)),
    "deepseek-v3": ("deepseek_v3", LATENT | dict(
        q_lora_rank=14, n_group=4, topk_group=2, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    "glm": ("glm4_moe", dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, head_dim=16,
                             attention_bias=True, use_qk_norm=True, partial_rotary_factor=1.0)),
}
# And those with latent attention and dense MLPs in latent_cases.py.
DENSE = LATENT | dict(num_hidden_layers=2, first_k_dense_replace=2)
LATENTS = {
    "v2 lite": ("deepseek_v2", DENSE | dict(
        q_lora_rank=None, rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.9))),
    "v2": ("deepseek_v2", DENSE | dict(q_lora_rank=14)),
    "v3": ("deepseek_v3", DENSE | dict(
        q_lora_rank=14, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
}
MODELS = TINY | EXPERTS | LATENTS
each_model = pytest.mark.parametrize("name", [*TINY, *EXPERTS])


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def randomise(model) -> None:
    """Every parameter and buffer of a model of transformers, by the order of their names.

    The balance's biases are as large as trained ones are, so that they choose and bf16 spoils them, and below
    0, so that all biased scores are. What makes latents is a thousand times smaller than usual, so that the
    eps of their norms counts."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=rng)
            if name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif p.dim() == 1:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(1.5 * noise / p.shape[-1] ** 0.5)
                if "q_a_proj" in name:
                    p *= 1e-3
                if "kv_a_proj" in name:
                    p[: model.config.kv_lora_rank] *= 1e-3
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=rng) - 5)
        embed = model.get_input_embeddings().weight
        embed[: VOCAB // 2] *= 3e-3


@cache
def theirs(name: str):
    """The tiny model of transformers."""
    library = transformers()
    kind, keys = MODELS[name]
    config = library.AutoConfig.for_model(kind, **{**SHAPE, **keys})
    model = getattr(library, FAMILIES[kind].architecture)(config).eval()
    randomise(model)
    return model


@cache
def scratch() -> TemporaryDirectory:
    """A folder that goes when the tests end."""
    return TemporaryDirectory(prefix="r1zero-")


@cache
def saved(name: str) -> Path:
    """The folder that transformers wrote."""
    folder = Path(scratch().name) / name
    theirs(name).save_pretrained(folder)
    return folder


def read(folder) -> Transformer:
    return read_weights(folder, read_config(folder), CPU)


def sequences() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=rng) for n in LENGTHS]


def logits_of(model: Transformer) -> torch.Tensor:
    """All logits of the two sequences, packed: [T, V]."""
    packed = pack([tokens.tolist() for tokens in sequences()])
    return model.logits(model.hidden_states(packed))


@torch.no_grad()
def logits_of_theirs(model) -> torch.Tensor:
    """The same of a model of transformers."""
    return torch.cat([model(tokens[None]).logits[0] for tokens in sequences()])


@cache
def their_logits(name: str) -> torch.Tensor:
    return logits_of_theirs(theirs(name))


def error_of(model: Transformer, name: str) -> float:
    """How far the logits are from those of transformers."""
    with torch.no_grad():
        return (logits_of(model) - their_logits(name)).abs().max().item()


@torch.inference_mode()
def error_of_cache(kind, model: Transformer, name: str) -> float:
    """How far the logits of both sequences are from those of transformers, token by token from a cache."""
    both = sequences()
    first = 3  # tokens of the prompt
    steps = min(map(len, both)) - first
    cache = kind(model, 2)
    cache.allocate(256)
    prompts = [tokens[:first].tolist() for tokens in both]
    logits = [cache.admit(np.arange(2), prompts, np.arange(2)).clone()]
    for step in range(steps):
        newest = torch.stack([tokens[first + step] for tokens in both])
        logits.append(cache.decode(newest).clone())
    expected = their_logits(name).split([len(tokens) for tokens in both])
    found = torch.stack(logits, dim=1)
    wanted = torch.stack([rows[first - 1: first + steps] for rows in expected])
    return (found - wanted).abs().max().item()


def loaded(folder, dtype=torch.float32):
    """What transformers loads from a folder. Nothing may be missing, left over or of another shape."""
    load = transformers().AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# ---- what can be got wrong: from a right model to a wrong one ----

def with_config(**fields):
    """The same weights under another config."""
    def change(model):
        other = Transformer(replace(model.config, **fields))
        other.load_state_dict(model.state_dict(), strict=False)
        return other
    return change


def with_weights(edit):
    def change(model):
        with torch.no_grad():
            for block in model.blocks:
                edit(block)
        return model
    return change


def swap(first: torch.Tensor, second: torch.Tensor) -> None:
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def interleaved(block) -> None:
    """Rows of q and k as RoPE on neighbouring pairs wants them (llama2.c, GGUF)."""
    attn = block.attn
    n_rotated = (attn.n_heads + attn.n_kv_heads) * attn.head_dim
    parts = [attn.qkv.weight] if attn.qkv.bias is None else [attn.qkv.weight, attn.qkv.bias]
    for part in parts:
        rows = part[:n_rotated].unflatten(0, (-1, 2, attn.head_dim // 2)).transpose(1, 2)
        part[:n_rotated] = rows.flatten(0, 2)


def halves(weight, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    return weight[:at], weight[at:2 * at]


def swap_k_and_v(block) -> None:
    q, kv = block.attn.n_heads * block.attn.head_dim, block.attn.n_kv_heads * block.attn.head_dim
    swap(*halves(block.attn.qkv.weight[q:], kv))


def forget_biases(block) -> None:
    for name, p in block.named_parameters():
        if name.endswith("bias"):
            p.zero_()


def attention_of(normed, rotates_first: bool):
    """Attention with the norms of q and k elsewhere. normed(attn, heads, weight) -> heads."""
    def change(model):
        for block in model.blocks:
            def forward(x, cos, sin, kv, attn=block.attn):
                heads = rearrange(attn.qkv(x), "t (h d) -> t h d", d=attn.head_dim)
                q, k, v = heads.split([attn.n_heads, attn.n_kv_heads, attn.n_kv_heads], dim=1)
                if not rotates_first:
                    q, k = normed(attn, q, attn.q_norm), normed(attn, k, attn.k_norm)
                q, k = rope(q, cos, sin), rope(k, cos, sin)
                if rotates_first:
                    q, k = normed(attn, q, attn.q_norm), normed(attn, k, attn.k_norm)
                return attn.out(rearrange(kv.attend(attn.layer, q, k, v), "t h e -> t (h e)"))
            block.attn.forward = forward
        return model
    return change


def over_each_head(attn, heads, weight):
    """A full-width weight, but a mean for each head."""
    ones = torch.ones(attn.head_dim)
    return rmsnorm(heads.contiguous(), ones, attn.norm_eps) * weight.view(1, -1, attn.head_dim)


def over_all_heads(attn, heads, weight):
    return rmsnorm(heads.flatten(1), weight, attn.norm_eps).view(heads.shape)


def over_head_dim(attn, heads, weight):
    return rmsnorm(heads.contiguous(), weight, attn.norm_eps)


LLAMA3_OURS = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_seq_len=16)
YARN_OURS = dict(kind="yarn", factor=8.0, original_max_seq_len=16, beta_fast=2.0, beta_slow=0.1)
EVERYWHERE = {
    "RoPE on neighbouring pairs": with_weights(interleaved),
    "k and v swapped": with_weights(swap_k_and_v),
    "gate and up swapped": with_weights(
        lambda block: swap(*halves(block.mlp.gate_up.weight, block.mlp.d_ff))),
    "the two norms swapped": with_weights(lambda block: swap(block.attn_norm, block.mlp_norm)),
    "theta of 10,000": with_config(rope_theta=10_000.0),
    "no RoPE": with_config(nope_layers=(0, 1, 2)),
}
ERRORS = {
    "llama": {
        "eps 1e-6": with_config(norm_eps=1e-6),
        "llama3 scaling not applied": with_config(rope_scaling=None),
        "linear instead of llama3": with_config(rope_scaling=RopeScaling("linear", 8.0)),
        "factor 32": with_config(rope_scaling=RopeScaling(**{**LLAMA3_OURS, "factor": 32.0})),
        "original context 64": with_config(
            rope_scaling=RopeScaling(**{**LLAMA3_OURS, "original_max_seq_len": 64})),
        "low and high factors of others": with_config(
            rope_scaling=RopeScaling(**{**LLAMA3_OURS, "low_freq_factor": 2.0, "high_freq_factor": 8.0})),
        "norms behind instead of before": with_config(post_norm=True),
    },
    "llama with biases": {
        "eps 1e-6": with_config(norm_eps=1e-6),
        "linear scaling not applied": with_config(rope_scaling=None),
        "biases forgotten": with_weights(forget_biases),
        "bias of o forgotten": with_weights(lambda block: block.attn.out.bias.zero_()),
        "bias of down forgotten": with_weights(lambda block: block.mlp.down.bias.zero_()),
    },
    "llama with yarn": {
        "yarn not applied": with_config(rope_scaling=None),
        "cosines and sines without their factor": with_config(
            rope_scaling=RopeScaling(**YARN_OURS, attention_factor=1.0)),
        "not truncated": with_config(rope_scaling=RopeScaling(**YARN_OURS, truncate=False)),
        "llama3 instead of yarn": with_config(rope_scaling=RopeScaling(**LLAMA3_OURS)),
    },
    "mistral": {
        "window of 9": with_config(window=9),
        "window of 7": with_config(window=7),
        "window ignored": with_config(window=None, window_layers=()),
        "eps 1e-6": with_config(norm_eps=1e-6),
    },
    "qwen2": {
        "window in all layers": with_config(window_layers=(0, 1, 2)),
        "window ignored": with_config(window=None, window_layers=()),
        "biases forgotten": with_weights(forget_biases),
        "eps 1e-6": with_config(norm_eps=1e-6),
    },
    "qwen3": {
        "qk-norm after RoPE": attention_of(over_head_dim, rotates_first=True),
        "qk-norm forgotten": with_config(qk_norm=False),
        "norms of q and k swapped": with_weights(lambda block: swap(block.attn.q_norm, block.attn.k_norm)),
        "eps 1e-5": with_config(norm_eps=1e-5),
    },
    "smollm3": {
        "layers without RoPE inverted": with_config(nope_layers=(0, 2)),
        "RoPE in all layers": with_config(nope_layers=()),
        "window ignored": with_config(window=None, window_layers=()),
        "eps 1e-6": with_config(norm_eps=1e-6),
    },
    "olmo2": {
        "norms before instead of behind": with_config(post_norm=False),
        "qk-norm of each head": attention_of(over_each_head, rotates_first=False),
        "qk-norm after RoPE": attention_of(over_all_heads, rotates_first=True),
        "qk-norm forgotten": with_config(qk_norm_full_width=False),
        "eps 1e-6": with_config(norm_eps=1e-6),
    },
}
ALL_ERRORS = [(name, error) for name in TINY for error in (*EVERYWHERE, *ERRORS[name])]


def wrong(name: str, error: str) -> Transformer:
    """The tiny model with an error."""
    return {**EVERYWHERE, **ERRORS[name]}[error](read(saved(name)))


# ---- config.json with one key changed ----

LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=300.0)
CHANGES = [
    ("llama", "rms_norm_eps", 1e-6),
    ("llama", "rope_parameters.rope_theta", 500.0),
    ("llama", "rope_parameters.factor", 4.0),
    ("llama", "rope_parameters.low_freq_factor", 2.0),
    ("llama", "rope_parameters.high_freq_factor", 8.0),
    ("llama", "rope_parameters.original_max_position_embeddings", 32),
    ("llama", "original_max_position_embeddings", 32),
    ("llama", "rope_parameters.rope_type", "linear"),
    ("llama", "rope_parameters.rope_type", "default"),
    ("llama", "rope_parameters", None),
    ("llama with biases", "rope_parameters.factor", 2.0),
    ("llama with yarn", "rope_parameters.factor", 2.0),
    ("llama with yarn", "rope_parameters.beta_fast", 0.5),
    ("llama with yarn", "rope_parameters.beta_slow", 1.0),
    ("llama with yarn", "rope_parameters.truncate", False),
    ("llama with yarn", "rope_parameters.attention_factor", 1.0),
    ("llama with yarn", "rope_parameters.original_max_position_embeddings", 64),
    ("llama with biases", "rms_norm_eps", 1e-6),
    ("mistral", "sliding_window", 9),
    ("mistral", "sliding_window", None),
    ("mistral", "sliding_window", "absent"),
    ("mistral", "rope_parameters.rope_theta", 500.0),
    ("mistral", "rms_norm_eps", 1e-6),
    ("mistral", "rope_parameters", LINEAR),
    ("qwen2", "sliding_window", 9),
    ("qwen2", "rms_norm_eps", 1e-6),
    ("qwen2", "layer_types", ["sliding_attention"] * 3),
    ("qwen2", "rope_parameters.rope_theta", 500.0),
    ("qwen2", "rope_parameters", LLAMA3 | {"rope_theta": 300.0}),
    ("qwen3", "rms_norm_eps", 1e-5),
    ("qwen3", "rope_parameters.rope_theta", 500.0),
    ("qwen3", "rope_parameters", LINEAR),
    ("smollm3", "no_rope_layers", [0, 1, 0, 1]),
    ("smollm3", "no_rope_layers", [1, 1, 1, 1]),
    ("smollm3", "no_rope_layers", [0, 0, 1, 0]),
    ("smollm3", "sliding_window", 9),
    ("smollm3", "layer_types", ["full_attention"] * 4),
    ("smollm3", "rms_norm_eps", 1e-6),
    ("smollm3", "rope_parameters.rope_theta", "absent"),
    ("smollm3", "rope_parameters", LINEAR),
    ("olmo2", "rms_norm_eps", 1e-6),
    ("olmo2", "rope_parameters.rope_theta", 500.0),
    ("olmo2", "rope_parameters", LINEAR),
]
# And those after which the config no longer fits the weights, or speaks of what we do not have.
REFUSALS = [
    ("llama", "num_attention_heads", 8, r"q_proj.weight is \[32, 32\] and not \[64, 32\]"),
    ("llama", "num_key_value_heads", 4, "6 of another shape"),
    ("llama", "hidden_size", 64, r"norm.weight is \[32\] and not \[64\]"),
    ("llama", "hidden_size", "absent", "lacks hidden_size"),
    ("llama", "hidden_size", "32", "expected a whole number above 0"),
    ("llama", "intermediate_size", 24, "9 of another shape"),
    ("llama", "num_hidden_layers", 2, "9 not of this model: model.layers.2.input_layernorm.weight"),
    ("llama", "num_hidden_layers", 4, "9 missing: model.layers.3.input_layernorm.weight"),
    ("llama", "vocab_size", 289, "embed_tokens.weight is"),
    ("llama", "head_dim", 16, "12 of another shape"),
    ("llama", "tie_word_embeddings", True, "lm_head.weight is not the embedding"),
    ("llama", "tie_word_embeddings", "false", "expected true or false"),
    ("llama", "attention_bias", True, "12 missing: model.layers.0.self_attn.q_proj.bias"),
    ("llama", "mlp_bias", True, "9 missing"),
    ("llama", "hidden_act", "gelu", "hidden_act 'gelu'"),
    ("llama", "attention_multiplier", 0.25, "attention_multiplier 0.25"),
    ("llama", "final_logit_softcapping", 30.0, "final_logit_softcapping 30.0"),
    ("llama", "clip_qkv", 8.0, "clip_qkv 8.0"),
    ("llama", "logits_scaling", 8.0, "logits_scaling 8.0"),
    ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
    ("llama", "sliding_window", 8, "sliding window"),
    ("llama", "rope_parameters.rope_type", "longrope", "rope_type 'longrope'"),
    ("llama", "rope_parameters.factor", None, "expected numbers above 0, for factor"),
    ("llama", "rope_parameters.partial_rotary_factor", 0.5, "rotates whole heads"),
    ("llama", "rope_parameters", {"full_attention": {}, "sliding_attention": {}}, "each kind of layer"),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "contradict each other"),
    ("llama", "model_type", "gemma3_text", "model_type 'gemma3_text'; expected one of llama, mistral"),
    ("llama", "model_type", ["llama"], "model_type"),
    ("llama", "architectures", ["LlamaForSequenceClassification"], "predicts the next token"),
    ("llama with biases", "attention_bias", False, "12 not of this model"),
    ("llama with biases", "mlp_bias", False, "9 not of this model"),
    ("llama with biases", "tie_word_embeddings", False, "1 missing: lm_head.weight"),
    ("mistral", "head_dim", None, "12 of another shape"),
    ("mistral", "layer_types", ["full_attention"] * 3, "in all of its layers or in none"),
    ("qwen2", "use_sliding_window", False, "contradict each other"),
    ("qwen2", "layer_types", ["full_attention"], "for each of 3 layers"),
    ("qwen2", "layer_types", ["linear_attention"] * 3, "linear_attention"),
    ("qwen3", "head_dim", 32, "q_norm.weight is"),
    ("qwen3", "head_dim", "absent", "q_norm.weight is"),
    ("qwen3", "attention_bias", True, "12 missing"),
    ("qwen3", "tie_word_embeddings", False, "1 missing: lm_head.weight"),
    ("qwen3", "num_key_value_heads", 3, "no multiple of num_key_value_heads"),
    ("smollm3", "use_sliding_window", False, "contradict each other"),
    ("smollm3", "no_rope_layers", [1], "0 or 1 for each of 4 layers"),
    ("olmo2", "tie_word_embeddings", True, "lm_head.weight is not the embedding"),
    ("olmo2", "attention_bias", True, "12 missing"),
    ("olmo2", "num_key_value_heads", "absent", "9 of another shape"),
]


def edit_config(folder: Path, **changes) -> Path:
    """Change keys of a folder's config.json; "absent" takes one out, and a dot leads inside."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        inside, place = key.split("."), content
        for word in inside[:-1]:
            place = place[word]
        place[inside[-1]] = value
        if value == "absent":
            del place[inside[-1]]
    path.write_text(json.dumps(content))
    return folder


def changed(name: str, key: str, value, folder: Path) -> Path:
    """A folder with the same weights, and one key of config.json changed."""
    folder.mkdir(exist_ok=True)
    for path in saved(name).iterdir():
        target = folder / path.name
        if path.suffix == ".safetensors":
            target.symlink_to(path)
        else:
            target.write_text(path.read_text())
    return edit_config(folder, **{key: value})


def gradients(name: str) -> tuple[dict, dict]:
    """(their gradients, ours), by the name in the file, of a sum of all logits with random weights."""
    model, own = theirs(name), read(saved(name))
    factors = torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    outputs = torch.cat([model(tokens[None]).logits[0] for tokens in sequences()])
    (outputs * factors).sum().backward()
    (logits_of(own) * factors).sum().backward()
    named = dict(own.named_parameters())
    # In memory they have the experts stacked.
    family, theirs_named = FAMILIES[MODELS[name][0]], dict(model.named_parameters())
    ours = {}
    for part in parts_of(own, names_of(family, own.config, theirs_named), is_latent(family)):
        if part.parameter in named:  # and no buffer
            gradient = named[part.parameter].grad[part.index]
            ours[part.name] = gradient if part.order is None else gradient[part.order]
    return {key: p.grad for key, p in theirs_named.items()}, ours


