"""Text data: files -> documents -> tokens -> batches, each batch a pure function of (seed, index).

    read_documents, read_pairs      files to text, with errors that say how to mend the file
    encode_documents, encode_pairs  text to tokens; every document ends with eos
    split_tail, tail_batches        a held-out tail of a long text, gone over once and whole
    unigram_bits_per_byte           what a model that knows only frequencies reaches on that tail
    TokenStream                     a long text as shuffled windows of one length  (pretraining on real text)
    DocumentBatches                 whole documents of different lengths           (toy corpus, SFT pairs)

`batch(7)` is the same whatever was asked before, so that resuming a run needs the index alone.

Left out: worker processes and memory maps (the text is read whole; the sizes meant here are megabytes),
downloads, attention kept to one document in a TokenStream (a window is cut anywhere and sees across eos, as
in GPT-2's pretraining), truncation (a document too long is an error: half an answer never teaches to stop).

Shapes: T tokens of a batch (flat), N sequences, V vocabulary.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..model.packed import Packed, offsets, positions_of
from ..model.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")  # what is read of a directory


class Pair(NamedTuple):
    prompt: str
    response: str


class Batch(NamedTuple):
    """What one step of next-token training needs."""

    inputs: Packed
    """[T] tokens."""
    targets: torch.Tensor
    """[T] int64, the token that follows each input in its own sequence."""
    weight: torch.Tensor
    """[T] float32, 1 where the loss counts, 0 where the target is part of a prompt."""


# ---- files to text ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The file's text, without a byte-order mark. Raises ValueError if it is missing, empty or binary."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"data file {path} cannot be read ({error.strerror}); check the path"
        ) from None
    mend = "expected UTF-8 text (.txt, .md or .jsonl); convert the file or leave it out"
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"data file {path} is binary: byte {nul} is 0; {mend}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 at byte {error.start}; {mend}") from None
    if not text.strip():
        raise ValueError(f"data file {path} is empty; fill it or leave it out")
    return text


def read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, texts of `fields`) of each line that is not blank.
    Raises ValueError, with the line's number, for what is no JSON object or lacks a field as text."""
    example = "{" + ", ".join(f'"{field}": "..."' for field in fields) + "}"
    for number, line in enumerate(
        read_text(path).split("\n"), 1
    ):  # splitlines() would cut at U+2028 too
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"data file {path}, line {number} is not JSON ({error}); each line must be "
                f"{example}"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(
                f"data file {path}, line {number} is a JSON {type(record).__name__}; each line "
                f"must be {example}"
            )
        for field in fields:
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"data file {path}, line {number} has no text in a field `{field}` (its "
                    f"fields: {list(record)[:8]}); each line must be {example}"
                )
        yield number, [record[field] for field in fields]


def files_of(path: Path) -> list[Path]:
    """The file itself, or the text files below a directory, sorted; hidden files and folders are left out."""
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in TEXT_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise ValueError(
            f"data directory {path} holds no {', '.join(TEXT_SUFFIXES)} file; give one that does"
        )
    return found


