"""A reward of the user's own: what it is given, what is made of it, and what is said of a bad one."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from r1zero.eval.response import Sample
from r1zero.rl.plugin import PluginError, first_that_fails, load_reward, plugin_rewards
from r1zero.rl.rewards import Grader, RewardConfig
from r1zero.train.cli.main import main

from .cases import Bandit, algorithm

SOURCE = """
import math
import sys
from fractions import Fraction
from functools import partial

import numpy as np

seen = []

def brevity(samples):
    seen.append(samples)
    return [1.0 / (1 + len(sample.text)) for sample in samples]

def as_array(samples):
    return np.arange(len(samples))

def with_options(samples, scale=2.0):
    return [scale for sample in samples]

class Stateful:
    def __call__(self, samples):
        return [True for sample in samples]

stateful = Stateful()
number = 3

def no_argument():
    return []

def two_arguments(problem, text):
    return 1.0

def only_keywords(*, samples):
    return []

def accuracy(samples):
    return [1.0] * len(samples)

def raises(samples):
    return [1.0 / (sample.text != "bad") for sample in samples]

def quits(samples):
    return [1.0 if sample.text != "bad" else sys.exit(0) for sample in samples]

asked = []

def counts(samples):
    asked.append(len(samples))
    raise ConnectionError("the judge is away")

def raises_on_many(samples):
    return [1.0 / (3 - len(samples))] * len(samples)

def nan(samples):
    return [math.nan if sample.text == "bad" else 0.0 for sample in samples]

def infinite(samples):
    return [-math.inf if sample.text == "bad" else 0.0 for sample in samples]

def minus(samples):
    return [-3 if sample.text == "bad" else -0.5 for sample in samples]

def large(samples):
    return [1e308 if sample.text == "bad" else 1.0 for sample in samples]

def exact(samples):
    return [Fraction(1, 2), np.float32(0.25), 10**18]

def huge(samples):
    return [10**400 if sample.text == "bad" else 0 for sample in samples]

def endless(samples):
    return [10**5000 if sample.text == "bad" else 0 for sample in samples]

def lazy(samples):
    return (1.0 / (sample.text != "bad") for sample in samples)

def text(samples):
    return ["1.0" if sample.text == "bad" else 1.0 for sample in samples]

def nothing(samples):
    return [None if sample.text == "bad" else 1.0 for sample in samples]

def empty(samples):
    return []

def shorter(samples):
    return [1.0] * (len(samples) - 1)

def one_number(samples):
    return 1.0

def forgotten(samples):
    pass

def word(samples):
    return "x" * len(samples)

def keyed(samples):
    return {n: 1.0 for n, _ in enumerate(samples)}
"""
SAMPLES = [Sample("3 7 -> 10", text, (1, 2), "stop") for text in ("good", "bad", "good")]
HERE = "my_rewards_of_the_tests"


def rollouts(*texts) -> SimpleNamespace:
    """One group of answers to a problem."""
    samples = [Sample(7, text, (1, 2), "stop") for text in texts]
    return SimpleNamespace(samples=lambda: samples, group_offsets=np.array([0, len(texts)]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the user's module in it, which is forgotten afterwards."""
    (tmp_path / f"{HERE}.py").write_text(SOURCE)
    (tmp_path / "broken_of_the_tests.py").write_text("import json\n\nraise RuntimeError('no licence')\n")
    (tmp_path / "needy_of_the_tests.py").write_text("import missing_of_the_tests\n")
    (tmp_path / "torn_of_the_tests.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_of_the_tests")]:
        del sys.modules[name]


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    return text


# ---- what works ----

def test_a_function_gets_the_samples_and_its_numbers_are_a_part(folder):
    config = algorithm(rewards=dict(plugin=f"{HERE}:brevity", plugin_weight=0.5))
    sampled = rollouts("é", "longer")
    found = Grader(config)(Bandit(), sampled)
    [given] = sys.modules[HERE].seen
    assert given == sampled.samples() and given is not sampled.samples()
    assert found.parts["brevity"].tolist() == [1 / 2, 1 / 7] and found.weights["brevity"] == 0.5
    rule = found.accuracy + 0.2 * found.format
    assert found.training.tolist() == found.total.tolist() == (rule + 0.5 * found.parts["brevity"]).tolist()


def test_a_plug_in_judges_so_it_revives_a_group(folder):
    alike = rollouts("x", "longer")
    for rewards, dead in (({}, True), (dict(plugin=f"{HERE}:brevity"), False)):
        found = Grader(algorithm(rewards=rewards))(Bandit(), alike)
        assert found.dead(alike).tolist() == [dead]
    assert list(Grader(algorithm(rewards=dict(plugin=f"{HERE}:raises", plugin_weight=0)))(
        Bandit(), alike).parts) == ["accuracy", "format"]  # and is not called


@pytest.mark.parametrize("name, expected", [
    ("as_array", [0, 1, 2]), ("with_options", [2, 2, 2]), ("stateful", [1, 1, 1]),
    ("exact", [0.5, 0.25, 1e18])])
def test_arrays_defaults_and_objects_will_do(folder, name, expected):
    found = plugin_rewards(f"{HERE}:{name}", SAMPLES)
    assert found.tolist() == expected and found.dtype == np.float64


def test_the_current_folder_shadows_no_installed_module(folder):
    (folder / "json.py").write_text("dumps = None")
    assert load_reward("json:dumps") is json.dumps and sys.path[0] != str(folder)


def test_the_function_is_loaded_once_so_its_folder_may_go_away(folder, monkeypatch, tmp_path_factory):
    grader = Grader(algorithm(rewards=dict(plugin=f"{HERE}:brevity")))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    del sys.modules[HERE]
    (folder / f"{HERE}.py").unlink()
    assert grader(Bandit(), rollouts("x")).parts["brevity"].tolist() == [0.5]


