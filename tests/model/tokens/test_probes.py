"""A tokenizer that was read wrongly is caught before it is used."""

import pytest
import tiktoken

pytest.importorskip("tokenizers")

from r1zero.model.tokens.probes import PROBES, probe_texts, verify  # noqa: E402
from r1zero.model.tokens.split_pattern import GPT2_PATTERN  # noqa: E402

from .cases import CL100K, DEEPSEEK, imported, splits, trained  # noqa: E402


def with_pattern(tokenizer, pattern):
    """The tokenizer with another split."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    tokenizer.encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return tokenizer


@pytest.mark.parametrize(
    ("right", "wrong", "match"),
    [
        ([CL100K], GPT2_PATTERN, "gives .* cannot be expressed"),
        (DEEPSEEK, "|".join(DEEPSEEK), "does not come back"),
        (DEEPSEEK, "|".join([*DEEPSEEK, r"[\s\S]"]), "cannot be expressed"),
        ([r"\p{N}", GPT2_PATTERN], rf"\p{{N}}|{GPT2_PATTERN}", "cannot be expressed"),
    ],
)
def test_a_wrong_split_is_caught(tmp_path, right, wrong, match):
    tokenizer = imported(tmp_path, trained(splits(*right)))
    verify(tokenizer)
    with pytest.raises(ValueError, match=match):
        verify(with_pattern(tokenizer, wrong))


def test_a_missing_normalisation_and_wrong_added_tokens_are_caught(tmp_path):
    tokenizer = imported(tmp_path, trained(splits(CL100K)))
    tokenizer.added.tokens[2:] = []
    tokenizer.added._raw_pattern = None
    with pytest.raises(ValueError, match="<think>.* cannot be expressed"):
        verify(tokenizer)


def test_a_control_token_in_what_a_person_types_is_caught(tmp_path):
    source = trained()
    the = source["added_tokens"][0] | {"id": source["model"]["vocab"]["the"], "content": "the"}
    tokenizer = imported(tmp_path, source | {"added_tokens": [the, *source["added_tokens"]]})
    tokenizer.typed_ids = lambda text: tokenizer._encode_pieces(tokenizer.blank.split(text))
    with pytest.raises(ValueError, match="'the', typed by a person, has a control token"):
        verify(tokenizer)


def test_the_probes_hold_each_added_token_and_all_kinds_of_characters(tmp_path):
    tokenizer = imported(tmp_path, trained())
    texts = list(probe_texts(tokenizer))
    assert texts[: len(PROBES)] == list(PROBES)
    for content in ("<|im_start|>", "<|im_end|>", "<think>"):
        assert any(f"a {content}b" in text for text in texts) and content in texts
    assert {ord(c) >> 8 for text in texts for c in text} >= {0, 3, 0x4E, 0xAC, 0xFF, 0x1F6, 0x200}
    assert not any(0xD800 <= ord(c) < 0xE000 for text in texts for c in text)
