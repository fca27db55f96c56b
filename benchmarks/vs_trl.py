"""A GRPO step of ours against TRL's `GRPOTrainer`: same model, prompts, rewards and sizes, in one process.

    pip install -e ".[trl]"                 the peer; without it ours is measured alone
    python -m benchmarks.vs_trl             about two minutes
    python -m benchmarks.vs_trl --rounds 15 --out vs_trl.json

What both do: sample 16 answers to each of 16 prompts of 8 tokens, grade them, normalise the rewards within
each group, one AdamW step on the token-mean clipped loss, gradient clipped to 1; fp32, temperature 1, no KL,
on-policy. Both start from the same weights (copied into a Qwen2 of transformers; the log-probs of the two are
compared first) and see the same prompts. The end token lies outside the model's vocabulary, so every answer
has all its tokens and no side pays for suppressing it. Hardly a sample has the mean reward of its group, so
next to none can be left out of the update.

What favours TRL: its step is timed without data loader, logging and progress bar, and its generation without
tokenising and decoding, which are in ours; and it profits from `reuse_memory()`. Steps of the two take turns.

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

from r1zero.eval.tasks.base import Grade
from r1zero.model.config import ModelConfig
from r1zero.model.engine.engine import Engine
from r1zero.model.optimizer import OptimConfig
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token
from r1zero.rl.family import make_learner, resolve
from r1zero.train.grpo import timed_step
from r1zero.train.machine import reuse_memory

from .common import finish, show, spread, table

LEARNING_RATE = 1e-4
PEERS = ("trl", "transformers", "accelerate", "datasets", "tokenizers")


def qwen2_shaped() -> ModelConfig:
    """0.92 M parameters in the shape of Qwen2."""
    return ModelConfig(vocab_size=1024, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32,
                       d_ff=384, rope_theta=1e6, qkv_bias=True, tie_embeddings=True, max_seq_len=512)


@dataclass(frozen=True)
class Flags:
    """A GRPO step against TRL's."""

    rounds: int = 9
    """Timed steps of each side."""
    warmup: int = 2
    """Steps of each side before them."""
    prompts: int = 16
    """Prompts in a step."""
    prompt_tokens: int = 8
    """Tokens of a prompt."""
    group_size: int = 16
    """Answers to each."""
    new_tokens: int = 64
    """Tokens of an answer."""
    trl_micro: int | None = None
    """Answers in one forward and backward pass of TRL's. By default all, as in ours."""
    model: ModelConfig = field(default_factory=qwen2_shaped)
    out: str | None = None
    """File for the line of JSON."""


# ---- the work: texts are token ids in decimal, so that the tokenizers do next to nothing ----

def reward_of(text: str, vocab_size: int) -> float:
    """The mean token id of an answer, from 0 to 1: cheap, and hardly ever the same twice."""
    ids = [int(word) for word in text.split()]
    return sum(ids) / (len(ids) * vocab_size)


@dataclass(frozen=True)
class TokenIdTask:
    """Random prompts, a fixed function of their index."""

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
        return Grade(reward_of(response, self.vocab_size), None, "the mean token id")


@dataclass(frozen=True)
class TokenIdTokenizer:
    eos_ids: tuple[int, ...]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


# ---- ours ----

def our_step(f: Flags):
    """A function that does the next step and returns (seconds of the step, seconds of the rollout)."""
    optim = OptimConfig(lr=LEARNING_RATE, warmup=0, schedule="constant", weight_decay=0.0)
    config = resolve("r1_zero", dict(
        steps=1, prompts_per_step=f.prompts, group_size=f.group_size, max_new_tokens=f.new_tokens, kl_samples=0,
        micro_tokens=f.prompts * f.group_size * (f.prompt_tokens + f.new_tokens), optim=optim))
    model, reference = (Transformer(f.model).init_weights(0) for _ in range(2))
    task, tokenizer = TokenIdTask(f.model.vocab_size, f.prompt_tokens), TokenIdTokenizer((f.model.vocab_size,))
    learner, n_done = make_learner(config, model, reference, Engine(model, tokenizer)), 0

    def step() -> tuple[float, float]:
        nonlocal n_done
        # the reference is never asked: no KL in the loss, and none for the log
        metrics = timed_step(learner, task, config, n_done)
        n_done += 1
        n = f.prompts * f.group_size
        assert metrics["tokens"] == n * f.new_tokens, "ours generated another number of tokens"
        assert metrics["trained_samples"] >= 0.99 * n, "ours left samples out of the update"
        return metrics["step_s"], metrics["rollout_s"]

    return step


# ---- TRL's ----

