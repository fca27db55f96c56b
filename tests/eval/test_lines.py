"""Files of lines: every bad line is named with its number, in any file, and can be skipped and counted."""
import json

import pytest

from r1zero.eval.lines import MAX_NAMED, json_object, parse_lines, read_lines
from r1zero.eval.tasks.catalogue import find_task, make_task
from r1zero.eval.tasks.game24 import load_game24
from r1zero.train.cli.grade import read_responses
from r1zero.train.conversations import read_conversations
from r1zero.train.data import read_documents


def numbered(path):
    return [(line.number, line.text) for line in read_lines(path)]


def test_a_line_ends_with_a_line_feed_and_with_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_bytes("\ufeffa\u2028b\x85\x0c\x1cc\r\n\r\n \t\nd\re".encode())
    assert numbered(path) == [(1, "a\u2028b\x85\x0c\x1cc\r"), (4, "d\re")]
    path.write_bytes(b"")
    assert numbered(path) == []


def test_a_byte_that_is_no_text_makes_its_own_line_bad_alone(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"a\n\xc3\nb\0c\n\xff\n" + "é".encode())
    reasons = "line 2: its byte 1 is not UTF-8; line 3: its byte 2 is 0; line 4: its byte 1"
    with pytest.raises(ValueError, match=reasons):
        parse_lines(path, read_lines(path), str, "letters")
    assert parse_lines(path, read_lines(path), str, "letters", skip_bad=True) == [(1, "a"), (5, "é")]


@pytest.mark.parametrize("content, why", [
    (b"\xff\xfea\0", "UTF-16"), (b"\xfe\xff\0a", "UTF-16"), (b"\x1f\x8b\x08", "gzip"),
    (None, "No such file")])
def test_a_file_of_another_kind_is_named_as_such(content, why, tmp_path):
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_lines(tmp_path / "f")
    for wrong in (tmp_path, "nul\0byte"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_lines(wrong)


# ---- the same rules for every reader of lines ----

def grade_reader(path, skip_bad):
    return read_responses(path, find_task("countdown"), skip_bad)


def gsm8k_reader(path, skip_bad):
    task = make_task("gsm8k", path=str(path), skip_bad=skip_bad)
    kept = task.problems("test", task.size("test"))
    assert (task.lines_skipped > 0) == (len(kept) < 3) == skip_bad
    return kept


READERS = {  # name: (reader, its head, a good line)
    "pairs": (read_conversations, [], '{"prompt": "a", "response": "b"}'),
    "documents": (read_documents, [], '{"text": "a"}'),
    "responses": (grade_reader, [], '{"numbers": [1, 2], "target": 3, "response": "x"}'),
    "gsm8k": (gsm8k_reader, [], '{"question": "a", "answer": "#### 1"}'),
    "game24": (load_game24, ["Rank,Puzzles"], "1,1 1 4 6"),
}
BAD = [b"{", b"\xff", b"a\0b", b"[1]", b'"x"', b"NaN", b"[" * 10**5, b"1" * 5000, b'{"a": 1}', b"7,1 2 x 4",
       b'"7', b"null", "caf\xe9".encode("latin-1")]


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """(read, write): write(lines) makes a file of these lines with its head; None stands for a good line."""
    read, head, good = READERS[request.param]
    path = tmp_path / "f.jsonl"

    def write(lines):
        lines = [good.encode() if line is None else line for line in lines]
        path.write_bytes(b"\n".join([*(line.encode() for line in head), *lines]))
        return path, len(head)
    return read, write


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_with_its_number_or_skipped(bad, reader, capsys):
    read, write = reader
    path, head = write([None, b"", bad, None])
    with pytest.raises(ValueError, match=rf"f.jsonl, line {head + 3}: .+; expected .+--skip-bad") as error:
        read(path, False)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    kept = read(path, True)
    assert len(kept) == 2 and getattr(kept, "n_skipped", 1) == 1
    said = capsys.readouterr().err
    assert f"f.jsonl: skipped 1 of 3 lines: line {head + 3}: " in said


def test_up_to_ten_bad_lines_are_named_at_once_and_the_others_counted(reader):
    read, write = reader
    path, head = write([None] + [b"{"] * 13 + [None, b"\xff"])
    with pytest.raises(ValueError) as error:
        read(path, False)
    text = str(error.value)
    assert text.count("line ") == MAX_NAMED and f"line {head + 11}: " in text
    assert "; and 4 more bad lines; expected" in text
    kept = read(path, True)
    assert len(kept) == 2


def test_a_file_of_nothing_but_bad_lines_is_an_error_and_so_is_an_empty_one(reader):
    read, write = reader
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="; no line is good"):
            read(write([b"{", b"\xff"])[0], skip_bad)
        with pytest.raises(ValueError, match="is empty|holds no"):
            read(write([b" "])[0], skip_bad)


def test_what_is_skipped_is_counted_over_all_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n{\n{"text": " "}\n')
    documents = read_documents(tmp_path, skip_bad=True)
    assert documents == ["x", "x"] and documents.n_skipped == 2  # an empty text is no bad line


def test_a_reason_is_short_and_a_value_keeps_its_line(tmp_path, capsys):
    path = tmp_path / "f"
    path.write_text("a\n\nb\n")

    def parse(text):
        if text == "b":
            raise ValueError("x" * 1000)
        return text.upper()
    kept = parse_lines(path, read_lines(path), parse, "letters", skip_bad=True)
    assert kept == [(1, "A")] and kept.values() == ["A"] and kept.values().n_skipped == 1
    assert len(capsys.readouterr().err) < 400


def test_where_json_breaks_is_counted_within_the_line():
    with pytest.raises(ValueError, match="not JSON: Expecting value at character 7"):
        json_object('{"a": }')
    assert json_object(json.dumps({"a": "\ud800"})) == {"a": "\ud800"}
