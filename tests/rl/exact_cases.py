"""A policy small enough to enumerate, and the shipped estimators in expectation over all that it can say.

The toy: 3 tokens, one of which ends an answer, and at most 3 of them in one, so there are 15 answers, and 7
prefixes with three logits each, in fp64. The expectation of an update over all groups that could be sampled
is then a sum of 225 terms, and no statistics are needed to hold it against what it should be.

`expected_update` is the shipped code's, `expected_paper` that of a definition in exact_papers.py. Both
are directions of ascent.

Shapes: P prefixes, V vocabulary, R response tokens, N answers.
"""
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch

from r1zero.kernels.grpo import POLICY_METRICS
from r1zero.rl.advantages import AdvantageConfig, advantages, parts_apart
from r1zero.rl.family import PRESETS
from r1zero.rl.losses import (
    LossConfig,
    entropy_bonus,
    importance_weights,
    kl_estimate,
    loss_weights,
    policy_loss,
)


class Toy:
    def __init__(self, vocab: int = 3, longest: int = 3):
        self.vocab, self.longest, self.end = vocab, longest, vocab - 1
        words = range(vocab - 1)
        self.prefixes = [p for n in range(longest) for p in product(words, repeat=n)]
        self.answers = [(*p, self.end) for p in self.prefixes] + [*product(words, repeat=longest)]
        self.row = {p: i for i, p in enumerate(self.prefixes)}

    def policy(self, seed: int, spread: float = 1.0) -> torch.Tensor:
        """[P, V] random logits."""
        logits = torch.randn(len(self.prefixes), self.vocab, generator=torch.Generator().manual_seed(seed))
        return spread * logits.double()

    def places(self, answers) -> tuple[list[int], list[int]]:
        """(the row of the prefix, the token) of each token of the answers."""
        return [self.row[y[:t]] for y in answers for t in range(len(y))], [v for y in answers for v in y]

    def logp(self, logits: torch.Tensor, answers) -> torch.Tensor:
        """[R]"""
        return logits.log_softmax(-1)[self.places(answers)]

    def answer_logp(self, logits: torch.Tensor) -> torch.Tensor:
        """[N], of each whole answer."""
        per_answer = self.logp(logits, self.answers).split([*map(len, self.answers)])
        return torch.stack([x.sum() for x in per_answer])

    def prefix_chances(self, logits: torch.Tensor) -> torch.Tensor:
        """[P] how likely each prefix is to come up, as numbers: no gradient."""
        p = logits.detach().softmax(-1)
        return torch.stack([prod([p[self.row[s[:t]], s[t]] for t in range(len(s))], start=p.new_ones(()))
                            for s in self.prefixes])


