"""A run: its folder, its log, its progress bar, and how it stops. All loops use this; it knows none of them.

    <run>/run.json          config, seed, versions, hardware, commit: what it takes to make it again
    <run>/metrics.jsonl     one JSON object a step; cut back to the checkpoint's step on resume
    <run>/checkpoints/      see model/checkpoint.py

Ctrl-C asks the loop to stop: it finishes its step, saves, and leaves; a second Ctrl-C breaks off at once.
wandb gets the same figures as metrics.jsonl when asked (`WANDB_MODE=offline` works; it is wandb's own
variable).
"""

import ctypes
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, how long it goes, what it keeps: flags of every loop, free to change on resume."""

    run: str
    """Folder of the run; made if missing."""
    resume: bool = False
    """Go on from the last sound checkpoint in the folder (from the start if there is none yet)."""
    steps: int = 100
    """Optimizer steps in all."""
    save_every: int = 100
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep_last: int = 2
    """How many checkpoints stay, besides the best."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda."""
    wandb: bool = False
    """Log to Weights & Biases too."""

    def __post_init__(self):
        for name in ("steps", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
                )


def reuse_memory() -> None:
    """Keep freed memory in the process instead of handing it back after every operation (glibc only).

    Big tensors are otherwise mapped and unmapped by the kernel each time, and their pages cleared anew:
    measured on 2 cores, RMSNorm with its gradient took 35 ms instead of 5.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: nothing to set
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    # PyTorch then asks for large pages: fewer of them to map. Its own variable, read at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda was given, but PyTorch sees no CUDA device; use --device cpu, or "
            "install a CUDA build of PyTorch"
        )
    return torch.device(name)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch's tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes, on Linux


def machine() -> dict:
    """Hardware, versions and commit, for run.json and reports."""
    versions = {}
    for name in ("r1zero", "torch", "triton", "numpy", "tiktoken"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    try:
        commit = (
            subprocess.run(
                ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                timeout=5,
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }


def first_bad_tensor(model: torch.nn.Module) -> str:
    """Where NaN or infinity shows first: in a weight, else in a gradient, in words."""
    for what, tensors in (
        ("weight", {n: p.data for n, p in model.named_parameters()}),
        ("gradient of", {n: p.grad for n, p in model.named_parameters()}),
    ):
        for name, tensor in tensors.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                return f"first bad tensor: {what} {name}"
    return "all weights and gradients are finite"


class Run:
    """Folder, log and bar of one loop; a context manager that also takes over Ctrl-C.

    `with Run(config, title) as run: for step in run.steps(): ...; run.log(step, {...})`. Raises ValueError
    for a folder that holds another run already, or to resume with other settings than it was begun with.
    """

    def __init__(self, config: RunConfig, title: str):
        self.config, self.title, self.folder = config, title, Path(config.run)
        free = {f.name for f in fields(RunConfig)} | set(getattr(config, "FREE", ()))
        self.settings = json.loads(
            json.dumps({k: v for k, v in asdict(config).items() if k not in free})
        )
        self.stop_requested = False
        self.resumed: Checkpoint | None = None
        record = self.folder / "run.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = checkpoint_steps(self.folder)
            if (steps or record.exists()) and not config.resume:
                raise ValueError(
                    f"{self.folder} holds a run already; add --resume to go on with it, or give "
                    "another folder"
                )
            if steps:
                self.resumed = load_checkpoint(self.folder)
                check_config(
                    self.resumed.state.get("settings", {}), self.settings, self.resumed.path
                )
                if (score := self.resumed.state.get("score")) is not None:
                    mark_best(self.folder, self.resumed.step, score)
            atomic_write_json(
                record,
                {
                    "title": title,
                    "config": asdict(config),
                    "machine": machine(),
                    "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                },
            )
        except OSError as error:
            raise ValueError(
                f"cannot use the run folder {self.folder}: {error.strerror}; give another one, "
                "or make it writable"
            ) from error
        self.first_step = self.resumed.step if self.resumed else 0
        self._saved = self.first_step - 1

    def __enter__(self):
        self._cut_log()
        self._file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
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
        try:
            self._former_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        except ValueError:  # not the main thread: then Ctrl-C is not ours to catch
            self._former_handler = None
        return self

    def __exit__(self, kind, error, trace):
        if self._former_handler is not None:
            signal.signal(signal.SIGINT, self._former_handler)
        self._bar.close()
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        if self.stop_requested and kind is None:
            print(f"stopped and saved in {self.folder}; go on with --resume", file=sys.stderr)

    def _on_interrupt(self, signum, frame):
        self.stop_requested = True
        signal.signal(signal.SIGINT, self._former_handler)
        print(
            "\nfinishing this step, then saving; Ctrl-C again breaks off at once", file=sys.stderr
        )

    def _cut_log(self):
        """Drop what was logged after the checkpoint: those steps are done again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = read_metrics(self.folder)
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.first_step]
            atomic_write_text(path, "".join(kept))

    def steps(self):
        """The steps that are left, 0-based; ends early when Ctrl-C was pressed and its step is saved."""
        for step in range(self.first_step, self.config.steps):
            yield step
            self._bar.update(1)
            if (
                self.stop_requested and self._saved == step
            ):  # pressed after `due` said no, the next saves
                return

    def due(self, step: int, every: int) -> bool:
        """True after steps every, 2 * every, ..., after the last one, and when Ctrl-C was pressed."""
        return self.stop_requested or (step + 1) % every == 0 or step + 1 == self.config.steps

    def log(self, step: int, figures: dict, show: tuple[str, ...] = ()) -> None:
        """Write the figures of 0-based `step`, as those of step + 1 steps done; `show` names the bar's."""
        self._file.write(json.dumps({"step": step + 1, **figures}) + "\n")
        self._file.flush()
        self._bar.set_postfix({name: f"{figures[name]:.3g}" for name in show}, refresh=False)
        if self._wandb:
            self._wandb.log(figures, step=step + 1)

    def last_good(self) -> str:
        """Which checkpoint a run that must stop leaves, in words."""
        steps = checkpoint_steps(self.folder)
        kept = f"the checkpoint of step {steps[-1]}" if steps else "no checkpoint"
        return f"{kept} is kept in {self.folder}"

    def check_finite(self, step: int, model: torch.nn.Module, **figures: float) -> None:
        """Raise FloatingPointError when a figure is NaN or infinite; the last good checkpoint stays."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step + 1} ({first_bad_tensor(model)}); "
                    f"nothing was updated or saved with it; {self.last_good()}. Lower "
                    "the learning rate, or look at the data of that step"
                )

    def save(
        self,
        step: int,
        model: Transformer,
        tokenizer: Tokenizer,
        optimizer,
        score: float | None = None,
        more: dict | None = None,
        figures: dict | None = None,
    ) -> None:
        """Checkpoint what changes, after 0-based `step`: weights, optimizer, and the step, from which data
        and random numbers follow. The log goes to the disk first, so that no checkpoint is ahead of it.

        more: name -> (module, its optimizer or None), further modules that change; figures: numbers that do.
        """
        os.fsync(self._file.fileno())
        tensors = {}
        state = {
            "settings": self.settings,
            "model_config": model.config.to_dict(),
            "tokenizer": tokenizer.to_dict(),
            "figures": figures or {},
            "score": score,
        }
        for name, (module, its_optimizer) in {"model": (model, optimizer), **(more or {})}.items():
            tensors[name] = dict(module.named_parameters())
            if its_optimizer is not None:
                tensors[moments(name)], state[moments(name)] = optimizer_tensors(
                    its_optimizer, module.named_parameters()
                )
        save_checkpoint(
            self.folder, step + 1, tensors, state, keep_last=self.config.keep_last, score=score
        )
        self._saved = step

    def restore(
        self, model: Transformer, tokenizer: Tokenizer, optimizer, more: dict | None = None
    ) -> dict:
        """Give a model, its optimizer and what `save` calls `more` the state of the checkpoint that the run
        goes on from, if any. Returns the figures saved there, or nothing.

        Raises CheckpointError if the model has another shape, or the tokenizer (made from the data anew) has
        other tokens.
        """
        if not self.resumed:
            return {}
        check_config(self.resumed.state["model_config"], model.config.to_dict(), self.resumed.path)
        if (
            Tokenizer.from_dict(self.resumed.state["tokenizer"]).fingerprint()
            != tokenizer.fingerprint()
        ):
            raise CheckpointError(
                f"{self.resumed.path} was made with another tokenizer: the data or the "
                "base has changed since. Restore it, or give another run folder"
            )
        for name, (module, its_optimizer) in {"model": (model, optimizer), **(more or {})}.items():
            module.load_state_dict(self.resumed.tensors[name])
            if its_optimizer is not None:
                load_optimizer_tensors(
                    its_optimizer,
                    module.named_parameters(),
                    self.resumed.tensors[moments(name)],
                    self.resumed.state[moments(name)],
                )
        return self.resumed.state.get("figures", {})


def moments(name: str) -> str:
    """What a checkpoint calls the state of a module's optimizer."""
    return "optimizer" if name == "model" else f"{name}_optimizer"


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; the half line of a killed run is left out."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
