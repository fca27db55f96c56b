"""What the tests of the model share: small shapes, a model whose parameters all matter, and a naive one."""
import math

import pytest
import torch

from r1zero.model.config import ModelConfig
from r1zero.model.moe_config import MoEConfig
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer

from ..kernels.naive_ops import naive_attention, naive_rmsnorm, naive_rope, naive_swiglu
from .moe_cases import naive_moe

# pairs of a head of 6 turn 6.4, 2.0 and 0.66 times in 40 tokens at theta 30: kept, blended, divided
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=40)
SHAPE = dict(vocab_size=19, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)
CONFIGS = {
    "plain": ModelConfig(**SHAPE),
    "qwen2": ModelConfig(**SHAPE, qkv_bias=True, rope_theta=50.0),
    "qwen3": ModelConfig(**SHAPE, qk_norm=True, tie_embeddings=False),
    "all, three queries a key": ModelConfig(**{**SHAPE, "n_heads": 6}, qk_norm=True, qkv_bias=True,
                                            tie_embeddings=False, norm_eps=0.1),
    "one kv head": ModelConfig(**{**SHAPE, "n_kv_heads": 1}),
    "llama 3": ModelConfig(**SHAPE, rope_theta=30.0, rope_scaling=LLAMA3),
    "linear rope, biases": ModelConfig(**SHAPE, rope_scaling=RopeScaling("linear", 3.0), qkv_bias=True,
                                       out_bias=True, mlp_bias=True),
    "mistral": ModelConfig(**SHAPE, window=5, window_layers=(0, 1), tie_embeddings=False),
    "smollm3": ModelConfig(**SHAPE, nope_layers=(1,), window=3, window_layers=(1,)),
    "olmo2": ModelConfig(**SHAPE, post_norm=True, qk_norm_full_width=True, tie_embeddings=False,
                         norm_eps=0.1),
}
CONFIGS |= {
    "mixtral": ModelConfig(**SHAPE, tie_embeddings=False, moe=MoEConfig(5, 2, 7)),
    "deepseek's mixture": ModelConfig(**SHAPE, moe=MoEConfig(
        8, 3, 5, d_shared=6, dense_layers=(0,), scores="sigmoid", scale=2.5, n_groups=4, groups_per_token=2,
        group_score="top2", balance_bias=True, fp32_router=True)),
    "qwen2's and gpt-oss's mixture": ModelConfig(**SHAPE, mlp_bias=True, moe=MoEConfig(
        4, 2, 6, d_shared=9, shared_gate=True, scores="logits", router_bias=True)),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scattered(config, seed=0, dtype=torch.float64):
    """A model whose every parameter matters: biases and norms are not at their initial 0 and 1."""
    model = Transformer(config).init_weights(seed).to(dtype)
    model.compute_dtype = dtype
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            p += 0.3 * torch.randn(p.shape, generator=rng, dtype=dtype)
    return model


def sequences(*lengths, vocab=19):
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


def naive_frequency(scaling, frequency):
    """One pair's frequency after scaling, by wavelength, as the models' own code has it."""
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength, original = 2 * math.pi / frequency, scaling.original_max_seq_len
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    width = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (original / wavelength - scaling.low_freq_factor) / width
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def naive_qk_norm(config, x, weight):
    if config.qk_norm:
        return naive_rmsnorm(x, weight, config.norm_eps)
    if config.qk_norm_full_width:
        return naive_rmsnorm(x.flatten(1), weight, config.norm_eps).reshape(x.shape)
    return x


def naive_mlp(mlp, x):
    if hasattr(mlp, "router"):
        return naive_moe(mlp, x, naive_mlp)
    y = naive_swiglu(naive_bias(mlp.gate_up, x @ mlp.gate_up.weight.T))
    return naive_bias(mlp.down, y @ mlp.down.weight.T)


def naive_bias(linear, y):
    return y if linear.bias is None else y + linear.bias


def naive_logits(model, tokens):
    """All logits of one sequence, from the definition."""
    c, positions = model.config, torch.arange(len(tokens))
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    x = model.embed[torch.tensor(tokens)]
    for layer, block in enumerate(model.blocks):
        norms = [lambda x, w=w: naive_rmsnorm(x, w, c.norm_eps) for w in (block.attn_norm, block.mlp_norm)]
        (attn_before, mlp_before), (attn_after, mlp_after) = norms, [lambda x: x] * 2
        if c.post_norm:
            (attn_before, mlp_before), (attn_after, mlp_after) = [lambda x: x] * 2, norms
        qkv = naive_bias(block.attn.qkv, attn_before(x) @ block.attn.qkv.weight.T)
        q, k, v = (part.reshape(len(tokens), -1, D) for part in qkv.split([H * D, G * D, G * D], -1))
        q, k = naive_qk_norm(c, q, block.attn.q_norm), naive_qk_norm(c, k, block.attn.k_norm)
        if layer not in c.nope_layers:
            def rescale(frequency):
                return naive_frequency(c.rope_scaling, frequency)
            q, k = (naive_rope(part, positions, c.rope_theta, rescale) for part in (q, k))
        window = c.window if layer in c.window_layers else None
        attended = naive_attention(q, k, v, [len(tokens)], window=window).flatten(1)
        x = x + attn_after(naive_bias(block.attn.out, attended @ block.attn.out.weight.T))
        x = x + mlp_after(naive_mlp(block.mlp, mlp_before(x)))
    head = model.embed if c.tie_embeddings else model.lm_head.weight
    return naive_rmsnorm(x, model.norm, c.norm_eps) @ head.T
