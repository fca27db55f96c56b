"""What a run did, in sentences for other people: from the settings that its checkpoint keeps.

    facts = run_in_words(checkpoint)     {"made by": "`r1zero grpo`, step 50", ...}

Of paths they name the last part only. What the settings lack, since they are of an older version or
of another loop, is left out.
"""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from ...rl.advantages import AdvantageConfig
from ...rl.losses import LossConfig
from ..lab.mistakes import MISTAKES
from .record import dig, finite, read_or_empty

# A slash, and nothing that only other texts have, such as </answer>
RELATIVE_PATH = re.compile(r"[^\s<>]*/[^\s<>]+")
LICENSE = re.compile(r"^license:\s*[\"']?([^\"'\n]+?)[\"']?\s*$", re.MULTILINE)
MOST_BASES = 8  # a base of a base ...

PARTS = {
    "accuracy": "a right answer, by the rule of the task",
    "format": "a well-formed response",
    "efficiency": "a right answer that is shorter than the others",
    "coherence": "true equations",
    "language": "thoughts in the language of the question",
}
OPTIONAL = ("plugin", "model", "process")  # parts that have a weight, and count if they are given
OBJECTIVES = {
    "clip": "the ratio of each token to the old policy is kept from 1 - {clip_low:g} to "
    "1 + {clip_high:g}",
    "gspo": "the ratio of each answer to the old policy is kept from 1 - {clip_low:g} to "
    "1 + {clip_high:g}",
    "cispo": "the ratio to the old policy is a constant weight, of 1 + {clip_high:g} at most",
    "dppo": "the probability of each token falls by {clip_low:g} at most, and rises by "
    "{clip_high:g} at most",
    "reinforce": "there is no ratio to the old policy",
}
BASELINES = {
    "group": "the mean of its group",
    "leave_one_out": "the mean of the others of its group",
    "batch": "the mean of the step",
    "critic": "what a critic expects",
    "none": "nothing",
    "teacher": "nothing, and does not count: the KL to the teacher alone teaches",
}
SCALES = {
    "std": "the difference is divided by the standard deviation",
    "mean": "the difference is divided by the mean of the group",
    "parts": "each part of the difference is divided by its own standard deviation",
    "batch": "the differences are whitened over the step",
    "none": "the difference is not scaled",
}
MEANS = {
    "token": "all tokens of the step count alike",
    "sequence": "all answers of the step count alike",
    "constant": "an answer counts by its length",
}


def without_folders(value):
    """Settings in which a path is its last part: a card is for other people."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str) or value.startswith("hub:"):
        return value
    is_path = os.path.isabs(value) or RELATIVE_PATH.fullmatch(value)
    return Path(value).name if is_path else value


def folder_of(checkpoint: Checkpoint) -> Path:
    """The folder of the checkpoint's run, or its own where it belongs to none."""
    root = checkpoint.path.parent
    return root.parent if root.name == "checkpoints" else checkpoint.path


# ---- where it comes from ----


def license_of(base: Path) -> str:
    """What is known of a base's license: what the card in its folder names, or in the folder of
    what it was trained from itself."""
    for _ in range(MOST_BASES):
        front_matter, _, _ = read_or_empty(base / "README.md").partition("\n---")
        if found := LICENSE.search(front_matter):
            return f"license {found[1]}"
        try:
            state = load_checkpoint(base, groups=()).state
        except CheckpointError:
            break
        if state.get("loop") == "pretrain":
            return "trained from random weights with r1zero"
        earlier = dig(state, "settings", "base")
        if not isinstance(earlier, str):
            break
        base = near(Path(earlier), base)
    return "license not known here"


def near(base: Path, run: Path) -> Path:
    """Where a base is: where it was, or beside its run, if the two were moved together."""
    return base if base.exists() else run.parent / base.name


def short_fingerprint(fingerprint: str) -> str:
    """The beginning of a fingerprint; with adapters there are two, of the base and of them."""
    return "+".join(part[:12] for part in fingerprint.split("+"))


def base_in_words(checkpoint: Checkpoint, settings: dict) -> str | None:
    """The base, with a fingerprint of its weights and its license."""
    if "base" not in settings:
        return None
    words = [f"`{settings['base']}`"]
    if parts := dig(checkpoint.state, "inputs", "base"):
        words.append(f"weights {short_fingerprint(dict(parts)['weights'])}")
    where = near(Path(checkpoint.state["settings"]["base"]), folder_of(checkpoint))
    return ", ".join([*words, license_of(where)])


def data_in_words(checkpoint: Checkpoint, settings: dict) -> str | None:
    """The files of data, with a fingerprint of each where there is one for each."""
    data = settings.get("data")
    if data is None:
        return None
    files = [data] if isinstance(data, str) else data
    words = [f"`{file}`" for file in files]
    parts = dig(checkpoint.state, "inputs", "data") or []
    if parts == [[files[0], "by its flags"]]:
        return f"{words[0]}, a text that r1zero makes: {settings['documents']:,} documents"
    if len(parts) == len(files):
        words = [
            f"{word} ({short_fingerprint(part[1])})"
            for word, part in zip(words, parts, strict=True)
        ]
    return ", ".join(words)