def read_documents(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The documents of files and directories, in order. A .jsonl file has one in the field `text` of each
    line (empty ones are passed over), any other text file is one, a directory stands for its .txt, .md,
    .jsonl files.

    Raises ValueError, one line that says how to mend it: a file that is missing, empty or binary (with the
    byte), a line of .jsonl that is no JSON or lacks `text` (with the line), no document at all."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    documents: list[str] = []
    for file in (file for path in paths for file in files_of(Path(path))):
        if file.suffix.lower() == ".jsonl":
            documents += [text for _, [text] in read_jsonl(file, ["text"]) if text.strip()]
        else:
            documents.append(read_text(file))
    if not documents:
        raise ValueError(
            f"no documents in {', '.join(map(str, paths)) or 'an empty list of files'}; give a "
            '.txt file, a .jsonl file with lines {"text": "..."}, or a directory of them'
        )
    return documents


def read_pairs(path: str | Path) -> list[Pair]:
    """The prompts and responses of a .jsonl file, for supervised fine-tuning.
    Raises ValueError as `read_documents` does, and for an empty prompt or response (with the line)."""
    pairs = []
    for number, texts in read_jsonl(Path(path), Pair._fields):
        for field, text in zip(Pair._fields, texts, strict=True):
            if not text.strip():
                raise ValueError(
                    f"data file {path}, line {number}: `{field}` is empty; fill it or drop the line"
                )
        pairs.append(Pair(*texts))
    return pairs


# ---- text to tokens --------------------------------------------------------------------------------------


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each document, then eos: int32 arrays. A TokenStream takes them joined, `np.concatenate`."""
    return [
        np.array(ids + [tokenizer.eos_id], np.int32) for ids in tokenizer.encode_batch(documents)
    ]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[list[np.ndarray], list[int]]:
    """Tokens of each prompt, its response and eos, and how many of them are prompt: both go to
    DocumentBatches. Prompt and response are encoded apart, as in sampling, where the prompt stands before
    the response exists."""
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    responses = tokenizer.encode_batch([response for _, response in pairs])
    documents = [
        np.array(prompt + response + [tokenizer.eos_id], np.int32)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return documents, [len(prompt) for prompt in prompts]


def split_tail(tokens: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut off the last `share` of the tokens as a held-out tail: (train, tail), at least 2 tokens each.
    Raises ValueError for a share outside (0, 1) or a text too short."""
    if not 0 < share < 1:
        raise ValueError(
            f"the held-out share is {share}, expected more than 0 and less than 1, such as 0.1"
        )
    n_tail = max(2, round(len(tokens) * share))
    if len(tokens) - n_tail < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens, of which {n_tail} would be held out (share "
            f"{share}) and at least 2 must be left; give more text or a smaller share"
        )
    return tokens[:-n_tail], tokens[-n_tail:]


def unigram_bits_per_byte(
    train: np.ndarray, tail: np.ndarray, n_bytes: int, vocab_size: int
) -> float:
    """Bits per byte if each token of `tail` is predicted by its frequency in `train`, with one added to each
    count. To compare with a model, give the tokens that it predicts, tail[1:], and `tokenizer.count_bytes`
    of those."""
    if n_bytes < 1:
        raise ValueError(
            f"the held-out tail has {n_bytes} bytes of text; give more text or hold out a "
            "larger share"
        )
    counts_V = np.bincount(train, minlength=vocab_size) + 1.0
    assert len(counts_V) == vocab_size and tail.max(initial=0) < vocab_size, (
        "tokens of another vocabulary"
    )
    return float(-np.log2(counts_V / counts_V.sum())[tail].sum() / n_bytes)


# ---- tokens to batches -----------------------------------------------------------------------------------


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64: 0 .. n-1 in the order of this seed and epoch. It sorts raw Philox output, which numpy
    promises to keep from version to version, as it does not promise for `Generator.permutation` (NEP 19)."""
    return np.argsort(
        np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n), kind="stable"
    )


def next_token_batch(
    tokens: np.ndarray, starts_N: np.ndarray, lengths_N: np.ndarray, prompts_N=0
) -> Batch:
    """Inputs tokens[start : start + length] of each sequence, and as targets what stands one further.
    prompts_N: how many tokens of each sequence are prompt; a target among them has weight 0."""
    positions_T = positions_of(lengths_N)
    where_T = np.repeat(starts_N, lengths_N) + positions_T
    learn_T = positions_T + 1 >= np.repeat(np.broadcast_to(prompts_N, len(lengths_N)), lengths_N)
    inputs = Packed(
        tokens=torch.from_numpy(tokens[where_T].astype(np.int64)),
        positions=torch.from_numpy(positions_T),
        cu_seqlens=torch.from_numpy(offsets(lengths_N)),
        max_seqlen=int(lengths_N.max()),
    )
    return Batch(
        inputs,
        torch.from_numpy(tokens[where_T + 1].astype(np.int64)),
        torch.from_numpy(learn_T.astype(np.float32)),
    )


def check_sizes(tokens: np.ndarray, seed: int, **sizes: int) -> None:
    """Raise ValueError for a size below 1 or a seed out of range. Token ids are our own work, so asserted."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 or more, and less than 2^64")
    assert (
        tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer) and tokens.min(initial=0) >= 0
    )


