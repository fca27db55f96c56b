"""A run: its folder, its log, its progress bar, and how it stops. It knows nothing of the loops.

    <run>/run.json          config, machine and start: what it takes to make the run again; the same
                            of each time that it was resumed; and the seconds of all of them
    <run>/metrics.jsonl     one JSON object per step; cut back to the checkpoint's step on resume
    <run>/rollouts.jsonl.gz of GRPO: every completion, cut back likewise; see rollout_log.py
    <run>/checkpoints/      see model/checkpoint.py
    <run>/start/            of GRPO: the model that the run began with, which the KL is measured to
    <run>/base/             of a run with adapters: the checkpoint that they are for, if it is one

A folder holds a run from its first checkpoint on. Before that, a corrected command may use it
again.

Ctrl-C, SIGTERM and SIGHUP ask the loop to stop: it finishes its step, saves and raises Stopped
(interrupt.py). If an error ends the loop, the last whole step is saved first.

A resumed run is compared with the one that began: its flags must be equal, and the content of its
inputs (inputs.py). The learning rate keeps the schedule that it began with.

Left out: how fast and on what the run computes (machine.py), and every decision about training.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..eval.console import Bar, say
from ..kernels.dispatch import compiles_first
from ..model.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_config,
    checkpoint_steps,
    load_checkpoint,
    load_tensors,
    mark_best,
    save_checkpoint,
    tensors_of,
)
from ..model.config import ModelConfig
from ..model.files import atomic_write_json
from ..model.huggingface import is_huggingface
from ..model.optimizer import load_optimizer_tensors, optimizer_tensors
from ..model.peft_folder import is_peft
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .adapters import adapt, check_rank, keep_base
from .inputs import Inputs, changes_of
from .interrupt import Interrupt, Stopped
from .lock import FolderLock
from .log import MetricsLog
from .machine import describe_machine, pick_device
from .report.record import finite
from .settings import check_settings, settings_of
from .wandb_log import NoWandb, WandbLog

START = "start"  # folder in the folder of a GRPO run: the model that it began with

# ---- flags ---------------------------------------------------------------------------------------


def at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is NaN or below `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:  # NaN is not at least anything
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}, expected {minimum} or more")


def check_folder_name(run: str) -> None:
    """Raise ValueError for a --run that is empty, or that the files of a checkpoint cannot have."""
    if not isinstance(run, str):  # no text yet, while the command line gathers its defaults
        return
    if not run.strip():
        raise ValueError("--run is empty, expected the name of a folder")
    try:
        run.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--run is {ascii(run)}, which is not UTF-8; take another name") from None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Flags of every loop: where a run lives, how long it goes, what it keeps.

    All of them may change on resume.
    """

    run: str
    """Folder of the run. It is made if it is missing."""
    resume: bool = False
    """Continue from the last sound checkpoint in the folder, or from the start if there is none."""
    steps: int = 100
    """Total number of optimizer steps. The learning rate's schedule ends with the last step that
    the run began with."""
    save_every: int = 100
    """Number of steps between checkpoints. One is always written at the end and on Ctrl-C."""
    keep_last: int = 2
    """Number of checkpoints to keep, besides the best one."""
    device: str = "auto"
    """Device to compute on: auto (a CUDA GPU if there is one), cpu, cuda or mps."""
    recompute: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again, which
    takes less memory and about a third more time (activation checkpointing)."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    accept_changes: bool = False
    """Resume although the base or the data has another content than when the run began."""

    def __post_init__(self):
        check_folder_name(self.run)
        at_least(self, 1, "steps", "save_every", "keep_last")


# ---- NaN -----------------------------------------------------------------------------------------


def first_bad_tensor(model: torch.nn.Module) -> str:
    """Where NaN or infinity is found first, in words: in a weight, else in a gradient."""
    parameters = list(model.named_parameters())
    tensors = [(f"weight {name}", p.data) for name, p in parameters]
    tensors += [(f"gradient of {name}", p.grad) for name, p in parameters]
    for what, tensor in tensors:
        if tensor is not None and not torch.isfinite(tensor).all():
            return f"first bad tensor: {what}"
    return "all weights and gradients are finite"


