"""AdamW (torch's own, fused) on the fp32 masters, its learning-rate schedule, and one guarded step."""
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OptimConfig:
    """Dials of the optimizer."""

    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 50
    """Steps of linear warm-up from 0."""
    schedule: str = "cosine"
    """"cosine" falls to `final_lr` times the peak at the last step; "constant" stays."""
    final_lr: float = 0.05
    """Share of the peak that the cosine ends at."""
    weight_decay: float = 0.1
    """On matrices only; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square; a large one keeps parameters with small, noisy gradients
    still."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down."""

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"--optim.schedule is {self.schedule!r}, expected cosine or constant")
        # NaN is not >= 0, but min() may pass over it
        at_least_zero = all(dial >= 0 for dial in (self.warmup, self.weight_decay, self.eps))
        if not (self.lr > 0 and self.clip_grad > 0 and at_least_zero):
            raise ValueError(f"optim: lr {self.lr}, clip_grad {self.clip_grad}, warmup {self.warmup}, "
                             f"weight_decay {self.weight_decay}, eps {self.eps}; expected lr and clip_grad "
                             "above 0 and the others 0 or more")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.final_lr <= 1):
            raise ValueError(f"optim: beta1 {self.beta1}, beta2 {self.beta2}, final_lr {self.final_lr}; "
                             "expected betas in [0, 1) and final_lr in [0, 1]")


def make_optimizer(model: torch.nn.Module, c: OptimConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def learning_rate(step: int, total_steps: int, c: OptimConfig) -> float:
    """For 0-based `step`: linear from lr / warmup up to lr, then flat or half a cosine down to final_lr *
    lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if c.schedule == "constant":
        return c.lr
    done = (step - c.warmup) / max(1, total_steps - 1 - c.warmup)
    return c.lr * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimizer_step(model, optimizer, lr: float, c: OptimConfig) -> float:
    """Clip, step and clear. Returns the gradient's norm before clipping.

    If that is not finite, nothing is stepped, and the gradients stay for whoever looks for the reason.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not torch.isfinite(norm):
        return float(norm)
    torch.nn.utils.clip_grads_with_norm_(parameters, c.clip_grad, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)
