"""Tokenizer: text to token ids and back, byte-level, so that no text is unknown.

    Tokenizer.bytes()                           256 bytes + 2 special tokens
    Tokenizer.from_words(["10", " -> "])        bytes, and whole words as one token each: the toy tasks
    Tokenizer.from_ranks_file("gpt2.tiktoken")  ranks made by somebody else
    Tokenizer.train(texts, 1024)                byte-level BPE of your own text, by the library `tokenizers`

All four are a tiktoken `Encoding`: a pattern cuts the text into pieces, and inside a piece the neighbouring
pair with the lowest rank is merged first. A piece that is a rank itself is that token at once.

Ids: 0 .. n-1 are the ranks, n is `<|bos|>`, n+1 is `<|eos|>`. A document or a response ends with eos; bos is
there for models that want one. No text makes a special token: what spells `<|eos|>` is ordinary text.

Left out: chat templates (a task writes its own prompt), normalisation (it would break the round trip),
padding of the vocabulary, a pad or unknown token (batches are flat and every byte is a token).
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index as as_int
from pathlib import Path

import numpy as np
import tiktoken

FORMAT = 1  # of to_dict
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>")
SINGLE_BYTES = [bytes([b]) for b in range(256)]

# The split of GPT-2 (openai/gpt-2, src/encoder.py): English endings, then letters, digits or other signs
# with at most one space in front; a longer run of white space leaves its last sign to the word after it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ANY_CHARACTER = r"[\s\S]"

MAX_TRAINED_VOCAB = 1_000_000  # more is a typing mistake
MAX_WORD_BYTES = 50_000  # of all words; from about 80,000 on the regex engine is 1,000 x slower
LONG_TEXT = 10_000  # characters; handing a shorter text to a thread costs more than encoding it

# GPT-2's `\s+(?!\S)` overflows the regex engine's stack at 1,000,000 white-space characters in a row;
# tiktoken then panics, past any `except Exception`. Such a run is cut into parts; the look-behind keeps the
# search linear.
LONGEST_SPACE = 100_000
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE}}}")


# ---- helpers ---------------------------------------------------------------------------------------------


def safe_parts(text: str) -> Iterator[str]:
    """Cut `text` so that no part holds more than LONGEST_SPACE white-space characters in a row."""
    while len(text) > LONGEST_SPACE and (found := LONG_SPACE.search(text)):
        yield text[: found.end()]
        text = text[found.end() :]
    yield text


def without_surrogates(text: str) -> str:
    """Join surrogate pairs; a lone surrogate is no character and becomes U+FFFD, as tiktoken does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_of_letter() -> dict[str, int]:
    """The letters in which byte-level BPE libraries write bytes: printable Latin-1 stands for itself, the
    other 68 bytes, in order, are written as U+0100, U+0101, ... (openai/gpt-2, src/encoder.py)."""
    itself = [b for b in range(256) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173)]
    others = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(others)}


def read_ranks(path: str | Path) -> list[bytes]:
    """Read a .tiktoken file (each line is `base64-of-the-token rank`) into the list of tokens by rank.

    Raises ValueError for a file that is missing, empty, binary or not such a list (with the line's number),
    for a rank or token given twice, and for a rank left out."""
    wanted = "a ranks file has lines `base64 rank`, as GPT-2's gpt2.tiktoken"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"ranks file {path} cannot be read ({error.strerror}); check the path"
        ) from None
    if not data.strip():
        raise ValueError(f"ranks file {path} is empty; {wanted}")
    if not data.isascii() or b"\0" in data:
        raise ValueError(f"ranks file {path} is binary; {wanted}")

    token_of_rank: dict[int, bytes] = {}
    line_of_token: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not (fields := line.split()):
            continue
        try:
            token = base64.b64decode(fields[0], validate=True)
            well_formed = token and len(fields) == 2 and fields[1].isdigit() and len(fields[1]) < 10
        except binascii.Error:
            well_formed = False
        if not well_formed:
            raise ValueError(
                f"ranks file {path}, line {number}: got {line[:60].decode()!r}; {wanted}"
            )
        rank = int(fields[1])
        if rank in token_of_rank:
            raise ValueError(
                f"ranks file {path}, line {number}: rank {rank} was given before, on line "
                f"{line_of_token[token_of_rank[rank]]}; each rank stands once"
            )
        if token in line_of_token:
            raise ValueError(
                f"ranks file {path}, line {number}: token {token!r} was given before, on line "
                f"{line_of_token[token]}; each token stands once"
            )
        token_of_rank[rank], line_of_token[token] = token, number

    for rank in range(len(token_of_rank)):
        if rank not in token_of_rank:
            raise ValueError(
                f"ranks file {path}: it has {len(token_of_rank)} ranks but rank {rank} is "
                "missing; they must run from 0 without a gap (leave out special tokens)"
            )
    return [token_of_rank[rank] for rank in range(len(token_of_rank))]


