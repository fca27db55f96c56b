"""What the tests of rl/ and of the loops share: tiny models, rollouts by hand, a task chance can solve."""
from dataclasses import asdict, dataclass

import numpy as np
import torch

from r1zero.eval.tasks.base import Grade
from r1zero.model.config import preset
from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.advantages import Advantages, Credit, no_kl
from r1zero.rl.family import Algorithm, resolve
from r1zero.rl.losses import LossConfig, loss_weights, policy_loss
from r1zero.rl.rewards import Grader
from r1zero.rl.rollouts import Rollouts
from r1zero.rl.step import Learner
from r1zero.rl.update import Reference, kl_cost_to


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int | None = None,
         **shape) -> Transformer:
    """A tiny model with random weights over the bytes."""
    config = preset("tiny", vocab_size or Tokenizer.bytes().vocab_size, **shape)
    return Transformer(config, dtype).init_weights(seed).to(dtype)


@dataclass(frozen=True)
class Bandit:
    """A task that random weights solve half of the time: to begin with ASCII. It is its own flags, too."""

    name: str = "bandit"

    def make(self):
        return self

    def problem(self, split, index):
        return index

    def problems(self, split, n, start=0):
        return list(range(start, start + n))

    def size(self, split):
        return None  # as many as are asked for

    def prompt(self, problem):
        return f"{problem % 10}:"

    def grade(self, problem, response):
        right = response[:1].isascii()
        return Grade(float(right), response, "It begins with ASCII." if right else "It does not.")


def algorithm(algo: str = "plain", **overrides) -> Algorithm:
    """A preset, some of its options changed: algorithm("grpo", loss=dict(kl_coef=0.5)).

    "plain" is GRPO with a mean over tokens and no KL: the options' own defaults.
    """
    if algo != "plain":
        return resolve(algo, overrides)
    loss = asdict(LossConfig()) | overrides.pop("loss", {})
    return resolve("r1_zero", {"ref_refresh": 0, **overrides, "loss": loss})


def loss_config(algo: str = "plain", **options) -> LossConfig:
    """The loss of a preset, some of its options changed."""
    return algorithm(algo, loss=options).loss


def make_learner(config: Algorithm, policy, optimizer, reference=None, critic=None) -> Learner:
    """A learner without a sampler, for rollouts that exist already. reference: a model, or a Reference."""
    if reference is not None and not isinstance(reference, Reference):
        reference = Reference(reference, policy.device)
    kl_cost = kl_cost_to(reference, config) if config.kl_in_reward else no_kl
    return Learner(policy, optimizer, reference, sampler=None, grader=Grader(config),
                   credit=Credit(config.advantage, policy.device, kl_cost, critic),
                   loss_weights=loss_weights, policy_loss=policy_loss)


def per_token(values_N, rollouts) -> Advantages:
    """One advantage per answer as one per token."""
    return Advantages(np.repeat(np.asarray(values_N, np.float64), rollouts.response_lengths))


def rollouts_by_hand(model, lengths=(5, 3, 9, 1, 4, 6), group_offsets=(0, 2, 5, 6), temperature=1.0,
                     seed=0) -> Rollouts:
    """Random prompts, and responses of these lengths with the end token; sampler_logp is the model's."""
    rng, eos = np.random.default_rng(seed), Tokenizer.bytes().eos_id
    sequences, prompts, logps = [], [], []
    for start, end in zip(group_offsets[:-1], group_offsets[1:], strict=True):
        prompt = rng.integers(0, 256, rng.integers(1, 5))
        for length in lengths[start:end]:
            response = np.append(rng.integers(0, 256, length - 1), eos)
            sequences.append(np.concatenate([prompt, response]))
            prompts.append(len(prompt))
            with torch.no_grad():
                logps.append(naive_logp(model, sequences[-1], len(prompt), temperature)[0].float().numpy())
    texts = [Tokenizer.bytes().decode(s[p:].tolist()) for s, p in zip(sequences, prompts, strict=True)]
    problems = list(range(len(group_offsets) - 1))
    return Rollouts(problems, sequences, np.array(prompts), np.array(group_offsets), logps,
                    ["stop"] * len(texts), texts, temperature, 0)


def naive_logp(model, sequence: np.ndarray, prompt_length: int, temperature: float):
    """(logp [r], entropy [r]) of a response from all logits of this one sequence: the oracle of scoring."""
    logits = model.hidden_states(pack([sequence])) @ model.head.T / temperature
    logp = logits[prompt_length - 1 : -1].log_softmax(-1)
    response = torch.from_numpy(sequence[prompt_length:])
    return logp.gather(1, response[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class Capture:
    """Instead of an optimizer: keeps the gradient of each step and changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups, self.grads = model, [{}], []

    def step(self):
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.grads.append({name: p.grad.clone() for name, p in trained.items()})

    def zero_grad(self):
        for p in self.model.parameters():
            p.grad = None


def assert_same_gradient(found: dict, expected: dict, tolerance: float = 1e-5):
    """Equal up to rounding, measured against the largest entry of the whole gradient."""
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name
