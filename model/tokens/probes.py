"""Probe texts: a tokenizer that was read is tried on them before it is used.

Each must come back from its tokens. Where the library `tokenizers` is installed, each must have the
ids that it gives.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from .imported import LOST, ImportedTokenizer
from .library import load

PROBES = (
    "",
    "Hello world's 123!? It'll  cost $1,234.56\n\n\tThe  END   ",
    "def f(x):\n    if x >= 10:\r\n        return x**2  # naïve\n\n\n",
    "1 + 2 = 3; 12345678901 3/4 x^{10} \\boxed{42} ½ ² 一二三 ٣٤",
    "I'M WE'RE it'S don't 'sure ' s \u2019s \u017f",
    "日本語のテキスト 中文字符123 한국어 ภาษาไทย हिन्दी עברית العربية Ελληνικά Русский",
    "é e\u0301 ü u\u0308 \u1e9b\u0323 Å A\u030a >\u0338 \uac00\u11a8",
    "😀🏽👩\u200d👩\u200d👧 \U0001f1e9\U0001f1ea \ufe0f \u200b \ufeff \u00ad",
    "\x00 \x04\x06 a\x04b \x1b[0m \x7f \x85 \u2028 \u3000 \u00a0",
    "x  12   345 =  6    中文  字 カ12 \u0378\u0378  \x00\x00a  !  1é",
    "a     b  c   d\t\te \n\n \n x",
    "<think>\n1 < 2\n</think> <answer>3</answer> <|im_start|>user <|eot_id|>",
    "<s> </s> [INST] <0x0A> <｜User｜> <|endoftext|>",
    "https://example.org/a_b-c?d=e&f=%20 foo@bar.com #tag @name C++ C# .NET",
)
MAX_PROBED_TOKENS = 300  # of the added tokens, and of the vocabulary


def _spread(items: Iterable, most: int) -> list:
    """At most so many of some items, evenly spread."""
    items = list(items)
    return items[:: -(-len(items) // most) or 1]


def probe_texts(tokenizer: ImportedTokenizer) -> Iterator[str]:
    """Texts on which a wrong tokenizer shows: all kinds of characters, tokens and added tokens."""
    yield from PROBES
    for first in range(0x20, 0x30000, 0x100):
        letters = [chr(first + i) for i in (0, 7, 33, 64, 65, 150) if not 0xD7 < first >> 8 < 0xE0]
        yield " ".join(letters) + "".join(letters)
    for token in _spread(tokenizer.added.tokens, MAX_PROBED_TOKENS):
        yield f"a {token.content}b  {token.content} {token.content}\n"
        yield token.content  # merges may make it of a whole text
    ordinary = _spread(sorted(tokenizer.known_ids), MAX_PROBED_TOKENS)
    for left, right in zip(ordinary, reversed(ordinary), strict=True):
        tokens = tokenizer.bytes_of_id[left] + tokenizer.bytes_of_id[right]
        yield tokens.decode("utf-8", errors="replace")


def library_of(tokenizer: ImportedTokenizer):
    """The library's tokenizer of the same file; None if the library is not installed."""
    return load(tokenizer.source) if find_spec("tokenizers") else None


def verify(tokenizer: ImportedTokenizer) -> None:
    """Raise ValueError for the first probe text that does not come back or has other ids.

    The ids are compared with those of the library `tokenizers`, where it is installed.
    """
    library = library_of(tokenizer)
    for text in probe_texts(tokenizer):
        # 1. What a person types has no control token. It comes back, or is refused.
        ids = tokenizer.typed_ids(text)
        if not tokenizer.control_ids.isdisjoint(ids):
            raise ValueError(f"the text {text[:60]!r}, typed by a person, has a control token")
        normalised = tokenizer.normalise(text)
        possible = (normalised, f" {normalised}")  # SentencePiece puts a space in front
        if LOST not in ids and tokenizer.decode(ids) not in possible:
            raise ValueError(
                f"the text {text[:60]!r} does not come back from its tokens; a tokenizer that "
                "loses text is of no use here"
            )

        # 2. A text with added tokens has the ids that everybody else has.
        if library is None:
            continue
        ids = [i for i in tokenizer.template_ids(text) if i != LOST]
        expected = library.encode(text, add_special_tokens=False).ids
        if ids != expected:
            raise ValueError(
                f"the text {text[:60]!r} has the ids {ids[:12]}, but the library `tokenizers` "
                f"gives {expected[:12]}; this tokenizer cannot be expressed"
            )
