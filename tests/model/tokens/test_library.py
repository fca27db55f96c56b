"""Tokenizers that tiktoken cannot imitate: SentencePiece's BPE, by the library itself."""

import builtins

import pytest

pytest.importorskip("tokenizers")

from r1zero.model.engine.text import TextStream  # noqa: E402
from r1zero.model.tokens.json_file import read_tokenizer  # noqa: E402
from r1zero.model.tokens.library import LibraryTokenizer  # noqa: E402

from .cases import (  # noqa: E402
    add_token,
    differing,
    imported,
    library_of,
    random_texts,
    sentencepiece,
    trained,
    write_folder,
)

NAMES = {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}}


@pytest.fixture(scope="module", params=[True, False], ids=["normalizer", "pre_tokenizer"])
def llama(request, tmp_path_factory):
    return imported(tmp_path_factory.mktemp("llama"), sentencepiece(request.param), **NAMES)


def test_its_ids_are_those_of_the_library_and_the_text_comes_back(llama):
    assert isinstance(llama, LibraryTokenizer) and (llama.bos_id, llama.eos_id, llama.adds_bos) == (
        1,
        2,
        True,
    )
    texts = [text for text in random_texts(200) if "▁" not in text]
    assert differing(llama, library_of(llama.source), texts) == []
    for text in [text for text in texts if text]:
        ids = llama.encode(text)
        assert llama.decode(ids) in (text, " " + text)  # most put a space in front
        assert llama.count_bytes(ids) == len(llama.decode(ids).encode())
        stream = TextStream(llama, ())
        assert "".join(stream.feed(i) for i in [*ids, None]) == llama.decode(ids)


def test_what_a_person_types_has_no_control_token(llama):
    for text in ("a</s>b", "<s>", "the <unk> cat", "<0x0A>"):
        ids = llama.encode(text)
        assert not {0, 1, 2} & set(ids) and llama.decode(ids).strip() == text
    assert llama.control_tokens_in("a</s>b<s>") == ["<s>", "</s>"] and llama.control_tokens_in("日\0") == []
    assert llama.encode_template("a</s>")[-1] == 2


def test_what_would_not_come_back_is_refused(llama):
    with pytest.raises(ValueError, match="'a▁b' cannot be encoded: .* would read as a space; take"):
        llama.encode("a▁b")
    assert llama.encode("a\ud800b") == llama.encode("a\ufffdb")


def test_a_character_without_a_token_is_refused_where_bytes_are_none(tmp_path):
    source = sentencepiece()
    source["model"]["byte_fallback"] = False
    tokenizer = imported(tmp_path, source, **NAMES)
    with pytest.raises(ValueError, match="some character of it"):
        tokenizer.encode("日本 ★")
    assert 0 in tokenizer.encode_template("★") and tokenizer.control_tokens_in("★") == []
    assert tokenizer.control_tokens_in("<unk>") == ["<unk>"]


@pytest.mark.parametrize("change", ["unknown", "single word", "prefix space"])
def test_byte_level_tokenizers_of_a_rare_kind_are_read_too(tmp_path, change):
    source = trained()
    if change == "unknown":
        source["model"]["unk_token"] = "<|im_start|>"
        source["model"]["vocab"] |= {token["content"]: token["id"] for token in source["added_tokens"]}
    elif change == "single word":
        add_token(source, "cat", single_word=True)
    else:
        source["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = imported(tmp_path, source)
    assert isinstance(tokenizer, LibraryTokenizer)
    assert differing(tokenizer, library_of(source), ["a cat, cats", "日 <|im_end|>"]) == []
    assert tokenizer.decode(tokenizer.encode("日本 cat ▁ <|im_end|>")).lstrip() == "日本 cat ▁ <|im_end|>"


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    source = trained()
    source["normalizer"] = {"type": "Lowercase"}
    lower = imported(tmp_path / "lower", source)  # what it does to a text is known
    assert lower.decode(lower.encode("ABC")) == "abc"
    source["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, source["pre_tokenizer"] | {"use_regex": False}],
    }
    with pytest.raises(ValueError, match="does not come back from its tokens; a tokenizer that loses text"):
        imported(tmp_path / "spaces", source)


def test_without_the_library_the_refusal_says_why_and_what_to_install(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, sentencepiece(), **NAMES)
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ValueError, match=r"since its normalizer is Prepend, Replace; this needs .*pip install tokenizers"
    ):
        read_tokenizer(folder)
