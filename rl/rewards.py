"""R1-Zero's two rule rewards: is the answer right, and is the response well formed?

Accuracy is the task's grader's verdict on the last answer block. Format is 1 for exactly one think
block followed by exactly one answer block and nothing else, and 0 for an answer that was cut off.
No model judges anything, so there is nothing to hack but the rules (arXiv 2501.12948, section
2.2.2).

Further parts can be given a weight: efficiency and coherence (shaping.py), the consistency of the
language, a function of the user's own (plugin.py), and the score of a reward model (heads.py), for
prompts that no rule can judge. Each part is graded and logged by itself, under its own name.

What is graded is a `Sample` (eval/response.py): the problem, the text, the tokens and how sampling
ended.

A `Grader` is made once per run. What is trained on may differ from what is logged: DAPO's penalty
for long answers is added, shaping does not count in dead groups, and the control deals at random.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..eval.response import Graded, Sample, coherence_of, grade_response, has_language, language_of
from .control import CONTROLS, STEP_CONTROLS
from .plugin import FLAG, check_sign, check_size, load_reward, plugin_rewards, probes
from .shaping import (
    OVERLONG,
    SHAPING,
    efficiency,
    extras_of,
    groups_alike,
    lower_overlong,
    weighted_sum,
    without_extras_in_dead_groups,
)

# Names that a plug-in cannot have: those of the other parts, and of the fields that
# `r1zero grade` writes beside them.
TAKEN = (
    *("accuracy", "format", *SHAPING, "language", "model", "process", OVERLONG, *CONTROLS),
    *("reward", "answer", "why", "line"),
)


@dataclass(frozen=True)
class RewardConfig:
    """How the parts add up: reward = the sum of each part times its weight."""

    accuracy_weight: float = 1.0
    """Reward for a right answer."""
    format_weight: float = 0.2
    """Reward for a well-formed response, right or wrong. A large one favours short, tidy, wrong
    answers."""
    efficiency_weight: float = 0.0
    """Reward for a right answer that is shorter than others of its group (Kimi k1.5): this weight
    times 0.5 for the shortest, down to -0.5 for the longest."""
    coherence_weight: float = 0.0
    """Reward for the share of true equations among those that a response writes; for --task
    countdown."""
    language_weight: float = 0.0
    """Reward for the share of the words of the thoughts that are in the language of the question
    (DeepSeek-R1, eq. 7); 1 for thoughts without words."""
    plugin: str | None = None
    """Reward of your own, as my_module:function: from a list of samples (problem, text, tokens,
    finish_reason) to a list of numbers."""
    plugin_weight: float = 1.0
    """Weight of the reward of your own."""
    model: str | None = None
    """Folder of a reward model (r1zero reward-model), whose score of an answer becomes a part of
    the reward. Where a task names the problems that a model judges, it judges those alone, and
    accuracy does not count there."""
    model_weight: float = 1.0
    """Weight of the reward model's score."""
    model_from: float = 0.0
    """Share of the steps that is trained without the reward model, before it comes in; R1 took it
    for the last quarter or so, since policies learn to please a reward model."""
    process: str | None = None
    """Folder of a process reward (r1zero process-reward), whose scores of an answer's steps are
    normalised in the group, and added to the advantages of the tokens up to each step's end."""
    process_weight: float = 1.0
    """Weight of the advantages of the steps."""

    def __post_init__(self):
        weights = (
            self.accuracy_weight,
            self.format_weight,
            self.efficiency_weight,
            self.coherence_weight,
            self.language_weight,
            self.plugin_weight,
            self.model_weight,
            self.process_weight,
        )
        judging = self.accuracy_weight + self.format_weight
        if self.plugin is not None:
            judging += self.plugin_weight
        if self.model is not None:
            judging += self.model_weight
        if self.process is not None:
            judging += self.process_weight
        if not all(0 <= weight < math.inf for weight in weights) or judging == 0:
            raise ValueError(
                f"rewards: weights are accuracy {weights[0]}, format {weights[1]}, efficiency "
                f"{weights[2]}, coherence {weights[3]}, language {weights[4]}, plugin "
                f"{weights[5]}, model {weights[6]} and process {weights[7]}; expected numbers of 0 "
                "or more, and one above 0 for accuracy, format, a plugin, a model or a process "
                "reward"
            )
        if not 0 <= self.model_from < 1:
            raise ValueError(
                f"--rewards.model-from is {self.model_from}, expected a share of the steps from 0 "
                "to less than 1"
            )
        for flag, model, is_given in (
            ("model-from", "model", self.model is None and self.model_from > 0),
            ("process-weight", "process", self.process is None and self.process_weight != 1),
        ):
            if is_given:
                raise ValueError(
                    f"--rewards.{flag} is given without --rewards.{model}, and changes nothing; "
                    "give the folder of one, or leave it out"
                )
        if self.plugin is None:
            return
        # Whatever is wrong with it is said now, and not in the first step of a run.
        load_reward(self.plugin)
        if self.plugin_name in TAKEN:
            raise ValueError(
                f"{FLAG} is {self.plugin!r}, but {self.plugin_name!r} is the name of something "
                "else in the log; give the function another name"
            )

    @property
    def plugin_name(self) -> str:
        """The name of the plug-in's part: that of the function; empty without a plug-in."""
        return (self.plugin or "").rpartition(":")[2]

    def try_plugin(self, problem, group_size: int) -> None:
        """Call the plug-in once, if there is one, on a few groups of answers to a problem.

        Raises PluginError (plugin.py).
        """
        if self.plugin_name in self.weights and self.plugin is not None:
            plugin_part(probes(problem, group_size), self)

    def model_first(self, steps: int) -> int:
        """The first of so many steps in which the reward model counts."""
        return math.ceil(self.model_from * steps)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part: of accuracy and format, and of any other with one above 0."""
        others = {
            "efficiency": self.efficiency_weight,
            "coherence": self.coherence_weight,
            "language": self.language_weight,
        }
        if self.plugin is not None:
            others[self.plugin_name] = self.plugin_weight
        if self.model is not None:
            others["model"] = self.model_weight
        others = {name: weight for name, weight in others.items() if weight > 0}
        return {"accuracy": self.accuracy_weight, "format": self.format_weight} | others


class StepRewards(NamedTuple):
    """What the steps of all answers are worth (process.py)."""

    scores: np.ndarray
    """[K] float64, from 0 to 1."""
    tokens: np.ndarray
    """[K] int64, rising: which of all response tokens ends each step."""

    def group_offsets(self, response_offsets: np.ndarray, group_offsets: np.ndarray) -> np.ndarray:
        """[G + 1]: where the steps of each group begin among all steps."""
        tokens_before_G = np.asarray(response_offsets)[group_offsets]
        return np.searchsorted(self.tokens, tokens_before_G)


@dataclass(frozen=True)
class Rewards:
    """What each of the N answers earned; all arrays are [N] float64."""

    parts: dict[str, np.ndarray]
    """Each part by its name, not weighted: always "accuracy" (1 for a right answer, else 0) and
    "format" (1 for a well-formed response, else 0), and the others that have a weight."""
    weights: dict[str, float]
    """The weight of each part, and of each training part."""
    total: np.ndarray
    """The weighted sum of the parts: what is logged."""
    training_parts: dict[str, np.ndarray]
    """The parts that are trained on: those above, and "overlong", the penalty for long answers,
    where there is one. In dead groups the parts that do not count there are 0. In the control all
    are dealt out at random, or replaced by one part "random"."""
    training: np.ndarray
    """The weighted sum of the training parts: what the advantage is computed from."""
    why: list[str]
    """The grader's reason in plain words, one per answer."""
    steps: StepRewards | None = None
    """What the steps of the answers are worth, to train on; None without a process reward."""

    @property
    def penalty(self) -> np.ndarray:
        """[N]: what each answer lost for coming near the limit."""
        return 0.0 - self.training_parts.get(OVERLONG, np.zeros(len(self.total)))

    @property
    def accuracy(self) -> np.ndarray:
        return self.parts["accuracy"]

    @property
    def format(self) -> np.ndarray:
        return self.parts["format"]

    def dead(self, rollouts) -> np.ndarray:
        """[G] bool: the groups that teach nothing: their training rewards are alike, and so are the
        scores of their steps, if there are any."""
        dead_G = groups_alike(self.training, rollouts.group_offsets)
        if self.steps is None:
            return dead_G
        steps_G = self.steps.group_offsets(rollouts.response_offsets, rollouts.group_offsets)
        return dead_G & groups_alike(self.steps.scores, steps_G)


