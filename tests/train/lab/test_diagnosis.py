"""What metrics mean: each rule speaks at its threshold, not before, once per run, never to a healthy one."""
import ast
import itertools
import math
import re
from pathlib import Path

import pytest

from r1zero.train.cli import diagnose
from r1zero.train.cli.main import COMMANDS, main
from r1zero.train.grpo import grpo
from r1zero.train.lab import diagnosis
from r1zero.train.lab.diagnosis import RULES, Diagnosis, advice
from r1zero.train.lab.history import History

from ..loop_cases import grpo_config, save_base
from .diagnosis_cases import HEALTHY, NAN, flags, log

C = flags()

# Each rule with a log, as it is just beyond its threshold and just before, and the flags that it needs.
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
    ("collapsed", dict(accuracy=(0.3, 0.8, 0.0)), dict(accuracy=(0.3, 0.8, 0.06)), {}),
    ("collapsed", dict(accuracy=(0.2, 0.4, 0.0)), dict(accuracy=(0.2, 0.31, 0.0)), {}),
    ("fell", dict(accuracy=(0.8, 0.68)), dict(accuracy=(0.8, 0.72)), {}),
    ("cut_off", dict(truncated=0.26), dict(truncated=0.24), {}),
    ("too_hard", dict(all_wrong=0.81, accuracy=0.02), dict(all_wrong=0.79, accuracy=0.02), {}),
    ("too_easy", dict(all_right=0.81), dict(all_right=0.79), {}),
    ("little_signal", dict(dead_groups=0.61), dict(dead_groups=0.59), {}),
    ("nothing_changes", dict(gradient_norm=0.0), dict(gradient_norm=1e-9), {}),
    ("wild_ratios", dict(ratio_max=21.0), dict(ratio_max=19.0), {"updates_per_step": 4}),
    ("too_much_clipped", dict(clipped_low=0.15, clipped_high=0.16), dict(clipped_low=0.15, clipped_high=0.14),
     {"updates_per_step": 4}),
    ("entropy_death", dict(entropy=(0.5, 0.019), dead_groups=0.61),
     dict(entropy=(0.5, 0.019), dead_groups=0.59), {}),
    ("entropy_death", dict(entropy=0.019, dead_groups=0.7), dict(entropy=0.021, dead_groups=0.7), {}),
    ("entropy_is_gone", dict(entropy=(0.5, 0.04)), dict(entropy=(0.5, 0.06)), {}),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=0.51),
     dict(accuracy=0.4, kl_to_reference=0.49), {}),
    ("gradient_is_cut", dict(gradient_norm=5.1), dict(gradient_norm=4.9), {}),
    ("critic_is_blind", dict(value_explained=-0.01), dict(value_explained=0.01), {}),
    ("form_without_sense", dict(accuracy=(0.40, 0.35), format=(0.5, 0.65), wobble=0.0),
     dict(accuracy=(0.40, 0.35), format=(0.5, 0.59), wobble=0.0), {}),
    ("form_only", dict(format=(0.3, 0.41), reward=(0.1, 0.13), accuracy=0.0, wobble=0.0),
     dict(format=(0.3, 0.39), reward=(0.1, 0.13), accuracy=0.0, wobble=0.0), {}),
    ("form_only", dict(format=(0.3, 0.5), reward=(0.4, 0.43), accuracy=0.3),
     dict(format=(0.3, 0.5), reward=(0.4, 0.41), accuracy=0.3), {}),
    ("flat", dict(accuracy=(0.40, 0.415), wobble=0.0), dict(accuracy=(0.40, 0.43), wobble=0.0), {}),
    ("loss_is_zero", dict(loss=0.29), dict(loss=0.31), {}),
]


# ---- each rule ----

