"""Rollouts: groups of sampled answers, flat, with all that training needs to know of them.

Samples are stored sorted by group and a group is a slice given by offsets, never found by comparing prompts:
two equal problems in a batch stay two groups. Reward and advantage are no fields of this; nothing here is
overwritten.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..model.engine.engine import Engine
from ..model.engine.requests import group_requests
from ..model.packed import Packed, offsets, pack


@dataclass(frozen=True)
class Rollouts:
    """N sampled answers in G groups."""

    sequences: list[np.ndarray]
    """N arrays of token ids: prompt, then response (its end token included)."""
    prompt_lengths: np.ndarray
    """[N] int64."""
    group_offsets: np.ndarray
    """[G + 1] int64: group g is the samples group_offsets[g] to group_offsets[g + 1]."""
    sampler_logp: list[np.ndarray]
    """N float32 arrays, one log-prob a response token, as sampled."""
    finish_reasons: list[str]
    """"stop" or "length"."""
    texts: list[str]
    """Decoded responses, without the end token."""
    temperature: float
    """What they were sampled at, and what they must be scored at."""
    weights_version: int
    """Optimizer steps behind the weights that made them."""

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[N] int64 response tokens, the end token included."""
        return np.array([len(s) for s in self.sequences]) - self.prompt_lengths

    @cached_property
    def response_offsets(self) -> np.ndarray:
        """[N + 1] int64, where the response tokens of each answer begin among those of all."""
        return np.append(0, np.cumsum(self.response_lengths))


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of the rollouts, laid out for one forward and backward pass."""

    packed: Packed
    """Prompts and responses, each without its last token. A prompt that several samples have comes once,
    before all samples, up to its last token."""
    predictors: torch.Tensor
    """[R] int64: the flat index of the token before each response token, whose hidden state predicts it."""
    targets: torch.Tensor
    """[R] int64: the response tokens; the end token is one of them, or a model never learns to stop."""
    samples: torch.Tensor
    """[n] int64: which samples (index into the rollouts) these are, in the order they lie in the batch."""
    response_offsets: torch.Tensor
    """[n + 1] int32: where the response tokens of each sample begin; the last is R."""
    places: torch.Tensor
    """[R] int64: where each response token stands among those of all the rollouts, one answer after another;
    so a figure of every token is one flat array, and `array[batch.places]` is this batch's."""
    sampler_logp: torch.Tensor
    """[R] float32: log-prob of each response token as it was sampled."""


