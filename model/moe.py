"""A mixture of experts in place of the MLP of a layer.

    logits = W x                                               the router, one number per expert
    experts, gates = the K best, and how much each counts      (see the table in moe_config.py)
    y = sum over k of gates[k] * MLP_{experts[k]}(x)  +  MLP_shared(x)

Each token goes through K of E small MLPs, so a layer holds E / K times the weights that a token
uses. The choice has no gradient; the router learns through the gates. The op that sorts, multiplies
and adds up is kernels/moe.py; what keeps the experts equally busy is balance.py.

Experts are two stacked parameters, not modules: one tensor for one grouped product. Dropless: an
expert takes every token that chose it. Ties go to the expert of lower index. What was chosen
once can be replayed (routes.py).

Left out: experts on several devices, a capacity per expert, noise in the choice.

Shapes: T tokens, M d_model, E experts, K experts per token, F d_expert, G groups.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..kernels.moe import moe_mlp, top_experts, waits_for_host
from .config import ModelConfig
from .linear import Linear
from .moe_config import MoEConfig
from .routes import Routing

SMALLEST_SUM = 1e-20  # what a sum of gates is increased by, in case that all of them are 0


class Routes(NamedTuple):
    """Where the tokens of a layer go."""

    experts: torch.Tensor
    """[T, K] int64, the best first."""
    gates: torch.Tensor
    """[T, K], fp32 or wider."""
    logits: torch.Tensor
    """[T, E], fp32 or wider."""


# ---- the choice, as plain functions of the logits ----


def scores_of(logits_TE: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """[T, E]: what experts are chosen by, and what most gates are taken from."""
    if config.scores == "softmax":
        return logits_TE.softmax(-1)
    if config.scores == "sigmoid":
        return logits_TE.sigmoid()
    return logits_TE


def in_best_groups(scores_TE: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """The scores, with -inf for all experts outside the token's best groups (DeepSeek-V2)."""
    # 1. A score per group [T, G].
    n_best = 2 if config.group_score == "top2" else 1
    grouped_TGS = scores_TE.unflatten(-1, (config.n_groups, -1))
    group_scores_TG = grouped_TGS.topk(n_best, dim=-1).values.sum(-1)

    # 2. The others drop out. Not by a 0, which would beat a score below 0.
    chosen = top_experts(group_scores_TG, config.groups_per_token)
    is_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, chosen, False)
    return grouped_TGS.masked_fill(is_out_TG[..., None], float("-inf")).flatten(1)


@torch.no_grad()
def choose_experts(
    scores_TE: torch.Tensor, balance_bias: torch.Tensor | None, config: MoEConfig
) -> torch.Tensor:
    """[T, K] int64, the experts of each token."""
    if balance_bias is not None:
        scores_TE = scores_TE + balance_bias
    if config.n_groups > 1:
        scores_TE = in_best_groups(scores_TE, config)
    return top_experts(scores_TE, config.experts_per_token)


def gates_of(scores_TE: torch.Tensor, experts_TK: torch.Tensor, config: MoEConfig) -> torch.Tensor:
    """[T, K]: how much each chosen expert counts, from the scores without the balance's bias."""
    gates = scores_TE.gather(1, experts_TK)
    if config.scores == "logits":
        return gates.softmax(-1) * config.scale
    if config.normalise:
        gates = gates / (gates.sum(-1, keepdim=True) + SMALLEST_SUM)
    return gates * config.scale


# ---- the modules ----