def test_every_flag_that_a_rule_reads_exists():
    """A flag that was not logged silences a rule, so a wrong name would go unnoticed."""
    read = []
    for call in ast.walk(ast.parse(Path(diagnosis.__file__).read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("option", "choice"):
            read.append((call.func.attr, [ast.literal_eval(arg) for arg in call.args]))
    assert len(read) > 10
    history = History(log(), C)
    for kind, path in read:
        found = getattr(history, kind)(*path)
        assert found != "" and found == found, f"history.{kind}{*path,} is no flag of a run"


def test_every_rule_has_a_case():
    assert {name for name, *_ in CASES} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("rule, beyond, before, changes", CASES)
def test_a_rule_speaks_beyond_its_threshold_and_is_silent_before(rule, beyond, before, changes):
    c = flags(**changes)
    assert rule in advice(log(**beyond), c) and rule not in advice(log(**before), c)
    others = advice(log(**beyond), c).keys() - {rule, "loss_is_zero", "fell", "flat"}
    assert not others - {"far_from_reference"}, others  # one trouble, one advice


@pytest.mark.parametrize("changes", [
    {}, {"control": "permute"}, {"updates_per_step": 8}, {"algo": "dapo"}, {"algo": "ppo"}, {"algo": "gspo"}])
@pytest.mark.parametrize("metrics", [
    {}, dict(accuracy=(0.3, 0.98), all_right=(0.0, 0.75), dead_groups=(0.0, 0.5), entropy=(0.6, 0.02)),
    dict(entropy=(2.0, 0.3)), dict(kl_to_reference=(0.0, 0.9)), dict(wobble=0.1), dict(steps=12),
    dict(steps=400)])
def test_a_healthy_run_hears_of_its_loss_alone(metrics, changes):
    assert Diagnosis(flags(**changes), log(**metrics)).given <= {"loss_is_zero"}


def test_the_control_is_not_told_that_it_stands_still():
    rows = log(accuracy=0.3)
    assert "flat" in advice(rows, C) and "flat" not in advice(rows, flags(control="permute"))
    for older, is_flat in ((False, True), (True, False)):  # of runs from when it was a switch
        assert ("flat" in advice(rows, C | {"control": older})) == is_flat


@pytest.mark.parametrize("rule, metrics, changes", [
    ("loss_is_zero", {}, {"updates_per_step": 2}), ("loss_is_zero", {}, {"algo": "rloo"}),
    ("loss_is_zero", {"reward_process": 0.5}, {}),
    ("loss_is_zero", {"trained_samples": 0}, {}), ("loss_is_zero", {"gradient_norm": 0.0}, {}),
    ("sampler_is_off", dict(logp_gap_mean=0.1), {"loss__max_importance": 2.0}),
    ("too_much_clipped", dict(clipped_low=0.9), {"algo": "gspo"}),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01), accuracy=(0.3, 0.95)), {}),
    ("far_from_reference", dict(kl_to_reference=3.0, accuracy=(0.3, 0.4)), {}),
    ("collapsed", dict(accuracy=(0.3, 0.8, 0.0)), {"control": "random"}),
    ("collapsed", dict(accuracy=0.02), {}),
    ("degenerate", dict(accuracy=(0.3, 0.8, 0.0), format=(0.9, 0.0)), {}),  # the collapse says it
    ("fell", dict(accuracy=(0.3, 0.8, 0.0)), {}),
    ("cut_off", dict(accuracy=(0.3, 0.8, 0.0), truncated=0.9), {}),
    ("entropy_death", dict(entropy=0.01, dead_groups=0.9, accuracy=0.95), {}),  # learned, not dead
    ("entropy_death", dict(entropy=0.0, dead_groups=1.0, trained_samples=0), {}),  # not measured
    ("entropy_death", dict(entropy=0.01, dead_groups=0.9), {"algo": "reinforce"}),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01), dead_groups=0.7), {}),
    ("little_signal", dict(entropy=0.01, dead_groups=0.7), {}),
    ("form_only", dict(format=(0.3, 0.9), reward=(0.4, 0.8), accuracy=(0.3, 0.36), wobble=0.0), {}),
    ("form_only", dict(format=(0.3, 0.9), reward=0.4, accuracy=0.3), {}),
    ("form_only", dict(format=(0.3, 0.9), reward=(0.4, 0.6), accuracy=0.3, steps=29), {}),
    ("form_only", dict(format=(0.3, 0.9), reward=(0.4, 0.6), accuracy=0.3), {"control": "permute"}),
    ("fell", dict(accuracy=(0.8, 0.65), wobble=0.2), {}), ("flat", dict(accuracy=0.95), {}),
    ("flat", dict(steps=49, accuracy=0.5), {}), ("critic_is_blind", dict(steps=19, value_explained=-1), {}),
    ("little_signal", dict(dead_groups=0.9, all_wrong=0.9), {}), ("too_hard", dict(steps=9, all_wrong=1), {}),
])
def test_a_rule_is_silent_where_its_metric_means_something_else(rule, metrics, changes):
    assert rule not in advice(log(**metrics), flags(**changes))