def missing() -> list[str]:
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def qwen2_of(model: Transformer):
    """The same function as `model`, as a Qwen2ForCausalLM. Raises RuntimeError if their log-probs differ."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = model.config
    peer = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    weights = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm,
               "lm_head.weight": model.head}
    for i, block in enumerate(model.blocks):
        heads = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        attn, mlp = block.attn, block.mlp
        for name, w, b in zip("qkv", attn.qkv.weight.split(heads), attn.qkv.bias.split(heads), strict=True):
            weights[f"model.layers.{i}.self_attn.{name}_proj.weight"] = w
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = b
        gate, up = mlp.gate_up.weight.chunk(2)
        weights |= {f"model.layers.{i}.{name}.weight": w for name, w in {
            "self_attn.o_proj": attn.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": mlp.down.weight,
            "input_layernorm": block.attn_norm, "post_attention_layernorm": block.mlp_norm}.items()}
    peer.load_state_dict(weights)
    rows = torch.randint(c.vocab_size, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.hidden_states(pack(list(rows[:, :-1].numpy())))
        ours, _ = model.logprobs(hidden, rows[:, 1:].flatten())
        logits = peer(rows[:, :-1]).logits.flatten(0, 1)
        theirs = -torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none")
    gap = float((ours - theirs).abs().max())
    if not gap < 1e-3:
        raise RuntimeError(f"ours and transformers' Qwen2 differ by {gap} in log-prob: this version of "
                           "transformers means something else by the same weights")
    return peer


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


def trl_micro(f: Flags) -> int:
    n = f.prompts * f.group_size
    return min(f.trl_micro or n, n)


def take_turns_with_trl(f: Flags, step) -> tuple[list, list]:
    """Let TRL train, and do a step of ours after each of its own. Returns both sides' (step, generation)
    seconds."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched; read at import
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer
    task = TokenIdTask(f.model.vocab_size, f.prompt_tokens)
    n, n_steps = f.prompts * f.group_size, f.warmup + f.rounds
    ours, theirs, generated = [], [], {"seconds": 0.0, "tokens": 0}

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **rest):
            theirs.append((time.perf_counter() - self.started, generated["seconds"]))
            assert generated["tokens"] == n * f.new_tokens, "TRL generated another number of tokens"
            ours.append(step())

    def mean_id(completions, **rest):
        return [reward_of(text, f.model.vocab_size) for text in completions]

    prompts = [{"prompt": task.prompt(p)} for p in task.problems("train", f.prompts * n_steps)]
    micro = trl_micro(f)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=qwen2_of(Transformer(f.model).init_weights(0)), reward_funcs=mean_id,
            train_dataset=Dataset.from_list(prompts), processing_class=qwen2_tokenizer(f.model.vocab_size),
            callbacks=[Turns()],
            args=TRLConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=n_steps,
                per_device_train_batch_size=micro, gradient_accumulation_steps=n // micro,
                num_generations=f.group_size, max_completion_length=f.new_tokens, temperature=1.0, beta=0.0,
                learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
                max_grad_norm=1.0, shuffle_dataset=False, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True))
        model_generate = trainer.model.generate

        def timed_generate(*args, **kwargs):
            started = time.perf_counter()
            result = model_generate(*args, **kwargs)
            generated["seconds"] = time.perf_counter() - started
            generated["tokens"] = (result.shape[1] - f.prompt_tokens) * result.shape[0]
            return result

        trainer.model.generate = timed_generate
        trainer.train()
    return ours, theirs


# ---- the whole ----

def figures_of(pairs: list[tuple[float, float]], f: Flags) -> dict:
    step, generation = np.array(pairs)[f.warmup:].T
    tokens = f.prompts * f.group_size * f.new_tokens
    return {"step_s": spread(step), "generation_s": spread(generation), "rest_s": spread(step - generation),
            "generated_tokens_per_s": spread(tokens / generation)}


def main(f: Flags) -> dict:
    reuse_memory()
    n = f.prompts * f.group_size
    if n % trl_micro(f):
        raise ValueError(f"--trl-micro is {f.trl_micro}, expected a divisor of the {n} answers of a step")
    step, absent = our_step(f), missing()
    if absent:
        print(f"missing: {', '.join(absent)}; so ours alone (pip install -e '.[trl]' brings the peer)")
        sides = {"ours": [step() for _ in range(f.warmup + f.rounds)]}
    else:
        sides = dict(zip(("ours", "trl"), take_turns_with_trl(f, step), strict=True))
    figures = {name: figures_of(pairs, f) for name, pairs in sides.items()}
    ratios = {}
    if "trl" in sides:
        ours, theirs = (np.array(sides[name])[f.warmup:] for name in ("ours", "trl"))
        ratios = {"step": spread(theirs[:, 0] / ours[:, 0]), "generation": spread(theirs[:, 1] / ours[:, 1]),
                  "rest": spread((theirs[:, 0] - theirs[:, 1]) / (ours[:, 0] - ours[:, 1]))}

    length = f.prompt_tokens + f.new_tokens
    flops = n * length * sum(flops_per_token(f.model, length, training) for training in (False, True))
    print(f"\nGRPO step: {f.prompts} prompts of {f.prompt_tokens} tokens x {f.group_size} answers of "
          f"{f.new_tokens} tokens, {count_parameters(f.model):,} parameters, fp32, {torch.get_num_threads()} "
          f"threads;\nabout {flops / 1e9:.0f} GFLOPs of matrix products; median (20 % to 80 % quantile) of "
          f"{f.rounds} steps\n")
    table(["", "step, s", "generation, s", "rest, s", "generated tokens/s"],
          [[name, show(x["step_s"]), show(x["generation_s"]), show(x["rest_s"]),
            show(x["generated_tokens_per_s"], digits=0)] for name, x in figures.items()]
          + ([["TRL / ours", *[show(ratios[part], " x") for part in ("step", "generation", "rest")], ""]]
             if ratios else []))
    return finish("vs_trl", {"flags": {**vars(f), "model": f.model.to_dict()}, "missing": absent,
                             "flops": flops, "sides": figures, "ratio": ratios}, f.out, PEERS)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
