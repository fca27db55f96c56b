"""The sections of the report that show answers: one group, and problems before and after."""

import shlex

from ..rollout_files import parts_of
from . import page
from .demo_plots import COLUMNS
from .metrics import DASH, first_answers, kept_samples, mean_and_spread, number
from .page import escape, limit, paragraph, section
from .record import Seed, finite

N_PAIRS = 8  # problems shown before and after


def one_group(seed: Seed) -> str:
    """The group that the demo kept, best answer first, coloured by advantage."""
    title = "One group, token by token"
    samples = kept_samples(seed)
    if not samples:
        return section(title, paragraph("No group was kept of this demo."))
    numbered = list(enumerate(samples, 1))
    numbered.sort(key=lambda pair: -advantage_of(pair[1]))
    largest = max(abs(advantage_of(sample)) for sample in samples) or 1.0
    shown = [sample_markup(n, sample, largest) for n, sample in numbered]

    average, spread = mean_and_spread([finite(s.get("reward")) or 0.0 for s in samples])
    all_equal = "All rewards are equal, so nothing is learned from this group."
    step = finite(seed.group.get("step"))
    when = f"at step {number(step, 0)}"
    if step == 0:
        when = "by the base model, before the first step"
    return section(
        title,
        paragraph(
            f"These are {len(samples)} answers to one problem, "
            f"<code>{escape(seed.group.get('problem'))}</code>, written {when}, best first. Each "
            "box is a token, the unit that the model writes in. Blue answers become more likely, "
            "orange ones less, the stronger the colour the more; every token of an answer gets the "
            "same push."
        ),
        paragraph(
            "The advantage is (reward − mean of the group) / spread of the group. Here the mean "
            f"is {average:.2f} and the spread {spread:.2f}.",
            all_equal if spread < 1e-6 else "",
        ),
        *shown,
        more_groups(seed),
        limit(
            "A right answer’s useless tokens are praised too, and a wrong one’s good ones "
            "blamed. Over many groups the difference averages out; nothing marks single steps."
        ),
    )


def more_groups(seed: Seed) -> str:
    """How to see the groups of the run itself, where they were kept."""
    run = seed.folder / "rl"
    if not parts_of(run):
        return ""
    command = f"r1zero show --run {shlex.quote(str(run))}"
    return paragraph(
        f"The groups of all steps are kept: <code>{escape(command)}</code> prints those of the "
        "last one, and with <code>--step</code> those of another."
    )


def advantage_of(sample: dict) -> float:
    """0 if it is missing."""
    return finite(sample.get("advantage")) or 0.0


def sample_markup(n: int, sample: dict, largest: float) -> str:
    """One answer of the group. largest: the advantage that gets the strongest colour."""
    advantage = finite(sample.get("advantage"))
    in_words = DASH if advantage is None else f"{advantage:+.2f}"
    verdict = "right" if sample.get("accuracy") == 1 else "wrong"
    reward = number(sample.get("reward"), 2)
    head = f"answer {n}: {verdict}, reward {reward}, advantage {in_words}"

    accuracy, form = number(sample.get("accuracy")), number(sample.get("format"))
    note = f"(right {accuracy}, format {form}) {sample.get('why') or ''}"
    if sample.get("finish_reason") == "length":
        note += " It was cut off for length."

    tokens = sample.get("tokens")
    if not isinstance(tokens, list):
        tokens = []
    return page.tokens(tokens, head, note, advantage_of(sample) / largest)


def pairs(seed: Seed) -> str:
    """The first held-out problems, and the first answer to each before and after."""
    title = "The same problems before and after"
    before, after = first_answers(seed, "base"), first_answers(seed, "rl")
    indexes = sorted({**before, **after})[:N_PAIRS]
    if not indexes:
        return section(title, paragraph("No held-out answers were kept yet."))
    shown = []
    for index in indexes:
        answers = {"base": before.get(index), "rl": after.get(index)}
        shown += pair_markup({part: row for part, row in answers.items() if row is not None})
    only = "" if before and after else "Only one side has been measured so far."
    return section(
        title,
        paragraph(
            f"The first {len(indexes)} held-out problems and the first answer to each: not picked. "
            "Each line of thought is an attempt; its verdict comes last.",
            only,
        ),
        *shown,
        limit(
            "These are single throws at temperature 1. Only the shares further up are measurements."
        ),
    )


def pair_markup(answers: dict[str, dict]) -> list[str]:
    """One problem with an answer of each part that has one. answers: part -> row."""
    prompt = next(iter(answers.values())).get("prompt")
    shown = [f'<h3><code>{escape(prompt)}</code></h3>\n<div class="pair">']
    for part, row in answers.items():
        right = row.get("accuracy") == 1
        note = "" if right else str(row.get("why") or "")
        shown.append(page.response(str(row.get("response")), right, COLUMNS[part], note))
    shown.append("</div>")
    return shown
