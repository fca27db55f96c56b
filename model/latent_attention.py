"""Multi-head latent attention (MLA) of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1).

A token keeps one latent c for all heads, not keys and values for each. With x the stream, h a head:

    c = norm(W_DKV x)                 k_rope = RoPE(W_KR x)            one for all heads
    k_h = (W_UK_h c, k_rope)          v_h = W_UV_h c
    q_h = (W_UQ_h z, RoPE(W_QR_h z))  z = norm(W_DQ x), or x itself without a q_rank
    out = W_O (softmax(scale q_h k_h^T) v_h, head by head)

The position is in the rotated part alone ("decoupled RoPE"). So W_UK can be moved to the other side
of the product, which gives two forms of the same numbers:

    expanded    keys and values are made from the latents; cheaper for training and prefill, where
                many queries read them
    absorbed    q_nope W_UK reads the latents as they are; cheaper for decoding, where one query
                reads many

They differ by rounding, so an absorbed sampler and an expanded trainer have a gap between their
log-probs: python -m benchmarks.latent_gap.

Pairs that RoPE rotates lie half a part apart, as in all our models. DeepSeek's files have them side
by side: whoever reads them permutes the rows that W_KR and W_QR have in kv_down and q_up.

Left out: biases but that of W_O, windows, a low rank that is shared between layers.

Shapes: T tokens, B rows that decode, M d_model, H heads, N = D - R width of what is not rotated, R
width of what is, D head_dim, E width of a value, L width of a latent.
"""

import torch
from torch import nn

from ..kernels.rmsnorm import rmsnorm
from ..kernels.rope import rope
from .attention import KV
from .config import ModelConfig
from .linear import Linear, plain

LATENT_NORM_EPS = 1e-6  # whatever the eps of the other norms


