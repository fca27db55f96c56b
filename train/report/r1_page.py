"""The report of `r1zero r1`: one page with a row per stage, what is claimed, samples and costs.

    write_report(folder)    reads results.json and the samples there; writes report.html and r1.png

Each claim is a comparison of two stages that differ in one thing. The page says what came out,
whichever way it went.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ...model.files import atomic_write_text
from ..cost import cost_of
from . import page, plots
from .metrics import share_with_interval
from .page import paragraph, picture, section

# Each stage, in the words of the page: (short title, what it is).
TITLES = {
    "base": ("base", "pretrained on text that mixes its languages"),
    "zero": ("R1-Zero", "RL on the base: right, and well formed"),
    "cold": ("cold start", "SFT on right, consistent answers of R1-Zero"),
    "reasoning": ("reasoning", "RL with a third reward, for a consistent language"),
    "no_language": ("no language reward", "control: the same without that reward"),
    "no_cold": ("no cold start", "control: the same straight on the base"),
    "tuned": ("rejection + SFT", "SFT of the base on right answers and general data, 3 : 1"),
    "alone": ("no general data", "control: the same on right answers alone"),
    "r1": ("R1", "RL on everything; the reward model in the last quarter of the steps"),
    "hacked": ("reward model throughout", "the reward model in all steps, four times as many"),
}
ROAD = ("base", "zero", "cold", "reasoning", "tuned", "r1")
COLUMNS = {
    "accuracy": "puzzles right",
    "format": "well formed",
    "consistency": "consistent language",
    "general": "requests right",
    "thanks_once": "thanks said once",
    "win_rate": "preferred to SFT",
}
EVEN = "even"  # in place of a stage: preferred as often as not
N_SAMPLES = 3  # held-out problems whose answers are shown, of each kind


class Claim(NamedTuple):
    """A comparison of two stages that differ in one thing."""

    text: str
    one: str
    other: str
    metric: str
    higher: bool | None
    """Whether the first is expected to be higher, or lower; None: not lower."""


CLAIMS = (
    Claim(
        "On the base, a reward for the language makes it consistent",
        *("no_cold", "zero", "consistency", True),
    ),
    Claim("and costs accuracy", "no_cold", "zero", "accuracy", False),
    Claim(
        "Behind a cold start, consistency decays without that reward",
        *("reasoning", "no_language", "consistency", True),
    ),
    Claim("and the reward costs accuracy", "reasoning", "no_language", "accuracy", False),
    Claim("A cold start gives well-formed answers", "cold", "base", "format", True),
    Claim("SFT of the base on right answers teaches it", "tuned", "base", "accuracy", True),
    Claim("and keeps what RL gained", "tuned", "reasoning", "accuracy", None),
    Claim("General data keeps the general skill", "tuned", "alone", "general", True),
    Claim("RL for all scenarios gives answers that are preferred", "r1", EVEN, "win_rate", True),
    Claim("and keeps the reasoning", "r1", "tuned", "accuracy", None),
    Claim(
        "A reward model in every step is hacked: the hidden preference falls",
        *("hacked", "r1", "win_rate", False),
    ),
)


def verdict(one: list[float], other: list[float], higher: bool | None) -> str:
    """What two shares with intervals say of a claim; higher: as in Claim."""
    if one[1] <= other[2] and other[1] <= one[2]:
        alike = "no difference: the intervals overlap"
        return "yes: the intervals overlap" if higher is None else alike
    return "yes" if (one[0] > other[0]) == (higher is not False) else "no: the other way round"


# ---- sections ----


def headline(stages: dict[str, dict], plotted: Path | None) -> str:
    """Title, what this is, and the picture."""
    about = paragraph(
        "A small language model goes the whole road of DeepSeek-R1. It thinks about number puzzles "
        "in one of two languages, which the arrow of the puzzle names, and it answers plain "
        "requests. Its pretraining text mixes the languages, and those who write the second are "
        "more persistent: so what is right and what is consistent pull apart."
    )
    shown = picture(
        plotted,
        "the shares of right puzzles, consistent language and right requests after each stage",
        "Held-out problems, sampled at temperature 1.",
        full=True,
    )
    return f"<h1>From R1-Zero to R1</h1>\n{about}\n{shown}"


def stage_table(stages: dict[str, dict]) -> str:
    """A row per stage."""
    rows = []
    for name, found in stages.items():
        title, what = TITLES[name]
        cells = [share_with_interval(found.get(metric)) for metric in COLUMNS]
        steps = found.get("steps_to_70")
        reached = "–" if steps is None else str(steps)
        rows.append([f"{title}\n{what}", *cells, f"{found['tokens']:.1f}", reached])
    head = ["stage", *COLUMNS.values(), "tokens", "steps to 70 %"]
    return section(
        "What each stage did",
        paragraph(
            "Shares with 95 % intervals over held-out problems, of one seed: other seeds scatter "
            "more than these intervals say. <b>Consistent</b> is the share of the words of the "
            "thoughts that are in the language of the arrow. <b>Preferred</b> is how often the "
            "hidden preference favours an answer to a request over one of the SFT model; ties "
            "count half."
        ),
        page.table(head, rows),
    )


def claims(stages: dict[str, dict]) -> str:
    """What is claimed of the road, and what came out."""
    rows, known = [], stages | {EVEN: {"win_rate": [0.5, 0.5, 0.5]}}
    titles = {name: title for name, (title, _) in TITLES.items()} | {EVEN: "as often as not"}
    for claim in CLAIMS:
        one, other = (known.get(name, {}).get(claim.metric) for name in (claim.one, claim.other))
        if one is None or other is None:
            continue
        names = f"{titles[claim.one]} against {titles[claim.other]}"
        values = f"{share_with_interval(one)} against {share_with_interval(other)}"
        rows.append([claim.text, names, values, verdict(one, other, claim.higher)])
    if not rows:
        return ""
    return section("Claims", page.table(["claim", "compared", "measured", "holds"], rows))


def samples(folder: Path, stages: dict[str, dict]) -> str:
    """The answers of each stage of the road to the same held-out problems."""
    parts = []
    for name in ROAD:
        path = folder / f"eval_{name}.jsonl"
        if name not in stages or not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        chosen = [row for kind in (" -> ", " → ", "say ") for row in first_of(rows, kind)]
        answers = [
            page.response(row["response"], row["accuracy"] == 1, row["prompt"], note(row))
            for row in chosen
        ]
        title = page.escape(TITLES[name][0])
        parts.append(f'<h3>{title}</h3><div class="pair">{"".join(answers)}</div>')
    return section("The same problems, answered after each stage", *parts)


def first_of(rows: list[dict], kind: str) -> list[dict]:
    """The first answers to different problems whose prompt holds a text."""
    found: dict[str, dict] = {}
    for row in rows:
        if kind in row["prompt"]:
            found.setdefault(row["prompt"], row)
    return list(found.values())[:N_SAMPLES]


def note(row: dict) -> str:
    """What to know about an answer."""
    return f"{row['language']:.0%} in the language that was asked for, {row['n_tokens']} tokens"


def spent(folder: Path, results: dict) -> str:
    """Seconds, tokens, FLOPs and money of each stage, and the machine."""
    head, *rows = cost_of(folder, results.get("price", 0.0)).rows()
    machine = [[name, str(value)] for name, value in results["machine"].items()]
    return section(
        "Machine and cost",
        paragraph("As measured; other work on the same machine makes the times longer."),
        page.table(head, rows),
        page.table(["machine", ""], machine),
    )


# ---- the whole ----


def plot_road(folder: Path, stages: dict[str, dict]) -> Path | None:
    """The picture of the road: three shares after each stage; None if there are too few."""
    names = [name for name in ROAD if name in stages]
    if len(names) < 2:
        return None
    series = [
        plots.Bars(label, colour, [stages[name][metric][0] for name in names])
        for label, colour, metric in (
            ("puzzles right", plots.RL, "accuracy"),
            ("consistent language", plots.CONTROL, "consistency"),
            ("requests right", plots.BASE, "general"),
        )
    ]
    titles = [TITLES[name][0] for name in names]
    path = folder / "r1.png"
    return plots.plot_bars(
        "From R1-Zero to R1", titles, series, path, 11, 4.6, y_label="share of held-out answers"
    )


def write_report(folder: str | Path) -> Path:
    """Write report.html and r1.png into the recipe's folder; returns the path of report.html."""
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    # In the order of the road, each control behind what it is compared with.
    stages = {name: results["stages"][name] for name in TITLES if name in results["stages"]}
    sections = [
        headline(stages, plot_road(folder, stages)),
        stage_table(stages),
        claims(stages),
        samples(folder, stages),
        spent(folder, results),
    ]
    path = folder / "report.html"
    atomic_write_text(path, page.document("From R1-Zero to R1", sections))
    return path
