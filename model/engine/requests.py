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

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np

from ..transformer import Transformer

INT64_MAX = 2**63 - 1


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


def group_requests(
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    max_new_tokens: int,
    temperature: float,
    seeds,
    stop_ids: tuple[int, ...],
) -> list[Request]:
    """`n_samples` requests for each prompt, those of prompt p from p * n_samples on; seeds: one a request.

    Raises ValueError for seeds of another length.
    """
    if n_samples < 1:
        raise ValueError(f"generate: n_samples is {n_samples}; expected at least 1")
    if len(seeds) != len(prompts) * n_samples:
        raise ValueError(
            f"generate: got {len(seeds)} seeds for {len(prompts)} prompts x {n_samples} "
            f"samples; expected {len(prompts) * n_samples}"
        )
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    return [
        Request(prompts[i // n_samples], max_new_tokens, seed, temperature, stop_ids=stop_ids)
        for i, seed in enumerate(seeds)
    ]


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
            raise ValueError(
                f"generate: temperature, top_p, min_p are {numbers_given}; expected numbers"
            )
        if not whole(r.max_new_tokens, 1, INT64_MAX) or not (
            r.temperature == 0 or 1e-6 <= r.temperature < math.inf
        ):
            raise ValueError(
                f"generate: max_new_tokens is {r.max_new_tokens} and temperature {r.temperature}"
                "; expected a whole number of 1 or more, and 0 or a number of 1e-6 or more"
            )
        if not whole(r.seed, -INT64_MAX - 1, 2 * INT64_MAX + 1):
            raise ValueError(f"generate: seed is {r.seed!r}; expected an integer of 64 bits")
        if not whole(r.top_k, 0, INT64_MAX) or not 0 < r.top_p <= 1 or not 0 <= r.min_p <= 1:
            raise ValueError(
                f"generate: top_k is {r.top_k}, top_p {r.top_p}, min_p {r.min_p}; expected a "
                "whole number of 0 or more, above 0 to 1, 0 to 1"
            )
        if not whole(r.top_logprobs, 0, c.vocab_size):
            raise ValueError(
                f"generate: top_logprobs is {r.top_logprobs}; expected a whole number from 0 to "
                f"the model's vocab_size {c.vocab_size}"
            )
        if not isinstance(r.stop_ids, list | tuple) or not all(
            whole(x, -INT64_MAX - 1, INT64_MAX) for x in r.stop_ids
        ):
            raise ValueError(
                f"generate: stop_ids is {r.stop_ids}; expected a list or tuple of token ids"
            )
        if len(r.prompt) + r.max_new_tokens > c.max_seq_len:
            raise ValueError(
                f"generate: a prompt of {len(r.prompt)} tokens and max_new_tokens "
                f"{r.max_new_tokens} pass the model's max_seq_len {c.max_seq_len}; ask for "
                "fewer new tokens or shorten the prompt"
            )
        if not isinstance(r.stop, list | tuple) or not all(isinstance(x, str) for x in r.stop):
            raise ValueError(f"generate: stop is {r.stop!r}; expected a list or tuple of texts")
        if r.stop and (tokenizer is None or not all(r.stop)):
            raise ValueError(
                "generate: stop texts need a tokenizer, and none of them may be empty; give the "
                "engine one, or use stop_ids"
            )


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    try:
        ids = [index(prompt[i]) for i in range(len(prompt))]
    except TypeError as error:
        raise ValueError(
            "generate: a prompt is no sequence of whole numbers; expected token ids"
        ) from error
    if len(ids) == 0:
        raise ValueError("generate: a prompt is empty; every prompt needs at least one token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = max(ids) if max(ids) >= vocab_size else min(ids)
        raise ValueError(
            f"generate: a prompt holds token id {wrong}, but the model's vocab_size is "
            f"{vocab_size}; is this the tokenizer that it was trained with?"
        )
