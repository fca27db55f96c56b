"""RoPE for contexts longer than the pretraining's: slower angles for the slow pairs of a head.

Pair i of a head rotates by f_i = theta^(-2i / D) per position. A model that was trained on short
sequences, and later on longer ones, divides some of these frequencies by a factor. Open models
write the recipe into their config.json (`rope_scaling`, or `rope_parameters`):

    linear    f / factor for every pair (Chen et al., arXiv 2306.15595)
    llama3    f / factor for the pairs that turn slowly, f for the fast ones, and a blend between
              (Llama 3.1, arXiv 2407.21783; meta-llama/llama-models, `apply_scaling`)

Left out: dynamic (the angles would depend on the longest sequence of a batch), yarn, longrope.
"""

import math
from dataclasses import dataclass

import torch

KINDS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of RoPE are changed. Raises ValueError for numbers that do not fit."""

    kind: str
    """linear or llama3."""
    factor: float
    """What the slow frequencies are divided by."""
    low_freq_factor: float = 1.0
    """Pairs that turn fewer times than this in the original context are slow (llama3)."""
    high_freq_factor: float = 4.0
    """Pairs that turn more often than this in the original context are fast (llama3)."""
    original_max_seq_len: int = 8192
    """The context that the model was first trained with, in tokens (llama3)."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"rope scaling is {self.kind!r}; expected one of {', '.join(KINDS)}, or none"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"rope scaling: {name} is {value}, expected a number above 0")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope scaling: low_freq_factor {self.low_freq_factor} is not below "
                f"high_freq_factor {self.high_freq_factor}"
            )

    def rescale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The frequencies of all pairs [D / 2], in radians per position, after scaling."""
        if self.kind == "linear":
            return frequencies / self.factor
        # How often does each pair turn around in the original context?
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        # 0 for slow pairs, 1 for fast ones, and a straight line between them.
        width = self.high_freq_factor - self.low_freq_factor
        fast = ((turns - self.low_freq_factor) / width).clamp(0, 1)
        return (1 - fast) * frequencies / self.factor + fast * frequencies