def plugin_part(
    samples: Sequence[Sample], config: RewardConfig, plugin: Callable | None = None
) -> np.ndarray:
    """[N]: what the plug-in gives. plugin: its function, if it is loaded already."""
    given_N = plugin_rewards(config.plugin, samples, plugin)
    with np.errstate(over="ignore"):
        weighted_N = config.plugin_weight * given_N
    check_size(config.plugin, weighted_N, samples)
    return given_N


def judge(
    task, samples: Sequence[Sample], config: RewardConfig, plugin: Callable | None = None
) -> tuple[list[Graded], dict[str, np.ndarray]]:
    """(the grades, the parts that each response earns by itself): all but efficiency, each [N].

    plugin: the function of config.plugin, if it is loaded already. Raises PluginError (plugin.py).
    """
    graded = [grade_response(task, sample) for sample in samples]
    parts = {
        "accuracy": np.array([grade.accuracy for grade in graded], np.float64),
        "format": np.array([grade.format for grade in graded], np.float64),
    }
    weights = config.weights
    if "coherence" in weights:
        shares = [coherence_of(task, sample) for sample in samples]
        parts["coherence"] = np.array(shares, np.float64)
    if "language" in weights:
        shares = [language_of(task, sample) for sample in samples]
        parts["language"] = np.array(shares, np.float64)
    if config.plugin_name in weights:
        parts[config.plugin_name] = plugin_part(samples, config, plugin)
    return graded, parts


