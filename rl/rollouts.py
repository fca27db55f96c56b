"""Rollouts: groups of sampled answers, flat, with everything that training needs to know of them.

Samples are stored sorted by group, and a group is a slice given by offsets, never found by
comparing prompts: two equal problems in a batch stay two groups. Rewards and advantages are not
stored here, and nothing here is ever overwritten.

A `MicroBatch` is some of the samples, laid out for one forward and backward pass. It carries
everything that their loss needs, one number per response token.

Shapes: N samples, G groups, R response tokens, T tokens of a batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..eval.response import Sample, response_text
from ..model.chat_template import encode_prompts
from ..model.engine.engine import Engine
from ..model.engine.requests import group_requests
from ..model.engine.sampling import sample_seeds
from ..model.packed import Packed, offsets, pack
from ..model.routes import Routing


@dataclass(frozen=True)
class Rollouts:
    """N sampled answers in G groups."""

    problems: list
    """G problems, one per group."""
    sequences: list[np.ndarray]
    """N arrays of token ids: prompt, then response (its end token included)."""
    prompt_lengths: np.ndarray
    """[N] int64."""
    group_offsets: np.ndarray
    """[G + 1] int64: group g is the samples group_offsets[g] to group_offsets[g + 1]."""
    sampler_logp: list[np.ndarray]
    """N float32 arrays: one log-prob per response token, as it was sampled."""
    finish_reasons: list[str]
    """"stop" or "length"."""
    texts: list[str]
    """Decoded responses, without the end token; other special tokens are spelled."""
    temperature: float
    """The temperature that they were sampled at, and must be scored at."""
    weights_version: int
    """The number of optimizer steps behind the weights that made them."""
    routes: list[np.ndarray] | None = None
    """N arrays [tokens - 1, L, K]: the experts that the answer's tokens went through, prompt
    included (model/routes.py). None of a dense model, or where the engine keeps none."""
    replaced: "Rollouts | None" = None
    """Groups that dynamic sampling has replaced: for the log alone, nothing trains on them."""

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[N] int64: response tokens per answer, the end token included."""
        return np.array([len(s) for s in self.sequences]) - self.prompt_lengths

    @cached_property
    def response_offsets(self) -> np.ndarray:
        """[N + 1] int64: where each answer's response tokens begin among those of all answers."""
        return np.append(0, np.cumsum(self.response_lengths))

    def samples(self) -> list[Sample]:
        """N samples, as graders and rewards take them: their tokens are copies, as plain lists."""
        group_of = np.repeat(np.arange(len(self.problems)), np.diff(self.group_offsets))
        return [
            Sample(self.problems[group], text, sequence[start:].tolist(), reason)
            for group, text, sequence, start, reason in zip(
                group_of,
                self.texts,
                self.sequences,
                self.prompt_lengths,
                self.finish_reasons,
                strict=True,
            )
        ]


