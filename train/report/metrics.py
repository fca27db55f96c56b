"""The numbers of the report: computed from what a demo left (record.py), and as text for people.

What was not measured is None here, and a dash on the page.

Left out: what the numbers mean. The sections of the page say that.
"""

from dataclasses import dataclass
from typing import Any

from ...eval.tasks.base import is_held_out
from ...eval.tasks.countdown import Countdown, CountdownProblem
from .record import PARTS, Seed, finite

DASH = "–"
BEHAVIOURS = [  # (name in Behaviour, its count, what it is); shares, except the first
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
# What the base model can do already.
BASE_SKILLS = ("verdict_accuracy", "arithmetic_accuracy", "valid_attempts")


# ---- numbers as text ----


def percent(share: Any) -> str:
    """29.4 %"""
    share = finite(share)
    return DASH if share is None else f"{100 * share:.1f} %"


def number(value: Any, digits: int = 1) -> str:
    """1,234.5"""
    value = finite(value)
    return DASH if value is None else f"{value:,.{digits}f}"


def brackets(pair: tuple[float, float] | None) -> str:
    """[27.1, 31.8], in percent"""
    return f"[{100 * pair[0]:.1f}, {100 * pair[1]:.1f}]" if pair else DASH


def share_with_interval(share: list[float] | None) -> str:
    """88.0 % [86, 90], of [mean, low, high]; or a dash"""
    if share is None:
        return DASH
    mean, low, high = (100 * value for value in share)
    return f"{mean:.1f} % [{low:.0f}, {high:.0f}]"


def with_interval(seed: Seed, part: str, name: str = "accuracy") -> str:
    """29.4 % [27.1, 31.8]"""
    share = percent(seed.metric(part, "eval", name))
    pair = bounds(seed, part, name)
    return f"{share} {brackets(pair)}" if pair else share


# ---- one seed ----


def bounds(seed: Seed, part: str, name: str = "accuracy") -> tuple[float, float] | None:
    """The 95 % interval of a metric, None if it was not measured."""
    pair = seed.get(part, "eval", f"{name}_95")
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    low, high = map(finite, pair)
    return None if low is None or high is None else (low, high)


def mean(values: list[float]) -> float | None:
    """None for an empty list."""
    return sum(values) / len(values) if values else None


def column(rows: list[dict], name: str) -> list[float]:
    """A metric of each row, where it is a finite number."""
    values = [finite(row.get(name)) for row in rows]
    return [value for value in values if value is not None]


def growth(seed: Seed, name: str = "mean_tokens") -> float | None:
    """By which factor R1-Zero changed a metric of the evaluation."""
    before, after = (seed.metric(part, "eval", name) for part in ("base", "rl"))
    return after / before if after is not None and before else None


def change(seed: Seed, part: str) -> float | None:
    """How much pass@1 of a part differs from the base's."""
    after, before = seed.metric(part, "eval", "accuracy"), seed.metric("base", "eval", "accuracy")
    return None if after is None or before is None else after - before


def got_better(seed: Seed) -> bool | None:
    """Whether accuracy rose beyond both intervals; None if there are no intervals."""
    before, after = bounds(seed, "base"), bounds(seed, "rl")
    if before is None or after is None:
        return None
    return after[0] > before[1] and (change(seed, "rl") or 0.0) > 0


def accuracy_when_control_ended(seed: Seed) -> float | None:
    """Training accuracy of the real run when the control ended; None if it did not end first."""
    end = seed.last_step("control")
    if end >= seed.last_step("rl"):
        return None
    near = [row for row in seed.logs["rl"] if end - 5 < row["step"] <= end]
    return mean(column(near, "accuracy"))


def lost_skills(seed: Seed) -> list[tuple[str, float, float]]:
    """(label, before, after) of each base skill that fell by more than a point."""
    lost = []
    for name, _, label in BEHAVIOURS:
        before, after = (seed.metric(part, "behaviour", name) for part in ("base", "rl"))
        was_measured = before is not None and after is not None
        if name in BASE_SKILLS and was_measured and after < before - 0.01:
            lost.append((label, before, after))
    return lost


def seconds(seed: Seed) -> float:
    """All that the seed took."""
    spent = seed.get("seconds")
    if not isinstance(spent, dict):
        return 0.0
    return sum(finite(value) or 0.0 for value in spent.values())


# ---- answers and groups ----


def kept_samples(seed: Seed) -> list[dict]:
    """The samples of the group that the demo kept."""
    listed = seed.group.get("samples")
    if not isinstance(listed, list):
        return []
    return [sample for sample in listed if isinstance(sample, dict)]


def mean_and_spread(rewards: list[float]) -> tuple[float, float]:
    """The group's mean and standard deviation, as the advantage has them."""
    average = sum(rewards) / len(rewards)
    variance = sum((reward - average) ** 2 for reward in rewards) / len(rewards)
    return average, variance**0.5


def first_answers(seed: Seed, part: str) -> dict[Any, dict]:
    """The first answer to each held-out problem, by the problem's index."""
    found: dict[Any, dict] = {}
    for row in seed.answers[part]:
        if finite(row.get("index")) is not None:
            found.setdefault(row["index"], row)
    return found


@dataclass(frozen=True)
class HeldOut:
    """How many problems there are on either side, and on which side those measured are."""

    n_train: int | None
    """Problems to train on; None if there are more than can be listed."""
    n_test: int | None
    """Problems that are held out, likewise."""
    n_measured: int
    """Different problems that were measured."""
    n_trained_on: int
    """How many of those belong to the training side."""


def held_out(record: dict, seed: Seed) -> HeldOut | None:
    """None if the settings of the task are missing."""
    try:
        config = record["config"]
        task = Countdown(n_numbers=config["numbers"], high=config["high"], ops=config["ops"])
        n_train, n_test = task.size("train"), task.size("test")
    except (ValueError, TypeError, KeyError):
        return None
    keys = set()
    for row in seed.answers["rl"] or seed.answers["base"]:
        try:
            keys.add(CountdownProblem(row["problem"]["numbers"], row["problem"]["target"]).key)
        except (ValueError, TypeError, KeyError):
            continue
    n_trained_on = sum(not is_held_out(key, task.test_share) for key in keys)
    return HeldOut(n_train, n_test, len(keys), n_trained_on)


# ---- all seeds ----


def seed_rows(seeds: list[Seed]) -> tuple[list[str], list[list[str]]]:
    """(head, one row per seed) of the table of all seeds."""
    head = [
        "seed",
        "base pass@1 [95 %]",
        "after R1-Zero",
        "control",
        "length",
        "stops after ok",
        "stops after no",
        "minutes",
    ]
    return head, [seed_row(seed) for seed in seeds]


def seed_row(seed: Seed) -> list[str]:
    grown = growth(seed)
    row = [str(seed.number)]
    row += [with_interval(seed, part) for part in PARTS]
    row.append(DASH if grown is None else f"× {grown:.2f}")
    for word in ("ok", "no"):
        name = f"p_stop_after_{word}"
        before, after = (percent(seed.metric(part, "behaviour", name)) for part in ("base", "rl"))
        row.append(f"{before} → {after}")
    row.append(number(seconds(seed) / 60))
    return row
