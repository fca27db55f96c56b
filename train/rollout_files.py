"""The files of kept completions: gzip members, each with its step and its size in its header.

    <run>/rollouts.jsonl.gz, rollouts.2.jsonl.gz, ...       one member per step, in order

`zcat` and Python's `gzip` read such a file as any other. Beyond that, the headers alone say where
a step begins and ends, so that a large file is searched and cut without being unpacked. A member
that was half written when its process died is seen by its size.

    name    bytes  what
    fixed      16  the header of gzip with an extra field of 16 bytes, named R1
    number      8  the step, little-endian
    size        8  bytes of the whole member
    body           deflate
    end         8  CRC-32 and length of the data, which are checked when it is read

What a line holds is in rollout_log.py. Sources: RFC 1952, section 2.3.1.1 (extra fields); bgzip,
which keeps its block sizes there too.
"""

import gzip
import json
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

LEVEL = 1  # of compression: the fastest, because a training step waits for it
# Magic number, deflate, "has an extra field"; no time; fastest, unknown system; the extra field's
# length, name and inner length.
FIXED = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x04\xff" + b"\x14\x00" + b"R1" + b"\x10\x00"
NUMBERS = struct.Struct("<QQ")
END = struct.Struct("<II")
HEADER_BYTES = len(FIXED) + NUMBERS.size
NAME = re.compile(r"rollouts(?:\.(\d+))?\.jsonl\.gz")

# ---- members ----


@dataclass(frozen=True)
class Member:
    """Where a member is."""

    path: Path
    step: int
    offset: int
    size: int


def packed_member(step: int, data: bytes) -> bytes:
    """One member, header and end included."""
    body = zlib.compress(data, LEVEL, -zlib.MAX_WBITS)  # negative: deflate alone
    end = END.pack(zlib.crc32(data), len(data) & 0xFFFFFFFF)
    size = HEADER_BYTES + len(body) + len(end)
    return FIXED + NUMBERS.pack(step, size) + body + end


def whole_members(path: Path) -> list[Member]:
    """The members of a file in order, up to the first that is not whole.

    Raises OSError if the file cannot be read, and ValueError for one that something else wrote.
    """
    members = []
    with open(path, "rb") as file:
        end_of_file = file.seek(0, os.SEEK_END)
        offset = 0
        while offset < end_of_file:
            file.seek(offset)
            header = file.read(HEADER_BYTES)
            is_ours = header.startswith(FIXED) or FIXED.startswith(header)
            if not is_ours and offset == 0:
                raise ValueError(f"{path} is not as r1zero wrote it; restore it, or move it away")
            if len(header) < HEADER_BYTES or not is_ours:
                break
            step, size = NUMBERS.unpack(header[len(FIXED) :])
            if size <= HEADER_BYTES or offset + size > end_of_file:
                break
            members.append(Member(path, step, offset, size))
            offset += size
    return members


def read_member(member: Member) -> bytes:
    """What a member holds. Raises OSError if it cannot be read, ValueError if it is damaged."""
    with open(member.path, "rb") as file:
        file.seek(member.offset)
        packed = file.read(member.size)
    try:
        return gzip.decompress(packed)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{member.path} is damaged at step {member.step} ({error}); give another step"
        ) from None


def append_member(path: Path, step: int, data: bytes) -> None:
    """Append a member. If that fails, the file is as it was, and OSError is raised."""
    packed = packed_member(step, data)
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(packed):
                written += file.write(packed[written:])
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def check_tail(path: Path, whole: list[Member]) -> None:
    """Raise ValueError if more follows the whole members than one that was half written."""
    last = whole[-1] if whole else Member(path, 0, 0, 0)
    with open(path, "rb") as file:
        file.seek(last.offset)
        rest = file.read()
    # What was half written begins where the last member ends. A header anywhere else is that of a
    # later step, behind a header whose size or name is damaged.
    starts = {last.offset + match.start() for match in re.finditer(re.escape(FIXED), rest)}
    if starts - {last.offset, last.offset + last.size}:
        where = f"behind step {last.step}" if whole else "at its start"
        raise ValueError(
            f"{path} is damaged {where}, and later steps follow; restore it, or move it away"
        )


def cut_after(path: Path, step: int) -> None:
    """Cut off the members after `step`, and what is not whole; without members the file goes.

    Raises as `whole_members`, OSError if the file cannot be changed, and ValueError if it is
    damaged in its middle, so that steps that are to stay would go, too.
    """
    whole = whole_members(path)
    kept = [member for member in whole if member.step <= step]
    if len(kept) == len(whole):
        check_tail(path, whole)
    if not kept:
        path.unlink()
        return
    end = kept[-1].offset + kept[-1].size
    if end < path.stat().st_size:
        os.truncate(path, end)


# ---- the files of a run ----


def part_path(folder: Path, number: int) -> Path:
    """The file with this number, from 1."""
    return folder / ("rollouts.jsonl.gz" if number == 1 else f"rollouts.{number}.jsonl.gz")


def parts_of(folder: Path) -> list[tuple[int, Path]]:
    """(number, path) of the files in a run's folder, in order."""
    found = []
    for path in folder.glob("rollouts*.jsonl.gz"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1] or 1), path))
    return sorted(found)


def kept_steps(folder: Path) -> dict[int, Member]:
    """Where each step of a run is kept, in order; empty if none is.

    A step that is just being written is left out. Raises as `whole_members`.
    """
    members = [member for _, path in parts_of(folder) for member in whole_members(path)]
    return {member.step: member for member in members}


def read_step(member: Member) -> list[dict]:
    """The samples of a step, sorted by group. Raises as `read_member`."""
    return [json.loads(line) for line in read_member(member).splitlines()]
