"""Checks of flags that several commands share: they refuse what the engine would refuse, and nothing else."""
import pytest

from r1zero.model.engine.requests import LEAST_TEMPERATURE
from r1zero.train.checks import check_temperature
from r1zero.train.cli.chat import ChatConfig
from r1zero.train.cli.main import main

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("temperature", [NAN, INF, -INF, -1.0, -1e-9, 1e-7, 5e-324, LEAST_TEMPERATURE / 2])
def test_a_temperature_that_the_engine_refuses_is_refused(temperature):
    for may_be_zero in (True, False):
        with pytest.raises(ValueError, match="--temperature is "):
            check_temperature(temperature, may_be_zero)
    with pytest.raises(ValueError, match="--temperature is "):
        ChatConfig(run="x", temperature=temperature)


def test_other_temperatures_are_taken():
    for temperature in (LEAST_TEMPERATURE, 0.5, 1, 1e9):
        check_temperature(temperature, may_be_zero=False)
    check_temperature(0)
    with pytest.raises(ValueError, match="expected a number"):
        check_temperature(0, may_be_zero=False)


@pytest.mark.parametrize("words", [["grpo", "--base", "y"], ["chat"]])
def test_it_is_refused_before_anything_is_touched(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--run", "x", "--temperature", "1e-9"]) == 2
    error = capsys.readouterr().err
    assert "--temperature is 1e-09" in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []
