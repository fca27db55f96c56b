"""The demo's report: one HTML file that explains itself, the pictures beside it, and the table of all seeds.

    write_report(folder)    reads what demo.py left in `folder`, writes report.html and the PNG files there
    seeds_table(folder)     the figures of all seeds as Markdown

The page is written for somebody who has not seen the code: each part says what it shows, how to read it, and
what it does not show. Of a demo that was cut short it shows what is there, and says what is not.

Left out: the page's own pieces (page.py), the drawing (plots.py), and figures that demo.py did not measure.
"""

import shlex
from pathlib import Path

from ...eval.tasks.base import is_held_out
from ...eval.tasks.countdown import Countdown, CountdownProblem
from ...model.checkpoint import atomic_write_text
from . import page
from .page import escape, limit, paragraph, picture, section, table
from .plots import COLUMNS, CURVES, draw_pictures
from .record import (
    PARTS,
    Seed,
    bounds,
    brackets,
    change,
    dig,
    finite,
    number,
    percent,
    ratio,
    read_demo,
    read_dict,
    seconds,
    seed_rows,
    with_interval,
)

EXAMPLE = """3 7 9 -> 13
<think>9+7=16,16-3=13,13-13=0 ok;
9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>"""  # line breaks are for the reader
N_PAIRS = 8  # problems shown before and after
BEHAVIOURS = [  # (name in Behaviour, its count, what it is); shares, but for the first
    ("attempts_per_answer", "n_answers", "attempts in an answer"),
    ("p_stop_after_ok", "n_ok", "stops thinking after a verdict “ok”"),
    ("p_stop_after_no", "n_no", "stops thinking after a verdict “no”"),
    ("verdict_accuracy", "n_checks", "verdicts that are right"),
    ("arithmetic_accuracy", "n_equations", "equations that are true"),
    ("valid_attempts", "n_attempts", "attempts without any fault"),
    ("repeated_attempts", "n_attempts", "attempts made before in the same answer"),
    ("answer_follows_last", "n_answered", "answers taken from the last attempt"),
    ("right_after_ok", "n_last_ok", "right answers where the last verdict is “ok”"),
]
SKILLS = (
    "verdict_accuracy",
    "arithmetic_accuracy",
    "valid_attempts",
)  # what the base model can do already
TIMES = [  # (name in results.json, what it is)
    ("corpus", "writing the corpus"),
    ("pretrain", "pretraining"),
    ("eval_base", "measuring the base model"),
    ("rl", "R1-Zero"),
    ("eval_rl", "measuring after R1-Zero"),
    ("control", "control"),
    ("eval_control", "measuring the control"),
]


def headline(record: dict, seeds: list[Seed], drawn: dict[str, Path]) -> str:
    size = seeds[0].figure("parameters")
    model = (
        f"language model of {size / 1e6:.2f} million parameters" if size else "small language model"
    )
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
        parts += figures(seeds)
    if "curves" in drawn:
        parts.append(
            picture(
                drawn["curves"],
                "accuracy and response length over the steps, with the control",
                "Thin: each step. Thick: smoothed. Diamonds: held-out problems, with 95 % "
                "intervals.",
                full=True,
            )
        )
    return "\n".join(parts)


