"""A decoder of the Llama, Qwen, OLMo and DeepSeek families: RoPE, grouped-query or latent
attention, SwiGLU.

`Transformer.forward` is the whole model and `Block` one layer; attention.py or latent_attention.py,
and mlp.py, hold the two halves of a layer. It works on flat tokens (packed.py): no batch dimension,
no mask.

`forward` returns hidden states, not logits. `logprobs` turns them into log-probs and entropies
without ever holding [T, V]; `logits` serves the few rows that are sampled from.

The weights are the optimizer's masters, in fp32. Each layer casts its own to the dtype of the
hidden states where it uses them, so mixed precision is just `compute_dtype=torch.bfloat16`. With
`fp32_head` the hidden states become fp32 before the last norm, and the head with them.

Left out: dropout, learned positions.

Shapes: T tokens, B rows to sample from, R rows to score, M d_model, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels.linear_logprob import SLICE, linear_logprob
from ..kernels.rmsnorm import rmsnorm
from ..kernels.rope import rope_table
from .attention import KV, Attention, PackedKV
from .config import ModelConfig
from .latent_attention import LatentAttention
from .linear import Linear, plain
from .mlp import make_mlp
from .moe import MoE, Router
from .packed import Packed
from .precision import Precision
from .routes import Routing

# Endings of the names of matrices whose product is added to the residual stream.
WRITE_TO_STREAM = ("attn.out.weight", "mlp.down.weight", "mlp.down", "mlp.shared.down.weight")


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(x + residual), x + residual), fused; before the first block there is no residual."""
    if residual is None:
        return rmsnorm(x, weight, eps), x
    return rmsnorm(x, weight, eps, residual)


