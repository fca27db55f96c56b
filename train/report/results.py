"""The sections of the report about what was learned: numbers and curves, and what they do not show.

A section that lacks its data says so in a sentence.
"""

from pathlib import Path

from . import page
from .demo_plots import COLUMNS, CURVES
from .metrics import (
    BEHAVIOURS,
    DASH,
    accuracy_when_control_ended,
    bounds,
    brackets,
    change,
    column,
    got_better,
    growth,
    held_out,
    lost_skills,
    mean,
    number,
    percent,
    seed_rows,
    with_interval,
)
from .page import limit, paragraph, picture, section, table
from .record import PARTS, Seed

N_ENDS = 10  # steps at either end over which the loss is averaged


# ---- the top of the page ----


def headline(record: dict, seeds: list[Seed], plots: dict[str, Path]) -> str:
    """Title, result in a few numbers, and the two main curves."""
    size = seeds[0].metric("parameters")
    model = "small language model"
    if size:
        model = f"language model of {size / 1e6:.2f} million parameters"
    active = seeds[0].metric("active_parameters")
    if active:
        model += f", of which each token uses {active / 1e6:.2f} million"
    parts = [
        "<h1>R1-Zero from nothing</h1>",
        paragraph(
            f"A {model}, trained here from random weights, plays a number game: given",
            "<code>3 7 9 -&gt; 13</code>, make 13 out of 3, 7 and 9, each used once. This report "
            "shows what reinforcement learning changed when rules alone gave the rewards: is the "
            "answer right, and is it well formed?",
        ),
    ]
    if not record.get("finished"):
        parts.append(
            paragraph("<b>This demo has not finished.</b> What it has measured so far is below.")
        )
    if change(seeds[0], "rl") is None:
        parts.append(
            paragraph("There is no measurement before and after reinforcement learning yet.")
        )
    else:
        parts.append(page.cards(headline_cards(seeds[0])))
        parts.append(paragraph(*headline_sentences(seeds)))
    if "curves" in plots:
        parts.append(
            picture(
                plots["curves"],
                "accuracy and response length over the steps, with the control",
                "Thin: each step. Thick: smoothed. Diamonds: held-out problems, with 95 % "
                "intervals.",
                full=True,
            )
        )
    return "\n".join(parts)


def headline_cards(seed: Seed) -> list[tuple[str, str, str]]:
    """(what it is, its value, what to know about it) of accuracy, length and control."""
    before, after = (percent(seed.metric(part, "eval", "accuracy")) for part in ("base", "rl"))
    low, high = (brackets(bounds(seed, part)) for part in ("base", "rl"))
    lengths = [number(seed.metric(part, "eval", "mean_tokens")) for part in ("base", "rl")]
    grown = growth(seed)
    by_factor = f", × {grown:.2f}" if grown else ""
    shown = [
        ("right answers", f"{before} → {after}", f"95 %: {low} and {high}"),
        ("response length", " → ".join(lengths), f"tokens{by_factor}"),
    ]
    if change(seed, "control") is None:
        shown.append(("control", DASH, "was not run"))
    else:
        control = percent(seed.metric("control", "eval", "accuracy"))
        note = f"rewards dealt out at random, {seed.last_step('control')} steps"
        shown.append(("control", f"{before} → {control}", note))
    return shown


def headline_sentences(seeds: list[Seed]) -> list[str]:
    """What can be said of the numbers at the top, and what cannot."""
    seed = seeds[0]
    n_problems = number(seed.metric("rl", "eval", "n_problems"), 0)
    n_samples = number(seed.metric("rl", "eval", "n_samples"), 0)
    sentences = [
        f"Held-out problems: {n_problems}, which neither the text nor the training holds, "
        f"{n_samples} answers to each, sampled at temperature 1."
    ]
    better = got_better(seed)
    if better:
        sentences.append("The two intervals do not overlap: the model got better.")
    elif better is not None:
        sentences.append(
            "The intervals overlap, or accuracy did not rise: <b>this run shows no clear gain.</b>"
        )
    sentences += control_sentences(seed)
    if len(seeds) > 1:
        sentences.append(
            f"These are the numbers of seed {seed.number}; a table of all {len(seeds)} seeds is "
            "below."
        )
    else:
        sentences.append(
            "One seed is one throw: the intervals speak of other problems, not of other runs."
        )
    return sentences


