"""How a token is sampled: random numbers, filters, and an inverted cumulative distribution.

The random number of a token is a function of (seed of the request, position of the token). So the
tokens of a request depend neither on what else is in the batch nor on the order of the requests.
(Only rounding does: that of a matrix product changes with its shape, by about 1e-6.)

Each token comes with its log-prob under the distribution that it was sampled from: temperature,
top-k, top-p and min-p included.

Left out: penalties for repetition, beam search, biases of log-probs. Training must be able to score
what was sampled.

Shapes: B rows, V vocabulary.
"""

import numpy as np
import torch

from ...kernels.dispatch import widest_dtype
from ...kernels.sampling import cumulative, invert_cdf, sample_logits

Filters = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # top_k, top_p and min_p, each [B]


class NonFiniteError(RuntimeError):
    """A NaN or infinity where a number was due; the message names the tensor and where it is."""


# ---- random numbers: SplitMix64 (Steele, Lea and Flood 2014) as a function of (seed, counter) ----

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64: the step of its state
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 on int64. Masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def counter_uniform(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), a fixed function of (seed, counter): int64, of shapes that broadcast.

    They are float64 where the device has it.
    """
    state = _mix(seeds + GOLDEN)
    bits = _mix(state + (counters + 1) * GOLDEN)
    top_53_bits = (bits >> 11) & 0x1F_FFFF_FFFF_FFFF
    return top_53_bits.to(widest_dtype(seeds.device)) * 2.0**-53


def signed(seed: int) -> int:
    """A 64-bit integer, with a sign or without, as the int64 of the same bits."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def sample_seeds(n: int, *keys: int) -> torch.Tensor:
    """[n] int64 seeds, a fixed function of the keys: sample_seeds(256, run_seed, step)."""
    # Two words of 32 bits per key, and how many there are: SeedSequence takes (s,) for (s, 0).
    words = [len(keys)]
    for key in keys:
        words += [int(key) & 0xFFFF_FFFF, int(key) >> 32 & 0xFFFF_FFFF]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return _mix(torch.arange(n) + int(state.view(np.int64)[0]))


# ---- filters ----


def keep_likeliest(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Logits [B, V], -inf for the tokens that the top_k, top_p and min_p of a row leave out.

    top_p counts what top_k leaves. The likeliest token always stays; of equal ones, the lower id.
    """
    sorted_logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]

    # top-k: the k likeliest, or all where it is 0.
    out = (rank >= top_k) & (top_k > 0)

    # top-p (Holtzman et al. 2020): the likeliest that together reach p. A row with p = 1 is left
    # alone: a sum of float32 numbers would lose the tail of a large vocabulary.
    probs = sorted_logits.masked_fill(out, float("-inf")).softmax(-1)
    sum_before = cumulative(probs, widest_dtype(probs.device)) - probs
    out |= (sum_before >= top_p) & (top_p < 1)

    # min-p: those at least p times as likely as the likeliest.
    out |= probs < min_p * probs[:, :1]

    out[:, 0] = False
    out_by_id = torch.zeros_like(out).scatter_(1, ids, out)
    return logits.masked_fill(out_by_id, float("-inf"))


def _without_greedy(filters: Filters, greedy: torch.Tensor) -> Filters:
    """Filters that leave the rows of temperature 0 alone."""
    top_k, top_p, min_p = filters
    return (
        top_k.masked_fill(greedy, 0),
        top_p.masked_fill(greedy, 1),
        min_p.masked_fill(greedy, 0),
    )


# ---- one token per row ----


def sample_tokens(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    uniforms: torch.Tensor,
    filters: Filters | None = None,
    top_n: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Sample one token per row: (tokens [B] int64, logp [B] float32).

    logits: [B, V].
    temperature: one for all rows, or [B]. 0 takes the likeliest token, and its logp is 0.
    uniforms: [B] in [0, 1), see counter_uniform.
    filters: they do not touch rows of temperature 0.
    top_n: also return (ids, log-probs), each [B, top_n], of the likeliest tokens.
    Raises NonFiniteError for NaN or infinite logits.
    """
    per_row = isinstance(temperature, torch.Tensor)
    greedy = temperature == 0  # [B] bool, or one bool
    if per_row:
        logits = logits / temperature.masked_fill(greedy, 1.0)[:, None]
    elif temperature not in (0, 1):
        logits = logits / temperature

    # The usual case has a kernel of its own.
    plain = not per_row and not greedy and filters is None and not top_n
    if plain:
        tokens, logp = sample_logits(logits, uniforms)
        check_finite(tokens >= 0, temperature)  # -1 marks a row that is not finite
        return tokens, logp

    check_finite(torch.isfinite(logits.sum(-1)), "given" if per_row else temperature)
    if not per_row and greedy:
        tokens, logp = logits.argmax(-1), logits.new_zeros(len(logits))
    else:
        if filters is not None:
            filters = _without_greedy(filters, greedy) if per_row else filters
            logits = keep_likeliest(logits, *filters)
        probs = torch.softmax(logits, -1)
        tokens = invert_cdf(probs, uniforms)
        logp = probs.gather(1, tokens[:, None])[:, 0].log()
        if per_row:
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
            logp = logp.masked_fill(greedy, 0.0)
    if not top_n:
        return tokens, logp
    likeliest = logits.log_softmax(-1).topk(top_n, -1)
    return tokens, logp, likeliest.indices, likeliest.values


def check_finite(finite: torch.Tensor, temperature: float | str) -> None:
    """Raise NonFiniteError unless all rows [B] are finite."""
    if not finite.all():
        raise NonFiniteError(
            f"logits at temperature {temperature} are NaN or infinite in "
            f"{int((~finite).sum())} of {len(finite)} rows while sampling"
        )