def judged_by_model(task, rollouts) -> np.ndarray:
    """[N] bool: the answers that a reward model judges; all of them where the task does not say."""
    asks = getattr(task, "judged_by_model", None) or (lambda problem: True)
    judged_G = [bool(asks(problem)) for problem in rollouts.problems]
    return np.repeat(judged_G, np.diff(rollouts.group_offsets))


def counted_accuracy(task, accuracy_N: np.ndarray, judged_N: np.ndarray) -> np.ndarray:
    """[N]: accuracy, and 0 for the answers to problems that the task leaves to a reward model. A
    task that does not say leaves none to it: then both count."""
    leaves_some = getattr(task, "judged_by_model", None) is not None
    return np.where(judged_N & leaves_some, 0.0, accuracy_N)


def why(graded: Graded) -> str:
    """The reasons for a grade in plain words."""
    return graded.why if graded.format else f"{graded.why} Format: {graded.why_format}"


def check_parts(task, config: RewardConfig) -> None:
    """Raise ValueError for a part that the task does not have."""
    if config.coherence_weight > 0 and getattr(task, "coherence", None) is None:
        raise ValueError(
            f"--rewards.coherence-weight is {config.coherence_weight:g}, but coherence does not "
            f"apply to the task {getattr(task, 'name', '')}, which does not check the equations of "
            "an answer; leave it out"
        )
    if config.language_weight > 0 and not has_language(task):
        raise ValueError(
            f"--rewards.language-weight is {config.language_weight:g}, but the prompts of the task "
            f"{getattr(task, 'name', '')} have no words that would tell a language; leave it out, "
            "or ask in words (--options template=r1_zero)"
        )
    if config.process is not None and getattr(task, "step_ends", None) is None:
        raise ValueError(
            f"--rewards.process is given, but the task {getattr(task, 'name', '')} does not say "
            "where the steps of an answer end; leave it out"
        )


def check_no_model(config: RewardConfig, command: str) -> None:
    """Raise ValueError for a reward model or a process reward where none is loaded."""
    for name, what in (("model", "reward model"), ("process", "process reward")):
        if getattr(config, name) is not None:
            raise ValueError(
                f"--rewards.{name} is for r1zero grpo, and r1zero {command} has no {what}; leave "
                "it out"
            )


