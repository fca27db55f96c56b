"""A GRPO step of ours against TRL's `GRPOTrainer`: same model, prompts, rewards and sizes, in one process.

    pip install -e ".[trl]"                 the peer; without it ours is measured alone
    python -m benchmarks.vs_trl             about two minutes
    python -m benchmarks.vs_trl --rounds 15 --out vs_trl.json

What both do: sample 16 answers to each of 16 prompts of 8 tokens, grade them, normalise the rewards within
each group, and take one AdamW step on the token-mean clipped loss, with the gradient clipped to 1. Both work
in fp32, at temperature 1, without KL, on-policy. Both start from the same weights (copied into a Qwen2 of
transformers; the log-probs of the two are compared first) and see the same prompts. The end token lies
outside the model's vocabulary, so every answer has all its tokens, and neither side pays for suppressing it.
Hardly any sample has the mean reward of its group, so next to none can be left out of the update.

What favours TRL: its step is timed without data loader, logging and progress bar, and its generation without
tokenising and decoding, which are timed in ours. It profits from `reuse_memory()` too. Steps of the two
alternate.

Left out: vLLM (no GPU), transformers' continuous batching, torch.compile on either side.
"""
import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import tyro

from r1zero.eval.response import Sample
from r1zero.eval.tasks.base import Grade
from r1zero.model.config import ModelConfig
from r1zero.model.engine.engine import Engine
from r1zero.model.optimizer import OptimConfig
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token
from r1zero.rl.family import make_learner, resolve
from r1zero.rl.update import Reference
from r1zero.train.grpo import timed_step
from r1zero.train.machine import reuse_memory

from .common import finish, show, spread, table
from .qwen2 import qwen2_of, qwen2_shaped

LEARNING_RATE = 1e-4
PEERS = ("trl", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Flags:
    """Measure a GRPO step against TRL's."""

    rounds: int = 9
    """Number of timed steps per side."""
    warmup: int = 2
    """Number of steps per side before the timed ones."""
    prompts: int = 16
    """Number of prompts per step."""
    prompt_tokens: int = 8
    """Number of tokens per prompt."""
    group_size: int = 16
    """Number of answers per prompt."""
    new_tokens: int = 64
    """Number of new tokens per answer."""
    trl_micro: int | None = None
    """Number of answers in one forward and backward pass of TRL. By default all of a step, as in ours."""
    model: ModelConfig = field(default_factory=qwen2_shaped)
    """Shape of the model; by default 0.92 M parameters."""
    out: str | None = None
    """File for the line of JSON."""


# ---- the task: texts are token ids in decimal, so that the tokenizers do next to nothing ----

def mean_token_id(text: str) -> float:
    """The reward of an answer: cheap, and hardly ever the same twice."""
    ids = [int(word) for word in text.split()]
    return sum(ids) / len(ids)


def mean_token_ids(samples: list[Sample]) -> list[float]:
    """The same, as --rewards.plugin wants it."""
    return [mean_token_id(sample.text) for sample in samples]


@dataclass(frozen=True)
class TokenIdTask:
    """Random prompts, each a fixed function of its index."""

    vocab_size: int
    prompt_tokens: int
    name: str = "token ids"

    def problem(self, split: str, index: int) -> tuple[int, ...]:
        rng = np.random.default_rng([index])
        return tuple(rng.integers(self.vocab_size, size=self.prompt_tokens).tolist())

    def problems(self, split: str, n: int, start: int = 0) -> list[tuple[int, ...]]:
        return [self.problem(split, start + i) for i in range(n)]

    def prompt(self, problem: tuple[int, ...]) -> str:
        return " ".join(map(str, problem))

    def grade(self, problem: tuple[int, ...], response: str) -> Grade:
        return Grade(0.0, None, "there is no right answer")


@dataclass(frozen=True)
class TokenIdTokenizer:
    """Token ids in decimal, with spaces between them."""

    eos_ids: tuple[int, ...]
    adds_bos: bool = False

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: list[int], keep_special: bool = False) -> str:
        return " ".join(map(str, ids))


# ---- ours ----

def our_step(flags: Flags):
    """A function that takes the next step and returns (seconds of the step, seconds of generation)."""
    n = flags.prompts * flags.group_size
    optim = OptimConfig(lr=LEARNING_RATE, warmup=0, schedule="constant", weight_decay=0.0)
    config = resolve("r1_zero", dict(
        loss={"mean": "token", "kl_coef": 0.0},  # as TRL has it by default
        rewards={"plugin": "benchmarks.vs_trl:mean_token_ids"},
        steps=1, prompts_per_step=flags.prompts, group_size=flags.group_size, max_new_tokens=flags.new_tokens,
        kl_samples=0, micro_tokens=n * (flags.prompt_tokens + flags.new_tokens), optim=optim))
    # The reference is never asked: there is no KL in the loss, and none for the log.
    model, reference = (Transformer(flags.model).init_weights(0) for _ in range(2))
    task = TokenIdTask(flags.model.vocab_size, flags.prompt_tokens)
    tokenizer = TokenIdTokenizer((flags.model.vocab_size,))
    learner = make_learner(config, model, Reference(reference, model.device), Engine(model, tokenizer))
    n_done = 0

    def step() -> tuple[float, float]:
        nonlocal n_done
        metrics = timed_step(learner, task, config, n_done)
        n_done += 1
        assert metrics["tokens"] == n * flags.new_tokens, "ours generated another number of tokens"
        assert metrics["trained_samples"] >= 0.99 * n, "ours left samples out of the update"
        return metrics["step_s"], metrics["rollout_s"]

    return step


