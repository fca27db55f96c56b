"""What keeps the experts of a mixture about equally busy in training, and how busy they are.

    balance = Balance(model, config)
    with balance.watch():
        hidden = model.hidden_states(packed)      for each micro-batch
    loss = loss + balance.loss(share_of_tokens)
    optimizer_step(...)
    balance.update()                              once per optimizer step

Three means, each for a layer alone. f is the share of all T K choices that fell on an expert, and P
the mean over tokens of the router's probabilities of all E experts, chosen or not:

    auxiliary loss   E sum_e f_e P_e, which is 1 if all are equal  (Switch, arXiv 2101.03961, eq. 4)
    z-loss           mean of logsumexp(logits)^2, against growing logits    (arXiv 2202.08906)
    balance bias     b_e += rate sign(mean count - count_e), no gradient    (arXiv 2408.15664)

f is that of a micro-batch, so the auxiliary loss is the one thing that --micro-tokens changes. The
bias is moved by the counts of the whole step and of all processes; a forward pass that is only done
again for the backward pass is not watched, so it is not counted. In RL none of this is used: the
bias stays as it is, for moving it would change the policy between sampling and update.

Left out: a loss per sequence or over the whole global batch, balance of groups or devices.

Shapes: L layers with experts, T tokens, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..kernels.moe import expert_counts
from .distributed import all_sum
from .moe import Router, Routes
from .moe_config import MoEConfig


@dataclass(frozen=True)
class BalanceConfig:
    """How hard the experts of a mixture are kept equally busy. A dense model has none."""

    aux_coef: float = 0.01
    """Weight of the auxiliary loss on unequal use of experts, beside the mean loss per token."""
    z_coef: float = 0.001
    """Weight of the loss on large logits of a router."""
    bias_rate: float = 0.001
    """Step of the bias by which experts with too few tokens are chosen more often, in models that
    have one."""

    def __post_init__(self):
        """Raises ValueError for values out of range."""
        for name in ("aux_coef", "z_coef", "bias_rate"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--balance.{flag} is {value}, expected 0 or more")


# ---- one layer, as formulas ----


def probabilities(logits_TE: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """[T, E] that sum to 1 for each token: the softmax, or the sigmoids divided by their sum."""
    if config.scores == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        return scores_TE / scores_TE.sum(-1, keepdim=True)
    return logits_TE.softmax(-1)


def aux_loss(probabilities_TE: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e. counts_E: how many choices fell on each expert."""
    f_E = counts_E.to(probabilities_TE.dtype) / counts_E.sum()
    return len(f_E) * (f_E * probabilities_TE.mean(0)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean of the squared logsumexp."""
    return logits_TE.logsumexp(-1).square().mean()


def entropy(probabilities_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the entropy, in nats."""
    return torch.special.entr(probabilities_TE).sum(-1).mean()


def load_metrics(loads_LE: torch.Tensor) -> dict:
    """For the log: the largest load, as a multiple of its layer's mean, and the share of experts
    without any token. loads_LE: such multiples."""
    return {
        "expert_load_max": float(loads_LE.max()),
        "experts_dead": float((loads_LE == 0).double().mean()),
    }


# ---- all layers of a model ----


class Balance:
    """Watches the routers of a model during the optimizer steps of a training."""

    def __init__(self, model: torch.nn.Module, config: BalanceConfig | None = None):
        """config: None stands for the default one."""
        self.config = config or BalanceConfig()
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self._routes: dict[int, Routes] = {}
        self.begin()

    def begin(self) -> None:
        """Begin to count for a new optimizer step."""
        self._sums: list[torch.Tensor] = []
        self.counts_LE = torch.zeros(0, 0)
        if self.routers:
            shape = (len(self.routers), self.routers[0].config.n_experts)
            device = self.routers[0].linear.weight.device
            self.counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)

    @contextmanager
    def watch(self):
        """Note where tokens go while the block runs: the forward pass of one micro-batch."""
        self._routes.clear()
        handles = [
            router.register_forward_hook(self._note(layer))
            for layer, router in enumerate(self.routers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, layer: int) -> Callable:
        """A hook for the router of a layer. A layer that runs twice is noted once."""

        def hook(router: Router, inputs: tuple, routes: Routes) -> None:
            self._routes[layer] = routes

        return hook

    def loss(self, share: float) -> torch.Tensor | float:
        """What to add to the loss for the micro-batch that was watched; it is counted, too.

        share: of all tokens of the optimizer step, that those of the micro-batch are.
        """
        if not self._routes:
            return 0.0
        measured = [self._measure(layer, routes) for layer, routes in self._routes.items()]
        self._routes.clear()
        # The mean over layers, after each layer's own loss: two layers cannot cancel.
        aux, z, nats = torch.stack(measured).mean(0) * share
        self._sums.append(torch.stack([aux, z, nats]).detach())
        return self.config.aux_coef * aux + self.config.z_coef * z

    def _measure(self, layer: int, routes: Routes) -> torch.Tensor:
        """[3]: auxiliary loss, z-loss and entropy of a layer, whose choices are counted."""
        config = self.routers[layer].config
        counts_E = expert_counts(routes.experts, config.n_experts)
        self.counts_LE[layer] += counts_E
        probabilities_TE = probabilities(routes.logits, config)
        with torch.no_grad():
            nats = entropy(probabilities_TE)
        return torch.stack([aux_loss(probabilities_TE, counts_E), z_loss(routes.logits), nats])

    @torch.no_grad()
    def update(self) -> None:
        """Move each router's balance bias once, by the counts of this step over all processes.

        Every process must call it, also one that had no tokens.
        """
        biases = [router.balance_bias for router in self.routers]
        if not biases or biases[0] is None:
            return
        totals_LE = torch.from_numpy(all_sum(self.counts_LE.cpu().double().numpy()))
        too_few_LE = (totals_LE.mean(1, keepdim=True) - totals_LE).sign()
        for bias, too_few_E in zip(biases, too_few_LE.to(biases[0]), strict=True):
            bias += self.config.bias_rate * too_few_E

    def metrics(self) -> dict:
        """How busy the experts were in this step, for the log; empty for a dense model.

        expert_load [L, E] is each expert's tokens as a multiple of the mean of its layer; then the
        largest of them, and the share of experts without any token.
        """
        if not self._sums:
            return {}
        aux, z, nats = torch.stack(self._sums).sum(0).tolist()
        counts_LE = self.counts_LE.double()
        loads_LE = counts_LE / counts_LE.mean(1, keepdim=True)
        return {
            "expert_load": [[round(load, 4) for load in layer] for layer in loads_LE.tolist()],
            **load_metrics(loads_LE),
            "router_entropy": nats,
            "aux_loss": aux,
            "z_loss": z,
        }
