"""Sampling from a model: `generate` with a key/value cache, and `generate_naive`, the oracle without one.

- A prompt is prefilled once and its keys and values are shared out to all samples of its group.
- Finished sequences leave the batch: their rows are dropped from the cache as soon as an eighth of the rows
  is done.
- Randomness is counter-based: the number that picks a token is a function of (the sample's seed, position),
  so a sample does not depend on its neighbours or on the order (up to rounding of the matrix products at the
  1e-6 level).
- Each token comes with its log-prob under the distribution that it was drawn from.

Left out: top-k and top-p (training must score what was sampled), stop strings, continuous batching.

Shapes: P prompts, B rows alive, S cache length, G kv heads, D head_dim, V vocabulary.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from .packed import pack
from .transformer import Transformer


class NonFiniteError(RuntimeError):
    """A NaN or infinity where a number was due; the message names the tensor and the place."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation."""

    tokens: np.ndarray
    """[n] int64, the end token included if it was reached."""
    logp: np.ndarray
    """[n] float32, log-prob of each token under the distribution sampled from."""
    finish_reason: str
    """"stop" (the end token) or "length" (max_new_tokens)."""


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


def sample_seeds(n: int, *keys: int) -> torch.Tensor:
    """[n] int64 seeds, a fixed function of the keys, as in sample_seeds(256, run_seed, step)."""
    # two words of 32 bits each, and their number: SeedSequence itself takes (s,) for (s, 0)
    words = [len(keys), *(int(k) >> shift & 0xFFFF_FFFF for k in keys for shift in (0, 32))]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return _mix(torch.arange(n) + int(state.view(np.int64)[0]))


