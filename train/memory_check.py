"""What a GRPO run is predicted to take, beside what it took; and the largest batch first, on a GPU.

On a GPU a run would otherwise run out of memory at the first long answer, which may come after
hours. So before its first step it sends one micro-batch of the longest answers forward and backward
and throws the gradient away. That uses no random number and changes no weight.
"""

from dataclasses import replace

import torch

from ..eval.console import say
from ..model.memory import Prediction, Setup, predict
from ..model.packed import Packed, pack
from ..model.transformer import Transformer
from ..rl.family import Algorithm
from ..rl.step import Learner
from ..rl.update import Reference
from .checks import BatchTooLargeError
from .machine import peak_memory


def setup_of(
    config: Algorithm, policy: Transformer, longest: int, reference: Reference | None
) -> Setup:
    """What decides the memory of a run. longest: tokens of a prompt and its answer."""
    place = "cpu" if config.ref_offload else "device"
    return Setup(
        model=policy.config,
        rows=min(1024, config.prompts_per_step * config.group_size),
        longest=longest,
        micro_tokens=config.micro_tokens,
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
    )


def predicted_for(config: Algorithm, learner: Learner, longest: int) -> Prediction:
    """The parts that this run is predicted to take, with the cache that its engine has made."""
    engine = learner.sampler.engine
    predicted = predict(setup_of(config, learner.policy, longest, learner.reference))
    cache = engine.cache_tokens * engine.token_bytes
    return replace(predicted, cache=cache, cache_tokens=engine.cache_tokens)


def try_longest_batch(learner: Learner, config: Algorithm, longest: int) -> None:
    """Send the largest micro-batch there can be through forward and backward, and forget it.

    Twice, so that the second one meets the gradients of the first, and beside as much memory as the
    moments will take. Raises BatchTooLargeError, with what was predicted and what would help.
    """
    policy, device = learner.policy, learner.policy.device
    predicted = predicted_for(config, learner, longest)
    try:
        held = None
        if not learner.optimizer.state:
            held = torch.empty(predicted.moments, dtype=torch.uint8, device=device)
        for _ in range(2):
            packed = largest_batch(config.micro_tokens, longest, policy)
            logp, entropy = policy.logprobs(policy.hidden_states(packed), packed.tokens)
            (logp.sum() + entropy.sum()).backward()
        del held
    except torch.OutOfMemoryError as error:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in predicted.parts.items())
        raise BatchTooLargeError(
            f"a micro-batch of {len(packed.tokens)} tokens does not fit, which is the largest that "
            f"can come. Predicted were {parts}; what came out larger is the activations or the "
            "log-probs, or another process has a part of the GPU. Give a smaller --micro-tokens, "
            "--recompute, --ref-offload, --optim.moments bf16 or --lora.rank; `r1zero plan` says "
            "what each would save"
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


def compare(predicted: Prediction, device: torch.device) -> dict:
    """{"predicted": bytes by part, "measured": the peak so far}, which is also said."""
    measured = peak_memory(device)
    if measured is not None:
        what = "PyTorch's tensors" if device.type == "cuda" else "the process, Python and libraries"
        say(
            f"memory: {predicted.peak / 1e9:.2f} GB of tensors were predicted; the peak of {what} "
            f"was {measured / 1e9:.2f} GB"
        )
    return {"predicted": predicted.parts | {"peak": predicted.peak}, "measured": measured}
