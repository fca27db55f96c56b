"""The sections of the report about the demo: what was done, with which flags, at what cost."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...rl.family import PRESETS
from ..grpo import grpo_config
from .metrics import DASH, number, seconds
from .page import escape, limit, paragraph, picture, section, table
from .record import PARTS, Seed, dig, finite, read_dict

EXAMPLE = """3 7 9 -> 13
<think>9+7=16,16-3=13,13-13=0 ok;
9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>"""  # line breaks are for the reader
TIMES = [  # (name in results.json, what it is)
    ("corpus", "writing the corpus"),
    ("pretrain", "pretraining"),
    ("eval_base", "measuring the base model"),
    ("rl", "R1-Zero"),
    ("eval_rl", "measuring after R1-Zero"),
    ("control", "control"),
    ("eval_control", "measuring the control"),
]
TOKENS = [  # likewise
    ("pretrain", "tokens: pretraining, read"),
    ("rl", "tokens: R1-Zero, written"),
    ("control", "tokens: control, written"),
]


def what_was_done(record: dict, seed: Seed, plots: dict[str, Path]) -> str:
    """The four parts of the demo, for somebody who knows none of them."""
    config = record.get("config")
    documents, problems = finite(dig(config, "documents")), finite(dig(config, "eval_problems"))
    steps = {part: seed.last_step(part) for part in PARTS}
    parts = [
        f"<b>Pretraining</b> ({steps['base']:,} steps) on {number(documents, 0)} made-up texts. "
        "They hold reasoning, but not the skill of using it: worked attempts, each checked with a "
        "subtraction and a verdict, “ok” or “no”. Most authors stop after a random number of "
        "attempts and answer with the last one, whatever its verdict. Here is one who finds the "
        f"answer and walks past it:<pre>{escape(EXAMPLE)}</pre>",
        f"<b>R1-Zero</b> ({steps['rl']:,} steps of GRPO) straight on that model, without worked "
        "examples: it answers the same problem many times, a rule looks which answers are right "
        "and well formed, and what the better ones did becomes more likely.",
        f"<b>The control</b> ({steps['control']:,} steps): all the same, but the rewards of a "
        "problem’s answers are dealt out among them at random. What the machinery does without "
        "information shows here.",
        f"<b>Measuring</b> on {number(problems, 0)} problems that no part was trained on.",
    ]
    return section(
        "What was done",
        "<ol>",
        *(f"<li>{part}</li>" for part in parts),
        "</ol>",
        picture(
            plots.get("pretraining"),
            "loss of the base model over the steps of pretraining",
            "What the base model learns before any reward: to write such text.",
        ),
        limit(
            "The base model must get some answers right by itself, or all rewards of a group "
            "are 0 and there is nothing to learn from. That is why a model with random weights is "
            "pretrained first."
        ),
    )


def flat(value: Any, name: str = "") -> list[list[str]]:
    """A nested config as rows of (dotted name, value)."""
    if not isinstance(value, dict):
        return [[name, value_text(value)]]
    rows = []
    for key, inner in value.items():
        rows += flat(inner, f"{name}.{key}" if name else str(key))
    return rows


def value_text(value: Any) -> str:
    """A JSON value for a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return DASH if value is None else str(value)


def settings(record: dict) -> str:
    """Every flag of the demo."""
    rows = flat(record.get("config") or {})
    return section(
        "Configuration",
        paragraph("The same flags on the same machine with the same versions give the same run."),
        f"<details><summary>{len(rows)} flags</summary>{table(['flag', 'value'], rows)}</details>",
    )


def spent(record: dict, seeds: list[Seed]) -> str:
    """Seconds and tokens of each seed, and the machine."""
    rows = []
    for name, label in TIMES:
        times = [seed.metric("seconds", name) for seed in seeds]
        if any(times):
            rows.append([label, *(number(time, 0) for time in times)])
    rows.append(["all", *(number(seconds(seed), 0) for seed in seeds)])
    for name, label in TOKENS:
        rows.append([label, *(number(seed.metric("tokens", name), 0) for seed in seeds)])
    machine = flat(record.get("machine") or {}) + flat(record.get("finished"), "finished")
    return section(
        "Machine, time and tokens",
        paragraph("As measured; other work on the same machine makes the times longer."),
        table(["seconds", *(f"seed {seed.number}" for seed in seeds)], rows),
        table(["machine", ""], machine),
    )


