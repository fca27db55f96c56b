"""What a run or a whole recipe has cost: seconds, tokens, FLOPs, and money at a price per hour.

    cost = cost_of("runs/r1", price=2.5)
    print(cost.table())

A stage is a run of a loop, a collection or an evaluation: run.json and metrics.jsonl tell of the
first, *.summary.json of the others. In the folder of a recipe all of them count, and the seconds
that its results.json has of what left no record of its own, such as its measuring.

FLOPs are those of the model's matrix products (model/transformer.py): a forward pass for each token
that was sampled, three for each that was trained on, and two where only adapters are trained.

Left out of the FLOPs: prompts, which are read once per group; the reference, a critic, and a reward
model that judges; attention in pretrain, sft and reward-model, whose log has no length of the
sequences. Left out of all: steps that a resumed run did twice, measurements during a run, and a
base from elsewhere.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..model.checkpoint import Checkpoint, CheckpointError, checkpoint_steps, load_checkpoint
from ..model.config import ModelConfig
from ..model.transformer import flops_per_token
from .log import read_metrics
from .report.record import dig, finite, read_dict

RECORD, RESULTS, SUMMARIES = "run.json", "results.json", "*.summary.json"
DEPTHS = ("*", "*/*")  # where a recipe has its runs; the demo has a folder per seed
DASH = "-"


@dataclass(frozen=True)
class StageCost:
    """What one stage has cost."""

    name: str
    """Of its folder or file, relative to that of the recipe."""
    loop: str
    """pretrain, sft, reward-model, grpo, collect, eval or measuring."""
    seconds: float | None
    """None if nobody has noted them."""
    sampled_tokens: int | None = 0
    """None if nobody has counted them."""
    trained_tokens: int = 0
    flops: float | None = 0.0
    """None if the shape of the model is not known."""


@dataclass(frozen=True)
class Cost:
    """What all stages have cost."""

    stages: tuple[StageCost, ...]
    price: float = 0.0
    """Of the machine, per hour."""

    def sum_of(self, name: str) -> float:
        """The sum over the stages of which the number is known."""
        return sum(getattr(stage, name) or 0 for stage in self.stages)

    @property
    def money(self) -> float:
        return self.sum_of("seconds") / 3600 * self.price

    def lacks(self, name: str) -> list[str]:
        """The names of the stages of which a number is not known."""
        return [stage.name for stage in self.stages if getattr(stage, name) is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        names = ("seconds", "sampled_tokens", "trained_tokens", "flops")
        total = {name: self.sum_of(name) for name in names}
        stages = [asdict(stage) for stage in self.stages]
        return {"stages": stages, "total": total | {"money": self.money, "price": self.price}}

    def rows(self) -> list[list[str]]:
        """A table as text: the heads, a row per stage, and the total where there are several."""
        whole = StageCost(
            "total",
            "",
            self.sum_of("seconds"),
            int(self.sum_of("sampled_tokens")),
            int(self.sum_of("trained_tokens")),
            self.sum_of("flops"),
        )
        stages = [*self.stages, whole] if len(self.stages) > 1 else self.stages
        heads = ["stage", "by", "seconds", "tokens sampled", "tokens trained", "FLOPs"]
        rows = [heads, *(cells(stage) for stage in stages)]
        if self.price:
            for row, stage in zip(rows, [None, *stages], strict=True):
                row.append("cost" if stage is None else money_of(stage.seconds, self.price))
        return rows

    def table(self) -> str:
        """The rows, aligned for a terminal."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(aligned(row, widths) for row in rows)


def cells(stage: StageCost) -> list[str]:
    """A row of the table, without the cost."""
    return [
        stage.name,
        stage.loop,
        DASH if stage.seconds is None else f"{stage.seconds:,.1f}",
        DASH if stage.sampled_tokens is None else f"{stage.sampled_tokens:,}",
        f"{stage.trained_tokens:,}",
        DASH if stage.flops is None else f"{stage.flops:.2e}",
    ]


def money_of(seconds: float | None, price: float) -> str:
    return DASH if seconds is None else f"{seconds / 3600 * price:.4f}"


def aligned(row: list[str], widths: list[int]) -> str:
    """Two columns of words, and columns of numbers."""
    words = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*words, *numbers])


