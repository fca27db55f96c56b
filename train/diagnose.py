"""What the figures of a GRPO run mean, in plain words: one rule a function, each from the last steps to
advice.

    r1zero diagnose --run runs/rl        of a run that is over, or still going

A loop prints a rule's advice when it first holds. The thresholds are rules of thumb; each says the figure
that it goes by, so that a reader can judge.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from .run import read_metrics

WINDOW = 10  # steps that a rule looks at


class Look:
    """The last steps of a run."""

    def __init__(self, rows: list[dict], c):
        self.rows, self.c = rows, c
        self.recent, self.first = rows[-WINDOW:], rows[:WINDOW]
        self.enough = len(rows) >= WINDOW

    def mean(self, name: str, rows: list[dict] | None = None) -> float:
        found = [row[name] for row in (self.recent if rows is None else rows) if name in row]
        return sum(found) / len(found) if found else 0.0

    def then(self, name: str) -> float:
        return self.mean(name, self.first)


def loss_is_zero(look: Look) -> str | None:
    if look.c.updates_per_step == 1 and look.recent[-1].get("trained_samples") and \
            abs(look.recent[-1].get("loss", 1)) < 0.05:
        return ("The loss is about 0, and will stay there: normal. With one update a step the ratio of new "
                "to old probability is 1, and advantages sum to 0. Watch accuracy and reward, not the loss.")


def too_hard(look: Look) -> str | None:
    if look.enough and (share := look.mean("all_wrong")) > 0.8:
        return (f"{share:.0%} of groups are all wrong: the task is too hard for this base. Try an easier one "
                "(such as --dials n_numbers=3), fine-tune the base first (r1zero sft), or draw more: "
                f"--group-size {2 * look.c.group_size}.")


def too_easy(look: Look) -> str | None:
    if look.enough and (share := look.mean("all_right")) > 0.8:
        return (f"{share:.0%} of groups are all right: little is left to learn here. Try a harder task, or "
                "--dynamic-sampling 4, which looks for problems that still teach.")


def little_signal(look: Look) -> str | None:
    wrong, right, dead = (look.mean(name) for name in ("all_wrong", "all_right", "dead_groups"))
    if look.enough and dead > 0.6 and max(wrong, right) <= 0.8:
        return (f"{dead:.0%} of groups have no signal (all answers wrong in {wrong:.0%}, all right in "
                f"{right:.0%}): --dynamic-sampling 3 replaces them, a larger --group-size makes them rarer.")


def nothing_changes(look: Look) -> str | None:
    if look.enough and not look.mean("gradient_norm"):
        return ("The gradient has been exactly 0 for ten steps: no group has a signal, so nothing is "
                "updated. Look at some answers with r1zero chat, and at what they are paid with r1zero "
                "grade.")


def cut_off(look: Look) -> str | None:
    if look.enough and (share := look.mean("truncated")) > 0.25:
        return (f"{share:.0%} of answers are cut off at {look.c.max_new_tokens} tokens and cannot be right: "
                "raise --max-new-tokens, or lower the reward of long ones (--overlong-buffer 0.2).")


def entropy_is_gone(look: Look) -> str | None:
    if look.enough and look.then("entropy") > 0 and look.mean("entropy") < 0.1 * look.then("entropy"):
        return (f"The entropy fell from {look.then('entropy'):.2f} to {look.mean('entropy'):.3f} nats a "
                "token: the samples of a group are nearly alike, and learning ends. Lower --optim.lr, or try "
                "--loss.clip-high 0.28 or --loss.entropy-coef 0.001.")


def far_from_reference(look: Look) -> str | None:
    if look.enough and (kl := look.mean("kl_to_reference")) > 0.5:
        return (f"The KL to the reference is {kl:.2f} nats a token: the model has left its base. If answers "
                "have become strange, lower --optim.lr or add --loss.kl-coef 0.001.")


def too_much_clipped(look: Look) -> str | None:
    share = look.mean("clipped_low") + look.mean("clipped_high")
    if look.enough and share > 0.3 and look.c.loss.objective != "gspo":  # whose bounds clip most by design
        return (f"{share:.0%} of tokens are clipped: the policy leaves its trust region within a step. Fewer "
                "--updates-per-step, or a lower --optim.lr.")


def gradient_is_cut(look: Look) -> str | None:
    if look.enough and (norm := look.mean("gradient_norm")) > 5 * look.c.optim.clip_grad:
        return (f"The gradient's norm is {norm:.1f}, and is cut to {look.c.optim.clip_grad:g} each step: a "
                "lower --optim.lr, or a larger batch, would follow it better.")


def sampler_is_off(look: Look) -> str | None:
    if look.enough and look.c.loss.max_importance == 0 and (gap := look.mean("logp_gap_mean")) > 0.02:
        return (f"Sampler and trainer differ by {gap:.3f} nats a token: the gradient is that of a policy "
                "that did not sample. --loss.max-importance 2 corrects for it.")


def form_without_sense(look: Look) -> str | None:
    if look.enough and look.mean("format") > look.then("format") + 0.1 and \
            look.mean("accuracy") < look.then("accuracy") - 0.03:
        return (f"Form improves ({look.then('format'):.0%} to {look.mean('format'):.0%}) while accuracy "
                f"falls ({look.then('accuracy'):.0%} to {look.mean('accuracy'):.0%}): the format reward is "
                "worth too much; lower --rewards.format-weight.")


def flat(look: Look) -> str | None:
    change = look.mean("accuracy") - look.then("accuracy")
    if len(look.rows) >= 50 and abs(change) < 0.02 and look.mean("accuracy") < 0.9:
        return (f"Accuracy moved by {100 * change:+.1f} points in {len(look.rows)} steps. A batch of "
                f"{look.c.prompts_per_step} x {look.c.group_size} answers is a noisy measure; if "
                "--eval-every 10 says so too, try a higher --optim.lr, or look whether groups have any "
                "signal (dead_groups).")


def critic_is_blind(look: Look) -> str | None:
    if len(look.rows) >= 20 and any("value_explained" in row for row in look.recent) and \
            look.mean("value_explained") < 0:
        return (f"The critic explains {look.mean('value_explained'):.0%} of the returns' variance, worse "
                "than a constant: its advantages are noise. Raise --critic-optim.lr, or take --advantage.lam "
                "1.")


RULES: tuple[Callable[[Look], str | None], ...] = (
    loss_is_zero, too_hard, too_easy, little_signal, nothing_changes, cut_off, entropy_is_gone,
    far_from_reference, too_much_clipped, gradient_is_cut, sampler_is_off, form_without_sense, flat,
    critic_is_blind)


def advice(rows: list[dict], c) -> dict[str, str]:
    """{rule: what it says} of those that hold now. rows: metrics, one a step; c: a GRPOConfig, or what
    `run.json` has of it."""
    if not rows:
        return {}
    said = {rule.__name__: rule(Look(rows, c)) for rule in RULES}
    return {name: text for name, text in said.items() if text}


class Diagnosis:
    """The advice of a run that is going, each only once; rows: what it has logged before."""

    def __init__(self, c, rows: list[dict]):
        self.c, self.rows, self.said = c, rows, set(advice(rows, c))

    def look(self, row: dict) -> list[str]:
        self.rows.append(row)
        new = {name: text for name, text in advice(self.rows, self.c).items() if name not in self.said}
        self.said |= new.keys()
        return [f"[{name}] {text}" for name, text in new.items()]


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Say in plain words what a GRPO run's figures mean."""

    run: str
    """Folder of the run."""


def namespace(value):
    """Nested dicts, to be read like a config."""
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: namespace(inner) for name, inner in value.items()})


def diagnose(c: DiagnoseConfig) -> None:
    """Print the advice of each rule that holds. Raises ValueError for a folder that is no GRPO run's."""
    try:
        config = json.loads((Path(c.run) / "run.json").read_text(encoding="utf-8"))["config"]
        rows = read_metrics(c.run)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{c.run} is not the folder of a run ({error}); give one that r1zero grpo "
                         "wrote") from error
    if "group_size" not in config or not rows:
        raise ValueError(f"{c.run} has no steps of GRPO; give a folder that r1zero grpo wrote")
    found = advice(rows, namespace(config))
    print("\n".join(f"[{name}] {text}" for name, text in found.items()) or
          f"step {rows[-1]['step']}: nothing to complain about")


if __name__ == "__main__":
    from .cli import run_command
    run_command("diagnose")
