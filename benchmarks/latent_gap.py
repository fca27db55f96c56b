"""How far the two forms of latent attention are apart in their log-probs, in fp32 and in bf16.

    python -m benchmarks.latent_gap                           random weights, in DeepSeek's shape but small
    python -m benchmarks.latent_gap --base DIR                a run folder with latent attention

The trainer takes whole sequences and makes keys and values from the latents (expanded). The engine decodes
one token at a time and reads the latents as they are (absorbed). GRPO takes both for one policy, so a gap
between their log-probs is a wrong importance ratio. Peer: decoding one token at a time from keys and values,
in the same run. A gap that it has too is the rounding of any decoder, and not of the absorbed form.

Left out: the sampling itself; all forms score the same random tokens.

Shapes: B sequences, S tokens of each, R = B (S - 1) scored tokens.
"""
from dataclasses import asdict, dataclass

import numpy as np
import torch
import tyro

from r1zero.kernels.attention import attention
from r1zero.model.attention import KV
from r1zero.model.checkpoint import load_model
from r1zero.model.config import LatentShape, ModelConfig
from r1zero.model.engine.cache import PAGE, pages_for
from r1zero.model.engine.pages import PagedKV
from r1zero.model.packed import pack
from r1zero.model.precision import Precision, choose_precision
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.transformer import Transformer
from r1zero.train.machine import pick_device, reuse_memory

from .common import finish, table

SMALL = ModelConfig(
    vocab_size=512, n_layers=6, d_model=256, n_heads=8, n_kv_heads=8, head_dim=96, d_ff=704, max_seq_len=1024,
    tie_embeddings=False, latent=LatentShape(kv_rank=256, q_rank=192, rope_dim=32, value_dim=64),
    rope_scaling=RopeScaling("yarn", 4.0, original_max_seq_len=256, mscale=0.707, mscale_all_dim=0.707))
PRECISIONS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "bf16, fp32 head": ("bf16", True)}
SHARPER = 2.0  # the head of random weights: entropies as of a trained model, not those of a die


@dataclass(frozen=True)
class Flags:
    """The gap between the expanded and the absorbed form."""

    base: str | None = None
    """Run folder of a model with latent attention. None: a small one with random weights."""
    sequences: int = 8
    tokens: int = 256
    """Tokens per sequence."""
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    """File for the line of JSON."""


class ExpandedCache(KV):
    """Keys and values of all heads, of sequences that all have as many tokens."""

    def __init__(self):
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def attend(self, layer, q_THD, k_TGD, v_TGE, window=None, scale=None, kept=None):
        rows = self.kept.setdefault(layer, [])
        rows.append((k_TGD, v_TGE))
        n, length = len(q_THD), len(rows)
        k, v = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*rows, strict=True))
        each = torch.arange(n + 1, dtype=torch.int32, device=q_THD.device)
        return attention(q_THD, k, v, each, 1, scale, cu_seqlens_k=each * length, max_seqlen_k=length)


def model_in(precision: Precision, f: Flags) -> Transformer:
    """The model of the base, or one with random weights, that computes in `precision`."""
    device = pick_device(f.device)
    if f.base is not None:
        model = load_model(f.base, device, precision=precision)[0]
        if model.config.latent is None:
            raise ValueError(f"{f.base} has no latent attention; expected a model with `latent`")
        return model
    model = Transformer(SMALL, precision.dtype, precision.fp32_head).init_weights(f.seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPER)
    return model.to(device)


def latent_cache(model: Transformer, n_rows: int, n_tokens: int):
    """(caches, page table) as in engine/pages.py, with as many tokens in every row."""
    width = pages_for(n_tokens)
    table = 1 + torch.arange(n_rows * width, dtype=torch.int32, device=model.device).view(n_rows, width)
    caches = []
    for block in model.blocks:
        n_kv_heads, *widths = block.attn.cache_shape
        caches.append([torch.zeros(1 + n_rows * width, n_kv_heads, PAGE, w, dtype=model.compute_dtype,
                                   device=model.device) for w in widths])
    return caches, table


def logps_of(model: Transformer, tokens_BS: torch.Tensor, form: str) -> np.ndarray:
    """[B, S - 1] fp64: the log-prob of each token but the first. form: packed, expanded or absorbed."""
    n_rows, n_tokens = tokens_BS.shape
    if form == "packed":
        hidden = model.hidden_states(pack(tokens_BS.tolist(), model.device)).view(n_rows, n_tokens, -1)
    else:
        hidden = torch.stack(decoded(model, tokens_BS, form), dim=1)
    logp, _ = model.logprobs(hidden[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    return logp.double().cpu().numpy().reshape(n_rows, n_tokens - 1)


def decoded(model: Transformer, tokens_BS: torch.Tensor, form: str) -> list[torch.Tensor]:
    """Hidden states [B, M] of each position, one token of each row at a time."""
    caches, table = latent_cache(model, *tokens_BS.shape)
    expanded, hidden = ExpandedCache(), []
    for t, tokens_B in enumerate(tokens_BS.unbind(1)):
        lengths = torch.full_like(tokens_B, t, dtype=torch.int32)
        kv = PagedKV(caches, table, lengths) if form == "absorbed" else expanded
        hidden.append(model(tokens_B, lengths.long(), kv))
    return hidden


def numbers_of(logp: np.ndarray, trainer: np.ndarray) -> dict[str, float]:
    """How far log-probs are from the trainer's; k3 is Schulman's estimate of the KL divergence."""
    d = (trainer - logp).ravel()
    gap = np.abs(d)
    return {"tokens": len(gap), "mean": float(gap.mean()), "p99": float(np.quantile(gap, 0.99)),
            "max": float(gap.max()), "k3": float((np.expm1(d) - d).mean())}


def main(f: Flags) -> dict:
    reuse_memory()
    found, rng = {}, torch.Generator().manual_seed(f.seed)
    with torch.no_grad():
        for name, (dtype, fp32_head) in PRECISIONS.items():
            model = model_in(choose_precision(dtype, fp32_head, pick_device(f.device)), f)
            if not found:
                tokens = torch.randint(model.config.vocab_size, (f.sequences, f.tokens), generator=rng)
                tokens = tokens.to(model.device)
            trainer = logps_of(model, tokens, "packed")
            for form in ("expanded", "absorbed"):
                found[f"{name}, {form}"] = numbers_of(logps_of(model, tokens, form), trainer)
    table(["decoded", "tokens", "mean gap", "99 %", "largest", "k3"],
          [[name, f"{n['tokens']:,}", *(f"{n[key]:.2g}" for key in ("mean", "p99", "max", "k3"))]
           for name, n in found.items()])
    return finish("latent_gap", {"flags": asdict(f), "gaps": found}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