def sample_tokens(logits: torch.Tensor, temperature: float, uniforms: torch.Tensor):
    """Draw one token a row: (tokens [B] int64, logp [B] float32). Temperature 0 takes the likeliest, logp 0.

    logits: [B, V]; uniforms: [B] in [0, 1), see counter_uniform. Inverts the cumulative distribution, so one
    random number a row is all it takes; a token of probability 0 is never drawn. Raises NonFiniteError for
    NaN or infinite logits.
    """
    if temperature != 0:
        logits = logits / temperature
    finite = torch.isfinite(logits.sum(-1))
    if not finite.all():
        raise NonFiniteError(f"logits at temperature {temperature} are NaN or infinite in "
                             f"{int((~finite).sum())} of {len(logits)} rows while sampling")
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    probs = torch.softmax(logits, -1)
    cumulative = probs.cumsum(-1)
    threshold = uniforms.float() * cumulative[:, -1]
    # float32 rounding may lift the threshold to the total itself: then the last token of any probability
    threshold = torch.minimum(threshold, torch.nextafter(cumulative[:, -1], threshold.new_zeros(())))
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def check_request(model: Transformer, prompts, max_new_tokens: int, temperature: float):
    longest = max((len(p) for p in prompts), default=0)
    if not prompts or min(len(p) for p in prompts) == 0:
        raise ValueError(f"generate: got {len(prompts)} prompts, the shortest empty or missing; every prompt "
                         "needs at least one token")
    largest = max(max(p) for p in prompts)
    if largest >= model.config.vocab_size:
        raise ValueError(f"generate: a prompt holds token id {largest}, but the model's vocab_size is "
                         f"{model.config.vocab_size}; is this the tokenizer that it was trained with?")
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens} and temperature {temperature}; "
                         "expected at least 1 and a number of 0 or more")
    if longest + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"generate: a prompt of {longest} tokens and max_new_tokens {max_new_tokens} pass "
                         f"the model's max_seq_len {model.config.max_seq_len}; ask for fewer new tokens or "
                         "shorten the prompt")


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], n_samples: int, max_new_tokens: int,
             temperature: float, seeds: torch.Tensor, eos_id: int, max_rows: int = 512) -> list[Completion]:
    """Sample `n_samples` continuations of each prompt; those of prompt p begin at p * n_samples.

    prompts: token ids; seeds: [P * n_samples] int64, one a sample; max_rows: sequences decoded at one time
    (but never less than one prompt's samples).
    Raises ValueError for an empty prompt, one that does not fit max_seq_len, or seeds of another length, and
    NonFiniteError for NaN logits.
    """
    check_request(model, prompts, max_new_tokens, temperature)
    if n_samples < 1:
        raise ValueError(f"generate: n_samples is {n_samples}; expected at least 1")
    if len(seeds) != len(prompts) * n_samples:
        raise ValueError(f"generate: got {len(seeds)} seeds for {len(prompts)} prompts x {n_samples} "
                         f"samples; expected {len(prompts) * n_samples}")
    done: list[Completion] = []
    per_wave = max(1, max_rows // n_samples)
    for start in range(0, len(prompts), per_wave):
        wave = prompts[start : start + per_wave]
        wave_seeds = seeds[start * n_samples : (start + len(wave)) * n_samples]
        done += _generate_wave(model, wave, n_samples, max_new_tokens, temperature, wave_seeds, eos_id)
    return done


def _generate_wave(model, prompts, n_samples, max_new_tokens, temperature, seeds, eos_id):
    device, c = model.embed.device, model.config
    seeds = seeds.to(device)
    packed = pack(prompts, device)
    hidden, kv = model.prefill(packed)
    ends = packed.cu_seqlens[1:].long() - 1
    lengths = packed.cu_seqlens.diff().long().repeat_interleave(n_samples)  # [B] tokens in each row's cache
    longest = packed.max_seqlen
    slots = torch.arange(longest, device=device)
    # [P, longest]; what lies behind a prompt's end is garbage that no row reads
    index = (packed.cu_seqlens[:-1, None] + slots).clamp(max=len(packed.tokens) - 1)
    caches = []
    for k, v in kv:
        pair = []
        for x in (k, v):
            cache = x.new_zeros(len(lengths), c.n_kv_heads, longest + max_new_tokens, c.head_dim)
            cache[:, :, :longest] = x[index].transpose(1, 2).repeat_interleave(n_samples, dim=0)
            pair.append(cache)
        caches.append(tuple(pair))

    n_rows = len(lengths)
    # a token's random number is that of its place in the sequence
    uniforms = counter_uniform(seeds[:, None], lengths[:, None] + torch.arange(max_new_tokens, device=device))
    tokens_out = torch.zeros(n_rows, max_new_tokens, dtype=torch.int64, device=device)
    logp_out = torch.zeros(n_rows, max_new_tokens, device=device)
    n_out = torch.full((n_rows,), max_new_tokens, device=device)
    stopped = torch.zeros(n_rows, dtype=torch.bool, device=device)
    rows = torch.arange(n_rows, device=device)  # where each row of the cache writes its output
    logits = model.logits(hidden[ends]).repeat_interleave(n_samples, dim=0)
    for t in range(max_new_tokens):
        tokens, logp = sample_tokens(logits, temperature, uniforms[rows, t])
        tokens_out[rows, t], logp_out[rows, t] = tokens, logp
        just_stopped = (tokens == eos_id) & ~stopped[rows]
        n_out[rows[just_stopped]] = t + 1
        stopped[rows[just_stopped]] = True
        alive = ~stopped[rows]
        n_alive = int(alive.sum())
        if n_alive == 0 or t == max_new_tokens - 1:
            break
        if n_alive <= len(rows) * 7 // 8:
            keep = alive.nonzero().flatten()
            rows, lengths, tokens = rows[keep], lengths[keep], tokens[keep]
            caches = [(k[keep], v[keep]) for k, v in caches]
        logits = model.logits(model.decode(tokens, lengths, caches, longest + t))
        lengths = lengths + 1
    tokens_out, logp_out, n_out, stopped = (x.cpu().numpy() for x in (tokens_out, logp_out, n_out, stopped))
    return [Completion(tokens_out[i, :n].copy(), logp_out[i, :n].copy(), "stop" if stopped[i] else "length")
            for i, n in enumerate(n_out)]


@torch.inference_mode()
def generate_naive(model: Transformer, prompt: list[int], max_new_tokens: int, temperature: float, seed: int,
                   eos_id: int) -> Completion:
    """The oracle: one sequence, the whole forward pass again for every token. Same seed, same tokens."""
    check_request(model, [prompt], max_new_tokens, temperature)
    tokens, logps = list(prompt), []
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = model.logits(model(pack([tokens], model.embed.device))[-1:])
        uniform = counter_uniform(torch.tensor([seed]), torch.tensor([len(tokens)])).to(logits.device)
        token, logp = sample_tokens(logits, temperature, uniform)
        tokens.append(int(token))
        logps.append(float(logp))
        if tokens[-1] == eos_id:
            break
    reason = "stop" if tokens[-1] == eos_id else "length"
    return Completion(np.array(tokens[len(prompt):]), np.array(logps, np.float32), reason)
