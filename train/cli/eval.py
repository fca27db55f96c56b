"""Measure a model on held-out problems: pass@1, pass@k and format with 95 % intervals, and every response in
a file.

    r1zero eval --run runs/rl --task countdown --options high=20
    r1zero eval --run runs/rl --task gsm8k --data gsm8k_test.jsonl --samples 1

Writes eval_<task>_step<n>.jsonl, one line a response, and eval_<task>_step<n>.summary.json, the figures with
all flags, into the run's folder; the next evaluation of that task and step replaces them (`--out` keeps them
apart).

A prompt that does not fit the model's max_seq_len beside the new tokens is cut at its beginning, and a
warning counts how many were: a tiny model still gets its honest figure on a whole test set.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...eval.harness import EvalResult, evaluate
from ...eval.sampler import ModelSampler
from ...eval.tasks.base import Task
from ...model.checkpoint import Checkpoint, atomic_write_json, load_model
from ...model.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..machine import pick_device, reuse_memory
from ..task_flags import TaskFlags

DRAWN_PROBLEMS = 512  # how many of a task that makes its own; the interval is about ± 4 points then


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model on held-out problems."""

    run: str
    """Folder of the run (or checkpoint)."""
    which: str = "last"
    """The checkpoint: last, best, or its step."""
    task: TaskFlags = field(default_factory=TaskFlags)
    n: int | None = None
    """Problems; if not given, all of a file, or 512 of a task that makes its own."""
    samples: int = 4
    """Responses to each problem."""
    ks: tuple[int, ...] = ()
    """The k of each pass@k; if not given, 1 and --samples."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    max_new_tokens: int = 160
    """Longest response."""
    out: str | None = None
    """File for the responses, instead of one in the run's folder; the summary goes beside it."""
    batch: int = 64
    """Problems sampled at one time; changes memory and speed, not the result."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda."""

    def __post_init__(self):
        for name in ("samples", "batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
                )
        if self.n is not None and self.n < 1:
            raise ValueError(f"--n is {self.n}, expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}, expected a number of 0 or more")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"--ks has {k}, expected 1 to --samples ({self.samples}); raise --samples"
                )
        if (
            self.out
            and self.task.data
            and Path(self.out).resolve() == Path(self.task.data).resolve()
        ):
            raise ValueError(
                f"--out {self.out} is the --data file, which would be lost; give another one"
            )


def load_run(
    run: str, which: str, device: torch.device
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """`load_model`, with `which` as a flag gives it. Raises ValueError, naming the runs inside, for a folder
    of runs."""
    folder = Path(run)
    inside = sorted(
        str(path.parent) for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints")
    )
    if inside and not (folder / "checkpoints").exists():
        raise ValueError(f"{run} holds several runs; give one of them: {', '.join(inside[:8])}")
    return load_model(run, device, int(which) if which.isdecimal() else which)


def choose_problems(task: Task, n: int | None) -> list:
    """The first n test problems. Raises ValueError for more than there are."""
    size = task.size("test")
    if n is not None and size is not None and n > size:
        raise ValueError(
            f"--n is {n}, but {task.name} has {size} test problems; ask for at most that many"
        )
    if n is None:
        n = (
            DRAWN_PROBLEMS
            if size is None
            else size
            if task.size("train") == 0
            else min(size, DRAWN_PROBLEMS)
        )
    return task.problems("test", n)


def output_path(c: EvalConfig, checkpoint: Checkpoint) -> Path:
    """--out, or a name in the run's folder (which is that of the checkpoint if it lies in no run)."""
    root = checkpoint.path.parent
    folder = root.parent if root.name == "checkpoints" else checkpoint.path
    return Path(c.out) if c.out else folder / f"eval_{c.task.name}_step{checkpoint.step}.jsonl"


def run_eval(c: EvalConfig) -> EvalResult:
    """Load, sample, grade, print and write. Raises ValueError for bad flags, and NonFiniteError for NaN."""
    reuse_memory()
    task = c.task.make()
    problems = choose_problems(task, c.n)
    model, tokenizer, checkpoint = load_run(c.run, c.which, pick_device(c.device))
    sampler = ModelSampler(
        model, tokenizer, c.max_new_tokens, c.temperature, c.seed, cut_prompts=True
    )
    out = output_path(c, checkpoint)
    summary = out.with_suffix(".summary.json")
    summary.unlink(
        missing_ok=True
    )  # else, if this is broken off, it would stand beside other responses
    result = evaluate(
        sampler, task, problems, c.samples, c.ks or sorted({1, c.samples}), out, c.batch
    )
    print(f"{checkpoint.path}\n{result.table()}")
    if message := sampler.cut_message():
        warnings.warn(message, stacklevel=2)
    origin = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "flags": asdict(c)}
    atomic_write_json(summary, {**origin, "prompts_cut": sampler.n_cut, **result.to_dict()})
    print(f"responses: {out}")
    return result
