"""Grouped-query attention, and what its keys and values are read from.

`Attention` projects tokens to heads and back. The step in between depends on where the keys and
values are, so it is a `KV` object's:

    PackedKV(packed)        in the batch itself: training, log-probs, evaluation
    PrefillKV(packed)       in the batch, and kept for a cache, layer by layer
    engine/pages.py         in the pages of a cache: decoding, one new token per sequence

One object serves all layers of a forward pass; `layer` says which of them calls.

Left out: dropout, attention masks (a batch is flat with offsets, see packed.py), and a cache that
forgets what lies before a window.

Latent attention, which reads the same KV objects, is latent_attention.py.

Shapes: T tokens, M d_model, H query heads, G key/value heads, D width of a query or key, E width of
a value (here D), K keys of all sequences, L width of a latent, R width of what RoPE rotates of it.
"""

import torch
from einops import rearrange
from torch import nn

from ..kernels.attention import attention, gather_keys, rope_attention
from ..kernels.rmsnorm import rmsnorm
from ..kernels.rope import rope
from .config import ModelConfig
from .linear import Linear
from .packed import Packed


def split_heads(
    qkv_THD: torch.Tensor, n_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads [T, H + 2 G, D] as q [T, H, D], k and v [T, G, D]."""
    n_heads = qkv_THD.shape[1] - 2 * n_kv_heads
    return qkv_THD.split([n_heads, n_kv_heads, n_kv_heads], dim=1)


def rotate(
    qkv_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split all heads [T, H + 2 G, D] into q [T, H, D], k and v [T, G, D], with RoPE on q and k."""
    n_heads = qkv_THD.shape[1] - 2 * n_kv_heads
    # q and k lie side by side, so one call rotates both.
    qk, v = qkv_THD.split([n_heads + n_kv_heads, n_kv_heads], dim=1)
    q, k = rope(qk, cos, sin).split([n_heads, n_kv_heads], dim=1)
    return q, k, v


# ---- where keys and values are ----


class KV:
    """What one forward pass reads its keys and values from, for all layers."""

    reads_latents = False
    """Whether latent attention calls `attend_latents` here, and not `attend`."""

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGE: torch.Tensor,
        window: int | None = None,
        scale: float | None = None,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention [T, H, E] of the new tokens; q and k have their positions already (RoPE).

        window: how many keys a query sees, its own included; None: all. scale: of q k^T; None:
        1 / sqrt(D). kept: what a cache keeps of the tokens in the place of k and v, if that is
        something else (latent_attention.py).
        """
        raise NotImplementedError

    def attend_latents(
        self,
        layer: int,
        q_latent_THL: torch.Tensor,
        q_rope_THR: torch.Tensor,
        latent_T1L: torch.Tensor,
        k_rope_T1R: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention [T, H, L] of the new tokens to latents, where `reads_latents`."""
        raise NotImplementedError

    def rotate_and_attend(
        self,
        layer: int,
        qkv_THD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        n_kv_heads: int,
        window: int | None = None,
    ) -> torch.Tensor:
        """RoPE, then `attend`. A subclass may do both in one kernel."""
        q, k, v = rotate(qkv_THD, cos, sin, n_kv_heads)
        return self.attend(layer, q, k, v, window)


class PackedKV(KV):
    """Each sequence of the batch reads its own keys and values, and those of its shared prefix."""

    def __init__(self, packed: Packed):
        self.packed = packed

    def attend(self, layer, q_THD, k_TGD, v_TGE, window=None, scale=None, kept=None):
        packed = self.packed
        if packed.keys is not None:
            k_TGD, v_TGE = gather_keys(k_TGD, v_TGE, packed.keys)
        return attention(
            q_THD,
            k_TGD,
            v_TGE,
            packed.cu_seqlens,
            packed.max_seqlen,
            scale,
            cu_seqlens_k=packed.cu_keys,
            max_seqlen_k=packed.max_keys,
            window=window,
        )

    def rotate_and_attend(self, layer, qkv_THD, cos, sin, n_kv_heads, window=None):
        if window is not None:
            return super().rotate_and_attend(layer, qkv_THD, cos, sin, n_kv_heads, window)
        packed = self.packed
        return rope_attention(
            qkv_THD,
            cos,
            sin,
            packed.cu_seqlens,
            packed.max_seqlen,
            n_kv_heads,
            keys=packed.keys,
            cu_keys=packed.cu_keys,
            max_keys=packed.max_keys,
        )


class PrefillKV(KV):
    """Like PackedKV without shared prefixes; a subclass keeps each layer's keys and values."""

    def __init__(self, packed: Packed):
        assert packed.keys is None, "a cache has no shared prefixes"
        self.packed = packed

    def keep(self, layer: int, k_TGD: torch.Tensor, v_TGE: torch.Tensor) -> None:
        """Keep the keys, rotated, and the values of all tokens, or what latent attention has in
        their place. They are views of larger tensors, with queries in them: to hold on to them
        costs much more than a copy."""
        raise NotImplementedError

    def attend(self, layer, q_THD, k_TGD, v_TGE, window=None, scale=None, kept=None):
        self.keep(layer, *(kept or (k_TGD, v_TGE)))
        packed = self.packed
        return attention(
            q_THD, k_TGD, v_TGE, packed.cu_seqlens, packed.max_seqlen, scale, window=window
        )


class RecordingKV(PrefillKV):
    """Holds the keys and values of all layers until they are copied to a cache.

    kept: the keys [T, G, D], rotated, and the values [T, G, E] of each layer, in order.
    """

    def __init__(self, packed: Packed):
        super().__init__(packed)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, layer, k_TGD, v_TGE):
        assert layer == len(self.kept), "one forward pass for each RecordingKV"
        self.kept.append((k_TGD, v_TGE))


