"""Kept completions are gzip for everybody; a step that is not whole is passed over, and cut off."""
import gzip
import json
import resource

import pytest

from r1zero.train.rollout_files import (
    Member,
    append_member,
    cut_after,
    kept_steps,
    part_path,
    parts_of,
    read_member,
    read_step,
    whole_members,
)

STEPS = {1: b'{"a": 1}\n', 2: b'{"a": 2}\n' * 3, 3: b""}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rollouts.jsonl.gz"
    for step, data in STEPS.items():
        append_member(path, step, data)
    return path


def test_a_file_is_gzip_for_every_reader_and_its_headers_say_where_a_step_is(path):
    assert gzip.decompress(path.read_bytes()) == b"".join(STEPS.values())
    members = whole_members(path)
    assert {member.step: read_member(member) for member in members} == STEPS
    assert members[-1].offset + members[-1].size == path.stat().st_size


def test_a_file_that_ends_at_any_byte_holds_its_whole_steps_and_goes_on(path):
    data, members = path.read_bytes(), whole_members(path)
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = [member for member in members if member.offset + member.size <= end]
        assert whole_members(path) == whole
        cut_after(path, 2)
        kept = [member for member in whole if member.step <= 2]
        assert (whole_members(path) if path.exists() else []) == kept
        append_member(path, 3, b"new")
        assert gzip.decompress(path.read_bytes()) == b"".join(STEPS[m.step] for m in kept) + b"new"


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\x1f\x8b\x08\x00" + b"x" * 99, b"text"])
def test_what_is_behind_the_last_whole_step_is_cut_off(path, tail):
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(whole_members(path)) == 3
    cut_after(path, 9)
    assert path.read_bytes() == whole


def test_a_header_that_says_impossible_sizes_ends_the_search(path):
    first, data = whole_members(path)[0], bytearray(path.read_bytes())
    for size in (0, 32, 2**63):
        data[first.size + 24:first.size + 32] = size.to_bytes(8, "little")
        path.write_bytes(data)
        assert whole_members(path) == [first]


def test_a_flipped_bit_in_a_header_deletes_no_later_step(path):
    data, damaged_at = path.read_bytes(), [m.offset for m in whole_members(path)[:2]]
    for start in damaged_at:
        for bit in (*range(16 * 8), *range(24 * 8, 32 * 8)):  # of the fixed bytes, and of the size
            damaged = bytearray(data)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="rollouts.jsonl.gz is .*restore it, or move it away"):
                cut_after(path, 9)
            assert path.read_bytes() == damaged


def test_damage_behind_the_steps_that_stay_is_cut_off_with_the_others(path):
    append_member(path, 4, b"behind the damage")
    first, _, third, _ = whole_members(path)
    data = bytearray(path.read_bytes())
    data[third.offset] ^= 1
    path.write_bytes(data)
    cut_after(path, 1)
    assert path.read_bytes() == data[:first.size]


@pytest.mark.parametrize("content", [b"{}\n", gzip.compress(b"{}\n"), b"\0" * 64],
                         ids=["text", "gzip", "zeros"])
def test_a_file_that_something_else_wrote_is_named_and_not_touched(tmp_path, content):
    path = tmp_path / "rollouts.jsonl.gz"
    path.write_bytes(content)
    for call in (whole_members, lambda path: cut_after(path, 1)):
        with pytest.raises(ValueError, match="rollouts.jsonl.gz is not as r1zero wrote it; .*move it away"):
            call(path)
    assert path.read_bytes() == content


def test_a_damaged_step_is_named_and_the_others_are_read(path):
    _, second, third = whole_members(path)
    data = bytearray(path.read_bytes())
    data[second.offset + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rollouts.jsonl.gz is damaged at step 2 \(.*give another step"):
        read_member(second)
    assert read_member(third) == STEPS[3]


def test_a_write_that_fails_leaves_the_file_as_it_was(path):
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))  # room for half of it
    try:
        with pytest.raises(OSError, match="File too large"):
            append_member(path, 6, bytes(range(256)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1, 9):
        append_member(part_path(tmp_path, number), number, json.dumps({"part": number}).encode())
    for stranger in ("rollouts.jsonl", "rollouts.x.jsonl.gz", "rollouts-of-rollouts.jsonl.gz"):
        (tmp_path / stranger).write_text("x")
    assert [number for number, _ in parts_of(tmp_path)] == [1, 2, 9, 10]
    steps = kept_steps(tmp_path)
    assert list(steps) == [1, 2, 9, 10] and isinstance(steps[9], Member)
    assert read_step(steps[9]) == [{"part": 9}]
