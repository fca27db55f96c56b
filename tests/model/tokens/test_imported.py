"""Two ways to encode: what a person types has no control token; what a template composed has them."""

import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

pytest.importorskip("tokenizers")

from r1zero.model.engine.text import TextStream  # noqa: E402
from r1zero.model.tokenizer import Tokenizer  # noqa: E402
from r1zero.model.tokens.byte_level_bpe import ByteLevelBPE  # noqa: E402
from r1zero.model.tokens.imported import Settings  # noqa: E402
from r1zero.model.tokens.split_pattern import LONGEST_REST  # noqa: E402

from .cases import (  # noqa: E402
    CL100K,
    DEEPSEEK,
    HOSTILE,
    differing,
    imported,
    library_of,
    random_texts,
    splits,
    trained,
)

TEXTS = [text for text in HOSTILE if "\ud800" not in text] + random_texts(200)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with control tokens, and the content of its file."""
    source = trained(splits(CL100K))
    return imported(tmp_path_factory.mktemp("chat"), source), source


# ---- two ways to encode ----

PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "<|im_",
    "end|>",
    "|>",
    "<",
    "a",
    " ",
    "\u0338",
    "the",
    "\n",
]


@settings(max_examples=100)
@given(text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_what_a_person_types_has_no_control_token_and_comes_back(chat, text):
    tokenizer, source = chat
    control = {token["id"] for token in source["added_tokens"]}
    ids = tokenizer.encode(text)
    assert not control & set(ids) and tokenizer.decode(ids) == text
    spelled = [t["content"] for t in source["added_tokens"] if t["id"] in tokenizer.encode_template(text)]
    assert sorted(tokenizer.control_tokens_in(text)) == sorted(spelled)
    if not spelled:
        assert tokenizer.encode_template(text) == ids


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("split", [None, splits(CL100K)])
def test_a_control_token_that_merges_make_is_refused_where_a_person_types_it(tmp_path, special, split):
    source = trained(split)
    control = source["model"]["vocab"]["the"]
    the = source["added_tokens"][0] | {"id": control, "content": "the", "special": special}
    source["added_tokens"].insert(0, the)
    tokenizer = imported(tmp_path, source)
    with pytest.raises(ValueError, match="'the cat' cannot be encoded: .* but a control token"):
        tokenizer.encode("the cat")
    assert control in tokenizer.encode_template("the cat")
    assert tokenizer.control_tokens_in("the cat") == ["the"]
    assert tokenizer.decode(tokenizer.encode("a cat")) == "a cat"


def test_control_tokens_are_hidden_or_shown_as_the_file_says(chat):
    tokenizer, _ = chat
    start, end, think = (
        tokenizer.encode_template(text)[0] for text in ("<|im_start|>", "<|im_end|>", "<think>")
    )
    ids = [start, *tokenizer.encode_template("<think>hé"), end]
    assert tokenizer.decode(ids) == "<think>hé"
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|><think>hé<|im_end|>"
    assert [tokenizer.token_text(i) for i in (start, think, end)] == ["<|im_start|>", "<think>", "<|im_end|>"]
    assert tokenizer.token_bytes(think) == b"<think>" and tokenizer.token_bytes(end) == b""
    assert tokenizer.count_bytes(ids) == len("<think>hé".encode())
    assert set(tokenizer.special_tokens) == {"<|im_start|>", "<|im_end|>"}
    stream = TextStream(tokenizer, ("</think>",))
    assert "".join(stream.feed(i) for i in [*ids, None]) == "<think>hé"


def test_our_own_tokenizers_encode_templates_too():
    for tokenizer in (Tokenizer.bytes(), Tokenizer.from_words(["10", "->"])):
        ids = tokenizer.encode_template("<|bos|>10->a<|eos|>")
        assert ids == [tokenizer.bos_id, *tokenizer.encode("10->a"), tokenizer.eos_id]
        assert tokenizer.control_tokens_in("a<|eos|>b<|eos|><|bo") == ["<|eos|>"]
        assert tokenizer.encode_template("plain") == tokenizer.encode("plain")
        assert (tokenizer.adds_bos, tokenizer.chat_template) == (False, None)
        assert tokenizer.n_ids == tokenizer.vocab_size
    assert Tokenizer("bytes", r"[\s\S]", [bytes([b]) for b in range(256)], vocab_size=300).n_ids == 258


def test_a_byte_without_a_token_is_refused_or_dropped_with_one_warning(tmp_path):
    source = trained()
    for letter in "\u0104\u0105ñÑ":  # the bytes 04, 05, f1, d1
        del source["model"]["vocab"][letter]
    # The library numbers added tokens anew, unless they stand in the vocabulary.
    source["model"]["vocab"] |= {token["content"]: token["id"] for token in source["added_tokens"]}
    tokenizer, library = imported(tmp_path, source), library_of(source)
    with pytest.raises(ValueError, match=r"'a\\x04b' cannot be encoded: .* 4 bytes such as 0x04, 0x05.*take"):
        tokenizer.encode("a\x04b")
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("t\x04he", "!\x04!", "\x04", "!!\x04\x05!!", "a\x04!\x05! the", "\U00042019" * 2):
            assert tokenizer.encode_template(text) == library.encode(text).ids, text
        assert differing(tokenizer, library, TEXTS) == []
    assert [str(w.message)[:44] for w in caught] == ["tokenizer: 1 bytes of a text have no token a"]
    assert tokenizer.encode_template("t\x04he") != tokenizer.encode_template("the")


@pytest.mark.parametrize("character", ["\0", "\u0378", " ", "\n", "a", "日", "1", "!", "\u0301"])
def test_long_runs_of_one_character_do_not_stop_the_process(tmp_path_factory, character):
    source = trained(splits(*DEEPSEEK))
    tokenizer = ByteLevelBPE(source, Settings(1000, (1,)))
    text = character * (1_000_001 if character == " " else 300_000) + "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    text = text[-3 * LONGEST_REST :]
    assert tokenizer.encode_template(text) == library_of(source).encode(text).ids