def sample_groups(
    engine: Engine,
    prompts: list[str],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seeds: torch.Tensor,
) -> Rollouts:
    """Sample `group_size` answers to each prompt; the samples of one prompt are one group.

    seeds: [len(prompts) * group_size] int64. Raises ValueError as the engine does.
    """
    tokenizer = engine.tokenizer
    ids = tokenizer.encode_batch(prompts)
    completions = engine.generate(
        group_requests(ids, group_size, max_new_tokens, temperature, seeds, (tokenizer.eos_id,))
    )
    repeated = [ids[n // group_size] for n in range(len(completions))]
    return Rollouts(
        sequences=[
            np.concatenate([p, c.tokens]) for p, c in zip(repeated, completions, strict=True)
        ],
        prompt_lengths=np.array([len(p) for p in repeated]),
        group_offsets=np.arange(len(prompts) + 1) * group_size,
        sampler_logp=[c.logp for c in completions],
        finish_reasons=[c.finish_reason for c in completions],
        texts=[tokenizer.decode(c.tokens.tolist()) for c in completions],
        temperature=temperature,
        weights_version=engine.version,
    )


def micro_batch(rollouts: Rollouts, samples: np.ndarray, device) -> MicroBatch:
    """Lay out the given samples, without their last tokens, which predict nothing."""
    prompts, responses = rollouts.prompt_lengths[samples], rollouts.response_lengths[samples]
    # the last token of a prompt is each sample's own: it predicts the first of the response
    begins = [rollouts.sequences[n][: p - 1] for n, p in zip(samples, prompts, strict=True)]
    places = {}
    prefix_of = np.array([places.setdefault(begin.tobytes(), len(places)) for begin in begins])
    if len(places) == len(samples):
        prefixes, skipped, after = [], 0 * prompts, None
    else:
        prefixes, skipped = (
            [begins[i] for i in np.unique(prefix_of, return_index=True)[1]],
            prompts - 1,
        )
        after = np.append(np.full(len(prefixes), -1), prefix_of)
    packed = pack(
        [
            *prefixes,
            *(rollouts.sequences[n][skip:-1] for n, skip in zip(samples, skipped, strict=True)),
        ],
        device,
        after,
    )
    starts = packed.cu_seqlens[len(prefixes) : -1].cpu().numpy().astype(np.int64)
    predictors = np.concatenate(
        [
            start + p - 1 + np.arange(r)
            for start, p, r in zip(starts, prompts - skipped, responses, strict=True)
        ]
    )
    places = np.concatenate(
        [
            start + np.arange(r)
            for start, r in zip(rollouts.response_offsets[samples], responses, strict=True)
        ]
    )
    predictors, places = (torch.from_numpy(x).to(device) for x in (predictors, places))
    response_offsets = torch.from_numpy(offsets(responses)).to(device)
    sampler_logp = torch.from_numpy(np.concatenate([rollouts.sampler_logp[n] for n in samples])).to(
        device
    )
    targets = np.concatenate(
        [rollouts.sequences[n][p:] for n, p in zip(samples, prompts, strict=True)]
    )
    targets = torch.from_numpy(targets).to(device)
    return MicroBatch(
        packed,
        predictors,
        targets,
        torch.from_numpy(samples).to(device),
        response_offsets,
        places,
        sampler_logp,
    )


def micro_batches(
    rollouts: Rollouts, samples: np.ndarray, tokens_per_batch: int, device
) -> list[MicroBatch]:
    """Cut samples into batches of at most `tokens_per_batch` tokens (but at least one sample), alike in
    length; a prompt counts for each of its samples.

    Sorted by length, since the plain PyTorch attention pads within a batch; the loss's weights make the cut
    irrelevant.
    """
    lengths = np.array([len(s) for s in rollouts.sequences])
    batches, current, total = [], [], 0
    for n in samples[np.argsort(lengths[samples], kind="stable")]:
        if current and total + lengths[n] > tokens_per_batch:
            batches.append(current)
            current, total = [], 0
        current.append(n)
        total += lengths[n]
    if current:
        batches.append(current)
    return [micro_batch(rollouts, np.array(batch), device) for batch in batches]


def response_logprobs(
    model, batch: MicroBatch, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp [R], entropy [R]) of the response tokens under the model, at the temperature that they were
    sampled at."""
    return model.logprobs(model(batch.packed), batch.targets, temperature, rows=batch.predictors)


def samples_of(rollouts: Rollouts, groups: np.ndarray) -> np.ndarray:
    """The samples of the named groups, in their order."""
    return np.concatenate(
        [np.arange(0), *(np.arange(*rollouts.group_offsets[g : g + 2]) for g in groups)]
    )


def merge(parts: list[Rollouts], groups: list[np.ndarray]) -> Rollouts:
    """One Rollouts of the named groups of each part, in their order."""
    samples = [samples_of(p, chosen) for p, chosen in zip(parts, groups, strict=True)]
    sizes = [np.diff(p.group_offsets)[chosen] for p, chosen in zip(parts, groups, strict=True)]

    def picked(name: str) -> list:
        return [getattr(p, name)[n] for p, some in zip(parts, samples, strict=True) for n in some]

    return Rollouts(
        picked("sequences"),
        np.array(picked("prompt_lengths")),
        np.append(0, np.cumsum(np.concatenate(sizes))),
        picked("sampler_logp"),
        picked("finish_reasons"),
        picked("texts"),
        parts[0].temperature,
        parts[0].weights_version,
    )
