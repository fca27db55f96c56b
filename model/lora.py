"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a small update beside each matrix.

    y = W x + s B A x      W [n_out, n_in] frozen; A [r, n_in], B [n_out, r] trained; s = alpha / r

    add_adapters(model, LoRAConfig(rank=16), seed=0)     from here on, only A and B are trained
    cast_frozen(model)                                   the rest needs no fp32 master
    plain = merged_copy(model)                           what an engine decodes from:  W + s B A
    refresh_merged(plain, model)                         after each update of the adapters
    merge_adapters(model)                                an ordinary model again

B begins at 0, so an adapted model begins as its base. q, k and v share one matrix, and gate and up
too; each of them has its own A and B all the same, as in PEFT.

A frozen weight has no gradient and no moments. `cast_frozen` keeps it in the dtype that the model
computes in, which changes no bit of what is computed.

Adapted are the Linear modules of the blocks. Left out: the embedding, the head, routers, and the
stacked experts of a mixture; dropout; a rank that varies from layer to layer.

Shapes: T tokens, P matrices that share a weight, r rank.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .linear import Linear
from .moe import Router
from .transformer import Transformer

LAYERS = ("all", "attention", "mlp")
# How much larger the best learning rate of LoRA is than that of full fine-tuning, whatever the rank
# (Schulman et al. 2025, "LoRA Without Regret", Thinking Machines Lab).
LEARNING_RATE_FACTOR = 10


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters: train a small update of each matrix, and leave the weights as they are."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead. With adapters the command line's default
    learning rate is 10 times as large."""
    alpha: float = 32.0
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    layers: str = "all"
    """Which matrices of each block have an adapter: all, attention or mlp."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""

    def __post_init__(self):
        """Raises ValueError for values out of range."""
        if self.rank < 0:
            raise ValueError(f"--lora.rank is {self.rank}, expected 1 or more, or 0 for no LoRA")
        others = (self.alpha, self.layers, self.rslora)
        if self.rank == 0 and others != (LoRAConfig.alpha, LoRAConfig.layers, LoRAConfig.rslora):
            raise ValueError(
                "--lora.alpha, --lora.layers and --lora.rslora need --lora.rank, 1 or more"
            )
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"--lora.alpha is {self.alpha}, expected a number above 0")
        if self.layers not in LAYERS:
            raise ValueError(f"--lora.layers is {self.layers!r}, expected {', '.join(LAYERS)}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoRALinear(Linear):
    """A Linear whose weight is frozen, and an adapter for each of the matrices that share it."""

    def __init__(self, base: Linear, config: LoRAConfig):
        """base: its weight and bias are taken as they are, not copied."""
        nn.Module.__init__(self)
        self.weight, self.bias, self.parts = base.weight, base.bias, base.parts
        self.scale = config.scale
        n_out, n_in = base.weight.shape
        # the optimizer's masters, in fp32 or wider
        like = base.weight.new_empty(0, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(like.new_empty(len(self.parts), config.rank, n_in))
        self.lora_B = nn.Parameter(like.new_zeros(n_out, config.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_in] -> [..., n_out]."""
        # 1. Through the frozen weight.
        y = super().forward(x)

        # 2. Through each adapter: down to r numbers, and up to the rows of its own matrix.
        A_of_part = self.lora_A.to(x.dtype)
        B_of_part = self.lora_B.to(x.dtype).split(self.parts)
        updates = [F.linear(F.linear(x, A), B) for A, B in zip(A_of_part, B_of_part, strict=True)]
        return y + self.scale * torch.cat(updates, dim=-1)

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """[n_out, n_in] fp32 or wider: W + s B A, the one matrix that does the same."""
        B_of_part = self.lora_B.split(self.parts)
        updates = [B @ A for A, B in zip(self.lora_A, B_of_part, strict=True)]
        return self.weight.to(self.lora_B.dtype) + self.scale * torch.cat(updates)

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass beside those of a Linear."""
        return self.lora_A.shape[0] * self.lora_A.shape[1]

    def flops_per_token(self) -> int:
        """Forward only; the products alone count."""
        return 2 * (self.weight.numel() + self.lora_A.numel() + self.lora_B.numel())


# ---- adapters in a model ----


def adapters_of(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted matrices of a module by name, such as "blocks.0.attn.qkv"; empty if it has
    none."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def adaptable(model: Transformer, layers: str) -> Iterator[tuple[nn.Module, str, Linear]]:
    """(module that holds it, its name there, the matrix), for all that get an adapter."""
    for block in model.blocks:
        halves = {"attention": [block.attn], "mlp": [block.mlp], "all": [block.attn, block.mlp]}
        for half in halves[layers]:
            for parent in half.modules():
                for name, child in parent.named_children():
                    if type(child) is Linear and not isinstance(parent, Router):
                        yield parent, name, child


def add_adapters(model: Transformer, config: LoRAConfig, seed: int) -> Transformer:
    """Freeze the model, and put an adapter beside each matrix; returns the model.

    A ~ U(-1/sqrt(n_in), 1/sqrt(n_in)) by the seed alone, B = 0. Raises ValueError for a model that
    has adapters already, or no matrix for them, and for a rank above its width.
    """
    if adapters_of(model):
        raise ValueError("the model has adapters already; merge them first (`r1zero export`)")
    if config.rank > model.config.d_model:
        raise ValueError(
            f"--lora.rank is {config.rank}, and the model is {model.config.d_model} wide; expected "
            "at most that: a larger rank adds nothing"
        )
    places = list(adaptable(model, config.layers))
    if not places:
        raise ValueError(
            f"--lora.layers {config.layers}: no matrix of this model can have an adapter (those of "
            "experts cannot); give --lora.layers attention"
        )
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for parent, name, linear in places:
        adapted = LoRALinear(linear, config)
        if not linear.weight.is_meta:  # a plan's model has no numbers
            bound = linear.weight.shape[1] ** -0.5
            noise = torch.empty(adapted.lora_A.shape).uniform_(-bound, bound, generator=rng)
            adapted.lora_A.data.copy_(noise)
        setattr(parent, name, adapted)
    return model


@torch.no_grad()
def cast_frozen(model: Transformer) -> None:
    """Keep each frozen matrix in the dtype that the model computes in, instead of fp32."""
    kept = {id(p) for p in model.read_in_fp32()}
    for parameter in model.parameters():
        is_frozen = not parameter.requires_grad and id(parameter) not in kept
        if is_frozen and parameter.ndim >= 2:
            parameter.data = parameter.data.to(model.compute_dtype)


def adapter_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained of an adapted module, by name: its adapters, and what else has a gradient."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


# ---- one matrix again ----


def merge_adapters(model: Transformer) -> Transformer:
    """Add the adapters to the weights, in place: an ordinary model, trainable, without them."""
    for name, adapted in adapters_of(model).items():
        replace_by_linear(model, name, adapted, adapted.merged_weight())
    return model.requires_grad_(True)


def replace_by_linear(
    model: Transformer, name: str, adapted: LoRALinear, weight: torch.Tensor
) -> None:
    """Put an ordinary Linear of this weight where an adapted one is."""
    linear = Linear(1, 1)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias, linear.parts = adapted.bias, adapted.parts
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, linear)


def merged_copy(model: Transformer) -> Transformer:
    """A model without adapters that computes the same. Weights that have none are shared with
    `model`; the others are its own, in the same dtype."""
    shared = {id(p): p for p in model.parameters()}
    plain = copy.deepcopy(model, shared)
    for name, adapted in adapters_of(plain).items():
        replace_by_linear(plain, name, adapted, torch.empty_like(adapted.weight))
    refresh_merged(plain, model)
    return plain


@torch.no_grad()
def refresh_merged(plain: Transformer, model: Transformer) -> None:
    """Write W + s B A of the model's adapters into its merged copy, in place."""
    for name, adapted in adapters_of(model).items():
        plain.get_submodule(name).weight.copy_(adapted.merged_weight())


def merged_bytes(model: Transformer) -> int:
    """Bytes of the weights that a merged copy has of its own."""
    return sum(adapted.weight.nbytes for adapted in adapters_of(model).values())


def own_adapters(model: Transformer) -> Transformer:
    """A model with adapters of its own over the same frozen weights."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


# ---- the base of an adapted model, without a second model ----


class AdapterCopy(nn.Module):
    """The adapters of a model as they were at some time: with B = 0 the model is its base."""

    def __init__(self, model: Transformer):
        super().__init__()
        for name, tensor in adapter_tensors(model).items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for word in path:  # so that the names are the model's own
                if not hasattr(holder, word):
                    holder.add_module(word, nn.Module())
                holder = getattr(holder, word)
            holder.register_buffer(last, tensor.clone())

    @torch.no_grad()
    def copy_from(self, model: Transformer) -> None:
        """Take the adapters as they are now."""
        for name, tensor in adapter_tensors(model).items():
            self.get_buffer(name).copy_(tensor)

    def swap(self, model: Transformer) -> None:
        """Exchange these adapters for the model's. Twice, and all is as it was. Nothing is copied,
        so that nothing can fail half way."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                kept = self.get_buffer(name)
                parameter.data, kept.data = kept.data, parameter.data
