"""Tokenizer: any text comes back, user text never becomes a special token, bad files name their line."""
import base64
import builtins
import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from r1zero.model import tokenizer as module
from r1zero.model.engine.text import TextStream
from r1zero.model.tokenizer import LONGEST_SPACE, SINGLE_BYTES, Tokenizer
from r1zero.model.tokens.byte_letters import BYTE_OF_LETTER, from_letters, to_letters

WORDS = ["1", "10", "13", "100", " -> ", "<think>", "</think>", "ok", "é", "日本", "日", "\n\n", ".*", "a#"]
TEXTS = ["The cat sat on the mat, the cat's hat: 1234 times.\n\n  Then it   sat\ton\r\nthe naïve café 日本!",
         "the the the then there these those other mother another"] * 3
NASTY = ["", " ", "<|eos|>", "<|bos|><|eos|>", "x<|eos|", "\0", "é😀\u0301", "\x85", "'s'll I'm", "10100"]
everything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
pieces = st.lists(st.sampled_from(WORDS + NASTY + TEXTS[0].split(" ")), max_size=12).map("".join)


def write_ranks(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One tokenizer of each kind. The BPE has ranks by hand, so that it needs no library."""
    file = write_ranks(tmp_path_factory.mktemp("ranks") / "small.tiktoken",
                       SINGLE_BYTES + [b"th", b"the", b" t", b" the", b"at", b" c", b" cat", b"\xe6\x97"])
    return {"bytes": Tokenizer.bytes(), "words": Tokenizer.from_words(WORDS),
            "bpe": Tokenizer.from_ranks_file(file)}


# ---- the round trip ----------------------------------------------------------------------------------------

@settings(max_examples=150)
@given(text=st.one_of(everything, pieces))
@example(text="<|eos|>")
@example(text="日\u0301<|bos|>")
def test_any_text_comes_back_and_has_no_special_token(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.bos_id for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes(ids) == len(text.encode())
        assert b"".join(tokenizer.ranks[i] for i in ids) == text.encode()


def test_lone_surrogates_become_replacement_characters(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # a pair is one character


def test_a_million_spaces_do_not_stop_the_process(tokenizers):
    text = "a" + " " * (10 * LONGEST_SPACE + 7) + "b" + "\n" * LONGEST_SPACE
    assert [len(part) for part in module.safe_parts(text)] == [LONGEST_SPACE + 1] + [LONGEST_SPACE] * 9 + [
        8 + LONGEST_SPACE] + [0]
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_piece_of_many_letters_takes_no_square_time(tokenizers):
    text = "thecat" * 30_000
    assert tokenizers["bpe"].decode(tokenizers["bpe"].encode(text)) == text


# ---- exact ids ---------------------------------------------------------------------------------------------

def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)


def test_words_are_single_tokens_the_longest_first():
    tokenizer = Tokenizer.from_words(["1", "10", "100", " -> ", "a.c"])
    assert tokenizer.encode("100") == [257]
    assert tokenizer.encode("1010") == [256, 256]
    assert tokenizer.encode("1 10 -> 1003") == [49, 32, 256, 258, 257, 51]
    assert tokenizer.encode("abca.c") == [97, 98, 99, 259]  # the dot is a dot, not any character
    assert tokenizer.ranks[256:] == [b"10", b"100", b" -> ", b"a.c"]  # "1" is the byte's own token
    assert tokenizer.vocab_size == 256 + 4 + 2


def test_words_never_come_from_neighbouring_pieces():
    tokenizer = Tokenizer.from_words(["日本", "ok", "oké"])
    assert tokenizer.encode("日") == list("日".encode())
    assert tokenizer.encode("本日") == list("本日".encode())
    assert tokenizer.encode("okoké") == [257, 258]
    assert tokenizer.encode("Ok") == list(b"Ok")


def test_a_word_beginning_another_word():
    tokenizer = Tokenizer.from_words(["ab", "abc", "bcd"])
    assert tokenizer.encode("abcd") == [257, 100]  # from the left, the longest
    assert tokenizer.encode("abbcd") == [256, 258]


def test_bpe_merges_by_rank_within_the_pieces_of_the_pattern(tokenizers):
    bpe = tokenizers["bpe"]
    assert [bpe.token_text(i) for i in bpe.encode("the cat, the hat")] == [
        "the", " cat", ",", " the", " ", "h", "at"]
    assert bpe.encode("日") == [263, 0xA5]  # ranks may be parts of a character


@pytest.mark.parametrize(("text", "expected"), [
    ("Hello world's 123!?  ok", ["Hello", " world", "'s", " 123", "!?", " ", " ok"]),
    ("a\n\nb  ", ["a", "\n", "\n", "b", "  "]), ("x   y", ["x", "  ", " y"]),
    ("日本語 é1", ["日本語", " é", "1"])])
def test_the_pattern_splits_as_gpt2(text, expected):
    import regex
    assert regex.findall(module.GPT2_PATTERN, text) == expected


# ---- ids to text -------------------------------------------------------------------------------------------

def test_decode_leaves_special_tokens_out_unless_asked(tokenizers):
    for tokenizer in tokenizers.values():
        ids = [tokenizer.bos_id, *tokenizer.encode("ok 10"), tokenizer.eos_id]
        assert tokenizer.decode(ids) == "ok 10"
        assert tokenizer.decode(ids, keep_special=True) == "<|bos|>ok 10<|eos|>"
        assert tokenizer.token_text(tokenizer.eos_id) == "<|eos|>"
        assert tokenizer.count_bytes(ids) == 5
        assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == "ok 10"


def test_decode_of_broken_utf8(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd" and tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.token_text(0xE6) == "\\xe6"
    assert tokenizer.decode([0xC3, tokenizer.eos_id, 0xA9]) == "é"  # special tokens leave no trace
    assert tokenizer.decode([]) == "" and tokenizer.count_bytes([]) == 0


@pytest.mark.parametrize("bad", [-1, 258, 2**31, 2**70])
def test_ids_out_of_range_name_what_is_allowed(bad):
    tokenizer = Tokenizer.bytes()
    for call in (lambda: tokenizer.decode([65, bad]), lambda: tokenizer.token_text(bad)):
        with pytest.raises(ValueError, match=f"token id {bad} .* from 0 to 257"):
            call()


def test_count_bytes_refuses_ids_out_of_range():
    for bad in (-1, 258):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            Tokenizer.bytes().count_bytes([65, bad])


def test_ids_must_be_integers():
    with pytest.raises(TypeError):
        Tokenizer.bytes().decode([65.0])


@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_encode_batch_is_encode_of_each(tokenizers, num_threads):
    for texts in ([], TEXTS + NASTY, [TEXTS[0] * 200, "", TEXTS[1] * 200]):
        for tokenizer in tokenizers.values():
            assert tokenizer.encode_batch(texts, num_threads) == [tokenizer.encode(text) for text in texts]


# ---- to and from a dictionary ------------------------------------------------------------------------------

def test_dictionary_round_trip_through_json(tokenizers):
    for tokenizer in tokenizers.values():
        data = json.loads(json.dumps(tokenizer.to_dict()))
        again = Tokenizer.from_dict(data)
        assert again.to_dict() == tokenizer.to_dict() and again.fingerprint() == tokenizer.fingerprint()
        for text in TEXTS + NASTY:
            assert again.encode(text) == tokenizer.encode(text)
    assert len({t.fingerprint() for t in tokenizers.values()}) == 3


def test_fingerprint_tells_words_in_another_order():
    prints = [Tokenizer.from_words(words).fingerprint()
              for words in (["ab", "cd"], ["cd", "ab"], ["ab", "cd"])]
    assert prints[0] == prints[2] != prints[1] and len(prints[0]) == 16


@pytest.mark.parametrize(("change", "match"), [
    ({"format": 2}, "format 2, expected 1"), ({"kind": None}, "damaged"), ({"pattern": 7}, "damaged"),
    ({"special_tokens": ["<|eos|>", "<|bos|>"]}, "damaged"), ({"ranks": ["YQ==", "!"]}, "damaged"),
    ({"ranks": ["YQ=="]}, "255 of the 256"), ({"ranks": 5}, "damaged"), ({"ranks": [1]}, "damaged"),
    ({"pattern": "("}, "damaged")])
def test_damaged_dictionaries(change, match):
    with pytest.raises(ValueError, match=match):
        Tokenizer.from_dict(Tokenizer.bytes().to_dict() | change)


@pytest.mark.parametrize("data", [None, [], {}, "bytes"])
def test_what_is_no_tokenizer(data):
    with pytest.raises(ValueError, match="format None, expected 1"):
        Tokenizer.from_dict(data)


def test_double_ranks_in_a_dictionary():
    data = Tokenizer.bytes().to_dict()
    data["ranks"].append(data["ranks"][65])
    with pytest.raises(ValueError, match="empty or double"):
        Tokenizer.from_dict(data)


# ---- special tokens, several ends, a padded vocabulary -----------------------------------------------------

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 260}


@pytest.fixture
def chatty():
    """Two end tokens, no bos, a gap in the ids (258, 259), and padding from 261 on."""
    return Tokenizer("bytes", module.ANY_CHARACTER, SINGLE_BYTES, special_tokens=SPECIAL, eos_ids=(257, 260),
                     vocab_size=264)


def test_special_tokens_ends_and_size_are_as_given(chatty):
    assert (chatty.eos_id, chatty.eos_ids, chatty.bos_id, chatty.vocab_size) == (257, (257, 260), None, 264)
    assert chatty.special_tokens == SPECIAL
    ids = [256, 104, 105, 257, 260]
    assert chatty.decode(ids) == "hi"
    assert chatty.decode(ids, keep_special=True) == "<|im_start|>hi<|im_end|><|endoftext|>"
    assert chatty.token_text(260) == "<|endoftext|>" and chatty.token_bytes(260) == b""
    assert chatty.count_bytes(ids) == 2
    assert chatty.encode("<|im_end|>") == list(b"<|im_end|>")  # text never makes one
    usual = Tokenizer.bytes()
    assert (usual.eos_ids, usual.bos_id) == ((257,), 256)
    assert usual.special_tokens == {"<|bos|>": 256, "<|eos|>": 257}


@pytest.mark.parametrize("unknown", [258, 259, 261, 263])
def test_an_id_that_is_no_token_reads_as_a_replacement_character(chatty, unknown):
    """A model with a padded vocabulary can sample one, and that must not end a run."""
    assert chatty.decode([104, unknown, 105]) == chatty.decode([104, unknown, 105], True) == "h\ufffdi"
    assert chatty.token_text(unknown) == f"<|{unknown}|>"
    assert chatty.token_bytes(unknown).decode() == "\ufffd" and chatty.count_bytes([104, unknown]) == 4
    assert chatty.decode([0xC3, unknown, 0xA9]) == "\ufffd" * 3  # it is not left out
    stream = TextStream(chatty, ())
    assert "".join(stream.feed(i) for i in (104, unknown, 257, 105, None)) == "h\ufffdi"
    with pytest.raises(ValueError, match="token id 264 .* from 0 to 263"):
        chatty.decode([264])


def test_a_padded_vocabulary_keeps_the_usual_special_tokens():
    padded = Tokenizer("bytes", module.ANY_CHARACTER, SINGLE_BYTES, vocab_size=320)
    assert (padded.bos_id, padded.eos_ids, padded.vocab_size) == (256, (257,), 320)
    assert padded.decode([319, 257, 65]) == "\ufffdA"
    assert padded.fingerprint() != Tokenizer.bytes().fingerprint()


def test_all_of_it_comes_back_from_a_dictionary(chatty):
    data = json.loads(json.dumps(chatty.to_dict()))
    again = Tokenizer.from_dict(data)
    for name in ("special_tokens", "eos_ids", "bos_id", "vocab_size", "ranks"):
        assert getattr(again, name) == getattr(chatty, name)
    assert again.to_dict() == chatty.to_dict() and again.fingerprint() == chatty.fingerprint()
    changes = {"eos_ids": [260, 257], "bos_id": 256, "vocab_size": 265,
               "special_tokens": {**SPECIAL, "<|endoftext|>": 259, "more": 260}}
    others = [Tokenizer.from_dict(data | {"ids": data["ids"] | {key: value}})
              for key, value in changes.items()]
    assert len({t.fingerprint() for t in (chatty, *others)}) == 5


def test_the_fingerprints_of_usual_tokenizers_are_those_of_earlier_runs():
    assert Tokenizer.bytes().fingerprint() == "4484018526241701"
    assert Tokenizer.from_words(["10", " -> ", "é"]).fingerprint() == "220714f4e1d7ad4b"


@pytest.mark.parametrize(("change", "match"), [
    ({"eos_ids": ()}, r"eos_ids are \[\]; expected one or more"),
    ({"eos_ids": (258,)}, r"eos_ids are \[258\]"), ({"eos_ids": (-1,)}, "eos_ids"),
    ({"eos_ids": None}, "eos_ids"), ({"bos_id": 262}, "bos_id is 262"),
    ({"vocab_size": 260}, "from 256 .* to 259"), ({"vocab_size": 255}, "255, but there are 256 ranks"),
    ({"special_tokens": {"a": 257, "b": 257}}, "ids that differ"),
    ({"special_tokens": {"a": 257, "b": 255}}, "from 256"), ({"special_tokens": {"a": -1}}, "from 256")])
def test_ids_that_do_not_fit_together(change, match):
    ids = {"special_tokens": SPECIAL, "eos_ids": (257, 260), "vocab_size": 264} | change
    with pytest.raises(ValueError, match=match):
        Tokenizer("bytes", module.ANY_CHARACTER, SINGLE_BYTES, **ids)


@pytest.mark.parametrize("ids", [{"eos_ids": [9.5]}, {"special_tokens": {"a": "256"}}, {"more": 1}, [1], None,
                                 3, {"vocab_size": "300"}, {"vocab_size": 1}, {"special_tokens": [256]}])
def test_damaged_ids_in_a_dictionary(chatty, ids):
    data = chatty.to_dict()
    ids = data["ids"] | ids if isinstance(ids, dict) else ids
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.from_dict(data | {"ids": ids})


# ---- bad input ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "match"), [
    ([""], "word 0 is ''"), (["a", 3], "word 1 is 3"), (["ab", "cd", "ab"], "'ab' is given 2 times"),
    (["<|eos|>"], "none of"), (["a\ud800"], "word 0"), ("abc", "give a list"),
    ([f"{i:06}" for i in range(module.MAX_WORD_BYTES // 6 + 1)], "over 50000")])
def test_bad_words(words, match):
    with pytest.raises(ValueError, match=match):
        Tokenizer.from_words(words)


@pytest.mark.parametrize(("content", "match"), [
    (b"", "is empty"), (b"\n \n", "is empty"), (b"\x89PNG\0", "is binary"), (b"YQ== 0\0", "is binary"),
    (b"YQ== 0\nYg==\n", "line 2: got 'Yg=='"), (b"YQ== 0 0", "line 1"), (b"Y*== 0", "line 1"),
    (b"YQ== 0\n\nYg== x", "line 3"), (b"YQ== -1", "line 1"), (b"YQ== 1_0", "line 1"),
    (b"YQ== " + b"9" * 5000, "line 1"),
    (b"YQ== 0\nYg== 0", "line 2: rank 0 was given before, on line 1"),
    (b"YQ== 0\nYQ== 1", "line 2: token b'a' was given before, on line 1"),
    (b"YQ== 0\nYg== 2", "rank 1 is missing"), (b"YQ== 0\nYg== 1", "254 of the 256 single bytes")])
def test_bad_ranks_files(tmp_path, content, match):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        Tokenizer.from_ranks_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_ranks_file(tmp_path):
    for path in (tmp_path, tmp_path / "no.tiktoken"):
        with pytest.raises(ValueError, match="cannot be read"):
            Tokenizer.from_ranks_file(path)


def test_ranks_in_any_order_of_lines(tmp_path):
    path = write_ranks(tmp_path / "a.tiktoken", SINGLE_BYTES + [b"ab"])
    path.write_bytes(b"\r\n".join(reversed(path.read_bytes().split(b"\n"))))
    assert Tokenizer.from_ranks_file(path).encode("abc") == [256, 99]


# ---- training ----------------------------------------------------------------------------------------------

def test_the_letters_for_bytes_are_all_different():
    assert sorted(BYTE_OF_LETTER.values()) == list(range(256))
    assert from_letters("A!ĠĊ\u0143") == bytes([65, 33, 32, 10, 173])
    for letter in [" ", "\xad", "\u0144", "日", "a b"]:
        with pytest.raises(ValueError, match="encode"):
            from_letters(letter)
    assert to_letters(bytes([65, 33, 32, 10, 173])) == "A!ĠĊ\u0143"


def test_training_agrees_with_the_library():
    library = pytest.importorskip("tokenizers")
    ours = Tokenizer.train(TEXTS, 300)
    theirs = library.Tokenizer(library.models.BPE())
    theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(TEXTS, library.trainers.BpeTrainer(
        vocab_size=298, show_progress=False, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()))
    assert ours.vocab_size == 300 and b" the" in ours.ranks
    for text in TEXTS + NASTY + ["an unseen text: there's another 日本 hat\n\n\n   \n", "thethethe  the"]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert Tokenizer.train(TEXTS, 300).fingerprint() == ours.fingerprint()


def test_training_on_little_or_broken_text():
    pytest.importorskip("tokenizers")
    assert Tokenizer.train(["ab"], 258).ranks == [bytes([b]) for b in BYTE_OF_LETTER.values()]
    small = Tokenizer.train(["ab ab", "\ud800"], 5000)
    assert 258 < small.vocab_size < 300 and small.decode(small.encode("xyz\n")) == "xyz\n"


@pytest.mark.parametrize(("texts", "size", "match"), [
    (["a"], 257, "257, expected 258"), (["a"], 10**7, "expected 258"), (["a"], -1, "expected 258"),
    ([], 300, "0 texts"), (["", ""], 300, "2 texts, none"), ("abc", 300, "give a list")])
def test_bad_training_input(texts, size, match):
    with pytest.raises(ValueError, match=match):
        Tokenizer.train(texts, size)


def test_training_without_the_library_says_what_to_do(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install tokenizers.*--tokenizer bytes"):
        Tokenizer.train(["a"], 300)