def sample_groups(
    engine: Engine,
    prompts: list[str],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seeds: torch.Tensor,
    problems: list | None = None,
    chat: bool = False,
) -> Rollouts:
    """Sample `group_size` answers to each prompt; the samples of one prompt are one group.

    seeds: [len(prompts) * group_size] int64; problems: one per prompt; chat: put each prompt
    through the model's chat template. Raises ValueError as `encode_prompt` and the engine do.
    """
    tokenizer = engine.tokenizer
    prompt_ids = encode_prompts(tokenizer, prompts, chat)
    requests = group_requests(
        prompt_ids, group_size, max_new_tokens, temperature, seeds, tokenizer.eos_ids
    )
    completions = engine.generate(requests)
    prompt_of = [prompt_ids[n // group_size] for n in range(len(completions))]
    routes = [completion.routes for completion in completions]
    return Rollouts(
        problems=list(problems or prompts),
        sequences=[
            np.concatenate([prompt, completion.tokens])
            for prompt, completion in zip(prompt_of, completions, strict=True)
        ],
        prompt_lengths=np.array([len(prompt) for prompt in prompt_of]),
        group_offsets=np.arange(len(prompts) + 1) * group_size,
        sampler_logp=[completion.logp for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        texts=[response_text(tokenizer, completion.tokens) for completion in completions],
        temperature=temperature,
        weights_version=engine.version,
        routes=None if routes[0] is None else routes,
    )


# ---- which problems are answered in a step ----


class GroupSampler:
    """Samples a group of answers to each of the next problems."""

    def __init__(self, engine: Engine, chat: bool = False):
        """chat: put each prompt through the model's chat template."""
        self.engine = engine
        self.chat = chat
        self.position = 0
        """The next problem's index; a checkpoint keeps it."""

    def sample(self, task, config, step: int) -> Rollouts:
        """The rollouts of a step, sampled from the trainer's weights as they are now."""
        self.engine.refresh(version=step)
        return self.sample_next(task, config, config.prompts_per_step, step)

    def sample_next(self, task, config, n_prompts: int, *seed_keys: int) -> Rollouts:
        """Groups of answers to the next n_prompts problems; seed_keys: what, beside the run's seed,
        the random numbers are a function of."""
        problems = task.problems("train", n_prompts, start=self.position)
        self.position += n_prompts
        return sample_groups(
            self.engine,
            [task.prompt(problem) for problem in problems],
            config.group_size,
            config.max_new_tokens,
            config.temperature,
            sample_seeds(n_prompts * config.group_size, config.seed, *seed_keys),
            problems,
            self.chat,
        )


class DynamicSampler(GroupSampler):
    """Replaces groups without signal by groups of new problems (after DAPO, arXiv 2503.14476,
    eq. 11), as long as the step has problems left: config.dynamic_sampling times prompts_per_step.
    """

    def __init__(self, engine: Engine, grader: Callable, chat: bool = False):
        super().__init__(engine, chat)
        self.grader = grader

    def sample(self, task, config, step: int) -> Rollouts:
        rounds = [super().sample(task, config, step)]
        live = [self.live_groups(task, rounds[0])]
        left = (config.dynamic_sampling - 1) * config.prompts_per_step
        while True:
            missing = config.prompts_per_step - sum(len(groups) for groups in live)
            wanted = min(left, missing)
            if wanted <= 0:
                break
            # Random numbers of its own for each round.
            rounds.append(self.sample_next(task, config, wanted, step, len(rounds)))
            live.append(self.live_groups(task, rounds[-1]))
            left -= wanted
        if sum(len(groups) for groups in live) == 0:
            # No group has a signal: keep the first round, for a step that changes nothing.
            live[0] = np.arange(len(rounds[0].problems))
        others = [
            np.setdiff1d(np.arange(len(part.problems)), kept)
            for part, kept in zip(rounds, live, strict=True)
        ]
        replaced = merge(rounds, others) if any(map(len, others)) else None
        return dataclasses.replace(merge(rounds, live), replaced=replaced)

    def live_groups(self, task, rollouts: Rollouts) -> np.ndarray:
        """The indices of the groups whose rewards differ."""
        rewards = self.grader(task, rollouts)
        return np.flatnonzero(~rewards.dead(rollouts))


def samples_of(rollouts: Rollouts, groups: np.ndarray) -> np.ndarray:
    """The indices of the samples of the given groups, in their order."""
    per_group = [np.arange(*rollouts.group_offsets[g : g + 2]) for g in groups]
    return np.concatenate([np.arange(0), *per_group])


def merge(parts: list[Rollouts], groups: list[np.ndarray]) -> Rollouts:
    """One Rollouts of the given groups of each part, in their order."""
    samples = [samples_of(part, chosen) for part, chosen in zip(parts, groups, strict=True)]
    sizes = [
        np.diff(part.group_offsets)[chosen] for part, chosen in zip(parts, groups, strict=True)
    ]

    def picked(name: str, indices: list[np.ndarray]) -> list:
        return [
            getattr(part, name)[i]
            for part, chosen in zip(parts, indices, strict=True)
            for i in chosen
        ]

    return Rollouts(
        problems=picked("problems", groups),
        sequences=picked("sequences", samples),
        prompt_lengths=np.array(picked("prompt_lengths", samples)),
        group_offsets=np.append(0, np.cumsum(np.concatenate(sizes))),
        sampler_logp=picked("sampler_logp", samples),
        finish_reasons=picked("finish_reasons", samples),
        texts=picked("texts", samples),
        temperature=parts[0].temperature,
        weights_version=parts[0].weights_version,
        routes=None if parts[0].routes is None else picked("routes", samples),
    )


# ---- what one forward and backward pass takes ----


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of the rollouts, with everything that their loss needs."""

    packed: Packed
    """Prompts and responses, each without its last token. A prompt that several samples share comes
    once, before all samples, up to its last token."""
    predictors: torch.Tensor
    """[R] int64: the flat index of the token before each response token; its hidden state predicts
    that response token."""
    targets: torch.Tensor
    """[R] int64: the response tokens. The end token is one of them, or a model never learns to
    stop."""
    samples: torch.Tensor
    """[n] int64: which samples of the rollouts these are, in the order of the batch."""
    response_offsets: torch.Tensor
    """[n + 1] int32: where the response tokens of each sample begin; the last is R."""
    token_index: torch.Tensor
    """[R] int64: the index of each response token among those of all rollouts, so that
    `array[batch.token_index]` is this batch's part of an array of all response tokens."""
    sampler_logp: torch.Tensor
    """[R] float32: the log-prob of each response token as it was sampled."""
    routes: torch.Tensor | None = None
    """[T, L, K]: the experts of each packed token as it was sampled. None: nothing is replayed."""
    advantages: torch.Tensor | None = None
    """[R] float32."""
    weights: torch.Tensor | None = None
    """[R] float32: the weight of each token in the mean over the whole global batch."""
    old_logp: torch.Tensor | None = None
    """[R]: log-probs under the policy before the first update. None with a single update per step:
    they are then this pass's own, and the ratio is 1."""
    ref_logp: torch.Tensor | None = None
    """[R]: log-probs under the reference. None where the loss has no KL."""

    def replay(self) -> Routing | None:
        """For a pass of the policy or of its reference: the routers take the experts that the
        engine's took. So equal weights have equal log-probs. A critic chooses its own."""
        return None if self.routes is None else Routing(self.routes)


def micro_batch(rollouts: Rollouts, samples: np.ndarray, device) -> MicroBatch:
    """Lay out the given samples, without their last tokens, which predict nothing."""
    prompt_lengths = rollouts.prompt_lengths[samples]
    response_lengths = rollouts.response_lengths[samples]
    sequences = [rollouts.sequences[n] for n in samples]

    # What is shared comes once; behind it, each sample has the rest of its own.
    prefix_of, first_with = shared_prefixes(rollouts, samples)
    if len(first_with) == len(samples):  # nothing to share
        first_with, skipped, after = first_with[:0], np.zeros_like(prompt_lengths), None
    else:
        skipped = prompt_lengths - 1
        # Which sequence each one continues, as pack() wants it: -1 for a prefix, which begins.
        after = np.append(np.full(len(first_with), -1), prefix_of)
    shared = [sequences[i][: prompt_lengths[i] - 1] for i in first_with]
    own = [seq[skip:-1] for seq, skip in zip(sequences, skipped, strict=True)]
    packed = pack([*shared, *own], device, after)
    routes_TLK = None
    if rollouts.routes is not None:
        # In the same order; a sequence without its last token has as many routes as tokens.
        routes = [rollouts.routes[n] for n in samples]
        of_shared = [routes[i][: prompt_lengths[i] - 1] for i in first_with]
        of_own = [array[skip:] for array, skip in zip(routes, skipped, strict=True)]
        routes_TLK = torch.from_numpy(np.concatenate([*of_shared, *of_own])).to(device)

    # Where each sample's own tokens begin in the flat batch, behind the shared prefixes. The last
    # token of its prompt predicts the first of the response, and so on.
    lengths = [len(seq) for seq in (*shared, *own)]
    starts = offsets(lengths)[len(shared) : -1].astype(np.int64)
    first_predictors = starts + prompt_lengths - skipped - 1
    predictors = ranges(first_predictors, response_lengths)
    token_index = ranges(rollouts.response_offsets[samples], response_lengths)
    targets = [seq[p:] for seq, p in zip(sequences, prompt_lengths, strict=True)]
    sampler_logp = [rollouts.sampler_logp[n] for n in samples]

    def on_device(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(device)

    return MicroBatch(
        packed=packed,
        predictors=on_device(predictors),
        targets=on_device(np.concatenate(targets)),
        samples=on_device(samples),
        response_offsets=on_device(offsets(response_lengths)),
        token_index=on_device(token_index),
        sampler_logp=on_device(np.concatenate(sampler_logp)),
        routes=routes_TLK,
    )


def shared_prefixes(rollouts: Rollouts, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(prefix_of [n], first_with [P]): the number of each sample's prefix, and the first sample, by
    its index in the batch, that has each of the P different ones.

    The samples of a group share their prompt, up to its last token: that one is each sample's own,
    since it predicts the first token of the response. What is shared has the same routes, too.
    """
    index_of: dict[tuple, int] = {}
    prefix_of = []
    for n in samples:
        end = rollouts.prompt_lengths[n] - 1
        key = [rollouts.sequences[n][:end].tobytes()]
        if rollouts.routes is not None:
            key.append(rollouts.routes[n][:end].tobytes())
        prefix_of.append(index_of.setdefault(tuple(key), len(index_of)))
    first_with = np.unique(prefix_of, return_index=True)[1]
    return np.array(prefix_of), first_with


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[sum of lengths] int64: start, start + 1, ... for each pair of a start and a length."""
    return np.concatenate([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)])


def micro_batches(
    rollouts: Rollouts, samples: np.ndarray, tokens_per_batch: int, device
) -> list[MicroBatch]:
    """Cut samples into batches of at most `tokens_per_batch` tokens (but at least one sample).

    A prompt counts for each of its samples. Samples are sorted by length, since the plain PyTorch
    attention pads within a batch; the loss's weights make the cut irrelevant.
    """
    lengths = np.array([len(s) for s in rollouts.sequences])
    cut = cut_by_length(lengths, samples, tokens_per_batch)
    return [micro_batch(rollouts, chosen, device) for chosen in cut]


def cut_by_length(
    lengths: np.ndarray, samples: np.ndarray, tokens_per_batch: int
) -> list[np.ndarray]:
    """Samples, by their indices, sorted by length and cut into batches of at most so many tokens,
    but at least one sample. lengths: the tokens of every sample there is."""
    cut, current, total = [], [], 0
    for n in samples[np.argsort(lengths[samples], kind="stable")]:
        if current and total + lengths[n] > tokens_per_batch:
            cut.append(np.array(current))
            current, total = [], 0
        current.append(n)
        total += lengths[n]
    if current:
        cut.append(np.array(current))
    return cut


def response_logprobs(
    model, batch: MicroBatch, temperature: float, routing: Routing | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp [R], entropy [R]) of the response tokens under the model, at the temperature that they
    were sampled at. routing: `batch.replay()` to take the experts of sampling."""
    hidden = model.hidden_states(batch.packed, routing)
    return model.logprobs(hidden, batch.targets, temperature, rows=batch.predictors)


@torch.no_grad()
def over_all_tokens(function: Callable, rollouts: Rollouts, tokens_per_batch: int, device):
    """[R of all rollouts]: function(batch) [R of the batch], in the order of the rollouts."""
    everyone = np.arange(len(rollouts.texts))
    batches = micro_batches(rollouts, everyone, tokens_per_batch, device)
    n_tokens = int(rollouts.response_offsets[-1])
    whole = torch.zeros(n_tokens)
    for batch in batches:
        values = function(batch)
        whole = whole.to(values.device, values.dtype)
        whole[batch.token_index] = values
    return whole
