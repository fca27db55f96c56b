"""What a GRPO run is predicted to take, beside what it took; and the largest batch first, on a GPU.

On a GPU a run would otherwise run out of memory at the first long answer, which may come after
hours. So before its first step it sends one micro-batch of the longest answers forward and backward
and throws the gradient away. That uses no random number and changes no weight.
"""

import torch

from ..eval.console import say
from ..model.memory import Prediction, Setup, predict
from ..model.packed import pack
from ..rl.family import Algorithm
from ..rl.step import Learner
from .cli.errors import BatchTooLargeError
from .machine import peak_memory


def setup_of(config: Algorithm, learner: Learner, longest: int) -> Setup:
    """What decides the memory of this run. longest: tokens of a prompt and its answer."""
    policy = learner.policy
    reference = "cpu" if config.ref_offload else "device"
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
        reference=reference if learner.reference else "none",
        critic=config.advantage.baseline == "critic",
    )


def predicted_for(config: Algorithm, learner: Learner, longest: int) -> Prediction:
    """The parts that this run is predicted to take on its device."""
    budget = None
    if learner.policy.device.type == "cuda":
        _, budget = torch.cuda.mem_get_info(learner.policy.device)
    return predict(setup_of(config, learner, longest), budget)


def try_longest_batch(learner: Learner, config: Algorithm, longest: int) -> None:
    """Send the largest micro-batch there can be through forward and backward, and forget it.

    Raises BatchTooLargeError, with the parts that were predicted and what would help.
    """
    policy = learner.policy
    n_sequences = max(1, config.micro_tokens // longest)
    packed = pack([[0] * longest] * n_sequences, policy.device)
    try:
        logp, entropy = policy.logprobs(policy.hidden_states(packed), packed.tokens)
        (logp.sum() + entropy.sum()).backward()
    except torch.OutOfMemoryError as error:
        predicted = predicted_for(config, learner, longest)
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in predicted.parts.items())
        raise BatchTooLargeError(
            f"a micro-batch of {len(packed.tokens)} tokens does not fit, which is the largest that "
            f"can come. Predicted were {parts}; what the GPU ran out at was the activations or the "
            "log-probs. Give a smaller --micro-tokens, --recompute, --ref-offload, --optim.moments "
            "bf16 or --lora.rank; `r1zero plan` says what each would save"
        ) from error
    finally:
        policy.zero_grad(set_to_none=True)


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
