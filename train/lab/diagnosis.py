"""What the figures of a GRPO run mean, in plain words: one rule a function, each from the log to advice.

    r1zero diagnose --run runs/rl        of a run that is over, or still going

A loop prints a rule's advice when it first holds. The thresholds are rules of thumb, set so that a healthy
run hears of its loss and of nothing else; each advice says the figure that it goes by, so that a reader can
judge. What chance explains is left alone: a change of accuracy counts from two standard errors on.

Left out: rules about speed and memory (the log has both), and about what only answers show: look at some with
`r1zero chat`.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

WINDOW = 10  # steps that a rule looks at


def number(value: Any) -> float:
    """A figure of the log; NaN, which no threshold is crossed by, if it is missing or none."""
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return found if abs(found) < 1e30 else math.nan  # so that sums and squares stay finite


class Look:
    """The first and the last steps of a run, and a few windows between."""

    def __init__(self, rows: list[dict], c):
        self.rows, self.c = rows, c
        self.recent, self.first = rows[-WINDOW:], rows[:WINDOW]
        self.enough = len(rows) >= WINDOW

    def of(self, name: str, rows: list[dict] | None = None) -> list[float]:
        """The figure in each of the last steps, where it is one."""
        found = [number(row.get(name)) for row in (self.recent if rows is None else rows)]
        return [value for value in found if math.isfinite(value)]

    def mean(self, name: str, rows: list[dict] | None = None) -> float:
        """NaN where no step has the figure: no rule holds by what is not there."""
        found = self.of(name, rows)
        return sum(found) / len(found) if found else math.nan

    def then(self, name: str) -> float:
        return self.mean(name, self.first)

    def best(self, name: str) -> float:
        """Mean of the best of up to 20 windows, spread over the run."""
        every = max(WINDOW, len(self.rows) // 20)
        starts = range(0, max(1, len(self.rows) - WINDOW + 1), every)
        return max(
            (self.mean(name, self.rows[start : start + WINDOW]) for start in starts),
            key=lambda mean: -math.inf if math.isnan(mean) else mean,
        )

    def noise(self, name: str) -> float:
        """Two standard errors of the difference between two windows, as far as the steps of the first and
        the last tell."""
        total = 0.0
        for rows in (self.first, self.recent):
            found, mean = self.of(name, rows), self.mean(name, rows)
            total += (
                sum((value - mean) ** 2 for value in found)
                / max(1, len(found) - 1)
                / max(1, len(found))
            )
        return 2 * math.sqrt(total)


def sampler_is_off(look: Look) -> str | None:
    if (
        look.enough
        and look.c.loss.max_importance == 0
        and (gap := look.mean("logp_gap_mean")) > 0.02
    ):
        return (
            f"Sampler and trainer differ by {gap:.3f} nats a token: the gradient is that of a policy "
            "that did not sample. --loss.max-importance 2 corrects for it."
        )


def degenerate(look: Look) -> str | None:
    """Answers that are no answers any more: empty, without form, or words at random."""
    accuracy, best = look.mean("accuracy"), look.best("accuracy")
    if not (look.enough and accuracy < 0.5 * best):
        return None
    formed, were, length, entropy = (
        look.mean("format"),
        look.best("format"),
        look.mean("length"),
        look.mean("entropy"),
    )
    signs = (
        [f"{formed:.0%} are well formed, it was {were:.0%}"]
        if were > 0.1 and formed < 0.2 * were
        else []
    )
    if length < 0.1 * look.then("length"):
        signs.append(f"their length fell from {look.then('length'):.0f} to {length:.1f} tokens")
    if entropy > 2 * look.then("entropy") and entropy > look.then("entropy") + 0.5:
        signs.append(
            f"the entropy rose from {look.then('entropy'):.2f} to {entropy:.2f} nats a token, "
            "towards words at random"
        )
    if signs:
        return (
            f"The answers have come apart: {'; '.join(signs)}. Accuracy was {best:.0%} and is "
            f"{accuracy:.0%}. Nothing brings such a run back: begin again, with a lower --optim.lr or "
            f"{kl_dial(look)}; --eval-every 10 keeps the best checkpoint."
        )


def fell(look: Look) -> str | None:
    accuracy, best = look.mean("accuracy"), look.best("accuracy")
    if (
        look.enough
        and not look.c.control
        and best - accuracy > max(0.1, 2 * look.noise("accuracy"))
        and not degenerate(look)
    ):
        return (
            f"Accuracy was {best:.0%} and is {accuracy:.0%}: the run has passed its best. Lower "
            f"--optim.lr, or take {kl_dial(look)}; --eval-every 10 keeps the best checkpoint."
        )


def of_a_group(look: Look) -> bool:
    """Whether an answer is compared with its group alone: with other baselines equal rewards teach, too."""
    return look.c.advantage.baseline in ("group", "leave_one_out")


def kl_dial(look: Look) -> str:
    return f"--loss.kl-coef {2 * look.c.loss.kl_coef or 0.001:g}"


def cut_off(look: Look) -> str | None:
    if look.enough and (share := look.mean("truncated")) > 0.25 and not degenerate(look):
        more = (
            ""
            if look.c.overlong_buffer
            else ", or --overlong-buffer 0.2, which makes length costly"
        )
        return (
            f"{share:.0%} of answers are cut off at {look.c.max_new_tokens} tokens; few of these can be "
            f"right. If they are still at work there, raise --max-new-tokens; if they ramble on (see "
            f"r1zero chat), they have to learn to stop: r1zero sft on a few examples{more}."
        )


def too_hard(look: Look) -> str | None:
    if not (look.enough and (share := look.mean("all_wrong")) > 0.8) or degenerate(look):
        return None
    if look.mean("format") < 0.05:
        return (
            f"{share:.0%} of groups are all wrong, and {look.mean('format'):.1%} of answers are well "
            "formed: a base that does not write the tags of an answer is never paid. Show it the form "
            "first: r1zero sft on some examples."
        )
    return (
        f"{share:.0%} of groups are all wrong: the task is too hard for this base. Take an easier one "
        "(--options), fine-tune the base first (r1zero sft), or draw more: --group-size "
        f"{2 * look.c.group_size}."
    )


def too_easy(look: Look) -> str | None:
    if look.enough and (share := look.mean("all_right")) > 0.8:
        return (
            f"{share:.0%} of groups are all right: this task is learned, and little is left to learn "
            "here. Stop, or go on with a harder one (--options)."
        )


def little_signal(look: Look) -> str | None:
    wrong, right, dead = (look.mean(name) for name in ("all_wrong", "all_right", "dead_groups"))
    if look.enough and of_a_group(look) and dead > 0.6 and not max(wrong, right) > 0.8:
        more = (
            ""
            if look.c.dynamic_sampling > 1
            else "--dynamic-sampling 3 draws others in their place, and "
        )
        why = (
            ""
            if math.isnan(wrong + right)
            else f" (all wrong: {wrong:.0%}, all right: {right:.0%})"
        )
        return f"{dead:.0%} of groups have no signal{why}: {more}a larger --group-size makes them rarer."


def nothing_changes(look: Look) -> str | None:
    if look.enough and look.mean("gradient_norm") == 0:
        return (
            f"The gradient has been exactly 0 for {WINDOW} steps: no group has a signal, so nothing is "
            "updated. Look at some answers with r1zero chat, and at what they are paid with r1zero "
            "grade."
        )


def entropy_is_gone(look: Look) -> str | None:
    now, then = (
        look.mean("entropy", [row for row in rows if number(row.get("trained_samples")) != 0])
        for rows in (look.recent, look.first)
    )  # of no token there is none, and the log has 0
    if look.enough and now < 0.1 * then and look.mean("accuracy") < 0.9:
        several = look.c.updates_per_step > 1  # with one, no ratio ever meets a bound
        return (
            f"The entropy fell from {then:.2f} to {now:.3f} nats a token, with "
            f"{look.mean('accuracy'):.0%} of answers right: the samples of a group are nearly alike, and "
            "learning ends. Lower --optim.lr, or try "
            f"{'--loss.clip-high 0.28 or ' if several else ''}--loss.entropy-coef 0.001."
        )


def too_much_clipped(look: Look) -> str | None:
    share = look.mean("clipped_low") + look.mean("clipped_high")
    if (
        look.enough and share > 0.3 and look.c.loss.objective != "gspo"
    ):  # whose bounds clip most by design
        return (
            f"{share:.0%} of tokens are clipped: the policy leaves its trust region within a step. Lower "
            "--updates-per-step or --optim.lr."
        )


def wild_ratios(look: Look) -> str | None:
    found = sorted(look.of("ratio_max"))
    if look.enough and len(found) >= 3 and found[-3] > 20:  # a single one is chance
        return (
            f"In three of the last {WINDOW} steps some token became {found[-3]:.0f} times as likely as "
            "it was sampled, or more: the clip does not hold the policy. Lower --optim.lr or "
            "--updates-per-step."
        )


def far_from_reference(look: Look) -> str | None:
    if (
        look.enough
        and (kl := look.mean("kl_to_reference")) > 0.5
        and look.mean("accuracy") < look.then("accuracy") + 0.05
    ):
        return (
            f"The KL to the reference is {kl:.2f} nats a token: the model has gone far from its base, "
            f"and accuracy has gained nothing by it. Lower --optim.lr, or take {kl_dial(look)}."
        )


def gradient_is_cut(look: Look) -> str | None:
    norm, cut = look.mean("gradient_norm"), look.c.optim.clip_grad
    if look.enough and norm > 5 * cut:
        return (
            f"The gradient's norm is {norm:.1f}, and is cut to {cut:g} (--optim.clip-grad) each step: "
            "however much or little a batch has to say, it moves the weights as far. If accuracy jumps "
            "about, take more --prompts-per-step, or a lower --optim.lr."
        )


def critic_is_blind(look: Look) -> str | None:
    if len(look.rows) >= 20 and (explained := look.mean("value_explained")) < 0:
        more = (
            ""
            if look.c.advantage.lam == 1
            else ", or take --advantage.lam 1, which trusts rewards alone"
        )
        return (
            f"The critic's error is {1 - explained:.1f} times the variance of the returns, worse than a "
            f"constant's: it adds noise to the advantages. Raise --critic-optim.lr{more}."
        )


def form_without_sense(look: Look) -> str | None:
    if (
        look.enough
        and look.mean("format") > look.then("format") + 0.1
        and look.mean("accuracy") < look.then("accuracy") - max(0.03, look.noise("accuracy"))
    ):
        return (
            f"Form improves ({look.then('format'):.0%} to {look.mean('format'):.0%}) while accuracy "
            f"falls ({look.then('accuracy'):.0%} to {look.mean('accuracy'):.0%}): the format reward is "
            "worth too much; lower --rewards.format-weight."
        )


def flat(look: Look) -> str | None:
    change, noise = look.mean("accuracy") - look.then("accuracy"), look.noise("accuracy")
    if (
        len(look.rows) >= 50
        and not look.c.control
        and abs(change) < max(0.02, noise)
        and look.best("accuracy") < 0.9
    ):
        return (
            f"Accuracy moved by {100 * change:+.1f} points in {len(look.rows)} steps; chance alone moves "
            f"it by ±{100 * noise:.1f}, with {look.c.prompts_per_step} x {look.c.group_size} answers a "
            "step. If nothing above says why, a higher --optim.lr may; --eval-every 10 measures on the "
            "same held-out problems each time."
        )


def loss_is_zero(look: Look) -> str | None:
    if (
        look.c.updates_per_step == 1
        and look.c.loss.objective in ("clip", "gspo")
        and of_a_group(look)
        and look.mean("trained_samples") > 0
        and abs(look.mean("loss")) < 0.3
    ):
        return (
            f"The loss is about 0 ({look.mean('loss'):+.3f}): normal. With one update a step the ratio "
            "of new to old probability is 1, and the advantages of a group sum to 0; what is left is "
            "above 0 where the worse answers are the longer ones. Its gradient is not 0. Watch accuracy "
            "and reward, not the loss."
        )


RULES: tuple[Callable[[Look], str | None], ...] = (  # the first to look at come first
    sampler_is_off,
    degenerate,
    fell,
    cut_off,
    too_hard,
    too_easy,
    little_signal,
    nothing_changes,
    wild_ratios,
    too_much_clipped,
    entropy_is_gone,
    far_from_reference,
    gradient_is_cut,
    critic_is_blind,
    form_without_sense,
    flat,
    loss_is_zero,
)


def advice(rows: list[dict], c, but: Collection[str] = ()) -> dict[str, str]:
    """{rule: what it says} of those that hold now, the most important first. rows: metrics, one a step; c: a
    GRPOConfig, or what `run.json` has of it; but: rules to leave out."""
    look, rules = Look(rows, c), [rule for rule in RULES if rows and rule.__name__ not in but]
    return {rule.__name__: text for rule in rules if (text := rule(look))}


class Diagnosis:
    """The advice of a run that is going, each only once; rows: what it has logged before, and was told."""

    def __init__(self, c, rows: list[dict]):
        self.c, self.rows, self.said = c, [], set()
        for row in rows:
            self.look(row)

    def look(self, row: dict) -> list[str]:
        self.rows.append(row)
        new = advice(self.rows, self.c, but=self.said)
        self.said |= new.keys()
        return [f"[{name}] {text}" for name, text in new.items()]
