"""What the tests of the model share: small shapes, a model whose parameters all matter, and a naive one."""
import math

import pytest
import torch

from r1zero.model.config import LatentShape, ModelConfig
from r1zero.model.moe_config import MoEConfig
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer

from ..kernels.naive_ops import naive_attention, naive_rmsnorm, naive_rope, naive_swiglu
from .moe_cases import naive_moe

# pairs of a head of 6 turn 6.4, 2.0 and 0.66 times in 40 tokens at theta 30: kept, blended, divided
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=40)
# pairs of a part of 6 lie 0, 1/3 and 2/3 on the way from kept to divided at theta 30
YARN = RopeScaling("yarn", 8.0, original_max_seq_len=40, beta_fast=4.0, beta_slow=0.5, mscale=0.7,
                   mscale_all_dim=1.2)
LATENT = dict(n_kv_heads=4, head_dim=10, rope_theta=30.0)
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
    "yarn": ModelConfig(**SHAPE, rope_theta=30.0, rope_scaling=RopeScaling(
        "yarn", 8.0, original_max_seq_len=40, beta_fast=4.0, beta_slow=0.5, truncate=False)),
    "deepseek v2 lite": ModelConfig(**{**SHAPE, **LATENT}, tie_embeddings=False, out_bias=True,
                                    latent=LatentShape(kv_rank=7, rope_dim=6, value_dim=5)),
    "deepseek v3": ModelConfig(**{**SHAPE, **LATENT}, rope_scaling=YARN, norm_eps=0.1,
                               latent=LatentShape(kv_rank=7, q_rank=8, rope_dim=6, value_dim=12)),
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


def naive_yarn(scaling, frequency, theta, width):
    """One pair's frequency, by its index, as DeepSeek-V3's own code has it."""
    def pair_that_turns(times):
        return width * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pair = round(-math.log(frequency) / math.log(theta) * width / 2)
    slow = min(max((pair - low) / (high - low + (0.001 if low == high else 0)), 0), 1)
    return frequency / scaling.factor * slow + frequency * (1 - slow)


def naive_sharpening(scaling, share):
    return 0.1 * share * math.log(scaling.factor) + 1


def naive_table_factor(scaling):
    """What yarn puts on cosines and sines."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.mscale:
        return naive_sharpening(scaling, scaling.mscale) / naive_sharpening(scaling, scaling.mscale_all_dim)
    return naive_sharpening(scaling, 1.0)


def naive_frequency(scaling, frequency, theta, width):
    """One pair's frequency after scaling, by wavelength, as the models' own code has it."""
    if scaling is None:
        return frequency
    if scaling.kind == "yarn":
        return naive_yarn(scaling, frequency, theta, width)
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


def rotated(config, x):
    """x [T, heads, R] with RoPE, for a sequence from position 0 on."""
    def rescale(frequency):
        return naive_frequency(config.rope_scaling, frequency, config.rope_theta, x.shape[-1])
    turned = naive_rope(x, torch.arange(len(x)), config.rope_theta, rescale)
    return turned * naive_table_factor(config.rope_scaling)


def naive_heads(config, layer, attn, x):
    """Grouped-query attention [T, H, D]."""
    H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
    qkv = naive_bias(attn.qkv, x @ attn.qkv.weight.T)
    q, k, v = (part.reshape(len(x), -1, D) for part in qkv.split([H * D, G * D, G * D], -1))
    q, k = naive_qk_norm(config, q, attn.q_norm), naive_qk_norm(config, k, attn.k_norm)
    if layer not in config.nope_layers:
        q, k = rotated(config, q), rotated(config, k)
    window = config.window if layer in config.window_layers else None
    return naive_attention(q, k, v, [len(x)], window=window)


def naive_latent_heads(config, attn, x):
    """Latent attention [T, H, E], head by head, as DeepSeek-V2's paper has it (equations 9 to 19)."""
    H, D, shape, heads = config.n_heads, config.head_dim, config.latent, []
    N, E, scale = D - shape.rope_dim, shape.value_dim, D ** -0.5
    if config.rope_scaling is not None:
        scale *= naive_sharpening(config.rope_scaling, config.rope_scaling.mscale_all_dim) ** 2
    c, k_rope = (x @ attn.kv_down.weight.T).split([shape.kv_rank, shape.rope_dim], -1)
    c, k_rope = naive_rmsnorm(c, attn.kv_norm, 1e-6), rotated(config, k_rope[:, None])
    z = x if shape.q_rank is None else naive_rmsnorm(x @ attn.q_down.weight.T, attn.q_norm, 1e-6)
    for h in range(H):
        q = (z @ attn.q_up.weight[h * D : (h + 1) * D].T)[:, None]
        q = torch.cat([q[..., :N], rotated(config, q[..., N:])], -1)
        up = attn.kv_up.weight[h * (N + E) : (h + 1) * (N + E)]
        k, v = torch.cat([(c @ up[:N].T)[:, None], k_rope], -1), (c @ up[N:].T)[:, None]
        heads.append(naive_attention(q, k, v, [len(x)], scale=scale))
    return torch.cat(heads, 1)


def naive_logits(model, tokens):
    """All logits of one sequence, from the definition."""
    c = model.config
    x = model.embed[torch.tensor(tokens)]
    for layer, block in enumerate(model.blocks):
        norms = [lambda x, w=w: naive_rmsnorm(x, w, c.norm_eps) for w in (block.attn_norm, block.mlp_norm)]
        (attn_before, mlp_before), (attn_after, mlp_after) = norms, [lambda x: x] * 2
        if c.post_norm:
            (attn_before, mlp_before), (attn_after, mlp_after) = [lambda x: x] * 2, norms
        if c.latent is None:
            attended = naive_heads(c, layer, block.attn, attn_before(x)).flatten(1)
        else:
            attended = naive_latent_heads(c, block.attn, attn_before(x)).flatten(1)
        x = x + attn_after(naive_bias(block.attn.out, attended @ block.attn.out.weight.T))
        x = x + mlp_after(naive_mlp(block.mlp, mlp_before(x)))
    head = model.embed if c.tie_embeddings else model.lm_head.weight
    return naive_rmsnorm(x, model.norm, c.norm_eps) @ head.T
