"""The decode step of a whole stack of dense layers, with its cache of keys and values, for a CPU.

It is no op but a small inference engine: on a CPU each step makes hundreds of small calls, and
their overhead is most of the time. So one object runs all layers as a few compiled loops
(kernels/cpu/decoder.py). It takes plain tensors and knows no model. model/engine/slots.py gathers
them and assigns rows to sequences.

A layer, with x the residual stream:  x += out attention(RoPE(qkv norm(x) + bias));  x +=
MLP(norm(x)), where the MLP is SwiGLU and q_norm and k_norm, if given, norm each head of q and k
before RoPE.

There is no reference in plain PyTorch beside it: where `decoder_refuses`, the engine decodes with
the model itself, against pages.

Shapes: M features, H query heads, G kv heads, D head_dim, F d_ff, V vocabulary.
"""

from typing import NamedTuple

import torch

from .cpu import decoder as cpu

Decoder = cpu.Decoder


class LayerWeights(NamedTuple):
    """The weights of one layer."""

    attn_norm: torch.Tensor
    """[M]"""
    qkv: torch.Tensor
    """[(H + 2 G) D, M], the heads of q, then of k, then of v."""
    qkv_bias: torch.Tensor | None
    """[(H + 2 G) D]"""
    q_norm: torch.Tensor | None
    """[D]"""
    k_norm: torch.Tensor | None
    """[D]"""
    out: torch.Tensor
    """[M, H D]"""
    mlp_norm: torch.Tensor
    """[M]"""
    gate_up: torch.Tensor
    """[2 F, M], the gate's rows, then up's."""
    down: torch.Tensor
    """[M, F]"""


class DecoderWeights(NamedTuple):
    """All weights of a decoder."""

    embed: torch.Tensor
    """[V, M]"""
    layers: list[LayerWeights]
    norm: torch.Tensor
    """[M], before the head."""
    head: torch.Tensor | None
    """[V, M]; None: the decoder returns hidden states."""


def decoder_refuses(weights: DecoderWeights, compute_dtype: torch.dtype) -> str | None:
    """Why `Decoder` cannot serve these weights in this dtype, in words; None if it can."""
    if compute_dtype != torch.float32:
        return f"the decoder computes in float32, and the model computes in {compute_dtype}"
    return cpu.refuses(weights)
