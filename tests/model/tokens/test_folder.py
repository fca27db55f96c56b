"""What the files beside tokenizer.json say is found in old and new folders, or refused in one line."""

import json
import re

import pytest

pytest.importorskip("tokenizers")

from r1zero.model.tokenizer import Tokenizer  # noqa: E402
from r1zero.model.tokens.json_file import read_tokenizer, write_tokenizer  # noqa: E402

from .cases import (  # noqa: E402
    BOS,
    imported,
    library_of,
    trained,
    write_folder,
)

# ---- bos, end tokens, chat template ----


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (None, {}, (None, False)),
        (None, {"bos_token": "<|im_start|>"}, (340, False)),
        (
            None,
            {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "add_bos_token": True},
            (340, True),
        ),
        (BOS, {"bos_token": "<|im_start|>"}, (340, True)),
        (BOS, {}, (340, True)),
        (
            {
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
                    BOS,
                ],
            },
            {},
            (340, True),
        ),
        (BOS, {"bos_token": "<|im_start|>", "add_bos_token": False}, (340, False)),
        (BOS | {"single": BOS["single"][1:]}, {"bos_token": None}, (None, False)),
    ],
)
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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 342}}, (341, 342)),
        ({"generation_config": {"eos_token_id": [342, 341, 7]}}, (341, 342, 7)),
        ({"generation_config": {"eos_token_id": [7, 342]}, "tokenizer_config": {}}, (7, 342)),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, (341,)),
        ({"tokenizer_config": {}, "config": {"eos_token_id": 342}}, (342,)),
        ({"config": {"eos_token_id": 2}}, (341,)),  # a class's default beside a tokenizer that knows better
        ({"generation_config": {"eos_token_id": None}}, (341,)),
    ],
)
def test_the_end_tokens_of_all_files_count(tmp_path, files, expected):
    tokenizer = imported(tmp_path, trained(), **files)
    assert tokenizer.eos_ids == expected and tokenizer.eos_id == expected[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        ({"tokenizer_config": {"pad_token": "<|im_end|>", "unk_token": "<|im_start|>"}}, (341, 340)),
        ({"tokenizer_config": {"pad_token": {"content": "<think>"}, "unk_token": None}}, (342, None)),
        ({"special_tokens_map": {"pad_token": "<|im_end|>"}}, (341, None)),
        ({"generation_config": {"pad_token_id": 340}, "config": {"pad_token_id": 342}}, (340, None)),
        ({"generation_config": {"pad_token_id": None}, "config": {"pad_token_id": 342}}, (342, None)),
        # No added token: transformers would make one.
        ({"tokenizer_config": {"pad_token": "[PAD]", "unk_token": "the"}}, (None, None)),
        ({"config": {"pad_token_id": -1}}, (None, None)),
        ({"config": {"pad_token_id": 7}}, (None, None)),
        ({"config": {"pad_token_id": [340]}}, (None, None)),
    ],
)
def test_padding_and_the_unknown_token_are_kept_for_an_export(tmp_path, files, expected):
    files = {name: {"eos_token": "<|im_end|>"} | content for name, content in files.items()}
    tokenizer = imported(tmp_path, trained(), **files)
    assert (tokenizer.pad_id, tokenizer.unk_id) == expected
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    again = read_tokenizer(tmp_path / "out")
    assert (again.pad_id, again.unk_id) == expected and again.fingerprint() == tokenizer.fingerprint()
    old = tokenizer.to_dict()
    del old["settings"]["pad_id"], old["settings"]["unk_id"]
    assert Tokenizer.from_dict(old).pad_id is None


def test_the_chat_template_is_found_where_old_and_new_folders_have_it(tmp_path):
    names = {"eos_token": "<|im_end|>"}
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for n, (template, expected) in enumerate([("one", "one"), (several, "D"), (None, None)]):
        config = names | {"chat_template": template}
        assert (
            imported(tmp_path / str(n), trained(size=300), tokenizer_config=config).chat_template == expected
        )
    (tmp_path / "0" / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    assert read_tokenizer(tmp_path / "0").chat_template == "{{ é }}"


def test_added_tokens_that_only_tokenizer_config_names_are_found(tmp_path):
    token = {
        "content": "<tool>",
        "special": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    config = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"343": token, "341": {"content": "<|im_end|>"}},
    }
    tokenizer = imported(tmp_path, trained(), tokenizer_config=config)
    assert tokenizer.encode_template("a<tool>")[-1] == 343 and tokenizer.n_ids == 344
    assert tokenizer.decode([7, 343]).endswith("<tool>") and tokenizer.name_of_special == {
        340: "<|im_start|>",
        341: "<|im_end|>",
    }


# ---- bad input ----


