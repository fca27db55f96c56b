"""Split off model/generation.py."""

import numpy as np
import torch

from ...kernels.sampling import invert_cdf, sample_logits


class NonFiniteError(RuntimeError):
    """A NaN or infinity where a number was due; the message names the tensor and the place."""


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64; shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def counter_uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1): a fixed function of (seed, counter), both int64, of shapes that broadcast."""
    golden = -0x61C8864680B583EB
    bits = _mix(_mix(seeds + golden) + (counters + 1) * golden)
    return ((bits >> 11) & 0x1F_FFFF_FFFF_FFFF).double() * 2.0**-53


def signed(seed: int) -> int:
    """A 64-bit integer, with a sign or without, as the int64 of the same bits."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def sample_seeds(n: int, *keys: int) -> torch.Tensor:
    """[n] int64 seeds, a fixed function of the keys, as in sample_seeds(256, run_seed, step)."""
    # two words of 32 bits each, and their number: SeedSequence itself takes (s,) for (s, 0)
    words = [len(keys), *(int(k) >> shift & 0xFFFF_FFFF for k in keys for shift in (0, 32))]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return _mix(torch.arange(n) + int(state.view(np.int64)[0]))


def keep_likeliest(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """logits [B, V] with -inf for the tokens that a row's top_k, top_p and min_p (each [B]) leave out.

    top_p counts what top_k leaves; the likeliest token always stays, and of equal ones the lower id.
    """
    sorted_logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    out = (rank >= top_k[:, None]) & (top_k[:, None] > 0)
    probs = sorted_logits.masked_fill(out, float("-inf")).softmax(-1)
    # at 1 a row is left alone, and fp32 would lose the tail of a large vocabulary in the sum
    out |= (probs.cumsum(-1, dtype=torch.float64) - probs >= top_p[:, None]) & (top_p[:, None] < 1)
    out |= probs < min_p[:, None] * probs[:, :1]
    out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(out).scatter_(1, ids, out), float("-inf"))


def check_finite(finite: torch.Tensor, temperature) -> None:
    if not finite.all():
        raise NonFiniteError(
            f"logits at temperature {temperature} are NaN or infinite in "
            f"{int((~finite).sum())} of {len(finite)} rows while sampling"
        )


def sample_tokens(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    uniforms: torch.Tensor,
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    top_n: int = 0,
):
    """Draw one token a row: (tokens [B] int64, logp [B] float32). Temperature 0 takes the likeliest, logp 0.

    logits: [B, V]; temperature: one for all or [B]; uniforms: [B] in [0, 1), see counter_uniform; filters:
    (top_k, top_p, min_p), each [B]; they do not touch rows of temperature 0. With top_n also (ids, log-probs)
    [B, top_n] of the likeliest tokens. Raises NonFiniteError for NaN or infinite logits.
    """
    greedy, name = None, temperature
    if isinstance(temperature, torch.Tensor):
        greedy = temperature == 0
        logits = logits / temperature.masked_fill(greedy, 1.0)[:, None]
        name = "given"
    elif temperature not in (0, 1):
        logits = logits / temperature
    if greedy is None and temperature != 0 and filters is None and not top_n:
        tokens, logp = sample_logits(logits, uniforms)
        check_finite(tokens >= 0, name)
        return tokens, logp
    check_finite(torch.isfinite(logits.sum(-1)), name)
    if not isinstance(temperature, torch.Tensor) and temperature == 0:
        tokens, logp = logits.argmax(-1), logits.new_zeros(len(logits))
        return (
            (tokens, logp, *_likeliest(logits.log_softmax(-1), top_n)) if top_n else (tokens, logp)
        )
    if filters is not None:
        top_k, top_p, min_p = filters
        if greedy is not None:
            top_k, top_p, min_p = (
                top_k.masked_fill(greedy, 0),
                top_p.masked_fill(greedy, 1),
                min_p.masked_fill(greedy, 0),
            )
        logits = keep_likeliest(logits, top_k, top_p, min_p)
    probs = torch.softmax(logits, -1)
    tokens = invert_cdf(probs, uniforms)
    logp = probs.gather(1, tokens[:, None])[:, 0].log()
    if greedy is not None:
        tokens, logp = torch.where(greedy, logits.argmax(-1), tokens), logp.masked_fill(greedy, 0.0)
    return (tokens, logp, *_likeliest(logits.log_softmax(-1), top_n)) if top_n else (tokens, logp)


def _likeliest(logp: torch.Tensor, n: int):
    values, ids = logp.topk(min(n, logp.shape[-1]), -1)
    return ids, values
