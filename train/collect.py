"""Sample answers of a model, keep the good ones, and write them as data.

    r1zero collect --run runs/rl --out pairs.jsonl --problems 1000 --samples 8 --per-problem 2
    r1zero sft     --run runs/sft --base runs/base --data pairs.jsonl

    r1zero collect --run runs/sft --out rankings.jsonl --rank --samples 6
    r1zero reward-model --run runs/rm --base runs/sft --data rankings.jsonl

    r1zero collect --run runs/sft --out steps.jsonl --keep all --label-steps 8
    r1zero process-reward --run runs/prm --base runs/sft --data steps.jsonl

It serves R1's cold start and rejection sampling, distillation, RAFT, the rankings of a reward model
and the steps of a process reward (step_labels.py). Each line is a pair of prompt and response with
where it is from: model, weights, problem, seed, number of the sample, reward. `<out>.summary.json`
has the flags, how many answers were kept by the difficulty of the problem, why the others were
dropped, and the cost.

The seed of a sample is a function of (--seed, index of the problem, number of the sample). All
samples go to `<out>.partial` first, and are graded and chosen when they are complete. So after
Ctrl-C or a crash `--resume` goes on, with other filters too, and on a CPU leaves the same file.

With --chat a line holds the question without its template, as `r1zero sft --chat` reads it.
Rankings and steps go without --chat, since reward models know no template.

Left out: samples of several models in one file (mix the files by weight, see mixture.py), and two
writers of one file at the same time.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..eval.console import Bar, say, show
from ..eval.response import Sample, has_language
from ..eval.result_file import (
    check_result_path,
    fingerprint,
    is_stream,
    partial_path,
    summary_path,
    target_of,
)
from ..eval.sampler import ModelSampler
from ..eval.tasks.base import SPLITS, Task
from ..model.chat_template import encode_problems
from ..model.checkpoint import Checkpoint
from ..model.files import atomic_write_json, atomic_write_text
from ..rl.rewards import RewardConfig, check_no_model, check_parts
from .acceptance import Tally
from .answers import Answer, Judge
from .checks import check_temperature
from .cli.eval import load_run, say_if_plain
from .compute_flags import ComputeFlags
from .inputs import Inputs, base_parts, changes_of, plugin_parts, task_parts
from .interrupt import Interrupt, Stopped
from .machine import pick_device, reuse_memory
from .rollout_log import fields_of
from .run import at_least, read_record
from .sample_file import SampleFile
from .selection import RankedSelection, Selection, SelectionFlags, ranks_of
from .settings import as_json, settings_of, with_defaults
from .step_labels import StepLabels
from .task_flags import TaskFlags

# Flags that say where or how fast, and change no line.
ASIDE = ("run", "which", "out", "resume", "batch", "device")


@dataclass(frozen=True, kw_only=True)
class CollectConfig(SelectionFlags, ComputeFlags):
    """Sample answers of a model, keep the good ones, and write them as data for fine-tuning."""

    # What may change on resume: what is done with the samples, and how fast they are made. The
    # model is compared by its weights, the problems by their prompts.
    FREE: ClassVar[tuple[str, ...]] = (
        *(each.name for each in fields(SelectionFlags)),
        *(*ASIDE, "problems", "rewards"),
    )
    PATHS: ClassVar[tuple[str, ...]] = ("task.data", "task.skip_bad")

    run: str
    """Folder of the run, of a checkpoint, or of a Hugging Face model."""
    which: str = "last"
    """Which checkpoint of the run to load: last, best, or a step number."""
    task: TaskFlags = field(default_factory=TaskFlags)
    split: str = "train"
    """Which problems to take: train or test. Whoever trains on test problems has no test left."""
    start: int = 0
    """Index of the first problem."""
    problems: int = 512
    """Number of problems."""
    samples: int = 4
    """Number of answers sampled per problem."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    max_new_tokens: int = 160
    """Maximum number of new tokens per answer."""
    out: str
    """File for the lines; the summary goes beside it, with .summary.json behind the same name.
    Missing folders are made."""
    resume: bool = False
    """Go on with the samples that a broken-off call has left in the .partial file."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    batch: int = 64
    """Number of problems sampled at one time. Changes memory and speed, not the result."""
    seed: int = 0
    """Seed of the random numbers for sampling."""
    device: str = "auto"
    """Device to compute on: auto (a CUDA GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        ComputeFlags.__post_init__(self)
        SelectionFlags.__post_init__(self)
        at_least(self, 1, "problems", "samples", "batch", "max_new_tokens")
        at_least(self, 0, "start")
        check_temperature(self.temperature)
        if self.split not in SPLITS:
            raise ValueError(f"--split is {self.split!r}, expected {' or '.join(SPLITS)}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"--temperature 0 gives one answer, and --samples is {self.samples}; give 1"
            )
        if self.temperature == 0 and (self.label_steps or 0) > 1:
            raise ValueError(
                f"--temperature 0 gives one completion, and --label-steps is {self.label_steps}; "
                "give 1"
            )
        if self.rank and self.samples < 2:
            raise ValueError(f"--rank compares answers, and --samples is {self.samples}; give 4")
        if is_stream(self.out):
            raise ValueError(f"--out {self.out} is a device or a pipe; give a file")
        check_result_path(self.out, self.task.files)


# ---- problems ----


def choose_problems(config: CollectConfig, task: Task) -> list[Any]:
    """The problems from --start on. Raises ValueError if there are fewer."""
    size, end = task.size(config.split), config.start + config.problems
    if size is not None and end > size:
        raise ValueError(
            f"--start {config.start} and --problems {config.problems} ask for {end} problems, but "
            f"{task.name} has {size} different {config.split} problems; ask for at most that many"
        )
    return task.problems(config.split, config.problems, config.start)


def check_task(config: CollectConfig, task: Task) -> None:
    """Raise ValueError for a filter or a part of the reward that the task or `collect` does not
    have."""
    check_no_model(config.rewards, "collect")
    check_parts(task, config.rewards)
    if config.task.chat and (config.rank or config.label_steps is not None):
        raise ValueError(
            f"--chat with {'--rank' if config.rank else '--label-steps'}: a reward model and a "
            "process reward read prompts without a chat template, so they would learn on other "
            "prompts than are sampled behind; leave out --chat"
        )
    if config.min_language > 0 and not has_language(task):
        raise ValueError(
            f"--min-language is {config.min_language:g}, but the task {task.name} does not tell "
            "languages apart; leave it out"
        )
    if config.label_steps is not None and getattr(task, "step_ends", None) is None:
        raise ValueError(
            f"--label-steps is given, but the task {task.name} does not say where the steps of an "
            "answer end; leave it out"
        )


def check_room(config: CollectConfig, sampler: ModelSampler, prompts: list[str]) -> None:
    """Raise ValueError for a prompt that cannot be encoded, or leaves no room for an answer."""
    encoded = encode_problems(sampler.tokenizer, prompts, config.task.chat)
    for index, ids in enumerate(encoded, config.start):
        if len(ids) > sampler.room:
            limit = sampler.room + config.max_new_tokens
            raise ValueError(
                f"problem {index} has {len(ids)} tokens, and a max_seq_len of {limit} leaves "
                f"{sampler.room} beside {config.max_new_tokens} new ones; lower --max-new-tokens, "
                "or leave the problem out"
            )


# ---- sampling ----


def sample_problems(
    config: CollectConfig, sampler: ModelSampler, prompts: list[str], file: SampleFile
) -> None:
    """Sample all problems that the file does not hold yet, batch by batch.

    Raises Stopped after a signal, when the batch is in the file.
    """
    n = len(prompts)
    with Interrupt() as interrupt, Bar(total=n, desc="sampling", unit="problem") as bar:
        bar.update(file.n_problems)
        for start in range(file.n_problems, n, config.batch):
            chunk = prompts[start : start + config.batch]
            file.append(sample_batch(sampler, chunk, config.start + start, config.samples))
            bar.update(len(chunk))
            if interrupt.requested and file.n_problems < n:
                raise Stopped(
                    interrupt.number,
                    f"stopped: the samples of {file.n_problems:,} of {n:,} problems are in "
                    f"{file.path}; go on with --resume and the same flags",
                )


def sample_batch(
    sampler: ModelSampler, prompts: list[str], first: int, n_samples: int
) -> list[dict]:
    """The samples of some problems, as the file has them. first: the index of the first problem."""
    # The seed of a sample follows from its problem's index, wherever this call began.
    sampler.n_prompts = first
    began = time.perf_counter()
    groups = sampler(prompts, n_samples)
    seconds = (time.perf_counter() - began) / len(prompts)
    return [
        {
            "index": index,
            "prompt": prompt,
            "seconds": seconds,
            "responses": [
                {"text": each.text, "tokens": each.tokens, "finish_reason": each.finish_reason}
                for each in group
            ],
        }
        for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True), first)
    ]


