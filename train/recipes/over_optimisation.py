"""How far a policy can be pushed: a reward model's score and the hidden preference over the
distance from the fine-tuned model (after Gao et al., arXiv 2210.10760).

Every checkpoint of a PPO run answers the same held-out problems. A reward model's score says what
PPO thought it was raising, the hidden preference (hidden_preference.py) what it did raise, and the
KL in nats per answer how far it went for it. Beside it stands the best of n answers of the
fine-tuned model, which goes log n - (n - 1) / n far.

Shapes: N answers, P problems, S answers to each.
"""

import math
from pathlib import Path

import numpy as np
import torch

from ...eval.response import grade_response
from ...eval.tasks.base import Task
from ...model.checkpoint import checkpoint_steps, load_model
from ...model.engine.engine import Engine
from ...rl.advantages import sum_per_answer
from ...rl.family import resolve
from ...rl.rollouts import Rollouts
from ...rl.update import Reference, kl_cost_to
from ..report.metrics import share_with_interval
from ..report.plots import BASE, CONTROL, RL, Line, Mark, Panel, plot
from ..reward_model import load_reward_model
from .hidden_preference import (
    best_of,
    kl_of_best_of,
    mean_of,
    preferences,
    sample_answers,
    win_rate,
)
from .parts import PartResults

MICRO_TOKENS = 8192
N_ANSWERS = 2  # per held-out problem
BEST_OF = (1, 2, 4, 8, 16)
ROWS = {"sft": "fine-tuned", "ppo": "PPO", "ppo_few": "PPO, few rankings, no KL"}
CURVES = {"rm": ("PPO, KL in the reward", RL), "rm_few": ("PPO, few rankings, no KL", CONTROL)}
Arms = list[tuple[str, str]]
"""(folder of a reward model, folder of the PPO that was trained on it) of each arm."""


# ---- what is measured ----


class Evaluator:
    """Measures policies on the same held-out problems. Its folder holds the fine-tuned model "sft",
    the reward models and the PPO runs."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        problems: list,
        max_new_tokens: int,
        seed: int,
        device: torch.device,
    ):
        self.folder, self.task, self.problems = folder, task, problems
        self.max_new_tokens, self.seed, self.device = max_new_tokens, seed, device
        self.n_tokens = self.n_answers = 0
        """What was sampled so far."""
        # The KL of each token by k3: of no bias as an estimate, and never negative.
        model, _, _ = load_model(str(folder / "sft"), device)
        options = {"kl_coef": 1.0, "kl_estimator": "k3"}
        of_kl = resolve("ppo", {"micro_tokens": MICRO_TOKENS, "loss": options})
        self.kl_of = kl_cost_to(Reference(model, device), of_kl)

    def sample(self, name: str, which: str | int, n_samples: int) -> Rollouts:
        """Answers of a checkpoint's model."""
        model, tokenizer, _ = load_model(str(self.folder / name), self.device, which)
        engine = Engine(model, tokenizer)
        sampled = sample_answers(
            engine, self.task, self.problems, n_samples, self.max_new_tokens, self.seed
        )
        self.n_tokens += int(sampled.response_lengths.sum())
        self.n_answers += len(sampled.texts)
        return sampled

    def scores(self, sampled: Rollouts, name: str) -> np.ndarray:
        """[P, S]: the scores of a reward model."""
        model, _, _ = load_reward_model(str(self.folder / name), self.device)
        everyone = np.arange(len(sampled.texts))
        return self.per_problem(model.score_rollouts(sampled, everyone, MICRO_TOKENS))

    def liked(self, sampled: Rollouts) -> np.ndarray:
        """[P, S]: the hidden preference for each answer."""
        return self.per_problem(preferences(self.task, sampled))

    def per_problem(self, values_N: np.ndarray) -> np.ndarray:
        """[P, S]."""
        return values_N.reshape(len(self.problems), -1)

    def measure(self, name: str, which: str | int, judges: list[str]) -> dict:
        """What is measured of a checkpoint, as JSON types. judges: names of reward models."""
        sampled = self.sample(name, which, N_ANSWERS)
        kl_N = sum_per_answer(self.kl_of(sampled), sampled.response_offsets)
        liked_PS = self.liked(sampled)
        scores = {judge: self.scores(sampled, judge) for judge in judges}
        return {
            "kl": float(kl_N.mean()),
            "hidden": list(mean_of(liked_PS.mean(1))),
            "proxy": {judge: list(mean_of(one.mean(1))) for judge, one in scores.items()},
            "spread": {judge: float(one.std()) for judge, one in scores.items()},
            **answers_in_numbers(self.task, sampled),
            "liked": liked_PS.tolist(),
        }

    def best_of_n(self, judges: list[str]) -> list[dict]:
        """What the best of n answers of the fine-tuned model is worth, by each reward model."""
        sampled = self.sample("sft", "last", max(BEST_OF))
        liked_PS = self.liked(sampled)
        found = []
        for judge in judges:
            scores_PS = self.scores(sampled, judge)
            for n in BEST_OF:
                row = {"judge": judge, "n": n, "kl": kl_of_best_of(n)}
                row["hidden"] = list(mean_of(best_of(n, scores_PS, liked_PS)))
                row["proxy"] = list(mean_of(best_of(n, scores_PS, scores_PS)))
                found.append(row)
        return found


