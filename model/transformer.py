"""A decoder of the Llama and Qwen family: pre-norm, RoPE, grouped queries, SwiGLU, tied or untied head.

It works on flat tokens (see packed.py), so it has no batch dimension and no mask. `forward` returns hidden
states, not logits: `logprobs` turns them into log-probs and entropies without ever holding [T, V].

Weights are the optimizer's masters, in fp32; each layer casts its own to the dtype of the hidden states where
it is used, so `model.compute_dtype = torch.bfloat16` is all that mixed precision takes. q, k and v share one
matrix, and so do gate and up: fewer, larger matrix products.

Shapes: T tokens, M d_model, H query heads, G kv heads, D head_dim, F d_ff, V vocabulary, B rows,
S cache length.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.attention import attention, rope_attention
from ..kernels.decode_attention import decode_attention
from ..kernels.linear_logprob import linear_logprob
from ..kernels.mlp import swiglu_mlp
from ..kernels.rmsnorm import rmsnorm
from ..kernels.rope import rope, rope_table
from .config import ModelConfig
from .packed import Packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def add_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float):
    """(rmsnorm of x + residual, x + residual); of x alone where there is no residual yet."""
    return (rmsnorm(x, weight, eps), x) if residual is None else rmsnorm(x, weight, eps, residual)


def turn(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, c: ModelConfig
) -> list[torch.Tensor]:
    """All heads [T, H + 2 G, D] -> q [T, H, D], k and v [T, G, D], q and k turned by RoPE."""
    qk, v = qkv.split([c.n_heads + c.n_kv_heads, c.n_kv_heads], dim=1)
    return [*rope(qk, cos, sin).split([c.n_heads, c.n_kv_heads], dim=1), v]


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        n_qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
        self.qkv = nn.Parameter(torch.empty(n_qkv, c.d_model))
        self.qkv_bias = nn.Parameter(torch.empty(n_qkv)) if c.qkv_bias else None
        self.q_norm = nn.Parameter(torch.empty(c.head_dim)) if c.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(c.head_dim)) if c.qk_norm else None
        self.out = nn.Parameter(torch.empty(c.d_model, c.n_heads * c.head_dim))

    def project(self, x_TM):
        """[T, M] -> all heads [T, H + 2 G, D], those of q and k normed if asked."""
        c = self.c
        qkv = linear(x_TM, self.qkv, self.qkv_bias).view(
            -1, c.n_heads + 2 * c.n_kv_heads, c.head_dim
        )
        if not c.qk_norm:
            return qkv
        q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        return torch.cat(
            [rmsnorm(q, self.q_norm, c.norm_eps), rmsnorm(k, self.k_norm, c.norm_eps), v], dim=1
        )


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * c.d_ff, c.d_model))
        self.down = nn.Parameter(torch.empty(c.d_model, c.d_ff))

    def forward(self, x_TM):
        return swiglu_mlp(x_TM, self.gate_up, self.down)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.eps = c.norm_eps
        self.attn_norm = nn.Parameter(torch.empty(c.d_model))
        self.attn = Attention(c)
        self.mlp_norm = nn.Parameter(torch.empty(c.d_model))
        self.mlp = MLP(c)

    def forward(self, x_TM, residual_TM, cos, sin, attend):
        """The residual stream goes from block to block as two terms, x and residual, which rmsnorm adds as it
        reads them; residual_TM is None before the first block.

        `attend(qkv, cos, sin) -> [T, H, D]` is RoPE and attention over the batch, or against a cache.
        """
        x_TM, residual_TM = add_norm(x_TM, residual_TM, self.attn_norm, self.eps)
        x_TM = linear(attend(self.attn.project(x_TM), cos, sin).flatten(1), self.attn.out)
        x_TM, residual_TM = add_norm(x_TM, residual_TM, self.mlp_norm, self.eps)
        return self.mlp(x_TM), residual_TM


class Transformer(nn.Module):
    """The whole model. Initialise with `init_weights(seed)` or load weights; a fresh one holds garbage."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.d_model))
        if not config.tie_embeddings:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    @property
    def head(self) -> torch.Tensor:
        """[V, M], the weight that turns hidden states into logits."""
        return self.embed if self.config.tie_embeddings else self.lm_head

    def init_weights(self, seed: int) -> "Transformer":
        """Matrices ~ N(0, 1 / fan_in), those that write to the residual stream less by sqrt(2 n_layers);
        norms 1, biases 0."""
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith("norm"):
                    p.fill_(1.0)
                elif name.endswith("bias"):
                    p.zero_()
                else:
                    std = p.shape[1] ** -0.5
                    if name.endswith((".out", ".down")):
                        std /= (2 * self.config.n_layers) ** 0.5
                    p.copy_(torch.randn(p.shape, generator=rng) * std)
        return self

    def forward(self, packed: Packed) -> torch.Tensor:
        """Hidden states [T, M] after the final norm, in the compute dtype."""

        def attend(qkv, cos, sin):
            return rope_attention(
                qkv,
                cos,
                sin,
                packed.cu_seqlens,
                packed.max_seqlen,
                self.config.n_kv_heads,
                keys=packed.keys,
                cu_keys=packed.cu_keys,
                max_keys=packed.max_keys,
            )

        return self._run(packed.tokens, packed.positions, [attend] * self.config.n_layers)

    def hidden_states(self, packed: Packed) -> torch.Tensor:
        return self(packed)

    @property
    def device(self):
        return self.embed.device

    def prefill(
        self, packed: Packed
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """As forward, and each layer's keys and values ([T, G, D] each) to fill a cache with."""
        assert packed.keys is None, "prefill: a cache has no shared prefixes"
        kept = []

        def attend(qkv, cos, sin):
            q, k, v = turn(qkv, cos, sin, self.config)
            kept.append((k, v))
            return attention(q, k, v, packed.cu_seqlens, packed.max_seqlen)

        return self._run(packed.tokens, packed.positions, [attend] * self.config.n_layers), kept

    def decode(
        self, tokens: torch.Tensor, lengths: torch.Tensor, caches, table: torch.Tensor
    ) -> torch.Tensor:
        """One new token a row: tokens [B], lengths [B] int32 of what the cache holds so far. Returns hidden
        [B, M].

        caches: a layer's keys and values in pages, a pair [P, G, page, D]; table: [B, W] int32, the pages of
        each row. The new keys and values are written in place, behind each row's last.
        """
        page_size = caches[0][0].shape[2]
        positions = lengths.long()
        pages = table.gather(1, (positions // page_size)[:, None])[:, 0].long()
        places, seen = positions % page_size, lengths + 1

        def attend_with(k_cache, v_cache):
            def attend(qkv, cos, sin):
                q, k, v = turn(qkv, cos, sin, self.config)
                k_cache[pages, :, places], v_cache[pages, :, places] = k, v
                return decode_attention(q, k_cache, v_cache, table, seen)

            return attend

        return self._run(tokens, positions, [attend_with(*cache) for cache in caches])

    def _run(self, tokens, positions, attends):
        c = self.config
        cos, sin = rope_table(positions, c.head_dim, c.rope_theta)
        x_TM = F.embedding(tokens, self.embed).to(self.compute_dtype)
        residual_TM = None
        for block, attend in zip(self.blocks, attends, strict=True):
            x_TM, residual_TM = block(x_TM, residual_TM, cos, sin, attend)
        return add_norm(x_TM, residual_TM, self.norm, c.norm_eps)[0]

    def logprobs(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        rows: torch.Tensor | None = None,
    ):
        """(logp, entropy) of the targets [T] after `hidden` [T, M], or after those of its rows that `rows`
        names, at the temperature they were sampled at."""
        return linear_logprob(hidden, self.head, targets, temperature, rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, V] fp32, for sampling from a few rows; training uses `logprobs`. On a CPU V comes first in
        memory: for few rows that product takes half the time."""
        if hidden.is_cpu:
            return (self.head.to(hidden.dtype) @ hidden.t()).t().float()
        return linear(hidden, self.head).float()


def param_count(c: ModelConfig) -> int:
    """Number of parameters, a tied head counted once."""
    qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * (
        c.d_model + c.qkv_bias
    ) + 2 * c.head_dim * c.qk_norm
    block = qkv + c.d_model * c.n_heads * c.head_dim + 3 * c.d_model * c.d_ff + 2 * c.d_model
    return (
        c.n_layers * block + c.d_model + c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    )


def flops_per_token(c: ModelConfig, seqlen: float, training: bool) -> float:
    """FLOPs of the matrix products for one token at a mean sequence length (2 a multiply-add; causal
    attention counts half).

    Forward alone, or three times that for training (Kaplan et al. 2020, arXiv 2001.08361); the embedding
    look-up is free, what a kernel computes anew in backward does not count.
    """
    block = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim * c.d_model + 3 * c.d_model * c.d_ff
    matmuls = 2 * (c.n_layers * block + c.vocab_size * c.d_model)
    scores = (
        2 * c.n_layers * c.n_heads * c.head_dim * seqlen
    )  # q k^T, p v: 4 S / 2 a token, head, feature
    return (matmuls + scores) * (3 if training else 1)
