"""A reward model: which of two answers would people prefer?

    r1zero reward-model --run runs/rm --base runs/sft --data rankings.jsonl --steps 100
    r1zero grpo --run runs/ppo --base runs/sft --algo ppo --rewards.model runs/rm

It is the base with a value head (rl/heads.py), trained on rankings (rankings.py) by the loss of
Bradley and Terry (rl/preferences.py). Afterwards its scores are moved so that the mean of the
training answers is 0, and a table and calibration.png show how far it agrees with the judge on
prompts that it has not seen. `--noise` turns pairs around at random, to see what a careless judge
costs: no model can then agree with more than 1 - noise of the held-out pairs.

The checkpoint at the end is the reward model; one before it has no centre yet, and is not used.

Left out: adapters, the balance of experts, and several reward models together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..eval.console import say, show
from ..eval.harness import Estimate, interval
from ..model.checkpoint import Checkpoint, CheckpointError
from ..model.precision import Precision
from ..model.tokenizer import Tokenizer
from ..rl.heads import RewardModel
from ..rl.preferences import (
    Pairs,
    Ranking,
    agreement,
    calibration,
    margins_under,
    preference_loss,
)
from .fit_head import (
    HeadConfig,
    fit_head,
    load_head,
    open_base,
    read_files,
    split_into_batches,
)
from .machine import reuse_memory
from .rankings import encode_rankings, read_rankings
from .report.plots import BASE, RL, Line, Mark, Panel, plot
from .run import Run, at_least

LOOP = "reward-model"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(HeadConfig):
    """Train a reward model on rankings."""

    LOOP: ClassVar[str] = LOOP

    data: tuple[str, ...]
    """The .jsonl files whose lines have the fields prompt, answers (a list of texts) and ranks (a
    list of whole numbers, 1 for the best; equal ones are a tie). A field right, a list of true and
    false, splits the table of results. A number behind a file, as in a.jsonl:3 b.jsonl:1, is its
    share of the rankings."""
    noise: float = 0.0
    """Probability that a pair of answers is turned around, in training and among the pairs held
    out."""
    rankings_per_step: int = 16
    """Number of rankings per optimizer step, each with all of its pairs."""

    def __post_init__(self):
        HeadConfig.__post_init__(self)
        at_least(self, 1, "rankings_per_step")
        if not 0 <= self.noise <= 0.5:
            raise ValueError(f"--noise is {self.noise}, expected a probability from 0 to 0.5")


# ---- a reward model from its folder ----


def load_reward_model(
    folder: str, device: torch.device, precision: Precision | None = None
) -> tuple[RewardModel, Tokenizer, Checkpoint]:
    """The reward model of a run's folder, its tokenizer and its checkpoint.

    precision: what it computes in; None is the device's own choice. Raises CheckpointError if there
    is none, or one whose training has not ended.
    """
    model, tokenizer, checkpoint = load_head(folder, LOOP, RewardModel, device, precision)
    if not model.is_centred:
        raise CheckpointError(
            f"{checkpoint.path} is a reward model whose training was stopped, and its scores are "
            "not centred; go on with r1zero reward-model --resume"
        )
    return model, tokenizer, checkpoint


# ---- what it learns ----


class Preferences:
    """The loss of rankings, and the pairs held out: an Objective (fit_head.py)."""

    def __init__(self, trained: list[Ranking], held_out: list[Ranking], config: RewardModelConfig):
        self.trained, self.pairs_held_out, self.config = trained, held_out, config

    def loss(self, model: RewardModel, rankings: list[Ranking]) -> tuple[torch.Tensor, np.ndarray]:
        margins_P = margins_under(model, rankings)
        agreed_P = agreement(margins_P.detach().cpu().double().numpy())
        return preference_loss(margins_P, rankings), agreed_P

    def count(self, rankings: list[Ranking]) -> int:
        return len(rankings)

    def begin(self, model: RewardModel) -> None:
        """What is trained further loses the centre that it had, until its training ends again."""
        model.forget_centre()

    def finish(self, model: RewardModel) -> None:
        """A score means nothing but in comparison, until the training answers have a mean of 0."""
        sequences = [tokens for ranking in self.trained for tokens in ranking.sequences]
        model.centre_on(sequences, self.config.micro_tokens)

    def held_out(self, model: RewardModel) -> dict[str, float]:
        held_out = self.pairs_held_out
        scores = scores_of(model, held_out, self.config.micro_tokens)
        shares = measure(scores, held_out, self.config)
        return {"held_out_accuracy": shares["agrees"].mean}


# ---- how far it agrees with the judge ----


def scores_of(model: RewardModel, ranking: list[Ranking], micro_tokens: int) -> list[np.ndarray]:
    """[K] of each ranking: the scores of its answers."""
    sequences = [tokens for r in ranking for tokens in r.sequences]
    scores_N = model.scores(sequences, micro_tokens)
    return np.split(scores_N, np.cumsum([len(r.sequences) for r in ranking])[:-1])


def share_of(
    scores: list[np.ndarray], rankings: list[Ranking], pairs: list[Pairs], chosen: list[np.ndarray]
) -> Estimate:
    """The share of the chosen pairs in which the model agrees, each prompt counting once, with its
    95 % interval over prompts. chosen: [P] bool of each ranking."""
    shares: dict[str, list[float]] = {}
    for scores_K, ranking, (better, worse), chosen_P in zip(
        scores, rankings, pairs, chosen, strict=True
    ):
        if chosen_P.any():
            agreed_P = agreement(scores_K[better] - scores_K[worse])
            shares.setdefault(ranking.prompt, []).append(float(agreed_P[chosen_P].mean()))
    if not shares:
        return Estimate(np.nan, np.nan, np.nan)
    # Rankings of one prompt are not independent, so their mean counts.
    n_pairs = int(np.mean([chosen_P.sum() for chosen_P in chosen if chosen_P.any()]))
    return interval([float(np.mean(each)) for each in shares.values()], max(1, n_pairs))


def measure(
    scores: list[np.ndarray], held_out: list[Ranking], config: RewardModelConfig
) -> dict[str, Estimate]:
    """How far the model's scores agree with the judge on held-out prompts: in all, without the
    noise, and apart for pairs of right against wrong and within a class, where it is known what is
    right."""
    noisy, clean = [r.pairs for r in held_out], [r.clean for r in held_out]
    every = [np.ones(len(pairs.better), bool) for pairs in clean]
    found = {"agrees": share_of(scores, held_out, noisy, every)}
    if config.noise:
        found["agrees without the noise"] = share_of(scores, held_out, clean, every)
    if all(ranking.right is not None for ranking in held_out):
        apart = [r.right[r.clean.better] != r.right[r.clean.worse] for r in held_out]
        found["right against wrong"] = share_of(scores, held_out, clean, apart)
        found["within a class"] = share_of(scores, held_out, clean, [~differ for differ in apart])
    return {name: share for name, share in found.items() if not np.isnan(share.mean)}


def held_out_margins(scores: list[np.ndarray], held_out: list[Ranking]) -> np.ndarray:
    """[P of all]: the margins of all held-out pairs."""
    return np.concatenate(
        [s[r.pairs.better] - s[r.pairs.worse] for s, r in zip(scores, held_out, strict=True)]
    )


def report(run: Run, model: RewardModel, held_out: list[Ranking], config) -> None:
    """Write what was measured to run.json and calibration.png, and show it as a table."""
    scores = scores_of(model, held_out, config.micro_tokens)
    found = measure(scores, held_out, config)
    bins = calibration(held_out_margins(scores, held_out))
    n_prompts = len({ranking.prompt for ranking in held_out})
    run.note(
        reward_model={
            "prompts": n_prompts,
            "pairs": sum(one.n_pairs for one in bins),
            "ceiling": 1 - config.noise,
            "shares": {name: list(share) for name, share in found.items()},
            "calibration": [one._asdict() for one in bins],
        }
    )
    plot_calibration(bins, run.folder / "calibration.png")
    lines = [f"{n_prompts:,} held-out prompts, 95 % intervals over prompts"]
    for name, share in found.items():
        lines.append(f"  {name:<25}{share.mean:7.1%}   [{share.low:.1%}, {share.high:.1%}]")
    lines.append(f"  {'the most that could':<25}{1 - config.noise:7.1%}   1 - noise")
    lines.append(f"\n  {'how sure it is':<25}{'agrees':>7}   pairs")
    for one in bins:
        lines.append(f"  {one.predicted:<25.1%}{one.agreed:7.1%}   {one.n_pairs:,}")
    show("\n".join(lines))


def plot_calibration(bins: list, path: Path) -> Path:
    """How often the judge agrees, over how sure the model is; on the diagonal it is as often right
    as it thinks."""
    diagonal = Line("as sure as it is right", BASE, [50.0, 100.0], [0.5, 1.0])
    label = f"{sum(one.n_pairs for one in bins):,} held-out pairs"
    marks = []
    for one in bins:
        n_agreed = round(one.agreed * one.n_pairs)
        _, *ends = interval([1.0] * n_agreed + [0.0] * (one.n_pairs - n_agreed))
        marks.append(Mark(label, RL, 100 * one.predicted, one.agreed, tuple(ends)))
    panel = Panel(
        "Calibration of the reward model",
        "share in which the judge agrees",
        [diagonal],
        marks,
        percent=True,
        x_label="how sure the model is of the better answer, %",
    )
    return plot([panel], path, 6, 4.5)


# ---- the whole ----


def reward_model(config: RewardModelConfig) -> RewardModel:
    """Run the loop; returns the trained reward model.

    Raises ValueError for bad flags or data, and Stopped after Ctrl-C.
    """
    reuse_memory()
    run, trunk, tokenizer = open_base(config, "reward model")
    files = read_files(config, read_rankings)
    rankings = [ranked for file in files for ranked in file]
    encoded = encode_rankings(tokenizer, rankings, trunk.config, config.noise, config.seed)
    prompts = [[ranked.prompt for ranked in file] for file in files]
    batches, trained, held_out = split_into_batches(
        config, prompts, encoded, config.rankings_per_step, "rankings"
    )
    say(pairs_in_words(trained, held_out))
    model = RewardModel(trunk)
    with run:
        objective = Preferences(trained, held_out, config)
        fit_head(run, model, tokenizer, batches, config, objective)
        report(run, model, held_out, config)
    return model


def pairs_in_words(trained: list[Ranking], held_out: list[Ranking]) -> str:
    """How much there is to learn from, on one line."""
    both = [*trained, *held_out]
    n_pairs = [len(ranking.pairs.better) for ranking in both]
    n_possible = [len(r.sequences) * (len(r.sequences) - 1) // 2 for r in both]
    return (
        f"{len(trained):,} rankings with {sum(n_pairs[: len(trained)]):,} pairs to train on, "
        f"{len(held_out):,} with {sum(n_pairs[len(trained) :]):,} held out; "
        f"{sum(n_possible) - sum(n_pairs):,} ties left out"
    )
