"""What the tests of rl/ and of the loops share: tiny models, rollouts by hand, a task chance can solve."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from r1zero.eval.tasks.base import Grade
from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.config import preset
from r1zero.model.optimizer import OptimConfig
from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.family import from_preset
from r1zero.rl.losses import LossConfig
from r1zero.rl.rollouts import Rollouts
from r1zero.train.batches import DocumentBatches
from r1zero.train.grpo import GRPOConfig
from r1zero.train.pretrain import PretrainConfig

SENTENCE = "the cat sat on the mat and the dog sat on the log. "
QUICK = Countdown(n_numbers=2, high=9)  # the default takes half a second to list its problems
TIMES = {"tokens_per_s", "rollout_s", "step_s", "rollout_tokens_per_s", "update_s", "update_tokens_per_s",
         "replaced_s", "memory_gb"}  # what may differ between equal runs


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int | None = None) -> Transformer:
    """A tiny model with random weights over the bytes."""
    config = preset("tiny", vocab_size or Tokenizer.bytes().vocab_size)
    return Transformer(config, dtype).init_weights(seed).to(dtype)


def save_base(folder: Path, seed: int = 0) -> Path:
    """A run folder that holds a tiny model with random weights, to start sft and grpo from."""
    model = tiny(seed)
    state = {"model_config": model.config.to_dict(), "tokenizer": Tokenizer.bytes().to_dict(), "settings": {}}
    save_checkpoint(folder, 0, {"model": dict(model.named_parameters())}, state)
    return folder


def text_file(folder: Path, text: str = SENTENCE * 40) -> str:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def pretrain_config(run, data: str, **changes) -> PretrainConfig:
    """Eight short steps of pretraining on a text file."""
    optim = OptimConfig(lr=1e-2, warmup=2, schedule="constant")
    common = dict(tokenizer="bytes", model="tiny", seq_len=16, batch_tokens=64, micro_tokens=32, steps=8,
                  save_every=3, optim=optim, task=QUICK, device="cpu")
    return PretrainConfig(run=str(run), data=(data,), **{**common, **changes})


def few_documents(n_prompt: int = 0) -> DocumentBatches:
    """Five documents of random bytes as one batch; n_prompt: tokens of each that are prompt."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n) for n in (9, 4, 17, 6, 12)]
    return DocumentBatches(texts, 200, 64, 0, [n_prompt] * 5 if n_prompt else None)


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


def grpo_config(run, base, **changes) -> GRPOConfig:
    """Five short steps of GRPO on the bandit."""
    optim = OptimConfig(lr=3e-3, warmup=0, schedule="constant", weight_decay=0.0)
    common = dict(task=Bandit(), prompts_per_step=4, group_size=4, max_new_tokens=3, steps=5, save_every=2,
                  optim=optim, micro_tokens=40, device="cpu")
    return GRPOConfig(run=str(run), base=str(base), **{**common, **changes})


def loss_config(algo: str = "r1_zero", **dials) -> LossConfig:
    """The dials of a preset, some of them changed."""
    return from_preset(algo, "loss", LossConfig(**dials))


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
    return Rollouts(sequences, np.array(prompts), np.array(group_offsets), logps, ["stop"] * len(texts),
                    texts, temperature, 0)


def naive_logp(model, sequence: np.ndarray, prompt_length: int, temperature: float):
    """(logp [r], entropy [r]) of a response from all logits of this one sequence: the oracle of scoring."""
    logits = model(pack([sequence])) @ model.head.T / temperature
    logp = logits[prompt_length - 1 : -1].log_softmax(-1)
    response = torch.from_numpy(sequence[prompt_length:])
    return logp.gather(1, response[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class Capture:
    """In the place of an optimizer: keeps the gradient of each step and changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups, self.grads = model, [{}], []

    def step(self):
        self.grads.append({name: p.grad.clone() for name, p in self.model.named_parameters()})

    def zero_grad(self):
        for p in self.model.parameters():
            p.grad = None


def assert_same_gradient(found: dict, expected: dict, tolerance: float = 1e-5):
    """Equal up to rounding, measured against the largest entry of the whole gradient."""
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name
