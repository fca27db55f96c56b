"""What the figures mean: each rule speaks at its figure and not before, once a run, and never to a healthy
one."""
import ast
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from r1zero.train.cli.main import COMMANDS, main
from r1zero.train.grpo import GRPOConfig, grpo
from r1zero.train.lab import diagnosis as module
from r1zero.train.lab.diagnosis import RULES, Diagnosis, Look, advice
from r1zero.train.pretrain import pretrain

from ..loop_cases import grpo_config, pretrain_config, save_base, text_file

NAN = float("nan")
C = GRPOConfig(run=".", base=".")
HEALTHY = {"accuracy": (0.33, 0.8), "format": (0.86, 0.88), "length": (37.0, 72.0), "truncated": (0.0, 0.09),
           "dead_groups": (0.0, 0.03), "all_right": (0.0, 0.1), "all_wrong": (0.1, 0.0), "loss": (0.0, 0.17),
           "entropy": (0.26, 0.28), "kl_to_reference": (0.0, 0.14), "gradient_norm": (0.12, 0.26),
           "trained_samples": (256, 248), "logp_gap_mean": (2e-6, 2e-6), "ratio_max": (1.0, 1.0),
           "clipped_low": (0.0, 0.0), "clipped_high": (0.0, 0.0), "value_explained": (0.1, 0.5)}


def log(steps: int = 60, wobble: float = 0.02, **changes) -> list[dict]:
    """Rows like those of a demo that went well: figures go from one number in the first ten steps to another
    in the last ten, and accuracy wobbles as with 256 answers a step. changes: figures, a pair or a number."""
    rows = []
    for step in range(steps):
        done, row = min(1.0, max(0.0, (step - 9) / max(1, steps - 19))), {"step": step + 1}
        for name, value in (HEALTHY | changes).items():
            first, last = value if isinstance(value, tuple) else (value, value)
            row[name] = first + done * (last - first)
        row["accuracy"] = min(1.0, max(0.0, row["accuracy"] + wobble * (-1) ** step))
        rows.append(row)
    return rows


def dials(**changes) -> GRPOConfig:
    """A preset's config, with dials like loss__kl_coef changed."""
    c = GRPOConfig(run=".", base=".", algo=changes.pop("algo", "r1_zero"))
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        c = replace(c, **{outer: replace(getattr(c, outer), **{inner: value}) if inner else value})
    return c


# Each rule with a log, as it is just beyond its threshold and just before, and the dials that it needs.
CASES = [
    ("sampler_is_off", dict(logp_gap_mean=0.021), dict(logp_gap_mean=0.019), {}),
    ("degenerate", dict(accuracy=(0.4, 0.0), format=(0.9, 0.15)),
     dict(accuracy=(0.4, 0.0), format=(0.9, 0.2)), {}),
    ("degenerate", dict(accuracy=(0.4, 0.1), length=(40.0, 3.9)), dict(accuracy=(0.4, 0.1), length=(40, 4.1)),
     {}),
    ("degenerate", dict(accuracy=(0.4, 0.1), entropy=(0.3, 0.81)),
     dict(accuracy=(0.4, 0.1), entropy=(0.3, 0.79)), {}),
    ("degenerate", dict(accuracy=(0.4, 0.19), entropy=(0.3, 3.0)),
     dict(accuracy=(0.4, 0.21), entropy=(0.3, 3.0)), {}),
    ("fell", dict(accuracy=(0.8, 0.68)), dict(accuracy=(0.8, 0.72)), {}),
    ("cut_off", dict(truncated=0.26), dict(truncated=0.24), {}),
    ("too_hard", dict(all_wrong=0.81, accuracy=0.02), dict(all_wrong=0.79, accuracy=0.02), {}),
    ("too_easy", dict(all_right=0.81), dict(all_right=0.79), {}),
    ("little_signal", dict(dead_groups=0.61), dict(dead_groups=0.59), {}),
    ("nothing_changes", dict(gradient_norm=0.0), dict(gradient_norm=1e-9), {}),
    ("wild_ratios", dict(ratio_max=21.0), dict(ratio_max=19.0), {"updates_per_step": 4}),
    ("too_much_clipped", dict(clipped_low=0.15, clipped_high=0.16), dict(clipped_low=0.15, clipped_high=0.14),
     {"updates_per_step": 4}),
    ("entropy_is_gone", dict(entropy=(0.5, 0.04)), dict(entropy=(0.5, 0.06)), {}),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=0.51),
     dict(accuracy=0.4, kl_to_reference=0.49), {}),
    ("gradient_is_cut", dict(gradient_norm=5.1), dict(gradient_norm=4.9), {}),
    ("critic_is_blind", dict(value_explained=-0.01), dict(value_explained=0.01), {}),
    ("form_without_sense", dict(accuracy=(0.40, 0.35), format=(0.5, 0.65), wobble=0.0),
     dict(accuracy=(0.40, 0.35), format=(0.5, 0.59), wobble=0.0), {}),
    ("flat", dict(accuracy=(0.40, 0.415), wobble=0.0), dict(accuracy=(0.40, 0.43), wobble=0.0), {}),
    ("loss_is_zero", dict(loss=0.29), dict(loss=0.31), {}),
]


