"""Several processes on one update, through torch.distributed; with one process, nothing happens.

Each process samples and computes its own share of the answers. The denominators of the loss are
those of all processes (rl/losses.py), so gradients are added, not averaged, and one process with
all answers has the same gradient.

Left out: starting the processes (`torchrun` does), sharding the weights.
"""

import numpy as np
import torch
import torch.distributed as dist


def n_processes() -> int:
    """The number of processes of this update; 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def all_sum(x: np.ndarray) -> np.ndarray:
    """The sum of `x` over processes, in fp64. Every process must call it."""
    if n_processes() == 1:
        return x
    total = torch.from_numpy(np.array(x, np.float64))
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.cpu().numpy()


def sum_gradients(module: torch.nn.Module) -> None:
    """Add the gradients of the trainable parameters over processes, in place.

    A process that had nothing to compute takes part with zeros. Every process must call it.
    """
    if n_processes() == 1:
        return
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
