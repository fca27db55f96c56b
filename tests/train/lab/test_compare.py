"""A mistake beside the right thing: two runs that differ in it alone, a picture, Ctrl-C and --resume."""
import json
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch

from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.optimizer import OptimConfig
from r1zero.train import grpo as grpo_module
from r1zero.train.cli.main import main
from r1zero.train.interrupt import Stopped
from r1zero.train.lab import compare as module
from r1zero.train.lab.compare import PANELS, CompareConfig, compare, config_of_run, shown, summary
from r1zero.train.lab.mistakes import MISTAKES
from r1zero.train.log import read_metrics

from ...rl.cases import Bandit
from ..loop_cases import TIMES, save_base


def config(tmp_path, **changes) -> CompareConfig:
    """Two steps of both runs on the bandit."""
    base = tmp_path / "base"
    if not base.exists():
        save_base(base)
    common = dict(mistake="length_bias", run=str(tmp_path / "both"), base=str(base), task=Bandit(), steps=2,
                  prompts_per_step=4, group_size=4, max_new_tokens=3, micro_tokens=40, device="cpu",
                  optim=OptimConfig(lr=3e-3, warmup=0, schedule="constant", weight_decay=0.0))
    return CompareConfig(**{**common, **changes})


def figures(folder) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES}
            for row in read_metrics(folder)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_both_runs_are_equal_but_for_the_mistake(mistake, tmp_path):
    c = config(tmp_path, mistake=mistake, seed=3)
    right, wrong = (asdict(config_of_run(c, broken)) for broken in (False, True))
    assert {name for name in right if right[name] != wrong[name]} == {"run", "mistake"}
    assert (right["mistake"], wrong["mistake"]) == (None, mistake)
    changed = {option.partition(".")[0] for option in MISTAKES[mistake].shows_with}
    for name in right.keys() - {"run", "mistake"} - changed:
        assert right[name] == asdict(c)[name]
    for option, value in MISTAKES[mistake].shows_with.items():
        outer, _, inner = option.partition(".")
        assert (right[outer][inner] if inner else right[outer]) == value
    assert all(name in PANELS for name in shown(c)) and len(shown(c)) in (2, 3)


def test_the_control_is_compared_like_a_mistake(tmp_path, capsys):
    c = config(tmp_path, mistake=None, control="random", seed=3)
    right, coin = (asdict(config_of_run(c, broken)) for broken in (False, True))
    assert {name for name in right if right[name] != coin[name]} == {"run", "control"}
    assert (right["control"], coin["control"]) == ("none", "random")
    compare(c)
    text = (tmp_path / "both/compare.txt").read_text()
    assert text.startswith("control random: the rewards say nothing of the answers") and "kl_to_refer" in text
    assert "BROKEN ON PURPOSE" not in capsys.readouterr().err
    assert module.label_of_second(c) == "control random"  # in the picture
    words = text.split()
    assert words[words.index("right"):][:2] == ["right", "control"] and "broken" not in text
    assert {path.name for path in (tmp_path / "both").iterdir() if path.is_dir()} == {"right", "control"}
    # What is said of it names the kind of control that it was measured with.
    assert "12 steps of --control permute left" in text and "--control random was not measured" in text
    for changes in (dict(mistake=None), dict(control="random")):  # nothing differs, or two things do
        with pytest.raises(ValueError, match="expected either --break NAME or --control permute"):
            config(tmp_path, **changes)


@pytest.mark.parametrize("mistake", ["sum_of_groups", "no_end_token", "wrong_group", "flipped_k3"])
def test_compare_runs_both_says_and_draws_it(mistake, tmp_path, capsys):
    path = compare(config(tmp_path, mistake=mistake, steps=3))
    out, error = capsys.readouterr()
    assert error.count(f"! BROKEN ON PURPOSE: --break {mistake}\n") == 1  # for the broken run alone
    assert MISTAKES[mistake].what in error and path.name == "compare.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    assert out.splitlines()[-1] == str(path)
    assert MISTAKES[mistake].what in out and MISTAKES[mistake].seen in out
    right, wrong = (load_checkpoint(tmp_path / f"both/{part}") for part in ("right", "broken"))
    assert right.step == wrong.step == 3
    assert any(not torch.equal(tensor, wrong.tensors["model"][name])
               for name, tensor in right.tensors["model"].items())
    first = [figures(tmp_path / f"both/{part}")[0] for part in ("right", "broken")]
    assert first[0]["accuracy"] == first[1]["accuracy"] and first[0]["length"] == first[1]["length"]


