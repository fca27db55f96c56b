"""Tokenizers of open models: what a tokenizer.json says, as tiktoken does it.

    ImportedTokenizer    what all of them have in common
    ByteLevelBPE         byte-level BPE (Qwen, Llama 3, DeepSeek, OLMo, SmolLM2, GPT-NeoX): tiktoken
    LibraryTokenizer     any other BPE, by the library `tokenizers` (see tokenizer_library.py)

Ids are the file's. They have holes, and added tokens may stand among the ordinary ones. A byte may
have no token at all: `encode` refuses a text that has one, `encode_template` drops it with a
warning, as Hugging Face does without a word. An added token of white space only is ordinary text.

Nothing of the file is lost: a checkpoint keeps the whole of it, and an export writes it again.
"""

import base64
import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

import tiktoken

from .added_tokens import AddedToken, AddedTokens
from .byte_letters import BYTE_OF_LETTER, LETTER_OF_BYTE, from_letters
from .nfc import to_nfc
from .split_pattern import Inexpressible, split_pattern
from .tokenizer import FORMAT, SINGLE_BYTES, Tokenizer, safe_parts, without_surrogates

LOST = -1  # in place of an id: a byte that has no token


@dataclass(frozen=True)
class Settings:
    """What a folder says of a tokenizer outside tokenizer.json."""

    vocab_size: int
    """Rows of the model's embedding."""
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None


