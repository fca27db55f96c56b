"""The command diagnose: what it says of a run, whatever is in its folder, and what it refuses."""
import json
from pathlib import Path

import pytest

from r1zero.train.cli.main import main
from r1zero.train.grpo import grpo
from r1zero.train.pretrain import pretrain

from ..lab.diagnosis_cases import NAN, log
from ..loop_cases import grpo_config, pretrain_config, save_base, text_file


def run_folder(path, rows, changes=None) -> Path:
    """A run folder as grpo leaves it; changes: to the config in run.json."""
    path.mkdir()
    known = dict(run=str(path), steps=60, group_size=16, max_new_tokens=128, loss={"clip_low": 0.2})
    (path / "run.json").write_text(json.dumps({"config": known | (changes or {})}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_diagnose_of_a_run_going_over_or_written_by_an_older_version(tmp_path, capsys):
    going = run_folder(tmp_path / "going", log(30, truncated=0.5))
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "accur')  # the line that is being written
    assert main(["diagnose", "--run", str(going)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("30 of 60 steps: accuracy ") and "[cut_off] 50%" in out and out.count("\n") == 2
    few = run_folder(tmp_path / "few", [{"step": 1, "accuracy": 0.25}])
    assert main(["diagnose", "--run", str(few)]) == 0
    out = capsys.readouterr().out
    assert "accuracy 25.0% at first" in out and "wait for 10 steps" in out and "nothing to complain" in out


def test_diagnose_of_a_real_run_says_what_the_loop_said(tmp_path, capsys):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), steps=2)
    grpo(c)
    told_live = capsys.readouterr().err
    assert main(["diagnose", "--run", c.run]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("2 of 2 steps") and len(lines) == 2 and lines[0].split("(")[0] in told_live
    assert lines[1].startswith("control: none stands beside this run") and "--control permute" in lines[1]


def test_the_control_beside_a_run_is_named_with_what_it_did(tmp_path, capsys):
    common = {"base": "runs/base", "task": {"name": "countdown"}}
    run = run_folder(tmp_path / "run", log(60), {**common, "control": "none"})
    run_folder(tmp_path / "old", log(30, accuracy=0.3), {**common, "control": True})
    run_folder(tmp_path / "coin", log(24, accuracy=0.25, wobble=0), {**common, "control": "random"})
    run_folder(tmp_path / "another", log(24), {**common, "base": "runs/b", "control": "permute"})
    run_folder(tmp_path / "real", log(24), {**common, "control": "none"})
    run_folder(tmp_path / "new", [], {**common, "control": "permute"})
    (run_folder(tmp_path / "torn", log(3)) / "run.json").write_text("{")
    assert main(["diagnose", "--run", str(run)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("control")]
    assert lines == ["control (coin, random, 24 steps): accuracy 25.0% at first, 25.0% of late",
                     "control (old, permute, 30 steps): accuracy 30.0% at first, 30.0% of late"]
    assert main(["diagnose", "--run", str(tmp_path / "coin")]) == 0
    assert "control" not in capsys.readouterr().out


@pytest.mark.parametrize("rows, said", [
    ([{"step": n} for n in range(12)], "12 of 60 steps: accuracy was not measured of late"),
    ([{"step": n, **({"accuracy": 0.5} if n > 10 else {})} for n in range(30)], "accuracy 50.0% of late"),
    ([{"step": n, "accuracy": "x", "loss": None} for n in range(12)], "accuracy was not measured"),
])
def test_what_was_not_measured_is_said_in_words(rows, said, tmp_path, capsys):
    assert main(["diagnose", "--run", str(run_folder(tmp_path / "run", rows))]) == 0
    out = capsys.readouterr().out
    assert said in out and "nan" not in out


@pytest.mark.parametrize("changes", [
    {"loss": None}, {"loss": {"max_importance": "x"}}, {"loss": 3}, {"optim": []}, {"steps": 10**400},
    {"group_size": None}, {"updates_per_step": NAN}, {"advantage": {"lam": []}}])
def test_a_config_of_another_kind_silences_only_the_rules_that_need_it(changes, tmp_path, capsys):
    run = run_folder(tmp_path / "run", log(60, entropy=(1, 0), all_wrong=1, kl_to_reference=9), changes)
    assert main(["diagnose", "--run", str(run)]) == 0 and "[too_hard]" in capsys.readouterr().out


def test_diagnose_refuses_what_is_no_run_of_grpo(tmp_path, capsys):
    pretrain(pretrain_config(tmp_path / "base", text_file(tmp_path), steps=1))
    (tmp_path / "empty").mkdir()
    run_folder(tmp_path / "new", []), run_folder(tmp_path / "odd", log(2))
    (tmp_path / "odd/run.json").write_text("[1]")
    (run_folder(tmp_path / "torn", log(2)) / "run.json").write_text("{")
    (run_folder(tmp_path / "deep", log(2)) / "run.json").write_text("[" * 100_000)
    capsys.readouterr()
    for folder, words in {"base": "is no run of GRPO", "empty": "holds no run (no run.json)",
                          "none": "does not exist", "text.txt": "is a file", "new": "has no steps yet",
                          "odd": "no readable run.json", "torn": "no readable run.json",
                          "deep": "no readable run.json", ".": "holds several runs; give one of them: base, "
                          }.items():
        assert main(["diagnose", "--run", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_a_broken_line_and_a_broken_byte_of_the_log_are_read_around_and_named(tmp_path, capsys):
    run = run_folder(tmp_path / "run", log(30))
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[3:3] = [b"half a li", b'{"step": 4, "\xff": 1}']
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    assert main(["diagnose", "--run", str(run)]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("30 of 60 steps")
    assert "warning" in found.err and "lines that cannot be read are left out: 4, 5;" in found.err
