"""Weights & Biases: the metrics of metrics.jsonl there too, when --wandb asks for it.

Only its start can stop a run: a missing login is told at once, before anything is computed. After
that it informs, and a failure is told once. A resumed run continues its wandb run; its id is in the
file `wandb_id` of the run's folder. WANDB_MODE=offline and wandb's other variables work as usual.
GRPO sends a small table of one kept group there too, now and then; none with --keep-rollouts 0.
"""

from collections.abc import Sequence
from pathlib import Path

from ..eval.console import say
from ..model.files import atomic_write_text
from .report.step_page import advantage_of, by_group

# Of the table of samples.
COLUMNS = ("prompt", "response", "reward", "advantage", "finish_reason", "why", "tokens")
MEND = "log in (wandb login), set WANDB_MODE=offline, or leave --wandb out"


def table_rows(samples: Sequence[dict]) -> list[list]:
    """The first group of a step that teaches something (or the first of all), best answer first."""
    groups = list(by_group(samples).values())
    group = next((group for group in groups if any(map(advantage_of, group))), groups[0])
    return [[*(sample[name] for name in COLUMNS[:-1]), len(sample["tokens"])] for sample in group]


class NoWandb:
    """Logs nothing."""

    def log(self, metrics: dict, step: int, samples: Sequence[dict] = ()) -> None:
        pass

    def finish(self, failed: bool) -> None:
        pass


class WandbLog:
    """One wandb run."""

    def __init__(self, folder: Path, settings: dict, is_resumed: bool):
        """Start the wandb run, or continue the one of the folder.

        Raises ValueError, in one line, if wandb is missing or cannot start.
        """
        try:
            import wandb  # takes a second to import, so only when asked
        except ImportError as error:
            raise ValueError(
                f"--wandb needs the package wandb ({error}): pip install wandb, or leave it out"
            ) from None

        id_file = folder / "wandb_id"
        former = id_file.read_text().strip() if is_resumed and id_file.exists() else None
        try:
            self._run = wandb.init(
                project="r1zero",
                name=folder.resolve().name,
                config=settings,
                dir=str(folder),
                id=former,
                resume="allow",
            )
        except Exception as error:  # wandb raises many kinds; none is a fault of the run
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ValueError(f"--wandb: wandb cannot start: {reason}; {MEND}") from error
        if self._run.id != former:
            atomic_write_text(id_file, f"{self._run.id}\n")
        self._wandb = wandb
        self._works = True

    def log(self, metrics: dict, step: int, samples: Sequence[dict] = ()) -> None:
        """samples: of the step, as rollout_log.py keeps them; one group becomes a table."""
        if not self._works:
            return
        try:
            if samples:
                table = self._wandb.Table(columns=list(COLUMNS), data=table_rows(samples))
                metrics = metrics | {"samples": table}
            self._run.log(metrics, step=step)
        except Exception as error:
            self._works = False
            say(f"wandb failed ({error}); the run goes on without it, metrics.jsonl has all rows")

    def finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            say(f"wandb could not finish ({error}); `wandb sync` sends what it has kept")
