"""Checkpoints that something happens to: damage is found and named, and the one before it is used; a save
that fails or is killed leaves what was there."""
import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r1zero.model import checkpoint
from r1zero.model.checkpoint import CheckpointError, checkpoint_steps, load_checkpoint, save_checkpoint
from r1zero.model.files import atomic_write_json, atomic_write_text

from .checkpoint_cases import assert_sound, fails, names, save, two_saved

ROOT = Path(__file__).parents[2]


# ---- torn and foreign ones ----

def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGE = [
    ("model.safetensors has 0 bytes", lambda path: (path / "model.safetensors").write_bytes(b"")),
    ("model.safetensors has 100 bytes, expected", lambda path: os.truncate(path / "model.safetensors", 100)),
    ("optimizer.safetensors does not match", lambda path: flip(path / "optimizer.safetensors", -1)),
    ("model.safetensors does not match", lambda path: flip(path / "model.safetensors", 0)),
    ("model.safetensors is missing", lambda path: (path / "model.safetensors").unlink()),
    ("state.json is missing", lambda path: (path / "state.json").unlink()),
    ("state.json is not valid JSON", lambda path: os.truncate(path / "state.json", 100)),
    ("state.json is not valid JSON", lambda path: (path / "state.json").write_bytes(b"\xff\0" * 99)),
    ("state.json is not valid JSON", lambda path: (path / "state.json").write_text("[" * 1_000_000)),
    ("state.json does not match", lambda path: edit(path / "state.json", "na\\u00efve", "native")),
    ("state.json was not written by r1zero", lambda path: (path / "state.json").write_text('{"step": 3}')),
    ("not written by r1zero", lambda path: (path / "state.json").write_text("[1]")),
    ("its format is version 1, this r1zero reads 2; train the run again with this one",
     lambda path: edit(path / "state.json", '"version": 2', '"version": 1')),
    ("its format is version 3, this r1zero reads 2; use the one that wrote it",
     lambda path: edit(path / "state.json", '"version": 2', '"version": 3')),
    ("state.json cannot be read: Is a directory",
     lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir())),
]


@pytest.mark.parametrize("reason, spoil", DAMAGE)
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path, reason, spoil):
    path = two_saved(tmp_path)
    spoil(path)
    with pytest.warns(UserWarning, match=f"step_00000001 .*step_00000002: .*{reason}"):
        assert_sound(load_checkpoint(tmp_path), 1)
    for folder, which in ((tmp_path, 2), (path, "last")):  # what was asked for by name is not replaced
        with fails(f"step_00000002 cannot be used: {reason}$" if "version" in reason else
                   f"step_00000002: .*{reason}.*name another step"):
            load_checkpoint(folder, which)
    spoil(tmp_path / "checkpoints" / "step_00000001")
    with fails(f"step_00000002 cannot be used: {reason}$" if "version" in reason else
               f"step_00000002: .*{reason}.*step_00000001: .*{reason}"):
        load_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    two_saved(run)
    return run


@given(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]), st.integers(0, 10_000),
       st.integers(0, 255))
def test_any_changed_byte_is_harmless_or_found(run_of_two, name, position, value):
    path = run_of_two / "checkpoints" / "step_00000002" / name
    original = path.read_bytes()
    changed = bytearray(original)
    changed[position % len(original)] = value
    path.write_bytes(changed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = load_checkpoint(run_of_two)
    if name != "state.json":  # where white space may change
        assert len(warned) == (changed != original)
    assert_sound(found, 2 - len(warned))
    path.write_bytes(original)


@pytest.mark.parametrize("spoil, match", [
    (lambda run: run / "nowhere", "nowhere does not exist; expected the folder of a run"),
    (lambda run: "Qwen/Qwen3-0.6B", "not fetched by name.* hf download Qwen/Qwen3-0.6B --local-dir Qwen3"),
    (lambda run: (run / "file").write_text("x") and run / "file", "file is a file; expected the folder"),
    (lambda run: run, "not the folder of a run: it holds nothing, and no checkpoints/. Give the folder"),
    (lambda run: [(run / c).touch() for c in "abcdef"] and run, "holds a, b, c, d, e, …, and no check"),
    (lambda run: (run / "checkpoints").mkdir() or run, "holds no checkpoint yet; start the run afresh"),
    (lambda run: (run / "checkpoints").touch() or run, "it holds checkpoints, and no checkpoints/"),
    (lambda run: run / ("x" * 300), "cannot read .*: File name too long; give one you may read"),
])
def test_foreign_folders(tmp_path, spoil, match):
    with fails(match):
        load_checkpoint(spoil(tmp_path))


def test_unknown_steps(tmp_path):
    two_saved(tmp_path)
    for which in (3, "first"):
        with fails(rf"no checkpoint {which!r}; expected 'last', 'best' or one of the steps \[1, 2\]"):
            load_checkpoint(tmp_path, which)


# ---- when saving fails ----

def test_killed_at_any_moment(tmp_path):
    command = [sys.executable, "-m", "tests.model.kill_checkpoints", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"killed (\d+)", done.stdout)[1]) > 20


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_at_any_call(tmp_path, monkeypatch, step, call):
    real = getattr(os, call)
    for number in itertools.count(1):
        run = tmp_path / str(number)
        two_saved(run)
        count = itertools.count(1)

        def full(*args, count=count, number=number):
            if next(count) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, call, full)
        try:
            save(run, step)
        except CheckpointError as error:
            assert re.search(rf"cannot save .* step {step} in .*: No space left .* MB are free", str(error))
            monkeypatch.setattr(os, call, real)
            last = checkpoint_steps(run)[-1]
            assert f"The checkpoint of step {last} is intact" in str(error)
            assert_sound(load_checkpoint(run), last)
            assert set(names(run)) <= {f"step_{step:08d}" for step in (1, 2, 3)}
            continue
        monkeypatch.setattr(os, call, real)
        assert checkpoint_steps(run)[-1] == step
        if next(count) <= number:  # not reached any more (else: an old checkpoint stays, with a warning)
            break
    assert number > 2 and checkpoint_steps(run)[-1] == step


