"""The shape of a model: one dataclass, a table of presets, and one dial (`depth`) that derives the rest.

Left out: dropout, biases other than on q, k, v, learned positions; the R1 family's bases (Llama, Qwen) have
none of them.
"""

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a pre-norm decoder with RoPE, GQA and SwiGLU. Raises ValueError if the numbers do not fit."""

    vocab_size: int
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    d_ff: int = 384
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """RMSNorm on each head's q and k (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the q, k and v projections (Qwen2)."""
    tie_embeddings: bool = True
    """The head's weight is the embedding."""
    max_seq_len: int = 512

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not (isinstance(value, Integral) and value > 0):
                raise ValueError(f"model: {f.name} is {value!r}, expected a whole number above 0")
            if f.type is float and not (isinstance(value, Real) and 0 < value < math.inf):
                raise ValueError(f"model: {f.name} is {value!r}, expected a number above 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model: head_dim {self.head_dim} is odd; RoPE turns pairs, so it must be even"
            )

    def to_dict(self) -> dict:
        return asdict(self)


# d_model, heads and so on of open models whose weights fit this architecture, and of the toys.
PRESETS: dict[str, dict] = {
    "demo": dict(
        n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384, max_seq_len=256
    ),
    "tiny": dict(
        n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_seq_len=256
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
}


def preset(name: str, vocab_size: int, **overrides) -> ModelConfig:
    """The named preset, or "depth=N" for the dial. Raises ValueError for an unknown name."""
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
    """One dial: `depth` layers of width 32 x depth, heads of 32 up to depth 8 and of 64 above, and half as
    many kv heads (as many if the heads are odd in number)."""
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
