"""A command whose standard streams are closed, full, gone, narrow or plain, as a process of its own."""
import json
import os
import subprocess
import sys

import pytest

from r1zero.train.cli.main import main
from r1zero.train.cli.streams import Output, Screen

R1ZERO = f"{sys.executable} -m r1zero.train.cli.main"
GRADE = f"{R1ZERO} grade --problem '3 7 9 -> 13' --response '<answer>(9-3)+7</answer>'"
pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a shell and /dev/full")


def shell(command: str, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a line of bash, within a minute."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "", **environment}
    words = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=variables)
    return done.returncode, done.stdout, done.stderr


# ---- text that cannot be written ----

@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirected, why", [(">/dev/full", "No space left"), (">&-", "closed")])
def test_a_product_that_cannot_be_written_is_an_error_of_one_line(redirected, why, unbuffered):
    for command in (GRADE, f"{R1ZERO} --help"):
        code, out, error = shell(f"{command} {redirected}", PYTHONUNBUFFERED=unbuffered)
        assert code == 1 and error.count("\n") == 1 and why in error and "standard output" in error, error
    assert shell(f"{R1ZERO} --version {redirected} 2>&-") == (1, "", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_is_told_nothing(unbuffered):
    for command in (GRADE, f"{R1ZERO} --help"):
        code, _, error = shell(f"{command} | true", PYTHONUNBUFFERED=unbuffered)
        assert code in (0, 1) and error == ""


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "<&-", "<&- 2>&-"])
def test_a_message_that_cannot_be_written_changes_nothing(redirected, tmp_path):
    code, out, error = shell(f"{GRADE} {redirected}")
    assert code == 0 and json.loads(out)["accuracy"] == 1.0 and error == ""
    assert shell(f"{R1ZERO} nothing {redirected}")[:2] == (2, "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"numbers": [3, 7], "target": 10, "response": "<answer>3+7</answer>"}\n' * 2)
    out = tmp_path / "out.jsonl"
    assert shell(f"{R1ZERO} grade --input {lines} --out {out} <&- >&- 2>&-") == (0, "", "")
    assert [json.loads(line)["accuracy"] for line in out.read_text().splitlines()] == [1.0, 1.0]


def test_what_a_library_writes_to_a_closed_stream_lands_in_no_file(tmp_path):
    code = ("import os, sys\nfrom r1zero.train.cli.streams import ready_streams\nwith ready_streams():\n"
            "    file = open(sys.argv[1], 'w')\n    [os.write(number, b'noise') for number in (1, 2)]")
    out = tmp_path / "out.txt"
    assert shell(f"{sys.executable} -c \"{code}\" {out} <&- >&- 2>&-")[0] == 0 and out.read_text() == ""


def test_output_remembers_the_first_error():
    class Full:
        def write(self, text):
            raise OSError(28, f"no room for {text}")

        def flush(self):
            pass

    output = Output(Full())
    for text in "ab":
        with pytest.raises(OSError):
            output.write(text)
    assert "no room for a" in str(output.lost())
    assert Output(sys.__stdout__).lost() is None


# ---- terminals ----

@pytest.mark.parametrize("columns", ["1", "8", "20", "39", "40", "0", "-3", "many", "100000"])
def test_help_and_errors_are_served_at_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for command in ("grpo", "grade"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert "\x1b" not in text and max(map(len, text.splitlines())) <= 160
        assert main([command, "--frob"]) == 2
        assert capsys.readouterr().err.startswith(f"r1zero {command}: there is no flag --frob")
    assert os.environ["COLUMNS"] == columns


class Terminal:
    encoding = "UTF-8"

    @staticmethod
    def isatty():
        return True


@pytest.mark.parametrize("name, value, has_colours", [
    ("NO_COLOR", "1", False), ("NO_COLOR", "", True), ("FORCE_COLOR", "1", True), ("TERM", "xterm", True)])
def test_colours_are_for_a_terminal_without_no_color(name, value, has_colours, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    assert Screen(Terminal()).isatty() is has_colours and Screen(Terminal()).encoding == "utf-8"
    assert not Screen(Output(None)).isatty()


def test_forced_colours_do_not_reach_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["grade", "--help"]) == 0 and "\x1b" not in capsys.readouterr().out


# ---- what is installed ----

def test_version_and_help_of_a_command(capsys):
    for word in ("--version", "version", "-V"):
        assert main([word]) == 0
        text = capsys.readouterr().out
        assert text.startswith("r1zero 0.") and "Python 3." in text and "torch 2." in text
    assert main(["grade", "--help"]) == 0
    text = capsys.readouterr().out
    for words in (["help", "grade"], ["grade", "-h"]):
        assert main(words) == 0 and capsys.readouterr().out == text
    assert main(["help"]) == 0 and "commands:" in capsys.readouterr().out