def test_what_explains_the_others_comes_first_and_consequences_are_left_out():
    c = flags(updates_per_step=4)
    collapse = log(accuracy=(0.5, 0.0), format=(0.9, 0.0), truncated=(0.0, 1.0), all_wrong=(0.0, 1.0),
                   kl_to_reference=(0.0, 5.0), ratio_max=100.0, logp_gap_mean=0.1)
    assert list(advice(collapse, c)) == ["sampler_is_off", "degenerate", "wild_ratios", "far_from_reference"]
    hopeless = log(accuracy=0.0, wobble=0, format=0.0, truncated=0.9, all_wrong=1.0, dead_groups=1.0,
                   gradient_norm=0.0, trained_samples=0, loss=0.0)
    assert list(advice(hopeless, c)) == ["cut_off", "too_hard", "nothing_changes"]
    assert list(advice(log(), C))[-1] == list(advice(log(accuracy=0.4), C))[-1] == "loss_is_zero"


@pytest.mark.parametrize("rule, metrics, changes, said", [
    ("too_hard", dict(all_wrong=1, accuracy=0, wobble=0, format=0.01), {}, "1.0% of answers are well formed"),
    ("too_hard", dict(all_wrong=1, accuracy=0, wobble=0), {"group_size": 8}, "--group-size 16"),
    ("sampler_is_off", dict(logp_gap_mean=0.1), {"routing_replay": False}, "leave out --no-routing-replay"),
    ("cut_off", dict(truncated=0.5), {}, "50% of answers are cut off at 128 tokens"),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01)), {"updates_per_step": 2}, "--loss.clip-high 0.28"),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=2), {"loss__kl_coef": 0.01},
     "--loss.kl-coef 0.02"),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=2), {}, "--loss.kl-coef 0.001"),
    ("critic_is_blind", dict(value_explained=-0.5), {"advantage__lam": 0.9}, "--advantage.lam 1"),
    ("little_signal", dict(dead_groups=0.9, all_wrong=0.5), {}, "90% of groups have no signal (all wr"),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0), kl_to_reference=(0.0, 2.0), length=(40, 80)), {},
     "fell below half at step 42, where the KL to the reference was 1.56 nats per token and answers were 71"),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0)), {"eval_every": 5}, "the best checkpoint is kept."),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0)), {"updates_per_step": 4}, "fewer --updates-per-step"),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0)), {"loss__kl_coef": 0.01}, "--loss.kl-coef 0.02"),
    ("entropy_death", dict(entropy=(0.5, 0.01), dead_groups=0.7), {}, "0.010 nats per token (at first 0.50)"),
    ("entropy_death", dict(entropy=0.01, dead_groups=0.7), {}, "0.010 nats per token, so 70% of groups"),
    ("form_only", dict(format=(0.3, 0.5), reward=(0.1, 0.2), accuracy=0.0, wobble=0.0), {}, "r1zero grade"),
    ("form_only", dict(format=(0.3, 0.5), reward=(0.1, 0.2), accuracy=0.3), {}, "--rewards.format-weight"),
])
def test_advice_says_its_metric_and_fits_the_flags(rule, metrics, changes, said):
    assert said in advice(log(**metrics), flags(**changes))[rule]


@pytest.mark.parametrize("rule, metrics, changes, unsaid", [
    ("cut_off", dict(truncated=0.5), {"overlong_buffer": 0.2}, "--overlong-buffer"),
    ("sampler_is_off", dict(logp_gap_mean=0.1), {}, "--no-routing-replay"),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01)), {}, "clip-high"),  # no ratio meets a bound
    ("critic_is_blind", dict(value_explained=-0.5), {}, "--advantage.lam"),  # is 1 already
    ("little_signal", dict(dead_groups=0.9), {"dynamic_sampling": 3}, "--dynamic-sampling"),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0)), {"eval_every": 5}, "--eval-every"),
    ("collapsed", dict(accuracy=(0.3, 0.9, 0.0), kl_to_reference=NAN), {}, "KL to the reference was"),
])
def test_advice_does_not_name_what_is_done_already(rule, metrics, changes, unsaid):
    assert unsaid not in advice(log(**metrics), flags(**changes))[rule]


def test_advice_names_flags_and_commands_that_exist(capsys):
    nodes = [node for path in (diagnosis.__file__, diagnose.__file__)
             for node in ast.walk(ast.parse(Path(path).read_text()))]
    words = " ".join(node.value for node in nodes
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))
    flags, commands = set(re.findall(r"--[a-z][a-z.-]*[a-z]", words)), set(re.findall(r"r1zero (\w+)", words))
    helps = ""
    for command in ("grpo", "sft"):
        assert main([command, "--help"]) == 0
        helps += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z.-]*[a-z]", helps))
    assert len(flags) > 10 and flags - known - {"--run"} == set()
    assert {"grpo", "sft", "chat", "grade"} <= commands <= set(COMMANDS)


