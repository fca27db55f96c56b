"""What recipes share: a stage is an ordinary run, begun, resumed or done, and results.json.

    stages    Stage, run_stage, run_part, part_done
    checks    what is refused before anything is made
    results   PartResults: what was measured, the seconds, the tokens

A recipe (demo.py, r1.py, distill.py, chatgpt.py, minimal.py, open_models.py) is a list of such
stages, each in a folder of its own. So Ctrl-C and --resume work throughout, and who resumes with
other flags is told by the stage that they are for.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...eval.result_file import partial_path
from ...eval.tasks.base import Task
from ...model.checkpoint import checkpoint_steps
from ...model.files import atomic_write_json
from ..collect import collect
from ..fit_head import on_test_side
from ..report.record import read_dict, read_lines, read_or_empty
from ..run import Run, RunConfig

# ---- stages ----


class Stage(NamedTuple):
    """One stage: a loop and its configuration."""

    name: str
    """Of its folder, or of the file that it writes."""
    loop: Callable
    config: Any


def part_done(folder: Path, steps: int) -> bool:
    """Whether a part's run has reached and saved its last step."""
    # The log does not show it: it has the line of a step a moment before the step is saved.
    saved = checkpoint_steps(folder)
    return bool(saved) and saved[-1] >= steps


def run_part(loop: Callable, config: RunConfig) -> float:
    """Run a part to its end, whether it was begun or not; returns the seconds that it took now.

    Raises Stopped after Ctrl-C.
    """
    started = time.perf_counter()
    folder = Path(config.run)
    if not part_done(folder, config.steps):
        loop(replace(config, resume=bool(checkpoint_steps(folder))))
    return time.perf_counter() - started


def run_stage(stage: Stage) -> float:
    """Run a stage to its end, whether it was begun or not; returns the seconds that it took now.

    Raises Stopped after Ctrl-C.
    """
    if stage.loop is not collect:
        return run_part(stage.loop, stage.config)
    started = time.perf_counter()
    # What is whole is not made again, but its flags are compared.
    out = Path(stage.config.out)
    collect(replace(stage.config, resume=out.exists() or partial_path(out).exists()))
    return time.perf_counter() - started


# ---- what is refused before anything is made ----


def check_not_begun(folder: Path, resume: bool) -> None:
    """Raise ValueError for a folder that holds a recipe, unless that is to be resumed.

    As with a run, the first checkpoint begins it: before, a corrected command may go on.
    """
    if any(folder.glob("*/checkpoints/step_*")) and not resume:
        raise ValueError(
            f"{folder} holds a recipe already; add --resume to go on with it, or give another --run"
        )


def check_part(config: RunConfig) -> None:
    """Raise CheckpointError if a part was begun with other settings. Nothing is written."""
    if checkpoint_steps(Path(config.run)):
        Run(replace(config, resume=True), "")


def check_room(max_new_tokens: int, room: int, whose: str) -> None:
    """Raise ValueError if a model has no room for answers of that length. whose: the model's."""
    if max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, but {whose} has room for {room} beside a "
            "problem; expected no more"
        )


def check_size(flag: str, n: int, task: Task, split: str) -> None:
    """Raise ValueError if a split has fewer than the n problems that a flag asks for."""
    size = task.size(split)
    if size is not None and n > size:
        raise ValueError(
            f"{flag} asks for {n:,} problems, but {task.name} with these options has {size:,} "
            f"different {split} problems; lower it, or let the task have more"
        )


def enough_to_split(prompts: Iterable[str], share: float) -> int | None:
    """How many of the prompts a reward model needs, so that one is held out, and one is not; None
    if all of them are too few. share: of the prompts that are held out."""
    sides = set()
    for number, prompt in enumerate(prompts, 1):
        sides.add(on_test_side(prompt, share))
        if len(sides) == 2:
            return number
    return None


# ---- results ----


class PartResults:
    """results.json of a recipe: what was measured, and the seconds that each part took."""

    def __init__(self, folder: Path, first_values: dict):
        """first_values: what the file holds before anything is measured.

        Raises ValueError for a file that is torn.
        """
        self.path = folder / "results.json"
        self.values: dict = {"seconds": {}, **first_values}
        if self.path.exists():
            self.values = read_dict(self.path)
            if not self.values:
                raise ValueError(
                    f"{self.path} is torn: it is no JSON object; restore it, or remove it, and "
                    "what it held is measured again"
                )

    def write(self) -> None:
        atomic_write_json(self.path, self.values)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to the time of a part, which may have been stopped and resumed."""
        total = self.values["seconds"].get(name, 0.0) + seconds
        self.values["seconds"][name] = total
        self.write()

    def add_sampled(self, name: str, model: str, n_tokens: int, n_answers: int) -> None:
        """Add to what a model has written for a part that leaves no summary of its own. model: its
        folder."""
        noted = self.values.setdefault("sampled", {})
        then = noted.get(name, {"tokens": 0, "answers": 0})
        tokens, answers = then["tokens"] + n_tokens, then["answers"] + n_answers
        noted[name] = {"model": model, "tokens": tokens, "answers": answers}
        self.write()


def answers_path(folder: Path, name: str) -> Path:
    """Where the answers of a stage to the held-out problems are."""
    return folder / f"eval_{name}.jsonl"


def has_answers(path: Path) -> bool:
    """Whether the answers of an evaluation are there. Raises ValueError for a file that is torn."""
    if not path.exists():
        return False
    n_whole, n_lines = len(read_lines(path)), len(read_or_empty(path).splitlines())
    if not n_whole or n_whole < n_lines:
        raise ValueError(
            f"{path} is torn: {n_whole:,} of its {n_lines:,} lines are JSON objects; remove it, "
            "and --resume makes it anew"
        )
    return True
