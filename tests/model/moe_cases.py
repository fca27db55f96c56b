"""A mixture of experts once more, token by token in Python, and what can be got wrong about it."""
import math

import torch

from ..kernels.naive_ops import naive_swiglu


def softmax(values):
    largest = max(values)
    exps = [math.exp(value - largest) for value in values]
    return [e / sum(exps) for e in exps]


def best(values, n):
    """The indices of the n highest, the highest first; of equal ones the lower first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def naive_route(logits, config, balance_bias=None, error=None):
    """({expert: gate} in the order of choice) of one token. error: what is done wrong, a key of ERRORS."""
    scores = list(logits)
    if config.scores == "softmax":
        scores = softmax(logits)
    elif config.scores == "sigmoid":
        scores = [1 / (1 + math.exp(-value)) for value in logits]
    bias = [0.0] * len(scores) if balance_bias is None or error == "bias forgotten" else balance_bias
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    if config.n_groups > 1:
        size = len(choice) // config.n_groups
        groups = [sorted(choice[i * size : (i + 1) * size], reverse=True) for i in range(config.n_groups)]
        n_best = 2 if (config.group_score == "top2") != (error == "another group score") else 1
        chosen = best([sum(group[:n_best]) for group in groups], config.groups_per_token)
        masked = 0.0 if error == "masked groups at 0" else -math.inf
        choice = [c if i // size in chosen else masked for i, c in enumerate(choice)]
    if error == "groups ignored":
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
    experts = best(choice, config.experts_per_token)
    gates = [(choice if error == "biased score as gate" else scores)[e] for e in experts]
    if config.scores == "logits":
        gates = softmax(logits if error == "softmax over all" else gates)[: len(gates)]
    if error == "softmax over the chosen":
        gates = softmax([logits[e] for e in experts])
    if config.scores != "logits" and config.normalise != (error == "the other normalisation"):
        gates = [gate / sum(gates) for gate in gates]
    scale = 1.0 if error == "scale forgotten" else config.scale
    return {e: gate * scale for e, gate in zip(experts, gates, strict=True)}


# What public implementations got wrong, and a family in which it shows.
ERRORS = {
    "biased score as gate": "deepseek-v3",  # transformers #41647, #41663, vLLM #12002
    "masked groups at 0": "deepseek-v3",  # vLLM #13474: biased scores are below 0
    "another group score": "deepseek-v3",
    "bias forgotten": "glm-4.5",
    "groups ignored": "deepseek-v2",
    "the other normalisation": "olmoe",
    "softmax over the chosen": "qwen2-moe",
    "softmax over all": "gpt-oss",
    "scale forgotten": "deepseek-v2",
}


def naive_moe(mlp, x, naive_mlp, error=None):
    """[T, M], from the definition; differentiable in everything. naive_mlp: for the shared experts."""
    config, linear = mlp.router.config, mlp.router.linear
    logits = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    bias = None if mlp.router.balance_bias is None else mlp.router.balance_bias.tolist()
    rows = []
    for token, row in zip(x, logits, strict=True):
        experts = list(naive_route(row.tolist(), config, bias, error))
        y = 0
        for e, gate in zip(experts, tensor_gates(row, experts, config), strict=True):
            y = y + gate * (mlp.down[e] @ naive_swiglu(mlp.gate_up[e] @ token))
        rows.append(y)
    y = torch.stack(rows)
    if mlp.shared is not None:
        shared = naive_mlp(mlp.shared, x)
        y = y + (shared if mlp.shared_gate is None else torch.sigmoid(x @ mlp.shared_gate.weight.T) * shared)
    return y


def tensor_gates(row, experts, config):
    """The gates of one token's experts as tensors, for their gradient."""
    if config.scores == "logits":
        return torch.softmax(row[experts], 0) * config.scale
    scores = torch.softmax(row, 0) if config.scores == "softmax" else torch.sigmoid(row)
    gates = scores[experts]
    return gates / (gates.sum() if config.normalise else 1) * config.scale
