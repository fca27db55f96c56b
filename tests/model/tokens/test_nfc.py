"""NFC is that of the library, whose tables are older than Python's."""

import random
import sys
import unicodedata

import pytest

from r1zero.model.tokens.nfc import to_nfc

LATER = "\u0898\u1df9\u1abf\U00011938\U00011935\U0001e131\U000105d2"  # marks and letters since Unicode 10
MARKS = "\u0301\u0334\u0345\u0315\u0327\u0338\u11a8"


def test_marks_are_joined_and_sorted():
    assert to_nfc("e\u0301 A\u030a >\u0338 \u1112\u1161\u11ab") == "é Å ≯ 한"
    assert to_nfc("q\u0307\u0323") == "q\u0323\u0307" and to_nfc("plain é") == "plain é"


def test_later_marks_are_like_letters():
    assert unicodedata.normalize("NFC", "a\u1df9\u0334") != to_nfc("a\u1df9\u0334") == "a\u1df9\u0334"
    assert to_nfc("e\u0301\u1df9e\u0301") == "é\u1df9é"
    assert to_nfc("\U00011935\U00011930") == "\U00011935\U00011930"


def test_it_agrees_with_the_library():
    theirs = pytest.importorskip("tokenizers").normalizers.NFC().normalize_str
    chance = random.Random(0)
    for _ in range(5000):
        letters = [
            chance.choice([*LATER, *MARKS, *"aeq>각", chr(chance.randint(0x20, 0xD7FF))]) for _ in range(6)
        ]
        assert to_nfc("".join(letters)) == theirs("".join(letters)), letters


@pytest.mark.slow
def test_it_agrees_on_every_character():
    theirs = pytest.importorskip("tokenizers").normalizers.NFC().normalize_str
    for character in map(chr, (c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)):
        for mark in ("", *MARKS, "\U00011930", "\u1df9"):
            for text in (character + mark, f"a{mark}{character}", unicodedata.normalize("NFD", character)):
                assert to_nfc(text) == theirs(text), [text]