@pytest.mark.parametrize("rule, metrics, changes", [
    ("sampler_is_off", dict(logp_gap_mean=0.1), {"loss": {}}),
    ("fell", dict(accuracy=(0.8, 0.6)), {"control": None}),
    ("collapsed", dict(accuracy=(0.3, 0.8, 0.0)), {"control": None}),
    ("form_only", dict(format=(0.3, 0.5), reward=(0.1, 0.2), accuracy=0.3), {"control": None}),
    ("entropy_death", dict(entropy=0.01, dead_groups=0.7), {"advantage": None}),
    ("flat", dict(accuracy=0.4), {"control": "no"}),
    ("little_signal", dict(dead_groups=0.9), {"advantage": None}),
    ("too_much_clipped", dict(clipped_low=0.5), {"loss": {"objective": 3}}),
    ("gradient_is_cut", dict(gradient_norm=9), {"optim": []}),
    ("loss_is_zero", {}, {"updates_per_step": NAN}), ("loss_is_zero", {}, {"loss": 3}),
])
def test_a_rule_whose_flags_were_not_logged_does_not_apply(rule, metrics, changes):
    rows = log(**metrics)
    assert rule in advice(rows, C) and rule not in advice(rows, C | changes) and rule not in advice(rows, {})


@pytest.mark.parametrize("rule, metrics, said", [
    ("cut_off", dict(truncated=0.5), "are cut off; few"), ("too_hard", dict(all_wrong=1), "--group-size."),
    ("far_from_reference", dict(accuracy=0.4, kl_to_reference=2), "take --loss.kl-coef 0.001."),
    ("critic_is_blind", dict(value_explained=-0.5), "Raise --critic-optim.lr."),
    ("entropy_is_gone", dict(entropy=(0.5, 0.01)), "or try --loss.entropy-coef"),
])
def test_advice_leaves_out_what_was_not_logged(rule, metrics, said):
    assert said in advice(log(**metrics), {})[rule]


# ---- a run that is going ----

PASSING = [row for steps, cut in ((20, 0.0), (10, 1.0), (40, 0.0), (10, 1.0))  # the trouble comes twice
           for row in log(steps, accuracy=0.95, truncated=cut)]


def told(diagnosis: Diagnosis, rows: list[dict]) -> list[str]:
    return [re.match(r"\[(\w+)\] \w", line)[1] for row in rows for line in diagnosis.observe(row)]


def test_each_advice_is_given_once_and_at_the_step_where_it_first_holds():
    going, steps = Diagnosis(C, []), {}
    for step, row in enumerate(PASSING, 1):
        for name in told(going, [row]):
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


def test_the_step_of_a_collapse_is_the_first_of_the_low_end_and_not_an_earlier_dip():
    rows = [{"step": step, "accuracy": 0.1 if step == 20 or step > 43 else 0.6} for step in range(1, 60)]
    assert History(rows, C).falls_below("accuracy", 0.3) == {"step": 44, "accuracy": 0.1}
    assert History(rows[:43], C).falls_below("accuracy", 0.3) == {} == History([], C).falls_below("x", 1.0)


# ---- rows that a log should not hold ----

BAD = [None, NAN, math.inf, -math.inf, 1e308, -1e308, 10**400, "x", "", [1], {}, True, -1, 0]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:9])
def test_hostile_rows_crash_no_rule(value):
    rows = log(30)
    for c in (C, flags(algo="ppo"), flags(updates_per_step=4)):
        for name in HEALTHY:
            assert isinstance(advice([{**row, name: value} for row in rows], c), dict)
            assert isinstance(advice([*rows, {**rows[0], name: value}], c), dict)
        whole = advice([{"step": 1} | dict.fromkeys(HEALTHY, value) for _ in rows], c)
        assert all("nan" not in text and "inf" not in text for text in whole.values())


@pytest.mark.parametrize("missing", HEALTHY)
def test_a_metric_that_is_missing_says_nothing(missing):
    rows = [{name: value for name, value in row.items() if name != missing} for row in log(60)]
    assert advice(rows, C).keys() <= {"loss_is_zero"}
    assert advice([{"step": n} for n in range(60)], C) == advice([], C) == {}


def test_the_best_of_a_long_run_is_found_wherever_it_was():
    for peak, steps in itertools.product((0, 35, 100, 300), (310, 999)):
        rows = [{"accuracy": 0.9 if peak <= n < peak + 150 else 0.1} for n in range(steps)]
        assert History(rows, C).best_mean("accuracy") == pytest.approx(0.9)
    assert math.isnan(History([{}], C).best_mean("accuracy"))
