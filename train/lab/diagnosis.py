"""What the metrics of a GRPO run mean, in plain words: one rule per function, from log to advice.

    r1zero diagnose --run runs/rl        for a run that is over, or still going

A loop prints the advice of a rule when it first holds. The thresholds are rules of thumb, set so
that a healthy run is told about its loss and nothing else. Each advice names the metric that it
goes by, so that a reader can judge. What chance explains is left alone: a change of accuracy counts
from two standard errors on. A rule whose flags were not logged does not apply.

Left out: rules about speed and memory (the log has both), and about what only the answers show:
look at some with `r1zero chat`.
"""

import math
from collections.abc import Callable, Collection

from .history import WINDOW, History, number

FORM_STEPS = 30  # steps in which a run may learn the form of an answer and nothing else

# ---- what several rules ask ----


def is_real_run(history: History) -> bool:
    """Not the control, whose accuracy has no reason to rise."""
    return history.choice("control") in ("none", "False")  # (it was a switch once)


def compares_within_groups(history: History) -> bool:
    """Whether answers are compared with their group alone; else equal rewards teach too."""
    return history.choice("advantage", "baseline") in ("group", "leave_one_out")


def stronger_kl(history: History) -> str:
    """The flag for twice the KL, or for a little if there was none."""
    kl_coef = history.option("loss", "kl_coef")
    return f"--loss.kl-coef {2 * kl_coef if kl_coef > 0 else 0.001:g}"


def with_checkpoint(history: History) -> str:
    """How to keep the best checkpoint, if the run does not do so yet."""
    if history.option("eval_every") > 0:
        return "the best checkpoint is kept"
    return "--eval-every 10 keeps the best checkpoint"


# ---- the rules ----


def sampler_is_off(history: History) -> str | None:
    """The sampler's log-probs are not the trainer's, and nothing corrects for it."""
    gap = history.mean("logp_gap_mean")
    is_corrected = history.option("loss", "max_importance") != 0
    if not (history.is_long and not is_corrected and gap > 0.02):
        return None
    correct = "--loss.max-importance 2 corrects for it"
    if history.choice("routing_replay") == "False":  # the flags do not say whether it is a mixture
        correct = f"Of a mixture of experts, leave out --no-routing-replay; else {correct}"
    return (
        f"Sampler and trainer differ by {gap:.3f} nats per token: the gradient is that of a policy "
        f"that did not sample. {correct}."
    )


def collapsed(history: History) -> str | None:
    """Accuracy had risen, and is nearly 0."""
    accuracy, best = history.mean("accuracy"), history.best_mean("accuracy")
    had_risen = best > history.first_mean("accuracy") + 0.1
    if not (history.is_long and is_real_run(history) and had_risen and accuracy < 0.05):
        return None

    # Where it fell, and what the run was like there.
    fall = history.falls_below("accuracy", best / 2)
    kl, length = number(fall.get("kl_to_reference")), number(fall.get("length"))
    there = []
    if math.isfinite(kl):
        there.append(f"the KL to the reference was {kl:.2f} nats per token")
    if math.isfinite(length):
        first_length = history.first_mean("length")
        there.append(f"answers were {length:.0f} tokens long ({first_length:.0f} at first)")
    signs = f", where {' and '.join(there)}" if there else ""
    step = number(fall.get("step"))
    at_step = f" at step {step:.0f}" if math.isfinite(step) else ""

    fewer_updates = ""
    if history.option("updates_per_step") > 1:
        fewer_updates = ", fewer --updates-per-step"
    return (
        f"The run has collapsed: accuracy had risen to {best:.0%} and is {accuracy:.0%}. It fell "
        f"below half{at_step}{signs}. Start again with half the --optim.lr{fewer_updates} or "
        f"{stronger_kl(history)}; {with_checkpoint(history)}."
    )


