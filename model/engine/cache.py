"""The key/value cache of the sequences that are being decoded, as the scheduler sees it.

A cache holds one sequence per row, in rows 0 .. n - 1, and knows how to decode one token for all of
them. There are two. `Slots` (slots.py) is a CPU's, for fp32: every row has the same number of
columns, which compiled loops read side by side. `Pages` (pages.py) works on any device and shares
the pages of a prompt among the samples of a group. Which of the two serves is the engine's choice;
the scheduler asks both the same questions, and they are written down here.

Left out: prefixes shared between groups, and keys and values kept from one request to the next.

Shapes: B rows, P prompts, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from ..config import ModelConfig

CPU_CACHE = 1 << 30  # bytes of a CPU's cache at most, where no size is given
TOKENS_PER_STEP = 8192  # decoded and prefilled in one step, where no number is given
GPU_CACHE_SHARE = 0.85  # of the free memory, before what a step and others need is taken off
PAGE = 16  # tokens per page; slots grow by as many columns


class Cache(Protocol):
    """What the engine and its scheduler ask of a key/value cache."""

    n: int
    """Rows in use: they are 0 .. n - 1."""
    copy_bytes: int
    """Bytes of its own copy of the weights; 0 if it reads the trainer's."""

    # ---- once, and between requests ----

    def allocate(self, n_tokens: int) -> None:
        """Make room for `n_tokens` in all. Called once, before everything else but `refresh`."""

    def refresh(self) -> None:
        """Take the trainer's weights as they are now. Called while no row is in use."""

    def clear(self) -> None:
        """Forget all rows, and every NaN that a broken model may have left in the cache."""

    # ---- is there room? ----

    def needed(self, total: int) -> int:
        """How much of the cache, in tokens, one sequence of `total` tokens takes."""

    def can_step(self) -> bool:
        """Is there room for one more token in every row?"""

    def fits(self, n: int, longest: int, pages: int) -> bool:
        """May n more rows begin, with some room in hand for all rows to go on?

        longest: tokens of the longest prompt; pages: how many pages the prompts take, shared pages
        counted once.
        """

    # ---- rows ----

    def admit(
        self,
        rows: np.ndarray,
        prompts: list[Sequence[int]],
        which: np.ndarray,
        routes: list[np.ndarray | None] | None = None,
    ) -> torch.Tensor:
        """Prefill each prompt once; logits [P, V] of the token after it.

        rows: [B] the rows that begin; which: [B] the index of each row's prompt. routes: for each
        prompt those that its first tokens had before, which are taken again, or None.
        """

    def routes_of(self, rows: np.ndarray) -> list[np.ndarray | None]:
        """For each row the experts [length, L, K] of its tokens (see routes.py), or None where none
        are kept."""

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        """Sequences move from rows `src` to rows `dst`, over what these held. `cut` follows."""

    def cut(self, n: int) -> None:
        """Keep rows 0 .. n - 1 and free those behind."""

    def empty(self, rows: np.ndarray) -> None:
        """Reset these rows to sequences of length 0. They stay in the batch."""

    # ---- one token per row ----

    def width(self, n: int) -> int:
        """The batch size at which n rows are decoded. It says from where a row fewer saves time."""

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Write the newest token [B] of each row to the cache; logits [B, V] of the token after it.

        The next call may write over the logits.
        """


def pages_for(n_tokens: int) -> int:
    """How many pages hold `n_tokens`; works on arrays, too."""
    return -(-n_tokens // PAGE)


def tokens_within(
    n_bytes: float, token_bytes: int, n_rows: int, longest: int | None, max_seq_len: int
) -> int:
    """The size of a cache, in tokens: room for `n_rows` sequences of `longest` tokens.

    Each row has a page more in hand. The size is less where that many tokens do not fit into
    `n_bytes`, but never less than one sequence of twice `longest`, or of `max_seq_len` if that is
    less: an open model's context alone may be larger than a GPU. longest: None is max_seq_len.
    """
    longest = min(longest or max_seq_len, max_seq_len)
    wanted = n_rows * PAGE * pages_for(longest + PAGE)
    affordable = int(n_bytes / token_bytes)
    at_least = PAGE * pages_for(min(2 * longest, max_seq_len))
    return max(at_least, min(wanted, affordable))


def gpu_cache_bytes(free: int, reserve: int, step: int) -> float:
    """Bytes of a GPU that a cache may take.

    free: bytes that are free now. reserve: what others will need. step: see `step_bytes`. The part
    of `free` that is left for nobody is for CUDA graphs, workspaces, and gaps between tensors.
    """
    return free * GPU_CACHE_SHARE - reserve - step


def step_bytes(config: ModelConfig, dtype: torch.dtype, n_tokens: int, n_rows: int) -> int:
    """The most memory that a step takes beside the cache and the weights: an estimate.

    Prefill, per token: the stream between the layers, before and after a layer's norm, and the
    larger of what the two halves of a layer make. Gradients need nothing: there are none. Kernels
    that hold numbers in fp32 meanwhile, as plain PyTorch does, take more.

    Sampling, per row and logit: fp32 logits of the decoded rows and of the new ones, apart and then
    side by side, and a product in `dtype`. The filters sort, and take twice as much.

    n_tokens: prefilled in one step. n_rows: sampled in one step.
    """
    c = config
    stream = 5 * c.d_model
    if c.latent is None:
        # q, k, v; q and k rotated; the output, and k and v once more on their way to the pages
        attention = (3 * c.n_heads + 5 * c.n_kv_heads) * c.head_dim
    else:
        # q; q and k with their rotated parts; k and v as they are made; the output
        attention = c.n_heads * (4 * c.head_dim + 2 * c.latent.value_dim)
    mlp = 3 * c.d_ff  # gate and up side by side, and their product
    if c.moe is not None:
        # per expert: a row in, the product of gate and up, a row out; then the shared experts
        per_expert = 2 * c.d_model + c.moe.d_expert
        mlp = max(mlp, c.moe.experts_per_token * per_expert + 3 * c.moe.d_shared)
    prefill = n_tokens * (stream + max(attention, mlp)) * dtype.itemsize
    sampling = n_rows * c.vocab_size * (3 * 4 + dtype.itemsize)
    return prefill + sampling
