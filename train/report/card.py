"""A model card: what was trained and how, what was measured, what it cost, and what is not known.

    card_of("runs/rl", price=2.5)      of a run
    card_of("runs/r1")                 of a recipe, whose runs have a section each

It holds what the folder says, and nothing else: checkpoints and logs, what `r1zero eval` measured,
and the results.json of a recipe. The same folder gives the same card. `r1zero export` writes a card
of the same pieces.
"""

from collections.abc import Iterator
from pathlib import Path

from ...model.checkpoint import Checkpoint, load_checkpoint
from ...model.config import ModelConfig
from ...model.transformer import count_active_parameters, count_parameters
from ..cost import RECORD, SUMMARIES, Cost, cost_of, places_of, runs_in, stage_name
from .measured import markdown, measurements
from .record import dig, finite, read_dict
from .run_in_words import folder_of, run_in_words, short_fingerprint

LONG = 100  # characters of a fact


# ---- the model, and what was done ----


def shape_in_words(config: ModelConfig) -> str:
    """Parameters, layers and room."""
    n_parameters = count_parameters(config)
    n_active = count_active_parameters(config)
    active = f", of which each token uses {n_active:,}" if n_active < n_parameters else ""
    return (
        f"{n_parameters:,} parameters{active}, {config.n_layers} layers, room for "
        f"{config.max_seq_len:,} tokens"
    )


