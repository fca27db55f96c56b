"""The state of a torch optimizer as named tensors and JSON, and back, bit for bit.

Left out: state tensors of another shape than their parameter (Adafactor's rows and columns), learning rates
that are tensors. AdamW and SGD, as we build them, have neither.
"""
from collections.abc import Iterable

import torch

from .checkpoint import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer,
                      named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
                      ) -> tuple[dict[str, torch.Tensor], dict]:
    """The whole state of `optimizer`: (tensors named "<parameter>/<field>", the rest as JSON).

    By name, not by torch's running numbers, so that another order of parameters cannot swap moments unseen.
    The tensors are the optimizer's own, not copies. Raises ValueError if it steps a parameter without a name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors, numbers, groups = {}, {}, []
    for group in optimizer.param_groups:
        if nameless := [tuple(p.shape) for p in group["params"] if id(p) not in names]:
            raise ValueError(f"the optimizer steps parameters of shapes {nameless} that are not named here; "
                             "give the names of all modules that it trains")
        groups.append(group | {"params": [names[id(p)] for p in group["params"]]})
        for parameter in group["params"]:
            for field, value in optimizer.state.get(parameter, {}).items():
                into = tensors if isinstance(value, torch.Tensor) else numbers
                into[f"{names[id(parameter)]}/{field}"] = value
    return tensors, {"groups": groups, "numbers": numbers}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer,
                           named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
                           tensors: dict[str, torch.Tensor], rest: dict) -> None:
    """Give `optimizer` the state that `optimizer_tensors` took; learning rate and the like too.

    The tensors are taken over, not copied. Raises CheckpointError, and changes nothing, if the parameters or
    their groups are not the same, or a state tensor (but for scalars) has not the shape of its parameter.
    """
    parameters = dict(named_parameters)
    _, own = optimizer_tensors(optimizer, parameters.items())
    there, here = ([group["params"] for group in groups] for groups in (rest["groups"], own["groups"]))
    if there != here:
        names_there, names_here = (set(sum(groups, [])) for groups in (there, here))
        only_there, only_here = sorted(names_there - names_here), sorted(names_here - names_there)
        raise CheckpointError("the checkpoint's optimizer steps other parameters, or in other groups: only "
                              f"there {only_there}, only here {only_here}. Use the model it was made with")
    index = {name: i for i, name in enumerate(sum(here, []))}  # torch's running numbers
    state: dict[int, dict] = {}
    for key, value in (tensors | rest["numbers"]).items():
        name, _, field = key.rpartition("/")
        if name not in index:
            raise CheckpointError(f"the checkpoint's optimizer holds {key}, but no parameter is {name!r}")
        shape = parameters[name].shape
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != shape:
            raise CheckpointError(f"the checkpoint's optimizer holds {key} of shape {tuple(value.shape)}, "
                                  f"but the parameter has {tuple(shape)}. Use the model it was made with")
        state.setdefault(index[name], {})[field] = value
    groups = []
    for now, saved in zip(own["groups"], rest["groups"], strict=True):
        # A field that only this version of torch has keeps its value. JSON made lists of tuples (betas).
        saved = {k: tuple(v) if isinstance(now.get(k), tuple) else v for k, v in saved.items()}
        groups.append(now | saved | {"params": [index[name] for name in saved["params"]]})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