# ---- what is refused before a run ----

REFUSED = [
    ("brevity", "is 'brevity', expected module:name, as in my_module:x"),
    (f"{HERE}.py:brevity", f"there is no module {HERE}.py, neither installed nor in"),
    (f"./{HERE}:brevity", "expected module:name"), (f"{HERE}:", "expected module:name"),
    ("absent_of_the_tests:f", "there is no module absent_of_the_tests, neither installed nor in"),
    ("needy_of_the_tests:f", "needs another module: No module named 'missing_of_the_tests'"),
    ("broken_of_the_tests:f", "raised RuntimeError: no licence (broken_of_the_tests.py, line 3)"),
    ("torn_of_the_tests:f", "raised SyntaxError: invalid syntax (torn_of_the_tests.py, line 1)"),
    (f"{HERE}:brevety", f"{HERE}.py has no 'brevety'; it has math, sys, Fraction, partial, np, seen"),
    (f"{HERE}:number", "is of type int, expected a function of samples"),
    (f"{HERE}:no_argument", "takes (), expected one argument, the list of samples"),
    (f"{HERE}:two_arguments", "takes (problem, text), expected one argument"),
    (f"{HERE}:only_keywords", "takes (*, samples), expected one argument"),
    (f"{HERE}:accuracy", "'accuracy' is the name of something else in the log; give the function another"),
]


@pytest.mark.parametrize("spec, fragment", REFUSED)
def test_a_bad_plug_in_is_refused_in_one_line(folder, spec, fragment):
    with pytest.raises(ValueError) as caught:
        RewardConfig(plugin=spec)
    assert fragment in one_line(caught) and "--rewards.plugin" in one_line(caught)


@pytest.mark.parametrize("command", ["grpo --run run --base base", "demo --run run",
                                     "compare --break k1_loss --run run --base base"])
def test_a_command_with_a_bad_plug_in_leaves_no_run_folder(folder, command, capsys):
    before = sorted(path.name for path in folder.iterdir())
    flags = ["--rewards.plugin", f"{HERE}:number"]
    assert main([*command.split(), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected a function of samples" in error
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


# ---- what ends a step ----

@pytest.mark.parametrize("name, fragment", [
    ("raises", f"raised ZeroDivisionError: float division by zero ({HERE}.py, line "),
    ("quits", "raised SystemExit: 0"),  # which would end the command as if all were well
    ("lazy", "raised ZeroDivisionError: float division by zero"),
    ("huge", f"returned 1{79 * '0'}..., expected a finite number"),
    ("endless", "returned something of type int, expected a finite number"),
    ("nan", "returned nan, expected a finite number"), ("infinite", "returned -inf, expected a finite"),
    ("text", "returned '1.0', expected a finite number"), ("nothing", "returned None, expected a finite"),
    ("empty", "returned [], 0 values; expected a list with one number for each of 3 samples, on the"),
    ("shorter", "returned [1.0, 1.0], 2 values; expected"),
    ("one_number", "returned 1.0; expected a list with one number for each of 3 samples"),
    ("forgotten", "returned None; expected a list with one number for each of 3"),
    ("word", "returned 'xxx'; expected a list"), ("keyed", "expected a list with one number for each"),
])
def test_what_it_does_wrong_is_said_in_one_line_with_problem_and_response(folder, name, fragment):
    spec = f"{HERE}:{name}"
    with pytest.raises(PluginError) as caught:
        plugin_rewards(spec, SAMPLES)
    text = one_line(caught)
    assert fragment in text
    assert f"--rewards.plugin {spec} r" in text and "on the problem" in text and "3 7 -> 10" in text
    of_all = ("empty", "shorter", "one_number", "forgotten", "word", "keyed")
    blamed = "'good'" if name in of_all else "'bad'"
    assert text.endswith(f"the response {blamed}")


@pytest.mark.parametrize("algo, rewards, fragment", [
    ("maxrl", dict(plugin="minus"), "returned -3, and the whole reward is -2; expected 0 or more"),
    ("plain", dict(plugin="large", plugin_weight=10), "with its weight it is inf, expected at most 1e+30"),
    ("plain", dict(plugin="large"), "with its weight it is 1e+308, expected at")])
def test_a_reward_that_cannot_be_trained_on_is_told_with_its_sample(folder, algo, rewards, fragment):
    grader = Grader(algorithm(algo, rewards=rewards | dict(plugin=f"{HERE}:{rewards['plugin']}")))
    assert np.isfinite(grader(Bandit(), rollouts("good", "good")).training).all()
    with pytest.raises(PluginError) as caught:
        grader(Bandit(), rollouts("good", "bad"))
    assert fragment in one_line(caught)
    assert one_line(caught).endswith("on the problem 7 and the response 'bad'")


def test_no_sample_is_blamed_that_does_not_fail_alone(folder):
    with pytest.raises(PluginError) as caught:
        plugin_rewards(f"{HERE}:raises_on_many", SAMPLES)
    assert "raised ZeroDivisionError" in one_line(caught)
    assert one_line(caught).endswith("on all 3 samples together")


def test_the_search_for_the_sample_to_blame_ends_after_a_while(folder):
    counts, error = load_reward(f"{HERE}:counts"), ConnectionError()
    assert first_that_fails(counts, SAMPLES, error, seconds=0) is None
    asked = sys.modules[HERE].asked
    assert asked == [] and first_that_fails(counts, SAMPLES, error) is SAMPLES[0] and asked == [1]
