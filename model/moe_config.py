"""The shape of a mixture of experts, how its router chooses, and how eight families do it.

    MoEConfig(n_experts=128, experts_per_token=8, d_expert=768, **ROUTING["qwen3-moe"])

    family        scores            chosen by                     gates         times   beside
    mixtral       softmax           score                         / their sum   1
    qwen2-moe     softmax           score                         as they are   1       shared, gate
    qwen3-moe     softmax           score                         / their sum   1
    olmoe         softmax           score                         as they are   1
    deepseek-v2   softmax           score, 3 of 8 groups by max   as they are   16      shared
    deepseek-v3   sigmoid           score + bias, 4 of 8 groups   / their sum   2.5     shared
                                    by the sum of their top 2
    glm-4.5       sigmoid           score + bias                  / their sum   1       shared
    gpt-oss       logits + a bias   logit                         softmax of    1
                  that is learned                                 the chosen

"As they are" and "/ their sum" differ in size, not in order. A softmax whose chosen gates are
divided by their sum is the softmax of the chosen logits, so mixtral and gpt-oss differ by the
learned bias alone. The bias of DeepSeek-V3 chooses, and is no part of the gate.

Left out: gpt-oss's clamped activation and the biases of its experts; gates in 16 bit (Qwen rounds
them to the dtype of the hidden states, here they stay in fp32).

Sources: modeling_*.py of transformers 5.24; DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv
2412.19437), OLMoE (arXiv 2409.02060).
"""

from dataclasses import dataclass, fields
from numbers import Integral

SCORES = ("softmax", "sigmoid", "logits")
GROUP_SCORES = ("max", "top2")
MOST_EXPERTS = 2**15  # routes are kept in 16 bit (routes.py)


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of a dense MLP. Raises ValueError if the numbers do not fit."""

    n_experts: int
    experts_per_token: int
    d_expert: int
    """Width of each expert between its two products."""
    d_shared: int = 0
    """Width of an MLP that every token goes through, too; 0: none. Several shared experts are one
    wider MLP."""
    shared_gate: bool = False
    """Whether the shared MLP is multiplied by the sigmoid of a number per token (Qwen2-MoE)."""
    dense_layers: tuple[int, ...] = ()
    """Layers with a dense MLP of width d_ff all the same, from 0 (DeepSeek: the first ones)."""
    scores: str = "softmax"
    """softmax or sigmoid of the logits; "logits": the gates are the softmax of the chosen ones."""
    normalise: bool = True
    """Whether a token's gates are divided by their sum."""
    scale: float = 1.0
    """What the gates are multiplied by in the end."""
    n_groups: int = 1
    """Experts lie in groups of equal size, and a token chooses groups first."""
    groups_per_token: int = 1
    group_score: str = "max"
    """A group's score: its highest one, or the sum of its "top2"."""
    balance_bias: bool = False
    """A number per expert, moved by the balance alone, that is added to choose (DeepSeek-V3)."""
    router_bias: bool = False
    """A learned number per expert that is part of the logits (gpt-oss)."""
    fp32_router: bool = False
    """Whether the logits are computed in fp32 from fp32 weights, whatever the model computes in."""

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))  # JSON has lists
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "d_shared" else 1
            if field.type is int and not (isinstance(value, Integral) and value >= least):
                raise ValueError(
                    f"moe: {field.name} is {value!r}, expected a whole number of {least} or more"
                )
        if self.n_experts > MOST_EXPERTS:
            raise ValueError(
                f"moe: n_experts is {self.n_experts}, expected at most {MOST_EXPERTS:,}"
            )
        self._check_dense_layers()
        if self.scores not in SCORES or self.group_score not in GROUP_SCORES:
            raise ValueError(
                f"moe: scores is {self.scores!r} and group_score {self.group_score!r}; expected "
                f"one of {SCORES} and one of {GROUP_SCORES}"
            )
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"moe: scale is {self.scale!r}, expected a number above 0")
        if self.experts_per_token > self.n_experts:
            raise ValueError(
                f"moe: {self.experts_per_token} experts per token of {self.n_experts}; expected at "
                "most all of them"
            )
        self._check_groups()
        if self.shared_gate and not self.d_shared:
            raise ValueError("moe: shared_gate needs a shared MLP; set d_shared, or leave it out")

    def _check_dense_layers(self) -> None:
        layers = self.dense_layers
        are_layers = all(isinstance(layer, Integral) and layer >= 0 for layer in layers)
        if not are_layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"moe: dense_layers is {layers}, expected different numbers of layers, from 0"
            )

    def _check_groups(self) -> None:
        if self.n_experts % self.n_groups:
            raise ValueError(
                f"moe: {self.n_experts} experts do not divide into {self.n_groups} groups of equal "
                "size"
            )
        size = self.n_experts // self.n_groups
        if self.groups_per_token > self.n_groups:
            raise ValueError(
                f"moe: {self.groups_per_token} groups per token of {self.n_groups}; expected at "
                "most all of them"
            )
        if self.experts_per_token > self.groups_per_token * size:
            raise ValueError(
                f"moe: {self.experts_per_token} experts per token, but {self.groups_per_token} "
                f"groups of {size} hold only {self.groups_per_token * size}"
            )
        if self.n_groups > 1 and self.group_score == "top2" and size < 2:
            raise ValueError(
                f"moe: {self.n_groups} groups of one expert have no top2; set group_score to max"
            )


# How each family routes. The numbers of groups and the scale are those of its largest model.
ROUTING: dict[str, dict] = {
    "mixtral": dict(scores="softmax", normalise=True),
    "qwen2-moe": dict(scores="softmax", normalise=False, shared_gate=True),
    "qwen3-moe": dict(scores="softmax", normalise=True),
    "olmoe": dict(scores="softmax", normalise=False),
    "deepseek-v2": dict(
        scores="softmax",
        normalise=False,
        scale=16.0,
        n_groups=8,
        groups_per_token=3,
        group_score="max",
        fp32_router=True,
    ),
    "deepseek-v3": dict(
        scores="sigmoid",
        normalise=True,
        scale=2.5,
        n_groups=8,
        groups_per_token=4,
        group_score="top2",
        balance_bias=True,
        fp32_router=True,
    ),
    "glm-4.5": dict(scores="sigmoid", normalise=True, balance_bias=True, fp32_router=True),
    "gpt-oss": dict(scores="logits", router_bias=True),
}
