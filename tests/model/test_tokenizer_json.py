"""Tokenizers of Hugging Face folders have exactly the ids of the library, and are written so that it has ours."""
import base64
import json
import re
import warnings
import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

pytest.importorskip("tokenizers")

from r1zero.model.engine.text import TextStream  # noqa: E342
from r1zero.model.imported_tokenizer import ByteLevelBPE, Settings  # noqa: E342
from r1zero.model.split_pattern import LONGEST_REST  # noqa: E342
from r1zero.model.tokenizer import Tokenizer  # noqa: E342
from r1zero.model.tokenizer_json import read_tokenizer, source_of, write_tokenizer  # noqa: E342
from r1zero.model.tokenizer_library import LibraryTokenizer  # noqa: E342

from .tokenizer_cases import (  # noqa: E342
    CL100K, DEEPSEEK, HOSTILE, LICENSED, SHAPES, add_token, differing, handmade, imported, library_of, random_texts,
    sentencepiece, splits, trained, write_folder)

TEXTS = [text for text in HOSTILE if "\ud800" not in text] + random_texts(400)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with control tokens, and the content of its file."""
    source = trained(splits(CL100K))
    return imported(tmp_path_factory.mktemp("chat"), source), source


# ---- the ids are those of the library ----

@pytest.mark.parametrize("shape", SHAPES)
def test_each_kind_of_split_gives_the_ids_of_the_library(tmp_path, shape):
    source = SHAPES[shape]()
    tokenizer = imported(tmp_path, source)
    assert isinstance(tokenizer, ByteLevelBPE)
    assert differing(tokenizer, library_of(source), TEXTS) == []
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalise(text)


def test_normalisation_stops_at_control_tokens(tmp_path):
    tokenizer = imported(tmp_path, SHAPES["cl100k, NFC"]())
    end = tokenizer.special_tokens["<|im_end|>"]
    assert end in tokenizer.encode_template("a<|im_end|>\u0338")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.control_tokens_in("a<|im_end|>\u0338") == ["<|im_end|>"]


def test_of_overlapping_added_tokens_the_longest_is_found(tmp_path):
    source = trained()
    spaces = {n: add_token(source, " " * n, special=False, normalized=True) for n in (4, 3, 2)}
    tokenizer, library = imported(tmp_path, source), library_of(source)
    texts = ["a" + " " * n + "b" for n in range(12)]
    assert differing(tokenizer, library, texts + TEXTS) == []
    assert tokenizer.encode_template("a     b")[1] == spaces[4]

    # They are white space, and so ordinary text.
    for text in texts:
        assert tokenizer.encode(text) == tokenizer.encode_template(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.control_tokens_in(text) == []


def test_tokens_that_take_the_white_space_beside_them(tmp_path):
    source = trained()
    for content, flags in (("<l>", {"lstrip": True}), ("<r>", {"rstrip": True}), ("<lr>", {"lstrip": True, "rstrip": True})):
        add_token(source, content, **flags)
    texts = [f"a  {one} \n {two}  b{one}c {two}" for one in ("<l>", "<r>", "<lr>") for two in ("<l>", "<r>", "<lr>")]
    assert differing(imported(tmp_path, source), library_of(source), texts) == []


def test_a_normalised_added_token_is_found_after_normalisation(tmp_path):
    source = SHAPES["cl100k, NFC"]()
    named = add_token(source, "<é>", normalized=True)
    raw = add_token(source, "<ü>")
    tokenizer = imported(tmp_path, source)
    assert tokenizer.encode_template("a<e\u0301>b")[1] == named and tokenizer.encode_template("<é>") == [named]
    assert tokenizer.encode_template("<ü>") == [raw] and raw not in tokenizer.encode_template("<u\u0308>")
    assert differing(tokenizer, library_of(source), ["a<e\u0301>b<é><ü><u\u0308> é"]) == []


def test_ids_need_not_follow_the_merges_and_merges_have_two_forms(tmp_path):
    source = trained(splits(CL100K))
    vocab = source["model"]["vocab"]
    shuffled = sorted(vocab.values(), key=lambda i: (i * 37) % 101)
    source["model"]["vocab"] = dict(zip(vocab, shuffled, strict=True))
    assert differing(imported(tmp_path / "pairs", source), library_of(source), TEXTS) == []
    source["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in source["model"]["merges"]]
    assert differing(imported(tmp_path / "texts", source), library_of(source), TEXTS) == []


def test_ignored_merges_make_a_whole_piece_a_token(tmp_path):
    """As in Llama 3: all ways to cut a token are merges, and the order is that of the tokens."""
    source = source_of(Tokenizer.train(["the cat sat on the mat, the cat's hat"] * 3, 300))
    add_token(source, "<|im_end|>")
    tokenizer = imported(tmp_path, source)
    assert isinstance(tokenizer, ByteLevelBPE)
    assert differing(tokenizer, library_of(source), TEXTS) == []

    # A token that no merge makes is one where it is a whole piece, and nowhere else.
    source["model"]["vocab"]["xyz"] = 300
    other = imported(tmp_path / "other", source)
    assert isinstance(other, LibraryTokenizer) and other.encode("xyz") == [300]
    assert differing(other, library_of(source), ["xyz", "xyzz", "axyz", " xyz"]) == []


def test_a_token_that_no_merge_makes_is_only_read(tmp_path):
    source = trained()
    source["model"]["vocab"]["xyz"] = unmade = 340
    for token in source["added_tokens"]:
        token["id"] += 1
    tokenizer = imported(tmp_path, source)
    assert isinstance(tokenizer, ByteLevelBPE)
    assert differing(tokenizer, library_of(source), ["xyz", "axyz", *TEXTS]) == []
    assert tokenizer.decode([unmade]) == "xyz" and unmade not in tokenizer.encode("xyz")


@pytest.mark.parametrize(("merges", "engine"), [
    (["b c", "a b", "ab c"], LibraryTokenizer),  # in "abc" b and c come first, so "abc" is never made
    (["a b", "ab c", "b c", "a bc"], LibraryTokenizer),  # "abc" is made at two places of the order
    (["b c", "a bc", "a b"], ByteLevelBPE)])
def test_merges_that_tiktoken_would_do_otherwise_are_left_to_the_library(tmp_path, merges, engine):
    source = handmade(*merges)
    tokenizer = imported(tmp_path, source)
    assert type(tokenizer) is engine
    texts = ["abc", "ab", "bc", "xabcx", "aabcbc", "abab abc"]
    assert differing(tokenizer, library_of(source), texts) == []
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("path", LICENSED, ids=lambda path: path.parent.name)
def test_open_models_have_the_ids_of_the_library(path):
    source = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = ByteLevelBPE(source, Settings(300_000, (1,)))
    added = [token.content for token in tokenizer.added.tokens]
    texts = [text for text in TEXTS[:300] if "\x04" not in text] + random_texts(200, added[:20] + added[-20:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes that GPT-NeoX has no token for
        assert differing(tokenizer, library_of(source), texts) == []
    assert not any(i in {t.id for t in tokenizer.added.tokens if not t.is_blank}
                   for text in texts for i in tokenizer.encode(text))


@pytest.mark.slow
@pytest.mark.parametrize("path", LICENSED, ids=lambda path: path.parent.name)
def test_open_models_on_every_character_and_a_hundred_thousand_texts(path, tmp_path):
    source = json.loads(path.read_text(encoding="utf-8"))
    end = next(token["content"] for token in source["added_tokens"] if token["special"])
    tokenizer, library = imported(tmp_path, source, tokenizer_config={"eos_token": end}), library_of(source)
    added = [token.content for token in tokenizer.added.tokens]
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert differing(tokenizer, library, characters) == []
        assert differing(tokenizer, library, [f"a{c}1 {c} {c}{c}\n" for c in characters]) == []
        assert differing(tokenizer, library, random_texts(100_000, added[:40] + added[-40:])) == []


# ---- two ways to encode ----

PIECES = ["<|im_end|>", "<|im_start|>", "<think>", "<|im_", "end|>", "|>", "<", "a", " ", "\u0338", "the", "\n"]


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


def test_control_tokens_are_hidden_or_shown_as_the_file_says(chat):
    tokenizer, _ = chat
    start, end, think = (tokenizer.encode_template(text)[0] for text in ("<|im_start|>", "<|im_end|>", "<think>"))
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
    for letter in "\u0104ĀñÑ":  # the bytes 04, 00, f1, d1
        del source["model"]["vocab"][letter]
    # The library numbers added tokens anew, unless they stand in the vocabulary.
    source["model"]["vocab"] |= {token["content"]: token["id"] for token in source["added_tokens"]}
    tokenizer, library = imported(tmp_path, source), library_of(source)
    with pytest.raises(ValueError, match=r"'a\\x04b' cannot be encoded: .* 4 bytes such as 0x00, 0x04.*take"):
        tokenizer.encode("a\x04b")
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tokenizer.encode_template("t\x04he") == library.encode("t\x04he").ids  # nothing merges over it
        assert differing(tokenizer, library, TEXTS) == []
    assert [str(w.message)[:44] for w in caught] == ["tokenizer: 1 bytes of a text have no token a"]
    assert tokenizer.encode_template("t\x04he") != tokenizer.encode_template("the")


@pytest.mark.parametrize("character", ["\0", "\u0378", " ", "\n", "a", "日", "1", "!", "\u0301"])
def test_long_runs_of_one_character_do_not_stop_the_process(tmp_path_factory, character):
    source = trained(splits(*DEEPSEEK))
    tokenizer = ByteLevelBPE(source, Settings(1000, (1,)))
    text = character * 300_000 + "a"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    text = text[-3 * LONGEST_REST:]
    assert tokenizer.encode_template(text) == library_of(source).encode(text).ids


# ---- bos, end tokens, chat template ----

BOS = {"type": "TemplateProcessing", "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [340], "tokens": ["<|im_start|>"]}},
       "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
       "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}


@pytest.mark.parametrize(("processor", "config", "expected"), [
    (None, {}, (None, False)),
    (None, {"bos_token": "<|im_start|>"}, (340, False)),
    (None, {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "add_bos_token": True}, (340, True)),
    (BOS, {"bos_token": "<|im_start|>"}, (340, True)),
    (BOS, {}, (340, True)),
    ({"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                                          "use_regex": True}, BOS]}, {}, (340, True)),
    (BOS, {"bos_token": "<|im_start|>", "add_bos_token": False}, (340, False)),
    (BOS | {"single": BOS["single"][1:]}, {"bos_token": None}, (None, False))])
def test_a_prompt_begins_with_bos_where_the_files_say_so(tmp_path, processor, config, expected):
    source = trained() | {"post_processor": processor}
    assert source["added_tokens"][0]["id"] == 340
    tokenizer = imported(tmp_path, source, tokenizer_config={"eos_token": "<|im_end|>"} | config)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == expected
    assert 340 not in tokenizer.encode_template("a")  # it is the caller who adds it, once

    write_tokenizer(tmp_path, tokenizer)
    again = read_tokenizer(tmp_path)
    assert (again.bos_id, again.adds_bos) == expected
    assert (library_of(again.source).encode("a").ids[0] == 340) == expected[1]


@pytest.mark.parametrize(("files", "expected"), [
    ({"generation_config": {"eos_token_id": 342}}, (341, 342)),
    ({"generation_config": {"eos_token_id": [342, 341, 7]}}, (341, 342, 7)),
    ({"generation_config": {"eos_token_id": [7, 342]}, "tokenizer_config": {}}, (7, 342)),
    ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, (341,)),
    ({"tokenizer_config": {}, "config": {"eos_token_id": 342}}, (342,)),
    ({"config": {"eos_token_id": 2}}, (341,)),  # a class's default beside a tokenizer that knows better
    ({"generation_config": {"eos_token_id": None}}, (341,))])
def test_the_end_tokens_of_all_files_count(tmp_path, files, expected):
    tokenizer = imported(tmp_path, trained(), **files)
    assert tokenizer.eos_ids == expected and tokenizer.eos_id == expected[0]


def test_the_chat_template_is_found_where_old_and_new_folders_have_it(tmp_path):
    names = {"eos_token": "<|im_end|>"}
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for n, (template, expected) in enumerate([("one", "one"), (several, "D"), (None, None)]):
        config = names | {"chat_template": template}
        assert imported(tmp_path / str(n), trained(size=300), tokenizer_config=config).chat_template == expected
    (tmp_path / "0" / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    assert read_tokenizer(tmp_path / "0").chat_template == "{{ é }}"


def test_added_tokens_that_only_tokenizer_config_names_are_found(tmp_path):
    token = {"content": "<tool>", "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"343": token, "341": {"content": "<|im_end|>"}}}
    tokenizer = imported(tmp_path, trained(), tokenizer_config=config)
    assert tokenizer.encode_template("a<tool>")[-1] == 343 and tokenizer.n_ids == 344
    assert tokenizer.decode([7, 343]).endswith("<tool>") and tokenizer.name_of_special == {340: "<|im_start|>", 341: "<|im_end|>"}


# ---- into a checkpoint, and into a folder ----

@pytest.mark.parametrize("make", [lambda: trained(splits(CL100K)), sentencepiece])
def test_a_checkpoint_holds_all_of_it(tmp_path, make):
    end = {"eos_token": "</s>"} if make is sentencepiece else {"eos_token": "<|im_end|>"}
    write_folder(tmp_path, make(), tokenizer_config=end | {"chat_template": "{{ x }}"})
    tokenizer = read_tokenizer(tmp_path, 600)
    data = json.loads(json.dumps(tokenizer.to_dict()))
    again = Tokenizer.from_dict(data)
    assert type(again) is type(tokenizer) and again.settings == tokenizer.settings
    assert again.to_dict() == tokenizer.to_dict() and again.fingerprint() == tokenizer.fingerprint()
    assert [again.encode(t) for t in TEXTS[:50]] == [tokenizer.encode(t) for t in TEXTS[:50]]
    changed = Tokenizer.from_dict(data | {"settings": data["settings"] | {"chat_template": None}})
    assert changed.fingerprint() != tokenizer.fingerprint() and len(changed.fingerprint()) == 16


@pytest.mark.parametrize("change", [
    {"tokenizer_json": "!"}, {"tokenizer_json": base64.b64encode(b"x").decode()}, {"tokenizer_json": 3}, {"engine": "x"},
    {"settings": {}}, {"settings": None},
    {"tokenizer_json": base64.b64encode(zlib.compress(b'{"model": ')).decode()}])
def test_damaged_checkpoints_say_so(chat, change):
    with pytest.raises(ValueError, match="tokenizer data is damaged .* use another checkpoint"):
        Tokenizer.from_dict(chat[0].to_dict() | change)


WORDS = ["1", "10", "100", " -> ", "<think>", "é", "日本", "日", "\n\n", ".*", "a#", "-", "~&&", "[x]", " ", "a b"]
OURS = {"bytes": Tokenizer.bytes, "words": lambda: Tokenizer.from_words(WORDS),
        "bpe": lambda: Tokenizer.train(["the cat sat on the mat, the cat's hat 日本"] * 3, 320),
        "another split": lambda: Tokenizer("bpe", r"\p{L}+|\s+|[^\s\p{L}]{1,3}",
                                           Tokenizer.train(["the cat sat on the mat"] * 3, 300).ranks),
        "ends and holes": lambda: Tokenizer("bytes", r"[\s\S]", [bytes([b]) for b in range(256)], eos_ids=[257, 260],
                                            special_tokens={"<|im_end|>": 257, "<|x|>": 260}, vocab_size=264)}


@pytest.mark.parametrize("name", OURS)
def test_our_own_tokenizers_are_written_with_their_ids(tmp_path, name):
    tokenizer = OURS[name]()
    write_tokenizer(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.eos_ids)}))
    again = read_tokenizer(tmp_path, tokenizer.vocab_size)
    library = library_of(again.source)
    texts = [*TEXTS, "".join(WORDS), "10100 -> <think>a b.*a#", *tokenizer.special_tokens, "<|eos|>a <|x|>"]
    for text in texts:
        assert library.encode(text).ids == tokenizer.encode_template(text) == again.encode_template(text)
        assert again.encode(text) == tokenizer.encode(text)
    assert isinstance(again, ByteLevelBPE)
    for attribute in ("eos_ids", "bos_id", "adds_bos", "vocab_size", "n_ids", "chat_template", "bytes_of_id"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute), attribute


def test_an_imported_tokenizer_is_written_as_it_was(tmp_path):
    for n, source in enumerate([trained(splits(*DEEPSEEK)), sentencepiece()]):
        config = {"eos_token": "</s>" if n else "<|im_end|>", "chat_template": "{{ é }}"}
        tokenizer = imported(tmp_path / str(n), source, tokenizer_config=config)
        out = tmp_path / f"out{n}"
        out.mkdir()
        write_tokenizer(out, tokenizer)
        again = read_tokenizer(out)
        assert again.source == source and again.fingerprint() == tokenizer.fingerprint()


@pytest.mark.slow
def test_transformers_loads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = trained(splits(CL100K)) | {"post_processor": BOS}
    for n, tokenizer in enumerate([imported(tmp_path / "in", source), *(make() for make in OURS.values())]):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_tokenizer(folder, tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS[:100]:
            assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_template(text)
        assert (theirs("a").input_ids[0] == tokenizer.bos_id) == tokenizer.adds_bos
        assert theirs.eos_token_id == tokenizer.eos_id and theirs.chat_template == tokenizer.chat_template


# ---- bad input ----

def damaged(**changes) -> dict:
    source = trained(size=300)
    for key, value in changes.items():
        source["model" if key != "added" else "added_tokens"] = (
            source["model"] | value if key != "added" else [source["added_tokens"][0] | value])
    return source


@pytest.mark.parametrize(("source", "files", "match"), [
    (damaged(model={"type": "WordPiece"}), {}, "a WordPiece tokenizer; only BPE"),
    (damaged(model={"type": "Unigram", "vocab": [["a", 0.0]]}), {}, "a Unigram tokenizer; only BPE"),
    ({"model": 3}, {}, "is no tokenizer"), ({"a": 1}, {}, "is no tokenizer"), ([1], {}, "no JSON object"),
    (damaged(model={"merges": [["t", "h", "e"]]}), {}, "tokenizer.json"),
    (damaged(model={"merges": [["a", "b"]]}), {}, "tokenizer.json"),
    (damaged(model={"merges": 3}), {}, "is damaged"),
    (damaged(), {"tokenizer_config": {"eos_token": "</s>"}}, "eos_token is '</s>', which tokenizer.json does not have"),
    (damaged(), {"tokenizer_config": {}}, "names no end token.*generation_config.json"),
    (damaged(), {"generation_config": {"eos_token_id": 9999}}, "eos_token_id is 9999, which is no token"),
    (damaged(), {"generation_config": {"eos_token_id": "2"}}, "expected an integer or a list"),
    (damaged(), {"tokenizer_config": {"eos_token": "<|im_end|>", "add_bos_token": True}}, "begin with bos, but there is none"),
    (damaged(), {"tokenizer_config": {"added_tokens_decoder": {"301": {"content": "</s>"}}}}, "take both files from one model"),
    (damaged(), {"tokenizer_config": [1]}, "tokenizer_config.json is no JSON object")])
def test_bad_folders_are_refused_in_one_line(tmp_path, source, files, match):
    write_folder(tmp_path, source, **files)
    with pytest.raises(ValueError, match=match) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_without_the_file_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match="it has tokenizer.model, which transformers converts"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="tokenizer.json cannot be read .* download it again"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path):
    write_folder(tmp_path, trained())
    assert read_tokenizer(tmp_path, 343).vocab_size == 343 and read_tokenizer(tmp_path, 512).n_ids == 343
    with pytest.raises(ValueError, match=re.escape("its ids run to 342, but the model has 342 rows")):
        read_tokenizer(tmp_path, 342)
