"""What is asked of the engine and what comes back, and the checks of a request."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch

from ..transformer import Transformer

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LEAST_TEMPERATURE = 1e-6  # but for 0: logits divided by less may overflow


@dataclass(frozen=True)
class Request:
    """One continuation that is asked for."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    seed: int = 0
    """Any 64-bit integer, signed or unsigned; with the prompt it decides every token."""
    temperature: float = 1.0
    """Logits are divided by it; 1e-6 or more. 0 takes the likeliest token."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from the tokens at least this many times as likely as the likeliest one."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one that ends it is its last token."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; the one that ends it is no part of its text."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each position."""

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Completion:
    """The answer to one request; n tokens."""

    tokens: np.ndarray
    """[n] int64, with the stop token, if one was reached."""
    logp: np.ndarray
    """[n] float32, log-prob (nats) under the distribution sampled from; 0 at temperature 0."""
    finish_reason: str
    """"stop" (a stop token or text), "length" (max_new_tokens) or "cancelled"."""
    weights_version: int = 0
    """Which weights made it, see Engine.refresh."""
    text: str | None = None
    """The text before the stop text, for requests that have stop texts."""
    top_ids: np.ndarray | None = None
    """[n, top_logprobs] int64, the likeliest tokens first, if asked for."""
    top_logp: np.ndarray | None = None
    """[n, top_logprobs] float32, their log-probs."""
    routes: np.ndarray | None = None
    """[prompt tokens + n - 1, L, K], the experts of all tokens that were read (the last one was
    not), of a mixture of experts whose engine keeps them; see model/routes.py."""


@dataclass(frozen=True)
class Event:
    """One more token of a streamed request."""

    id: int
    """What `cancel` takes."""
    index: int
    """Which of the requests given to `stream`."""
    tokens: list[int]
    """The new tokens: several if other callers stepped the engine in between, none if cancelled."""
    text: str
    """What became readable: half characters and what may begin a stop text wait."""
    completion: Completion | None
    """The whole answer, with the last event."""


def group_requests(
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    max_new_tokens: int,
    temperature: float,
    seeds: torch.Tensor | Sequence[int],
    stop_ids: tuple[int, ...],
) -> list[Request]:
    """`n_samples` requests per prompt; those of prompt p are at p * n_samples and behind.

    seeds: one per request. Raises ValueError for another number of seeds, and for n_samples below
    1.
    """
    if n_samples < 1:
        raise ValueError(f"generate: n_samples is {n_samples}; expected at least 1")
    n_requests = len(prompts) * n_samples
    if len(seeds) != n_requests:
        raise ValueError(
            f"generate: got {len(seeds)} seeds for {len(prompts)} prompts x {n_samples} "
            f"samples; expected {n_requests}"
        )
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    return [
        Request(prompts[i // n_samples], max_new_tokens, seed, temperature, stop_ids=stop_ids)
        for i, seed in enumerate(seeds)
    ]


# ---- checks: a request that nobody could serve is refused, before it ends others, too ----


def check_requests(model: Transformer, requests: Sequence[Request], tokenizer=None) -> None:
    """Raises ValueError for no requests, and for one that cannot be served."""
    if not requests:
        raise ValueError("generate: got 0 prompts; expected at least one request")
    config = model.config
    seen: set[int] = set()  # prompts by identity: the samples of a group share theirs
    for request in requests:
        if id(request.prompt) not in seen:
            seen.add(id(request.prompt))
            _check_prompt(request.prompt, config.vocab_size)
        _check_sampling(request)
        _check_top_logprobs(request, config.head_rows)
        _check_stop_ids(request)
        _check_length(request, config.max_seq_len)
        _check_stop_texts(request, tokenizer)


def is_whole(x, least: int, most: int) -> bool:
    """Is x an integer (NumPy's count, too) from `least` to `most`?"""
    return isinstance(x, numbers.Integral) and least <= x <= most


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


def _check_sampling(r: Request) -> None:
    reals = (r.temperature, r.top_p, r.min_p)
    if not all(isinstance(x, numbers.Real) for x in reals):
        raise ValueError(f"generate: temperature, top_p, min_p are {reals}; expected numbers")
    temperature_fits = r.temperature == 0 or LEAST_TEMPERATURE <= r.temperature < math.inf
    if not is_whole(r.max_new_tokens, 1, INT64_MAX) or not temperature_fits:
        raise ValueError(
            f"generate: max_new_tokens is {r.max_new_tokens} and temperature {r.temperature}"
            "; expected a whole number of 1 or more, and 0 or a number of 1e-6 or more"
        )
    if not is_whole(r.seed, INT64_MIN, 2 * INT64_MAX + 1):
        raise ValueError(f"generate: seed is {r.seed!r}; expected an integer of 64 bits")
    if not is_whole(r.top_k, 0, INT64_MAX) or not 0 < r.top_p <= 1 or not 0 <= r.min_p <= 1:
        raise ValueError(
            f"generate: top_k is {r.top_k}, top_p {r.top_p}, min_p {r.min_p}; expected a "
            "whole number of 0 or more, above 0 to 1, 0 to 1"
        )


def _check_top_logprobs(r: Request, head_rows: int) -> None:
    if not is_whole(r.top_logprobs, 0, head_rows):
        raise ValueError(
            f"generate: top_logprobs is {r.top_logprobs}; expected a whole number from 0 to "
            f"the {head_rows} tokens that the model's head has"
        )


def _check_stop_ids(r: Request) -> None:
    is_list = isinstance(r.stop_ids, list | tuple)
    if not is_list or not all(is_whole(x, INT64_MIN, INT64_MAX) for x in r.stop_ids):
        raise ValueError(
            f"generate: stop_ids is {r.stop_ids}; expected a list or tuple of token ids"
        )


def _check_length(r: Request, max_seq_len: int) -> None:
    if len(r.prompt) + r.max_new_tokens > max_seq_len:
        raise ValueError(
            f"generate: a prompt of {len(r.prompt)} tokens and max_new_tokens "
            f"{r.max_new_tokens} pass the model's max_seq_len {max_seq_len}; ask for "
            "fewer new tokens or shorten the prompt"
        )


def _check_stop_texts(r: Request, tokenizer) -> None:
    if not isinstance(r.stop, list | tuple) or not all(isinstance(x, str) for x in r.stop):
        raise ValueError(f"generate: stop is {r.stop!r}; expected a list or tuple of texts")
    if r.stop and (tokenizer is None or not all(r.stop)):
        raise ValueError(
            "generate: stop texts need a tokenizer, and none of them may be empty; give the "
            "engine one, or use stop_ids"
        )
