"""Train a transformer with a value head: what reward models and process rewards share.

What they do not share is an `Objective`: the loss of some items of the data, and how well the head
does on the items held out. An item is a ranking of answers, or an answer with its steps; a prompt's
items are all trained on or all held out.

Data from several files is mixed by weight, as in `r1zero sft` (mixture.py).

The checkpoint at the end is the reward model; it is known by the name of its loop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..eval.tasks.base import is_held_out
from ..model.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_model,
    load_tensors,
)
from ..model.config import ModelConfig
from ..model.loss_scale import LossScaler
from ..model.optimizer import OptimConfig, learning_rate, make_optimizer, optimizer_step
from ..model.precision import Precision, choose_precision
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from ..rl.heads import ValueHead
from ..rl.rollouts import cut_by_length
from .batches import shuffled
from .compute_flags import ComputeFlags
from .inputs import base_parts, file_parts
from .machine import pick_device
from .mixture import MixedOrder, parse_sources, parts_of, weights_input
from .run import Run, RunConfig, at_least


@dataclass(frozen=True, kw_only=True)
class HeadConfig(ComputeFlags, RunConfig):
    """The flags of the loop."""

    PATHS: ClassVar[tuple[str, ...]] = ("base", "data")
    FREE: ClassVar[tuple[str, ...]] = ("skip_bad",)

    base: str
    """Folder of the run, checkpoint or Hugging Face model to start from."""
    skip_bad: bool = False
    """Go on without the lines of the data that are bad, and say how many there are."""
    held_out: float = 0.1
    """Share of the prompts that are not trained on, but measured on."""
    micro_tokens: int = 8192
    """Maximum number of tokens per forward and backward pass. It changes memory and speed, nothing
    else."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, warmup=5, weight_decay=0.0)
    )
    seed: int = 0
    """Seed of the order of the data, and of the noise where there is some."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ComputeFlags.__post_init__(self)
        at_least(self, 1, "micro_tokens")
        at_least(self, 0, "seed")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out}, expected a share between 0 and 1")


class Objective(Protocol):
    """What a head learns."""

    def loss(self, model, items: list) -> tuple[torch.Tensor, np.ndarray]:
        """(the sum of the losses of these items, how far each agrees with its label)."""

    def count(self, items: list) -> float:
        """What that sum is divided by, over a whole step."""

    def begin(self, model) -> None:
        """Called before the first step of those that are left, if there is one."""

    def finish(self, model) -> None:
        """Called after the last step, before the checkpoint."""

    def held_out(self, model) -> dict[str, float]:
        """Metrics on what is held out."""


# ---- which items, in which order ----


def on_test_side(prompt: str, share: float) -> bool:
    """Whether the items of this prompt are held out."""
    return is_held_out(("ranking", prompt), share)


def split_by_prompt(prompts: list[str], items: list, share: float, what: str) -> tuple[list, list]:
    """(to train on, held out): a prompt's text decides, so all items of a prompt stay together.

    Raises ValueError if a side is left empty. what: what the items are, for the message.
    """
    sides: tuple[list, list] = ([], [])
    for prompt, item in zip(prompts, items, strict=True):
        sides[on_test_side(prompt, share)].append(item)
    if not sides[0] or not sides[1]:
        raise ValueError(
            f"of {len(items)} {what} {len(sides[1])} are held out by --held-out {share:g}; "
            f"expected one at least to train on and one to measure on: give more {what}, or "
            "another share"
        )
    return sides


class ItemBatches:
    """Items, shuffled again every epoch; batch(i) is a fixed function of (seed, i).

    Epochs follow each other without a seam, as in TokenStream (batches.py). order: from an epoch to
    the numbers of its items, as MixedOrder gives them; None takes each item once.
    """

    def __init__(self, items: list, per_step: int, seed: int, order: Callable | None = None):
        self.items, self.per_step = items, per_step
        self.order_of = lru_cache(maxsize=2)(order or partial(shuffled, len(items), seed))
        self.n_per_epoch = len(self.order_of(0))

    def batch(self, index: int) -> list:
        """Batch `index` (0, 1, ...) of the endless sequence of epochs."""
        found = []
        for i in range(index * self.per_step, (index + 1) * self.per_step):
            epoch, i_in_epoch = divmod(i, self.n_per_epoch)
            found.append(self.items[self.order_of(epoch)[i_in_epoch]])
        return found


def mixed_order(config, prompts: Sequence[Sequence[str]]) -> MixedOrder | None:
    """The order in which the items that are trained on are mixed; None without any weight.

    prompts: of the items of each file of --data. Raises ValueError for a file whose items are all
    held out.
    """
    sources = parse_sources(config.data)
    parts = parts_of(sources)
    if parts is None:
        return None
    sizes = [sum(not on_test_side(each, config.held_out) for each in file) for file in prompts]
    for source, size in zip(sources, sizes, strict=True):
        if size == 0:
            raise ValueError(
                f"--data {source.path} has no line to train on, since --held-out "
                f"{config.held_out:g} holds all of its prompts out; give it more prompts, or leave "
                "it out"
            )
    return MixedOrder(sizes, parts, config.seed)


def split_into_batches(
    config, prompts: Sequence[Sequence[str]], items: list, per_step: int, what: str
) -> tuple[ItemBatches, list, list]:
    """(batches of what is trained on, all of that, what is held out), mixed by the weights of
    --data.

    prompts: of the items of each file, in the order of the items; what: what these are, for
    messages. Raises ValueError as `split_by_prompt` and `mixed_order` do.
    """
    all_prompts = [prompt for file in prompts for prompt in file]
    trained, held_out = split_by_prompt(all_prompts, items, config.held_out, what)
    order = mixed_order(config, prompts)
    return ItemBatches(trained, per_step, config.seed, order), trained, held_out


def micro_items(items: list, micro_tokens: int) -> list[list]:
    """The items in batches of at most so many tokens, but at least one item; none is cut."""
    lengths = np.array([item.n_tokens for item in items])
    cut = cut_by_length(lengths, np.arange(len(items)), micro_tokens)
    return [[items[i] for i in chosen] for chosen in cut]


# ---- the loop ----


def read_files(config, read: Callable) -> list[Sequence]:
    """What `read` finds in each file of --data."""
    return [read(source.path, config.skip_bad) for source in parse_sources(config.data)]


def open_base(config, what: str) -> tuple[Run, Transformer, Tokenizer]:
    """(the run, the base that its head is put on, the tokenizer). what: the loop's name, for
    people.

    Raises ValueError for a base or data that are not those of a run that is resumed.
    """
    device = pick_device(config.device)
    precision = config.precision(device)
    run = Run(config, what)
    trunk, tokenizer, base = load_model(config.base, device, precision=precision)
    trunk.recomputes = config.recompute
    sources = parse_sources(config.data)
    run.check_inputs(
        {
            "base": base_parts(base, tokenizer),
            "data": file_parts([Path(source.path) for source in sources]),
            "data weights": weights_input(sources),
        }
    )
    run.check_model(trunk, tokenizer)
    return run, trunk, tokenizer


def train_step(
    model: ValueHead,
    optimizer,
    items: list,
    lr: float,
    config: HeadConfig,
    scaler: LossScaler,
    objective: Objective,
) -> dict:
    """One optimizer step on a batch of items; returns the metrics to log."""
    losses, agreed = [], []
    n = objective.count(items)
    for part in micro_items(items, config.micro_tokens):
        loss, agreed_P = objective.loss(model, part)
        loss = loss / n
        scaler.scale(loss).backward()
        losses.append(float(loss.detach()))
        agreed.append(agreed_P)
    norm = optimizer_step(model, optimizer, lr, config.optim, scaler)
    accuracy = float(np.concatenate(agreed).mean())
    return {"loss": sum(losses), "accuracy": accuracy, "gradient_norm": norm}


def fit_head(
    run: Run,
    model: ValueHead,
    tokenizer: Tokenizer,
    batches: ItemBatches,
    config: HeadConfig,
    objective: Objective,
) -> None:
    """Train for the steps that `run` has left.

    Raises FloatingPointError for a loss or gradient that is not finite.
    """
    optimizer = make_optimizer(model, config.optim)
    scaler = LossScaler.of(model.trunk)
    scaler.load(run.restore(model, tokenizer, optimizer))
    if run.first_step < config.steps:
        objective.begin(model)
    n_tokens, started = 0, time.perf_counter()
    for step in run.steps():
        items = batches.batch(step)
        lr = learning_rate(step, run.schedule_steps, config.optim)
        metrics = train_step(model, optimizer, items, lr, config, scaler, objective)
        run.check_finite(step, model, loss=metrics["loss"], gradient_norm=metrics["gradient_norm"])
        step_tokens = sum(item.n_tokens for item in items)
        n_tokens += step_tokens
        metrics |= {
            "lr": lr,
            "tokens": step_tokens,
            "tokens_per_s": n_tokens / (time.perf_counter() - started),
            **scaler.metrics(),
        }
        if step + 1 == config.steps:
            objective.finish(model)
        run.done(step, metrics, scaler.counters())
        is_due = run.due(step, config.save_every)
        if is_due:
            metrics |= objective.held_out(model)
        run.log(step, metrics, show=("loss", "accuracy"))
        if is_due:
            run.save(step)


def load_head(
    folder: str,
    loop: str,
    head_class: type[ValueHead],
    device: torch.device,
    precision: Precision | None = None,
) -> tuple[Any, Tokenizer, Checkpoint]:
    """(the head that a run of this loop has left, its tokenizer, its checkpoint).

    precision: what it computes in; None is the device's own choice. Raises CheckpointError if there
    is none.
    """
    checkpoint = load_checkpoint(folder, groups=("model",))
    path, state = checkpoint.path, checkpoint.state
    if state.get("loop") != loop:
        raise CheckpointError(
            f"{path} holds no {loop.replace('-', ' ')}; give a folder that r1zero {loop} wrote"
        )
    precision = precision or choose_precision("auto", False, device)
    shape = ModelConfig(**state["model_config"])
    model = head_class(Transformer(shape, precision.dtype, precision.fp32_head))
    load_tensors(model, checkpoint.tensors["model"], path)
    return model.to(device), Tokenizer.from_dict(state["tokenizer"]), checkpoint
