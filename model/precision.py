"""What a model computes in: the dtype of its matrix products, and whether its head stays in fp32.

    name   bits of a number   largest     what it needs
    fp32   24                 3e38        nothing
    bf16   8                  3e38        a GPU from sm_80 on, or a CPU
    fp16   11                 65504       loss scaling (loss_scale.py), or small gradients become 0

The weights are the optimizer's fp32 masters in each case. Trainer, reference, critic and engine
must have one precision, or their log-probs differ by more than rounding: so it is one object, which
is handed on (`Transformer.precision`).

With the fp32 head, the last norm, the logits and the log-probs are computed in fp32, from fp32
hidden states and the fp32 weight. MiniMax-M1 (arXiv 2506.13585) found the head to be where most of
the distance between a sampler's and a trainer's log-probs comes from. ScaleRL (arXiv 2510.13786)
found that RL then ends higher.

Left out: fp8, and a precision per layer.
"""

from dataclasses import dataclass

import torch

from ..kernels.dispatch import arch_of, compute_dtype, why_not_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """What a model computes in."""

    dtype: torch.dtype
    """Dtype of the hidden states and the matrix products."""
    fp32_head: bool = False
    """Whether what comes after the last layer is computed in fp32 all the same."""


def check_dtype_name(name: str) -> None:
    """Raise ValueError unless `name` is auto, or one of DTYPES."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}, expected auto, {', '.join(DTYPES)}")


def choose_precision(
    name: str, fp32_head: bool, device: torch.device, arch: int | None = None
) -> Precision:
    """The precision that the flags ask for; "auto" is the device's `compute_dtype`.

    arch: compute capability of a GPU; None asks it. Raises ValueError for an unknown name, and for
    a dtype that the device does not have.
    """
    check_dtype_name(name)
    if name == "auto":
        return Precision(compute_dtype(device), fp32_head)
    reason = why_not_dtype(DTYPES[name], device.type, arch or arch_of(device))
    if reason is not None:
        raise ValueError(f"--dtype is {name}, but {reason}; expected auto, fp16 or fp32 here")
    return Precision(DTYPES[name], fp32_head)
