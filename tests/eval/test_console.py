"""What is shown to a person never decides over the work: streams that are dead, full, closed or missing."""
import errno
import io
import os
import subprocess
import sys

import pytest

from r1zero.eval.console import Bar, Careful, leave_quietly, say, shout, show

from .console_cases import DEAD_STREAMS, Dead


@pytest.mark.parametrize("stream", DEAD_STREAMS)
def test_messages_results_and_bars_survive_a_stream_that_cannot_be_written(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", DEAD_STREAMS[stream]())
    monkeypatch.setattr(sys, "stdout", DEAD_STREAMS[stream]())
    with Bar(total=3, desc="work") as bar:
        for _ in range(3):
            bar.update(1)
            bar.set_postfix({"loss": "1"})
            say("a message above the bar")
            show("a result")
    assert list(Bar(range(4))) == [0, 1, 2, 3]


def test_on_a_sound_stream_all_of_it_arrives(capsys):
    say("to stderr")
    show("to stdout")
    found = capsys.readouterr()
    assert found.err == "to stderr\n" and found.out == "to stdout\n"


@pytest.mark.parametrize("columns", ["1", "7", "20", "400"])
def test_a_bar_fits_any_width(monkeypatch, columns, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", "24")
    with Bar(total=2, desc="work") as bar:
        bar.update(2)
        bar.set_postfix({"accuracy": "0.5", "kl_to_reference": "0.001"})
        bar.update(0)
    assert "work" in capsys.readouterr().err or columns == "1"


def test_a_message_clears_the_bar_of_the_same_terminal_alone():
    screen, other = Dead(errno.EIO, is_terminal=True), Dead(errno.EIO, is_terminal=True)
    file = Dead(errno.EIO)
    assert Careful(screen) == Careful(screen) and Careful(screen) == Careful(other)
    assert Careful(file) == Careful(file) and Careful(file) != Careful(screen)


def test_a_signal_handler_can_speak_while_the_stream_is_being_written(monkeypatch, capfd):
    class Busy(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Busy())
    shout("finishing")
    assert "finishing" in capfd.readouterr().err


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_no_file_gets_the_number_of_a_standard_stream_that_the_caller_closed(tmp_path, closed):
    code = f"""
import os
from r1zero.eval.console import fill_missing_streams, leave_quietly, say, show
fill_missing_streams()
file = open({str(tmp_path / "log")!r}, "w")
assert file.fileno() > 2
os.write(2, b"a library's message")
say("message"); show("result")
file.write("row")
file.close()
leave_quietly()
"""
    close = lambda: [os.close(number) for number in closed]  # noqa: E731
    done = run_python(code, preexec_fn=close)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "row"


@pytest.mark.parametrize("length", [1, 100_000])
def test_the_exit_code_is_the_works_own_when_the_reader_has_gone(length):
    code = f"""
import sys
from r1zero.eval.console import leave_quietly, say, show
show("x" * {length}); say("y" * {length})
leave_quietly()
sys.exit(4)
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer, timeout=60)
    os.close(writer)
    assert done.returncode == 4


def test_leaving_says_that_all_was_written_where_it_was():
    assert leave_quietly()


@pytest.mark.parametrize("variable", ["TQDM_NCOLS=abc", "TQDM_MININTERVAL=x", "TQDM_DISABLE=1"])
def test_no_variable_of_the_bar_ends_the_work(variable):
    name, _, value = variable.partition("=")
    done = run_python("""
from r1zero.eval.console import Bar, say
with Bar(range(3), desc="work") as bar:
    assert list(bar) == [0, 1, 2]
    bar.update(1)
    bar.set_postfix({"a": "1"})
say("done")
""", env=os.environ | {name: value})
    assert done.returncode == 0 and "done" in done.stderr and "Traceback" not in done.stderr


def test_without_the_library_there_is_no_bar_and_the_work_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(Bar(range(3), total=3)) == [0, 1, 2]
    with Bar(total=2) as bar:
        bar.update(2)
    say("done")
    assert capsys.readouterr().err == "done\n"
