"""A key/value cache of row slots, for fp32 on a CPU: one rectangle of rows and columns, in the
decoder.

This file says what the scheduler asks of a cache (see cache.py), gathers the model's weights, and
forwards. The memory, and the step that reads it, are kernels/decoder.py, which takes plain tensors.
The decoder reads the trainer's weights where they lie, so there is no copy to refresh.

Left out: models whose layers are not an attention with a dense MLP. `serves` is False for them, and
the engine takes pages, which run the model's own layers.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.decoder import Decoder, DecoderWeights, LayerWeights, decoder_refuses
from ..attention import Attention, RecordingKV
from ..linear import plain
from ..mlp import MLP
from ..packed import pack
from ..transformer import Block, Transformer
from .cache import PAGE


def gather_weights(model: Transformer) -> DecoderWeights | None:
    """The weights as the decoder takes them. None if the model does more than they say: a forward
    of its own, a layer that is no attention with a dense MLP, a matrix that is more than its weight
    (see linear.py)."""
    layers = []
    if type(model).forward is not Transformer.forward:
        return None
    # Its table of cosines and sines has no factor.
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.table_factor != 1:
        return None
    for block in model.blocks:
        if type(block) is not Block:
            return None
        attn, mlp = block.attn, block.mlp
        if type(attn) is not Attention or type(mlp) is not MLP:
            return None
        if not plain(attn.qkv, attn.out, mlp.gate_up, mlp.down):
            return None
        biases = (attn.out.bias, mlp.gate_up.bias, mlp.down.bias)
        if any(bias is not None for bias in biases) or not attn.is_ordinary:
            return None
        layers.append(
            LayerWeights(
                attn_norm=block.attn_norm,
                qkv=attn.qkv.weight,
                qkv_bias=attn.qkv.bias,
                q_norm=attn.q_norm,
                k_norm=attn.k_norm,
                out=attn.out.weight,
                mlp_norm=block.mlp_norm,
                gate_up=mlp.gate_up.weight,
                down=mlp.down.weight,
            )
        )
    # Where the logits are more than a product, the decoder ends at the hidden states.
    own_logits = type(model) is not Transformer or not model.has_plain_head
    head = None if own_logits else model.head
    return DecoderWeights(model.embed, layers, model.norm, head)


def refuses(model: Transformer, weights: DecoderWeights | None) -> str | None:
    """Why the decoder cannot serve this model, in words; None if it can."""
    if weights is None:
        return "the model is more than attention and dense MLPs of plain matrices"
    return decoder_refuses(weights, model.compute_dtype)


def prefill(model: Transformer, prompts: list[Sequence[int]]):
    """(offsets of the prompts, hidden states [T, M], each layer's rotated keys and values [T, G,
    D])."""
    packed = pack(prompts)
    kv = RecordingKV(packed)
    hidden = model(packed.tokens, packed.positions, kv)
    return packed.cu_seqlens, hidden, kv.kept


class Slots:
    """At most `n_tokens` slots: rows times columns."""

    copy_bytes = 0  # of weights: the decoder reads the trainer's

    def __init__(self, model: Transformer, n_rows: int):
        self.model, self.n_rows = model, n_rows
        config = model.config
        self.decoder = Decoder(
            self._weights(),
            n_rows,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            rope_rescale=config.rope_rescale,
        )

    @staticmethod
    def serves(model: Transformer) -> bool:
        return refuses(model, gather_weights(model)) is None

    def _weights(self) -> DecoderWeights:
        weights = gather_weights(self.model)
        reason = refuses(self.model, weights)
        if reason:
            raise ValueError(f"engine: paged is False, but {reason}; expected paged=True or None")
        return weights

    def refresh(self) -> None:
        """Find the trainer's weights again: they may be other tensors by now."""
        self.decoder.load(self._weights())

    # ---- room: what the scheduler asks ----

    @property
    def n(self) -> int:
        """Rows in use."""
        return self.decoder.n

    def allocate(self, n_tokens: int) -> None:
        """Set the limit; memory is allocated as it is needed."""
        self.decoder.n_slots = n_tokens

    def needed(self, total: int) -> int:
        """Slots for one sequence of so many tokens."""
        return self.decoder.slots_for(total)

    def can_step(self) -> bool:
        """Is there a slot for one more token in each row?"""
        decoder = self.decoder
        return decoder.n * decoder.slots_for(decoder.longest + 1) <= decoder.n_slots

    def fits(self, n: int, longest: int, pages: int) -> bool:
        """May n more rows begin, with prompts of at most `longest` tokens? A page more per row is
        kept free, so that all can go on. `pages` is what they would take in a cache of pages."""
        decoder = self.decoder
        rows = decoder.n + n
        per_row = decoder.slots_for(max(decoder.longest, longest) + PAGE)
        return rows <= self.n_rows and rows * per_row <= decoder.n_slots

    def width(self, n: int) -> int:
        """n, rounded up to where one row fewer saves time."""
        return self.decoder.width(n)

    # ---- rows ----

    def admit(
        self,
        rows: np.ndarray,
        prompts: list[Sequence[int]],
        which: np.ndarray,
        routes: list | None = None,
    ) -> torch.Tensor:
        """Prefill the prompts and copy prompts[which[i]] into rows[i]. Returns the prompts' logits
        [P, V]."""
        cu_seqlens, hidden, kept = prefill(self.model, prompts)
        firsts, lengths = cu_seqlens.numpy()[which], cu_seqlens.diff().numpy()[which]
        self.decoder.admit(rows, firsts, lengths, kept)
        return self.model.logits(hidden[cu_seqlens[1:].long() - 1])

    def routes_of(self, rows: np.ndarray) -> list[None]:
        """A dense model has no routes."""
        return [None] * len(rows)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B], the newest of each row, not in the cache yet. Returns the logits [B, V] of
        what follows, which the next step may overwrite."""
        result = self.decoder.decode(tokens)
        return result if self.decoder.head is not None else self.model.logits(result)

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        self.decoder.move(dst, src)

    def cut(self, n: int) -> None:
        self.decoder.cut(n)

    def empty(self, rows: np.ndarray) -> None:
        self.decoder.empty(rows)

    def clear(self) -> None:
        self.decoder.clear()
