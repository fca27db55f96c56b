"""The command show: which answers it prints and how, the page, and what it says where there is nothing."""
import gzip
import json
import re

import pytest

from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.main import main
from r1zero.train.cli.show import Printer, ShowConfig, ranges
from r1zero.train.report.step_page import best_and_worst
from r1zero.train.rollout_files import append_member, packed_member, part_path, whole_members

from ..loop_cases import save_base


def sample(n: int, group: int, **changes) -> dict:
    """A kept sample; its advantage is that of the n-th of a group of five."""
    known = dict(step=40, group=group, problem={"numbers": [3, 7], "target": 10}, prompt=f"{group} 7 -> 10",
                 response=f"answer {n}", tokens=list(b"answer") + [n],
                 parts={"accuracy": float(n > 2), "format": 1.0}, reward=0.2 + (n > 2),
                 training_reward=0.2 + (n > 2), advantage=n - 2.0, finish_reason="stop",
                 why=f"because {n}", replaced=False)
    return known | changes


def run_folder(path, steps: dict[int, list[dict]]):
    """A run's folder that has kept these samples."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"config": {"group_size": 5}}))
    for step, samples in steps.items():
        lines = "".join(json.dumps(one | {"step": step}) + "\n" for one in samples)
        append_member(part_path(path, 1), step, lines.encode())
    return path


SAMPLES = [sample(n, group) for group in (1, 2, 3) for n in (0, 3, 4, 1, 2)]


@pytest.fixture
def run(tmp_path):
    return run_folder(tmp_path / "run", {step: SAMPLES for step in (1, 2, 3, 40)})


def printed(capsys, *words, run, code=0):
    assert main(["show", "--run", str(run), *words]) == code
    return capsys.readouterr()


# ---- what is printed ----

def test_the_last_step_is_printed_group_by_group_with_the_best_and_the_worst(run, capsys):
    out = printed(capsys, run=run).out
    assert out.startswith("step 40: 3 groups, 15 answers, 40% right, 7.0 tokens each\n")
    assert re.findall(r"^group (\d): (.*?)   (.*)$", out, re.MULTILINE) == [
        (f"{n}", f"{n} 7 -> 10", "2 of 5 right, mean reward 0.6") for n in (1, 2, 3)]
    shown = re.findall(r"^    answer (\d)$", out, re.MULTILINE)
    assert shown == ["4", "3", "1", "0"] * 3 and out.count("  ... 1 more\n") == 3
    assert ("  advantage +2.00, reward 1.2 (accuracy 1, format 1), 7 tokens, stop. because 4\n"
            "    answer 4\n") in out
    assert "\x1b" not in out  # no terminal


def test_one_group_is_printed_whole_and_a_limit_cuts_it(run, capsys):
    out = printed(capsys, "--step", "2", "--group", "3", run=run).out
    assert out.startswith("step 2: 3 groups, 15 answers")  # of the step, and not of what is shown
    assert re.findall(r"^group (\d)", out, re.MULTILINE) == ["3"] and "more" not in out
    assert re.findall(r"^    answer (\d)$", out, re.MULTILINE) == list("43210")
    out = printed(capsys, "--group", "3", "--limit", "1", run=run).out
    assert re.findall(r"^    answer (\d)$", out, re.MULTILINE) == ["4"] and "... 4 more" in out


@pytest.mark.parametrize("limit, best, worst", [(1, [5], []), (2, [5], [1]), (3, [5, 4], [1]),
                                                (4, [5, 4], [2, 1]), (5, [5, 4, 3, 2, 1], []),
                                                (9, [5, 4, 3, 2, 1], [])])
def test_a_limit_takes_the_best_and_the_worst(limit, best, worst):
    assert best_and_worst([5, 4, 3, 2, 1], limit) == (best, worst)


def test_what_a_sample_says_beside_its_reward(tmp_path, capsys):
    odd = [sample(0, 1, finish_reason="length"), sample(1, 1, training_reward=-0.5),
           *(sample(n, 2, advantage=0.0) for n in (0, 1)),
           *(sample(n, 3, advantage=None, replaced=True) for n in (0, 1))]
    out = printed(capsys, run=run_folder(tmp_path / "odd", {1: odd})).out
    assert "7 tokens, cut off. because 0" in out and "format 1, trained on as -0.5), 7 tokens" in out
    assert "group 2: 2 7 -> 10   0 of 2 right, mean reward 0.2; nothing to learn" in out
    assert "group 3: 3 7 -> 10   0 of 2 right, mean reward 0.2; replaced by dynamic sampling" in out
    assert out.count("  not trained on, reward 0.2") == 2


def test_text_of_a_model_cannot_steer_the_terminal_and_long_text_is_cut(tmp_path, capsys):
    wild = [sample(0, 1, response="red \x1b[31m\nsecond \x9b line", prompt="two\nlines \x07"),
            sample(1, 1, response="x" * 2000, prompt="two\nlines \x07")]
    run = run_folder(tmp_path / "wild", {1: wild})
    out = printed(capsys, run=run).out
    assert "    red \\x1b[31m\n    second \\x9b line\n" in out and "group 1: two lines \\x07   " in out
    assert "x" * 600 + " ... 1,400 characters more\n" in out
    assert "x" * 2000 in printed(capsys, "--group", "1", run=run).out


def test_a_reason_of_several_lines_stays_on_the_line_of_its_answer(tmp_path, capsys):
    wild = [sample(0, 1, why="one\ngroup 7: forged\ttext\r\u202e\x1b[31m end")]
    out = printed(capsys, run=run_folder(tmp_path / "wild", {1: wild})).out
    assert "stop. one group 7: forged text \\u202e\\x1b[31m end\n    answer 0\n" in out


class Terminal:
    def isatty(self):
        return True


def test_advantages_are_coloured_in_a_terminal_and_not_where_colour_is_unwanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    better, same, worse = (Printer(Terminal(), False).answer(sample(n, 1)) for n in (3, 2, 1))
    assert better.count("\x1b[32m") == 2 == better.count("\x1b[0m") and "\x1b[32m    answer" not in better
    assert worse.count("\x1b[31m") == 2 and "\x1b" not in same
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in Printer(Terminal(), False).answer(sample(3, 1))


# ---- the page ----

def test_the_page_has_every_token_escaped_and_coloured(tmp_path, capsys):
    tags = sample(3, 1, tokens=list(b"<b>&") + [257], why="<script>")  # 257: the end token of bytes
    each = sample(0, 1, token_advantages=[1.0, -2.0, 0.0], tokens=list(b"uvw"))
    run = run_folder(tmp_path / "run", {1: [tags, each]})
    save_base(run / "start")
    page = tmp_path / "deep" / "page.html"
    found = printed(capsys, "--html", str(page), run=run)
    text = page.read_text(encoding="utf-8")
    assert found.out == "" and "written: " in found.err
    assert "".join(f"<span>{c}</span>" for c in ("&lt;", "b", "&gt;", "&amp;")) in text
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert f"<span class=end>{Tokenizer.bytes().token_text(257)}".replace("|>", "|&gt;").replace(
        "<|", "&lt;|").replace("&lt;span", "<span") in text
    assert text.count('<div class="sample"') == 2
    styles = re.findall(r'<span style="([^"]*)">[uvw]<', text)
    assert "0, 114, 178" in styles[0] and "213, 94, 0" in styles[1] and styles[2] == ""


def test_the_page_of_an_old_run_takes_the_tokenizer_of_its_checkpoint(tmp_path, capsys):
    run = run_folder(tmp_path / "run", {1: SAMPLES})
    assert "checkpoint" in printed(capsys, "--html", str(tmp_path / "a.html"), run=run, code=2).err
    save_base(run)
    printed(capsys, "--html", str(tmp_path / "a.html"), "--limit", "1", "--group", "2", run=run)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count('<div class="sample"') == 1 and "Group 2: " in text


def test_text_that_turns_the_direction_of_writing_cannot_reorder_what_stands_beside_it(tmp_path, capsys):
    run = run_folder(tmp_path / "run", {1: [sample(0, 1, why="\u202e turned", prompt="\u202e 7")]})
    save_base(run / "start")
    printed(capsys, "--html", str(tmp_path / "a.html"), run=run)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    isolated = re.search(r"^([a-z, ]+) \{ unicode-bidi: isolate; \}$", text, re.MULTILINE)[1].split(", ")
    holding = re.findall(r"<(\w+)[^<>]*>[^<>]*\u202e", text)
    assert holding == ["code", "span"] and set(holding) <= set(isolated)


def test_the_figures_of_a_page_are_of_all_answers_whatever_is_shown(run, tmp_path, capsys):
    save_base(run / "start")
    for words, n_shown, groups in (("", 15, "123"), ("--limit 2", 6, "123"), ("--group 2", 5, "2"),
                                   ("--group 2 --limit 3", 3, "2")):
        printed(capsys, "--html", str(tmp_path / "a.html"), *words.split(), run=run)
        text = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert text.count("step 40: 3 groups, 15 answers, 40% right, 7.0 tokens each") == 2  # title, heading
        assert re.findall(r"Group (\d): 2 of 5 right, mean reward 0.6<", text) == list(groups)
        assert text.count('<div class="sample"') == n_shown
        n_more = 5 - n_shown // len(groups)
        assert text.count(f"<p>... {n_more} more</p>") == (len(groups) if n_more else 0)


# ---- what is not there ----

@pytest.mark.parametrize("words, said", [
    ("--step 4", "--step is 4, but RUN has kept steps 1-3, 40; give one of them"),
    ("--step 41", "has kept steps 1-3, 40"), ("--group 4", "--group is 4, but step 40 has kept groups 1-3"),
    ("--step 0", "--step is 0, expected 1 or more"), ("--limit 0", "--limit is 0"),
    ("--group -1", "--group is -1"),
    ("--html RUN", "it is a folder"), ("--html RUN/run.json", "would replace the file"),
    ("--html RUN/rollouts.jsonl.gz", "--html RUN/rollouts.jsonl.gz would replace the file"),
    ("--html /dev/null", "--html /dev/null is no file"), ("--html -", "--html - would write a file of that"),
])
def test_show_refuses_in_one_line_and_says_what_there_is(run, capsys, words, said):
    found = printed(capsys, *words.replace("RUN", str(run)).split(), run=run, code=2)
    assert said.replace("RUN", str(run)) in found.err and found.err.count("\n") == 1 and found.out == ""


def test_a_folder_without_completions_is_told_how_to_keep_them(tmp_path, capsys):
    for name, said in (("none", "does not exist"), (".", "holds several runs; give one of them: old"),
                       ("old", "has kept no completions yet; r1zero grpo keeps those of each step")):
        run_folder(tmp_path / "old", {}) if not (tmp_path / "old").exists() else None
        error = printed(capsys, run=tmp_path / name, code=2).err
        assert said in error and error.count("\n") == 1, error


def test_a_step_that_is_just_being_written_is_passed_over_and_a_damaged_one_is_named(run, capsys):
    path = part_path(run, 1)
    path.write_bytes(path.read_bytes() + packed_member(41, b"half")[:-2])
    assert printed(capsys, run=run).out.startswith("step 40:")
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    error = printed(capsys, "--step", "1", run=run, code=2).err
    assert "is damaged at step 1 (" in error and error.count("\n") == 1
    path.write_bytes(gzip.compress(b"{}\n"))
    assert "is not as r1zero wrote it" in printed(capsys, run=run, code=2).err


def test_ranges_and_flags():
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8" and ranges([4]) == "4"
    assert ShowConfig(run="x").limit is None


def test_a_step_is_found_by_the_headers_and_no_other_step_is_unpacked(tmp_path, capsys):
    run = run_folder(tmp_path / "run", {step: SAMPLES for step in range(1, 51)})
    data = bytearray(part_path(run, 1).read_bytes())
    for member in whole_members(part_path(run, 1)):
        if member.step != 49:
            data[member.offset + 40] ^= 0xFF
    part_path(run, 1).write_bytes(data)
    assert printed(capsys, "--step", "49", run=run).out.startswith("step 49: 3 groups, 15 answers")
    assert "is damaged at step 50" in printed(capsys, run=run, code=2).err
