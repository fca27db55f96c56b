"""The models that a GRPO run has beside its policy.

    reference or teacher    what the KL is measured to
    critic's trunk          what PPO's critic begins from
    judges                  the models of --rewards.model and --rewards.process

`base` is what `load_model` gives: the policy, its tokenizer and its checkpoint. `config` is a
GRPOConfig (grpo.py). What cannot go together is refused here, before anything is trained: other
tokenizers, too short a context, an algorithm without its teacher.
"""

from copy import deepcopy

import torch

from ..model.checkpoint import Checkpoint, build_model, load_model
from ..model.lora import adapters_of, cast_frozen, own_adapters
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer
from ..rl.heads import RewardModel, ValueHead
from ..rl.update import AdapterReference, Reference, Teacher
from .process_reward import load_process_reward
from .reward_model import load_reward_model

# How the model of --rewards.<name> is loaded.
LOADERS = {"model": load_reward_model, "process": load_process_reward}
# The policy, its tokenizer, and the checkpoint that it is from.
Base = tuple[Transformer, Tokenizer, Checkpoint]


def another_policy(base: Base, weights: dict[str, torch.Tensor] | None = None) -> Transformer:
    """A model like the policy, which computes as it does. With adapters, it has some of its own
    over the same frozen weights. weights: None are the base's."""
    policy, _, checkpoint = base
    if adapters_of(policy):
        another = own_adapters(policy)
    else:
        weights = weights or checkpoint.tensors["model"]
        model_config = checkpoint.state["model_config"]
        another = build_model(model_config, weights, policy.device, policy.precision)
    another.recomputes = policy.recomputes
    return another


def make_critic_trunk(base: Base, reward_model: RewardModel | None) -> Transformer:
    """What the critic begins from: the base, or the reward model if there is one (InstructGPT,
    arXiv 2203.02155, section 3.5). With adapters it is always the base, which they are for."""
    if reward_model is None or adapters_of(base[0]):
        return another_policy(base)
    trunk = deepcopy(reward_model.trunk).requires_grad_(True)
    trunk.recomputes = base[0].recomputes
    return trunk


def check_judges(config) -> None:
    """Raise ValueError for a model that judges prompts in a chat template: it has learned from
    prompts without one."""
    for name in LOADERS:
        if getattr(config.rewards, name) is not None and getattr(config.task, "chat", False):
            raise ValueError(
                f"--rewards.{name} with --chat: it was trained on prompts without a chat template, "
                "and would judge others; leave out either"
            )


def open_judges(config, base: Base) -> dict[str, tuple[ValueHead, Checkpoint]]:
    """The models of --rewards.model and --rewards.process, with their checkpoints; "model" or
    "process" is left out where that flag is.

    Raises ValueError for one that reads other tokens than the base writes.
    """
    policy, tokenizer, _ = base
    found = {}
    for name, load in LOADERS.items():
        folder = getattr(config.rewards, name)
        if folder is None:
            continue
        model, its_tokenizer, checkpoint = load(folder, policy.device, policy.precision)
        if its_tokenizer.fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"--rewards.{name} {folder} was made with another tokenizer than --base "
                f"{config.base}, so it would read other words than were written; train one on "
                "this base"
            )
        found[name] = model.requires_grad_(False), checkpoint
    return found


def open_teacher(
    config, base: Base, device: torch.device
) -> tuple[Teacher, Checkpoint] | tuple[None, None]:
    """(the model of --teacher, its checkpoint), or two None without one.

    Raises ValueError for one of another tokenizer than the base's.
    """
    folder = config.teacher
    if folder is None:
        return None, None
    policy, tokenizer, _ = base
    model, its_tokenizer, checkpoint = load_model(folder, device, precision=policy.precision)
    if its_tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(
            f"--teacher {folder} has another tokenizer than --base {config.base}, and tokens of "
            "one vocabulary have no probability under another; r1zero collect and r1zero sft "
            "distil by text"
        )
    cast_frozen(model.requires_grad_(False))  # nobody trains it: no fp32 masters
    return Teacher(model, device, config.ref_offload), checkpoint


def check_teacher(config) -> None:
    """Raise ValueError for an algorithm that learns from a teacher without one, or for a teacher
    that nothing is compared with. (Not in GRPOConfig, of which each preset has its defaults.)"""
    needs_one = config.advantage.baseline == "teacher"
    if needs_one and config.teacher is None:
        raise ValueError(
            f"--algo {config.algo} learns from a teacher alone; add --teacher with the folder of "
            "a better model"
        )
    if config.teacher is not None and not config.needs_reference:
        raise ValueError(
            f"--teacher {config.teacher} is what the KL is measured to, and there is no KL; give "
            "--loss.kl-coef or --kl-samples, or leave it out"
        )


def check_reader(flag: str, reader: Transformer | None, longest: int) -> None:
    """Raise ValueError for a model without room for so many tokens of a prompt and its answer.
    flag: how it was given."""
    if reader is None or longest <= reader.config.max_seq_len:
        return
    room = reader.config.max_seq_len
    raise ValueError(
        f"{flag} has room for {room} tokens, and a prompt and its answer may have {longest}; lower "
        f"--max-new-tokens by {longest - room}"
    )


def make_reference(
    config,
    base: Base,
    weights: dict[str, torch.Tensor] | None = None,
) -> Reference:
    """The model that the KL is measured to, if it is no teacher. weights: None are the base's."""
    policy = base[0]
    if adapters_of(policy):
        return AdapterReference(policy)
    reference = another_policy(base, weights).requires_grad_(False)
    cast_frozen(reference)  # nobody trains it: no fp32 masters
    return Reference(reference, policy.device, config.ref_offload)