class ImportedTokenizer(Tokenizer):
    """A tokenizer.json and its settings. Build one by `read_tokenizer` (see tokenizer_json.py).

    source: the content of tokenizer.json.
    Raises ValueError for ids that do not fit together.
    """

    engine = "tiktoken"
    """What does the work; a checkpoint says it."""

    def __init__(self, source: dict, settings: Settings):
        self.source, self.settings = source, settings
        self.kind = "imported"
        self.vocab_size, self.bos_id = settings.vocab_size, settings.bos_id
        self.eos_ids, self.eos_id = settings.eos_ids, settings.eos_ids[0]
        self.adds_bos, self.chat_template = settings.adds_bos, settings.chat_template

        tokens = added_tokens(source)
        self.special_tokens = {t.content: t.id for t in tokens if t.special}
        ids_of_added = {t.id for t in tokens}
        token_of_id = {
            i: self._token_bytes(text)
            for text, i in source["model"]["vocab"].items()
            if i not in ids_of_added
        }
        self._set_meanings(token_of_id, AddedTokens(tokens, self.normalise))
        self.blank = AddedTokens([t for t in tokens if t.is_blank], self.normalise)
        self._check_imported()
        self._has_warned = False

    def _check_imported(self) -> None:
        """Raise ValueError if the model has too few rows, or bos or an eos is no token."""
        if self.n_ids > self.vocab_size:
            raise ValueError(
                f"tokenizer: its ids run to {self.n_ids - 1}, but the model has {self.vocab_size} "
                "rows (vocab_size); this tokenizer belongs to another model"
            )
        named = {"bos_token_id": [self.bos_id], "eos_token_id": self.eos_ids}
        for name, ids in named.items():
            wrong = [i for i in ids if i is not None and i not in self.known_ids]
            if wrong:
                raise ValueError(
                    f"tokenizer: {name} is {wrong[0]}, which is no token of it; expected an id "
                    f"below {self.n_ids}; look at generation_config.json and config.json"
                )
        if self.adds_bos and self.bos_id is None:
            raise ValueError(
                "tokenizer: prompts begin with bos, but there is none; give bos_token in "
                "tokenizer_config.json"
            )

    @cached_property
    def known_ids(self) -> set[int]:
        return set(range(self.vocab_size)) - self.meaningless

    # What the kinds differ in

    def _token_bytes(self, text: str) -> bytes:
        """The bytes of a token, from how the vocabulary writes it."""
        raise NotImplementedError

    def normalise(self, text: str) -> str:
        return text

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a normalised text without added tokens; LOST for a byte that has none."""
        raise NotImplementedError

    # Text to ids

    def ids_with_gaps(self, added: AddedTokens, text: str) -> list[int]:
        """Ids of a text in which some added tokens are looked for; LOST for a byte without one."""
        ids = []
        for piece in added.split(without_surrogates(text)):
            ids += self._encode_ordinary(piece) if isinstance(piece, str) else [piece.id]
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never a control token; the caller adds bos and eos.

        `decode` returns the normalised text. Raises ValueError for a text with a byte that has no
        token.
        """
        ids = self.ids_with_gaps(self.blank, text)
        if LOST in ids:
            raise ValueError(
                f"the text {text[:40]!r} cannot be encoded: this model has no token for "
                f"{self._without_token()}; take these characters out"
            )
        return ids

    def _without_token(self) -> str:
        """What cannot be encoded, in words."""
        present = set(self.bytes_of_id)
        missing = [f"0x{b.hex()}" for b in SINGLE_BYTES if b not in present]
        return f"{len(missing)} bytes such as {', '.join(missing[:4])}"

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are spelled, as Hugging Face's tokenizers encode it.

        No bos is put in front. Bytes that have no token are dropped; the first time that happens a
        warning says so. Never use it on what a user wrote (see `control_tokens_in`).
        """
        ids = self.ids_with_gaps(self.added, text)
        kept = [i for i in ids if i != LOST]
        if len(kept) < len(ids) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"tokenizer: {len(ids) - len(kept)} bytes of a text have no token and were "
                f"dropped, as by Hugging Face: it has none for {self._without_token()}",
                stacklevel=2,
            )
        return kept

    # Into a checkpoint and back

    @cached_property
    def _canonical(self) -> str:
        """The tokenizer.json as one text, whatever the order and layout of the file."""
        return json.dumps(self.source, sort_keys=True, separators=(",", ":"))

    @cached_property
    def _packed(self) -> str:
        return base64.b64encode(zlib.compress(self._canonical.encode())).decode()

    def to_dict(self) -> dict:
        """All that makes this tokenizer, fit for JSON; `Tokenizer.from_dict` reads it."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "engine": self.engine,
            "tokenizer_json": self._packed,
            "settings": asdict(self.settings) | {"eos_ids": list(self.eos_ids)},
        }

    @cached_property
    def _fingerprint(self) -> str:
        # The packed text would do, but another zlib may pack otherwise.
        whole = json.dumps([self._canonical, asdict(self.settings)], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        return self._fingerprint


def added_tokens(source: dict) -> list[AddedToken]:
    """The added tokens of a tokenizer.json."""
    names = ("id", "content", "special", "normalized", "lstrip", "rstrip")
    return [
        AddedToken(**{name: token[name] for name in names})
        for token in source.get("added_tokens", [])
        if token["content"]
    ]


# ---- byte-level BPE by tiktoken ----


def merge_pairs(model: dict) -> list[tuple[str, str]]:
    """The merges of a BPE; files write them as "a b" or as ["a", "b"]."""
    return [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]


def _merged(token: str, rank_of_pair: dict) -> list[str]:
    """BPE of one token: merge the neighbouring pair of the lowest rank until none is left."""
    parts = list(token)
    while len(parts) > 1:
        pairs = zip(parts[:-1], parts[1:], strict=True)
        ranks = [rank_of_pair.get(pair, len(rank_of_pair)) for pair in pairs]
        lowest = min(ranks)
        if lowest == len(rank_of_pair):
            break
        i = ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def check_merges(model: dict) -> None:
    """Raise `Inexpressible` unless tiktoken merges as the pairs of the file say.

    tiktoken merges any two neighbours whose joint text is a token, the lowest token first. That is
    the same if each token can be reached in one way only, or if all ways to cut it are merges.
    """
    vocab, pairs = model["vocab"], merge_pairs(model)
    rank_of_pair = {pair: rank for rank, pair in enumerate(pairs)}
    for token in dict.fromkeys(left + right for left, right in pairs):
        if _merged(token, rank_of_pair) == [token]:
            continue
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        possible = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        if not model.get("ignore_merges") or not all(cut in rank_of_pair for cut in possible):
            raise Inexpressible(f"its merges do not lead to their token {token!r}")


def ordered_tokens(model: dict, added: Iterable[str]) -> list[str]:
    """The tokens that merging makes, in the order in which it makes them.

    added: contents of the added tokens, which may stand in the vocabulary too.
    Raises `Inexpressible` if a token has no one place in that order.
    """
    # A token that is made by several merges must be made by neighbours in the list.
    ordered = []
    for left, right in merge_pairs(model):
        if not ordered or ordered[-1] != left + right:
            ordered.append(left + right)
    if len(set(ordered)) < len(ordered):
        raise Inexpressible("its merges make one token at two places of their order")

    # With ignore_merges a whole piece is a token even where no merge makes it.
    if model.get("ignore_merges"):
        others = model["vocab"].keys() - set(ordered) - BYTE_OF_LETTER.keys() - set(added)
        if others and ordered:
            raise Inexpressible(f"no merge makes its token {min(others)!r}")
        ordered += sorted(others, key=model["vocab"].__getitem__)
    return ordered


def refuse_other_models(source: dict) -> None:
    """Raise `Inexpressible` for anything but a plain byte-level BPE."""
    model = source["model"]
    given = {
        "byte_fallback (SentencePiece)": model.get("byte_fallback"),
        "a continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "an end_of_word_suffix": model.get("end_of_word_suffix"),
        "dropout": model.get("dropout"),
        "an unknown token": model.get("unk_token"),
        "an added token for single words": any(
            token["single_word"] for token in source.get("added_tokens", [])
        ),
    }
    for name, value in given.items():
        if value:
            raise Inexpressible(f"it has {name}")


def normalisers(normalizer: dict | None) -> list[str]:
    """The types of the normalisers, sequences opened."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer["type"]]
    return [kind for part in normalizer["normalizers"] for kind in normalisers(part)]


class ByteLevelBPE(ImportedTokenizer):
    """Byte-level BPE as one tiktoken `Encoding`.

    Raises `Inexpressible`, which names what tiktoken cannot do.
    """

    def __init__(self, source: dict, settings: Settings):
        # 1. What is done to the text before it is split.
        kinds = set(normalisers(source.get("normalizer")))
        if kinds - {"NFC"}:
            raise Inexpressible(f"its normalizer is {', '.join(sorted(kinds))}")
        self._is_nfc = bool(kinds)
        refuse_other_models(source)
        super().__init__(source, settings)

        # 2. The ranks: all bytes, those without a token too, since tiktoken would panic at them;
        #    then the tokens as merging makes them. An id is no rank.
        vocab = source["model"]["vocab"]
        added = [token.content for token in self.added.tokens]
        ordered = ordered_tokens(source["model"], added)
        self.ranks = SINGLE_BYTES + [from_letters(token) for token in ordered]
        self._id_of_rank = [vocab.get(LETTER_OF_BYTE[b], LOST) for b in range(256)]
        self._id_of_rank += [vocab[token] for token in ordered]

        # 3. The split, and no special tokens: they are looked for before.
        self.pattern = split_pattern(source.get("pre_tokenizer"))
        self.encoding = tiktoken.Encoding(
            "r1zero-imported",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens={},
        )

    def _token_bytes(self, text: str) -> bytes:
        try:
            return from_letters(text)
        except KeyError:
            return text.encode()  # the library decodes it so

    def normalise(self, text: str) -> str:
        return to_nfc(text) if self._is_nfc else text

    def _encode_ordinary(self, text: str) -> list[int]:
        id_of_rank = self._id_of_rank
        return [
            id_of_rank[rank]
            for part in safe_parts(text)
            for rank in self.encoding.encode_ordinary(part)
        ]