# ---- choosing, and lines ----


def samples_of(problem: Any, group: dict) -> list[Sample]:
    """The samples of a problem as graders take them."""
    return [
        Sample(problem, response["text"], response["tokens"], response["finish_reason"])
        for response in group["responses"]
    ]


def source_of(config: CollectConfig, task: Task, checkpoint: Checkpoint, weights: str) -> dict:
    """What all lines share: where their answers are from. weights: the fingerprint of these."""
    return {
        "task": task.name,
        "split": config.split,
        "seed": config.seed,
        "temperature": config.temperature,
        "model": str(checkpoint.path),
        "step": checkpoint.step,
        "weights": weights,
    }


def pair_lines(prompt: str, answers: list[Answer], source: dict) -> list[dict]:
    """A line per answer, as `r1zero sft` reads it; source: what they share."""
    return [
        {
            "prompt": prompt,
            "response": answer.sample.text,
            **source,
            "sample": answer.number,
            "n_tokens": answer.n_tokens,
            "finish_reason": answer.sample.finish_reason,
            "parts": answer.parts,
            "reward": answer.reward,
            "language": answer.language,
            "repetition": answer.repetition,
        }
        for answer in answers
    ]


def ranking_lines(prompt: str, answers: list[Answer], source: dict) -> list[dict]:
    """One line for all answers, as `r1zero reward-model` reads it; none for no answers."""
    if not answers:
        return []
    rewards = [answer.reward for answer in answers]
    line = {
        "prompt": prompt,
        "answers": [answer.sample.text for answer in answers],
        "ranks": ranks_of(rewards),
        "scores": rewards,
        "right": [answer.right for answer in answers],
        **source,
        "samples": [answer.number for answer in answers],
        "n_tokens": [answer.n_tokens for answer in answers],
        "parts": [answer.parts for answer in answers],
    }
    return [line]