class Grader:
    """From answers to rewards. Made once per run from the run's Algorithm (rl/family.py)."""

    def __init__(self, config, score: Callable | None = None, score_steps: Callable | None = None):
        """score: from (rollouts, indices of answers) to a reward model's score of each of them; for
        rewards.model alone. score_steps: from (task, rollouts) to StepRewards; for rewards.process
        alone."""
        self.config: RewardConfig = config.rewards
        self.weights = self.config.weights | {OVERLONG: 1.0, "random": 1.0}
        # Loaded once: the folder that it was found in may go away during a run.
        self.plugin = load_reward(self.config.plugin) if self.config.plugin else None
        self.score = score
        self.score_steps = score_steps
        self.deal_steps = None
        """In the control: deals the scores of steps out at random."""
        # A model with a weight of 0 judges nothing, and comes in at no step.
        self.model_first = math.inf
        if "model" in self.weights:
            self.model_first = self.config.model_first(config.steps)
        self.needs_positive = config.advantage.scale == "mean"
        self.adjustments: list[Callable] = []
        """Each takes (training parts, rollouts) and returns the parts to train on."""
        if config.overlong_buffer:
            limit, buffer = config.max_new_tokens, config.overlong_buffer
            self.adjustments.append(partial(lower_overlong, max_new_tokens=limit, buffer=buffer))
        extras = extras_of(config.dead_groups, self.weights)
        if extras:
            weights = self.weights
            self.adjustments.append(
                partial(without_extras_in_dead_groups, weights=weights, extras=extras)
            )
        if config.control != "none":
            self.adjustments.append(partial(CONTROLS[config.control], seed=config.seed))
            self.deal_steps = partial(STEP_CONTROLS[config.control], seed=config.seed)

    def __call__(self, task, rollouts) -> Rewards:
        """Grade all answers of the rollouts. Raises PluginError (plugin.py)."""
        # 1. What each answer earns by itself, and what it earns within its group.
        samples = rollouts.samples()
        graded, parts = judge(task, samples, self.config, self.plugin)
        if "efficiency" in self.weights:
            lengths_N, offsets = rollouts.response_lengths, rollouts.group_offsets
            parts["efficiency"] = efficiency(lengths_N, parts["accuracy"], offsets)

        # 2. What no rule can judge, a reward model does. Accuracy does not count there.
        counted = parts
        if "model" in self.weights:
            judged_N = judged_by_model(task, rollouts)
            if rollouts.weights_version >= self.model_first:
                parts["model"] = self.model_part(rollouts, judged_N)
            counted = parts | {"accuracy": counted_accuracy(task, parts["accuracy"], judged_N)}

        # 3. What is trained on may be something else.
        training_parts = counted
        for adjust in self.adjustments:
            training_parts = adjust(training_parts, rollouts)
        total_N = weighted_sum(counted, self.weights)
        training_N = weighted_sum(training_parts, self.weights)

        # 4. A plug-in's reward below 0 is told here, where its sample is known.
        name = self.config.plugin_name
        if self.needs_positive and name in parts and (training_N < 0).any():
            check_sign(self.config.plugin, parts[name], total_N, samples)

        # 5. The steps are judged by a model of their own.
        steps = None
        if self.score_steps is not None:
            steps = self.score_steps(task, rollouts)
            if self.deal_steps is not None:
                steps = self.deal_steps(steps, rollouts)
        return Rewards(
            parts=parts,
            weights=self.weights,
            total=total_N,
            training_parts=training_parts,
            training=training_N,
            why=[why(grade) for grade in graded],
            steps=steps,
        )

    def model_part(self, rollouts, judged_N: np.ndarray) -> np.ndarray:
        """[N]: the reward model's score of the answers that it judges, and 0 for the others."""
        judged = np.flatnonzero(judged_N)
        scores_N = np.zeros(len(judged_N))
        scores_N[judged] = self.score(rollouts, judged)
        return scores_N