def figures(seeds: list[Seed]) -> list[str]:
    """The figures at the top, and what can be said of them."""
    seed = seeds[0]
    before, after = (seed.figure(part, "eval", "accuracy") for part in ("base", "rl"))
    low, high = bounds(seed, "base"), bounds(seed, "rl")
    lengths = [seed.figure(part, "eval", "mean_tokens") for part in ("base", "rl")]
    grown = ratio(lengths[1], lengths[0])
    shown = [
        (
            "right answers",
            f"{percent(before)} → {percent(after)}",
            f"95 %: {brackets(low)} and {brackets(high)}",
        ),
        (
            "response length",
            f"{number(lengths[0])} → {number(lengths[1])}",
            "tokens" + (f", × {grown:.2f}" if grown else ""),
        ),
    ]
    said = [
        f"Held-out problems: {number(seed.figure('rl', 'eval', 'n_problems'), 0)}, which neither the "
        f"text nor the training holds, {number(seed.figure('rl', 'eval', 'n_samples'), 0)} answers to "
        "each, sampled at temperature 1."
    ]
    if low and high:
        apart = high[0] > low[1]
        said.append(
            "The two intervals do not overlap: the model got better."
            if apart and after > before
            else "The intervals overlap, or accuracy did not rise: <b>this run shows no clear gain.</b>"
        )
    moved = change(seed, "control")
    if moved is None:
        shown.append(("control", "–", "was not run"))
        said.append(
            "There is no control, so nothing here tells what rewards without information would have "
            "done."
        )
    else:
        shown.append(
            (
                "control",
                f"{percent(before)} → {percent(seed.figure('control', 'eval', 'accuracy'))}",
                f"rewards dealt out at random, {seed.last_step('control')} steps",
            )
        )
        said.append(
            f"The control changed by {100 * moved:+.1f} points, the real run by "
            f"{100 * (after - before):+.1f}{control_pace(seed)}."
        )
        if moved < -0.03:
            said.append("A fall is no surprise: pushes in random directions wear a model out.")
    if len(seeds) > 1:
        said.append(
            f"These are the figures of seed {seed.number}; a table of all {len(seeds)} seeds is "
            "below."
        )
    else:
        said.append(
            "One seed is one throw: the intervals speak of other problems, not of other runs."
        )
    return [page.cards(shown), paragraph(*said)]


def control_pace(seed: Seed) -> str:
    """Where the real run stood when the control ended, if the control was the shorter one."""
    end = seed.last_step("control")
    near = [finite(row.get("accuracy")) for row in seed.logs["rl"] if end - 5 < row["step"] <= end]
    near = [value for value in near if value is not None]
    if not near or end >= seed.last_step("rl"):
        return ""
    return (
        f" (the control is shorter; at its last steps the real run was at "
        f"{percent(sum(near) / len(near))} on the problems it was training on)"
    )


def what_was_done(record: dict, seed: Seed, drawn: dict[str, Path]) -> str:
    config = record.get("config")
    documents, problems = finite(dig(config, "documents")), finite(dig(config, "eval_problems"))
    steps = {part: seed.last_step(part) for part in PARTS}
    return section(
        "What was done",
        "<ol>",
        f"<li><b>Pretraining</b> ({steps['base']:,} steps) on {number(documents, 0)} made-up texts. They "
        "hold reasoning, but not the skill of using it: worked attempts, each checked with a subtraction and "
        "a verdict, “ok” or “no”. Most authors stop after a random number of attempts and answer with the "
        "last one, whatever its verdict. Here is one who finds the answer and walks past it:"
        f"<pre>{escape(EXAMPLE)}</pre></li>",
        f"<li><b>R1-Zero</b> ({steps['rl']:,} steps of GRPO) straight on that model, without worked "
        "examples: it answers the same problem many times, a rule looks which answers are right and well "
        "formed, and what the better ones did becomes more likely.</li>",
        f"<li><b>The control</b> ({steps['control']:,} steps): all the same, but the rewards of a problem’s "
        "answers are dealt out among them at random. What the machinery does without information shows "
        "here.</li>",
        f"<li><b>Measuring</b> on {number(problems, 0)} problems that no part was trained on.</li>",
        "</ol>",
        picture(
            drawn.get("pretraining"),
            "loss of the base model over the steps of pretraining",
            "What the base model learns before any reward: to write such text.",
        ),
        limit(
            "The base model must get some answers right by itself, or all rewards of a group "
            "are 0 and there is nothing to learn from. That is why a model with random weights is "
            "pretrained first."
        ),
    )


