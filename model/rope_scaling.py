"""RoPE for contexts longer than the pretraining's: slower angles for the slow pairs of a head.

Pair i of a head rotates by f_i = theta^(-2i / D) per position. A model that was trained on short
sequences, and later on longer ones, divides some of these frequencies by a factor. Open models
write the recipe into their config.json (`rope_scaling`, or `rope_parameters`):

    linear    f / factor for every pair (Chen et al., arXiv 2306.15595)
    llama3    f / factor for the pairs that turn slowly, f for the fast ones, and a blend between
              (Llama 3.1, arXiv 2407.21783; meta-llama/llama-models, `apply_scaling`)
    yarn      the same with another blend; and sharper scores, since a longer context has more keys
              (Peng et al., arXiv 2309.00071; deepseek-ai/DeepSeek-V3, `inference/model.py`)

yarn's scores are sharper by a factor on the table of cosines and sines. Latent attention, where
only a part of a head is rotated, has a factor on all scores instead, or besides.

Left out: dynamic (the angles would depend on the longest sequence of a batch), longrope.
"""

import math
from dataclasses import dataclass

import torch

KINDS = ("linear", "llama3", "yarn")
NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_seq_len",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of RoPE are changed. Raises ValueError for numbers that do not fit."""

    kind: str
    """linear, llama3 or yarn."""
    factor: float
    """What the slow frequencies are divided by."""
    low_freq_factor: float = 1.0
    """Pairs that turn fewer times than this in the original context are slow (llama3)."""
    high_freq_factor: float = 4.0
    """Pairs that turn more often than this in the original context are fast (llama3)."""
    original_max_seq_len: int = 8192
    """The context that the model was first trained with, in tokens (llama3, yarn)."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this in the original context are fast (yarn)."""
    beta_slow: float = 1.0
    """Pairs that turn fewer times than this in the original context are slow (yarn)."""
    truncate: bool = True
    """Whether the blend begins and ends at a whole pair (yarn)."""
    attention_factor: float | None = None
    """What cosines and sines are multiplied by (yarn); None: it follows from the other numbers."""
    mscale: float | None = None
    """With mscale_all_dim: how much of the sharpening cosines and sines have (yarn)."""
    mscale_all_dim: float | None = None
    """How much of the sharpening all scores of latent attention have (yarn)."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"rope scaling is {self.kind!r}; expected one of {', '.join(KINDS)}, or none"
            )
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"rope scaling: {name} is {value}, expected a number above 0")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"rope scaling: {low} {getattr(self, low)} is not below "
                    f"{high} {getattr(self, high)}"
                )

    def rescale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The frequencies of all pairs [D / 2], in radians per position, after scaling."""
        if self.kind == "linear":
            return frequencies / self.factor
        # 0 for slow pairs, 1 for fast ones, and a blend between them.
        fast = self._fast_yarn(frequencies) if self.kind == "yarn" else self._fast(frequencies)
        return (1 - fast) * frequencies / self.factor + fast * frequencies

    def _fast(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Llama 3.1's blend: a straight line in the number of turns in the original context."""
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        return ((turns - self.low_freq_factor) / width).clamp(0, 1)

    def _fast_yarn(self, frequencies: torch.Tensor) -> torch.Tensor:
        """yarn's blend: a straight line in the index of the pair."""
        n_pairs = len(frequencies)
        if n_pairs < 2:
            return torch.ones_like(frequencies)
        # Which pair, as a fraction, turns so often? Frequencies fall by one factor from pair to
        # pair. All of it stays on the device: a CUDA graph cannot ask for a number.
        step = (frequencies[0] / frequencies[1]).log()
        first = math.log(self.original_max_seq_len / (2 * math.pi * self.beta_fast)) / step
        last = math.log(self.original_max_seq_len / (2 * math.pi * self.beta_slow)) / step
        if self.truncate:
            first, last = first.floor(), last.ceil()
        # The upper bound counts numbers and not pairs; models were trained with it as it is.
        first, last = first.clamp(min=0), last.clamp(max=2 * n_pairs - 1)
        last = torch.where(first == last, last + 0.001, last)
        pairs = torch.arange(n_pairs, dtype=frequencies.dtype, device=frequencies.device)
        return 1 - ((pairs - first) / (last - first)).clamp(0, 1)

    # ---- sharper scores (yarn) ----

    def _sharpening(self, share: float) -> float:
        """0.1 share ln(factor) + 1, for a context that is longer by the factor."""
        return 0.1 * share * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by; its square is on the scores."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1.0)

    @property
    def softmax_factor(self) -> float:
        """What all scores of latent attention are multiplied by."""
        if self.kind != "yarn" or not self.mscale_all_dim:
            return 1.0
        return self._sharpening(self.mscale_all_dim) ** 2
