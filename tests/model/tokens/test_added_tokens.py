"""Added tokens: the longest at the leftmost place, raw ones first, normalised ones in what is left."""

import unicodedata

from r1zero.model.tokens.added_tokens import AddedToken, AddedTokens


def found(text, *tokens, normalise=None):
    return [
        piece if isinstance(piece, str) else piece.id for piece in AddedTokens(tokens, normalise).split(text)
    ]


def nfc(text):
    return unicodedata.normalize("NFC", text)


def test_the_longest_at_the_leftmost_place():
    tokens = [AddedToken(1, "  "), AddedToken(2, "    "), AddedToken(3, "x  ")]
    assert found("a     b", *tokens) == ["a", 2, " b"]
    assert found("x    ", *tokens) == [3, 1]
    assert found("", *tokens) == [] and found("a b", *tokens) == ["a b"] and found("ab") == ["ab"]
    assert found("a.b|c", AddedToken(1, "."), AddedToken(2, "|")) == ["a", 1, "b", 2, "c"]  # no pattern


def test_raw_tokens_come_before_normalisation_and_normalised_ones_after():
    raw, later = AddedToken(1, "<end>"), AddedToken(2, "<é>", normalized=True)
    assert found("e\u0301<end>\u0338<e\u0301>", raw, later, normalise=nfc) == ["é", 1, "\u0338", 2]
    assert found("<end>", AddedToken(1, "<end>", normalized=True), AddedToken(2, "<e")) == [2, "nd>"]


def test_a_token_takes_the_white_space_that_it_may():
    assert found("a \n<x>\u3000 b", AddedToken(1, "<x>", lstrip=True)) == ["a", 1, "\u3000 b"]
    assert found("a \n<x>\u3000 b", AddedToken(1, "<x>", rstrip=True)) == ["a \n", 1, "b"]
    both = AddedToken(1, "<x>", lstrip=True, rstrip=True)
    assert found("\x1c<x> <x>\x1c", both) == ["\x1c", 1, 1, "\x1c"]  # U+001C is white space to Python only


def test_white_space_only_is_no_control_token():
    assert AddedToken(1, " \t\n").is_blank and not AddedToken(1, " <x> ").is_blank
