"""Tokenizers of Hugging Face folders have exactly the ids of the library, read and written."""

import base64
import json
import warnings
import zlib

import pytest

Library = pytest.importorskip("tokenizers").Tokenizer

from r1zero.model.tokenizer import Tokenizer  # noqa: E402
from r1zero.model.tokens.byte_level_bpe import ByteLevelBPE  # noqa: E402
from r1zero.model.tokens.imported import Settings  # noqa: E402
from r1zero.model.tokens.json_file import read_tokenizer, source_of, write_tokenizer  # noqa: E402
from r1zero.model.tokens.library import LibraryTokenizer  # noqa: E402

from .cases import (  # noqa: E402
    BOS,
    CL100K,
    DEEPSEEK,
    HOSTILE,
    LICENSED,
    SHAPES,
    add_token,
    differing,
    handmade,
    imported,
    library_of,
    random_texts,
    sentencepiece,
    splits,
    trained,
    write_folder,
)

TEXTS = [text for text in HOSTILE if "\ud800" not in text] + random_texts(400)


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
    for content, flags in (
        ("<l>", {"lstrip": True}),
        ("<r>", {"rstrip": True}),
        ("<lr>", {"lstrip": True, "rstrip": True}),
    ):
        add_token(source, content, **flags)
    texts = [
        f"a  {one} \n {two}  b{one}c {two}"
        for one in ("<l>", "<r>", "<lr>")
        for two in ("<l>", "<r>", "<lr>")
    ]
    assert differing(imported(tmp_path, source), library_of(source), texts) == []


def test_a_normalised_added_token_is_found_after_normalisation(tmp_path):
    source = SHAPES["cl100k, NFC"]()
    named = add_token(source, "<é>", normalized=True)
    raw = add_token(source, "<ü>")
    tokenizer = imported(tmp_path, source)
    assert tokenizer.encode_template("a<e\u0301>b")[1] == named and tokenizer.encode_template("<é>") == [
        named
    ]
    assert tokenizer.encode_template("<ü>") == [raw] and raw not in tokenizer.encode_template("<u\u0308>")
    assert differing(tokenizer, library_of(source), ["a<e\u0301>b<é><ü><u\u0308> é"]) == []


def test_ids_need_not_follow_the_merges_and_merges_have_two_forms(tmp_path):
    source = trained(splits(CL100K))
    vocab = source["model"]["vocab"]
    shuffled = sorted(vocab.values(), key=lambda i: (i * 37) % 101)
    source["model"]["vocab"] = dict(zip(vocab, shuffled, strict=True))
    assert differing(imported(tmp_path / "pairs", source), library_of(source), TEXTS) == []
    source["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in source["model"]["merges"]
    ]
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


@pytest.mark.parametrize(
    ("merges", "engine"),
    [
        (["b c", "a b", "ab c"], LibraryTokenizer),  # in "abc" b and c come first, so "abc" is never made
        (["a b", "ab c", "b c", "a bc"], LibraryTokenizer),  # "abc" is made at two places of the order
        (["b c", "a bc", "a b"], ByteLevelBPE),
    ],
)
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
    library = Library.from_file(str(path))
    added = [token.content for token in tokenizer.added.tokens]
    texts = [text for text in TEXTS[:300] if "\x04" not in text] + random_texts(200, added[:20] + added[-20:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bytes that GPT-NeoX has no token for
        assert differing(tokenizer, library, texts) == []
    assert not any(
        i in {t.id for t in tokenizer.added.tokens if not t.is_blank}
        for text in texts
        for i in tokenizer.encode(text)
    )


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


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_json": "!"},
        {"tokenizer_json": base64.b64encode(b"x").decode()},
        {"tokenizer_json": 3},
        {"engine": "x"},
        {"settings": {}},
        {"settings": None},
        {"tokenizer_json": base64.b64encode(zlib.compress(b'{"model": ')).decode()},
    ],
)
def test_damaged_checkpoints_say_so(change):
    tokenizer = ByteLevelBPE(trained(size=300), Settings(303, (301,)))
    with pytest.raises(ValueError, match="tokenizer data is damaged .* use another checkpoint"):
        Tokenizer.from_dict(tokenizer.to_dict() | change)


WORDS = [
    "1",
    "10",
    "100",
    " -> ",
    "<think>",
    "é",
    "日本",
    "日",
    "\n\n",
    ".*",
    "a#",
    "-",
    "~&&",
    "[x]",
    " ",
    "a b",
]
OURS = {
    "bytes": Tokenizer.bytes,
    "words": lambda: Tokenizer.from_words(WORDS),
    "bpe": lambda: Tokenizer.train(["the cat sat on the mat, the cat's hat 日本"] * 3, 320),
    "another split": lambda: Tokenizer(
        "bpe", r"\p{L}+|\s+|[^\s\p{L}]{1,3}", Tokenizer.train(["the cat sat on the mat"] * 3, 300).ranks
    ),
    "ends and holes": lambda: Tokenizer(
        "bytes",
        r"[\s\S]",
        [bytes([b]) for b in range(256)],
        eos_ids=[257, 260],
        special_tokens={"<|im_end|>": 257, "<|x|>": 260},
        vocab_size=264,
    ),
}


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