def degenerate(history: History) -> str | None:
    """Answers that are no answers any more: empty, without form, or words at random."""
    accuracy, best = history.mean("accuracy"), history.best_mean("accuracy")
    if not (history.is_long and accuracy < 0.5 * best) or collapsed(history):
        return None
    signs = []

    formed, best_formed = history.mean("format"), history.best_mean("format")
    if best_formed > 0.1 and formed < 0.2 * best_formed:
        signs.append(f"{formed:.0%} are well formed, it was {best_formed:.0%}")

    length, first_length = history.mean("length"), history.first_mean("length")
    if length < 0.1 * first_length:
        signs.append(f"their length fell from {first_length:.0f} to {length:.1f} tokens")

    entropy, first_entropy = history.mean("entropy"), history.first_mean("entropy")
    if entropy > 2 * first_entropy and entropy > first_entropy + 0.5:
        signs.append(
            f"the entropy rose from {first_entropy:.2f} to {entropy:.2f} nats per token, "
            "towards words at random"
        )
    if not signs:
        return None
    return (
        f"The answers have come apart: {'; '.join(signs)}. Accuracy was {best:.0%} and is "
        f"{accuracy:.0%}. Nothing brings such a run back: start again, with a lower --optim.lr or "
        f"{stronger_kl(history)}; --eval-every 10 keeps the best checkpoint."
    )


def has_come_apart(history: History) -> bool:
    """Whether what other rules see follows from a collapse."""
    return bool(collapsed(history) or degenerate(history))


def fell(history: History) -> str | None:
    """Accuracy is well below its best."""
    accuracy, best = history.mean("accuracy"), history.best_mean("accuracy")
    fall = best - accuracy
    is_clear = fall > max(0.1, 2 * history.noise("accuracy"))
    if history.is_long and is_real_run(history) and is_clear and not has_come_apart(history):
        return (
            f"Accuracy was {best:.0%} and is {accuracy:.0%}: the run has passed its best. Lower "
            f"--optim.lr, or take {stronger_kl(history)}; --eval-every 10 keeps the best "
            "checkpoint."
        )
    return None


def cut_off(history: History) -> str | None:
    """Many answers reach the limit of their length."""
    share = history.mean("truncated")
    if not (history.is_long and share > 0.25) or has_come_apart(history):
        return None
    limit = history.option("max_new_tokens")
    at_limit = "" if math.isnan(limit) else f" at {limit:g} tokens"
    or_punish = ""
    if history.option("overlong_buffer") == 0:
        or_punish = ", or --overlong-buffer 0.2, which makes length costly"
    return (
        f"{share:.0%} of answers are cut off{at_limit}; few of these can be right. If they are "
        "still at work there, raise --max-new-tokens. If they ramble on (see r1zero chat), they "
        f"have to learn to stop: r1zero sft on a few examples{or_punish}."
    )


def too_hard(history: History) -> str | None:
    """Nearly all groups are all wrong."""
    share = history.mean("all_wrong")
    if not (history.is_long and share > 0.8) or has_come_apart(history):
        return None
    formed = history.mean("format")
    if formed < 0.05:
        return (
            f"{share:.0%} of groups are all wrong, and {formed:.1%} of answers are well formed: a "
            "base that does not write the tags of an answer never earns a reward. Show it the form "
            "first: r1zero sft on some examples."
        )
    group_size = history.option("group_size")
    larger = "" if math.isnan(group_size) else f" {2 * group_size:g}"
    return (
        f"{share:.0%} of groups are all wrong: the task is too hard for this base. Take an easier "
        "one (--options), fine-tune the base first (r1zero sft), or sample more: "
        f"--group-size{larger}."
    )


def too_easy(history: History) -> str | None:
    """Nearly all groups are all right."""
    share = history.mean("all_right")
    if history.is_long and share > 0.8:
        return (
            f"{share:.0%} of groups are all right: this task is learned, and little is left to "
            "learn here. Stop, or go on with a harder one (--options)."
        )
    return None


