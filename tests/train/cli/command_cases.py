"""The flags of all commands, and a smallest command line for each, for the tests of the command line."""
from importlib import import_module

from r1zero.train.cli.flags import Flag, flags_of, parse_flags
from r1zero.train.cli.main import COMMANDS

# Values of flags that take only some words.
WORDS = {"--break": "no_end_token", "--data": "countdown", "--which": "last", "--device": "cpu"}


def config_of(command: str) -> type:
    """The dataclass of a command."""
    entry = COMMANDS[command]
    return getattr(import_module(f"r1zero.train.{entry.module}"), entry.config)


def smallest(command: str, without: str = "") -> list[str]:
    """The flags that a command cannot do without."""
    words = []
    for flag in flags_of(config_of(command)):
        if flag.is_required and flag.name != without:
            words += [flag.name, WORDS.get(flag.name, "x")]
    if command == "chat" and without != "--run":
        words += ["--run", "x"]
    if command == "grade":
        words += ["--problem", "3 7 -> 10", "--response", "7+3"]
    if command == "compare" and without != "--break":
        words += ["--break", WORDS["--break"]]
    return words


def all_flags() -> list[tuple[str, Flag]]:
    """(command, flag) for every flag of every command."""
    return [(command, flag) for command in COMMANDS for flag in flags_of(config_of(command))]


def parsed(command: str, *words: str, without: str = ""):
    """The config of a command line."""
    return parse_flags(command, config_of(command), [*smallest(command, without), *words])