def make_attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention of one layer: a module with forward(x_TM, cos, sin, kv) -> [T, M], cache_shape,
    flops_per_token(seqlen) and kept_per_token."""
    if config.latent is not None:
        return LatentAttention(config, layer)
    return Attention(config, layer)


class Block(nn.Module):
    """One layer: x += attention(norm(x)), then x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn_norm = nn.Parameter(torch.empty(config.d_model))
        self.attn = make_attention(config, layer)
        self.mlp_norm = nn.Parameter(torch.empty(config.d_model))
        self.mlp = make_mlp(config, layer)

    def forward(
        self,
        x_TM: torch.Tensor,
        residual_TM: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: KV,
        routing: Routing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream between blocks is x + residual; the next norm adds the two as it reads."""
        x_TM, residual_TM = add_norm(x_TM, residual_TM, self.attn_norm, self.norm_eps)
        x_TM = self.attn(x_TM, cos, sin, kv)
        x_TM, residual_TM = add_norm(x_TM, residual_TM, self.mlp_norm, self.norm_eps)
        x_TM = self.mlp(x_TM, routing)
        return x_TM, residual_TM

    @property
    def kept_per_token(self) -> int:
        """How many numbers per token are kept for the backward pass, in the compute dtype."""
        # the stream before each of the two norms, and what the two halves keep
        return 2 * len(self.mlp_norm) + self.attn.kept_per_token + self.mlp.kept_per_token


class PostNormBlock(Block):
    """One layer of OLMo-2 (arXiv 2501.00656): x += norm(attention(x)), then x += norm(mlp(x))."""

    def forward(self, x_TM, residual_TM, cos, sin, kv, routing=None):
        """As in Block: the stream is x + residual. The sum is needed here, before any norm."""
        if residual_TM is not None:
            x_TM = x_TM + residual_TM
        attended_TM = rmsnorm(self.attn(x_TM, cos, sin, kv), self.attn_norm, self.norm_eps)
        x_TM = x_TM + attended_TM
        return rmsnorm(self.mlp(x_TM, routing), self.mlp_norm, self.norm_eps), x_TM


class Transformer(nn.Module):
    """The whole model. A fresh one holds garbage: call `init_weights(seed)`, or load weights."""

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        fp32_head: bool = False,
    ):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.fp32_head = fp32_head
        self.recomputes = False
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        # before the blocks: `init_weights` samples in the order of the parameters
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        kind = PostNormBlock if config.post_norm else Block
        self.blocks = nn.ModuleList(kind(config, layer) for layer in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.d_model))

    def init_weights(self, seed: int) -> "Transformer":
        """Matrices ~ N(0, 1 / fan_in), norms 1, biases 0, by the seed alone. Returns the model.

        Experts are matrices that are stacked.

        Matrices that write to the residual stream are divided by sqrt(2 n_layers), so that the sum
        of all blocks' outputs has the size of one (GPT-2).
        """
        rng = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(WRITE_TO_STREAM):
                    std /= (2 * self.config.n_layers) ** 0.5
                noise = torch.randn(parameter.shape, generator=rng)
                with torch.no_grad():
                    parameter.copy_(noise * std)
        return self

    # ---- tokens to hidden states ----

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        kv: KV,
        routing: Routing | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, M] after the final norm, in the compute dtype, or in fp32 for an fp32
        head.

        tokens, positions: [T] int64. kv: where keys and values are, as in attention.py. routing: of
        a mixture of experts, where its routes are kept or come from; None: the routers choose.
        """
        # 1. The angles of each token's position; all layers share them.
        config = self.config
        scaling = config.rope_scaling
        cos, sin = rope_table(positions, config.rope_dim, config.rope_theta, config.rope_rescale)
        if scaling is not None and scaling.table_factor != 1:
            cos, sin = cos * scaling.table_factor, sin * scaling.table_factor

        # 2. Token ids to vectors [T, M].
        x_TM = F.embedding(tokens, self.embed).to(self.compute_dtype)

        # 3. Layer by layer, with attention between the tokens of a sequence.
        residual_TM = None
        for block in self.blocks:
            x_TM, residual_TM = self.run_block(block, x_TM, residual_TM, cos, sin, kv, routing)

        # 4. The last sum, normed for the head, which computes in the dtype of what it is given.
        if self.fp32_head:
            at_least_fp32 = torch.promote_types(self.compute_dtype, torch.float32)
            x_TM, residual_TM = x_TM.to(at_least_fp32), residual_TM.to(at_least_fp32)
        hidden_TM, _ = add_norm(x_TM, residual_TM, self.norm, self.config.norm_eps)
        return hidden_TM

    def run_block(self, block: Block, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer. With `recomputes`, only its inputs are kept for the backward pass, which
        computes the rest again (Chen et al. 2016, arXiv 1604.06174): the same numbers."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def hidden_states(self, packed: Packed, routing: Routing | None = None) -> torch.Tensor:
        """`forward` for a packed batch: [T, M]."""
        return self(packed.tokens, packed.positions, PackedKV(packed), routing=routing)

    # ---- hidden states to log-probs and logits ----

    @property
    def has_plain_head(self) -> bool:
        """Whether the logits are a product with one weight, and no more."""
        return self.config.tie_embeddings or plain(self.lm_head)

    @property
    def head(self) -> torch.Tensor:
        """[V, M], the weight that turns hidden states into logits, without rows of padding.

        Raises ValueError if the head is not a plain Linear, so that its weight is not all of it.
        """
        if not self.has_plain_head:
            raise ValueError(
                f"the head is a {type(self.lm_head).__name__}, but log-probs read its weight "
                "directly; expected a Linear: leave lm_head out of what is adapted or quantised"
            )
        weight = self.embed if self.config.tie_embeddings else self.lm_head.weight
        in_use = self.config.vocab_in_use
        return weight if in_use is None else weight[:in_use]

    def logprobs(
        self,
        hidden_TM: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp [R], entropy [R]) under softmax(logits / temperature), in fp32 or wider.

        targets: [R] int64, the token that follows each hidden state. rows: [R] int64, which hidden
        states; None: all. temperature: the one that the targets were sampled at.
        """
        return linear_logprob(hidden_TM, self.head, targets, temperature, rows)

    def logits(self, hidden_BM: torch.Tensor) -> torch.Tensor:
        """[B, V] fp32, for sampling from a few rows; training uses `logprobs`."""
        if not self.has_plain_head:
            return self.lm_head(hidden_BM).float()[:, : self.config.vocab_in_use]
        weight = self.head.to(hidden_BM.dtype)
        if hidden_BM.is_cpu:
            # with V first in memory the product for few rows takes half the time
            return (weight @ hidden_BM.t()).t().float()
        return F.linear(hidden_BM, weight).float()

    # ---- what it takes ----

    @property
    def precision(self) -> Precision:
        """What it computes in, for another model that is to compute alike."""
        return Precision(self.compute_dtype, self.fp32_head)

    def read_in_fp32(self) -> list[nn.Parameter]:
        """What an fp32 head and fp32 routers compute with, so that a copy in 16 bit keeps it."""
        parameters = []
        if self.fp32_head:
            head = [self.embed] if self.config.tie_embeddings else self.lm_head.parameters()
            parameters = [self.norm, *head]
        for module in self.modules():
            if isinstance(module, Router) and module.config.fp32_router:
                parameters += module.parameters()
        return parameters

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.device

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values per token of a cache in the compute dtype, over all layers."""
        numbers = 0
        for block in self.blocks:
            n_kv_heads, key_width, value_width = block.attn.cache_shape
            numbers += n_kv_heads * (key_width + value_width)
        return numbers * self.compute_dtype.itemsize

    def saved_bytes(self, n_tokens: int) -> int:
        """Bytes that a forward pass of so many tokens keeps for the backward pass: an estimate.

        It is what the kernels of a GPU keep. Log-sum-exps, angles and offsets are left out.
        """
        head = 2 * self.config.d_model  # the stream, and its norm
        if self.recomputes:
            # what the stream is the sum of, before each block
            layers = 2 * self.config.d_model * len(self.blocks)
            return n_tokens * (layers + head) * self.compute_dtype.itemsize
        layers = sum(block.kept_per_token for block in self.blocks)
        layers += sum(m.kept_per_token for m in self.blocks.modules() if isinstance(m, Linear))
        layers -= sum(m.spared_per_token for m in self.blocks.modules() if isinstance(m, MoE))
        numbers = n_tokens * (layers + head) + sum(map(self.cast_numbers, self.blocks))
        return numbers * self.compute_dtype.itemsize

    def cast_numbers(self, block: Block) -> int:
        """How many numbers a block keeps beside those of the tokens: a product keeps the copy of
        its weight that it has cast."""
        return sum(p.numel() for p in block.parameters() if p.dtype != self.compute_dtype)

    def workspaces(self, n_tokens: int) -> tuple[int, int]:
        """Bytes that the backward pass works with, beside what is kept: (in a layer, in the
        head)."""
        itemsize, d_model = self.compute_dtype.itemsize, self.config.d_model
        # All that is kept is there when the backward pass begins: with the head, which has the
        # gradients of a slice of logits and of the hidden states, and a slice of its weight; then
        # the last layer, with a gradient for each number that it keeps, or has computed again.
        head = n_tokens * (SLICE * itemsize + d_model * (4 + itemsize)) + SLICE * d_model * itemsize
        largest = max(self.blocks, key=lambda block: block.kept_per_token)
        layer = n_tokens * largest.kept_per_token * itemsize
        if self.recomputes:
            layer = 2 * layer + self.cast_numbers(largest) * itemsize
        return layer, head

    def flops_per_token(self, seqlen: float) -> float:
        """FLOPs of one token's forward pass, in sequences of mean length `seqlen`."""
        layers = sum(
            block.attn.flops_per_token(seqlen) + block.mlp.flops_per_token()
            for block in self.blocks
        )
        head = 2 * self.config.head_rows * self.config.d_model
        return layers + head


def _without_memory(config: ModelConfig) -> Transformer:
    """The model on the meta device: all shapes, no numbers."""
    with torch.device("meta"):
        return Transformer(config)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once. Allocates nothing, whatever the size."""
    return sum(parameter.numel() for parameter in _without_memory(config).parameters())


def count_active_parameters(config: ModelConfig) -> int:
    """Number of parameters that one token uses: of a mixture's experts the chosen ones alone."""
    idle = sum(block.mlp.n_idle for block in _without_memory(config).blocks)
    return count_parameters(config) - idle


def flops_per_token(config: ModelConfig, seqlen: float, training: bool) -> float:
    """FLOPs of the matrix products for one token, in sequences of mean length `seqlen`.

    A multiply-add is 2 FLOPs; causal attention counts half its square. Training is three times the
    forward pass (Kaplan et al. 2020, arXiv 2001.08361). The embedding look-up is free, experts that
    the token does not go through are too, and what a kernel computes again in its backward pass
    does not count.
    """
    forward = _without_memory(config).flops_per_token(seqlen)
    return 3 * forward if training else forward