# ---- what is in a folder ----


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: one that was begun, and has a checkpoint."""
    return (folder / RECORD).is_file() and bool(checkpoint_steps(folder))


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, in the order in which they began; a run's own folder is the only one.

    Raises ValueError if there is none.
    """
    if is_run(folder):
        return [folder]
    records = [path for depth in DEPTHS for path in folder.glob(f"{depth}/{RECORD}")]
    found = [path.parent for path in records if is_run(path.parent)]
    if not found:
        raise ValueError(
            f"{folder} holds no run (a {RECORD} beside a checkpoint), and no folder in it does; "
            "give the folder of a run or of a recipe"
        )
    return sorted(found, key=lambda run: (first_start(run), run))


def places_of(root: Path, runs: list[Path]) -> list[Path]:
    """The folders with results of a recipe: its own, and those of its seeds."""
    return list(dict.fromkeys([root, *(run.parent for run in runs if run != root)]))


def first_start(run: Path) -> str:
    """When a run began."""
    record = read_dict(run / RECORD)
    starts = record.get("starts")
    first = starts[0] if isinstance(starts, list) and starts else record
    return str(dig(first, "started"))


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The last checkpoint of a run, without its tensors; None if none can be read."""
    with suppress(CheckpointError):
        return load_checkpoint(run, groups=())
    return None


# ---- one stage ----


def log_of(run: Path) -> list[dict]:
    """The rows of a run's log, none if there is no log."""
    with suppress(OSError):
        return read_metrics(run)
    return []


def sum_in(rows: list[dict], name: str) -> float:
    """The sum of a metric, over the rows that have it."""
    return sum(finite(row.get(name)) or 0.0 for row in rows)


def seconds_by_log(rows: list[dict]) -> float | None:
    """What the steps took, for a run whose run.json does not say: it is of an older version."""
    if not rows:
        return None
    if "step_s" in rows[-1]:
        return sum_in(rows, "step_s") + sum_in(rows, "keep_s")
    # The speed in the log is the mean since the process began.
    speed = finite(rows[-1].get("tokens_per_s"))
    return sum_in(rows, "tokens") / speed if speed else None


def flops_of(
    checkpoint: Checkpoint | None, sampled: int, trained: int, length: float
) -> float | None:
    """FLOPs of so many tokens, in sequences of mean length `length`."""
    shape = dig(checkpoint.state, "model_config") if checkpoint else None
    if shape is None:
        return None
    forward = flops_per_token(ModelConfig(**shape), length, training=False)
    # Backward takes two passes more, and one where the gradients of most weights are not needed.
    passes = 2 if checkpoint.state.get("lora") else 3
    return forward * (sampled + passes * trained)


def run_stage(run: Path, name: str) -> StageCost:
    """The cost of a run, by its own record and log."""
    checkpoint, rows = last_checkpoint(run), log_of(run)
    n_tokens = int(sum_in(rows, "tokens"))
    sampled, trained, length = 0, n_tokens, 0.0
    # A loop that samples counts what it has sampled, also what it has not trained on.
    if any("rollout_s" in row for row in rows):
        sampled, trained = n_tokens, n_tokens - int(sum_in(rows, "replaced_tokens"))
        length = sum_in(rows, "length") / len(rows)
    seconds = finite(read_dict(run / RECORD).get("seconds"))
    if seconds is None:
        seconds = seconds_by_log(rows)
    loop = checkpoint.state.get("loop", "training") if checkpoint else "training"
    flops = flops_of(checkpoint, sampled, trained, length)
    return StageCost(name, loop, seconds, sampled, trained, flops)


def eval_tokens(result: Any) -> int:
    """The tokens that an evaluation has sampled, 0 where it does not say."""
    counts = [finite(dig(result, name)) for name in ("n_problems", "n_samples", "mean_tokens")]
    return round(math.prod(counts)) if None not in counts else 0


def summary_stage(path: Path, name: str) -> StageCost | None:
    """The cost of a collection or an evaluation; None for a file that is neither's summary."""
    summary = read_dict(path)
    is_collection = "by_difficulty" in summary
    if not is_collection and "mean_tokens" not in summary:
        return None
    if is_collection:
        tokens = int(finite(summary.get("tokens")) or 0)
        length = tokens / max(1, finite(summary.get("sampled")) or 0)
        seconds, where = finite(summary.get("seconds")), summary.get("model")
        # What labels of steps took more: completions from the end of each step.
        more = [
            finite(dig(summary, "labels", f"completion_{name}")) for name in ("tokens", "seconds")
        ]
        tokens += int(more[0] or 0)
        seconds = seconds if seconds is None else seconds + (more[1] or 0.0)
    else:
        tokens, length = eval_tokens(summary), finite(summary["mean_tokens"]) or 0.0
        speed = finite(summary.get("tokens_per_second"))
        seconds, where = tokens / speed if speed else None, summary.get("checkpoint")
    flops = flops_of(model_near(path, Path(str(where))), tokens, 0, length)
    return StageCost(name, "collect" if is_collection else "eval", seconds, tokens, 0, flops)


