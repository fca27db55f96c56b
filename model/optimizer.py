"""AdamW (torch's own, fused) on the fp32 masters, its learning-rate schedule, and one guarded step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .checkpoint import CheckpointError


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
            raise ValueError(
                f"optim: lr {self.lr}, clip_grad {self.clip_grad}, warmup {self.warmup}, "
                f"weight_decay {self.weight_decay}, eps {self.eps}; expected lr and clip_grad "
                "above 0 and the others 0 or more"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.final_lr <= 1):
            raise ValueError(
                f"optim: beta1 {self.beta1}, beta2 {self.beta2}, final_lr {self.final_lr}; "
                "expected betas in [0, 1) and final_lr in [0, 1]"
            )


def make_optimizer(model: torch.nn.Module, c: OptimConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": c.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
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


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> tuple[dict[str, torch.Tensor], dict]:
    """The whole state of `optimizer`: (tensors named "<parameter>/<field>", the rest as JSON).

    By name, not by torch's running numbers, so that another order of parameters cannot swap moments unseen.
    The tensors are the optimizer's own, not copies. Raises ValueError if it steps a parameter without a name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors, numbers, groups = {}, {}, []
    for group in optimizer.param_groups:
        if nameless := [tuple(p.shape) for p in group["params"] if id(p) not in names]:
            raise ValueError(
                f"the optimizer steps parameters of shapes {nameless} that are not named here; "
                "give the names of all modules that it trains"
            )
        groups.append(group | {"params": [names[id(p)] for p in group["params"]]})
        for parameter in group["params"]:
            for field, value in optimizer.state.get(parameter, {}).items():
                into = tensors if isinstance(value, torch.Tensor) else numbers
                into[f"{names[id(parameter)]}/{field}"] = value
    return tensors, {"groups": groups, "numbers": numbers}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tensors: dict[str, torch.Tensor],
    rest: dict,
) -> None:
    """Give `optimizer` the state that `optimizer_tensors` took; learning rate and the like too.

    The tensors are taken over, not copied. Raises CheckpointError, and changes nothing, if the parameters or
    their groups are not the same, or a state tensor (but for scalars) has not the shape of its parameter.
    """
    parameters = dict(named_parameters)
    _, own = optimizer_tensors(optimizer, parameters.items())
    there, here = (
        [group["params"] for group in groups] for groups in (rest["groups"], own["groups"])
    )
    if there != here:
        names_there, names_here = (set(sum(groups, [])) for groups in (there, here))
        only_there, only_here = sorted(names_there - names_here), sorted(names_here - names_there)
        raise CheckpointError(
            "the checkpoint's optimizer steps other parameters, or in other groups: only "
            f"there {only_there}, only here {only_here}. Use the model it was made with"
        )
    index = {name: i for i, name in enumerate(sum(here, []))}  # torch's running numbers
    state: dict[int, dict] = {}
    for key, value in (tensors | rest["numbers"]).items():
        name, _, field = key.rpartition("/")
        if name not in index:
            raise CheckpointError(
                f"the checkpoint's optimizer holds {key}, but no parameter is {name!r}"
            )
        shape = parameters[name].shape
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != shape:
            raise CheckpointError(
                f"the checkpoint's optimizer holds {key} of shape {tuple(value.shape)}, "
                f"but the parameter has {tuple(shape)}. Use the model it was made with"
            )
        state.setdefault(index[name], {})[field] = value
    groups = []
    for now, saved in zip(own["groups"], rest["groups"], strict=True):
        # A field that only this version of torch has keeps its value. JSON made lists of tuples (betas).
        saved = {k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in saved.items()}
        groups.append(now | saved | {"params": [index[name] for name in saved["params"]]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