def choose_lines(
    config: CollectConfig,
    task: Task,
    problems: list[Any],
    file: SampleFile,
    source: dict,
    lines_of: Callable[[str, list[Answer], dict], list[dict]],
) -> tuple[list[dict], Tally]:
    """Grade the samples and choose among them: the lines of all problems in order, the counts.
    Raises Stopped after a signal.

    lines_of: from (prompt, answers, source) to the lines of a problem.
    """
    judge_group = Judge(task, config.rewards)
    tally = Tally(RankedSelection() if config.rank else Selection(config))
    lines = []
    groups = zip(problems, file.groups(), strict=False)  # the file may hold more problems
    with Interrupt() as interrupt:
        for problem, group in Bar(groups, total=len(problems), desc="grading", unit="problem"):
            answers = judge_group(samples_of(problem, group))
            kept = tally.choose(group["prompt"], answers, group["seconds"])
            where = {"problem": fields_of(problem), "index": group["index"]}
            lines += lines_of(group["prompt"], kept, source | where)
            if interrupt.requested:
                raise Stopped(
                    interrupt.number,
                    f"stopped: all samples are in {file.path}; go on with --resume and the same "
                    "flags",
                )
    return lines, tally


# ---- the command ----


def whole_already(config: CollectConfig, source: dict, graders: Inputs) -> dict | None:
    """The summary of a call like this one that has come to its end, if --resume asks for that.
    graders: what grades its answers.

    Raises ValueError if it had other flags, another model, or was graded by something else.
    """
    record = read_record(summary_path(config.out))
    out = target_of(config.out)
    is_whole = out.exists() and record.get("lines") == lines_of_file(out)
    if not config.resume or partial_path(config.out).exists() or not is_whole:
        return None
    now = as_json(asdict(config))
    then = with_defaults(record["flags"], now, config)
    names = [name for name in now if name not in ASIDE and then.get(name) != now[name]]
    if record["weights"] != source["weights"]:
        names.append("run")
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(
            f"{config.out} is whole, and was made with another {flags}; leave out --resume to make "
            "it anew, or give another --out"
        )
    if changes := changes_of(record.get("graders", {}), graders):
        raise ValueError(
            f"{config.out} is whole, and what grades its answers has changed since: {changes}; "
            "leave out --resume to make it anew, or give another --out"
        )
    return record