@dataclass
class Case:
    """The policy, the old policy (its ratio's denominator), the sampler (the old policy but for rounding),
    the reference, the rewards [N] and a critic [P]."""

    toy: Toy
    theta: torch.Tensor
    old: torch.Tensor
    sampler: torch.Tensor
    ref: torch.Tensor
    rewards: np.ndarray
    values: np.ndarray

    def gradient(self, objective: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(objective, self.theta, allow_unused=True, materialize_grads=True)[0]

    def true_gradient(self, rewards=None) -> torch.Tensor:
        """[P, V] of the expected reward, sum_y p(y) r(y)."""
        rewards = torch.as_tensor(self.rewards if rewards is None else rewards)
        return self.gradient((self.toy.answer_logp(self.theta).exp() * rewards).sum())

    def kl_gradient(self) -> torch.Tensor:
        """[P, V] of KL(policy || reference) over whole answers."""
        logp = self.toy.answer_logp(self.theta)
        return self.gradient((logp.exp() * (logp - self.toy.answer_logp(self.ref))).sum())

    def local_gradient(self, figure) -> torch.Tensor:
        """[P, V] of figure(logp [P, V], ref_logp [P, V]) -> [P], prefixes as likely as they are now."""
        found = figure(self.theta.log_softmax(-1), self.ref.log_softmax(-1))
        return self.gradient((self.toy.prefix_chances(self.theta) * found).sum())


WEIGHTS = {"accuracy": 1.0, "format": 0.2}


def parts_of(rewards) -> dict:
    """What "graded" rewards are the sum of, each part 0 or 1."""
    accuracy = (np.asarray(rewards) >= 1) * 1.0
    return {"accuracy": accuracy, "format": (rewards - accuracy > 0.1) * 1.0}


def with_ratios(old: torch.Tensor, theta: torch.Tensor, ratios: dict) -> torch.Tensor:
    """[P, V] old, but that theta's chance over it is ratios[row][token]; the rest of a row makes room."""
    p = old.softmax(-1)
    for row, wanted in ratios.items():
        fixed = {token: theta[row].softmax(-1)[token] / ratio for token, ratio in wanted.items()}
        rest = [token for token in range(len(p[row])) if token not in fixed]
        p[row, rest] *= (1 - sum(fixed.values())) / p[row, rest].sum()
        p[row, list(fixed)] = torch.stack(list(fixed.values()))
    assert (p > 0).all()
    return p.log()


def make_case(rewards: str = "graded", off_policy: bool = False, toy: Toy | None = None) -> Case:
    """rewards: "graded" (0, 0.2, 1.0 or 1.2), "right" (0 or 1) or "alike".

    Off-policy some ratios lie where one preset clips and another does not: 1.24 and 0.75 of a token, 1.00035
    and 0.99965 of the answers of the end token alone and of 0 and the end token.
    """
    beside_bounds, toy = toy is None and off_policy, toy or Toy()
    theta = toy.policy(1)
    old = theta + toy.policy(3, 1.3) if off_policy else theta.clone()
    if beside_bounds:
        first, after_0, after_1 = (toy.row[s] for s in ((), (0,), (1,)))
        old = with_ratios(old, theta, {first: {toy.end: 1.00035, 0: 1.24}, after_1: {0: 0.75},
                                       after_0: {toy.end: 0.99965 ** 2 / 1.24}})
    rng = np.random.default_rng(0)
    graded = rng.choice([0.0, 0.2, 1.0, 1.2], len(toy.answers))
    rewards = {"graded": graded, "right": (graded >= 1) * 1.0, "alike": 0 * graded}[rewards]
    return Case(toy, theta.requires_grad_(), old, old, toy.policy(2), rewards,
                rng.normal(size=len(toy.prefixes)))


def dials(algo: str | None = None, **changes) -> tuple[AdvantageConfig, LossConfig]:
    """A preset, some of its options changed; without one the defaults: a mean over tokens, and no KL."""
    ours = {name: changes.pop(name) for name in ("baseline", "scale", "gamma", "lam") if name in changes}
    preset = PRESETS[algo] if algo else {}
    return (AdvantageConfig(**{**preset.get("advantage", {}), **ours}),
            LossConfig(**{**preset.get("loss", {}), **changes}))


def plain(**changes) -> tuple[AdvantageConfig, LossConfig]:
    """No ratio, no scale and a constant for the mean: what has a theory."""
    return dials(**dict(scale="none", objective="reinforce", mean="constant") | changes)


# ---- the shipped code ----

def expected_update(case: Case, config: tuple[AdvantageConfig, LossConfig], sizes=(2,),
                    shows: tuple[str, ...] = ()) -> torch.Tensor:
    """[P, V] minus the gradient of the loss, in expectation over all batches of groups of these sizes that
    the sampler could draw. A batch is one update, put together as rl/update.py does. shows: metrics that must
    not be 0."""
    (advantage, loss), toy = config, case.toy
    chances = dict(zip(toy.answers, toy.answer_logp(case.sampler).exp().tolist(), strict=True))
    rewards = dict(zip(toy.answers, case.rewards, strict=True))
    drawn, ref, values = ({y: found[toy.places([y])] for y in toy.answers} for found in (
        case.sampler.log_softmax(-1).numpy(), case.ref.log_softmax(-1).numpy(),
        case.values[:, None].repeat(toy.vocab, 1)))
    batches = [*product(toy.answers, repeat=sum(sizes))]
    found, weights = [], []
    for batch in batches:
        lengths = np.array([len(y) for y in batch])
        kl_R = None if loss.kl_in == "loss" or not loss.kl_coef else loss.kl_coef * kl_estimate(
            np.concatenate([drawn[y] for y in batch]), np.concatenate([ref[y] for y in batch]),
            loss.kl_estimator)
        earned, groups = np.array([rewards[y] for y in batch]), np.cumsum([0, *sizes])
        if advantage.scale == "parts":
            earned = parts_apart(parts_of(earned), WEIGHTS, groups)
        found.append(advantages(earned, groups, np.cumsum([0, *lengths]), advantage, kl_R,
                                np.concatenate([values[y] for y in batch])
                                if advantage.baseline == "critic" else None)[0])
        counted = [len(y) * (y[-1] == toy.end or not loss.overlong_filter) for y in batch]
        w = loss_weights(counted, loss.mean, toy.longest) * prod(chances[y] for y in batch)
        weights.append(np.repeat(w, lengths))
    answers = [y for batch in batches for y in batch]
    lengths = torch.tensor([len(y) for y in answers])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    a, w = torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(weights))
    logp, old, ref_logp = (toy.logp(p, answers) for p in (case.theta, case.old, case.ref))
    if loss.max_importance:
        a = a * importance_weights(old, toy.logp(case.sampler, answers), offsets, loss)
    total, metrics = policy_loss(logp, old, ref_logp, a, w, offsets, loss)
    if loss.entropy_coef:
        p = case.theta.softmax(-1)
        entropy = -(p * p.log()).sum(-1)[toy.places(answers)[0]]
        total = total + entropy_bonus(entropy, w, loss.entropy_coef)
    assert all(metrics[POLICY_METRICS.index(name)] > 0 for name in shows), metrics
    return -case.gradient(total)


# ---- the papers ----

@dataclass
class Step:
    """One token of an answer: its log-prob now (with a gradient), under the old policy, the sampler and the
    reference, and what the critic says of the prefix before it."""

    now: torch.Tensor
    old: float
    sampler: float
    ref: float
    value: float

    def __post_init__(self):
        self.ratio = (self.now - self.old).exp()


@dataclass
class Answer:
    reward: float
    chance: float
    ended: bool
    steps: list[Step]


def naive_answers(case: Case) -> list[Answer]:
    toy = case.toy
    now = [row.unbind() for row in case.theta.log_softmax(-1).unbind()]
    others = [x.log_softmax(-1).tolist() for x in (case.old, case.sampler, case.ref)]
    found = []
    for y, reward in zip(toy.answers, case.rewards.tolist(), strict=True):
        steps = [Step(now[i][v], *(x[i][v] for x in others), float(case.values[i]))
                 for i, v in zip(*toy.places([y]), strict=True)]
        found.append(Answer(reward, np.exp(sum(s.sampler for s in steps)), y[-1] == toy.end, steps))
    return found


def expected_paper(case: Case, objective) -> torch.Tensor:
    """[P, V] the gradient of the expectation of objective(group of two Answers) -> [] over all such groups;
    the order in a group does not matter."""
    answers = naive_answers(case)
    pairs = [(1 + (i < j), a, b) for i, a in enumerate(answers) for j, b in enumerate(answers) if i <= j]
    return case.gradient(sum(n * a.chance * b.chance * objective([a, b]) for n, a, b in pairs))