def memory(seeds: list[Seed]) -> str:
    """What R1-Zero was predicted to take, part by part, and what it took; empty without a plan."""
    plans = [read_dict(seed.folder / "rl" / "run.json").get("memory") for seed in seeds]
    predicted = [dig(plan, "predicted") for plan in plans]
    # 1. The parts that a run has, and the peak of them, in the order in which they were written.
    parts = {name: None for sizes in predicted if isinstance(sizes, dict) for name in sizes}
    if not parts:
        return ""
    rows = [[name, *(megabytes(dig(sizes, name)) for sizes in predicted)] for name in parts]
    rows = [row for row in rows if set(row[1:]) != {megabytes(0)}]

    # 2. Beside it, what was measured at the end.
    rows.append(["peak, measured", *(megabytes(dig(plan, "measured")) for plan in plans)])
    on_gpu = any(dig(plan, "device") == "cuda" for plan in plans)
    what = "PyTorch’s tensors" if on_gpu else "the whole process, with Python and its libraries"
    return section(
        "Memory of R1-Zero",
        paragraph(
            "Predicted before the first step, of tensors alone, as <code>r1zero plan</code> does; "
            f"measured at the end, of {what}.",
            "Sampling and updates take turns, so the parts add up to more than the peak.",
        ),
        table(["MB", *(f"seed {seed.number}" for seed in seeds)], rows),
    )


def megabytes(size: Any) -> str:
    """12.3"""
    size = finite(size)
    return DASH if size is None else number(size / 1e6)


def how_to_go_on(record: dict, seed: Seed) -> str:
    """Commands to try next, ready to be copied, with the same model."""
    rl = shlex.quote(str(seed.folder / "rl"))
    demo, model = "r1zero demo", dig(record, "config", "model")
    if isinstance(model, str) and model != "demo":
        demo += f" --model {shlex.quote(model)}"
    commands = [
        ("answer problems that you type", f"r1zero chat --run {rl}"),
        ("go on training, with the settings that this run had", resume_command(seed)),
        ("three seeds and their table", f"{demo} --run runs/seeds --seeds 0,1,2"),
        (
            "four numbers, or multiplication: harder, so longer",
            f"{demo} --run runs/four --numbers 4 --pretrain-steps 4000 --rl-steps 400\n"
            f"{demo} --run runs/times --ops '+-*' --pretrain-steps 4000 --rl-steps 400",
        ),
    ]
    text = "\n\n".join(f"# {what}\n{command}" for what, command in commands)
    return section("How to go on", f"<pre>{escape(text)}</pre>")


def resume_command(seed: Seed) -> str:
    """`r1zero grpo` with the flags that a resumed run must have as they were."""
    run = seed.folder / "rl"
    config = read_dict(run / "run.json").get("config")
    if not isinstance(config, dict):
        config = {}
    algo = config.get("algo")
    if algo not in PRESETS:
        algo = "demo"
    given = {"run": run, "base": config.get("base", seed.folder / "base"), "algo": algo}
    # Beside these, whatever the run had that is not the preset's.
    defaults = asdict(grpo_config(algo, run=".", base="."))
    given |= changed_flags(config, defaults)
    options = dig(config, "task", "options")
    if isinstance(options, list) and options:
        given["options"] = options
    words = ["r1zero grpo --resume --steps 200"]
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        said = [] if value is True else map(str, values)  # a switch has no value
        words.append(shlex.join([f"--{name}", *said]))
    return " \\\n    ".join(words)


# What a resumed run says itself, or need not say.
NOT_REPEATED = {"run", "base", "algo", "resume", "steps", "save_every", "device", "wandb", "task"}


def changed_flags(config: dict, defaults: dict, prefix: str = "") -> dict[str, Any]:
    """Flag -> value, of the options in a run.json that are not at their defaults."""
    found = {}
    for name, default in defaults.items():
        value = config.get(name, default)
        if not prefix and name in NOT_REPEATED:
            continue
        flag = prefix + name.replace("_", "-")
        if isinstance(default, dict) and isinstance(value, dict):
            found |= changed_flags(value, default, f"{flag}.")
        elif value not in (default, None, False):
            found[flag] = value
    return found
