"""Splits in sequence become one pattern, and what cannot be written so is named."""

import pytest

from r1zero.model.tokens.split_pattern import GPT2_PATTERN, LONGEST_REST, Inexpressible, split_pattern

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}


def split(pattern, behavior="Isolated", invert=False, form="Regex"):
    return {"type": "Split", "pattern": {form: pattern}, "behavior": behavior, "invert": invert}


def sequence(*stages):
    return {"type": "Sequence", "pretokenizers": list(stages)}


def rest(matched):
    return rf"{matched}|(?:(?!{matched})[\s\S]){{1,{LONGEST_REST}}}"


@pytest.mark.parametrize(
    ("pre_tokenizer", "matched"),
    [
        (GPT2, GPT2_PATTERN),
        (sequence(split("a|b"), BYTES), "a|b"),
        (sequence(sequence(split("a|b")), BYTES), "a|b"),
        (sequence(split("a.b", form="String"), BYTES), r"a\.b"),
        (sequence(split(r"\S+", "Removed", True), BYTES), r"\S+"),
        (
            sequence(split(r"\p{N}{1,3}"), split(r" ?\p{L}+|[^\s]x|\s+(?!\S)|[ab\]]"), BYTES),
            r"\p{N}{1,3}| ?[\p{L}&&[^\p{N}]]+|[^\s\p{N}]x|[\s&&[^\p{N}]]+(?![\S&&[^\p{N}]])|[ab\]&&[^\p{N}]]",
        ),
        (
            sequence(split("[x-z]+"), split(r"\p{N}"), split(r"\w"), BYTES),
            r"[x-z]+|[\p{N}&&[^x-z]]|[\w&&[^x-z\p{N}]]",
        ),
        (sequence({"type": "Digits", "individual_digits": False}, split("a"), BYTES), r"\p{N}+|a"),
    ],
)
def test_stages_become_alternatives_and_the_rest_a_piece(pre_tokenizer, matched):
    assert split_pattern(pre_tokenizer) == rest(matched)


def test_a_text_without_a_split_is_one_piece():
    assert split_pattern(BYTES) == r"[\s\S]+"
    assert split_pattern(sequence(split(r"ab|[\s\S]"), BYTES)) == r"ab|[\s\S]"  # nothing is left over


@pytest.mark.parametrize(
    ("pre_tokenizer", "match"),
    [
        (None, "ends with none, expected ByteLevel"),
        (split("a"), "ends with Split"),
        ({"type": "Metaspace"}, "ends with Metaspace"),
        (BYTES | {"add_prefix_space": True}, "add_prefix_space"),
        (sequence({"type": "Punctuation"}, BYTES), "the stage Punctuation"),
        (sequence(split("a", "MergedWithNext"), BYTES), "the behavior MergedWithNext"),
        (sequence(split("a", "Removed"), BYTES), "the behavior Removed, invert False"),
        (sequence(split("ab+"), split("c"), BYTES), r"before the last, the split ab\+"),
        (sequence(split("[^a]+"), split("c"), BYTES), "before the last, the split"),
        (sequence(split("[a]+"), split("c$"), BYTES), r"'\$' behind another stage"),
        (sequence(split("[a]+"), split(r"\bc"), BYTES), r"behind another stage"),
    ],
)
def test_what_cannot_be_written_as_one_pattern_is_named(pre_tokenizer, match):
    with pytest.raises(Inexpressible, match=match):
        split_pattern(pre_tokenizer)
