"""The words of a command line: what is given twice, what is no value, and what looks like a flag."""
import dataclasses
import re
from typing import Annotated

import pytest
import tyro

from r1zero.train.cli.flags import flags_of, parse_flags
from r1zero.train.cli.main import COMMANDS, main
from tests.train.cli.command_cases import all_flags, config_of, parsed, smallest

ALL = all_flags()
LISTS = [(command, flag) for command, flag in ALL if flag.is_list]


def id_of(value) -> str:
    return getattr(value, "name", str(value))


def refused(capsys, argv: list[str], *fragments: str) -> None:
    """`main(argv)` ends with 2 and one line on stderr that holds all fragments."""
    assert main(argv) == 2, argv
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error[:-1].isprintable(), error
    for fragment in (f"r1zero {argv[0]}: ", *fragments):
        assert fragment in error, error


# ---- the table of flags ----

@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_has_the_flags_that_tyro_has(command, capsys):
    assert main([command, "--help"]) == 0
    shown = set(re.findall(r"(?:^[│| ]*|, |[|] )(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE))
    flags = flags_of(config_of(command))
    switches = {flag.opposite for flag in flags if flag.is_switch}
    assert {flag.name for flag in flags} | switches == shown - {"--help"}


# ---- given twice ----

VALUES = {str: ("a", "b"), int: ("1", "2"), float: ("0.5", "0.25")}
NAMED = {"--options": ("high=30", "low=2"), "--keep": ("right", "formed")}


@pytest.mark.parametrize("command, flag", LISTS, ids=id_of)
def test_a_list_that_is_given_twice_has_the_values_of_both(command, flag):
    first, second = NAMED.get(flag.name, VALUES[flag.type])
    name, snake = flag.name, "--" + flag.name[2:].replace("-", "_")
    whole = parsed(command, name, first, second, without=name)
    assert whole != parsed(command, name, first, without=name)
    for words in ([name, first, name, second], [f"{name}={first}", name, second],
                  [name, first, f"{snake}={second}"]):
        assert parsed(command, *words, without=name) == whole, words
    with pytest.raises(ValueError, match=f"{name} needs a value behind it"):
        parsed(command, name, first, name, without=name)


def test_there_are_lists_to_test():
    assert {flag.name for _, flag in LISTS} >= {"--data", "--options", "--ks", "--problem"}


def test_other_flags_may_stand_between_the_parts_of_a_list():
    config = parsed("pretrain", "--data", "a", "b", "--steps", "7", "--data=c", "--seed", "1", "--data", "d",
                    without="--data")
    assert config.data == ("a", "b", "c", "d") and config.steps == 7 and config.seed == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_any_other_value_that_is_given_twice_is_refused_with_both(command, capsys):
    for flag in flags_of(config_of(command)):
        if flag.is_list or flag.is_switch:
            continue
        snake = "--" + flag.name[2:].replace("-", "_")
        first, second = VALUES[flag.type] if flag.type in VALUES else ("True", "False")
        words = [flag.name, first, f"{snake}={second}"]
        refused(capsys, [command, *words], flag.name, repr(first), repr(second))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_switch_in_both_senses_is_refused(command, capsys):
    for flag in flags_of(config_of(command)):
        if flag.is_switch:
            refused(capsys, [command, *smallest(command), flag.name, flag.opposite], flag.name, flag.opposite)
            refused(capsys, [command, *smallest(command), f"{flag.name}=true"], "takes no value")


def test_a_field_that_loses_its_default_in_a_subclass_must_be_given(capsys):
    refused(capsys, ["compare", "--run", "x", "--base", "y"], "expected either --break NAME or --control")


def test_a_switch_may_be_given_twice_in_one_sense():
    assert parsed("pretrain", "--resume", "--resume").resume


def test_a_named_option_that_is_given_twice_is_refused(capsys):
    for words in (["high=20", "high=30"], ["high=20", "--options", "high=30"], ["high=2", "low=1", "high=2"]):
        refused(capsys, ["eval", "--run", "x", "--options", *words], "'high' twice", words[0], words[-1])
    assert parsed("eval", "--options", "high=20", "low=20").task.options == ("high=20", "low=20")


# ---- values that look like flags ----

def test_values_that_begin_with_a_hyphen():
    assert parsed("eval", "--options", "ops=+-*", "low=-3").task.options == ("ops=+-*", "low=-3")
    config = parsed("pretrain", "--data=--odd", "b", "--data", "-3", without="--data")
    assert config.data == ("--odd", "b", "-3")
    assert parsed("chat", "--problem", "-3 4 -> 1", "--seed", "-5").problem == ("-3 4 -> 1",)
    assert parsed("chat", "--seed", "-5").seed == -5


@pytest.mark.parametrize("words, fragment", [
    (["--data", "a", "--data=--odd"], "--data=--odd"), (["--data", "a", "--", "b"], "there is no flag --"),
    (["--data", "a", "--sav-every", "3"], "--sav-every; did you mean --save-every?"),
    (["--data", "a", "-x"], "there is no flag -x"), (["--steps", "--data", "a"], "--steps needs a value"),
    (["stray", "--data", "a"], "before 'stray'"), ([], "--data must be given"),
])
def test_words_that_belong_to_nothing_are_named(words, fragment, capsys):
    refused(capsys, ["pretrain", "--run", "x", *words], fragment, "r1zero pretrain --help")


# ---- values that no flag takes ----

BAD = {int: ("many", "1.5", "", "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "nan"),
       float: ("much", "", "nan", "inf", "-inf", "1e999"), str: ("",)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_value_of_any_flag_is_one_line_and_touches_nothing(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for flag in flags_of(config_of(command)):
        for bad in BAD.get(flag.type, ()):
            if bad or flag.name not in ("--response", "--problem", "--answer"):
                words = [*smallest(command, flag.name), f"{flag.name}={bad}"]
                refused(capsys, [command, *words], f"{flag.name} ")
                tried += 1
    assert tried and list(tmp_path.iterdir()) == []


def test_seeds_have_64_bits_with_or_without_a_sign(capsys):
    for seed in (2**64 - 1, -(2**63)):
        assert parsed("chat", "--seed", str(seed)).seed == seed
    refused(capsys, ["chat", "--run", "x", "--seed", str(2**64)], "--seed is 18446744073709551616", "64 bits")


def test_an_optional_value_may_be_none():
    assert parsed("eval", "--n", "None").n is None and parsed("eval", "--n", "3").n == 3


def test_an_answer_may_be_empty():
    words = ["--problem", "3 7 -> 10", "--response", ""]
    assert parse_flags("grade", config_of("grade"), words).response == ""


# ---- configs that no command has yet ----

@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[float, ...] = ()
    loud: bool = False
    flat: Annotated[int, tyro.conf.arg(name="level", prefix_name=False)] = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    names: Annotated[list[str], tyro.conf.arg(name="who")] = dataclasses.field(default_factory=list)


def test_the_table_follows_nested_configs_and_given_names():
    assert [(flag.name, flag.type, flag.is_list) for flag in flags_of(Outer)] == [
        ("--inner.sizes", float, True), ("--inner.loud", bool, False), ("--level", int, False),
        ("--who", str, True)]
    words = "--inner.sizes 1 --who a --inner.sizes=2 --inner.no-loud --level 3 --who b"
    assert parse_flags("x", Outer, words.split()) == Outer(Inner((1.0, 2.0), False, 3), ["a", "b"])
    with pytest.raises(ValueError, match="--inner.loud and --inner.no-loud"):
        parse_flags("x", Outer, ["--inner.loud", "--inner.no-loud"])


def test_a_value_that_begins_with_a_hyphen_is_told_how_to_be_given():
    with pytest.raises(ValueError, match="--response needs a value .* begins with a hyphen .*--response=-x"):
        parse_flags("grade", config_of("grade"), ["--problem", "3 7 -> 10", "--response", "-x"])
    config = parse_flags("grade", config_of("grade"), ["--problem", "3 7 -> 10", "--response=-x"])
    assert config.response == "-x"


@pytest.mark.parametrize("flag", ["--response", "--problem", "--answer"])
def test_a_text_that_would_be_taken_for_no_text_is_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} None would be no text"):
        parse_flags("grade", config_of("grade"), ["--task", "gsm8k", flag, "None"])
