"""Text data: files -> documents -> tokens. batches.py takes it from there.

    read_documents      files to text, with errors that say how to mend the file
    encode_documents    text to tokens; every document ends with the end token
    split_tail          cut off the end of a long text, to hold it out

Conversations have a file of their own (conversations.py). Left out: worker processes and memory
maps (the text is read whole; it is expected to be megabytes), downloads. mixture.py mixes sources
by weight.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..eval.console import say
from ..eval.lines import Kept, json_object, parse_lines, read_bytes, read_lines
from ..eval.response import quoted
from ..model.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")  # the files that are read from a directory
MOST_KINDS = 5  # kinds of other files that a message names


# ---- files to text -------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The file's text, without a byte-order mark. Raises ValueError if it has none."""
    data = read_bytes(path)
    mend = "expected UTF-8 text (.txt, .md or .jsonl); convert the file or leave it out"
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"data file {path} is binary: byte {nul} is 0; {mend}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 at byte {error.start}; {mend}") from None
    if not text.strip():
        raise ValueError(f"data file {path} is empty; fill it or leave it out")
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"data file {path} is a pointer of Git LFS; fetch the file: git lfs pull")
    if path.suffix.lower() not in TEXT_SUFFIXES and is_json(text):
        raise ValueError(
            f"data file {path} holds JSON, and would be trained on as it stands, brackets and "
            "all; make it JSON lines and call it .jsonl, or call it .txt if that is meant"
        )
    return text


def is_json(text: str) -> bool:
    """Whether a text, or its first line, is JSON that holds something."""
    for part in (text.strip().partition("\n")[0], text):
        try:
            if isinstance(json.loads(part), dict | list):
                return True
        except (ValueError, RecursionError):
            pass
    return False


def texts_of(line: str, fields: Sequence[str]) -> list[str]:
    """The texts in these fields of a line of JSON; ValueError for a field without text."""
    record = json_object(line)
    for field in fields:
        if not isinstance(record.get(field), str):
            found = quoted(", ".join(record))
            raise ValueError(f"no text in a field `{field}` (its fields: {found})")
    return [record[field] for field in fields]


def text_of(line: str) -> str:
    """The field `text` of a line of JSON."""
    [text] = texts_of(line, ["text"])
    return text


def example_of(fields: Sequence[str]) -> str:
    """What a file with these fields holds, for its errors."""
    return "lines like {" + ", ".join(f'"{field}": "..."' for field in fields) + "}"


def is_jsonl(path: Path) -> bool:
    """Whether a file is read line by line, by its name."""
    return path.suffix.lower() == ".jsonl"


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files below a directory, sorted; hidden ones are left out."""
    if not path.is_dir():
        return [path]

    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(path).parts)

    found = []
    for file in sorted(path.rglob("*")):
        is_text = file.suffix.lower() in TEXT_SUFFIXES and not file.is_dir()
        if not is_text or is_hidden(file):
            continue
        if not file.exists():
            raise ValueError(f"data file {file} is a link to nothing; mend it or remove it")
        found.append(file)
    if not found:
        raise ValueError(
            f"data directory {path} holds no {', '.join(TEXT_SUFFIXES)} file; give one that does"
        )
    return found


def say_what_is_left_out(path: Path, n_read: int) -> None:
    """Name the kinds of files in a directory that are not read, if there are some."""
    kinds = Counter(file.suffix or file.name for file in path.rglob("*") if not file.is_dir())
    others = [kind for kind in kinds if kind.lower() not in TEXT_SUFFIXES]
    if others:
        named = ", ".join(f"{kinds[kind]} {kind}" for kind in others[:MOST_KINDS])
        say(f"{path}: {n_read} files are read, others are left out ({named})")


def read_documents(paths: str | Path | Sequence[str | Path], skip_bad: bool = False) -> Kept[str]:
    """The documents of files and directories, in order.

    A .jsonl file has one document in the field `text` of each line; empty ones are left out. Any
    other text file is one document. A directory stands for its .txt, .md and .jsonl files.
    skip_bad: leave the bad lines of .jsonl files out, and count them.

    Raises ValueError, in one line that says how to mend it, for a file that is missing, empty or
    binary (with the byte), for lines of .jsonl that are not JSON or lack `text` (with their
    numbers), and if there is no document at all.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    documents: Kept[str] = Kept([])
    for path in paths:
        files = text_files(Path(path))
        say_what_is_left_out(Path(path), len(files))
        for file in files:
            if is_jsonl(file):
                lines = parse_lines(file, read_lines(file), text_of, example_of(["text"]), skip_bad)
                documents += [text for text in lines.values() if text.strip()]
                documents.n_skipped += lines.n_skipped
            else:
                documents.append(read_text(file))
    if not documents:
        raise ValueError(
            f"no documents in {', '.join(map(str, paths)) or 'an empty list of files'}; give a "
            '.txt file, a .jsonl file with lines {"text": "..."}, or a directory of them'
        )
    return documents


# ---- text to tokens ------------------------------------------------------------------------------


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each document and the end token: int32 arrays.

    DocumentBatches takes them as they are, a TokenStream takes them joined by `np.concatenate`.
    """
    encoded = tokenizer.encode_batch(documents)
    return [np.array(ids + [tokenizer.eos_id], np.int32) for ids in encoded]


def split_tail(tokens: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut off the last `share` of the tokens to hold it out: (train, tail), at least 2 tokens each.

    Raises ValueError for a share outside (0, 1) or a text that is too short.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"the held-out share is {share}, expected more than 0 and less than 1, such as 0.1"
        )
    n_tail = max(2, round(len(tokens) * share))
    if len(tokens) - n_tail < 2:
        raise ValueError(
            f"the text has {len(tokens)} tokens, of which {n_tail} would be held out (share "
            f"{share}) and at least 2 must be left; give more text or a smaller share"
        )
    return tokens[:-n_tail], tokens[-n_tail:]