def test_the_summary_is_the_mean_of_the_last_quarter(tmp_path):
    c = config(tmp_path, mistake="sum_of_groups", steps=8)
    rows = {broken: [dict.fromkeys(PANELS, 100.0 * broken + step) for step in range(8)]
            for broken in (False, True)}
    lines = [line.split() for line in summary(c, rows).splitlines()]
    assert ["accuracy", "6.500", "106.500"] in lines and ["gradient_norm", "6.500", "106.500"] in lines
    assert "mean of the last 2 steps" in summary(c, rows)


def test_a_metric_that_was_not_measured_is_a_gap_and_a_dash(tmp_path):
    c = config(tmp_path, mistake="k1_loss")
    rows = {broken: [{"step": n, "accuracy": 0.5, **({"length": 3.0} if n == 1 else {})} for n in (1, 2)]
            for broken in (False, True)}
    lines = [line.split() for line in summary(c, rows).splitlines()]
    assert ["accuracy", "0.500", "0.500"] in lines and [MISTAKES["k1_loss"].watch, "–", "–"] in lines
    (tmp_path / "both").mkdir()
    assert module.picture(c, rows).exists()


def test_lines_of_the_picture_have_their_labels_units_and_title(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "plot", lambda *rest: drawn.append(rest))
    c = config(tmp_path, mistake="sum_of_groups")
    rows = {broken: [{"step": n, **dict.fromkeys(PANELS, n + 10 * broken)} for n in (1, 2)]
            for broken in (False, True)}
    module.picture(c, rows)
    [(panels, path, _, _, title)] = drawn
    assert title == f"sum_of_groups: {MISTAKES['sum_of_groups'].what}" and path.parent.name == "both"
    assert [(p.title, p.percent, p.log_scale) for p in panels] == [
        ("Right answers", True, False), ("Response length", False, False),
        ("Size of the gradient", False, True)]
    for panel in panels:
        assert panel.y_label and [(line.label, line.values) for line in panel.lines] == [
            ("right", [1, 2]), ("broken: sum_of_groups", [11, 12])]
    assert panels[0].lines[0].colour != panels[0].lines[1].colour


# ---- Ctrl-C and --resume ----

# of the steps of both runs together: in the first run, in its last step, in the second run
@pytest.mark.parametrize("at", [2, 3, 5])
def test_ctrl_c_stops_and_resume_ends_where_an_unbroken_comparison_does(at, tmp_path, monkeypatch):
    whole = config(tmp_path, run=str(tmp_path / "whole"), steps=3)
    compare(whole)
    taken, step_of = [], grpo_module.grpo_step

    def pressed(*rest):
        taken.append(1)
        if len(taken) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step_of(*rest)

    monkeypatch.setattr(grpo_module, "grpo_step", pressed)
    c = config(tmp_path, steps=3)
    with pytest.raises(Stopped, match="go on with --resume and the same flags"):
        compare(c)
    assert len(taken) == at
    assert not (tmp_path / "both/compare.png").exists()
    assert (tmp_path / "both/broken").exists() == (at > 3)
    path = compare(replace(c, resume=True))
    assert path.exists() and len(taken) == 6  # no step twice
    for part in ("right", "broken"):
        assert figures(tmp_path / "both" / part) == figures(tmp_path / "whole" / part)
    assert compare(replace(c, resume=True)) == path and len(taken) == 6  # nothing is left to do
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        compare(c)


def test_a_comparison_whose_log_is_gone_says_which_folder_to_remove(tmp_path):
    c = config(tmp_path, steps=1)
    compare(c)
    (tmp_path / "both/right/metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="the log of .*right is gone; remove that folder"):
        compare(replace(c, resume=True))


# ---- flags ----

@pytest.mark.parametrize("flags, words", [
    ("--break typo", "--break is 'typo', expected one of k1_loss, "), ("--group-size 1", "--group-size is 1"),
    ("--steps 0", "--steps is 0"), ("--optim.lr 0", "expected lr and clip_grad above 0"),
    ("--break flipped_clip --max-new-tokens 0", "--max-new-tokens is 0"), ("--device tpu", "'tpu'")])
def test_compare_refuses_bad_flags_before_anything_is_written(flags, words, tmp_path, capsys):
    argv = ["compare", "--base", str(save_base(tmp_path / "base"))]
    if "--break" not in flags:
        argv += ["--break", "k1_loss"]
    assert main([*argv, "--run", str(tmp_path / "run"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_grpo_refuses_an_unknown_mistake_and_writes_a_known_one_down(tmp_path, capsys):
    c = config(tmp_path, mistake="flipped_clip", steps=1)
    compare(c)
    logged = json.loads((tmp_path / "both/broken/run.json").read_text())["config"]
    assert logged["mistake"] == "flipped_clip" and logged["updates_per_step"] == 8
    assert main(["grpo", "--run", "x", "--base", "y", "--break", "flip"]) == 2
    assert "--break is 'flip', expected one of k1_loss, " in capsys.readouterr().err