def naming(**keys) -> dict:
    """A tokenizer_config.json with these keys."""
    return {"tokenizer_config": {"eos_token": "<|im_end|>"} | keys}


def damaged(**changes) -> dict:
    source = trained(size=300)
    for key, value in changes.items():
        source["model" if key != "added" else "added_tokens"] = (
            source["model"] | value if key != "added" else [source["added_tokens"][0] | value]
        )
    return source


@pytest.mark.parametrize(
    ("source", "files", "match"),
    [
        (damaged(model={"type": "WordPiece"}), {}, "a WordPiece tokenizer; only BPE"),
        (damaged(model={"type": "Unigram", "vocab": [["a", 0.0]]}), {}, "a Unigram tokenizer; only BPE"),
        ({"model": 3}, {}, "is no tokenizer"),
        ({"a": 1}, {}, "is no tokenizer"),
        ([1], {}, "no JSON object"),
        (damaged(model={"merges": [["t", "h", "e"]]}), {}, "tokenizer.json"),
        (damaged(model={"merges": [["a", "b"]]}), {}, "tokenizer.json"),
        (damaged(model={"merges": 3}), {}, "is damaged"),
        (
            damaged(),
            {"tokenizer_config": {"eos_token": "</s>"}},
            "eos_token is '</s>', which tokenizer.json does not have",
        ),
        (damaged(), {"tokenizer_config": {}}, "names no end token.*generation_config.json"),
        (damaged(), {"generation_config": {"eos_token_id": 9999}}, "eos_token_id is 9999, which is no token"),
        (damaged(), {"generation_config": {"eos_token_id": "2"}}, "expected an integer or a list"),
        (
            damaged(),
            {"tokenizer_config": {"eos_token": "<|im_end|>", "add_bos_token": True}},
            "begin with bos, but there is none",
        ),
        (
            damaged(),
            {"tokenizer_config": {"added_tokens_decoder": {"301": {"content": "</s>"}}}},
            "take both files from one model",
        ),
        (damaged(), {"tokenizer_config": [1]}, "tokenizer_config.json is no JSON object"),
        (damaged() | {"added_tokens": None}, {}, "tokenizer.json: added_tokens is None; expected a list"),
        (damaged() | {"added_tokens": {"1": {}}}, {}, "added_tokens is .*; expected a list"),
        (damaged(added={"id": None}), {}, "added_tokens has .*'id': None.*expected an object with id"),
        (damaged(added={"id": "300"}), {}, "added_tokens has .*'id': '300'"),
        (damaged(added={"id": -1}), {}, "added_tokens has .*'id': -1"),
        (damaged(model={"vocab": {"a": 1.0}}), {}, "the id of 'a' is 1.0, expected a whole number"),
        (damaged(added={"id": True}), {}, "added_tokens has .*'id': True"),
        (damaged(added={"content": None}), {}, "added_tokens has .*'content': None"),
        (damaged() | {"added_tokens": ["<|im_end|>"]}, {}, r"added_tokens has '<\|im_end\|>'; exp"),
        (damaged(added={"special": None}), {}, "tokenizer.json"),
        (damaged(), naming(added_tokens_decoder=None), "added_tokens_decoder is None"),
        (damaged(), naming(added_tokens_decoder=[1]), "tokenizer_config.json: added_"),
        (damaged(), naming(added_tokens_decoder={"301": "x"}), "added_tokens_decoder has 'x'; expected"),
        (damaged(), naming(added_tokens_decoder={"x": {"content": "y"}}), "is {'x'.* keys are ids"),
        (damaged(), naming(eos_token=["x"]), "is damaged"),
        (damaged() | {"post_processor": 3}, {}, "is damaged"),
        (damaged(), naming(add_bos_token="false"), "'false' in tokenizer_config.json; expected"),
        (damaged(), naming(chat_template=5), "chat_template is 5 in tokenizer_config.json"),
        (damaged(), naming(chat_template=["x"]), "is damaged"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, source, files, match):
    write_folder(tmp_path, source, **files)
    with pytest.raises(ValueError, match=match) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("depth", [400, 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_nested_without_end_is_refused_in_one_line(tmp_path, name, depth):
    write_folder(tmp_path, trained(size=300))
    part = '{"type": "Sequence", "processors": ['
    nested = part * depth + "]}" * depth
    whole = json.loads((tmp_path / name).read_text())
    text = json.dumps(whole | {"post_processor": 0, "x": 0})
    text = text.replace('"post_processor": 0', f'"post_processor": {nested}')
    (tmp_path / name).write_text(text)
    if name == "tokenizer_config.json" and depth == 400:
        assert read_tokenizer(tmp_path).eos_ids  # a key of no meaning
        return
    with pytest.raises(ValueError, match=r"\A[^\n]*(download|refuses)[^\n]*\Z"):
        read_tokenizer(tmp_path)


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