def task_in_words(task: Any) -> str | None:
    """The problems: `countdown` with n_numbers=3."""
    name = dig(task, "name")
    if name is None:
        return None
    words = f"`{name}`"
    if options := task.get("options"):
        words += f" with {', '.join(options)}"
    if task.get("data"):
        words += f", problems from `{task['data']}`"
    return words + (", through the chat template" if task.get("chat") else "")


def adapters_in_words(lora: Any) -> str | None:
    """What LoRA trained, and what it left alone."""
    config = dig(lora, "config")
    if not config:
        return None
    where = {"all": "all matrices"}.get(config["layers"], f"the matrices of the {config['layers']}")
    return (
        f"low-rank adapters (LoRA) of rank {config['rank']} and alpha {config['alpha']:g} beside "
        f"{where} of each block; the weights of the base were not trained"
    )


# ---- how it was trained ----


def steps_in_words(settings: dict) -> str | None:
    """How much there is in a step."""
    if "prompts_per_step" in settings and "group_size" in settings:
        return (
            f"{settings['prompts_per_step']} problems with {settings['group_size']} answers each, "
            f"at temperature {settings.get('temperature', 1.0):g}, of {settings['max_new_tokens']} "
            "tokens at most"
        )
    if "rankings_per_step" in settings:
        noise = f", with {settings['noise']:.0%} of the pairs turned around"
        return f"{settings['rankings_per_step']} rankings" + (noise if settings["noise"] else "")
    if "answers_per_step" in settings:
        return (
            f"{settings['answers_per_step']} answers, label `{settings['labels']}` of their steps"
        )
    if "batch_tokens" in settings:
        return f"{settings['batch_tokens']:,} tokens at most"
    return None


def reward_in_words(rewards: Any) -> str | None:
    """The parts of the reward with their weights."""
    if not isinstance(rewards, dict):
        return None
    parts = []
    for key, weight in rewards.items():
        name = key.removesuffix("_weight")
        is_weight = name != key and finite(weight)
        if not is_weight or (name in OPTIONAL and not rewards.get(name)):
            continue
        what = PARTS.get(name, name)
        if name == "plugin":
            what = f"`{rewards['plugin']}`, a function of its own"
        if name == "model":
            what = f"the score of the reward model `{rewards['model']}`"
            if begins := rewards.get("model_from"):
                what += f", from {begins:.0%} of the steps on"
        if name == "process":
            what = f"the scores of the steps by the process reward `{rewards['process']}`"
        parts.append(f"{weight:g} x {what}")
    return " + ".join(parts)


def algorithm_in_words(settings: dict) -> str | None:
    """The preset, and what its options mean."""
    if "algo" not in settings:
        return None
    sentences = [f"`{settings['algo']}`"]
    if "advantage" in settings:
        advantage = asdict(AdvantageConfig()) | settings["advantage"]
        baseline = chosen(BASELINES, advantage["baseline"])
        scale = chosen(SCALES, advantage["scale"])
        sentences.append(f"the reward of an answer is compared with {baseline}, and {scale}")
    if "loss" in settings:
        loss = asdict(LossConfig()) | settings["loss"]
        sentences.append(chosen(OBJECTIVES, loss["objective"]).format(**loss))
        sentences.append(chosen(MEANS, loss["mean"]))
        sentences.append(kl_in_words(loss, settings.get("teacher")))
    updates = settings.get("updates_per_step", 1)
    if updates > 1:
        sentences.append(f"{updates} updates per step")
    if settings.get("dynamic_sampling", 1) > 1:
        sentences.append("problems whose answers all earn the same are replaced by others")
    if share := settings.get("overlong_buffer"):
        sentences.append(f"the last {share:.0%} of the room for an answer cost reward")
    return "; ".join(sentences)


def chosen(words: dict[str, str], name: str) -> str:
    """The words for a choice, or its name."""
    return words.get(name, f"`{name}`")


def kl_in_words(loss: dict, teacher: str | None = None) -> str:
    if not loss["kl_coef"]:
        return "no KL"
    whom = f"teacher `{teacher}`" if teacher else "reference"
    return f"a KL of weight {loss['kl_coef']:g} to the {whom} counts in the {loss['kl_in']}"


def warning_in_words(settings: dict) -> str | None:
    """What nobody should take for a result: a control, or a mistake on purpose."""
    if name := settings.get("mistake"):
        what = MISTAKES[name].what if name in MISTAKES else ""
        return f"trained with a mistake on purpose, `{name}`: {what}"
    control = settings.get("control") or "none"
    if control != "none":
        return f"a control: its rewards are dealt out by chance (`{control}`), and say nothing"
    return None


def run_in_words(checkpoint: Checkpoint) -> dict[str, str]:
    """What is known of the run of a checkpoint, each fact under its name."""
    state = checkpoint.state
    settings = without_folders(state.get("settings") or {})
    loop = state.get("loop", "training")
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    size = f"`{settings.get('model')}`, from random weights" if loop == "pretrain" else None
    facts = {
        "made by": f"`r1zero {loop}`, step {checkpoint.step}{seed}",
        "beware": warning_in_words(settings),
        "model": size,
        "base": base_in_words(checkpoint, settings),
        "data": data_in_words(checkpoint, settings),
        "task": task_in_words(settings.get("task")),
        "each step": steps_in_words(settings),
        "reward": reward_in_words(settings.get("rewards")),
        "algorithm": algorithm_in_words(settings),
        "adapters": adapters_in_words(state.get("lora")),
    }
    return {name: words for name, words in facts.items() if words}
