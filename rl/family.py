"""The family, each member as a composition of the pieces in advantages.py and losses.py.

A preset is what its paper has; `--algo NAME` takes it, and any dial that is given besides wins over it.

    name            source              baseline         scale   ratio, clip       mean       KL
    r1_zero         the demo            group            std     token, 0.2        token      -
    grpo            arXiv 2402.03300    group            std     token, 0.2        sequence   k3 in the loss
    dr_grpo         arXiv 2503.20783    group            -       token, 0.2        constant   -
    dapo            arXiv 2503.14476    group            std     token, 0.2|0.28   token      -
    gspo            arXiv 2507.18071    group            std     sequence, 3-4e-4  sequence   -
    cispo           arXiv 2506.13585    group            std     constant, to 6    token      -
    rloo            arXiv 2402.14740    leave_one_out    -       none              constant   k1 in the reward
    reinforce_pp    arXiv 2501.03262    none             batch   token, 0.2        token      k1 in the reward
    reinforce       Williams 1992       batch            -       none              constant   -
    ppo             arXiv 1707.06347    critic           batch   token, 0.2        token      k1 in the reward

DAPO besides draws groups without signal anew and lowers the reward of answers that come near the limit.
r1_zero is GRPO as most small reproductions run it today: token mean, no KL. R1-Zero itself is nearer to
`grpo`.

Where a preset is not its paper's: the weight of the KL is 0.001 for all that have one (R1-Zero's;
DeepSeekMath took 0.04); dapo drops groups of equal reward, form and length included, where its paper looks at
right and wrong alone; ppo has InstructGPT's KL in the reward, whitening, and TinyZero's lam of 1 (the paper
of GAE: 0.95); cispo's bound is ours, since its paper leaves it open; a sum over an answer's tokens (rloo,
reinforce) is over max_new_tokens here.

The gradients are not of one size: without the std, and over max_new_tokens, those of dr_grpo, rloo and
reinforce are several times smaller. Adam with a small eps does not see that; with the loop's own 1e-4, which
keeps noise still, their first step is 3.5 times smaller than r1_zero's (the demo's base, 8 x 8 answers): to
compare presets, take --optim.eps 1e-8 and a lower --optim.lr, as benchmarks/ablation.py does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .advantages import advantages
from .losses import grpo_loss, token_weights

BASE: dict[str, dict[str, Any]] = {
    "advantage": dict(baseline="group", scale="std", gamma=1.0, lam=1.0),
    "loss": dict(
        objective="clip",
        clip_low=0.2,
        clip_high=0.2,
        mean="token",
        kl_coef=0.0,
        kl_in="loss",
        kl_estimator="k3",
        entropy_coef=0.0,
        max_importance=0.0,
        overlong_filter=False,
    ),
    "loop": dict(dynamic_sampling=1, overlong_buffer=0.0),
}
KL_IN_REWARD = dict(kl_coef=0.001, kl_in="reward", kl_estimator="k1")
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "r1_zero": {},
    "grpo": {"loss": dict(mean="sequence", kl_coef=0.001)},
    "dr_grpo": {"advantage": dict(scale="none"), "loss": dict(mean="constant")},
    "dapo": {"loss": dict(clip_high=0.28), "loop": dict(dynamic_sampling=3, overlong_buffer=0.2)},
    "gspo": {"loss": dict(objective="gspo", clip_low=3e-4, clip_high=4e-4, mean="sequence")},
    "cispo": {"loss": dict(objective="cispo", clip_low=1.0, clip_high=5.0)},
    "rloo": {
        "advantage": dict(baseline="leave_one_out", scale="none"),
        "loss": dict(objective="reinforce", mean="constant", **KL_IN_REWARD),
    },
    "reinforce_pp": {"advantage": dict(baseline="none", scale="batch"), "loss": KL_IN_REWARD},
    "reinforce": {
        "advantage": dict(baseline="batch", scale="none"),
        "loss": dict(objective="reinforce", mean="constant"),
    },
    "ppo": {"advantage": dict(baseline="critic", scale="batch"), "loss": KL_IN_REWARD},
}


@dataclass(frozen=True)
class Pieces:
    """The three functions that an update is made of; train/mistakes.py swaps one for a wrong one."""

    advantages: Callable = advantages
    weights: Callable = token_weights
    loss: Callable = grpo_loss


PIECES = Pieces()


def missing_dials(algo: str, part: str, given) -> dict[str, Any]:
    """The dials of PRESETS' `part` that are None in `given`. Raises ValueError for an unknown preset."""
    if algo not in PRESETS:
        raise ValueError(f"--algo is {algo!r}, expected one of {', '.join(PRESETS)}")
    preset = BASE[part] | PRESETS[algo].get(part, {})
    return {name: value for name, value in preset.items() if getattr(given, name) is None}


def from_preset(algo: str, part: str, given):
    """An AdvantageConfig or LossConfig with the dials that are None taken from the preset. Raises ValueError,
    too, for dials that do not go together."""
    return replace(given, **missing_dials(algo, part, given))


def in_words(c) -> str:
    """What --algo and the flags of a GRPOConfig came to, on one line; dials that have no effect are left
    out."""
    advantage, loss = asdict(c.advantage), asdict(c.loss)
    if not c.per_token:
        advantage = {name: advantage[name] for name in ("baseline", "scale")}
    off = {name for name, value in loss.items() if value in (0.0, False)}
    off |= {"kl_in", "kl_estimator"} if c.loss.kl_coef == 0 else set()
    off |= {"clip_low", "clip_high"} if c.loss.objective == "reinforce" else set()
    dials = advantage | {name: value for name, value in loss.items() if name not in off}
    dials |= {"dynamic_sampling": c.dynamic_sampling} if c.dynamic_sampling > 1 else {}
    dials |= {"overlong_buffer": c.overlong_buffer} if c.overlong_buffer else {}
    return f"{c.algo}: " + ", ".join(f"{name} {value}" for name, value in dials.items())
