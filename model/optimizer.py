"""The optimizer: torch's fused AdamW on the fp32 masters, its schedule, one step, its state.

    optimizer = make_optimizer(model, config)
    ... backward() ...
    lr = learning_rate(step, total_steps, config)
    norm = optimizer_step(model, optimizer, lr, config)

In fp16 the loss is scaled before backward(), and the scaler is given to the step (loss_scale.py).

Only parameters that require a gradient are trained. The state goes into a checkpoint and back by
the names of the parameters, not by torch's running numbers, so that another order cannot swap
moments unnoticed.

Left out: other optimizers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from .loss_scale import LossScaler
from .moe import Router

LARGEST_BETA_IN_BF16 = 0.99


@dataclass(frozen=True)
class OptimConfig:
    """Options of AdamW and of its learning rate."""

    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 50
    """Number of steps in which the learning rate rises linearly from 0."""
    schedule: str = "cosine"
    """"cosine" falls to `final_lr` times the peak at the last step; "constant" stays at it."""
    final_lr: float = 0.05
    """Learning rate at the end of the cosine, as a share of the peak."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    beta2: float = 0.95
    """Decay rate of the running mean of squared gradients."""
    eps: float = 1e-8
    """Number added to the root of the mean square. A large one keeps parameters with small, noisy
    gradients where they are."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; a larger gradient is scaled down to it."""
    moments: str = "fp32"
    """Dtype of AdamW's two moments: fp32, or bf16, which takes 4 bytes less per parameter and needs
    a beta2 of at most 0.99."""
    router_lr: float = 1.0
    """Learning rate of the routers of a mixture of experts, as a multiple of all others'; 0 leaves
    them as they are."""

    def __post_init__(self):
        """Raises ValueError for values out of range."""
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"--optim.schedule is {self.schedule!r}, expected cosine or constant")
        if self.moments not in ("fp32", "bf16"):
            raise ValueError(f"--optim.moments is {self.moments!r}, expected fp32 or bf16")
        largest = max(self.beta1, self.beta2)
        if self.moments == "bf16" and not largest <= LARGEST_BETA_IN_BF16:
            raise ValueError(
                f"--optim.moments bf16 with a beta of {largest}: bf16 has steps of 1/256, and a "
                "mean that moves by less per step never falls; expected a beta1 and a beta2 of at "
                f"most {LARGEST_BETA_IN_BF16}, or moments in fp32"
            )
        # each alone, for NaN: it is not >= 0, but min() may pass over it
        at_least_zero = self.warmup >= 0 and self.weight_decay >= 0 and self.eps >= 0
        if not 0 <= self.router_lr < math.inf:
            raise ValueError(f"--optim.router-lr is {self.router_lr}, expected 0 or more")
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


# ---- one step ----


def make_optimizer(module: torch.nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, with weight decay on matrices only, and a
    learning rate of their own for routers.

    Raises ValueError if none of them is trainable.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"optimizer: no parameter of this {type(module).__name__} requires a gradient; "
            "expected one or more, so call requires_grad_() on what is to be trained"
        )
    routers = [part for part in module.modules() if isinstance(part, Router)]
    of_routers = {id(p) for router in routers for p in router.parameters()}
    groups = decayed_groups([p for p in trainable if id(p) not in of_routers], config)
    if of_routers:
        steered = decayed_groups([p for p in trainable if id(p) in of_routers], config)
        groups += [group | {"lr_scale": config.router_lr} for group in steered]
    betas = (config.beta1, config.beta2)
    kind = SmallMomentsAdamW if config.moments == "bf16" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


class SmallMomentsAdamW(torch.optim.AdamW):
    """AdamW that keeps its two moments in bf16 between steps. A step widens those of one parameter
    at a time, computes in fp32, and rounds them to the nearest again."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """closure: not taken; it is there for torch's signature."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_one(parameter, group)

    def step_one(self, parameter: torch.nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(parameter, dtype=torch.bfloat16)
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        mean, square = state["exp_avg"].to(parameter), state["exp_avg_sq"].to(parameter)
        adamw(
            [parameter],
            [parameter.grad],
            [mean],
            [square],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in AdamW, which widens the moments; they were bf16, so nothing is lost."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].bfloat16()


def decayed_groups(parameters: list[torch.nn.Parameter], config: OptimConfig) -> list[dict]:
    """Two groups: matrices, with weight decay, and vectors, without."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of 0-based `step`: a linear warm-up, then flat or half a cosine.

    After `total_steps`, a cosine keeps the rate of its last step.
    """
    if config.schedule == "cosine":
        step = min(step, total_steps - 1)
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    # `done` runs from 0 after the warm-up to 1 at the last step
    done = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def optimizer_step(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    config: OptimConfig,
    scaler: LossScaler | None = None,
) -> float:
    """Clip the gradient, step, and clear it. Returns the gradient's norm before clipping.

    If the norm is not finite, nothing is changed: the gradients stay, to find out the reason. But
    if the loss scale was too large for fp16, the gradient is cleared, and 0 returned: this update
    is skipped. scaler: the one that the loss was scaled with; None is one that is off.
    """
    # 1. The norm of the whole gradient, as it is without the scale of the loss.
    scaler = scaler or LossScaler()
    scaler.unscale(optimizer)
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not torch.isfinite(norm):
        if not scaler.overflowed():
            return float(norm)
        optimizer.zero_grad()
        return 0.0

    # 2. A larger gradient is scaled down to the limit.
    torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)

    # 3. Step. Routers have a multiple of the learning rate.
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scaler.stepped()
    return float(norm)


# ---- the state, into a checkpoint and back ----


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> tuple[dict[str, torch.Tensor], dict]:
    """The whole state of `optimizer`: (tensors named "<parameter>/<field>", the rest as JSON).

    The tensors are the optimizer's own, not copies. Raises ValueError if it steps a parameter that
    has no name.
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
                key = f"{names[id(parameter)]}/{field}"
                if isinstance(value, torch.Tensor):
                    tensors[key] = value
                else:
                    numbers[key] = value
    return tensors, {"groups": groups, "numbers": numbers}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tensors: dict[str, torch.Tensor],
    rest: dict,
) -> None:
    """Give `optimizer` the state that `optimizer_tensors` returned, learning rate and all.

    The optimizer keeps the tensors themselves, not copies. Raises CheckpointError, and changes
    nothing, if the parameters or their groups differ, or if a state tensor (other than a scalar)
    differs from its parameter in shape.
    """
    from .checkpoint import CheckpointError  # here, since not all who train read checkpoints

    parameters = dict(named_parameters)
    _, own = optimizer_tensors(optimizer, parameters.items())

    # 1. The same parameters, in the same groups.
    saved_names = [group["params"] for group in rest["groups"]]
    own_names = [group["params"] for group in own["groups"]]
    if saved_names != own_names:
        there, here = set(sum(saved_names, [])), set(sum(own_names, []))
        raise CheckpointError(
            "the checkpoint's optimizer steps other parameters, or in other groups: only "
            f"there {sorted(there - here)}, only here {sorted(here - there)}. "
            "Use the model it was made with"
        )

    # 2. The state of each parameter, under torch's running numbers.
    index = {name: i for i, name in enumerate(sum(own_names, []))}
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

    # 3. The options of each group. One that only this version of torch has keeps its value.
    groups = []
    for now, saved in zip(own["groups"], rest["groups"], strict=True):
        for option, value in saved.items():
            was_tuple = isinstance(now.get(option), tuple)  # JSON made a list of it
            now[option] = tuple(value) if was_tuple else value
        now["params"] = [index[name] for name in saved["params"]]
        groups.append(now)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