def main_curves(seed: Seed, drawn: dict[str, Path]) -> str:
    if not seed.logs["rl"]:
        return section("The training", paragraph("There is no log of reinforcement learning yet."))
    shown = [
        picture(drawn.get(name), f"{title} over the steps of GRPO", note)
        for name, _, title, _, _, note in CURVES
    ]
    missing = "" if seed.logs["control"] else "The control was not run, so its curves are missing."
    return section(
        "The training",
        paragraph(
            "Each step draws training problems and a group of answers to each. Blue is the real run, "
            "orange the control; the thin line is each step, the thick one its running mean. Look for "
            "blue rising where orange does not: that difference is what the rewards taught.",
            missing,
        ),
        f'<div class="plots">{"".join(shown)}</div>',
        limit(
            "The lines are measured on the few hundred answers of each step, so they jitter. "
            "The diamonds, on held-out problems, are the ones to quote."
        ),
    )


def what_got_worse(seed: Seed) -> str:
    """The skills of the base model that reinforcement learning cost, in a sentence; nothing if none."""
    lost = []
    for name, _, label in BEHAVIOURS:
        before, after = (seed.figure(part, "behaviour", name) for part in ("base", "rl"))
        if name in SKILLS and None not in (before, after) and after < before - 0.01:
            lost.append(f"{label} ({percent(before)} → {percent(after)})")
    return f"<b>Not all got better.</b> Fewer than before: {', '.join(lost)}." if lost else ""


def behaviours(seed: Seed, drawn: dict[str, Path]) -> str:
    measured = [part for part in PARTS if seed.get(part, "behaviour")]
    if not measured:
        return section(
            "What changed in the thinking", paragraph("The behaviours were not measured yet.")
        )
    rows = []
    for name, label in (
        ("accuracy", "right answers (pass@1)"),
        ("format_rate", "well-formed answers"),
    ):
        rows.append([label, *(with_interval(seed, part, name) for part in measured)])
    for k in seed.get("rl", "eval", "pass_at") or {}:
        shares = [percent(seed.figure(part, "eval", "pass_at", k)) for part in measured]
        rows += [[f"at least one of {k} answers right (pass@{k})", *shares]] if k != "1" else []
    for name, show, label in (
        ("mean_tokens", number, "tokens in an answer"),
        ("truncated", percent, "answers cut off for length"),
    ):
        rows.append([label, *(show(seed.figure(part, "eval", name)) for part in measured)])
    for name, count, label in BEHAVIOURS:
        show = number if name == "attempts_per_answer" else percent
        rows.append(
            [
                label,
                *(
                    f"{show(seed.figure(part, 'behaviour', name))}\n"
                    f"n = {number(seed.figure(part, 'behaviour', count), 0)}"
                    for part in measured
                ),
            ]
        )
    return section(
        "What changed in the thinking",
        paragraph(
            "This is the “aha” of this small world: after a wrong verdict go on, after a right one "
            "stop. The base model writes verdicts but hardly looks at them; nobody tells it to. If "
            "learning worked, blue stands near 100 % on the left and near 0 on the right."
        ),
        picture(drawn.get("behaviour"), "share of verdicts after which the thinking stops"),
        paragraph(
            "The table counts everything in the held-out answers; below each share, n says how many "
            "there were to count. Where verdicts and equations were right before already, the model "
            "was not taught to calculate, but to use what it had calculated."
        ),
        paragraph(what_got_worse(seed)),
        table(["", *(COLUMNS[part] for part in measured)], rows),
        limit(
            "A verdict counts as written, right or not; one at which an answer was cut off for length is "
            "not counted; and how the model comes to its first attempt is not measured."
        ),
    )


