"""Results are written aside and renamed: at any moment the earlier file or the new one."""
import json
import os
import signal
import subprocess
import sys

import pytest

from r1zero.eval.result_file import ResultFile, check_result_path, fingerprint, summary_path

ROWS = [{"a": 1}, {"a": "\ud800\u2028"}]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_lie_aside_until_all_are_there(tmp_path):
    out = tmp_path / "deep" / "out.v1"
    with ResultFile(out) as file:
        file.write(ROWS)
        assert not out.exists() and rows_of(tmp_path / "deep" / "out.v1.partial") == ROWS
    assert rows_of(out) == ROWS and os.listdir(out.parent) == ["out.v1"]
    assert fingerprint(out) == {"lines": 2, "crc32": fingerprint(out)["crc32"]}
    assert summary_path(out).name == "out.v1.summary.json"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_broken_off_call_leaves_the_earlier_result_and_says_where_its_own_is(error, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("earlier\n")
    with pytest.raises(error), ResultFile(out) as file:
        file.write(ROWS)
        raise error
    assert out.read_text() == "earlier\n" and rows_of(tmp_path / "out.partial") == ROWS
    assert capsys.readouterr().err == f"broken off: 2 results are in {out}.partial; {out} is as it was\n"
    with pytest.raises(error), ResultFile(out):
        raise error  # before anything was written: nothing is left, and nothing is said
    assert os.listdir(tmp_path) == ["out"] and capsys.readouterr().err == ""


KILLED = """
import os, signal, sys
from r1zero.eval.result_file import ResultFile
with ResultFile(sys.argv[1]) as file:
    file.write([{"a": 1}] * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_call_leaves_the_earlier_result_and_whole_lines_of_its_own(tmp_path):
    out = tmp_path / "out"
    out.write_text("earlier\n")
    done = subprocess.run([sys.executable, "-c", KILLED, out])
    assert done.returncode == -signal.SIGKILL
    assert out.read_text() == "earlier\n" and rows_of(tmp_path / "out.partial") == [{"a": 1}] * 1000


def test_results_that_cannot_be_renamed_stay_aside(tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="out"), ResultFile(out) as file:
        file.write(ROWS)
        out.mkdir()
        (out / "x").touch()
    assert rows_of(tmp_path / "out.partial") == ROWS and "2 results are in" in capsys.readouterr().err


def test_a_link_stays_a_link_and_a_device_or_pipe_is_written_to(tmp_path):
    target, link, pipe = tmp_path / "a" / "target", tmp_path / "link", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    with ResultFile(link) as file:
        file.write(ROWS)
    assert link.is_symlink() and rows_of(target) == ROWS and os.listdir(target.parent) == ["target"]
    check_result_path(os.devnull)
    with ResultFile(os.devnull) as file:
        file.write(ROWS)
    assert not os.path.isfile(os.devnull) and not os.path.exists(f"{os.devnull}.partial")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with ResultFile(pipe) as file:
        file.write(ROWS)
    assert len(os.read(reader, 1000).splitlines()) == 2
    os.close(reader)


def test_paths_that_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "in"
    given.write_text("input")
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft").symlink_to(given)
    (tmp_path / "hard").hardlink_to(given)
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b.summary.json").symlink_to(given)
    (tmp_path / "c.partial").hardlink_to(given)
    (tmp_path / "d.summary.json").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases = [("", "expected the path"), ("a\0b", "expected the path"), (".", "is a folder"),
             ("folder", "is a folder"), ("/", "is a folder"), ("in/x", "in is not a folder"),
             ("d", "is a folder"), ("x" * 250, "too long")]
    cases += [(spelling, "would replace the file") for spelling in (
        "in", "./in", "folder/../in", str(given), "soft", "hard", "linked/in", "b", "c")]
    for out, why in cases:
        with pytest.raises(ValueError, match=why) as error:
            check_result_path(out, [str(given)])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="would replace the file"):
        check_result_path("new", ["new.partial"])  # neither is there yet
    check_result_path("out", [str(given), "missing"])
    check_result_path("none/x")
    assert sorted(tmp_path.rglob("*")) == before and given.read_text() == "input"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_refused(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="is not writable"):
        check_result_path(str(tmp_path / "folder" / "x"))


def test_results_never_replace_the_files_of_a_run_or_a_checkpoint(tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    for path in (run / "run.json", run / "metrics.jsonl", run / "held_out.json", run / ".lock",
                 run / "checkpoints/best.json", checkpoint / "state.json", checkpoint / "model.safetensors"):
        path.touch()
        with pytest.raises(ValueError, match="would replace the file"):
            check_result_path(str(path.parent / "." / path.name))
    for path in (run / "eval.jsonl", checkpoint / "eval.jsonl", tmp_path / "metrics.jsonl"):
        for _ in range(2):  # a result may replace a result
            check_result_path(str(path))
            path.touch()
