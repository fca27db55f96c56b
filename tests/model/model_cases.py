"""What the tests of the model share: small shapes, a model whose parameters all matter, and a naive one."""
import pytest
import torch

from r1zero.model.config import ModelConfig
from r1zero.model.transformer import Transformer

from ..kernels.naive_ops import naive_attention, naive_rmsnorm, naive_rope, naive_swiglu

SHAPE = dict(vocab_size=19, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)
CONFIGS = {
    "plain": ModelConfig(**SHAPE),
    "qwen2": ModelConfig(**SHAPE, qkv_bias=True, rope_theta=50.0),
    "qwen3": ModelConfig(**SHAPE, qk_norm=True, tie_embeddings=False),
    "all, three queries a key": ModelConfig(**{**SHAPE, "n_heads": 6}, qk_norm=True, qkv_bias=True,
                                            tie_embeddings=False, norm_eps=0.1),
    "one kv head": ModelConfig(**{**SHAPE, "n_kv_heads": 1}),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scattered(config, seed=0, dtype=torch.float64):
    """A model whose every parameter matters: biases and norms are not at their initial 0 and 1."""
    model = Transformer(config).init_weights(seed).to(dtype)
    model.compute_dtype = dtype
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=rng, dtype=dtype)
    return model


def sequences(*lengths, vocab=19):
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


def naive_logits(model, tokens):
    """All logits of one sequence, from the definition."""
    c, positions = model.config, torch.arange(len(tokens))
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    x = model.embed[torch.tensor(tokens)]
    for block in model.blocks:
        qkv = naive_rmsnorm(x, block.attn_norm, c.norm_eps) @ block.attn.qkv.weight.T
        if c.qkv_bias:
            qkv = qkv + block.attn.qkv.bias
        q, k, v = (part.reshape(len(tokens), -1, D) for part in qkv.split([H * D, G * D, G * D], -1))
        if c.qk_norm:
            q = naive_rmsnorm(q, block.attn.q_norm, c.norm_eps)
            k = naive_rmsnorm(k, block.attn.k_norm, c.norm_eps)
        q, k = (naive_rope(part, positions, c.rope_theta) for part in (q, k))
        x = x + naive_attention(q, k, v, [len(tokens)]).flatten(1) @ block.attn.out.weight.T
        y = naive_rmsnorm(x, block.mlp_norm, c.norm_eps)
        x = x + naive_swiglu(y @ block.mlp.gate_up.weight.T) @ block.mlp.down.weight.T
    head = model.embed if c.tie_embeddings else model.lm_head.weight
    return naive_rmsnorm(x, model.norm, c.norm_eps) @ head.T
