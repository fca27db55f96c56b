"""Measure a model on held-out problems: pass@k, maj@k and format with 95 % intervals.

    r1zero eval --run runs/rl --task countdown --options high=20
    r1zero eval --run runs/rl --task gsm8k --data gsm8k_test.jsonl --samples 1

Writes two files into the run's folder: eval_<task>_step<n>.jsonl has one line per response, and
eval_<task>_step<n>.jsonl.summary.json has the metrics with all flags. The next evaluation of that
task and step replaces them when it is whole, unless `--out` names another file. The summary says
which responses it sums up: their number of lines, and the CRC-32 of their file (`responses`). Where
these differ from the file beside it, an evaluation was killed between the two.

A prompt that does not fit the model's max_seq_len beside the new tokens is cut at its beginning,
and a warning counts how many were cut: so a tiny model gets an honest number on a whole test set.

Left out: several models in one call. Compare their lines problem by problem.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ...eval.console import say, show
from ...eval.harness import EvalResult, evaluate
from ...eval.result_file import check_result_path, fingerprint, is_stream, summary_path
from ...eval.sampler import ModelSampler
from ...eval.tasks.base import Task
from ...model.checkpoint import Checkpoint, load_model
from ...model.files import atomic_write_json
from ...model.precision import Precision
from ...model.tokenizer import Tokenizer
from ...model.transformer import Transformer
from ..checks import check_temperature
from ..compute_flags import ComputeFlags
from ..machine import pick_device, reuse_memory
from ..run import START, at_least
from ..task_flags import TaskFlags

DEFAULT_PROBLEMS = 512  # of a task that makes its own; the interval is about ± 4 points then


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ComputeFlags):
    """Measure a model on held-out problems."""

    run: str
    """Folder of the run, of a checkpoint, of a Hugging Face model, or of adapters in PEFT's
    layout."""
    which: str = "last"
    """Which checkpoint of the run to load: last, best, or a step number."""
    task: TaskFlags = field(default_factory=TaskFlags)
    n: int | None = None
    """Number of problems. By default all of a file, or 512 of a task that makes its own."""
    samples: int = 4
    """Number of responses sampled per problem."""
    ks: tuple[int, ...] = ()
    """Values of k for which pass@k and maj@k are reported; by default 1, and all samples."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    max_new_tokens: int = 160
    """Maximum number of new tokens per response."""
    out: str | None = None
    """File for the responses, instead of one in the run's folder; the summary goes beside it, with
    .summary.json behind the same name. Missing folders are made."""
    batch: int = 64
    """Number of problems sampled at one time. Changes memory and speed, not the result."""
    seed: int = 0
    """Seed of the random numbers for sampling."""
    device: str = "auto"
    """Device to compute on: auto (a CUDA GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        ComputeFlags.__post_init__(self)
        at_least(self, 1, "samples", "batch", "max_new_tokens")
        if self.n is not None:
            at_least(self, 1, "n")
        check_temperature(self.temperature)
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(
                    f"--ks has {k}, expected 1 to --samples ({self.samples}); raise --samples"
                )
        if self.out is not None:
            check_result_path(self.out, self.inputs)
            if is_stream(self.out):
                raise ValueError(
                    f"--out {self.out} is a device or a pipe, and the summary needs a place beside "
                    "the responses; give a file"
                )

    @property
    def inputs(self) -> list[str]:
        """The files that are read, and must not be replaced."""
        return self.task.files


def load_run(
    run: str, which: str, device: torch.device, precision: Precision | None = None
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """`load_model`, with `which` as a flag gives it.

    Raises ValueError, with the names of the runs inside, for a folder of several runs.
    """
    folder = Path(run)
    found = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints")]
    # A run of GRPO keeps the model that it began with; that is no run of its own.
    inside = sorted(str(path) for path in found if path.name != START)
    if inside and not (folder / "checkpoints").exists():
        raise ValueError(f"{run} holds several runs; give one of them: {', '.join(inside[:8])}")
    return load_model(run, device, which_of(which), precision)


def which_of(word: str) -> str | int:
    """What --which names: "last", "best" or a step."""
    return int(word) if word.isdecimal() else word


def say_if_plain(command: str, tokenizer: Tokenizer, chat: bool) -> None:
    """Tell who asks a chat model in plain text that it could be asked otherwise."""
    if tokenizer.chat_template and not chat:
        say(
            f"r1zero {command}: the model has a chat template, and prompts are put to it as plain "
            "text; --chat --options template=chat asks it as a chat model"
        )


def choose_problems(task: Task, n: int | None) -> list:
    """The first n test problems. Raises ValueError for more than there are."""
    size = task.size("test")
    if n is None:
        is_file = size is not None and task.file_format is not None
        if is_file:
            n = size
        else:
            n = DEFAULT_PROBLEMS if size is None else min(size, DEFAULT_PROBLEMS)
    elif size is not None and n > size:
        raise ValueError(
            f"--n is {n}, but {task.name} has {size} test problems; ask for at most that many"
        )
    return task.problems("test", n)


def output_path(config: EvalConfig, checkpoint: Checkpoint) -> Path:
    """--out, or a file in the run's folder, or in the checkpoint's where it belongs to no run.

    Its name has the task, the file of problems and the step: MATH-500 and AIME are one task.
    """
    if config.out is not None:
        return Path(config.out)
    root = checkpoint.path.parent
    folder = root.parent if root.name == "checkpoints" else checkpoint.path
    names = [config.task.short_name]
    if config.task.data is not None:
        names.append(Path(config.task.data.replace(":", "/")).stem)
    if config.task.chat:
        names.append("chat")
    return folder / f"eval_{'_'.join(names)}_step{checkpoint.step}.jsonl"


def summary_of(
    config: EvalConfig, checkpoint: Checkpoint, result: EvalResult, out: Path, prompts_cut: int
) -> dict:
    """What the summary holds: the metrics, all flags, and which responses they sum up."""
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "flags": asdict(config),
        "responses": {"file": out.name, **fingerprint(out)},
        "prompts_cut": prompts_cut,
        **result.to_dict(),
    }


def run_eval(config: EvalConfig) -> EvalResult:
    """Load, sample, grade, write, show. ValueError for bad flags, NonFiniteError for NaN."""
    reuse_memory()
    # 1. The problems first: they are quick to refuse, before a model is loaded.
    task = config.task.make()
    problems = choose_problems(task, config.n)
    # 2. The model, as a sampler.
    device = pick_device(config.device)
    precision = config.precision(device)
    model, tokenizer, checkpoint = load_run(config.run, config.which, device, precision)
    out = output_path(config, checkpoint)
    check_result_path(str(out), config.inputs)
    sampler = ModelSampler(
        model,
        tokenizer,
        config.max_new_tokens,
        config.temperature,
        config.seed,
        cut_prompts=True,
        chat=config.task.chat,
    )
    say_if_plain("eval", tokenizer, config.task.chat)
    sampler.check([task.prompt(problem) for problem in problems])
    # 3. Sample and grade. The responses take the place of earlier ones when all are there.
    ks = config.ks or sorted({1, config.samples})
    result = evaluate(sampler, task, problems, config.samples, ks, out, config.batch)
    # 4. Keep what came out, and then say it.
    record = summary_of(config, checkpoint, result, out, sampler.n_cut)
    record["lines_skipped"] = task.lines_skipped
    atomic_write_json(summary_path(out), record)
    show(f"{checkpoint.path}\n{result.table()}")
    if message := sampler.cut_message():
        say(f"r1zero eval: warning: {message}")
    show(f"responses: {out}")
    return result