def one_group(seed: Seed) -> str:
    group, listed = seed.group, seed.group.get("samples")
    samples = [s for s in listed if isinstance(s, dict)] if isinstance(listed, list) else []
    if not samples:
        return section("One group, token by token", paragraph("No group was kept of this demo."))
    order = sorted(range(len(samples)), key=lambda n: -(finite(samples[n].get("advantage")) or 0.0))
    largest = max(abs(finite(s.get("advantage")) or 0.0) for s in samples) or 1.0
    shown = []
    for n in order:
        s = samples[n]
        advantage = finite(s.get("advantage"))
        head = (
            f"answer {n + 1}: {'right' if s.get('accuracy') == 1 else 'wrong'}, reward "
            f"{number(s.get('reward'), 2)}, advantage "
            f"{'–' if advantage is None else f'{advantage:+.2f}'}"
        )
        note = f"(right {number(s.get('accuracy'))}, format {number(s.get('format'))}) {s.get('why') or ''}"
        cut = " It was cut off for length." if s.get("finish_reason") == "length" else ""
        texts = s["tokens"] if isinstance(s.get("tokens"), list) else []
        shown.append(page.tokens(texts, head, note + cut, (advantage or 0.0) / largest))
    rewards = [finite(s.get("reward")) or 0.0 for s in samples]
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    step = finite(group.get("step"))
    when = "by the base model, before the first step" if step == 0 else f"at step {number(step, 0)}"
    return section(
        "One group, token by token",
        paragraph(
            f"These are {len(samples)} answers to one problem, "
            f"<code>{escape(group.get('problem'))}</code>, written {when}, best first. Each box is a "
            "token, the unit that the model writes in. Blue answers become more likely, orange ones "
            "less, the stronger the colour the more; every token of an answer gets the same push."
        ),
        paragraph(
            f"The advantage is (reward − mean of the group) / spread of the group. Here the mean is "
            f"{mean:.2f} and the spread {spread:.2f}.",
            "All rewards are equal, so nothing is learned from this group."
            if spread < 1e-6
            else "",
        ),
        *shown,
        limit(
            "A right answer’s useless tokens are praised too, and a wrong one’s good ones "
            "blamed. Over many groups the difference averages out; nothing marks single steps."
        ),
    )


def pairs(seed: Seed) -> str:
    """The first held-out problems, and the first answer to each before and after."""
    firsts = {part: {} for part in ("base", "rl")}
    for part, found in firsts.items():
        for row in seed.answers[part]:
            if finite(row.get("index")) is not None:
                found.setdefault(row["index"], row)
    indexes = sorted({**firsts["base"], **firsts["rl"]})[:N_PAIRS]
    if not indexes:
        return section(
            "The same problems before and after", paragraph("No held-out answers were kept yet.")
        )
    shown = []
    for index in indexes:
        rows = {part: found[index] for part, found in firsts.items() if index in found}
        prompt = next(iter(rows.values())).get("prompt")
        shown.append(f'<h3><code>{escape(prompt)}</code></h3>\n<div class="pair">')
        for part, row in rows.items():
            right = row.get("accuracy") == 1
            shown.append(
                page.response(
                    str(row.get("response")),
                    right,
                    COLUMNS[part],
                    "" if right else str(row.get("why") or ""),
                )
            )
        shown.append("</div>")
    only = "" if firsts["base"] and firsts["rl"] else "Only one side has been measured so far."
    return section(
        "The same problems before and after",
        paragraph(
            f"The first {len(indexes)} held-out problems and the first answer to each: not picked. "
            "Each line of thought is an attempt; its verdict comes last.",
            only,
        ),
        *shown,
        limit("These are single throws at temperature 1. Only the shares further up are figures."),
    )


def all_seeds(seeds: list[Seed]) -> str:
    if len(seeds) < 2:
        return ""
    return section(
        "All seeds",
        paragraph(
            "Each seed is a whole demo of its own: other random weights, other order of the text and "
            "problems, other samples. In brackets the 95 % interval of each. Where the interval after "
            "training lies above the base’s in every row, luck with one seed does not explain the "
            "gain. The picture at the top shows the curves of all of them."
        ),
        table(*seed_rows(seeds)),
        limit("All seeds use the same held-out problems."),
    )