def control_sentences(seed: Seed) -> list[str]:
    """How the real run compares with its control."""
    moved, gained = change(seed, "control"), change(seed, "rl")
    if moved is None or gained is None:
        return [
            "There is no control, so nothing here tells what rewards without information would "
            "have done."
        ]
    pace = ""
    reached = accuracy_when_control_ended(seed)
    if reached is not None:
        pace = (
            f" (the control is shorter; at its last steps the real run was at {percent(reached)} "
            "on the problems it was training on)"
        )
    sentences = [
        f"The control changed by {100 * moved:+.1f} points, the real run by "
        f"{100 * gained:+.1f}{pace}."
    ]
    if moved < -0.03:
        sentences.append("A fall is no surprise: pushes in random directions wear a model out.")
    return sentences


# ---- curves and behaviours ----


def main_curves(seed: Seed, plots: dict[str, Path]) -> str:
    """Every curve of the training, with how to read it."""
    if not seed.logs["rl"]:
        return section("The training", paragraph("There is no log of reinforcement learning yet."))
    shown = [
        picture(plots.get(curve.name), f"{curve.title} over the steps of GRPO", curve.note)
        for curve in CURVES
    ]
    missing = "" if seed.logs["control"] else "The control was not run, so its curves are missing."
    return section(
        "The training",
        paragraph(
            "Each step takes training problems and samples a group of answers to each. Blue is the "
            "real run, orange the control; the thin line is each step, the thick one its running "
            "mean. Look for blue rising where orange does not: that difference is what the rewards "
            "taught.",
            missing,
        ),
        f'<div class="plots">{"".join(shown)}</div>',
        limit(
            "The lines are measured on the few hundred answers of each step, so they jitter. "
            "The diamonds, on held-out problems, are the ones to quote."
        ),
    )


def behaviours(seed: Seed, plots: dict[str, Path]) -> str:
    """What the think blocks do, before and after."""
    title = "What changed in the thinking"
    measured = [part for part in PARTS if seed.get(part, "behaviour")]
    if not measured:
        return section(title, paragraph("The behaviours were not measured yet."))
    rows = measured_rows(seed, measured) + behaviour_rows(seed, measured)
    return section(
        title,
        paragraph(
            "This is the “aha” of this small world: after a wrong verdict go on, after a right one "
            "stop. The base model writes verdicts but hardly looks at them; nobody tells it to. If "
            "learning worked, blue stands near 100 % on the left and near 0 on the right."
        ),
        picture(plots.get("behaviour"), "share of verdicts after which the thinking stops"),
        paragraph(
            "The table counts everything in the held-out answers; below each share, n says how "
            "many there were to count. Where verdicts and equations were right before already, the "
            "model was not taught to calculate, but to use what it had calculated."
        ),
        paragraph(what_got_worse(seed)),
        table(["", *(COLUMNS[part] for part in measured)], rows),
        limit(
            "A verdict counts as written, right or not; one at which an answer was cut off for "
            "length is not counted; and how the model comes to its first attempt is not measured."
        ),
    )


def measured_rows(seed: Seed, parts: list[str]) -> list[list[str]]:
    """One row per measure of the evaluation, one column per part."""
    rows = []
    for name, label in (
        ("accuracy", "right answers (pass@1)"),
        ("format_rate", "well-formed answers"),
    ):
        rows.append([label, *(with_interval(seed, part, name) for part in parts)])

    for k in seed.get("rl", "eval", "pass_at") or {}:
        if k != "1":
            shares = [percent(seed.metric(part, "eval", "pass_at", k)) for part in parts]
            rows.append([f"at least one of {k} answers right (pass@{k})", *shares])

    for name, in_words, label in (
        ("mean_tokens", number, "tokens in an answer"),
        ("truncated", percent, "answers cut off for length"),
    ):
        rows.append([label, *(in_words(seed.metric(part, "eval", name)) for part in parts)])
    return rows