# ---- the run -------------------------------------------------------------------------------------


class Run:
    """Folder, log, bar and checkpoints of one loop; a context manager that also takes over Ctrl-C.

    run = Run(config, title)            # reads what is there, refuses what does not fit
    run.check_inputs({"base": ...})
    with run:
        run.restore(model, tokenizer, optimizer)
        for step in run.steps():
            ...
            run.done(step, metrics)
            run.log(step, metrics)
            if run.due(step, config.save_every):
                run.save(step)

    Nothing is written before the `with` block. Raises ValueError for a folder that already holds a
    run, and on resume for settings that differ from those that the run began with.
    """

    def __init__(self, config: RunConfig, title: str):
        self.config = config
        self.title = title
        self.folder = Path(config.run)
        self._began = time.perf_counter()
        # Of the times before this one; None where an older version did not note them.
        self._earlier_seconds: float | None = 0.0
        by_class = type(config).__name__.removesuffix("Config").lower()
        self.loop: str = getattr(config, "LOOP", by_class)
        self.settings = settings_of(config, free={field.name for field in fields(RunConfig)})
        self.inputs: Inputs = {}
        self.interrupt = Interrupt()
        self._lock = FolderLock(self.folder)
        self._wandb = NoWandb()
        self.resumed = self._checkpoint_to_resume()
        self.first_step = self.resumed.step if self.resumed else 0
        state = self.resumed.state if self.resumed else {}
        self.schedule_steps: int = state.get("schedule_steps", config.steps)
        """Number of steps of the learning rate's schedule: those that the run began with."""
        self._modules: dict[str, tuple] = {}
        self.adapted: dict = {}
        """For the state of a checkpoint that holds adapters alone: {"lora": ...}, or nothing."""
        self._tokenizer: Tokenizer | None = None
        self._saved_step = self._done_step = self.first_step - 1
        self._counters: dict = {}
        self._updates: list[float] = []
        self._unlogged: dict | None = None
        self._score: float | None = None

    # ---- what is there, and whether it fits ----

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        """The checkpoint to go on from; None for a run that begins."""
        nearest = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            why = "is not writable" if nearest.is_dir() else "is a file"
            raise ValueError(
                f"cannot use the run folder {self.folder}: {nearest} {why}; give another one"
            )
        self._steps_seen = checkpoint_steps(self.folder)
        if is_huggingface(self.folder) or is_peft(self.folder):
            raise ValueError(
                f"{self.folder} holds a Hugging Face model or its adapters, beside which "
                "checkpoints would be lost; give the run a folder of its own"
            )
        if not self._steps_seen:
            return None
        if not self.config.resume:
            raise ValueError(
                f"{self.folder} already holds a run; add --resume to continue it, or give "
                "another folder"
            )
        resumed = load_checkpoint(self.folder)
        if "optimizer" not in resumed.tensors:
            raise CheckpointError(
                f"{resumed.path} has no optimizer to go on with; it is a model to begin from "
                "(--base), so take another run folder"
            )
        loop = resumed.state.get("loop", self.loop)
        if loop != self.loop:
            raise CheckpointError(
                f"{self.folder} is a run of {loop}, not of {self.loop}; resume it with "
                f"r1zero {loop}, or take another run folder"
            )
        then = resumed.state.get("settings", {})
        check_rank(then, self.settings, resumed.path)
        check_settings(then, self.settings, self.config, resumed.path)
        return resumed

    def check_inputs(self, inputs: Inputs) -> None:
        """Note what the run depends on (inputs.py), and compare it with what it began with.

        Raises CheckpointError, saying what changed, unless --accept-changes was given.
        """
        self.inputs = inputs
        if not self.resumed:
            return
        if "inputs" not in self.resumed.state:
            say(
                f"{self.resumed.path} has no fingerprints: nobody can tell whether its data changed"
            )
            return
        changes = changes_of(self.resumed.state["inputs"], inputs)
        if changes and not self.config.accept_changes:
            raise CheckpointError(
                f"the inputs of {self.resumed.path} have changed: {changes}. Restore them or give "
                "their new path, take another run folder, or add --accept-changes to go on with "
                "what is there"
            )
        if changes:
            say(f"accepted, and compared with from now on: {changes}")

    def began_with(self, name: str) -> bool:
        """Whether an input is the one that the resumed run has, as far as that is known."""
        known = self.resumed.state.get("inputs", {})
        return not changes_of(known, {name: self.inputs[name]})

    def check_model(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Raise CheckpointError unless a resumed run has this tokenizer and this shape of model."""
        if not self.resumed:
            return
        state, path = self.resumed.state, self.resumed.path
        saved_tokenizer = Tokenizer.from_dict(state["tokenizer"])
        if saved_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise CheckpointError(
                f"{path} was made with another tokenizer: the data, the base or --tokenizer has "
                "changed since. Restore it, or give another run folder"
            )
        saved_config = ModelConfig(
            **state["model_config"]
        )  # of an older version: it has fewer fields
        check_config(saved_config.to_dict(), model.config.to_dict(), path)

    def adapt(self, model: Transformer, base: Checkpoint) -> None:
        """Freeze the model, and put the adapters of --lora.rank beside its weights, if it is not 0.

        The checkpoints of the run then hold the adapters alone, and where their base is. To be
        called after `check_inputs` with an input "base".
        """
        self.adapted = adapt(model, self.config.lora, self.config.seed, base, self.inputs)

    # ---- beginning and end ----

    def __enter__(self):
        try:
            self._open()
        except BaseException as error:
            self._lock.release()
            self._wandb.finish(failed=True)
            if not isinstance(error, OSError):
                raise
            raise ValueError(
                f"cannot use the run folder {self.folder}: {error.strerror}; give another one, "
                "or make it writable"
            ) from error
        self.interrupt.__enter__()
        if compiles_first(pick_device(self.config.device)):
            say(
                "compiling the loops for this processor, once: the first step takes a minute or two"
            )
        return self

    def _open(self) -> None:
        """Take the folder, and open the logs and the bar."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if self.adapted:
            keep_base(self.folder, Path(self.adapted["lora"]["base"]))
        if checkpoint_steps(self.folder) != self._steps_seen:
            raise ValueError(
                f"another process has trained in {self.folder} while this one was loading; "
                "start it again"
            )
        if self.config.wandb:
            self._wandb = WandbLog(self.folder, self.settings, self.resumed is not None)
        self._write_record()
        self._log = MetricsLog(self.folder, last_step=self.first_step)
        if self.config.resume and not self.resumed:
            say(f"{self.folder} holds no checkpoint to resume yet: starting at step 1")
        if notice := schedule_notice(self.config, self.first_step, self.schedule_steps):
            say(notice)
        self._bar = Bar(
            total=self.config.steps,
            initial=self.first_step,
            desc=self.title,
            unit="step",
            smoothing=0.1,
        )

    def _write_record(self) -> None:
        if self.resumed:
            # A run that died after it saved its best checkpoint has not marked it yet.
            score = self.resumed.state.get("score")
            if score is not None:
                mark_best(self.folder, self.resumed.step, score)
        path = self.folder / "run.json"
        start = {
            "title": self.title,
            "config": asdict(self.config),
            "machine": describe_machine(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        record = start
        if self.resumed:
            # The flags are those of now; how it began, and each time that it went on, stay.
            first = read_record(path)
            earlier = first.get("starts", [first] if first else [])
            self._earlier_seconds = finite(first.get("seconds"))
            record = start | {"starts": [*earlier, start], "seconds": self._earlier_seconds}
        atomic_write_json(path, record)

    def note(self, **entries) -> None:
        """Add entries to run.json."""
        path = self.folder / "run.json"
        atomic_write_json(path, read_record(path) | entries)

    def _note_seconds(self) -> None:
        """Add the seconds of the whole run so far to run.json, if they are known and it can be
        written."""
        if self._earlier_seconds is None:
            return
        with suppress(OSError):
            self.note(seconds=self._earlier_seconds + time.perf_counter() - self._began)

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            self._save_before_leaving(error)
        self._note_seconds()
        self.interrupt.__exit__(kind, error, trace)
        self._bar.close()
        self._log.close()
        self._lock.release()
        self._wandb.finish(failed=error is not None and not isinstance(error, Stopped))

    def _save_before_leaving(self, error: Exception) -> None:
        """Save the last whole step, which an error would lose, if its weights are still there."""
        step = self._done_step
        is_lost = step > self._saved_step and self._count_updates() == self._updates
        if not is_lost or isinstance(error, CheckpointError) or not self._is_finite():
            return
        try:
            if self._unlogged is not None:
                with suppress(OSError):  # perhaps a full disk is the error
                    self._log.write({"step": step + 1, **self._unlogged})
            self.save(step, self._score)
        except Exception as second:  # the first error is the one to report
            say(f"step {step + 1} could not be saved before leaving: {second}")
        else:
            say(f"saved step {step + 1} in {self.folder} before leaving; --resume goes on from it")

    def _is_finite(self) -> bool:
        parameters = [p for module, _ in self._modules.values() for p in module.parameters()]
        return all(bool(torch.isfinite(p).all()) for p in parameters)

    def _count_updates(self) -> list[float]:
        """How many updates each optimizer has made."""
        counts = []
        for _, optimizer in self._modules.values():
            if optimizer is not None:
                states = list(optimizer.state.values())
                counts.append(float(states[0]["step"]) if states else 0.0)
        return counts

    # ---- steps and metrics ----

    def steps(self):
        """Yield the 0-based steps that are left; Stopped after a signal, once a step is saved."""
        for step in range(self.first_step, self.config.steps):
            yield step
            self._bar.update(1)
            # If Ctrl-C came after `due` had said no, this step is not saved: the next one will be.
            if self.interrupt.requested and self._saved_step == step:
                is_last = step + 1 == self.config.steps
                where = f"{'done' if is_last else 'stopped'} and saved in {self.folder}"
                raise Stopped(
                    self.interrupt.number, f"{where}; go on with --resume and the same flags"
                )

    def due(self, step: int, every: int) -> bool:
        """True after every `every`-th step, after the last one, and when Ctrl-C was pressed."""
        is_last = step + 1 == self.config.steps
        return self.interrupt.requested or is_last or (step + 1) % every == 0

    def check_finite(self, step: int, model: torch.nn.Module, **metrics: float) -> None:
        """Raise FloatingPointError for a NaN or infinite metric; the last good checkpoint stays."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step + 1} ({first_bad_tensor(model)}); "
                    f"nothing was updated or saved with it; {self.last_good()}. Lower "
                    "the learning rate, or look at the data of that step"
                )

    def done(self, step: int, metrics: dict, counters: dict | None = None) -> None:
        """Say that 0-based `step` is whole: from now on, an error does not lose it.

        metrics: those to log, if an error comes before `log`. counters: name -> number, numbers
        beside the weights that a resumed run needs.
        """
        self._done_step = step
        self._unlogged = metrics
        self._counters = counters or {}
        self._updates = self._count_updates()
        self._score = None

    def log(
        self,
        step: int,
        metrics: dict,
        show: tuple[str, ...] = (),
        samples: Sequence[dict] = (),
    ) -> None:
        """Write the metrics of 0-based `step`, under "step": step + 1, the number of steps done.

        show: names of the metrics that the progress bar shows, as far as they were measured.
        samples: some of the step, for Weights & Biases alone.
        """
        self._log.write({"step": step + 1, **metrics})
        self._unlogged = None
        shown = {name: short(metrics[name]) for name in show if name in metrics}
        self._bar.set_postfix(shown)
        self._wandb.log(metrics, step + 1, samples)

    def last_good(self) -> str:
        """Which checkpoint a run that must stop leaves, in words."""
        steps = checkpoint_steps(self.folder)
        kept = f"the checkpoint of step {steps[-1]}" if steps else "no checkpoint"
        return f"{kept} is kept in {self.folder}"

    # ---- checkpoints ----

    def restore(
        self, model: Transformer, tokenizer: Tokenizer, optimizer, more: dict | None = None
    ) -> dict:
        """Name what the checkpoints of this run hold, and load it from the one to go on from.

        more: name -> (module, its optimizer or None), further modules that change. Returns the
        counters saved there, or an empty dict. Raises CheckpointError as `check_model`.
        """
        self._modules = {"model": (model, optimizer), **(more or {})}
        self._tokenizer = tokenizer
        if not self.resumed:
            return {}
        self.check_model(model, tokenizer)
        state, tensors = self.resumed.state, self.resumed.tensors
        for name, (module, its_optimizer) in self._modules.items():
            load_tensors(module, tensors[name], self.resumed.path)
            if its_optimizer is not None:
                key = optimizer_key(name)
                load_optimizer_tensors(
                    its_optimizer, module.named_parameters(), tensors[key], state[key]
                )
        self.done(self.first_step - 1, {}, state.get("counters", {}))
        return self._counters

    def save(self, step: int, score: float | None = None) -> None:
        """Write a checkpoint of what 0-based `step` left: weights, optimizers and counters.

        Data and random numbers follow from the step, so they need not be saved.
        score: held-out score; the best checkpoint is kept.
        """
        self._score = score
        # The log goes to the disk first, so that no checkpoint is ahead of it.
        self._log.sync()

        model, _ = self._modules["model"]
        state = {
            "loop": self.loop,
            "settings": self.settings,
            "inputs": self.inputs,
            "schedule_steps": self.schedule_steps,
            "model_config": model.config.to_dict(),
            "tokenizer": self._tokenizer.to_dict(),
            "counters": self._counters,
            "score": score,
            **self.adapted,
        }
        tensors = {}
        for name, (module, its_optimizer) in self._modules.items():
            tensors[name] = tensors_of(module)
            if its_optimizer is not None:
                key = optimizer_key(name)
                tensors[key], state[key] = optimizer_tensors(
                    its_optimizer, module.named_parameters()
                )

        keep_last = self.config.keep_last
        save_checkpoint(self.folder, step + 1, tensors, state, keep_last=keep_last, score=score)
        self._saved_step = step
        # A process that is killed has noted all but what is lost with it.
        self._note_seconds()


def read_record(path: Path) -> dict:
    """A run.json; an empty dict if there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def short(value: float) -> str:
    """A number for the bar: 0.125, 25.2k."""
    return f"{value / 1000:.3g}k" if abs(value) >= 999.5 else f"{value:.3g}"


def optimizer_key(name: str) -> str:
    """What a checkpoint calls the state of a module's optimizer."""
    return "optimizer" if name == "model" else f"{name}_optimizer"


def schedule_notice(config: RunConfig, first_step: int, schedule_steps: int) -> str | None:
    """What to tell of a resumed run whose --steps are not those that it began with."""
    if first_step >= config.steps:
        return f"nothing to do: --steps is {config.steps}, and {first_step} are done"
    if first_step == 0 or config.steps == schedule_steps:
        return None
    is_constant = getattr(config, "optim", None) and config.optim.schedule == "constant"
    if is_constant:
        return None
    if config.steps > schedule_steps:
        return (
            f"the learning rate's schedule ends with step {schedule_steps}, as the run began; "
            "later steps keep its final rate"
        )
    return (
        f"the run ends at step {config.steps}, before the learning rate's schedule, which ends "
        f"with step {schedule_steps}, as the run began"
    )