def memorising(record: dict, seed: Seed) -> str:
    try:
        config = record["config"]
        task = Countdown(n_numbers=config["numbers"], high=config["high"], ops=config["ops"])
        sizes = [task.size(split) for split in ("train", "test")]
    except (ValueError, TypeError, KeyError):
        return section(
            "What memorising can not explain",
            paragraph("The settings of the task are missing, so the problems can not be counted."),
        )
    keys = set()
    for row in seed.answers["rl"] or seed.answers["base"]:
        try:
            keys.add(CountdownProblem(row["problem"]["numbers"], row["problem"]["target"]).key)
        except (ValueError, TypeError, KeyError):
            continue
    trained_on = sum(not is_held_out(key, task.test_share) for key in keys)
    counted = "There are more problems with these settings than can be listed."
    if None not in sizes:
        counted = (
            f"There are {sum(sizes):,} problems with these settings: {sizes[0]:,} to train on and "
            f"{sizes[1]:,} held out."
        )
    checked = (
        f"Checked for this page: of the {len(keys):,} different problems measured, {trained_on:,} "
        "belong to the training side."
        if keys
        else ""
    )
    return section(
        "What memorising can not explain",
        paragraph(
            counted,
            "Which side a problem is on is decided by a hash of its numbers, in any order, "
            "and its target. So no held-out problem is in the pretraining text, in the problems of "
            "reinforcement learning, or in either with its numbers swapped.",
            checked,
        ),
        paragraph(
            "The control has met the same problems and got as many rewards; what it did not gain can "
            "not come from practice alone."
        )
        if seed.logs["control"]
        else "",
        limit(
            "Held-out problems are of the same kind and size. Nothing here says what the "
            "model does with four numbers, or with multiplication."
        ),
    )


def about_the_loss(seed: Seed) -> str:
    columns = {
        name: [value for row in seed.logs["rl"] if (value := finite(row.get(name))) is not None]
        for name in ("loss", "gradient_norm", "logp_gap")
    }
    early, late, norm = (
        sum(values) / len(values) if values else None
        for values in (columns["loss"][:10], columns["loss"][-10:], columns["gradient_norm"])
    )
    seen = (
        ""
        if early is None
        else f"In this run it was {early:+.3f} over the first ten steps and "
        f"{late:+.3f} over the last ten, while the norm of the gradient was {number(norm, 2)} on "
        "average."
    )
    gap = (
        ""
        if not columns["logp_gap"]
        else "Sampling and training computed the same token’s "
        f"log-probability at most {max(columns['logp_gap']):.0e} apart."
    )
    return section(
        "Why the loss says nothing",
        paragraph(
            "In other training the loss falls as the model learns. Not here. The answers are sampled "
            "by the very model that is trained, so each token’s ratio of new to old probability is "
            "exactly 1, and the loss is minus the mean of the advantages, which add up to 0 in every "
            "group. As a mean over answers it would be exactly 0. As a mean over tokens, as here, long "
            "answers count more, and what is left only says whether the worse answers were the longer "
            "ones (above 0) or the shorter ones (below 0)."
        ),
        paragraph(
            seen,
            "What moves the model is the gradient, and that is not 0. Watch accuracy, not the "
            "loss.",
            gap,
        ),
    )


def flat(value, name: str = "") -> list[list[str]]:
    """A nested config as rows of (dotted name, value)."""
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in flat(inner, f"{name}.{key}" if name else str(key))
        ]
    return [[name, json_text(value)]]


def json_text(value) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else "–"
        if value is None
        else str(value)
    )


def settings(record: dict) -> str:
    rows = flat(record.get("config") or {})
    return section(
        "Configuration",
        paragraph("The same flags on the same machine with the same versions give the same run."),
        f"<details><summary>{len(rows)} flags</summary>{table(['flag', 'value'], rows)}</details>",
    )


