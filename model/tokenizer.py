"""Tokenizer: text to token ids and back, on bytes, so that every text has tokens.

    Tokenizer.bytes()                           256 bytes and 2 special tokens
    Tokenizer.from_words(["10", " -> "])        bytes, and whole words as one token each: toy tasks
    Tokenizer.from_ranks_file("gpt2.tiktoken")  ranks that somebody else made
    Tokenizer.train(texts, 1024)                BPE of your own text, by the library `tokenizers`
    read_tokenizer(folder)                      that of an open model (see tokens/json_file.py)

Each is a tiktoken `Encoding`. A pattern cuts the text into pieces; inside a piece the neighbouring
pair with the lowest rank is merged first. A piece that is a rank itself is that token at once.

Ids 0 .. n-1 are the ranks. Special tokens have ids above; without others they are `<|bos|>` = n and
`<|eos|>` = n + 1. A document or a response ends with `eos_id`; sampling stops at any of `eos_ids`.

There are two ways to encode. `encode` is for what somebody wrote: no text makes a control token,
what spells `<|eos|>` is ordinary text. `encode_template` is for text that a program composed, as a
chat template does: there `<|eos|>` is the token. Both are the same on any other text.

The vocabulary may be larger than the ids that mean something, as in models whose embedding is
padded to a round number. Such an id reads as U+FFFD. An open model never samples those from `n_ids`
on (ModelConfig.vocab_in_use); it can sample one that lies between the ids of tokens, a hole.

Left out: normalisation, except in open models that need it (it breaks the round trip), a pad or
unknown token (batches are flat, and every byte is a token).
"""

import base64
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

from .tokens.added_tokens import AddedToken, AddedTokens
from .tokens.byte_letters import from_letters
from .tokens.ranks_file import read_ranks
from .tokens.split_pattern import ANY_CHARACTER, GPT2_PATTERN

FORMAT = 1  # of to_dict
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>")  # of a tokenizer that is given no others
UNKNOWN = "\ufffd".encode()  # what an id without a meaning reads as
SINGLE_BYTES = [bytes([b]) for b in range(256)]

MAX_TRAINED_VOCAB = 1_000_000  # more is a typing mistake
MAX_WORD_BYTES = 50_000  # of all words; from about 80,000 the regex engine is 1,000 times slower
LONG_TEXT = 10_000  # characters; giving a shorter text to a thread costs more than encoding it

# GPT-2's `\s+(?!\S)` overflows the regex engine's stack at 1,000,000 white-space characters in a
# row. tiktoken then panics, and `except Exception` does not catch that. So such a run is cut into
# parts. The look-behind keeps the search linear.
LONGEST_SPACE = 100_000
LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE}}}")


# ---- helpers ----


def safe_parts(text: str) -> Iterator[str]:
    """Cut `text` so that no part holds more than LONGEST_SPACE white-space characters in a row."""
    while len(text) > LONGEST_SPACE and (found := LONG_SPACE.search(text)):
        yield text[: found.end()]
        text = text[found.end() :]
    yield text


