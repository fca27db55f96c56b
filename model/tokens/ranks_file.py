"""Files of ranks, as tiktoken has them: each line is `base64-of-the-token rank`."""

import base64
import binascii
from pathlib import Path


def _token_and_rank(line: bytes) -> tuple[bytes, int] | None:
    """The two fields of a line in a ranks file; None if it is malformed."""
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) >= 10:
        return None
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error:
        return None
    return (token, int(fields[1])) if token else None


def read_ranks(path: str | Path) -> list[bytes]:
    """The tokens in a .tiktoken file, by rank. Each of its lines is `base64-of-the-token rank`.

    Raises ValueError for a file that is missing, empty, binary or no such list (with the line's
    number), for a rank or token given twice, and for a rank left out.
    """
    wanted = "a ranks file has lines `base64 rank`, as GPT-2's gpt2.tiktoken"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"ranks file {path} cannot be read ({error.strerror}); check the path"
        ) from None
    if not data.strip():
        raise ValueError(f"ranks file {path} is empty; {wanted}")
    if not data.isascii() or b"\0" in data:
        raise ValueError(f"ranks file {path} is binary; {wanted}")

    token_of_rank: dict[int, bytes] = {}
    line_of_token: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.split():
            continue
        if (found := _token_and_rank(line)) is None:
            raise ValueError(
                f"ranks file {path}, line {number}: got {line[:60].decode()!r}; {wanted}"
            )
        token, rank = found
        if rank in token_of_rank:
            raise ValueError(
                f"ranks file {path}, line {number}: rank {rank} was given before, on line "
                f"{line_of_token[token_of_rank[rank]]}; each rank stands once"
            )
        if token in line_of_token:
            raise ValueError(
                f"ranks file {path}, line {number}: token {token!r} was given before, on line "
                f"{line_of_token[token]}; each token stands once"
            )
        token_of_rank[rank] = token
        line_of_token[token] = number

    for rank in range(len(token_of_rank)):
        if rank not in token_of_rank:
            raise ValueError(
                f"ranks file {path}: it has {len(token_of_rank)} ranks but rank {rank} is "
                "missing; they must run from 0 without a gap (leave out special tokens)"
            )
    return [token_of_rank[rank] for rank in range(len(token_of_rank))]