def spent(record: dict, seeds: list[Seed]) -> str:
    rows = [
        [label, *(number(seed.figure("seconds", name), 0) for seed in seeds)]
        for name, label in TIMES
        if any(seed.figure("seconds", name) for seed in seeds)
    ]
    rows.append(["all", *(number(seconds(seed), 0) for seed in seeds)])
    used = [
        [f"tokens: {label}", *(number(seed.figure("tokens", name), 0) for seed in seeds)]
        for name, label in (
            ("pretrain", "pretraining, read"),
            ("rl", "R1-Zero, written"),
            ("control", "control, written"),
        )
    ]
    return section(
        "Machine, time and tokens",
        paragraph("As measured; other work on the same machine makes the times longer."),
        table(["seconds", *(f"seed {seed.number}" for seed in seeds)], rows + used),
        table(
            ["machine", ""],
            flat(record.get("machine") or {}) + flat(record.get("finished"), "finished"),
        ),
    )


def how_to_go_on(folder: Path, seed: Seed) -> str:
    config = read_dict(seed.folder / "rl" / "run.json").get("config")
    options = dig(config, "task", "options")
    given = [
        ("run", seed.folder / "rl"),
        ("base", dig(config, "base") or seed.folder / "base"),
        ("seed", dig(config, "seed")),
        ("max-new-tokens", dig(config, "max_new_tokens")),
        ("optim.lr", dig(config, "optim", "lr")),
        ("rewards.accuracy-weight", dig(config, "rewards", "accuracy_weight")),
        ("rewards.format-weight", dig(config, "rewards", "format_weight")),
    ]
    go_on = ["r1zero grpo --resume --steps 200"]
    go_on += [f"--{name} {shlex.quote(str(value))}" for name, value in given if value is not None]
    if isinstance(options, list) and options:
        go_on.append(f"--options {shlex.join(map(str, options))}")
    commands = [
        (
            "answer problems that you type",
            f"r1zero chat --run {shlex.quote(str(seed.folder / 'rl'))}",
        ),
        ("go on training, with the settings that this run had", " \\\n    ".join(go_on)),
        ("three seeds and their table", "r1zero demo --run runs/seeds --seeds 0,1,2"),
        (
            "four numbers, or multiplication: harder, so longer",
            "r1zero demo --run runs/four --numbers 4 --pretrain-steps 4000 --rl-steps 400\n"
            "r1zero demo --run runs/times --ops '+-*' --pretrain-steps 4000 --rl-steps 400",
        ),
    ]
    text = "\n\n".join(f"# {what}\n{command}" for what, command in commands)
    return section("How to go on", f"<pre>{escape(text)}</pre>")


def write_report(folder: str | Path) -> Path:
    """Write report.html and the PNG files into the demo's folder; returns the path of report.html.

    Raises ValueError if `folder` is no demo's, OSError if it cannot be written to.
    """
    folder = Path(folder)
    record, seeds = read_demo(folder)
    first, drawn = seeds[0], draw_pictures(folder, seeds)
    path = folder / "report.html"
    atomic_write_text(
        path,
        page.document(
            "R1-Zero from nothing",
            [
                headline(record, seeds, drawn),
                what_was_done(record, first, drawn),
                main_curves(first, drawn),
                behaviours(first, drawn),
                one_group(first),
                pairs(first),
                all_seeds(seeds),
                memorising(record, first),
                about_the_loss(first),
                settings(record),
                spent(record, seeds),
                how_to_go_on(folder, first),
            ],
        ),
    )
    return path


def seeds_table(folder: str | Path) -> str:
    """All seeds as a Markdown table. Raises ValueError if `folder` is no demo's."""
    head, rows = seed_rows(read_demo(folder)[1])
    lines = [head, ["---:"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