class Router(nn.Module):
    """Chooses the experts of each token."""

    def __init__(self, d_model: int, config: MoEConfig, layer: int = 0):
        """layer: its number among the layers with experts."""
        super().__init__()
        self.config, self.layer = config, layer
        self.linear = Linear(d_model, config.n_experts, bias=config.router_bias)
        # Never 16 bit, even in a model that is made so.
        at_least_fp32 = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if config.fp32_router:
            self.linear.to(at_least_fp32)
        bias = torch.zeros(config.n_experts, dtype=at_least_fp32) if config.balance_bias else None
        self.register_buffer("balance_bias", bias)

    def forward(self, x_TM: torch.Tensor, routing: Routing | None = None) -> Routes:
        """[T, M] -> where T tokens go. routing: keeps the choice, or replays another."""
        # 1. A logit per token and expert, in the dtype of x or in fp32; all the rest in fp32.
        at_least_fp32 = torch.promote_types(x_TM.dtype, torch.float32)
        if self.config.fp32_router:
            x_TM = x_TM.to(at_least_fp32)
        logits_TE = self.linear(x_TM).to(at_least_fp32)

        # 2. The best experts, by their scores and, with a balance bias, by who has had too little.
        scores_TE = scores_of(logits_TE, self.config)
        experts_TK = choose_experts(scores_TE, self.balance_bias, self.config)
        if routing is not None:
            experts_TK = routing.take(self.layer, experts_TK)

        # 3. Their gates, from the scores of all: that is where the gradient goes, in a replay, too.
        return Routes(experts_TK, gates_of(scores_TE, experts_TK, self.config), logits_TE)

    def _apply(self, fn, recurse=True):
        """As in any module, but an fp32 router never becomes 16 bit, and no balance bias does: at a
        bias of 5, bf16 has steps of 0.03, and an update is 0.001."""

        def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        super()._apply(at_least_fp32, recurse=False)
        if recurse:
            self.linear._apply(at_least_fp32 if self.config.fp32_router else fn)
        return self


class MoE(nn.Module):
    """Experts, their router, and what every token goes through."""

    def __init__(self, config: ModelConfig, shared: nn.Module | None, layer: int = 0):
        """shared: the MLP of the shared experts, if there are any. layer: as in Router."""
        super().__init__()
        moe, d_model = config.moe, config.d_model
        self.router = Router(d_model, moe, layer)
        self.gate_up = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.d_expert, d_model))
        self.down = nn.Parameter(torch.empty(moe.n_experts, d_model, moe.d_expert))
        self.shared = shared
        self.shared_gate = Linear(d_model, 1) if moe.shared_gate else None

    def forward(self, x_TM: torch.Tensor, routing: Routing | None = None) -> torch.Tensor:
        """[T, M] -> [T, M]. routing: as in Router."""
        # 1. Where does each token go?
        routes = self.router(x_TM, routing)

        # 2. Through its experts, weighted by their gates.
        y_TM = moe_mlp(x_TM, routes.gates, routes.experts, self.gate_up, self.down)

        # 3. And through the shared ones.
        if self.shared is None:
            return y_TM
        shared_TM = self.shared(x_TM)
        if self.shared_gate is not None:
            shared_TM = self.shared_gate(x_TM).sigmoid() * shared_TM
        return y_TM + shared_TM

    @property
    def n_idle(self) -> int:
        """How many parameters one token does not use."""
        n_experts, n_chosen = self.router.config.n_experts, self.router.config.experts_per_token
        return (self.gate_up[0].numel() + self.down[0].numel()) * (n_experts - n_chosen)

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass, in the compute dtype, in plain
        PyTorch. In Triton it is less: the input and where its rows lie."""
        config, d_model = self.router.config, self.down.shape[1]
        # per expert: its input, gate and up side by side, their product, and its output
        per_expert = 2 * d_model + 3 * config.d_expert
        kept = d_model + config.n_experts + config.experts_per_token * per_expert
        return kept + (self.shared.kept_per_token if self.shared is not None else 0)

    @property
    def spared_per_token(self) -> int:
        """How many of them are not kept if the experts are frozen: what only the gradients of their
        weights need, the input of each expert and its product of gate and up."""
        if self.down.requires_grad:
            return 0
        config = self.router.config
        return config.experts_per_token * (self.down.shape[1] + config.d_expert)

    def flops_per_token(self) -> int:
        """Forward only; the products alone count: those of the router, of K experts, of the shared
        ones."""
        n_chosen = self.router.config.experts_per_token
        numbers = (self.gate_up[0].numel() + self.down[0].numel()) * n_chosen
        flops = 2 * numbers + self.router.linear.flops_per_token()
        for module in (self.shared, self.shared_gate):
            flops += module.flops_per_token() if module is not None else 0
        return flops

    def can_capture(self, dtype: torch.dtype) -> bool:
        """Whether a CUDA graph can hold a step in `dtype`: no part waits for the host."""
        _, d_model, d_expert = self.down.shape
        return not waits_for_host(dtype, self.down.device, d_model, d_expert)
