"""The letters in which byte-level BPE files write bytes (openai/gpt-2, src/encoder.py).

Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100, U+0101, ... So `Ġ` is
a space, and every token is a text without white space.
"""

PRINTABLE = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]
OTHERS = [b for b in range(256) if b not in PRINTABLE]

BYTE_OF_LETTER = {chr(b): b for b in PRINTABLE}
BYTE_OF_LETTER.update({chr(256 + i): b for i, b in enumerate(OTHERS)})

LETTER_OF_BYTE = {b: letter for letter, b in BYTE_OF_LETTER.items()}

# For str.translate: letters to the characters of their bytes' numbers, all else to no byte at all.
_NO_BYTE = {other: "\uffff" for other in OTHERS}
_NUMBERS = {ord(letter): chr(b) for letter, b in BYTE_OF_LETTER.items()}
_TO_NUMBERS = _NO_BYTE | _NUMBERS


def to_letters(token: bytes) -> str:
    """A token as such a file writes it."""
    letters = [LETTER_OF_BYTE[b] for b in token]
    return "".join(letters)


def from_letters(text: str) -> bytes:
    """The bytes of a token. Raises ValueError for a character that stands for no byte."""
    return text.translate(_TO_NUMBERS).encode("latin-1")