def lines_of_file(out: Path) -> dict:
    """What tells whether a summary is of these lines."""
    return {"file": out.name, **fingerprint(out)}


def collect(config: CollectConfig) -> dict:
    """Sample, grade, choose, write, show; returns what the summary holds.

    Raises ValueError for bad flags, and if no answer is kept; Stopped after Ctrl-C. Either leaves
    the samples for --resume.
    """
    reuse_memory()
    # 1. The problems first: they are quick to refuse, before a model is loaded.
    task = config.task.make()
    check_task(config, task)
    problems = choose_problems(config, task)
    prompts = [task.prompt(problem) for problem in problems]
    config.rewards.try_plugin(problems[0], config.samples)

    # 2. The model, as a sampler.
    device = pick_device(config.device)
    precision = config.precision(device)
    model, tokenizer, checkpoint = load_run(config.run, config.which, device, precision)
    sampler = ModelSampler(
        model,
        tokenizer,
        config.max_new_tokens,
        config.temperature,
        config.seed,
        chat=config.task.chat,
    )
    say_if_plain("collect", tokenizer, config.task.chat)
    check_room(config, sampler, prompts)
    model_parts = base_parts(checkpoint, tokenizer)
    source = source_of(config, task, checkpoint, dict(model_parts)["weights"])
    problem_inputs = task_parts(config.task)
    graders = problem_inputs | plugin_parts(config.rewards.plugin)
    if record := whole_already(config, source, graders):
        say(f"nothing to do: {config.out} is whole; without --resume it is made anew")
        return record

    # 3. Sample what the file of samples does not hold yet.
    header = {
        "settings": settings_of(config, set()),
        "inputs": {"model": model_parts},
    }
    file = SampleFile(config.out)
    file.open(config, header, prompts)
    sample_problems(config, sampler, prompts, file)

    # 4. Grade them, and choose.
    labels = None
    lines_of = ranking_lines if config.rank else pair_lines
    if config.label_steps is not None:
        labels = StepLabels(task, sampler, config.label_steps, file.step_labels, problem_inputs)
        lines_of = labels.lines
    lines, tally = choose_lines(config, task, problems, file, source, lines_of)
    title = f"{task.name}: {len(problems):,} {config.split} problems x {config.samples} samples"
    table = f"{checkpoint.path}\n{title}\n{tally.table()}"
    if not lines:
        show(table)
        raise ValueError(
            f"nothing is kept, so {config.out} is not written; the samples are in {file.path}, and "
            "--resume with other filters takes them from there"
        )

    # 5. Keep what came out, and then say it.
    out = target_of(config.out)
    atomic_write_text(out, "".join(json.dumps(line) + "\n" for line in lines))
    record = {
        **source,
        "flags": asdict(config),
        "graders": graders,
        "lines": lines_of_file(out),
        **tally.to_dict(),
    }
    if labels is not None:
        record["labels"] = labels.to_dict()
        table = f"{table}\n{labels.table()}"
    atomic_write_json(summary_path(config.out), record)
    file.remove()
    show(f"{table}\nlines: {config.out}")
    return record