# ---- each rule ----

def test_every_rule_has_a_case():
    assert {name for name, *_ in CASES} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("rule, beyond, before, changes", CASES)
def test_a_rule_speaks_beyond_its_figure_and_is_silent_before(rule, beyond, before, changes):
    c = dials(**changes)
    assert rule in advice(log(**beyond), c) and rule not in advice(log(**before), c)
    others = advice(log(**beyond), c).keys() - {rule, "loss_is_zero", "fell", "flat"}
    assert not others - {"far_from_reference"}, others  # one trouble, one advice


@pytest.mark.parametrize("changes", [
    {}, {"control": True}, {"updates_per_step": 8}, {"algo": "dapo"}, {"algo": "ppo"}, {"algo": "gspo"}])
@pytest.mark.parametrize("figures", [
    {}, dict(accuracy=(0.3, 0.98), all_right=(0.0, 0.75), dead_groups=(0.0, 0.5), entropy=(0.6, 0.02)),
    dict(entropy=(2.0, 0.3)), dict(kl_to_reference=(0.0, 0.9)), dict(wobble=0.1), dict(steps=12),
    dict(steps=400)])
def test_a_healthy_run_hears_of_its_loss_alone(figures, changes):
    assert Diagnosis(dials(**changes), log(**figures)).said <= {"loss_is_zero"}


def test_the_control_is_not_told_that_it_stands_still():
    rows = log(accuracy=0.3)
    assert "flat" in advice(rows, C) and "flat" not in advice(rows, dials(control=True))


@pytest.mark.parametrize("rule, figures, changes", [
    ("loss_is_zero", {}, {"updates_per_step": 2}), ("loss_is_zero", {}, {"algo": "rloo"}),
    ("loss_is_zero", {"trained_samples": 0}, {}),
    ("sampler_is_off", dict(logp_gap_mean=0.1), {"loss__max_importance": 2.0}),
    ("too_much_clipped", dict(clipped_low=0.9), {"algo": "gspo"}),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01), accuracy=(0.3, 0.95)), {}),
    ("far_from_reference", dict(kl_to_reference=3.0, accuracy=(0.3, 0.4)), {}),
    ("fell", dict(accuracy=(0.8, 0.65), wobble=0.2), {}), ("flat", dict(accuracy=0.95), {}),
    ("flat", dict(steps=49, accuracy=0.5), {}), ("critic_is_blind", dict(steps=19, value_explained=-1), {}),
    ("little_signal", dict(dead_groups=0.9, all_wrong=0.9), {}), ("too_hard", dict(steps=9, all_wrong=1), {}),
])
def test_a_rule_is_silent_where_its_figure_means_something_else(rule, figures, changes):
    assert rule not in advice(log(**figures), dials(**changes))


def test_what_explains_the_others_comes_first_and_consequences_are_left_out():
    c = dials(updates_per_step=4)
    collapse = log(accuracy=(0.5, 0.0), format=(0.9, 0.0), truncated=(0.0, 1.0), all_wrong=(0.0, 1.0),
                   kl_to_reference=(0.0, 5.0), ratio_max=100.0, logp_gap_mean=0.1)
    assert list(advice(collapse, c)) == ["sampler_is_off", "degenerate", "wild_ratios", "far_from_reference"]
    hopeless = log(accuracy=0.0, wobble=0, format=0.0, truncated=0.9, all_wrong=1.0, dead_groups=1.0,
                   gradient_norm=0.0, trained_samples=0, loss=0.0)
    assert list(advice(hopeless, c)) == ["cut_off", "too_hard", "nothing_changes", "flat"]
    assert list(advice(log(), C))[-1] == list(advice(log(accuracy=0.4), C))[-1] == "loss_is_zero"