def without_surrogates(text: str) -> str:
    """Join surrogate pairs. A lone surrogate is no character; it becomes U+FFFD, as in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- the tokenizer ----


def default_ids(n_ranks: int) -> dict:
    """The ids above the ranks of a tokenizer that is given no others."""
    bos_id, eos_id = n_ranks, n_ranks + 1
    return {
        "special_tokens": dict(zip(SPECIAL_TOKENS, (bos_id, eos_id), strict=True)),
        "eos_ids": [eos_id],
        "bos_id": bos_id,
        "vocab_size": n_ranks + len(SPECIAL_TOKENS),
    }


def _check_ranks(ranks: list[bytes]) -> None:
    """Raise ValueError if a rank is empty or double, or a single byte has none."""
    distinct = set(ranks)
    missing = [b for b in range(256) if SINGLE_BYTES[b] not in distinct]
    if missing:
        raise ValueError(
            f"tokenizer: {len(missing)} of the 256 single bytes have no rank (the first is "
            f"byte {missing[0]}), so some text would have no tokens; add a rank for each"
        )
    if b"" in distinct or len(distinct) < len(ranks):
        raise ValueError(
            f"tokenizer: of {len(ranks)} ranks some are empty or double; each token stands once"
        )


class Tokenizer:
    """Ranks, a pattern, special tokens and a size. Build one by a class method (see the top).

    kind: "bytes", "words" or "bpe". ranks: the ordinary tokens as bytes; a token's index is its id.
    special_tokens: {name: id}. bos_id: None if there is none. eos_ids: the ids that end a text;
    eos_id is the first. vocab_size: all ids, also those that mean nothing. n_ids: the highest id
    that means something, and 1. added: the added tokens, special or not.
    """

    adds_bos = False
    """Does a prompt of the model begin with bos_id?"""
    chat_template: str | None = None
    """A jinja template of conversations, if the model has one."""
    pad_id: int | None = None
    unk_id: int | None = None

    def __init__(
        self,
        kind: str,
        pattern: str,
        ranks: Sequence[bytes],
        *,
        special_tokens: dict[str, int] | None = None,
        eos_ids: Sequence[int] | None = None,
        bos_id: int | None = None,
        vocab_size: int | None = None,
    ):
        """pattern: cuts a text into pieces; it must match every character, or text would be lost.

        special_tokens: None is `<|bos|>` and `<|eos|>`, right after the ranks; with others, give
        eos_ids (and bos_id) too. vocab_size: None is the highest id + 1.
        Raises ValueError if these do not fit together, or the pattern is no regular expression.
        """
        ranks = list(ranks)
        _check_ranks(ranks)
        if special_tokens is None:
            default = default_ids(len(ranks))
            special_tokens, bos_id = default["special_tokens"], default["bos_id"]
            eos_ids = default["eos_ids"] if eos_ids is None else eos_ids
        if vocab_size is None:
            vocab_size = 1 + max([len(ranks) - 1, *special_tokens.values()])
        self.kind = kind
        self.pattern = pattern
        self.ranks = ranks
        self.special_tokens = {name: as_int(i) for name, i in special_tokens.items()}
        self.eos_ids = tuple(as_int(i) for i in eos_ids or ())
        self.bos_id = bos_id
        self.vocab_size = vocab_size
        self._check_ids()

        self.eos_id = self.eos_ids[0]
        self.encoding = tiktoken.Encoding(
            f"r1zero-{kind}",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self.special_tokens,
        )
        added = [AddedToken(i, name) for name, i in self.special_tokens.items()]
        self._set_meanings(dict(enumerate(ranks)), AddedTokens(added))

    def _set_meanings(self, token_of_id: dict[int, bytes], added: AddedTokens) -> None:
        """What each id reads as: special tokens as nothing, ids without a meaning as U+FFFD.

        token_of_id: the ordinary tokens. added: the others.
        """
        self.added = added
        self.name_of_special = {t.id: t.content for t in added.tokens if t.special}
        shown = {t.id: t.content.encode() for t in added.tokens if not t.special}
        meanings = token_of_id | shown | dict.fromkeys(self.name_of_special, b"")

        self.n_ids = 1 + max(meanings)
        self.meaningless = set(range(self.vocab_size)) - meanings.keys()
        self.bytes_of_id = [meanings.get(i, UNKNOWN) for i in range(self.vocab_size)]
        self.n_bytes_V = np.array([len(token) for token in self.bytes_of_id])

    def _check_ids(self) -> None:
        """Raise ValueError unless special tokens have ids of their own, and bos and eos exist."""
        n_ranks, ids = len(self.ranks), list(self.special_tokens.values())
        if self.vocab_size < n_ranks:
            raise ValueError(
                f"tokenizer: vocab_size is {self.vocab_size}, but there are {n_ranks} ranks; "
                "expected as many or more"
            )
        if len(set(ids)) < len(ids) or not all(n_ranks <= i < self.vocab_size for i in ids):
            raise ValueError(
                f"tokenizer: special tokens are {self.special_tokens}; expected ids that differ, "
                f"from {n_ranks} (the ranks are below) to {self.vocab_size - 1} (vocab_size is "
                f"{self.vocab_size})"
            )
        known = set(ids) | set(range(n_ranks))
        if not self.eos_ids or not known.issuperset(self.eos_ids):
            raise ValueError(
                f"tokenizer: eos_ids are {list(self.eos_ids)}; expected one or more ids of tokens, "
                "or no text ever ends"
            )
        if self.bos_id is not None and self.bos_id not in known:
            raise ValueError(
                f"tokenizer: bos_id is {self.bos_id}, which is no token; expected an id or None"
            )

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    # Four ways to get one

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Each byte is a token, and its id is the byte."""
        return cls("bytes", ANY_CHARACTER, SINGLE_BYTES)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Tokenizer":
        """Each word is one token wherever it occurs, the longest first ("12" before "1").

        All other text is bytes. Ids follow the order of `words`, from 256. A word of one byte ("3",
        "+") is that byte's token already.
        Raises ValueError for an empty, double or special word, and above 50,000 bytes of words.
        """
        if isinstance(words, str):
            raise ValueError(f"from_words: got one string {words[:40]!r}; give a list of words")
        words = list(words)
        for i, word in enumerate(words):
            refused = not isinstance(word, str) or word in ("", *SPECIAL_TOKENS)
            if refused or word != without_surrogates(word):
                raise ValueError(
                    f"from_words: word {i} is {word!r}; a word is text, not empty, and none of "
                    f"{', '.join(SPECIAL_TOKENS)}"
                )
        for word, count in Counter(words).most_common(1):
            if count > 1:
                raise ValueError(
                    f"from_words: {word!r} is given {count} times; give each word once"
                )

        # A word of one byte has a rank already.
        longer = [word for word in words if len(word.encode()) > 1]
        size = sum(len(word.encode()) for word in longer)
        if size > MAX_WORD_BYTES:
            raise ValueError(
                f"from_words: the words have {size} bytes in all, over {MAX_WORD_BYTES}, and "
                "encoding would crawl; use fewer words or Tokenizer.train"
            )

        # A piece is a word or one character, and no part of a character is a word, so nothing else
        # can merge.
        choices = [re.escape(word) for word in sorted(longer, key=len, reverse=True)]
        pattern = "|".join([*choices, ANY_CHARACTER])
        return cls("words", pattern, SINGLE_BYTES + [word.encode() for word in longer])

    @classmethod
    def from_ranks_file(cls, path: str | Path, pattern: str = GPT2_PATTERN) -> "Tokenizer":
        """The ranks of a .tiktoken file. pattern: the one that they were trained with.

        Raises ValueError for anything that is no such file (see `read_ranks`), or lacks a byte.
        """
        ranks = read_ranks(path)
        try:
            return cls("bpe", pattern, ranks)
        except ValueError as error:
            raise ValueError(f"ranks file {path}: {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE after GPT-2's split (Sennrich et al. 2016, arXiv 1508.07909).

        The most frequent pair becomes a token, again and again. A short text gives a smaller
        vocabulary. The same texts give the same tokenizer.
        vocab_size: includes the 256 bytes and the 2 special tokens.
        Raises ValueError without the optional library `tokenizers`, without text, and for a size
        out of range.
        """
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
                "training a BPE needs the library `tokenizers`: pip install tokenizers, or use "
                "--tokenizer bytes or a .tiktoken ranks file"
            ) from None
        # This pre-tokenizer splits as GPT2_PATTERN does.
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        library.train_from_iterator(texts, trainer)

        # Its ids are ranks: first the 256 letters, then the merges in order.
        id_of_token = library.get_vocab()
        by_rank = sorted(id_of_token, key=id_of_token.__getitem__)
        return cls("bpe", GPT2_PATTERN, [from_letters(token) for token in by_rank])

    # Text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never a control token; the caller adds bos and eos.

        `decode` returns the same text, except that a lone surrogate (no character) becomes U+FFFD.
        """
        return self._encode_ordinary(text)

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are spelled, as Hugging Face's tokenizers encode it.

        No bos is put in front. Never use it on what a user wrote (see `control_tokens_in`).
        """
        ids = []
        for piece in self.added.split(text):
            ids += self._encode_ordinary(piece) if isinstance(piece, str) else [piece.id]
        return ids

    def control_tokens_in(self, text: str) -> list[str]:
        """The control tokens that `encode_template` would find in a text, each once."""
        pieces = self.added.split(without_surrogates(text))
        found = [piece.content for piece in pieces if isinstance(piece, AddedToken)]
        blank = {token.content for token in self.added.tokens if token.is_blank}
        return [content for content in dict.fromkeys(found) if content not in blank]

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        parts = [self.encoding.encode_ordinary(part) for part in safe_parts(text)]
        return parts[0] if len(parts) == 1 else [i for part in parts for i in part]

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text. num_threads: None is one per core if the texts are long."""
        if num_threads is None:
            long = sum(map(len, texts)) >= LONG_TEXT * len(texts)
            num_threads = min(os.cpu_count() or 1, len(texts)) if long else 1
        if num_threads <= 1:
            return [self.encode(text) for text in texts]
        # tiktoken releases Python's lock while it encodes
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    # Ids to text

    def checked(self, ids: Iterable[int]) -> list[int]:
        """The ids as Python ints. Raises ValueError for one out of range, TypeError for no int."""
        ids = [as_int(i) for i in ids]
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"token id {wrong} is not in this vocabulary, whose ids run from 0 to "
                f"{self.vocab_size - 1}; decode with the tokenizer that the ids were made with"
            )
        return ids

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of the ids (ints, an array, a 1-D tensor).

        Special tokens are left out, or spelled like `<|eos|>` with keep_special. Bytes that are not
        UTF-8, and ids below vocab_size that are no token, become U+FFFD.
        Raises ValueError for an id out of range.
        """
        ids = self.checked(ids.tolist() if hasattr(ids, "tolist") else ids)
        pieces = [self.bytes_of_id[i] for i in ids]
        if keep_special:
            for n, i in enumerate(ids):
                if i in self.name_of_special:
                    pieces[n] = self.name_of_special[i].encode()
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        """One token as a reader should see it.

        A special token is spelled, a part of a character is `\\xe2`, an id that is no token is
        `<|300|>`.
        """
        [token_id] = self.checked([token_id])
        if token_id in self.name_of_special:
            return self.name_of_special[token_id]
        if token_id in self.meaningless:
            return f"<|{token_id}|>"
        return self.bytes_of_id[token_id].decode("utf-8", errors="backslashreplace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; they may be a part of a character.

        No bytes for a special token, U+FFFD's for an id that is no token. Raises ValueError for an
        id out of range.
        """
        [token_id] = self.checked([token_id])
        return self.bytes_of_id[token_id]

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text of the ids, as `token_bytes` counts: the divisor of bits per byte.

        The ids may start or end inside a character. Raises ValueError for an id out of range.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size:
            self.checked([ids.min(), ids.max()])
        return int(self.n_bytes_V[ids].sum())

    # Into a checkpoint and back

    def to_dict(self) -> dict:
        """All that makes this tokenizer, fit for JSON; `from_dict` returns the same tokenizer.

        "ids" is there only if special tokens or sizes are not the default ones.
        """
        data = {
            "format": FORMAT,
            "kind": self.kind,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
        }
        ids = {
            "special_tokens": self.special_tokens,
            "eos_ids": list(self.eos_ids),
            "bos_id": self.bos_id,
            "vocab_size": self.vocab_size,
        }
        if ids != default_ids(len(self.ranks)):
            data["ids"] = ids
        return data

    @classmethod
    def from_dict(cls, data: dict) -> "Tokenizer":
        """The tokenizer that `to_dict` wrote. Raises ValueError for anything else."""
        if isinstance(data, dict) and data.get("kind") == "imported":
            from .tokens.json_file import tokenizer_from_dict  # it imports this module

            return tokenizer_from_dict(data)
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise ValueError(
                f"tokenizer data has format {version!r}, expected {FORMAT}; it was written by "
                "another version of r1zero, or it is no tokenizer"
            )
        kind, pattern, names = data.get("kind"), data.get("pattern"), data.get("special_tokens")
        texts = isinstance(kind, str) and isinstance(pattern, str)
        if not texts or ("ids" not in data and names != list(SPECIAL_TOKENS)):
            raise ValueError(
                f"tokenizer data is damaged: kind {kind!r}, pattern {pattern!r}, special tokens "
                f"{names!r}, expected two texts and {list(SPECIAL_TOKENS)}; use another "
                "checkpoint"
            )
        try:
            ranks = [base64.b64decode(token, validate=True) for token in data["ranks"]]
            return cls(kind, pattern, ranks, **data.get("ids", {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"tokenizer data is damaged ({error!r}); its ranks must be base64 texts with "
                "all 256 single bytes; use another checkpoint"
            ) from None

    def fingerprint(self) -> str:
        """16 hex digits of everything in `to_dict`: compare them before mixing data and models."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
