"""What a GPU says of itself: the figures from which the kernels choose their block sizes.

A chip's name decides nothing, so a GPU that nobody thought of gets block sizes that fit it.
`chip_of` asks the device. KNOWN_CHIPS has the same figures of one chip for each compute capability,
for compiling ahead of time, where no chip is there to be asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

KIB = 1024


def matrix_unit(arch: int) -> str:
    """The instruction for matrix products in 16 bit: "wgmma" of sm_90, "tcgen05" of sm_10x, or
    "mma", which Triton uses on all others."""
    return {9: "wgmma", 10: "tcgen05"}.get(arch // 10, "mma")


@dataclass(frozen=True)
class Chip:
    """One GPU, as its driver describes it."""

    arch: int
    """Compute capability as one number: 90 for 9.0."""
    shared_memory: int
    """Bytes of shared memory that one program may have, at most."""
    processors: int
    """Number of streaming multiprocessors."""

    @property
    def matrix_unit(self) -> str:
        """As `matrix_unit` says."""
        return matrix_unit(self.arch)

    def buffers(self, stages: int) -> int:
        """How many tiles a loop of matrix products keeps of each operand that it loads."""
        return max(stages - 1, 1) if self.matrix_unit == "mma" else stages


KNOWN_CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(80, 163 * KIB, 108),  # A100
        Chip(86, 99 * KIB, 82),  # RTX 3090
        Chip(87, 163 * KIB, 16),  # Orin
        Chip(89, 99 * KIB, 128),  # RTX 4090
        Chip(90, 227 * KIB, 132),  # H100, H200
        Chip(100, 227 * KIB, 148),  # B200
        Chip(103, 227 * KIB, 148),  # B300
        Chip(120, 99 * KIB, 170),  # RTX 5090
    )
}


def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; an A100's figures where the interpreter runs instead."""
    return _asked(device) if device.type == "cuda" else KNOWN_CHIPS[80]


@cache
def _asked(device: torch.device) -> Chip:
    said = torch.cuda.get_device_properties(device)
    arch = 10 * said.major + said.minor
    return Chip(arch, said.shared_memory_per_block_optin, said.multi_processor_count)


def padded(size: int) -> int:
    """The side of a tile that holds `size` rows or columns: a power of two that the matrix units
    know."""
    return max(16, 1 << (size - 1).bit_length())


def stepped_down(
    config: dict[str, int],
    bytes_of: Callable[[dict[str, int]], int],
    chip: Chip,
    steps: tuple[tuple[str, int], ...],
) -> dict[str, int]:
    """`config`, made smaller until its shared memory fits the chip.

    bytes_of: the shared memory of a config. steps: (name, smallest value) in the order in which
    they give way: stages by one at a time, block sizes by half. Where nothing fits, the
    smallest config is the answer, and the launch says what it lacks.
    """
    for name, smallest in steps:
        while config[name] > smallest and bytes_of(config) > chip.shared_memory:
            less = config[name] - 1 if name.lower().endswith("stages") else config[name] // 2
            config = {**config, name: less}
    return config
