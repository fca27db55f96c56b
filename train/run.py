"""A run: its folder, its log, its progress bar, and how it stops. It knows nothing of the loops.

    <run>/run.json          config, machine and start: what it takes to make the run again
    <run>/metrics.jsonl     one JSON object per step; cut back to the checkpoint's step on resume
    <run>/checkpoints/      see model/checkpoint.py

Ctrl-C asks the loop to stop: it finishes its step, saves and leaves. A second Ctrl-C breaks off at
once. wandb gets the metrics of metrics.jsonl when asked. `WANDB_MODE=offline`, its own variable,
works as usual.

Left out: how fast and on what the run computes (machine.py), and every decision about training.
"""

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..model.checkpoint import (
    Checkpoint,
    CheckpointError,
    atomic_write_json,
    atomic_write_text,
    check_config,
    checkpoint_steps,
    load_checkpoint,
    mark_best,
    save_checkpoint,
)
from ..model.optimizer import load_optimizer_tensors, optimizer_tensors
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from .machine import describe_machine

# ---- flags ---------------------------------------------------------------------------------------


def at_least(config: Any, minimum: float, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is NaN or below `minimum`."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:  # NaN is not at least anything
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}, expected {minimum} or more")


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
    """Total number of optimizer steps."""
    save_every: int = 100
    """Number of steps between checkpoints. One is always written at the end and on Ctrl-C."""
    keep_last: int = 2
    """Number of checkpoints to keep, besides the best one."""
    device: str = "auto"
    """Device to compute on: auto (the GPU if there is one), cpu or cuda."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self):
        at_least(self, 1, "steps", "save_every", "keep_last")


def fixed_settings(config: RunConfig) -> dict:
    """The flags that must not change on resume, as JSON types.

    A loop names further flags that may change in its config's `FREE`.
    """
    free = {f.name for f in fields(RunConfig)} | set(getattr(config, "FREE", ()))
    kept = {name: value for name, value in asdict(config).items() if name not in free}
    return json.loads(json.dumps(kept))


# ---- the log -------------------------------------------------------------------------------------


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; lines that are not whole are skipped, such as the last of
    a killed run."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


class MetricsLog:
    """metrics.jsonl, open for appending. Each row is flushed as soon as it is written."""

    def __init__(self, folder: Path, last_step: int):
        """last_step: rows after it are dropped, because those steps are done again."""
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(folder) if row["step"] <= last_step]
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when every row is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


# ---- Ctrl-C --------------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C as a request, within a `with` block: the first press only sets `requested`.

    The second press does what Ctrl-C did before the block.
    """

    def __init__(self):
        self.requested = False
        self._former_handler = None

    def __enter__(self):
        try:
            self._former_handler = signal.signal(signal.SIGINT, self._on_press)
        except ValueError:  # not the main thread: then Ctrl-C is not ours to catch
            self._former_handler = None
        return self

    def __exit__(self, kind, error, trace):
        if self._former_handler is not None:
            signal.signal(signal.SIGINT, self._former_handler)

    def _on_press(self, signal_number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, self._former_handler)
        print(
            "\nfinishing this step, then saving; press Ctrl-C again to stop at once",
            file=sys.stderr,
        )


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

    `with Run(config, title) as run: for step in run.steps(): ...; run.log(step, {...})`

    Raises ValueError for a folder that already holds a run, and on resume for settings that differ
    from those that the run began with.
    """

    def __init__(self, config: RunConfig, title: str):
        self.config = config
        self.title = title
        self.folder = Path(config.run)
        self.settings = fixed_settings(config)
        self.interrupt = Interrupt()
        try:
            self.resumed = self._open_folder()
        except OSError as error:
            raise ValueError(
                f"cannot use the run folder {self.folder}: {error.strerror}; give another one, "
                "or make it writable"
            ) from error
        self.first_step = self.resumed.step if self.resumed else 0
        self._saved_step = self.first_step - 1

    def _open_folder(self) -> Checkpoint | None:
        """Make the folder, or load the checkpoint to go on from; then write run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "run.json"
        steps = checkpoint_steps(self.folder)
        if (steps or record.exists()) and not self.config.resume:
            raise ValueError(
                f"{self.folder} already holds a run; add --resume to continue it, or give "
                "another folder"
            )

        resumed = None
        if steps:
            resumed = load_checkpoint(self.folder)
            check_config(resumed.state.get("settings", {}), self.settings, resumed.path)
            # A run that died after it saved its best checkpoint has not marked it yet.
            score = resumed.state.get("score")
            if score is not None:
                mark_best(self.folder, resumed.step, score)

        atomic_write_json(
            record,
            {
                "title": self.title,
                "config": asdict(self.config),
                "machine": describe_machine(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        )
        return resumed

    def __enter__(self):
        self._log = MetricsLog(self.folder, last_step=self.first_step)
        self._bar = tqdm(
            total=self.config.steps,
            initial=self.first_step,
            desc=self.title,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self._wandb = None
        if self.config.wandb:
            import wandb  # takes a second to import, so only when asked

            self._wandb = wandb.init(
                project="r1zero", name=self.folder.name, config=self.settings, dir=str(self.folder)
            )
        self.interrupt.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        self.interrupt.__exit__(kind, error, trace)
        self._bar.close()
        self._log.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self.interrupt.requested and kind is None:
            print(f"stopped and saved in {self.folder}; go on with --resume", file=sys.stderr)

    # ---- steps and metrics ----

    def steps(self):
        """Yield the 0-based steps that are left. After Ctrl-C it ends once a step is saved."""
        for step in range(self.first_step, self.config.steps):
            yield step
            self._bar.update(1)
            # If Ctrl-C came after `due` had said no, this step is not saved: the next one will be.
            if self.interrupt.requested and self._saved_step == step:
                return

    def due(self, step: int, every: int) -> bool:
        """True after every `every`-th step, after the last one, and when Ctrl-C was pressed."""
        is_last = step + 1 == self.config.steps
        return self.interrupt.requested or is_last or (step + 1) % every == 0

    def log(self, step: int, metrics: dict, show: tuple[str, ...] = ()) -> None:
        """Write the metrics of 0-based `step`, under "step": step + 1, the number of steps done.

        show: names of the metrics that the progress bar shows.
        """
        self._log.write({"step": step + 1, **metrics})
        self._bar.set_postfix({name: f"{metrics[name]:.3g}" for name in show}, refresh=False)
        if self._wandb:
            self._wandb.log(metrics, step=step + 1)

    def check_finite(self, step: int, model: torch.nn.Module, **metrics: float) -> None:
        """Raise FloatingPointError for a NaN or infinite metric; the last good checkpoint stays."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step + 1} ({first_bad_tensor(model)}); "
                    f"nothing was updated or saved with it; {self.last_good()}. Lower "
                    "the learning rate, or look at the data of that step"
                )

    def last_good(self) -> str:
        """Which checkpoint a run that must stop leaves, in words."""
        steps = checkpoint_steps(self.folder)
        kept = f"the checkpoint of step {steps[-1]}" if steps else "no checkpoint"
        return f"{kept} is kept in {self.folder}"

    # ---- checkpoints ----

    def save(
        self,
        step: int,
        model: Transformer,
        tokenizer: Tokenizer,
        optimizer,
        score: float | None = None,
        more: dict | None = None,
        counters: dict | None = None,
    ) -> None:
        """Write a checkpoint of what 0-based `step` left: weights, optimizers and counters.

        Data and random numbers follow from the step, so they need not be saved.
        score: held-out score; the best checkpoint is kept. more: name -> (module, its optimizer or
        None), further modules that change. counters: name -> number, further numbers that change.
        """
        # The log goes to the disk first, so that no checkpoint is ahead of it.
        self._log.sync()

        state = {
            "settings": self.settings,
            "model_config": model.config.to_dict(),
            "tokenizer": tokenizer.to_dict(),
            "counters": counters or {},
            "score": score,
        }
        tensors = {}
        modules = {"model": (model, optimizer), **(more or {})}
        for name, (module, its_optimizer) in modules.items():
            tensors[name] = dict(module.named_parameters())
            if its_optimizer is not None:
                key = optimizer_key(name)
                tensors[key], state[key] = optimizer_tensors(
                    its_optimizer, module.named_parameters()
                )

        keep_last = self.config.keep_last
        save_checkpoint(self.folder, step + 1, tensors, state, keep_last=keep_last, score=score)
        self._saved_step = step

    def restore(
        self, model: Transformer, tokenizer: Tokenizer, optimizer, more: dict | None = None
    ) -> dict:
        """Load the checkpoint that the run goes on from, if any, into a model and its optimizer.

        more: as in `save`. Returns the counters saved there, or an empty dict.
        Raises CheckpointError if the model has another shape, or if the tokenizer, which is made
        from the data each time, has other tokens.
        """
        if not self.resumed:
            return {}
        state, tensors = self.resumed.state, self.resumed.tensors
        check_config(state["model_config"], model.config.to_dict(), self.resumed.path)
        saved_tokenizer = Tokenizer.from_dict(state["tokenizer"])
        if saved_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise CheckpointError(
                f"{self.resumed.path} was made with another tokenizer: the data or the "
                "base has changed since. Restore it, or give another run folder"
            )

        modules = {"model": (model, optimizer), **(more or {})}
        for name, (module, its_optimizer) in modules.items():
            module.load_state_dict(tensors[name])
            if its_optimizer is not None:
                key = optimizer_key(name)
                load_optimizer_tensors(
                    its_optimizer, module.named_parameters(), tensors[key], state[key]
                )
        return state.get("counters", {})


def optimizer_key(name: str) -> str:
    """What a checkpoint calls the state of a module's optimizer."""
    return "optimizer" if name == "model" else f"{name}_optimizer"