def little_signal(history: History) -> str | None:
    """Most groups have equal rewards, some all right and some all wrong."""
    wrong, right = history.mean("all_wrong"), history.mean("all_right")
    dead = history.mean("dead_groups")
    is_one_sided = wrong > 0.8 or right > 0.8  # too_hard and too_easy have that
    if not (history.is_long and compares_within_groups(history) and dead > 0.6) or is_one_sided:
        return None
    if entropy_death(history):
        return None
    why = ""
    if math.isfinite(wrong + right):
        why = f" (all wrong: {wrong:.0%}, all right: {right:.0%})"
    replace = ""
    if history.option("dynamic_sampling") <= 1:
        replace = "--dynamic-sampling 3 samples others instead, and "
    return (
        f"{dead:.0%} of groups have no signal{why}: {replace}a larger --group-size makes them "
        "rarer."
    )


def nothing_changes(history: History) -> str | None:
    """No update has moved the weights."""
    if history.is_long and history.mean("gradient_norm") == 0:
        return (
            f"The gradient has been exactly 0 for {WINDOW} steps: no group has a signal, so "
            "nothing is updated. Look at some answers with r1zero chat, and at what they earn with "
            "r1zero grade."
        )
    return None


def wild_ratios(history: History) -> str | None:
    """Updates change single tokens far beyond the clip."""
    ratios = sorted(history.values("ratio_max"))
    if history.is_long and len(ratios) >= 3 and ratios[-3] > 20:  # a single one is chance
        return (
            f"In three of the last {WINDOW} steps some token became {ratios[-3]:.0f} times as "
            "likely as it was sampled, or more: the clip does not hold the policy. Lower "
            "--optim.lr or --updates-per-step."
        )
    return None


def too_much_clipped(history: History) -> str | None:
    """The policy leaves its trust region within a step."""
    share = history.mean("clipped_low") + history.mean("clipped_high")
    # The bounds of GSPO clip most tokens by design.
    is_meant = history.choice("loss", "objective") in ("", "gspo")
    if history.is_long and share > 0.3 and not is_meant:
        return (
            f"{share:.0%} of tokens are clipped: the policy leaves its trust region within a step. "
            "Lower --updates-per-step or --optim.lr."
        )
    return None


def mean_entropy(history: History, rows: list[dict]) -> float:
    """Mean entropy over the steps that trained on something; the log says 0 for the others."""
    trained = [row for row in rows if number(row.get("trained_samples")) != 0]
    return history.mean("entropy", trained)


def more_entropy(history: History) -> str:
    """The flags that keep the samples of a group apart."""
    # With a single update per step no ratio ever meets a bound.
    raise_clip = "--loss.clip-high 0.28 or " if history.option("updates_per_step") > 1 else ""
    return f"{raise_clip}--loss.entropy-coef 0.001"


def entropy_death(history: History) -> str | None:
    """The samples of a group are alike, most groups are dead, and little is right."""
    entropy, dead = mean_entropy(history, history.last), history.mean("dead_groups")
    accuracy = history.mean("accuracy")
    is_dead = entropy < 0.02 and dead > 0.6 and accuracy < 0.9
    if not (history.is_long and compares_within_groups(history) and is_dead):
        return None
    first_entropy = mean_entropy(history, history.first)
    was = f" (at first {first_entropy:.2f})" if first_entropy > 2 * entropy else ""
    return (
        f"The entropy is dead: {entropy:.3f} nats per token{was}, so {dead:.0%} of groups hold the "
        f"same answer over and over, and only {accuracy:.0%} are right. No reward tells such "
        "answers apart, so more steps will not help. Start again from an earlier checkpoint with a "
        f"lower --optim.lr, and {more_entropy(history)}; a higher --temperature also keeps them "
        "apart."
    )


