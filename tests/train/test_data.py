"""Text data: errors that name the place in a file, tokens that end with the end token."""
import json
import math

import numpy as np
import pytest

from r1zero.model.tokenizer import Tokenizer
from r1zero.train.data import encode_documents, read_documents, split_tail


def file(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- files -------------------------------------------------------------------------------------------------

def test_files_directories_and_their_order(tmp_path):
    a = file(tmp_path, "d/b.txt", "second\r\n")
    file(tmp_path, "d/a/deep.md", "first")
    file(tmp_path, "d/c.JSONL", '{"text": "third\\nline", "n": 1}\r\n\n{"text": " "}\n{"text": "4\u2028th"}')
    file(tmp_path, "d/image.png", b"\x89PNG\0")
    file(tmp_path, "d/.hidden/x.txt", "no")
    file(tmp_path, "d/.y.txt", "no")
    expected = ["first", "second\r\n", "third\nline", "4\u2028th"]
    assert read_documents(tmp_path / "d") == read_documents([str(tmp_path / "d")]) == expected
    assert read_documents([a, tmp_path / "d"]) == ["second\r\n", *expected]
    assert read_documents([file(tmp_path, "bom.py", "\ufeffx = 1")]) == ["x = 1"]


@pytest.mark.parametrize(("name", "content", "match"), [
    ("a.txt", "", "is empty"), ("a.txt", " \n\t", "is empty"), ("a.jsonl", "\n", "is empty"),
    ("a.txt", "ab\0c", "binary: byte 2"), ("a.txt", b"ab\xffc", "UTF-8 at byte 2"),
    ("a.txt", "text".encode("utf-16"), "not UTF-8 text but UTF-16"),
    ("a.txt", "café".encode("latin-1"), "at byte 3"),
    ("a.jsonl", b'{"text": "a"}\n\xff', "line 2: its byte 1 is not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": ""', "line 3: not JSON"), ("a.jsonl", "x", "line 1: not JSON"),
    ("a.jsonl", "[" * 100_000, "line 1: not JSON"), ("a.jsonl", "[1]", "line 1: a JSON list"),
    ("a.jsonl", '{"text": "a"}\n{"T": "b"}', r"line 2: no text in a field `text` \(its fields: 'T'\)"),
    ("a.jsonl", '{"text": 3}', "line 1: no text"), ("a.jsonl", "{}", "line 1: no text"),
    ("a.jsonl", '{"text": ""}', "no documents in"), ("d/a.csv", "a,b", "holds no .txt")])
def test_bad_files_name_the_place(tmp_path, name, content, match):
    path = file(tmp_path, name, content)
    with pytest.raises(ValueError, match=match) as error:
        read_documents([path if path.parent == tmp_path else path.parent])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="no.txt cannot be read: No such file"):
        read_documents(tmp_path / "no.txt")
    with pytest.raises(ValueError, match="no documents in an empty list"):
        read_documents([])


def test_bad_lines_are_skipped_and_counted(tmp_path, capsys):
    good = json.dumps({"text": "c"})
    path = file(tmp_path, "d.jsonl", "\n".join([good, "{", json.dumps({"text": 3}), good]))
    kept = read_documents(path, skip_bad=True)
    assert (kept, kept.n_skipped) == (["c"] * 2, 2) and "skipped 2 of 4 lines" in capsys.readouterr().err
    with pytest.raises(ValueError, match="line 2: .*; line 3: "):
        read_documents(path)


# ---- tokens ------------------------------------------------------------------------------------------------

def test_documents_end_with_eos():
    tokenizer = Tokenizer.from_words(["ab", "abc"])
    assert [d.tolist() for d in encode_documents(tokenizer, ["abc", ""])] == [[257, tokenizer.eos_id],
                                                                              [tokenizer.eos_id]]


def test_split_tail():
    train, tail = split_tail(np.arange(100), 0.1)
    assert train.tolist() == list(range(90)) and tail.tolist() == list(range(90, 100))
    assert len(split_tail(np.arange(10), 0.001)[1]) == 2
    for share in (0, 1, -0.1, 2, math.nan):
        with pytest.raises(ValueError, match="held-out share"):
            split_tail(np.arange(100), share)
    with pytest.raises(ValueError, match="has 3 tokens"):
        split_tail(np.arange(3), 0.1)


# ---- files that would be read as something else ----

@pytest.mark.parametrize("name, content", [
    ("part.json", '{"text": "a"}\n{"text": "b"}\n'), ("part.ndjson", '{"text": "a"}\n'), ("63", '["a"]'),
    ("pretty.json", '{\n  "text": "a"\n}\n')])
def test_json_under_another_name_is_not_trained_on_as_it_stands(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="holds JSON, and would be trained on as it stands"):
        read_documents(tmp_path / name)
    (tmp_path / "meant.txt").write_text(content)
    assert read_documents(tmp_path / "meant.txt") == [content]


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match="a.txt is a pointer of Git LFS; fetch the file: git lfs pull"):
        read_documents(tmp_path / "a.txt")


def test_what_a_directory_holds_besides_is_named_and_a_broken_link_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    assert read_documents(tmp_path) == ["a"] and capsys.readouterr().err == ""
    for name in ("b.json", "c.json", "sub/d.gz"):
        (tmp_path / name).touch()
    assert read_documents(tmp_path) == ["a"]
    assert "1 files are read, others are left out (2 .json, 1 .gz)" in capsys.readouterr().err
    (tmp_path / "e.txt").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match="e.txt is a link to nothing"):
        read_documents(tmp_path)
