"""What the tests of the loops share: a run folder to start from, short runs on a text and on the bandit."""
from dataclasses import asdict
from pathlib import Path

import numpy as np

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import save_checkpoint, tensors_of
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.rl.losses import LossConfig
from r1zero.train.batches import DocumentBatches
from r1zero.train.grpo import GRPOConfig
from r1zero.train.grpo import grpo_config as complete_config
from r1zero.train.pretrain import PretrainConfig

from ..rl.cases import Bandit, tiny

SENTENCE = "the cat sat on the mat and the dog sat on the log. "
QUICK = Countdown(n_numbers=2, high=9)  # the default takes half a second to list its problems
TIMES = {"tokens_per_s", "rollout_s", "step_s", "rollout_tokens_per_s", "update_s", "update_tokens_per_s",
         "replaced_s", "keep_s", "memory_gb"}  # what may differ between equal runs


def save_base(folder: Path, seed: int = 0, **shape) -> Path:
    """A run folder that holds a tiny model with random weights, to start sft and grpo from."""
    model = tiny(seed, **shape)
    state = {"model_config": model.config.to_dict(), "tokenizer": Tokenizer.bytes().to_dict(), "settings": {}}
    save_checkpoint(folder, 0, {"model": tensors_of(model)}, state)
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


def grpo_config(run, base, algo="plain", **changes) -> GRPOConfig:
    """Five short steps of GRPO on the bandit; "plain" has a mean over tokens and no KL."""
    optim = OptimConfig(lr=3e-3, warmup=0, schedule="constant", weight_decay=0.0)
    common = dict(task=Bandit(), prompts_per_step=4, group_size=4, max_new_tokens=3, steps=5, save_every=2,
                  optim=optim, micro_tokens=40, device="cpu")
    if algo == "plain":
        algo = "r1_zero"
        common |= dict(loss=LossConfig(), ref_refresh=0)
        if isinstance(changes.get("loss"), dict):
            changes["loss"] = asdict(LossConfig()) | changes["loss"]
    return complete_config(algo, run=str(run), base=str(base), **{**common, **changes})


def few_documents(n_prompt: int = 0) -> DocumentBatches:
    """Five documents of random bytes as one batch; n_prompt: tokens of each that are prompt."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n) for n in (9, 4, 17, 6, 12)]
    trained = [np.arange(len(text)) >= n_prompt for text in texts]
    return DocumentBatches(texts, 200, 64, 0, trained if n_prompt else None)