def entropy_is_gone(history: History) -> str | None:
    """The samples of a group are nearly alike, long before everything is right."""
    entropy = mean_entropy(history, history.last)
    first_entropy = mean_entropy(history, history.first)
    accuracy = history.mean("accuracy")
    is_gone = entropy < 0.1 * first_entropy and accuracy < 0.9
    if not (history.is_long and is_gone) or entropy_death(history):
        return None
    return (
        f"The entropy fell from {first_entropy:.2f} to {entropy:.3f} nats per token, with "
        f"{accuracy:.0%} of answers right: the samples of a group are nearly alike, and learning "
        f"ends. Lower --optim.lr, or try {more_entropy(history)}."
    )


def far_from_reference(history: History) -> str | None:
    """The policy has moved far and gained nothing by it."""
    kl = history.mean("kl_to_reference")
    gained_nothing = history.mean("accuracy") < history.first_mean("accuracy") + 0.05
    if history.config.get("teacher"):  # it began far from its teacher, and is to come nearer
        return None
    if history.is_long and kl > 0.5 and gained_nothing:
        return (
            f"The KL to the reference is {kl:.2f} nats per token: the model has gone far from its "
            "base, and accuracy has gained nothing by it. Lower --optim.lr, or take "
            f"{stronger_kl(history)}."
        )
    return None


def gradient_is_cut(history: History) -> str | None:
    """Clipping sets the size of every update."""
    norm, bound = history.mean("gradient_norm"), history.option("optim", "clip_grad")
    if history.is_long and norm > 5 * bound:
        return (
            f"The gradient's norm is {norm:.1f}, and is cut to {bound:g} (--optim.clip-grad) each "
            "step: however much or little a batch has to say, it moves the weights as far. If "
            "accuracy jumps about, take more --prompts-per-step, or a lower --optim.lr."
        )
    return None


def critic_is_blind(history: History) -> str | None:
    """The critic predicts returns worse than a constant would."""
    explained = history.mean("value_explained")
    if not (len(history.rows) >= 20 and explained < 0):
        return None
    trust_rewards = ""
    if history.option("advantage", "lam") < 1:
        trust_rewards = ", or take --advantage.lam 1, which trusts rewards alone"
    return (
        f"The critic's error is {1 - explained:.1f} times the variance of the returns, worse than "
        f"a constant's: it adds noise to the advantages. Raise --critic-optim.lr{trust_rewards}."
    )


def form_without_sense(history: History) -> str | None:
    """Answers become well formed and wrong."""
    formed, first_formed = history.mean("format"), history.first_mean("format")
    accuracy, first_accuracy = history.mean("accuracy"), history.first_mean("accuracy")
    form_rises = formed > first_formed + 0.1
    accuracy_falls = accuracy < first_accuracy - max(0.03, history.noise("accuracy"))
    if history.is_long and form_rises and accuracy_falls:
        return (
            f"Form improves ({first_formed:.0%} to {formed:.0%}) while accuracy falls "
            f"({first_accuracy:.0%} to {accuracy:.0%}): the format reward is worth too much; lower "
            "--rewards.format-weight."
        )
    return None


def form_only(history: History) -> str | None:
    """The reward rises because answers become well formed; as many are right as before."""
    formed, first_formed = history.mean("format"), history.first_mean("format")
    reward, first_reward = history.mean("reward"), history.first_mean("reward")
    accuracy, first_accuracy = history.mean("accuracy"), history.first_mean("accuracy")
    form_rises = formed > first_formed + 0.1
    reward_rises = reward - first_reward > max(0.02, history.noise("reward"))
    is_still = abs(accuracy - first_accuracy) <= max(0.02, history.noise("accuracy"))
    # The first steps of a healthy run may learn the form alone.
    is_late = len(history.rows) >= FORM_STEPS
    if not (is_late and is_real_run(history) and form_rises and reward_rises and is_still):
        return None
    if accuracy < 0.02:
        next_thing = (
            "None earns the reward for being right, so nothing else can be learned. See with "
            "r1zero grade whether the grader reads such answers; if it does, take an easier task, "
            "or r1zero sft first"
        )
    else:
        next_thing = "Lower --rewards.format-weight, or take more --prompts-per-step"
    return (
        f"The reward rises ({first_reward:.2f} to {reward:.2f}) by form alone: well formed are "
        f"{formed:.0%} of answers (at first {first_formed:.0%}), and right {accuracy:.0%} (at "
        f"first {first_accuracy:.0%}). {next_thing}."
    )


