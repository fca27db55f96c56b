"""What was measured of models, as tables: from the files that `r1zero eval`, reward models and
recipes leave in their folders.

A share stands with its 95 % interval, or not at all. What an older or an edited file lacks is left
out.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...model.checkpoint import Checkpoint
from ..cost import DASH, RECORD, RESULTS, SUMMARIES, places_of, stage_name
from .record import dig, finite, read_dict
from .run_in_words import folder_of

LAYERS = ("stages", "eval")  # names in a file of results that say nothing to a reader
ASIDE = ("config", "machine", "seconds")  # parts of such a file that are no results


def markdown(rows: list[list[str]]) -> list[str]:
    """Rows of text as a table; the first has the heads."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


# ---- by r1zero eval ----


def row_of(summary: dict) -> str:
    """A summary as a row of the table. Raises KeyError, TypeError or ValueError for another file's
    content."""
    low, high = summary["accuracy_95"]
    return (
        f"| {summary['task']} | {summary['accuracy']:.1%} [{low:.1%}, {high:.1%}] "
        f"| {summary['n_problems']} | {summary['n_samples']} "
        f"| {summary['flags']['temperature']} | {summary['truncated']:.1%} |"
    )


def measured(checkpoint: Checkpoint) -> list[str]:
    """Lines of a table of what `r1zero eval` measured of this checkpoint; empty if nothing."""
    rows = []
    for path in sorted(folder_of(checkpoint).glob(SUMMARIES)):
        summary = read_dict(path)
        is_of_this = Path(str(summary.get("checkpoint"))).name == checkpoint.path.name
        # An older or edited summary may lack a number: then it is no row.
        if is_of_this:
            with suppress(KeyError, TypeError, ValueError):
                rows.append(row_of(summary))
    if not rows:
        return []
    head = "| task | pass@1 [95 %] | problems | samples each | temperature | cut off |"
    return [head, "|---|---|---|---|---|---|", *rows]


# ---- by a recipe ----


class Share(NamedTuple):
    """A share with its interval, somewhere in a file of results."""

    path: tuple[str, ...]
    """The names on the way to it."""
    mean: float
    low: float
    high: float
    problems: str
    """What it was measured on, as far as the file says."""

    @property
    def names(self) -> tuple[str, str]:
        """(the model, what was measured of it)."""
        model, *words = [name for name in self.path if name not in LAYERS] or self.path
        return model, " ".join(words).replace("_", " ")

    @property
    def cell(self) -> str:
        return f"{self.mean:.1%} [{self.low:.1%}, {self.high:.1%}]"


def shares_in(found: dict, path: tuple[str, ...] = ()) -> Iterator[Share]:
    """Every share with an interval: a list of the three numbers; or a number, with a list of the
    two ends under the same name and _95; or a dict of such, by the number of samples."""
    counts = [found.get(name) for name in ("n_problems", "n_samples")]
    problems = DASH if None in counts else f"{counts[0]} x {counts[1]} answers"
    for name, value in found.items():
        ends = found.get(f"{name}_95")
        if isinstance(value, dict) and isinstance(ends, dict):
            # Of one sample it is the accuracy again.
            several = {k: with_ends(share, ends.get(k)) for k, share in value.items() if k != "1"}
            yield from shares_of(several, (*path, name), problems)
        elif isinstance(value, dict):
            yield from shares_in(value, (*path, name))
        else:
            yield from shares_of({name: with_ends(value, ends)}, path, problems)


def with_ends(value, ends):
    """A number and the ends of its interval as one list; without ends, what it is."""
    return [value, *ends] if isinstance(ends, list) else value


def shares_of(named: dict, path: tuple[str, ...], problems: str) -> Iterator[Share]:
    """Those of some values that are three numbers: a share, and an interval around it."""
    for name, numbers in named.items():
        if not isinstance(numbers, list) or len(numbers) != 3 or None in map(finite, numbers):
            continue
        mean, low, high = numbers
        if 0 <= low <= mean <= high <= 1:
            yield Share((*path, name), mean, low, high, problems)


def shares_table(results: dict) -> list[str]:
    """Lines of a table of the shares in a results.json, a row per model and a column per measure;
    empty if there are none."""
    cells: dict[str, dict[str, str]] = {}
    problems: dict[str, str] = {}
    shown = {name: value for name, value in results.items() if name not in ASIDE}
    for share in shares_in(shown):
        model, measure = share.names
        cells.setdefault(model, {})[measure] = share.cell
        if share.problems != DASH:
            problems[model] = share.problems
    if not cells:
        return []
    measures = list(dict.fromkeys(name for row in cells.values() for name in row))
    if problems:  # what was measured on comes last
        measures.append("problems")
        cells = {
            model: row | {"problems": problems.get(model, DASH)} for model, row in cells.items()
        }
    rows = [[model, *(row.get(name, DASH) for name in measures)] for model, row in cells.items()]
    return markdown([["model", *measures], *rows])


# ---- by a recipe that measures policies at several distances from where they began ----


def points_table(results: dict) -> list[str]:
    """Lines of a table of the last point of each policy in the `points` of a results.json, as
    `r1zero recipe chatgpt` writes it; empty if there are none."""
    points = results.get("points")
    rows = []
    for model, known in points.items() if isinstance(points, dict) else ():
        if not isinstance(known, list) or not known:
            continue
        wins, liked, kl = (dig(known[-1], name) for name in ("wins", "hidden", "kl"))
        won = [share.cell for share in shares_of({model: wins}, (), DASH)]
        distance = DASH if finite(kl) is None else f"{kl:.2f}"
        rows.append([model, *(won or [DASH]), mean_with_ends(liked), distance])
    if not rows:
        return []
    heads = [
        "model",
        "liked better than where it began",
        "hidden preference",
        "KL, nats per answer",
    ]
    return markdown([heads, *rows])


def mean_with_ends(numbers) -> str:
    """1.28 [0.46, 2.10], of a mean and the ends of its interval; a dash for anything else."""
    if not isinstance(numbers, list) or len(numbers) != 3 or None in map(finite, numbers):
        return DASH
    mean, low, high = numbers
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def results_in(root: Path, runs: list[Path]) -> dict[str, dict]:
    """The results.json of a recipe and of its seeds, by the name of the folder."""
    folders = places_of(root, runs)
    found = {stage_name(folder, root): read_dict(folder / RESULTS) for folder in folders}
    return {name: results for name, results in found.items() if results}


def measurements(root: Path, runs: dict[str, Checkpoint]) -> list[str]:
    """Everything that was measured, table after table."""
    lines: list[str] = []
    for name, checkpoint in runs.items():
        if table := measured(checkpoint):
            lines += [f"`{name}`, step {checkpoint.step}, by `r1zero eval`:", "", *table, ""]
        shares = dig(read_dict(folder_of(checkpoint) / RECORD), "reward_model", "shares")
        if shares and (table := shares_table({name: shares})):
            lines += ["How often the reward model agrees on held-out prompts:", "", *table, ""]
        judged = dig(read_dict(folder_of(checkpoint) / RECORD), "process_reward", "measured")
        if judged and (table := shares_table({name: judged})):
            lines += ["How well the process reward judges held-out answers:", "", *table, ""]
        score = checkpoint.state.get("score")
        if score is not None:
            lines += [f"`{name}` on held-out problems during the run (pass@1): {score:.1%}", ""]
    for name, results in results_in(root, list(map(folder_of, runs.values()))).items():
        for table in filter(None, (shares_table(results), points_table(results))):
            lines += [f"By the results of `{name}`:", "", *table, ""]
    return lines