def answers_in_numbers(task: Task, sampled: Rollouts) -> dict[str, float]:
    """The three things that the hidden preference is made of."""
    graded = [grade_response(task, sample) for sample in sampled.samples()]
    return {
        "right": float(np.mean([grade.accuracy for grade in graded])),
        "well_formed": float(np.mean([grade.format for grade in graded])),
        "tokens": float(sampled.response_lengths.mean()),
    }


def measure_all(evaluator: Evaluator, arms: Arms, results: PartResults) -> None:
    """Measure what has not been measured yet; results.json is written after each checkpoint."""
    points = results.values.setdefault("points", {})
    judges = [name for name, _ in arms]

    # 1. Where all arms begin: whoever is liked better, is it than this one.
    if "sft" not in points:
        points["sft"] = [{"step": 0, **evaluator.measure("sft", "last", judges)}]
        results.write()
    theirs_PS = np.array(points["sft"][0]["liked"])

    # 2. The checkpoints of each arm, in order.
    for name, ppo in arms:
        known = points.setdefault(ppo, [])
        for step in checkpoint_steps(evaluator.folder / ppo)[len(known) :]:
            point = {"step": step, **evaluator.measure(ppo, step, [name])}
            point["wins"] = list(win_rate(np.array(point["liked"]), theirs_PS))
            known.append(point)
            results.write()

    # 3. What could be had without training.
    if "best_of" not in results.values:
        results.values["best_of"] = evaluator.best_of_n(judges)
        results.write()


# ---- what is shown ----


def table(points: dict[str, list[dict]]) -> str:
    """A row per model, at its last checkpoint: is it liked better, what are its answers like?"""
    header = f"{'held-out problems':<26}{'liked better than fine-tuned':>30}{'preference':>12}"
    lines = [f"{header}{'right':>8}{'formed':>8}{'tokens':>8}{'sqrt KL':>9}"]
    for name, title in ROWS.items():
        if not points.get(name):
            continue
        last = points[name][-1]
        wins = share_with_interval(last.get("wins"))
        lines.append(
            f"{title:<26}{wins:>30}{last['hidden'][0]:>12.2f}{last['right']:>8.1%}"
            f"{last['well_formed']:>8.1%}{last['tokens']:>8.1f}{distance(last):>9.2f}"
        )
    return "\n".join(lines)


def distance(point: dict) -> float:
    """The square root of the KL: it grows about in proportion to how far the policy was pushed."""
    return math.sqrt(max(0.0, point["kl"]))


def in_spreads(start: dict, judge: str, scores: list[float]) -> list[float]:
    """Scores as standard deviations above the mean of the fine-tuned model's answers, since the
    scores of two reward models have no common unit. start: the point of the fine-tuned model."""
    mean = start["proxy"][judge][0]
    spread = start["spread"][judge] or 1.0  # scores that are all alike
    return [(score - mean) / spread for score in scores]


def panel_of(title: str, y_label: str, curves: list[tuple[str, str, list]]) -> Panel:
    """Values over the distance from the fine-tuned model. curves: (label, colour, points), each
    point a distance and a value with its interval, which is shown of the last one."""
    lines, marks = [], []
    for label, colour, points in curves:
        at = [x for x, _ in points]
        lines.append(Line(label, colour, at, [value for _, (value, _, _) in points], False))
        value, low, high = points[-1][1]
        marks.append(Mark(label, colour, at[-1], value, (low, high)))
    x_label = "square root of the KL to the fine-tuned model"
    return Panel(title, y_label, lines, marks, x_label=x_label, from_zero=False)


def plot_distance(arms: Arms, values: dict, path: Path) -> Path:
    """Two panels over the distance from the fine-tuned model: score, and hidden preference."""
    [start] = values["points"]["sft"]
    scores, hidden = [], []
    for judge, ppo in arms:
        label, colour = CURVES[judge]
        points = [start, *values["points"][ppo]]
        proxies = [(distance(p), in_spreads(start, judge, p["proxy"][judge])) for p in points]
        scores.append((label, colour, proxies))
        hidden.append((label, colour, [(distance(p), p["hidden"]) for p in points]))

    # The best of n is chosen by the first arm's reward model.
    judge, label = arms[0][0], "best of n, fine-tuned"
    best = [row for row in values["best_of"] if row["judge"] == judge]
    proxies = [(distance(row), in_spreads(start, judge, row["proxy"])) for row in best]
    scores.append((label, BASE, proxies))
    hidden.append((label, BASE, [(distance(row), row["hidden"]) for row in best]))
    panels = [
        panel_of("Score of the reward model", "standard deviations", scores),
        panel_of("Hidden preference", "per answer", hidden),
    ]
    return plot(panels, path, 11, 4.8)