def tail_batches(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Go over a held-out text once: each token but the first is a target exactly once, so the last sequence
    may be shorter. Raises ValueError for sizes below 1 or fewer than 2 tokens."""
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
    """A long text as windows of `seq_len` tokens, shuffled anew every epoch.

    Epochs follow each other without a seam: batch(i) takes the windows from i * batch_size on in that
    endless row. So all batches have one shape, and an epoch has every window exactly once. No two windows
    share a target. The tokens after the last whole window, fewer than seq_len, are not used."""

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int = 0):
        """tokens: [n] integers; batch_size: windows in a batch. Raises ValueError for sizes below 1, or a
        text of fewer than seq_len + 1 tokens (a window and its last target)."""
        check_sizes(tokens, seed, seq_len=seq_len, batch_size=batch_size)
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens, but one sequence of --seq-len {seq_len} "
                f"needs {seq_len + 1}; give more text or a smaller --seq-len"
            )
        self.tokens, self.seq_len, self.batch_size = tokens, seq_len, batch_size
        self.n_windows = (len(tokens) - 1) // seq_len
        self.order_of = lru_cache(maxsize=2)(partial(shuffled, self.n_windows, seed))

    def epoch(self, index: int) -> float:
        """How many times the text has been gone over when batch `index` begins."""
        return index * self.batch_size / self.n_windows

    def batch(self, index: int) -> Batch:
        """Batch `index` (0, 1, ...): batch_size sequences of seq_len tokens, all of weight 1."""
        assert index >= 0
        places = range(index * self.batch_size, (index + 1) * self.batch_size)
        windows_N = np.array(
            [self.order_of(p // self.n_windows)[p % self.n_windows] for p in places]
        )
        return next_token_batch(
            self.tokens, windows_N * self.seq_len, np.full(self.batch_size, self.seq_len)
        )


def cuts(ends: list[int], budget: int) -> list[int]:
    """Fill batch after batch up to `budget` tokens with documents that end at ends[0], ends[1], ... in a row.
    Returns the number of documents in the first batch, in the first two, and so on."""
    filled, cut = [], 0
    while cut < len(ends):
        cut = bisect_right(ends, (ends[cut - 1] if cut else 0) + budget)
        filled.append(cut)
    return filled


class DocumentBatches:
    """Whole documents of different lengths, shuffled anew every epoch, batched by a budget of tokens.

    A document of L tokens gives L - 1 inputs, since its last token (eos) predicts nothing. An epoch has
    every document exactly once, in as few batches as its order and the budget allow; then the budget is
    lowered as far as that number of batches stands, so that the last one is not a small, noisy rest."""

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        batch_tokens: int,
        max_seq_len: int,
        seed: int = 0,
        prompt_lengths: Sequence[int] | None = None,
    ):
        """documents: lists or arrays of token ids; batch_tokens and max_seq_len: most input tokens in a
        batch and in a document; prompt_lengths: how many tokens of each document are prompt and not trained
        on. Raises ValueError without documents, for one too long or too short (with its place), for sizes
        below 1."""
        if len(documents) == 0:
            raise ValueError("there are no documents to train on; give at least one")
        lengths = np.array([len(document) for document in documents])
        prompts = np.zeros_like(lengths) if prompt_lengths is None else np.array(prompt_lengths)
        assert len(prompts) == len(lengths)
        self.tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
        check_sizes(self.tokens, seed, batch_tokens=batch_tokens, max_seq_len=max_seq_len)

        def too_long(what: str, most: int) -> str:
            return f"but {what} {most} has room for {most + 1} (the last is only a target)"

        for wrong_N, why in [
            (lengths < 2, "needs at least 2, so that one predicts the other; drop it"),
            (
                prompts >= lengths,
                "all of them prompt, so nothing is left to learn; give it a response",
            ),
            (
                lengths - 1 > max_seq_len,
                too_long("the model's max_seq_len", max_seq_len)
                + "; split or drop it, or take a model for longer sequences",
            ),
            (
                lengths - 1 > batch_tokens,
                too_long("--batch-tokens", batch_tokens)
                + "; split or drop it, or raise --batch-tokens",
            ),
        ]:
            if wrong_N.any():
                i = int(wrong_N.argmax())
                raise ValueError(
                    f"document {i} (the first is 0) has {lengths[i]} tokens, {why}. "
                    f"{wrong_N.sum()} of {len(wrong_N)} documents are like this"
                )

        self.starts, self.lengths, self.prompts = np.cumsum(lengths) - lengths, lengths - 1, prompts
        self.batch_tokens = batch_tokens
        self.order_of = lru_cache(maxsize=2)(partial(shuffled, len(lengths), seed))
        self.plan_of = lru_cache(maxsize=2)(self.plan)
        self.first_batch = [
            0
        ]  # of each epoch, as far as it was needed: a memo that decides nothing

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The documents of each batch of an epoch."""
        order = self.order_of(epoch)
        ends = np.cumsum(self.lengths[order]).tolist()
        n_batches = len(cuts(ends, self.batch_tokens))
        # A smaller budget never makes fewer batches, so halving finds the least one that makes as many.
        budgets = range(int(self.lengths.max()), self.batch_tokens + 1)
        least = bisect_left(budgets, -n_batches, key=lambda budget: -len(cuts(ends, budget)))
        return np.split(order, cuts(ends, budgets[least])[:-1])

    def epoch(self, index: int) -> int:
        """The epoch that batch `index` belongs to: how many times all documents have been gone over."""
        assert index >= 0
        while self.first_batch[-1] <= index:
            ends = np.cumsum(self.lengths[self.order_of(len(self.first_batch) - 1)]).tolist()
            self.first_batch.append(self.first_batch[-1] + len(cuts(ends, self.batch_tokens)))
        return bisect_right(self.first_batch, index) - 1

    def batch(self, index: int) -> Batch:
        """Batch `index` (0, 1, ...) of the endless row of epochs."""
        epoch = self.epoch(index)
        documents_N = self.plan_of(epoch)[index - self.first_batch[epoch]]
        # Sorted by length, so that attention that pads inside itself pads least.
        documents_N = documents_N[np.argsort(self.lengths[documents_N], kind="stable")]
        return next_token_batch(
            self.tokens,
            self.starts[documents_N],
            self.lengths[documents_N],
            self.prompts[documents_N],
        )
