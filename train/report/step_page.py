"""The page of one step of a GRPO run: every answer token by token, coloured by its advantage.

`r1zero show --html FILE` writes it. Nothing here reads a file.
"""

from collections.abc import Callable, Sequence

from . import page
from .page import escape, paragraph, section


def by_group(samples: Sequence[dict]) -> dict[int, list[dict]]:
    """Group number -> its samples, best first: by advantage, then by reward."""
    groups: dict[int, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["group"], []).append(sample)
    for group in groups.values():
        group.sort(key=lambda sample: (advantage_of(sample), sample["reward"]), reverse=True)
    return groups


def advantage_of(sample: dict) -> float:
    """0 for a sample that nothing was trained on."""
    return sample["advantage"] or 0.0


def number(value: float) -> str:
    """1.2 and 0.85; a whole number without a point."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def counted(n: int, name: str) -> str:
    """1 group, 2 groups"""
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


def head_of(sample: dict) -> str:
    """An answer's advantage and reward, in words."""
    advantage = sample["advantage"]
    pushed = "not trained on" if advantage is None else f"advantage {advantage:+.2f}"
    return f"{pushed}, reward {number(sample['reward'])}"


def note_of(sample: dict) -> str:
    """What the reward is made of, how long the answer is, and why it got that."""
    parts = ", ".join(f"{name} {number(value)}" for name, value in sample["parts"].items())
    ended = "cut off" if sample["finish_reason"] == "length" else sample["finish_reason"]
    # Where a reward was changed before training: the control's shuffle, the penalty for length.
    changed = ""
    if sample["training_reward"] != sample["reward"]:
        changed = f", trained on as {number(sample['training_reward'])}"
    return f"({parts}{changed}), {len(sample['tokens'])} tokens, {ended}. {sample['why']}"


def group_in_words(group: Sequence[dict]) -> str:
    """How a group did, and whether anything is learned from it."""
    n_right = sum(sample["parts"]["accuracy"] == 1 for sample in group)
    mean = sum(sample["reward"] for sample in group) / len(group)
    words = f"{n_right} of {len(group)} right, mean reward {number(mean)}"
    if group[0]["replaced"]:
        return f"{words}; replaced by dynamic sampling"
    if not any(map(advantage_of, group)):
        return f"{words}; nothing to learn"
    return words


def step_in_words(samples: Sequence[dict]) -> str:
    """A step on one line."""
    n_right = sum(sample["parts"]["accuracy"] == 1 for sample in samples)
    n_tokens = sum(len(sample["tokens"]) for sample in samples)
    return (
        f"step {samples[0]['step']}: {counted(len(by_group(samples)), 'group')}, "
        f"{counted(len(samples), 'answer')}, "
        f"{n_right / len(samples):.0%} right, {n_tokens / len(samples):.1f} tokens each"
    )


def best_and_worst(group: list[dict], limit: int) -> tuple[list[dict], list[dict]]:
    """(the best, the worst) of a group that is sorted; together `limit` samples, or all."""
    if len(group) <= limit:
        return group, []
    n_worst = limit // 2
    return group[: limit - n_worst], group[len(group) - n_worst :]


def step_page(
    samples: Sequence[dict],
    token_text: Callable[[int], str],
    only: int | None = None,
    limit: int | None = None,
) -> str:
    """The whole page; its figures are those of all samples, whatever is shown of them.

    samples: of one step (rollout_log.py). token_text: from an id to its text. only: the number of
    the one group to show. limit: answers to show per group, the best and the worst.
    """
    largest = max(abs(advantage_of(sample)) for sample in samples) or 1.0
    title = step_in_words(samples)
    sections = [
        f"<h1>{escape(title)}</h1>",
        paragraph(
            "Each group holds the answers to one problem, best first. Each box is a token, the "
            "unit that the model writes in. Blue answers become more likely, orange ones less, "
            "the stronger the colour the more."
        ),
    ]
    for n, group in by_group(samples).items():
        if only not in (None, n):
            continue
        best, worst = best_and_worst(group, limit or len(group))
        n_between = len(group) - len(best) - len(worst)
        markup = [paragraph(f"<code>{escape(group[0]['prompt'])}</code>")]
        markup += [answer_markup(sample, token_text, largest) for sample in best]
        if n_between:
            markup.append(paragraph(f"... {n_between} more"))
        markup += [answer_markup(sample, token_text, largest) for sample in worst]
        sections.append(section(f"Group {n}: {group_in_words(group)}", *markup))
    return page.document(title, sections)


def answer_markup(sample: dict, token_text: Callable[[int], str], largest: float) -> str:
    """One answer. largest: the advantage that gets the strongest colour."""
    texts = [token_text(token) for token in sample["tokens"]]
    each = [advantage / largest for advantage in sample.get("token_advantages", ())]
    strength = advantage_of(sample) / largest
    return page.tokens(texts, head_of(sample), note_of(sample), strength, each)
