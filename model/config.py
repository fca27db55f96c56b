"""The shape of a model: one dataclass, a table of presets, and `depth` that sets the whole shape.

    preset("qwen3-0.6b", vocab_size=151_936)      the shape of an open model
    preset("depth=6", vocab_size=1024)            6 layers, and widths to match

What open models of the Llama kind do differently is a field here. Left out: dropout, learned
positions, activations other than SwiGLU's.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real

from .moe_config import ROUTING, MoEConfig
from .rope_scaling import RopeScaling


@dataclass(frozen=True)
class LatentShape:
    """The widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Raises ValueError if one of them is no width.
    """

    kv_rank: int = 512
    """Width of the latent that keys and values are made from."""
    q_rank: int | None = None
    """Width of the latent that queries are made from; None: they are made from the stream."""
    rope_dim: int = 64
    """Width of the part of a query or key that RoPE rotates; all heads share that of the key."""
    value_dim: int = 128
    """Width of a value."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name == "q_rank" and value is None:
                continue
            if not (isinstance(value, Integral) and value > 0):
                raise ValueError(
                    f"model: latent.{name} is {value!r}, expected a whole number above 0"
                )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder with RoPE, grouped-query or latent attention, and SwiGLU.

    Raises ValueError if the numbers do not fit together.
    """

    vocab_size: int
    """Rows of the embedding; may be more than the tokenizer has tokens."""
    n_layers: int = 4
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Query heads; a multiple of n_kv_heads."""
    n_kv_heads: int = 2
    head_dim: int = 32
    """Width of a query or key; even, and free of d_model / n_heads."""
    d_ff: int = 384
    """Width of the MLP between its two products."""
    rope_theta: float = 10_000.0
    """Base of the RoPE frequencies."""
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """RMSNorm on each head of q and k, before RoPE (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the q, k and v projections (Qwen2)."""
    out_bias: bool = False
    """Bias on the projection behind attention."""
    mlp_bias: bool = False
    """Bias on the matrices of the MLP."""
    qk_norm_full_width: bool = False
    """RMSNorm on all heads of q together, and on all of k, before RoPE (OLMo-2)."""
    post_norm: bool = False
    """Norms behind attention and MLP, x + norm(f(x)), instead of before them (OLMo-2)."""
    latent: LatentShape | None = None
    """Keys and values of low rank (DeepSeek); a dict of its fields is taken too."""
    rope_scaling: RopeScaling | None = None
    """How RoPE was stretched to a longer context; a dict of its fields is taken too."""
    nope_layers: tuple[int, ...] = ()
    """Layers without RoPE, from 0 (SmolLM3)."""
    window: int | None = None
    """How many keys a query sees in the window layers, itself included; None: all."""
    window_layers: tuple[int, ...] = ()
    """Layers whose attention has the window, from 0 (Mistral: all of them)."""
    moe: MoEConfig | None = None
    """A mixture of experts in place of each MLP; None: the model is dense. A dict of its fields is
    taken too."""
    vocab_in_use: int | None = None
    """Rows of the head that stand for a token; None: all. Those behind are padding, which is left
    out of the logits, so that it is never sampled."""
    tie_embeddings: bool = True
    """Whether the head's weight is the embedding."""
    max_seq_len: int = 512
    """Longest sequence, prompt and answer together."""

    def __post_init__(self):
        self._read_json_values()
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and not (isinstance(value, Integral) and value > 0):
                raise ValueError(f"model: {name} is {value!r}, expected a whole number above 0")
            if field.type is float and not (isinstance(value, Real) and 0 < value < math.inf):
                raise ValueError(f"model: {name} is {value!r}, expected a number above 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model: head_dim {self.head_dim} is odd; RoPE rotates pairs, so it must be even"
            )
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.qk_norm and self.qk_norm_full_width:
            raise ValueError("model: qk_norm and qk_norm_full_width exclude each other; choose one")
        for name in ("nope_layers", "window_layers"):
            layers = getattr(self, name)
            if not all(isinstance(i, Integral) and 0 <= i < self.n_layers for i in layers):
                raise ValueError(
                    f"model: {name} is {layers}, expected numbers of layers, 0 to "
                    f"{self.n_layers - 1}"
                )
        if self.window_layers and not (isinstance(self.window, Integral) and self.window > 0):
            raise ValueError(
                f"model: window is {self.window!r}, expected a whole number above 0 for the layers "
                f"{self.window_layers}"
            )
        if self.moe and not all(0 <= i < self.n_layers for i in self.moe.dense_layers):
            raise ValueError(
                f"model: moe.dense_layers is {self.moe.dense_layers}, expected numbers of layers, "
                f"0 to {self.n_layers - 1}"
            )
        if self.vocab_in_use is not None and not 0 < self.vocab_in_use <= self.vocab_size:
            raise ValueError(
                f"model: vocab_in_use is {self.vocab_in_use}, expected 1 to vocab_size "
                f"{self.vocab_size}"
            )

    def _check_latent(self, latent: LatentShape) -> None:
        """Raise ValueError where latent attention does not fit the rest."""
        if self.n_kv_heads != self.n_heads:
            raise ValueError(
                f"model: n_kv_heads is {self.n_kv_heads} with latent attention, where each head "
                f"has keys of its own; expected n_heads, {self.n_heads}"
            )
        if latent.rope_dim % 2 or not latent.rope_dim < self.head_dim:
            raise ValueError(
                f"model: latent.rope_dim is {latent.rope_dim}, expected an even number below "
                f"head_dim, {self.head_dim}: it is the rotated part of a head"
            )
        names = ("qk_norm", "qk_norm_full_width", "qkv_bias", "nope_layers", "window_layers")
        given = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name)]
        if given:
            raise ValueError(
                f"model: latent attention has none of {', '.join(given)}; leave them at their "
                "defaults"
            )

    def _read_json_values(self) -> None:
        """Lists as tuples, and a dict as the RopeScaling, MoEConfig or LatentShape that it was."""
        for name in ("nope_layers", "window_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if isinstance(self.moe, dict):
            object.__setattr__(self, "moe", MoEConfig(**self.moe))
        if isinstance(self.latent, dict):
            object.__setattr__(self, "latent", LatentShape(**self.latent))

    @property
    def rope_rescale(self) -> Callable | None:
        """What becomes of RoPE's frequencies; None: they stay as they are."""
        return self.rope_scaling and self.rope_scaling.rescale

    @property
    def rope_dim(self) -> int:
        """How many numbers of a query or key RoPE rotates."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def window_of(self, layer: int) -> int | None:
        """How many keys a query of this layer sees; None: all."""
        return self.window if layer in self.window_layers else None

    @property
    def head_rows(self) -> int:
        """Rows of the head, without padding: as many ids as the logits have."""
        return self.vocab_size if self.vocab_in_use is None else self.vocab_in_use

    def to_dict(self) -> dict:
        """For a checkpoint; `ModelConfig(**d)` returns the same config."""
        return asdict(self)


# The toys, and open models whose weights have this architecture.
PRESETS: dict[str, dict] = {
    "demo": dict(
        n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384, max_seq_len=256
    ),
    "tiny": dict(
        n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_seq_len=256
    ),
    # The same two with experts: as many parameters are active, up to the router's. Routed as
    # DeepSeek-V3 is, with one shared expert, but without groups.
    "demo-moe": dict(
        n_layers=4,
        d_model=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        d_ff=384,
        max_seq_len=256,
        moe=dict(
            n_experts=16,
            experts_per_token=3,
            d_expert=96,
            d_shared=96,
            scores="sigmoid",
            balance_bias=True,
            fp32_router=True,
        ),
    ),
    "tiny-moe": dict(
        n_layers=2,
        d_model=32,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        d_ff=64,
        max_seq_len=256,
        moe=dict(
            n_experts=8,
            experts_per_token=3,
            d_expert=16,
            d_shared=16,
            scores="sigmoid",
            balance_bias=True,
            fp32_router=True,
        ),
    ),
    "qwen2.5-0.5b": dict(
        n_layers=24,
        d_model=896,
        n_heads=14,
        n_kv_heads=2,
        head_dim=64,
        d_ff=4864,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=True,
        max_seq_len=32_768,
    ),
    "qwen2.5-1.5b": dict(
        n_layers=28,
        d_model=1536,
        n_heads=12,
        n_kv_heads=2,
        head_dim=128,
        d_ff=8960,
        rope_theta=1e6,
        qkv_bias=True,
        tie_embeddings=True,
        max_seq_len=131_072,
    ),
    "qwen3-0.6b": dict(
        n_layers=28,
        d_model=1024,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        d_ff=3072,
        rope_theta=1e6,
        qk_norm=True,
        tie_embeddings=True,
        max_seq_len=32_768,
    ),
    "smollm2-135m": dict(
        n_layers=30,
        d_model=576,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        rope_theta=1e5,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=8192,
    ),
    # 30.5 billion parameters, 3.3 of them active.
    "qwen3-30b-a3b": dict(
        n_layers=48,
        d_model=2048,
        n_heads=32,
        n_kv_heads=4,
        head_dim=128,
        d_ff=6144,
        rope_theta=1e6,
        qk_norm=True,
        tie_embeddings=False,
        max_seq_len=32_768,
        moe=dict(n_experts=128, experts_per_token=8, d_expert=768, **ROUTING["qwen3-moe"]),
    ),
    # 6.9 billion, 1.3 of them active.
    "olmoe-1b-7b": dict(
        n_layers=16,
        d_model=2048,
        n_heads=16,
        n_kv_heads=16,
        head_dim=128,
        d_ff=1024,
        norm_eps=1e-5,
        qk_norm_full_width=True,
        tie_embeddings=False,
        max_seq_len=4096,
        moe=dict(n_experts=64, experts_per_token=8, d_expert=1024, **ROUTING["olmoe"]),
    ),
    # 15.7 billion, 2.7 of them active. Two shared experts are one MLP of twice the width.
    "deepseek-v2-lite": dict(
        n_layers=27,
        d_model=2048,
        n_heads=16,
        n_kv_heads=16,
        head_dim=192,
        d_ff=10_944,
        latent=dict(kv_rank=512, rope_dim=64, value_dim=128),
        rope_scaling=dict(
            kind="yarn",
            factor=40.0,
            original_max_seq_len=4096,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        tie_embeddings=False,
        max_seq_len=163_840,
        moe=dict(
            n_experts=64,
            experts_per_token=6,
            d_expert=1408,
            d_shared=2816,
            dense_layers=(0,),
            scores="softmax",
            normalise=False,
            fp32_router=True,
        ),
    ),
}


def preset(name: str, vocab_size: int, **overrides) -> ModelConfig:
    """The config of a named preset, or of "depth=N". overrides: fields to set instead.

    Raises ValueError for an unknown name.
    """
    if name.startswith("depth="):
        digits = name.removeprefix("depth=")
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(
                f"model preset {name!r}: the depth must be a whole number of layers, as in depth=6"
            )
        return from_depth(int(digits), vocab_size, **overrides)
    if name not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise ValueError(f"unknown model preset {name!r}; known are {known}, and depth=N")
    return ModelConfig(vocab_size=vocab_size, **{**PRESETS[name], **overrides})


def from_depth(depth: int, vocab_size: int, **overrides) -> ModelConfig:
    """`depth` layers of width 32 x depth: one number from which the whole shape follows.

    Heads are 32 wide up to depth 8, and 64 above. There are half as many key/value heads as query
    heads; as many if the number of query heads is odd.
    """
    d_model = 32 * depth
    head_dim = 32 if depth <= 8 else 64
    n_heads = max(1, d_model // head_dim)
    n_kv_heads = n_heads // 2 if n_heads % 2 == 0 else n_heads
    shape = dict(
        n_layers=depth,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=3 * d_model,
    )
    return ModelConfig(vocab_size=vocab_size, **{**shape, **overrides})
