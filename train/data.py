"""Text data: files -> documents or pairs -> tokens. batches.py takes it from there.

    read_documents, read_pairs      files to text, with errors that say how to mend the file
    encode_documents, encode_pairs  text to tokens; every document ends with the end token
    split_tail                      cut off the end of a long text, to hold it out

Left out: worker processes and memory maps (the text is read whole; it is expected to be megabytes),
downloads, mixing of sources.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..model.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")  # the files that are read from a directory


class Pair(NamedTuple):
    """One example for supervised fine-tuning."""

    prompt: str
    response: str


# ---- files to text -------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The file's text, without a byte-order mark. Raises ValueError if it has none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"data file {path} cannot be read ({error.strerror}); check the path"
        ) from None

    mend = "expected UTF-8 text (.txt, .md or .jsonl); convert the file or leave it out"
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"data file {path} is binary: byte {nul} is 0; {mend}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path} is not UTF-8 at byte {error.start}; {mend}") from None
    if not text.strip():
        raise ValueError(f"data file {path} is empty; fill it or leave it out")
    return text


def read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, texts of `fields`) for each line that is not blank.

    Raises ValueError, with the line's number, for a line that is not a JSON object or that lacks a
    field with text.
    """
    example = "{" + ", ".join(f'"{field}": "..."' for field in fields) + "}"
    lines = read_text(path).split("\n")  # splitlines() would also cut at U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"data file {path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} is not JSON ({error}); each line must be {example}"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is a JSON {type(record).__name__}; each line must be {example}"
            )
        for field in fields:
            if not isinstance(record.get(field), str):
                raise ValueError(
                    f"{where} has no text in a field `{field}` (its fields: {list(record)[:8]}); "
                    f"each line must be {example}"
                )
        yield number, [record[field] for field in fields]


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files below a directory, sorted; hidden ones are left out."""
    if not path.is_dir():
        return [path]

    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(path).parts)

    found = []
    for file in sorted(path.rglob("*")):
        is_text = file.suffix.lower() in TEXT_SUFFIXES and file.is_file()
        if is_text and not is_hidden(file):
            found.append(file)
    if not found:
        raise ValueError(
            f"data directory {path} holds no {', '.join(TEXT_SUFFIXES)} file; give one that does"
        )
    return found


def read_documents(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The documents of files and directories, in order.

    A .jsonl file has one document in the field `text` of each line; empty ones are left out. Any
    other text file is one document. A directory stands for its .txt, .md and .jsonl files.

    Raises ValueError, in one line that says how to mend it, for a file that is missing, empty or
    binary (with the byte), for a line of .jsonl that is not JSON or lacks `text` (with the line),
    and if there is no document at all.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    documents: list[str] = []
    for path in paths:
        for file in text_files(Path(path)):
            if file.suffix.lower() == ".jsonl":
                texts = [text for _, [text] in read_jsonl(file, ["text"])]
                documents += [text for text in texts if text.strip()]
            else:
                documents.append(read_text(file))
    if not documents:
        raise ValueError(
            f"no documents in {', '.join(map(str, paths)) or 'an empty list of files'}; give a "
            '.txt file, a .jsonl file with lines {"text": "..."}, or a directory of them'
        )
    return documents


def read_pairs(path: str | Path) -> list[Pair]:
    """The prompts and responses of a .jsonl file, for supervised fine-tuning.

    Raises ValueError as `read_documents` does, and for an empty prompt or response (with the line).
    """
    pairs = []
    for number, texts in read_jsonl(Path(path), Pair._fields):
        for field, text in zip(Pair._fields, texts, strict=True):
            if not text.strip():
                raise ValueError(
                    f"data file {path}, line {number}: `{field}` is empty; fill it or drop the line"
                )
        pairs.append(Pair(*texts))
    return pairs


# ---- text to tokens ------------------------------------------------------------------------------


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each document and the end token: int32 arrays.

    DocumentBatches takes them as they are, a TokenStream takes them joined by `np.concatenate`.
    """
    encoded = tokenizer.encode_batch(documents)
    return [np.array(ids + [tokenizer.eos_id], np.int32) for ids in encoded]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> tuple[list[np.ndarray], list[int]]:
    """(tokens of each prompt, its response and the end token; the number of prompt tokens in each).

    Both go to DocumentBatches. Prompt and response are encoded separately, because in sampling the
    prompt is encoded before the response exists.
    """
    prompts = tokenizer.encode_batch([pair.prompt for pair in pairs])
    responses = tokenizer.encode_batch([pair.response for pair in pairs])
    documents = [
        np.array(prompt + response + [tokenizer.eos_id], np.int32)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return documents, [len(prompt) for prompt in prompts]


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
