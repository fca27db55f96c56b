"""What is asked of a model and what comes back, how a token is drawn and read, and the naive oracle.

Randomness is counter-based: the number that picks a token is a function of (the request's seed, the place of
the token in its sequence). So a request's tokens depend neither on what else is in the batch nor on the order
(up to rounding of the matrix products, which changes with their shapes at the 1e-6 level, and of the draw). A
draw inverts the cumulative distribution in the order of the vocabulary, and each token comes with its
log-prob under the distribution that it was drawn from: temperature, top-k, top-p and min-p included.

`generate_naive` recomputes everything for every token: slow, short, and what model/engine.py is held against.

Left out: penalties for repetition, beam search, log-prob biases: training must score what was sampled.

Shapes: B rows, V vocabulary.
"""
import codecs
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels import cpu, cpu_decode
from .packed import pack
from .transformer import Transformer

INT64_MAX = 2**63 - 1
BLOCK = 32  # tokens that are added up before the cumulative sum: it is then a 32nd as long


class NonFiniteError(RuntimeError):
    """A NaN or infinity where a number was due; the message names the tensor and the place."""


@dataclass(frozen=True)
class Request:
    """One continuation that is asked for."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    seed: int = 0
    """Any 64-bit integer, with a sign or without; with the prompt it decides every draw."""
    temperature: float = 1.0
    """0 takes the likeliest token; else 1e-6 or more."""
    top_k: int = 0
    """Draw from the k likeliest only; 0 is all."""
    top_p: float = 1.0
    """Draw from the likeliest that together reach this probability only."""
    min_p: float = 0.0
    """Draw from those at least this many times as likely as the likeliest only."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end it, themselves included in it."""
    stop: tuple[str, ...] = ()
    """Texts that end it."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each place."""

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Completion:
    """What came of it."""

    tokens: np.ndarray
    """[n] int64, a stop token included if it was reached."""
    logp: np.ndarray
    """[n] float32, log-prob of each token under the distribution sampled from (0 at temperature 0)."""
    finish_reason: str
    """"stop" (a stop token or text), "length" (max_new_tokens) or "cancelled"."""
    weights_version: int = 0
    """Which weights made it, see Engine.refresh."""
    text: str | None = None
    """Up to the stop text, for requests that have stop texts."""
    top_ids: np.ndarray | None = None
    """[n, top_logprobs] int64, the likeliest tokens first, where asked for."""
    top_logp: np.ndarray | None = None
    """[n, top_logprobs] float32."""


@dataclass(frozen=True)
class Event:
    """One more token of a streamed request."""

    id: int
    """What `cancel` takes."""
    index: int
    """Which of the requests given to `stream`."""
    tokens: list[int]
    """The new ones: several where others stepped the engine in between, none where it was cancelled."""
    text: str
    """What became readable: half characters and what may begin a stop text wait."""
    completion: Completion | None
    """The whole, with the last event."""