# ---- the layer ----


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.d_model = config.d_model
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.norm_eps = config.norm_eps
        self.window = config.window_of(layer)
        self.uses_rope = layer not in config.nope_layers
        self.norms_full_width = config.qk_norm_full_width

        # q, k and v share one matrix, for one larger product.
        q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        parts = (q_rows, kv_rows, kv_rows)
        self.qkv = Linear(config.d_model, sum(parts), bias=config.qkv_bias, parts=parts)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm or config.qk_norm_full_width:
            q_heads, k_heads = (
                (config.n_heads, config.n_kv_heads) if config.qk_norm_full_width else (1, 1)
            )
            self.q_norm = nn.Parameter(torch.empty(q_heads * config.head_dim))
            self.k_norm = nn.Parameter(torch.empty(k_heads * config.head_dim))
        self.out = Linear(config.n_heads * config.head_dim, config.d_model, bias=config.out_bias)

    def project(self, x_TM: torch.Tensor) -> torch.Tensor:
        """[T, M] -> all heads [T, H + 2 G, D]: queries, keys, values; not rotated yet."""
        qkv_THD = rearrange(self.qkv(x_TM), "t (h d) -> t h d", d=self.head_dim)
        if self.q_norm is None:
            return qkv_THD
        # Before RoPE, Qwen3 norms each head of q and k, and OLMo-2 all heads of each as one vector.
        q, k, v = split_heads(qkv_THD, self.n_kv_heads)
        return torch.cat([self.norm(q, self.q_norm), self.norm(k, self.k_norm), v], dim=1)

    def norm(self, x_THD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each head, or of all heads together."""
        if not self.norms_full_width:
            return rmsnorm(x_THD, weight, self.norm_eps)
        return rmsnorm(x_THD.flatten(1), weight, self.norm_eps).unflatten(1, x_THD.shape[1:])

    def forward(
        self, x_TM: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: KV
    ) -> torch.Tensor:
        """[T, M] -> [T, M]. cos, sin: [T, D / 2], of the angles of each token's position."""
        # 1. Each token's queries, keys and values.
        qkv_THD = self.project(x_TM)
        # 2. RoPE, and softmax(q k^T / sqrt(D)) v over the tokens before it and itself.
        if self.uses_rope:
            y_THE = kv.rotate_and_attend(
                self.layer, qkv_THD, cos, sin, self.n_kv_heads, self.window
            )
        else:
            y_THE = kv.attend(self.layer, *split_heads(qkv_THD, self.n_kv_heads), self.window)
        # 3. The heads side by side, back to the width of the model.
        return self.out(rearrange(y_THE, "t h e -> t (h e)"))

    @property
    def is_ordinary(self) -> bool:
        """Whether it has RoPE, no window, and no norm over several heads, as in most models."""
        return self.uses_rope and self.window is None and not self.norms_full_width

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(key/value heads, width of a key, width of a value): what a cache holds per token."""
        return self.n_kv_heads, self.head_dim, self.head_dim

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass, in the compute dtype."""
        n_kv_heads, head_dim = self.n_kv_heads, self.head_dim
        n_heads = self.n_heads + 2 * n_kv_heads
        # the input, all heads as they are projected (values lie there), q and k rotated, the output
        heads = n_heads + (self.n_heads + n_kv_heads) + self.n_heads
        if self.q_norm is not None:
            heads += n_heads  # as they are after the norm
        return self.d_model + heads * head_dim

    def flops_per_token(self, seqlen: float) -> float:
        """Forward only: the projections, and q k^T and p v over `seqlen / 2` keys (causal)."""
        products = self.qkv.flops_per_token() + self.out.flops_per_token()
        # per head and key: D multiply-adds for q k^T and D for p v, each 2 FLOPs; half the keys
        scores = 2 * self.n_heads * self.head_dim * seqlen
        return products + scores