# ---- the tokenizer ---------------------------------------------------------------------------------------


class Tokenizer:
    """Ranks, a pattern and two special tokens. Build one by a class method (see the head of this file).

    vocab_size counts ranks and special tokens; bos_id and eos_id are the last two ids; kind is "bytes",
    "words" or "bpe"; ranks is the list of tokens as bytes."""

    def __init__(self, kind: str, pattern: str, ranks: Sequence[bytes]):
        """pattern cuts a text into pieces and must match every character; what no piece holds would be lost.
        Raises ValueError if a rank is empty or double, a single byte is missing, the pattern is bad."""
        ranks = list(ranks)
        rank_of_token = {token: rank for rank, token in enumerate(ranks)}
        missing = [b for b in range(256) if SINGLE_BYTES[b] not in rank_of_token]
        if missing:
            raise ValueError(
                f"tokenizer: {len(missing)} of the 256 single bytes have no rank (the first is "
                f"byte {missing[0]}), so some text would have no tokens; add a rank for each"
            )
        if b"" in rank_of_token or len(rank_of_token) < len(ranks):
            raise ValueError(
                f"tokenizer: of {len(ranks)} ranks some are empty or double; each token stands once"
            )
        self.kind, self.pattern, self.ranks = kind, pattern, ranks
        self.bos_id, self.eos_id = len(ranks), len(ranks) + 1
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.encoding = tiktoken.Encoding(
            f"r1zero-{kind}",
            pat_str=pattern,
            mergeable_ranks=rank_of_token,
            special_tokens={"<|bos|>": self.bos_id, "<|eos|>": self.eos_id},
        )
        self.n_bytes_V = np.array([len(token) for token in ranks] + [0] * len(SPECIAL_TOKENS))

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    # Four ways to get one

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Each byte is a token; id = byte."""
        return cls("bytes", ANY_CHARACTER, SINGLE_BYTES)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Tokenizer":
        """Each word is one token wherever it stands, the longest first ("12" before "1").

        All other text is bytes. Ids follow the order of `words`, from 256 on; a word of one byte ("3", "+")
        is that byte's token already.
        Raises ValueError for an empty, double or special word, and past 50,000 bytes of words."""
        if isinstance(words, str):
            raise ValueError(f"from_words: got one string {words[:40]!r}; give a list of words")
        words = list(words)
        for i, word in enumerate(words):
            if (
                not isinstance(word, str)
                or word in ("", *SPECIAL_TOKENS)
                or word != without_surrogates(word)
            ):
                raise ValueError(
                    f"from_words: word {i} is {word!r}; a word is text, not empty, and none of "
                    f"{', '.join(SPECIAL_TOKENS)}"
                )
        for word, count in Counter(words).most_common(1):
            if count > 1:
                raise ValueError(
                    f"from_words: {word!r} is given {count} times; give each word once"
                )
        longer = [word for word in words if len(word.encode()) > 1]
        size = sum(len(word.encode()) for word in longer)
        if size > MAX_WORD_BYTES:
            raise ValueError(
                f"from_words: the words have {size} bytes in all, over {MAX_WORD_BYTES}, and "
                "encoding would crawl; use fewer words or Tokenizer.train"
            )
        # A piece is a word or one character, and no part of a character is a word: nothing else merges.
        choices = [re.escape(word) for word in sorted(longer, key=len, reverse=True)]
        return cls(
            "words",
            "|".join([*choices, ANY_CHARACTER]),
            SINGLE_BYTES + [word.encode() for word in longer],
        )

    @classmethod
    def from_ranks_file(cls, path: str | Path, pattern: str = GPT2_PATTERN) -> "Tokenizer":
        """The ranks of a .tiktoken file, with the pattern that they were trained with (GPT-2's unless given).
        Raises ValueError for anything that is not such a file (see `read_ranks`), or lacks a single byte."""
        ranks = read_ranks(path)
        try:
            return cls("bpe", pattern, ranks)
        except ValueError as error:
            raise ValueError(f"ranks file {path}: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE after GPT-2's split: the most frequent pair becomes a token, again and again
        (Sennrich et al. 2016, arXiv 1508.07909). A short text gives a smaller vocabulary.

        vocab_size counts the 256 bytes and the 2 special tokens. The same texts give the same tokenizer.
        Raises ValueError without the optional library `tokenizers`, without text, for a size out of range."""
        least = 256 + len(SPECIAL_TOKENS)
        if not least <= vocab_size <= MAX_TRAINED_VOCAB:
            raise ValueError(
                f"train: vocab_size is {vocab_size}, expected {least} (bytes and specials) to "
                f"{MAX_TRAINED_VOCAB}; 1024 to 8192 suit a few MB of text"
            )
        if isinstance(texts, str):
            raise ValueError(f"train: got one string {texts[:40]!r}; give a list of texts")
        texts = [without_surrogates(text) for text in texts]
        if not any(texts):
            raise ValueError(
                f"train: {len(texts)} texts, none with any text; give at least one that "
                "is not empty"
            )
        try:
            from tokenizers import Tokenizer as Library
            from tokenizers import models, pre_tokenizers, trainers
        except ImportError:
            raise ValueError(
                "training a BPE needs the library `tokenizers`: `pip install r1zero[bpe]`, or "
                "use `--tokenizer bytes` or a .tiktoken ranks file"
            ) from None
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False
        )  # splits as GPT2_PATTERN
        library.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size - len(SPECIAL_TOKENS),
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        id_of_token = (
            library.get_vocab()
        )  # ids: first the 256 letters, then the merges in order, as ranks
        byte_of = byte_of_letter()
        return cls(
            "bpe",
            GPT2_PATTERN,
            [
                bytes(byte_of[letter] for letter in token)
                for token in sorted(id_of_token, key=id_of_token.__getitem__)
            ],
        )

    # Text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, never a special one; bos and eos are the caller's to add.
        A lone surrogate, which is no character, is read as U+FFFD; all other text comes back by `decode`."""
        parts = [self.encoding.encode_ordinary(part) for part in safe_parts(text)]
        return parts[0] if len(parts) == 1 else [i for part in parts for i in part]

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text. num_threads None: one thread a core for long texts, none for short."""
        if num_threads is None:
            long = sum(map(len, texts)) >= LONG_TEXT * len(texts)
            num_threads = min(os.cpu_count() or 1, len(texts)) if long else 1
        if num_threads <= 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken encodes without Python's lock
            return list(pool.map(self.encode, texts))

    # Ids to text

    def checked(self, ids: Iterable[int]) -> list[int]:
        """The ids as Python ints. Raises ValueError for one out of range, TypeError for no integer."""
        ids = [as_int(i) for i in ids]
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"token id {wrong} is not in this vocabulary, whose ids run from 0 to "
                f"{self.vocab_size - 1}; decode with the tokenizer that the ids were made with"
            )
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of the ids (ints, an array, a 1-D tensor). Bytes that are not UTF-8 become U+FFFD. Special
        tokens are left out, or spelled like `<|eos|>` with keep_special. Raises ValueError for an id out of
        range."""
        ids = self.checked(ids.tolist() if hasattr(ids, "tolist") else ids)
        return self.encoding.decode(
            [i for i in ids if keep_special or i < self.bos_id], errors="replace"
        )

    def token_text(self, token_id: int) -> str:
        """One token as a reader should see it: a special token spelled, a part of a character as `\\xe2`."""
        [token_id] = self.checked([token_id])
        return self.encoding.decode_single_token_bytes(token_id).decode(
            "utf-8", errors="backslashreplace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, none for a special one; they may be a part of a character."""
        return b"" if token_id >= self.bos_id else self.encoding.decode_single_token_bytes(token_id)

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that the ids stand for, none for special tokens: the divisor of bits per byte. The
        ids may begin or end inside a character. Raises ValueError for an id out of range."""
        ids = np.asarray(ids, np.int64)
        if ids.size:
            self.checked([ids.min(), ids.max()])
        return int(self.n_bytes_V[ids].sum())

    # Into a checkpoint and back

    def to_dict(self) -> dict:
        """All that makes this tokenizer, fit for JSON; `from_dict` gives the same tokenizer back."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "pattern": self.pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Tokenizer":
        """The tokenizer that `to_dict` wrote. Raises ValueError for another format or damaged data."""
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise ValueError(
                f"tokenizer data has format {version!r}, expected {FORMAT}; it was written by "
                "another version of r1zero, or it is no tokenizer"
            )
        kind, pattern, special = data.get("kind"), data.get("pattern"), data.get("special_tokens")
        if (
            not isinstance(kind, str)
            or not isinstance(pattern, str)
            or special != list(SPECIAL_TOKENS)
        ):
            raise ValueError(
                f"tokenizer data is damaged: kind {kind!r}, pattern {pattern!r}, special tokens "
                f"{special!r}, expected two texts and {list(SPECIAL_TOKENS)}; use another "
                "checkpoint"
            )
        try:
            return cls(
                kind, pattern, [base64.b64decode(token, validate=True) for token in data["ranks"]]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"tokenizer data is damaged ({error!r}); its ranks must be base64 texts with "
                "all 256 single bytes; use another checkpoint"
            ) from None

    def fingerprint(self) -> str:
        """16 hex digits that differ when pattern or ranks do: compare them before mixing data and models."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