def behaviour_rows(seed: Seed, parts: list[str]) -> list[list[str]]:
    """One row per measure of behaviour, with the count below each share."""
    rows = []
    for name, count, label in BEHAVIOURS:
        in_words = number if name == "attempts_per_answer" else percent
        row = [label]
        for part in parts:
            value = in_words(seed.metric(part, "behaviour", name))
            n = number(seed.metric(part, "behaviour", count), 0)
            row.append(f"{value}\nn = {n}")
        rows.append(row)
    return rows


def what_got_worse(seed: Seed) -> str:
    """The skills of the base model that R1-Zero cost, in a sentence; nothing if none."""
    lost = [
        f"{label} ({percent(before)} → {percent(after)})"
        for label, before, after in lost_skills(seed)
    ]
    return f"<b>Not all got better.</b> Fewer than before: {', '.join(lost)}." if lost else ""


# ---- how far the result can be trusted ----


def all_seeds(seeds: list[Seed]) -> str:
    """The table of all seeds, if there are several."""
    if len(seeds) < 2:
        return ""
    return section(
        "All seeds",
        paragraph(
            "Each seed is a whole demo of its own: other random weights, other order of the text "
            "and problems, other samples. In brackets the 95 % interval of each. Where the "
            "interval after training lies above the base’s in every row, luck with one seed does "
            "not explain the gain. The picture at the top shows the curves of all of them."
        ),
        table(*seed_rows(seeds)),
        limit("All seeds use the same held-out problems."),
    )


def memorising(record: dict, seed: Seed) -> str:
    """Why memorised problems do not explain the gain."""
    title = "What memorising can not explain"
    found = held_out(record, seed)
    if found is None:
        return section(
            title,
            paragraph("The settings of the task are missing, so the problems can not be counted."),
        )
    counted = "There are more problems with these settings than can be listed."
    if found.n_train is not None and found.n_test is not None:
        counted = (
            f"There are {found.n_train + found.n_test:,} problems with these settings: "
            f"{found.n_train:,} to train on and {found.n_test:,} held out."
        )
    checked = ""
    if found.n_measured:
        checked = (
            f"Checked for this page: of the {found.n_measured:,} different problems measured, "
            f"{found.n_trained_on:,} belong to the training side."
        )
    about_control = ""
    if seed.logs["control"]:
        about_control = paragraph(
            "The control has met the same problems and got as many rewards; what it did not gain "
            "can not come from practice alone."
        )
    return section(
        title,
        paragraph(
            counted,
            "Which side a problem is on is decided by a hash of its numbers, in any order, "
            "and its target. So no held-out problem is in the pretraining text, in the problems of "
            "reinforcement learning, or in either with its numbers swapped.",
            checked,
        ),
        about_control,
        limit(
            "Held-out problems are of the same kind and size. Nothing here says what the "
            "model does with four numbers, or with multiplication."
        ),
    )


def about_the_loss(seed: Seed) -> str:
    """Why the loss is near 0 although the model learns."""
    rows = seed.logs["rl"]
    losses, gaps = column(rows, "loss"), column(rows, "logp_gap")
    early, late = mean(losses[:N_ENDS]), mean(losses[-N_ENDS:])
    seen = ""
    if early is not None:
        norm = number(mean(column(rows, "gradient_norm")), 2)
        seen = (
            f"In this run it was {early:+.3f} over the first ten steps and {late:+.3f} over the "
            f"last ten, while the norm of the gradient was {norm} on average."
        )
    gap = ""
    if gaps:
        gap = (
            "Sampling and training computed the same token’s log-probability at most "
            f"{max(gaps):.0e} apart."
        )
    return section(
        "Why the loss says nothing",
        paragraph(
            "In other training the loss falls as the model learns. Not here. The answers are "
            "sampled by the very model that is trained, so each token’s ratio of new to old "
            "probability is exactly 1, and the loss is minus the mean of the advantages, which add "
            "up to 0 in every group. As a mean over answers it would be exactly 0. As a mean over "
            "tokens, as here, long answers count more, and what is left only says whether the "
            "worse answers were the longer ones (above 0) or the shorter ones (below 0)."
        ),
        paragraph(
            seen,
            "What moves the model is the gradient, and that is not 0. Watch accuracy, not the "
            "loss.",
            gap,
        ),
    )