@pytest.mark.parametrize("rule, figures, changes, said", [
    ("too_hard", dict(all_wrong=1, accuracy=0, wobble=0, format=0.01), {}, "1.0% of answers are well formed"),
    ("too_hard", dict(all_wrong=1, accuracy=0, wobble=0), {"group_size": 8}, "--group-size 16"),
    ("cut_off", dict(truncated=0.5), {}, "50% of answers are cut off at 128 tokens"),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01)), {"updates_per_step": 2}, "--loss.clip-high 0.28"),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=2), {"loss__kl_coef": 0.01},
     "--loss.kl-coef 0.02"),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=2), {}, "--loss.kl-coef 0.001"),
    ("critic_is_blind", dict(value_explained=-0.5), {"advantage__lam": 0.9}, "--advantage.lam 1"),
    ("little_signal", dict(dead_groups=0.9, all_wrong=0.5), {}, "90% of groups have no signal (all wr"),
])
def test_advice_says_its_figure_and_fits_the_dials(rule, figures, changes, said):
    assert said in advice(log(**figures), dials(**changes))[rule]


@pytest.mark.parametrize("rule, figures, changes, unsaid", [
    ("cut_off", dict(truncated=0.5), {"overlong_buffer": 0.2}, "--overlong-buffer"),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01)), {}, "clip-high"),  # no ratio meets a bound
    ("critic_is_blind", dict(value_explained=-0.5), {}, "--advantage.lam"),  # is 1 already
    ("little_signal", dict(dead_groups=0.9), {"dynamic_sampling": 3}, "--dynamic-sampling"),
])
def test_advice_does_not_name_what_is_done_already(rule, figures, changes, unsaid):
    assert unsaid not in advice(log(**figures), dials(**changes))[rule]


def test_advice_names_flags_and_commands_that_exist(capsys):
    tree = ast.parse(Path(module.__file__).read_text())
    words = " ".join(node.value for node in ast.walk(tree)
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))
    flags, commands = set(re.findall(r"--[a-z][a-z.-]*[a-z]", words)), set(re.findall(r"r1zero (\w+)", words))
    helps = ""
    for command in ("grpo", "sft"):
        assert main([command, "--help"]) == 0
        helps += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z.-]*[a-z]", helps))
    assert len(flags) > 10 and flags - known - {"--run"} == set()
    assert {"grpo", "sft", "chat", "grade"} <= commands <= set(COMMANDS)


# ---- a run that is going ----

PASSING = [row for steps, cut in ((20, 0.0), (10, 1.0), (40, 0.0), (10, 1.0))  # the trouble comes twice
           for row in log(steps, accuracy=0.95, truncated=cut)]


def told(diagnosis: Diagnosis, rows: list[dict]) -> list[str]:
    return [re.match(r"\[(\w+)\] \w", line)[1] for row in rows for line in diagnosis.look(row)]


def test_each_advice_is_given_once_and_at_the_step_where_it_first_holds():
    diagnosis, steps = Diagnosis(C, []), {}
    for step, row in enumerate(PASSING, 1):
        for name in told(diagnosis, [row]):
            assert name not in steps
            steps[name] = step
    assert steps == {"loss_is_zero": 1, "cut_off": 23}  # 3 of the last 10 steps: 30 %


@pytest.mark.parametrize("cut", [0, 1, 22, 23, 35, 60, 69])
def test_resume_repeats_nothing_and_forgets_nothing(cut):
    before, after = PASSING[:cut], PASSING[cut:]
    assert told(Diagnosis(C, []), before) + told(Diagnosis(C, before), after) == ["loss_is_zero", "cut_off"]


