"""Several processes on one update, through torch.distributed; with a single process, nothing.

Each process samples and computes its own share of the answers; denominators are those of all (rl/losses.py),
so gradients are added, not averaged, and one process with everything has the same gradient.
"""

import numpy as np
import torch
import torch.distributed as dist


def n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: np.ndarray) -> np.ndarray:
    """The sum over processes, in fp64; every process must call it."""
    if n_processes() == 1:
        return x
    total = torch.from_numpy(np.array(x, np.float64))
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    return total.cpu().numpy()


def sum_gradients(model: torch.nn.Module) -> None:
    """Add the gradients up over processes; a process that had nothing to compute counts as 0."""
    if n_processes() == 1:
        return
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