def group_requests(prompts: Sequence[Sequence[int]], n_samples: int, max_new_tokens: int, temperature: float,
                   seeds, eos_id: int) -> list[Request]:
    """`n_samples` requests for each prompt, those of prompt p from p * n_samples on; seeds: one a request.

    Raises ValueError for seeds of another length.
    """
    if n_samples < 1:
        raise ValueError(f"generate: n_samples is {n_samples}; expected at least 1")
    if len(seeds) != len(prompts) * n_samples:
        raise ValueError(f"generate: got {len(seeds)} seeds for {len(prompts)} prompts x {n_samples} "
                         f"samples; expected {len(prompts) * n_samples}")
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    return [Request(prompts[i // n_samples], max_new_tokens, seed, temperature, stop_ids=(eos_id,))
            for i, seed in enumerate(seeds)]


# ---- random numbers ----

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


# ---- a draw ----

def keep_likeliest(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
                   min_p: torch.Tensor) -> torch.Tensor:
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


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row [B] at which the cumulative sum of probs [B, V] first passes uniforms [B].

    First the block of tokens, then the token in it; a token of probability 0 is never drawn.
    """
    zero = probs.new_zeros(())
    if probs.shape[1] % BLOCK:
        probs = F.pad(probs, (0, -probs.shape[1] % BLOCK))
    blocks = probs.view(len(probs), -1, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    # float32 rounding may lift the threshold to the total itself: then the last token of any probability
    threshold = torch.minimum(uniforms.float() * ends[:, -1], torch.nextafter(ends[:, -1], zero))[:, None]
    block = torch.searchsorted(ends, threshold, right=True)
    before = ends.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    rest = torch.minimum(threshold - before, torch.nextafter(inner[:, -1:], zero))
    return (block * BLOCK + torch.searchsorted(inner, rest, right=True))[:, 0]


def check_finite(finite: torch.Tensor, temperature) -> None:
    if not finite.all():
        raise NonFiniteError(f"logits at temperature {temperature} are NaN or infinite in "
                             f"{int((~finite).sum())} of {len(finite)} rows while sampling")


def sample_tokens(logits: torch.Tensor, temperature: float | torch.Tensor, uniforms: torch.Tensor,
                  filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None, top_n: int = 0):
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
    if greedy is None and temperature != 0 and filters is None and not top_n and cpu.serves(None, logits):
        tokens, logp = cpu_decode.draw(logits, uniforms)
        check_finite(tokens >= 0, name)
        return tokens, logp
    check_finite(torch.isfinite(logits.sum(-1)), name)
    if not isinstance(temperature, torch.Tensor) and temperature == 0:
        tokens, logp = logits.argmax(-1), logits.new_zeros(len(logits))
        return (tokens, logp, *_likeliest(logits.log_softmax(-1), top_n)) if top_n else (tokens, logp)
    if filters is not None:
        top_k, top_p, min_p = filters
        if greedy is not None:
            top_k, top_p, min_p = (top_k.masked_fill(greedy, 0), top_p.masked_fill(greedy, 1),
                                   min_p.masked_fill(greedy, 0))
        logits = keep_likeliest(logits, top_k, top_p, min_p)
    probs = torch.softmax(logits, -1)
    tokens = draw(probs, uniforms)
    logp = probs.gather(1, tokens[:, None])[:, 0].log()
    if greedy is not None:
        tokens, logp = torch.where(greedy, logits.argmax(-1), tokens), logp.masked_fill(greedy, 0.0)
    return (tokens, logp, *_likeliest(logits.log_softmax(-1), top_n)) if top_n else (tokens, logp)


def _likeliest(logp: torch.Tensor, n: int):
    values, ids = logp.topk(min(n, logp.shape[-1]), -1)
    return ids, values


# ---- tokens to text ----

class TextStream:
    """Token by token to text, cut at the first stop text."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.shown, self.held = "", ""

    def feed(self, token: int | None) -> str:
        """What can be shown now; None ends the text."""
        piece = b"" if token is None else self.tokenizer.token_bytes(token)
        self.held += self.decoder.decode(piece, final=token is None)
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found and not self.stopped:
            self.held, self.stopped = self.held[: min(found)], True
        waits = 0
        if token is not None and not self.stopped:
            beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
            waits = max((len(part) for part in beginnings if self.held.endswith(part)), default=0)
        new, self.held = self.held[: len(self.held) - waits], self.held[len(self.held) - waits:]
        self.shown += new
        if self.stopped:
            self.decoder.reset()
        return new


# ---- what can be asked ----

def whole(x, least: int, most: int) -> bool:
    """Is it an integer (numpy's too) of that range?"""
    return isinstance(x, numbers.Integral) and least <= x <= most


def check_requests(model: Transformer, requests: Sequence[Request], tokenizer=None) -> None:
    """Raises ValueError for a request that nobody could serve: later it would end others, too."""
    if not requests:
        raise ValueError("generate: got 0 prompts; expected at least one request")
    c, seen = model.config, set()
    for r in requests:
        if id(r.prompt) not in seen:  # the samples of a group share their prompt
            seen.add(id(r.prompt))
            _check_prompt(r.prompt, c.vocab_size)
        numbers_given = (r.temperature, r.top_p, r.min_p)
        if not all(isinstance(x, numbers.Real) for x in numbers_given):
            raise ValueError(f"generate: temperature, top_p, min_p are {numbers_given}; expected numbers")
        if not whole(r.max_new_tokens, 1, INT64_MAX) or not (
                r.temperature == 0 or 1e-6 <= r.temperature < math.inf):
            raise ValueError(f"generate: max_new_tokens is {r.max_new_tokens} and temperature {r.temperature}"
                             "; expected a whole number of 1 or more, and 0 or a number of 1e-6 or more")
        if not whole(r.seed, -INT64_MAX - 1, 2 * INT64_MAX + 1):
            raise ValueError(f"generate: seed is {r.seed!r}; expected an integer of 64 bits")
        if not whole(r.top_k, 0, INT64_MAX) or not 0 < r.top_p <= 1 or not 0 <= r.min_p <= 1:
            raise ValueError(f"generate: top_k is {r.top_k}, top_p {r.top_p}, min_p {r.min_p}; expected a "
                             "whole number of 0 or more, above 0 to 1, 0 to 1")
        if not whole(r.top_logprobs, 0, c.vocab_size):
            raise ValueError(f"generate: top_logprobs is {r.top_logprobs}; expected a whole number from 0 to "
                             f"the model's vocab_size {c.vocab_size}")
        if not isinstance(r.stop_ids, list | tuple) or not all(
                whole(x, -INT64_MAX - 1, INT64_MAX) for x in r.stop_ids):
            raise ValueError(f"generate: stop_ids is {r.stop_ids}; expected a list or tuple of token ids")
        if len(r.prompt) + r.max_new_tokens > c.max_seq_len:
            raise ValueError(f"generate: a prompt of {len(r.prompt)} tokens and max_new_tokens "
                             f"{r.max_new_tokens} pass the model's max_seq_len {c.max_seq_len}; ask for "
                             "fewer new tokens or shorten the prompt")
        if not isinstance(r.stop, list | tuple) or not all(isinstance(x, str) for x in r.stop):
            raise ValueError(f"generate: stop is {r.stop!r}; expected a list or tuple of texts")
        if r.stop and (tokenizer is None or not all(r.stop)):
            raise ValueError("generate: stop texts need a tokenizer, and none of them may be empty; give the "
                             "engine one, or use stop_ids")


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    try:
        ids = [index(prompt[i]) for i in range(len(prompt))]
    except TypeError as error:
        raise ValueError("generate: a prompt is no sequence of whole numbers; expected token ids") from error
    if len(ids) == 0:
        raise ValueError("generate: a prompt is empty; every prompt needs at least one token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = max(ids) if max(ids) >= vocab_size else min(ids)
        raise ValueError(f"generate: a prompt holds token id {wrong}, but the model's vocab_size is "
                         f"{vocab_size}; is this the tokenizer that it was trained with?")


@torch.inference_mode()
def generate_naive(model: Transformer, prompt: list[int], max_new_tokens: int, temperature: float, seed: int,
                   eos_id: int, **options) -> Completion:
    """The oracle: one sequence, the whole forward pass again for every token. Same seed, same tokens.

    options: top_k, top_p and min_p, as in Request. Stop texts and top_logprobs are left to the engine:
    ValueError.
    """
    r = Request(prompt, max_new_tokens, seed, temperature, stop_ids=(eos_id,), **options)
    check_requests(model, [r])
    if r.top_logprobs:
        raise ValueError(f"generate_naive: top_logprobs is {r.top_logprobs}; only the engine reports them")
    tokens, logps = list(prompt), []
    filters = tuple(torch.tensor([x], device=model.embed.device) for x in (r.top_k, r.top_p, r.min_p)) \
        if r.filtered else None
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = model.logits(model(pack([tokens], model.embed.device))[-1:])
        uniform = counter_uniform(torch.tensor([signed(seed)]), torch.tensor([len(tokens)])).to(logits.device)
        token, logp = sample_tokens(logits, temperature, uniform, filters)
        tokens.append(int(token))
        logps.append(float(logp))
        if tokens[-1] == eos_id:
            break
    reason = "stop" if tokens[-1] == eos_id else "length"
    return Completion(np.array(tokens[len(prompt):]), np.array(logps, np.float32), reason)
