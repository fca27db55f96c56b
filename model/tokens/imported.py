"""Tokenizers of open models: what all that come from a tokenizer.json have in common.

    ByteLevelBPE         most of them, by tiktoken (see byte_level_bpe.py)
    LibraryTokenizer     the others, by the library `tokenizers` (see library.py)

Ids are the file's. They may have holes, which a model can sample: they read as U+FFFD. Added tokens
may stand among the ordinary ones, and merges may even make one: `encode` refuses a text in which
they would. A byte may have no token at all: `encode` refuses a text that has one, `encode_template`
drops it with a warning, as Hugging Face does without a word. An added token of white space only is
ordinary text.

Nothing of tokenizer.json is lost: a checkpoint keeps it whole, and an export writes it again.
"""

import base64
import hashlib
import json
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property

from ..tokenizer import FORMAT, SINGLE_BYTES, Tokenizer, without_surrogates
from .added_tokens import AddedToken, AddedTokens

LOST = -1  # in place of an id: what has no token, or none that the text may have


@dataclass(frozen=True)
class Settings:
    """What a folder says of a tokenizer outside tokenizer.json."""

    vocab_size: int
    """Rows of the model's embedding."""
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    pad_id: int | None = None
    """Not used here: batches are flat. It is kept for whoever loads an export."""
    unk_id: int | None = None
    """Nor this one: what has no token is refused."""


class ImportedTokenizer(Tokenizer):
    """A tokenizer.json and its settings. Build one by `read_tokenizer` (see json_file.py).

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
        self.pad_id, self.unk_id = settings.pad_id, settings.unk_id

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
        self.control_ids = {t.id for t in tokens if not t.is_blank}
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

    def _encode_pieces(self, pieces: Iterable[AddedToken | str]) -> list[int]:
        """Ids of added tokens and of the texts between them; LOST for a byte without a token."""
        ids = []
        for piece in pieces:
            ids += self._encode_ordinary(piece) if isinstance(piece, str) else [piece.id]
        return ids

    def typed_ids(self, text: str) -> list[int]:
        """Ids of what somebody wrote; LOST for a byte without a token, and for a control token.

        No control token is looked for, but one that stands in the vocabulary may come of merges.
        """
        ids = self._encode_pieces(self.blank.split(without_surrogates(text)))
        if self.control_ids.isdisjoint(ids):
            return ids
        return [LOST if i in self.control_ids else i for i in ids]

    def template_ids(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are spelled; LOST for a byte without a token."""
        return self._encode_pieces(self.added.split(without_surrogates(text)))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, never a control token; the caller adds bos and eos.

        `decode` returns the normalised text. Raises ValueError for a text with a byte that has no
        token, and for one whose merges end in a control token.
        """
        ids = self.typed_ids(text)
        if LOST in ids:
            raise ValueError(
                f"the text {text[:40]!r} cannot be encoded: this model has no token for "
                f"{self._without_token(text)}; take these characters out"
            )
        return ids

    def _without_token(self, text: str) -> str:
        """What of a text cannot be encoded, in words."""
        present = set(self.bytes_of_id)
        missing = [b for b in SINGLE_BYTES if b not in present]
        if not any(b in without_surrogates(text).encode() for b in missing):
            return "a word of it but a control token, which nobody types"
        return f"{len(missing)} bytes such as {', '.join(f'0x{b.hex()}' for b in missing[:4])}"

    def encode_template(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are spelled, as Hugging Face's tokenizers encode it.

        No bos is put in front. Bytes that have no token are dropped; the first time that happens a
        warning says so. Never use this on what a user wrote (see `control_tokens_in`).
        """
        ids = self.template_ids(text)
        kept = [i for i in ids if i != LOST]
        if len(kept) < len(ids) and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"tokenizer: {len(ids) - len(kept)} bytes of a text have no token and were "
                f"dropped, as by Hugging Face: it has none for {self._without_token(text)}",
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