# ---- TRL's ----

def missing() -> list[str]:
    """The packages of the peer that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def qwen2_tokenizer(vocab_size: int):
    """Decimal words to ids; the end token is the first id that the model does not have."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    ids = {**{str(i): i for i in range(vocab_size)}, "<eos>": vocab_size}
    words = Tokenizer(WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>",
                                   unk_token="<eos>")


def trl_micro(flags: Flags) -> int:
    """Number of answers in one pass of TRL."""
    n = flags.prompts * flags.group_size
    return min(flags.trl_micro or n, n)


def trl_trainer(flags: Flags, callbacks: list, folder: str):
    """TRL's trainer with the settings of `our_step`."""
    from datasets import Dataset
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer
    n, n_steps = flags.prompts * flags.group_size, flags.warmup + flags.rounds
    micro = trl_micro(flags)
    task = TokenIdTask(flags.model.vocab_size, flags.prompt_tokens)
    problems = task.problems("train", flags.prompts * n_steps)

    def mean_id(completions, **rest):
        return [mean_token_id(text) for text in completions]

    config = TRLConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=n_steps,
        per_device_train_batch_size=micro, gradient_accumulation_steps=n // micro,
        num_generations=flags.group_size, max_completion_length=flags.new_tokens, temperature=1.0, beta=0.0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, shuffle_dataset=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True)
    return GRPOTrainer(
        model=qwen2_of(Transformer(flags.model).init_weights(0)), reward_funcs=mean_id,
        train_dataset=Dataset.from_list([{"prompt": task.prompt(problem)} for problem in problems]),
        processing_class=qwen2_tokenizer(flags.model.vocab_size), callbacks=callbacks, args=config)


def take_turns_with_trl(flags: Flags, step) -> tuple[list, list]:
    """Let TRL train, and take a step of ours after each of its own.

    Returns the (step, generation) seconds of ours and of TRL.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # fetch nothing; the libraries read it at import
    from transformers import TrainerCallback
    n = flags.prompts * flags.group_size
    ours, theirs = [], []
    generated = {"seconds": 0.0, "tokens": 0}  # of TRL's last step

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **rest):
            theirs.append((time.perf_counter() - self.started, generated["seconds"]))
            assert generated["tokens"] == n * flags.new_tokens, "TRL generated another number of tokens"
            ours.append(step())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(flags, [Turns()], folder)
        model_generate = trainer.model.generate

        def timed_generate(*args, **kwargs):
            started = time.perf_counter()
            result = model_generate(*args, **kwargs)
            generated["seconds"] = time.perf_counter() - started
            generated["tokens"] = (result.shape[1] - flags.prompt_tokens) * result.shape[0]
            return result

        trainer.model.generate = timed_generate
        trainer.train()
    return ours, theirs


# ---- both ----

def results_of(seconds: list[tuple[float, float]], flags: Flags) -> dict:
    """The spread of a side's times, from its (step, generation) seconds."""
    step, generation = np.array(seconds)[flags.warmup:].T
    tokens = flags.prompts * flags.group_size * flags.new_tokens
    return {"step_s": spread(step), "generation_s": spread(generation), "rest_s": spread(step - generation),
            "generated_tokens_per_s": spread(tokens / generation)}


def ratios_of(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], warmup: int) -> dict:
    """TRL's time over ours, step by step."""
    our_step, our_generation = np.array(ours)[warmup:].T
    their_step, their_generation = np.array(theirs)[warmup:].T
    return {"step": spread(their_step / our_step), "generation": spread(their_generation / our_generation),
            "rest": spread((their_step - their_generation) / (our_step - our_generation))}


def main(flags: Flags, find_missing=missing) -> dict:
    reuse_memory()
    n = flags.prompts * flags.group_size
    if n % trl_micro(flags):
        raise ValueError(f"--trl-micro is {flags.trl_micro}, expected a divisor of the {n} answers of a step")
    step, absent = our_step(flags), find_missing()
    ratios = {}
    if absent:
        print(f"missing: {', '.join(absent)}; so ours alone (pip install -e '.[trl]' brings the peer)")
        sides = {"ours": [step() for _ in range(flags.warmup + flags.rounds)]}
    else:
        ours, theirs = take_turns_with_trl(flags, step)
        sides = {"ours": ours, "trl": theirs}
        ratios = ratios_of(ours, theirs, flags.warmup)
    results = {name: results_of(seconds, flags) for name, seconds in sides.items()}

    length = flags.prompt_tokens + flags.new_tokens
    flops = n * length * sum(flops_per_token(flags.model, length, training) for training in (False, True))
    print(f"\nGRPO step: {flags.prompts} prompts of {flags.prompt_tokens} tokens x {flags.group_size} "
          f"answers of {flags.new_tokens} tokens, {count_parameters(flags.model):,} parameters, fp32, "
          f"{torch.get_num_threads()} threads;\nabout {flops / 1e9:.0f} GFLOPs of matrix products; median "
          f"(20 % to 80 % quantile) of {flags.rounds} steps\n")
    rows = [[name, show(found["step_s"]), show(found["generation_s"]), show(found["rest_s"]),
             show(found["generated_tokens_per_s"], digits=0)] for name, found in results.items()]
    if ratios:
        rows.append(["TRL / ours", *[show(ratio, " x") for ratio in ratios.values()], ""])
    table(["", "step, s", "generation, s", "rest, s", "generated tokens/s"], rows)
    return finish("vs_trl", {"flags": {**vars(flags), "model": flags.model.to_dict()}, "missing": absent,
                             "flops": flops, "sides": results, "ratio": ratios}, flags.out, PEERS)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
