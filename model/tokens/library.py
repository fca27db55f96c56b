"""Tokenizers that tiktoken cannot imitate, by the library `tokenizers` itself (r1zero[bpe]).

They are mostly SentencePiece's BPE (Llama 2, Mistral, Gemma): characters are merged instead of
bytes, `▁` stands for a space, and a character without a token becomes bytes, written `<0x0A>`. Many
put a space in front of a text, and then `decode` returns it too.

What a person typed never becomes a control token here either: `encode` uses a second copy that
knows no added tokens.
"""

import json
import re

from ..tokenizer import without_surrogates
from .byte_letters import from_letters
from .imported import LOST, ImportedTokenizer, Settings
from .split_pattern import stages

SPACE = "\u2581"  # ▁
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def load(source: dict):
    """The library's tokenizer of a tokenizer.json's content.

    Raises ValueError if the library is not installed or refuses it.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError(
            "this needs the library `tokenizers`: pip install tokenizers (or r1zero[bpe])"
        ) from None
    try:
        library = Library.from_str(json.dumps(source))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"the library `tokenizers` refuses it: {error}") from None
    library.no_truncation()
    library.no_padding()
    return library


class LibraryTokenizer(ImportedTokenizer):
    """A BPE of any kind. Raises ValueError without the library, or if it refuses the file."""

    engine = "library"

    def __init__(self, source: dict, settings: Settings):
        kinds = {stage["type"] for stage in stages(source.get("pre_tokenizer"))}
        self._is_byte_level = "ByteLevel" in kinds
        self.library = load(source)
        super().__init__(source, settings)

        blank = {token.id for token in self.blank.tokens}
        kept = [token for token in source.get("added_tokens", []) if token["id"] in blank]
        self._plain = load(source | {"added_tokens": kept})

        # Ids that no text of a user may have: control tokens, and the one that stands for anything.
        self._unknown = source["model"]["vocab"].get(source["model"].get("unk_token"))
        self._refused = self.control_ids | {self._unknown}

    def _token_bytes(self, text: str) -> bytes:
        if self._is_byte_level:
            try:
                return from_letters(text)
            except ValueError:
                return text.encode()
        byte = BYTE.fullmatch(text)
        if byte and self.source["model"].get("byte_fallback"):
            return bytes([int(byte[1], 16)])
        return text.replace(SPACE, " ").encode()

    def normalise(self, text: str) -> str:
        if self.library.normalizer is None:
            return text
        normalised = self.library.normalizer.normalize_str(text)
        return normalised if self._is_byte_level else normalised.replace(SPACE, " ")

    def typed_ids(self, text: str) -> list[int]:
        """Ids of what somebody wrote; LOST for a control token and for the unknown one."""
        text = without_surrogates(text)
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if SPACE in text and not self._is_byte_level:
            return [LOST] * len(ids)  # ▁ would read as a space
        return [LOST if i in self._refused else i for i in ids]

    def template_ids(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are spelled. The library leaves no gaps."""
        return self.library.encode(without_surrogates(text), add_special_tokens=False).ids

    def _without_token(self, text: str) -> str:
        return f"some character of it, or {SPACE}, which would read as a space"

    def control_tokens_in(self, text: str) -> list[str]:
        """The control tokens that `encode_template` would find in a text, each once."""
        found = set(self.template_ids(text))
        found -= {token.id for token in self.blank.tokens}
        # The unknown token also stands for characters that have no other.
        tokens = [t for t in self.added.tokens if t.id in found]
        return [t.content for t in tokens if t.id != self._unknown or t.content in text]