def flat(history: History) -> str | None:
    """Accuracy does not move in a long run. (If it is 0 or 1 all along, other rules say why.)"""
    change = history.mean("accuracy") - history.first_mean("accuracy")
    noise = history.noise("accuracy")
    is_still = abs(change) < max(0.02, noise) and history.best_mean("accuracy") < 0.9
    if not (len(history.rows) >= 50 and is_real_run(history) and is_still and noise > 0):
        return None
    prompts, group_size = history.option("prompts_per_step"), history.option("group_size")
    answers = ""
    if math.isfinite(prompts * group_size):
        answers = f", with {prompts:g} x {group_size:g} answers per step"
    return (
        f"Accuracy moved by {100 * change:+.1f} points in {len(history.rows)} steps; chance alone "
        f"moves it by ±{100 * noise:.1f}{answers}. If nothing above says why, a higher --optim.lr "
        "may; --eval-every 10 measures on the same held-out problems each time."
    )


def loss_is_zero(history: History) -> str | None:
    """Not a fault, but what everybody asks first."""
    loss = history.mean("loss")
    has_one_ratio = history.option("updates_per_step") == 1
    is_surrogate = history.choice("loss", "objective") in ("clip", "gspo", "dppo")
    has_steps = not math.isnan(history.mean("reward_process"))  # whose advantages do not
    sums_to_zero = has_one_ratio and is_surrogate and compares_within_groups(history)
    has_trained = history.mean("trained_samples") > 0 and history.mean("gradient_norm") > 0
    if sums_to_zero and not has_steps and has_trained and abs(loss) < 0.3:
        return (
            f"The loss is about 0 ({loss:+.3f}): normal. With one update per step the ratio of new "
            "to old probability is 1, and the advantages of a group sum to 0; what is left is "
            "above 0 where the worse answers are the longer ones. Its gradient is not 0. Watch "
            "accuracy and reward, not the loss."
        )
    return None


RULES: tuple[Callable[[History], str | None], ...] = (  # what explains the others comes first
    sampler_is_off,
    collapsed,
    degenerate,
    fell,
    cut_off,
    too_hard,
    too_easy,
    little_signal,
    nothing_changes,
    wild_ratios,
    too_much_clipped,
    entropy_death,
    entropy_is_gone,
    far_from_reference,
    gradient_is_cut,
    critic_is_blind,
    form_without_sense,
    form_only,
    flat,
    loss_is_zero,
)


# ---- all of them ----


def advice(rows: list[dict], config: dict, but: Collection[str] = ()) -> dict[str, str]:
    """{name of the rule: its advice} for the rules that hold now, the most important first.

    rows: metrics.jsonl, one row per step; config: the flags, as in run.json; but: rules to leave
    out.
    """
    found: dict[str, str] = {}
    if not rows:
        return found
    history = History(rows, config)
    for rule in RULES:
        name = rule.__name__
        text = None if name in but else rule(history)
        if text:
            found[name] = text
    return found


class Diagnosis:
    """The advice for a run that is going, each rule only once."""

    def __init__(self, config: dict, rows: list[dict]):
        """config: the flags, as in run.json; rows: what was logged, and diagnosed, before."""
        self.config = config
        self.rows: list[dict] = []
        self.given: set[str] = set()
        for row in rows:
            self.observe(row)

    def observe(self, row: dict) -> list[str]:
        """Take the metrics of one more step; returns the advice that is new, one line each."""
        self.rows.append(row)
        new = advice(self.rows, self.config, but=self.given)
        self.given |= new.keys()
        return [f"[{name}] {text}" for name, text in new.items()]