def facts_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What is known of the run of a checkpoint and of its model, each fact under its name."""
    shape = ModelConfig(**checkpoint.state["model_config"])
    return run_in_words(checkpoint) | {"size": shape_in_words(shape)}


def sections_of(runs: dict[str, Checkpoint]) -> list[str]:
    """A section per run, with a line per fact. A long fact that an earlier run has too is not
    written again."""
    lines: list[str] = []
    said: dict[str, str] = {}
    for run, checkpoint in runs.items():
        lines += [f"## {run}" if len(runs) > 1 else "## Where it comes from", ""]
        for name, words in facts_of(checkpoint).items():
            first = said.setdefault(words, run)
            is_again = first != run and len(words) > LONG
            lines.append(f"- {name}: as of `{first}`" if is_again else f"- {name}: {words}")
        lines.append("")
    return lines


def collections_in(root: Path, runs: list[Path]) -> list[str]:
    """A line for each file of answers that `r1zero collect` wrote beside the runs."""
    paths = [path for place in places_of(root, runs) for path in sorted(place.glob(SUMMARIES))]
    lines = []
    for path in paths:
        found = read_dict(path)
        counts = [finite(found.get(name)) for name in ("kept", "sampled", "problems")]
        if "by_difficulty" in found and None not in counts:
            kept, sampled, problems = counts
            model = Path(str(found.get("model"))).parent.parent.name
            weights = short_fingerprint(str(found.get("weights")))
            lines.append(
                f"- `{stage_name(path, root)}`: {kept:,.0f} of {sampled:,.0f} answers of `{model}` "
                f"(weights {weights}) to {problems:,.0f} problems of `{found.get('task')}`, split "
                f"{found.get('split')}"
            )
    return ["## Data made on the way", "", *lines, ""] if lines else []


def machine_in_words(record: dict) -> str:
    """What a run was made on, and with what."""
    machine = record.get("machine")
    chip = dig(machine, "gpu") or dig(machine, "cpu") or "an unknown machine"
    versions = dig(machine, "versions")
    packages = [f"{name} {versions[name]}" for name in ("r1zero", "torch") if dig(versions, name)]
    commit = dig(machine, "commit")
    words = [chip, *packages, *([f"commit {str(commit)[:12]}"] if commit else [])]
    return f"Made on: {', '.join(words)}."


# ---- what it cost, and what is not known ----


def cost_in_words(cost: Cost) -> list[str]:
    """The table of the cost, and what it counts."""
    lines = markdown(cost.rows())
    if cost.price:
        minutes = cost.sum_of("seconds") / 60
        price = f"{minutes:.1f} minutes at {cost.price:g} per hour: {cost.money:.2f}"
        lines += ["", f"{price}."]
    note = "FLOPs are those of the model's own matrix products, without prompts and reference."
    return [*lines, "", note]


def limits(runs: dict[str, Checkpoint], cost: Cost, has_measured: bool) -> list[str]:
    """A line for each thing that the folder does not tell, or that a reader should know."""
    settings = [checkpoint.state.get("settings") or {} for checkpoint in runs.values()]
    found = ["Nothing was measured of safety, of bias, of facts, or of any task that is not above."]
    if not has_measured:
        found.append("Nothing was measured on held-out problems.")

    # 1. What the experiment lacks.
    controls = [each["control"] for each in settings if "control" in each]
    if controls and all(control in ("none", False) for control in controls):
        found.append(
            "No run has rewards that say nothing, so how much of a gain comes from the training by "
            "itself is not known."
        )
    seeds = {each["seed"] for each in settings if "seed" in each}
    if len(seeds) == 1:
        found.append("There is one seed; what another would give, no interval here says.")

    # 2. What happened to the runs.
    for name, checkpoint in runs.items():
        found += limits_of_run(name, checkpoint)

    # 3. What nobody has noted.
    if unknown := cost.lacks("seconds"):
        found.append(f"The time of {', '.join(unknown)} is not known, and the total lacks it.")
    if unknown := cost.lacks("sampled_tokens"):
        named = ", ".join(unknown)
        found.append(f"How many tokens {named} sampled is not known, and the total lacks them.")
    for key, role in (("base", "from which a run began"), ("teacher", "from which a run learned")):
        others = {each[key] for each in settings if isinstance(each.get(key), str)}
        if elsewhere := made_elsewhere(others, [folder_of(each) for each in runs.values()]):
            named = ", ".join(elsewhere)
            found.append(f"What it cost to make {named}, {role}, is not counted.")
    return [f"- {sentence}" for sentence in found]


def made_elsewhere(models: set[str], runs: list[Path]) -> list[str]:
    """The names, for people, of the models that none of the runs has made.

    A model that is not where it was may have been moved with the runs: then its name decides.
    """
    folders, names = {run.resolve() for run in runs}, {run.name for run in runs}
    found = set()
    for model in map(Path, models):
        is_here = model.resolve() in folders if model.exists() else model.name in names
        if not is_here:
            found.add(f"another `{model.name}`" if model.name in names else f"`{model.name}`")
    return sorted(found)


def limits_of_run(name: str, checkpoint: Checkpoint) -> Iterator[str]:
    """What a reader should know of one run."""
    record = read_dict(folder_of(checkpoint) / RECORD)
    steps = finite(dig(record, "config", "steps"))
    if steps and checkpoint.step < steps:
        yield f"`{name}` is of step {checkpoint.step}, and its run was to have {steps:.0f} steps."
    if dig(record, "config", "eval_every"):
        yield (
            f"The held-out problems of `{name}` chose its best checkpoint, so its score on them is "
            "a little too good."
        )
    if dig(record, "config", "accept_changes"):
        yield f"`{name}` was resumed although its base or its data had changed."
    if dig(checkpoint.state, "settings", "rewards", "model"):
        yield (
            f"A reward model judged answers of `{name}`, which may have learned to please it; its "
            "score is no measure of them."
        )


# ---- the whole ----


def body_of(root: Path, runs: dict[str, Checkpoint], cost: Cost) -> list[str]:
    """The sections on what was measured, on the cost, and on the limits."""
    found = measurements(root, runs)
    return [
        "## Measured",
        "",
        *(found or ["Nothing on held-out problems.", ""]),
        "## Cost",
        "",
        *cost_in_words(cost),
        "",
        "## Limits",
        "",
        *limits(runs, cost, bool(found)),
        "",
    ]


def card_of(folder: str | Path, price: float = 0.0) -> str:
    """The card of the run or the recipe in a folder. price: of the machine, per hour.

    Raises ValueError as `cost_of`, and CheckpointError for a checkpoint that cannot be read.
    """
    root = Path(folder)
    cost = cost_of(root, price)
    found = {stage_name(run, root): load_checkpoint(run, groups=()) for run in runs_in(root)}
    # In the order of the table of costs, which a recipe knows better than the clock.
    runs = {stage.name: found[stage.name] for stage in cost.stages if stage.name in found}
    lines = [f"# {root.resolve().name}", ""]
    if len(runs) > 1:
        lines += [f"Made by {len(runs)} runs, in this order: {', '.join(runs)}.", ""]
    last = list(runs.values())[-1]
    lines += [*sections_of(runs), *collections_in(root, runs_in(root))]
    lines += [machine_in_words(read_dict(folder_of(last) / RECORD)), ""]
    return "\n".join([*lines, *body_of(root, runs, cost)])