def model_near(path: Path, checkpoint: Path) -> Checkpoint | None:
    """The checkpoint that a summary is of, or one of the same shape, as its folder may have been
    moved: of the run in whose folder it lies, where it was, or of the run beside it."""
    if is_run(path.parent):
        return last_checkpoint(path.parent)
    beside = path.parent / checkpoint.parent.parent.name
    return last_checkpoint(checkpoint if checkpoint.exists() else beside)


# ---- all stages ----


def stage_name(path: Path, root: Path) -> str:
    """What a stage is called, by its folder or its summary."""
    if path == root:
        return root.resolve().name
    name = path.relative_to(root).as_posix()
    return name.removesuffix(".summary.json").removesuffix(".jsonl")


def stages_at(place: Path, runs: list[Path], root: Path) -> list[StageCost]:
    """The stages of a recipe's folder, of a seed's, or of a run's. runs: those that are there."""
    # 1. The runs, and the summaries beside and in them.
    stages = [run_stage(run, stage_name(run, root)) for run in runs]
    folders = dict.fromkeys([place, *runs])
    summaries = [path for folder in folders for path in sorted(folder.glob(SUMMARIES))]
    found = [summary_stage(path, stage_name(path, root)) for path in summaries]
    stages += [stage for stage in found if stage]

    # 2. What the recipe has noted. Each of two notes may lack the time of a run that was stopped.
    results = read_dict(place / RESULTS)
    noted = results.get("seconds")
    if not isinstance(noted, dict):
        return stages
    ordered = []
    for key, seconds in noted.items():
        stage = find_stage(stages, key)
        if stage is None:
            name = stage_name(place / key, root)
            stage = measuring_stage(results, key, name, place)
        else:
            stages.remove(stage)
        known = [each for each in (stage.seconds, finite(seconds)) if each is not None]
        ordered.append(replace(stage, seconds=max(known, default=None)))
    return ordered + stages


def find_stage(stages: list[StageCost], key: str) -> StageCost | None:
    """The stage that a recipe means; the demo calls its base by what it does: pretrain."""
    named = [stage for stage in stages if stage.name.rpartition("/")[2] == key]
    by_loop = [stage for stage in stages if stage.loop == key]
    return next(iter([*named, *by_loop]), None)


def measuring_stage(results: dict, key: str, name: str, place: Path) -> StageCost:
    """Time that is no run's: of answers that were sampled, and judged or ranked. How many tokens
    they have, the recipe has counted, or an evaluation says."""
    # 1. What the recipe has counted (recipes/demo.py, PartResults.add_sampled).
    noted = dig(results, "sampled", key)
    counts = [finite(dig(noted, each)) for each in ("tokens", "answers")]
    if None not in counts:
        tokens, n_answers = counts
        model = Path(str(dig(noted, "model")))
        checkpoint = last_checkpoint(model if model.exists() else place / model.name)
        flops = flops_of(checkpoint, int(tokens), 0, tokens / max(1, n_answers))
        return StageCost(name, "measuring", None, int(tokens), 0, flops)

    # 2. An evaluation in results.json, as the demo has them. Nothing tells of anything else.
    part = key.removeprefix("eval_")
    result = dig(results, part, "eval")
    tokens, length = eval_tokens(result), finite(dig(result, "mean_tokens")) or 0.0
    if not tokens:
        return StageCost(name, "measuring", None, None, 0, None)
    flops = flops_of(last_checkpoint(place / part), tokens, 0, length)
    return StageCost(name, "measuring", None, tokens, 0, flops)


def cost_of(folder: str | Path, price: float = 0.0) -> Cost:
    """What the run or the recipe in a folder has cost. price: of the machine, per hour.

    Raises ValueError for a folder without a run, and for a price that is no number of 0 or more.
    """
    if not 0 <= price < math.inf:
        raise ValueError(f"--price is {price}, expected a number of 0 or more, per hour")
    root = Path(folder)
    runs = runs_in(root)
    stages = []
    for place in places_of(root, runs):
        stages += stages_at(place, [run for run in runs if place in (run, run.parent)], root)
    return Cost(tuple(stages), price)
