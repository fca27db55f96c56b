"""The flags that say in what a model computes: --dtype, --fp32-head and --onednn.

The loops, `r1zero eval` and `r1zero chat` have them. Unlike --device they must be the same when a
run is resumed. What they mean is in model/precision.py.
"""

from dataclasses import dataclass

import torch

from ..model.precision import Precision, check_dtype_name, choose_precision
from .machine import use_onednn


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """What a model computes in."""

    dtype: str = "auto"
    """Dtype to compute in, over weights in fp32: fp32, bf16, fp16, or auto (bf16 on a CUDA GPU,
    fp16 on one without bf16, fp32 elsewhere)."""
    fp32_head: bool = False
    """Compute the last norm, the logits and the log-probs in fp32, whatever --dtype says."""
    onednn: bool = False
    """Compute a CPU's fp32 matrix products by oneDNN, which is twice as fast on AMD's CPUs with
    AVX-512, and rounds to bf16 on CPUs with AMX."""

    def __post_init__(self):
        check_dtype_name(self.dtype)

    def precision(self, device: torch.device) -> Precision:
        """What a model on this device computes in. Raises ValueError for a dtype it lacks.

        The library of the matrix products is chosen here too, for the whole process.
        """
        use_onednn(self.onednn and device.type == "cpu")
        return choose_precision(self.dtype, self.fp32_head, device)