def test_files_and_folders_are_flushed_before_the_rename_that_shows_them(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append(Path(new).name), rename(old, new)))
    path = save(tmp_path, 1)
    cut = events.index(path.name)
    assert set(events[:cut]) >= {p.stat().st_ino for p in (path, *path.iterdir())}
    assert path.parent.stat().st_ino in events[cut:]


def test_a_file_size_limit_is_told_like_a_full_disk(tmp_path):
    two_saved(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a failure inside safetensors' own writer
    try:
        with fails(r"step 3 in .*File too large.* It needs 0\.4 MB.* step 2 is intact; make room"):
            save_checkpoint(tmp_path, 3, {"model": {"w": torch.zeros(100_000)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert_sound(load_checkpoint(tmp_path), 2)


def test_a_place_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "file").touch()
    with fails("cannot save the checkpoint of step 1 in .*Not a directory.*There is no earlier checkpoint"):
        save(tmp_path / "file", 1)


def test_what_is_no_json_or_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    two_saved(tmp_path)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, {}, {"config": object()})
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_a_killed_save_left_is_read_and_tidied(tmp_path):
    path = two_saved(tmp_path)
    path.rename(path.with_suffix(".old"))
    (path.parent / ".tmp-best.json").touch()
    shutil.copytree(path.with_suffix(".old"), path.parent / ".tmp-step_00000003")
    assert_sound(load_checkpoint(tmp_path), 2)
    assert checkpoint_steps(tmp_path) == [1, 2]
    save(tmp_path, 4)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    shutil.copytree(path, path.with_suffix(".old"))
    (path / "state.json").unlink()
    assert_sound(load_checkpoint(tmp_path, 4), 4)
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_atomic_text_and_json(tmp_path, monkeypatch):
    atomic_write_text(tmp_path / "a", "one")
    atomic_write_json(tmp_path / "b", {"x": 1})
    assert (tmp_path / "a").read_text() == "one" and json.loads((tmp_path / "b").read_text()) == {"x": 1}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*/a'"):
            patch.setattr(os, call, full)
            atomic_write_text(tmp_path / "a", "two")
        assert (tmp_path / "a").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


# ---- file systems that can do less, and trainers that go on beside a reader ----

def refusing(call, number: int):
    """`call`, refused with an errno."""
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return refused


@pytest.mark.parametrize("name, number", [("fsync", errno.EINVAL), ("fsync", errno.EOPNOTSUPP),
                                          ("fsync", errno.ENOSYS), ("chmod", errno.EPERM)])
def test_a_mount_that_cannot_flush_or_change_modes_can_be_saved_to(tmp_path, monkeypatch, name, number):
    monkeypatch.setattr(os, name, refusing(name, number))
    save(tmp_path, 1)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_broken_or_full_is_told(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refusing("fsync", number))
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 1"):
        save(tmp_path, 1)


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_discard", refusing("rename", errno.EBUSY))
    with pytest.warns(UserWarning, match="an old checkpoint in .* cannot be removed: .*busy"):
        save(tmp_path, 2, keep_last=1)
    assert checkpoint_steps(tmp_path) == [1, 2] and load_checkpoint(tmp_path).step == 2


def test_a_reader_beside_a_trainer_that_removes_old_checkpoints_finds_the_new_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    read, trained = checkpoint._read_folder, iter([2, 3])

    def overtaken(path, groups):
        step = next(trained, None)
        if step:
            save(tmp_path, step, keep_last=1)
        return read(path, groups)

    monkeypatch.setattr(checkpoint, "_read_folder", overtaken)
    assert load_checkpoint(tmp_path).step == 3
    with pytest.raises(CheckpointError, match="has no checkpoint 1"):
        load_checkpoint(tmp_path, 1)


def test_what_is_not_asked_for_may_be_missing(tmp_path):
    save(tmp_path, 1)
    [other] = [path for path in (tmp_path / "checkpoints/step_00000001").glob("*.safetensors")
               if path.name != "model.safetensors"]
    other.unlink()
    found = load_checkpoint(tmp_path, groups=("model",))
    assert set(found.tensors) == {"model"}
    with pytest.raises(CheckpointError, match=f"{other.name} is missing"):
        load_checkpoint(tmp_path)


def test_a_file_of_tensors_that_cannot_be_parsed_is_damage(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = tmp_path / "checkpoints/step_00000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    files = state["content"]["files"]
    files["model.safetensors"] |= {"bytes": 100, "crc32": zlib.crc32(b"\xff" * 100)}
    state["crc32"] = zlib.crc32(json.dumps(state["content"]).encode())
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="model.safetensors cannot be read"):
        assert load_checkpoint(tmp_path).step == 1