def test_a_loop_prints_it_once_and_a_resumed_loop_not_again(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    c = grpo_config(tmp_path / "run", base, steps=2)
    grpo(c)
    assert capsys.readouterr().err.count("[loss_is_zero] The loss is about 0") == 1
    grpo(grpo_config(tmp_path / "run", base, steps=4, resume=True))
    assert "[loss_is_zero]" not in capsys.readouterr().err


# ---- rows that a log should not hold ----

BAD = [None, NAN, math.inf, -math.inf, 1e308, -1e308, 10**400, "x", "", [1], {}, True, -1, 0]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:9])
def test_hostile_rows_crash_no_rule(value):
    rows = log(30)
    for c in (C, dials(algo="ppo"), dials(updates_per_step=4)):
        for name in HEALTHY:
            assert isinstance(advice([{**row, name: value} for row in rows], c), dict)
            assert isinstance(advice([*rows, {**rows[0], name: value}], c), dict)
        whole = advice([{"step": 1} | dict.fromkeys(HEALTHY, value) for _ in rows], c)
        assert all("nan" not in text and "inf" not in text for text in whole.values())


@pytest.mark.parametrize("missing", HEALTHY)
def test_a_figure_that_is_missing_says_nothing(missing):
    rows = [{name: value for name, value in row.items() if name != missing} for row in log(60)]
    assert advice(rows, C).keys() <= {"loss_is_zero"}
    assert advice([{"step": n} for n in range(60)], C) == advice([], C) == {}


def test_the_best_of_a_long_run_is_found_wherever_it_was():
    for peak, steps in itertools.product((0, 35, 100, 300), (310, 999)):
        rows = [{"accuracy": 0.9 if peak <= n < peak + 150 else 0.1} for n in range(steps)]
        assert Look(rows, C).best("accuracy") == pytest.approx(0.9)
    assert math.isnan(Look([{}], C).best("accuracy"))


# ---- the command ----

def run_folder(path, rows, changes=None) -> Path:
    """A run folder as grpo leaves it; changes: to the config in run.json."""
    path.mkdir()
    known = dict(run=str(path), group_size=16, steps=60, loss={"clip_low": 0.2})
    (path / "run.json").write_text(json.dumps({"config": known | (changes or {})}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_diagnose_of_a_run_going_over_or_written_by_an_older_version(tmp_path, capsys):
    going = run_folder(tmp_path / "going", log(30, truncated=0.5))
    with open(going / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "accur')  # the line that is being written
    assert main(["diagnose", "--run", str(going)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("30 of 60 steps: accuracy ") and "[cut_off] 50%" in out and out.count("\n") == 3
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
    assert head.startswith("2 of 2 steps") and len(lines) == 1 and lines[0].split("(")[0] in told_live


@pytest.mark.parametrize("changes", [
    {"loss": None}, {"loss": {"max_importance": "x"}}, {"loss": 3}, {"optim": []}, {"steps": 10**400},
    {"group_size": None}, {"updates_per_step": NAN}, {"advantage": {"lam": []}}])
def test_a_config_of_another_kind_is_read_as_the_default(changes, tmp_path, capsys):
    run = run_folder(tmp_path / "run", log(60, entropy=(1, 0), all_wrong=1, kl_to_reference=9), changes)
    assert main(["diagnose", "--run", str(run)]) == 0 and "[too_hard]" in capsys.readouterr().out


def test_diagnose_refuses_what_is_no_run_of_grpo(tmp_path, capsys):
    pretrain(pretrain_config(tmp_path / "base", text_file(tmp_path), steps=1))
    (tmp_path / "empty").mkdir()
    run_folder(tmp_path / "new", []), run_folder(tmp_path / "odd", log(2))
    (tmp_path / "odd/run.json").write_text("[1]")
    (run_folder(tmp_path / "torn", log(2)) / "run.json").write_text("{")
    run_folder(tmp_path / "bytes", []).joinpath("metrics.jsonl").write_bytes(b"\xff\xfe")
    capsys.readouterr()
    for folder, words in {"base": "is no run of GRPO", "empty": "holds no run (no run.json)",
                          "none": "does not exist", "text.txt": "is a file", "new": "has no steps yet",
                          "odd": "no readable run.json", "torn": "no readable run.json",
                          "bytes": "no readable run.json", ".": "holds several runs; give one of them: base, "
                          }.items():
        assert main(["diagnose", "--run", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
