"""What a GRPO run is predicted to take, beside what it took; and the largest batch first, on a GPU.

On a GPU a run would otherwise run out of memory at the first long answer, which may come after
hours. So before its first step it sends one micro-batch of the longest answers forward and backward
and throws the gradient away. That uses no random number and changes no weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..eval.console import say
from ..model.config import ModelConfig
from ..model.memory import Prediction, Setup, predict
from ..model.packed import Packed, pack
from ..model.transformer import Transformer
from ..rl.family import Algorithm
from ..rl.step import Learner
from ..rl.update import Reference
from .checks import BatchTooLargeError
from .interrupt import Stopped
from .machine import peak_memory
from .run import Run

MOST_ROWS = 1024


def rows_of(prompts_per_step: int, group_size: int) -> int:
    """How many answers are sampled at one time, if there is room for them."""
    return min(MOST_ROWS, prompts_per_step * group_size)


def most_tokens(config: Algorithm, longest: int) -> int:
    """Tokens of the largest micro-batch that can come: a step has no more than its answers."""
    return min(config.micro_tokens, config.prompts_per_step * config.group_size * longest)


def setup_of_run(
    config: Algorithm,
    policy: Transformer,
    longest: int,
    reference: Reference | None = None,
    judges: Sequence[ModelConfig] = (),
) -> Setup:
    """What decides the memory of a run. longest: tokens of a prompt and its answer; reference: None
    for a copy of the policy; judges: the shapes of the models that judge answers."""
    place = "cpu" if config.ref_offload else "device"
    return Setup(
        model=policy.config,
        rows=rows_of(config.prompts_per_step, config.group_size),
        longest=longest,
        micro_tokens=most_tokens(config, longest),
        dtype=policy.compute_dtype,
        fp32_head=policy.fp32_head,
        on_gpu=policy.device.type == "cuda",
        lora=config.lora,
        recompute=policy.recomputes,
        moments=config.optim.moments,
        reference=place if config.needs_reference else "none",
        teacher=None if reference is None else reference.shape,
        critic=config.advantage.baseline == "critic",
        critic_moments=config.critic_optim.moments,
        judges=tuple(judges),
    )


def predicted_for(
    config: Algorithm, learner: Learner, longest: int, judges: Sequence[ModelConfig] = ()
) -> Prediction:
    """The parts that this run is predicted to take, with the cache that its engine has made."""
    engine = learner.sampler.engine
    predicted = predict(setup_of_run(config, learner.policy, longest, learner.reference, judges))
    cache = engine.cache_tokens * engine.token_bytes
    return replace(predicted, cache=cache, cache_tokens=engine.cache_tokens)


def try_longest_batch(
    learner: Learner, config: Algorithm, longest: int, predicted: Prediction
) -> None:
    """Send the largest micro-batch there can be through forward and backward, and forget it.

    Twice, so that the second one meets the gradients of the first, and beside as much memory as the
    moments will take. predicted: what `predicted_for` gives. Raises BatchTooLargeError, with what
    was predicted and what would help.
    """
    policy, device = learner.policy, learner.policy.device
    n_tokens = most_tokens(config, longest)
    doing = "the moments"
    try:
        held = None
        if not learner.optimizer.state:
            held = torch.empty(predicted.moments, dtype=torch.uint8, device=device)
        for _ in range(2):
            doing = "the activations"
            packed = largest_batch(n_tokens, longest, policy)
            hidden_TM = policy.hidden_states(packed)
            doing = "the log-probs"
            logp, entropy = policy.logprobs(hidden_TM, packed.tokens)
            doing = "the backward pass, which makes gradients out of activations"
            (logp.sum() + entropy.sum()).backward()
        del held
    except torch.OutOfMemoryError as error:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in predicted.parts.items())
        helps = "--recompute, --ref-offload, --optim.moments bf16 or --lora.rank"
        if config.lora.rank:  # the reference shares the weights, and the moments are small
            helps = "--recompute or a smaller --lora.rank"
        raise BatchTooLargeError(
            f"a micro-batch of {max(n_tokens, longest)} tokens does not fit, which is the largest "
            f"that can come. Memory ended at {doing}. Predicted were {parts}: that part came out "
            "larger, or another process has a part of the GPU. Give a smaller --micro-tokens, "
            f"{helps}; `r1zero plan` says what each would save"
        ) from error
    finally:
        policy.zero_grad(set_to_none=True)


def largest_batch(micro_tokens: int, longest: int, policy: Transformer) -> Packed:
    """Sequences as long as they may be, and a last one that fills the micro-batch. Their tokens
    differ, so that those of a mixture go to different experts."""
    lengths = [longest] * (micro_tokens // longest) + [micro_tokens % longest]
    lengths = [length for length in lengths if length] if micro_tokens > longest else [longest]
    vocabulary = policy.config.head_rows
    return pack([[i % vocabulary for i in range(length)] for length in lengths], policy.device)


def steps_measured(run: Run, predicted: Prediction, device: torch.device) -> Iterator[int]:
    """The steps of a run. After the last one, and after Ctrl-C, run.json gets the peak as well."""
    try:
        yield from run.steps()
    except Stopped:
        run.note(memory=compare(predicted, device))
        raise
    if run.first_step < run.config.steps:
        run.note(memory=compare(predicted, device))


def compare(predicted: Prediction, device: torch.device) -> dict:
    """{"predicted": bytes by part, "measured": the peak so far, "device": cpu, cuda, ...}; the two
    peaks are also said."""
    measured = peak_memory(device)
    if measured is not None:
        what = "PyTorch's tensors" if device.type == "cuda" else "the process, Python and libraries"
        say(
            f"memory: {predicted.peak / 1e9:.2f} GB of tensors were predicted; the peak of {what} "
            f"was {measured / 1e9:.2f} GB"
        )
    sizes = predicted.parts | {"peak": predicted.peak}
    return {"predicted": sizes, "measured": measured, "device": device.type}
