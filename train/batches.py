"""Tokens to batches for next-token training. Each batch is a pure function of (seed, index).

    TokenStream       a long text as shuffled windows of one length      (pretraining on real text)
    DocumentBatches   whole documents of different lengths               (the demo, conversations)
    tail_batches      a held-out text, gone over once and whole
    split_batch       one batch as micro-batches

`batch(7)` is the same whatever was asked before, so a run needs only the step to resume.

Left out: attention kept to one document in a TokenStream (a window is cut anywhere and sees across
the end token, as in GPT-2's pretraining), and truncation (a document that is too long is an error,
because half an answer never teaches to stop).

Shapes: T tokens of a batch (flat), N sequences.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from ..model.packed import Packed, offsets, positions_of


class Batch(NamedTuple):
    """What one step of next-token training needs."""

    inputs: Packed
    """[T] tokens."""
    targets: torch.Tensor
    """[T] int64, the token that follows each input in its own sequence."""
    weight: torch.Tensor
    """[T] float32, 1 where the loss counts, 0 where the target is not trained on."""


def next_token_batch(
    tokens: np.ndarray,
    starts_N: np.ndarray,
    lengths_N: np.ndarray,
    is_trained: np.ndarray | None = None,
) -> Batch:
    """A batch of the sequences tokens[start : start + length]; each target is the next token.

    is_trained: for each of `tokens` whether it is learned, as a target; None: all are.
    """
    # Index of each input token in `tokens`: the start of its sequence plus its position in it.
    positions_T = positions_of(lengths_N)
    index_T = np.repeat(starts_N, lengths_N) + positions_T

    # A target is one position after its input.
    weight_T = np.ones(len(index_T), np.float32)
    if is_trained is not None:
        weight_T = is_trained[index_T + 1].astype(np.float32)

    inputs = Packed(
        tokens=torch.from_numpy(tokens[index_T].astype(np.int64)),
        positions=torch.from_numpy(positions_T),
        cu_seqlens=torch.from_numpy(offsets(lengths_N)),
        max_seqlen=int(lengths_N.max()),
    )
    targets_T = torch.from_numpy(tokens[index_T + 1].astype(np.int64))
    return Batch(inputs, targets_T, torch.from_numpy(weight_T))


def split_batch(batch: Batch, micro_tokens: int) -> Iterator[Batch]:
    """Cut a batch between sequences into micro-batches of at most `micro_tokens`.

    A sequence that is longer is a micro-batch of its own.
    """
    if len(batch.targets) <= micro_tokens:
        yield batch
        return
    inputs = batch.inputs
    ends = inputs.cu_seqlens.numpy()
    first = 0
    while first < len(ends) - 1:
        # Take sequences first .. last - 1: as many as fit, at least one.
        last = int(np.searchsorted(ends, ends[first] + micro_tokens, side="right")) - 1
        last = max(last, first + 1)
        start, end = int(ends[first]), int(ends[last])

        cu_seqlens = inputs.cu_seqlens[first : last + 1] - start
        part = Packed(
            tokens=inputs.tokens[start:end],
            positions=inputs.positions[start:end],
            cu_seqlens=cu_seqlens,
            max_seqlen=int(cu_seqlens.diff().max()),
        )
        yield Batch(part, batch.targets[start:end], batch.weight[start:end])
        first = last


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64: 0 .. n-1 in the order of this seed and epoch.

    It sorts raw Philox output, which numpy promises to keep from version to version. It does not
    promise that for `Generator.permutation` (NEP 19).
    """
    key = np.array([seed, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


def check_sizes(tokens: np.ndarray, seed: int, **sizes: int) -> None:
    """Raise ValueError for a size below 1 or a seed out of range."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 or more, and less than 2^64")
    assert tokens.ndim == 1
    assert np.issubdtype(tokens.dtype, np.integer)
    assert tokens.min(initial=0) >= 0


def tail_batches(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Go over a held-out text once. Each token but the first is a target exactly once.

    The last sequence may be shorter. Raises ValueError for sizes below 1 or fewer than 2 tokens.
    """
    check_sizes(tokens, 0, seq_len=seq_len, batch_size=batch_size)
    if len(tokens) < 2:
        raise ValueError(
            f"the held-out tail has {len(tokens)} tokens, at least 2 are needed; give more text"
        )
    starts = np.arange(0, len(tokens) - 1, seq_len)
    lengths = np.minimum(seq_len, len(tokens) - 1 - starts)
    for i in range(0, len(starts), batch_size):
        yield next_token_batch(tokens, starts[i : i + batch_size], lengths[i : i + batch_size])


class TokenStream:
    """A long text as windows of `seq_len` tokens, shuffled again every epoch.

    Epochs follow each other without a seam: batch(i) takes the `batch_size` windows from i *
    batch_size on in that endless sequence. So all batches have one shape, and an epoch has every
    window exactly once. No two windows share a target. The tokens after the last whole window,
    fewer than seq_len, are not used.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int = 0):
        """tokens: [n] integers; batch_size: windows per batch.

        Raises ValueError for sizes below 1, or a text of fewer than seq_len + 1 tokens (a window
        and its last target).
        """
        check_sizes(tokens, seed, seq_len=seq_len, batch_size=batch_size)
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, but one sequence of --seq-len {seq_len} "
                f"needs {seq_len + 1}; give more text or a smaller --seq-len"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.n_windows = (len(tokens) - 1) // seq_len
        self.order_of = lru_cache(maxsize=2)(partial(shuffled, self.n_windows, seed))

    def epoch(self, index: int) -> float:
        """How many times the text has been gone over when batch `index` begins."""
        return index * self.batch_size / self.n_windows

    def batch(self, index: int) -> Batch:
        """Batch `index` (0, 1, ...): batch_size sequences of seq_len tokens, all of weight 1."""
        assert index >= 0
        windows = []
        for i in range(index * self.batch_size, (index + 1) * self.batch_size):
            epoch, i_in_epoch = divmod(i, self.n_windows)
            windows.append(self.order_of(epoch)[i_in_epoch])
        starts_N = np.array(windows) * self.seq_len
        lengths_N = np.full(self.batch_size, self.seq_len)
        return next_token_batch(self.tokens, starts_N, lengths_N)


def batch_ends(ends: list[int], budget: int) -> list[int]:
    """Fill batch after batch with up to `budget` tokens of documents that end at ends[0], ends[1],
    ...

    Returns the number of documents in the first batch, in the first two, and so on.
    """
    filled = []
    n_documents, n_tokens = 0, 0
    while n_documents < len(ends):
        n_documents = bisect_right(ends, n_tokens + budget)
        n_tokens = ends[n_documents - 1]
        filled.append(n_documents)
    return filled


class DocumentBatches:
    """Whole documents of different lengths, shuffled again every epoch, batched by a budget of
    tokens.

    A document of L tokens gives L - 1 inputs, since its last token (the end token) predicts
    nothing. An epoch has every document exactly once, or those that the order of a mixture names,
    in as few batches as its order and the budget allow. Then the budget is lowered as far as that
    number of batches allows, so that the last batch is not a small, noisy rest.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        batch_tokens: int,
        max_seq_len: int,
        seed: int = 0,
        trained: Sequence[np.ndarray] | None = None,
        order: Callable[[int], np.ndarray] | None = None,
    ):
        """documents: lists or arrays of token ids; batch_tokens, max_seq_len: most input tokens per
        batch and per document; trained: for each document a bool array, True where a token is
        learned; None: all are; order: from an epoch to its documents, as MixedOrder of mixture.py
        gives them; None: each of them once, shuffled.

        Raises ValueError if there are no documents, for one that is too long or too short (with its
        index), and for sizes below 1.
        """
        if len(documents) == 0:
            raise ValueError("there are no documents to train on; give at least one")
        lengths_N = np.array([len(document) for document in documents])

        self.tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
        check_sizes(self.tokens, seed, batch_tokens=batch_tokens, max_seq_len=max_seq_len)
        check_documents(lengths_N, batch_tokens, max_seq_len)
        self.is_trained = None
        if trained is not None:
            assert [len(flags) for flags in trained] == lengths_N.tolist()
            check_trained(trained)
            self.is_trained = np.concatenate(trained)

        self.starts = np.cumsum(lengths_N) - lengths_N
        self.lengths = lengths_N - 1
        self.batch_tokens = batch_tokens
        order = order or partial(shuffled, len(lengths_N), seed)
        self.order_of = lru_cache(maxsize=2)(order)
        self.plan_of = lru_cache(maxsize=2)(self.plan)
        # Index of the first batch of each epoch, as far as it was needed: a memo that decides
        # nothing.
        self.first_batch = [0]

    def ends_of(self, epoch: int) -> list[int]:
        """Number of input tokens up to the end of each document, in the order of an epoch."""
        return np.cumsum(self.lengths[self.order_of(epoch)]).tolist()

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The documents of each batch of an epoch."""
        ends = self.ends_of(epoch)
        n_batches = len(batch_ends(ends, self.batch_tokens))
        # The smallest budget that still makes n_batches. A smaller budget never makes fewer
        # batches, so bisection finds it.
        budgets = range(int(self.lengths.max()), self.batch_tokens + 1)
        least = bisect_left(budgets, -n_batches, key=lambda budget: -len(batch_ends(ends, budget)))
        cuts = batch_ends(ends, budgets[least])[:-1]
        return np.split(self.order_of(epoch), cuts)

    def epoch(self, index: int) -> int:
        """The epoch of batch `index`: how often all documents have been gone over before."""
        assert index >= 0
        while self.first_batch[-1] <= index:
            ends = self.ends_of(len(self.first_batch) - 1)
            n_batches = len(batch_ends(ends, self.batch_tokens))
            self.first_batch.append(self.first_batch[-1] + n_batches)
        return bisect_right(self.first_batch, index) - 1

    def batch(self, index: int) -> Batch:
        """Batch `index` (0, 1, ...) of the endless sequence of epochs."""
        epoch = self.epoch(index)
        documents_N = self.plan_of(epoch)[index - self.first_batch[epoch]]
        # Sorted by length, so that attention that pads inside itself pads least.
        documents_N = documents_N[np.argsort(self.lengths[documents_N], kind="stable")]
        return next_token_batch(
            self.tokens,
            self.starts[documents_N],
            self.lengths[documents_N],
            self.is_trained,
        )


def check_documents(lengths_N: np.ndarray, batch_tokens: int, max_seq_len: int) -> None:
    """Raise ValueError for the first document that cannot be trained on, with its index and why.

    lengths_N: tokens of each document.
    """
    inputs_N = lengths_N - 1

    def too_long(what: str, most: int) -> str:
        return f"but {what} {most} has room for {most + 1} (the last is only a target)"

    faults = [
        (lengths_N < 2, "needs at least 2, so that one predicts the other; drop it"),
        (
            inputs_N > max_seq_len,
            too_long("the model's max_seq_len", max_seq_len)
            + "; split or drop it, or take a model for longer sequences",
        ),
        (
            inputs_N > batch_tokens,
            too_long("--batch-tokens", batch_tokens)
            + "; split or drop it, or raise --batch-tokens",
        ),
    ]
    for is_wrong_N, why in faults:
        if is_wrong_N.any():
            i = int(is_wrong_N.argmax())
            raise ValueError(
                f"document {i} (the first is 0) has {lengths_N[i]} tokens, {why}. "
                f"{is_wrong_N.sum()} of {len(is_wrong_N)} documents are like this"
            )


def check_trained(trained: Sequence[np.ndarray]) -> None:
    """Raise ValueError for the first document without a target that is trained on."""
    for i, is_trained in enumerate(trained):
        if not is_trained[1:].any():
            raise ValueError(
                f"document {i} (the first is 0) has {len(is_trained)} tokens, all of them prompt, "
                "so nothing is left to learn; give it a response"
            )