class LatentAttention(nn.Module):
    """Multi-head latent attention with RoPE on a part of each head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent = config.latent
        assert latent is not None, "a config with the widths of the latents"
        self.layer = layer
        self.d_model, self.n_heads, self.head_dim = config.d_model, config.n_heads, config.head_dim
        self.kv_rank, self.rope_dim = latent.kv_rank, latent.rope_dim
        self.nope_dim, self.value_dim = config.head_dim - latent.rope_dim, latent.value_dim
        self.norm_eps = LATENT_NORM_EPS
        # of a whole key, rotated part and other, in both forms
        self.scale = config.head_dim**-0.5
        if config.rope_scaling is not None:
            self.scale *= config.rope_scaling.softmax_factor

        self.q_down, self.q_norm = None, None
        if latent.q_rank is not None:
            self.q_down = Linear(config.d_model, latent.q_rank)
            self.q_norm = nn.Parameter(torch.empty(latent.q_rank))
        q_width = latent.q_rank or config.d_model
        self.q_up = Linear(q_width, config.n_heads * config.head_dim)  # per head: nope, rope
        self.kv_down = Linear(config.d_model, latent.kv_rank + latent.rope_dim)  # c, k_rope
        self.kv_norm = nn.Parameter(torch.empty(latent.kv_rank))
        made = self.nope_dim + self.value_dim
        self.kv_up = Linear(latent.kv_rank, config.n_heads * made)  # per head: nope, value
        self.out = Linear(config.n_heads * self.value_dim, config.d_model, bias=config.out_bias)

    def queries(self, x_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, H, N], [T, H, R]): both parts of each head's query, not rotated yet."""
        if self.q_down is not None:
            x_TM = rmsnorm(self.q_down(x_TM), self.q_norm, self.norm_eps)
        q_THD = self.q_up(x_TM).unflatten(1, (self.n_heads, self.head_dim))
        return q_THD.split([self.nope_dim, self.rope_dim], dim=2)

    def latents(self, x_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, L], [T, R]): each token's latent, and the part of its keys that is to be rotated."""
        latent_TL, k_rope_TR = self.kv_down(x_TM).split([self.kv_rank, self.rope_dim], dim=1)
        return rmsnorm(latent_TL, self.kv_norm, self.norm_eps), k_rope_TR

    def forward(
        self, x_TM: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: KV
    ) -> torch.Tensor:
        """[T, M] -> [T, M]. cos, sin: [T, R / 2], of the angles of each token's position."""
        # 1. Each token's queries, and the latent that its keys and values are made from.
        q_nope_THN, q_rope_THR = self.queries(x_TM)
        latent_TL, k_rope_TR = self.latents(x_TM)
        # 2. RoPE of the parts that have it, in one call; all heads share that of the key.
        rotated = rope(torch.cat([q_rope_THR, k_rope_TR[:, None]], dim=1), cos, sin)
        q_rope_THR, k_rope_T1R = rotated.split([self.n_heads, 1], dim=1)
        # 3. Attention: to a cache of latents as they are, else to keys and values made from them.
        form = self.absorbed if kv.reads_latents else self.expanded
        y_THE = form(q_nope_THN, q_rope_THR, latent_TL[:, None], k_rope_T1R, kv)
        # 4. The heads side by side, back to the width of the model.
        return self.out(y_THE.flatten(1))

    def expanded(
        self,
        q_nope_THN: torch.Tensor,
        q_rope_THR: torch.Tensor,
        latent_T1L: torch.Tensor,
        k_rope_T1R: torch.Tensor,
        kv: KV,
    ) -> torch.Tensor:
        """Attention [T, H, E] with keys and values of each head, made from the latents."""
        made = self.kv_up(latent_T1L[:, 0]).unflatten(1, (self.n_heads, -1))
        k_nope_THN, v_THE = made.split([self.nope_dim, self.value_dim], dim=2)
        k_THD = torch.cat([k_nope_THN, k_rope_T1R.expand(-1, self.n_heads, -1)], dim=2)
        q_THD = torch.cat([q_nope_THN, q_rope_THR], dim=2)
        kept = (k_rope_T1R, latent_T1L)
        return kv.attend(self.layer, q_THD, k_THD, v_THE, scale=self.scale, kept=kept)

    def absorbed(
        self,
        q_nope_BHN: torch.Tensor,
        q_rope_BHR: torch.Tensor,
        latent_B1L: torch.Tensor,
        k_rope_B1R: torch.Tensor,
        kv: KV,
    ) -> torch.Tensor:
        """The same [B, H, E] from a cache of latents, of which no key or value is made."""
        w_k_HNL, w_v_HEL = self.up_weight(latent_B1L).split([self.nope_dim, self.value_dim], dim=1)
        # (W_UK c) q = c (W_UK^T q), and sum p (W_UV c) = W_UV (sum p c)
        q_latent_BHL = torch.einsum("bhn,hnl->bhl", q_nope_BHN, w_k_HNL)
        y_BHL = kv.attend_latents(
            self.layer, q_latent_BHL, q_rope_BHR, latent_B1L, k_rope_B1R, self.scale
        )
        return torch.einsum("bhl,hel->bhe", y_BHL, w_v_HEL)

    def up_weight(self, like: torch.Tensor) -> torch.Tensor:
        """[H, N + E, L], the matrix that kv_up multiplies by, in the dtype and on the device of
        `like`."""
        if plain(self.kv_up):
            weight = self.kv_up.weight.to(like.dtype)
        else:  # an adapter or a quantised weight: ask what it makes of each unit vector
            weight = self.kv_up(torch.eye(self.kv_rank, dtype=like.dtype, device=like.device)).t()
        return weight.unflatten(0, (self.n_heads, -1))

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(1, width of the rotated part of a key, width of a latent): what a cache holds per
        token."""
        return 1, self.rope_dim, self.kv_rank

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass, in the compute dtype."""
        # the input; both latents, before and after their norms
        kept = self.d_model + 2 * self.kv_rank + self.rope_dim
        if self.q_down is not None:
            kept += 2 * self.q_down.weight.shape[0]
        # q and k, both parts together; values, which lie beside what k is made of; the output
        per_head = 2 * self.head_dim + (self.nope_dim + self.value_dim) + self.value_dim
        return kept + self.n_heads * per_head

    def flops_per_token(self, seqlen: float) -> float:
        """Forward only, expanded: the projections, and q k^T and p v over `seqlen / 2` keys
        (causal)."""
        linears = (self.q_down, self.q_up, self.kv_down, self.kv_up, self.out)
        products = sum(linear.flops_per_token() for linear in linears if linear is not None)
        # per head and key: D multiply-adds for q k^T and E for p v, each 2 FLOPs; half the keys
        scores = self.n_heads * (self.head_dim + self.value_dim) * seqlen
        return products + scores
