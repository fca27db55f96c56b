"""The flags --lora.*: low-rank adapters instead of all weights, for the loops that train a base.

What an adapter is, is in model/lora.py. Here is what a run makes of the flags: its default learning
rate, its model, and what a checkpoint must say to be loaded again.
"""

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..eval.console import say
from ..model.checkpoint import KEPT_BASE, Checkpoint, CheckpointError
from ..model.files import new_folder
from ..model.lora import LEARNING_RATE_FACTOR, LoRAConfig, add_adapters, cast_frozen
from ..model.optimizer import OptimConfig
from ..model.transformer import Transformer
from .inputs import Inputs


def value_in(words: list[str], flag: str, default: str) -> str:
    """The value that a flag has on the command line."""
    value = default
    for word, following in zip(words, [*words, default][1:], strict=True):
        name, equals, text = word.partition("=")
        if name == flag:
            value = text if equals else following
    return value


def default_rate(words: list[str], rate: float) -> float:
    """The default learning rate: with adapters on the command line, a larger one."""
    return rate if value_in(words, "--lora.rank", "0") == "0" else LEARNING_RATE_FACTOR * rate


def default_optim(words: list[str], optim: OptimConfig) -> OptimConfig:
    """The optimizer's defaults, with `default_rate`."""
    return replace(optim, lr=default_rate(words, optim.lr))


def check_rank(then: dict, now: dict, where: Path) -> None:
    """Raise CheckpointError if a run with adapters is resumed without them, or the other way round.

    then, now: the settings of the checkpoint at `where`, and those of now.
    """
    before, after = (settings.get("lora", {"rank": 0}) for settings in (then, now))
    if before["rank"] and not after["rank"]:
        usual = asdict(LoRAConfig())
        flags = [f"--lora.{name} {value}" for name, value in before.items() if value != usual[name]]
        words = " ".join(flags).replace("--lora.rslora True", "--lora.rslora")
        raise CheckpointError(f"{where} is of a run with LoRA; add the flags of its start: {words}")
    if after["rank"] and not before["rank"]:
        raise CheckpointError(
            f"{where} is of a run that trains all weights; leave out --lora.rank, or begin another "
            f"run with it (--base {where.parent.parent})"
        )


def loading_device(lora: LoRAConfig, device: torch.device) -> torch.device:
    """Where a base is loaded: with adapters on the CPU, until its fp32 weights are cast."""
    return torch.device("cpu") if lora.rank else device


def keep_base(run: Path, base: Path) -> None:
    """Link the checkpoint that adapters are for into the folder of their run, if it is one of a
    run, which may remove it. (Where no link can be made, it is copied.)"""
    kept = run / KEPT_BASE / base.name
    if not (base / "state.json").exists() or kept.exists():
        return
    with new_folder(kept) as unfinished:
        for name in ("model.safetensors", "state.json"):
            try:
                os.link(base / name, unfinished / name)
            except OSError:
                shutil.copyfile(base / name, unfinished / name)


def adapt(
    model: Transformer, lora: LoRAConfig, seed: int, base: Checkpoint, inputs: Inputs
) -> dict:
    """Freeze the model and give it adapters, if --lora.rank is not 0.

    The tensors of `base` are gone then. Returns what to add to the state of a checkpoint, which
    holds the adapters alone: {"lora": ...}, or nothing. inputs: of the run, with an input "base".
    """
    if lora.rank == 0:
        return {}
    base.tensors.clear()  # they may be the fp32 weights that are cast now
    cast_frozen(add_adapters(model, lora, seed))
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    say(
        f"LoRA of rank {lora.rank}: {n_trained:,} parameters beside {n_frozen:,} that are frozen; "
        "checkpoints hold the adapters alone, and need the base where it is"
    )
    kept = {
        "config": asdict(lora),
        "base": str(base.path.resolve()),
        "base_weights": dict(inputs["base"])["weights"],
    }
    return {"lora": kept}
