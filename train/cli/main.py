"""The command line: `r1zero <command> [--flags]`.

`python -m r1zero.train.cli.main <command> [--flags]` is the same, for where the script is not on
the path.

A command is a frozen dataclass, whose fields are its flags (tyro reads them), and a function that
takes it. Its module is imported when the command is called, so that `r1zero --help` and `r1zero
grade` do not wait for torch. To add a command, add a line to COMMANDS.

    exit code   what happened
    0           done
    1           the computation failed (NaN, out of memory, the GPU), its text could not be
                written, or a fault of r1zero itself
    2           flags, files, data or packages that the user can mend; one line says how
    128 + n     ended by signal n: 130 by Ctrl-C, 143 by SIGTERM. A loop has saved before

`--traceback`, anywhere, shows where an error came from instead. Left out: shell completion beyond
tyro's own, config files (a shell script with flags is one), an alias for every flag.
"""

import difflib
import platform
import sys
import traceback
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

from ...eval.console import say
from ..interrupt import Stopped, ends_like_ctrl_c
from .errors import explain
from .flags import parse_flags
from .streams import Output, ready_streams


class Command(NamedTuple):
    module: str
    """Where it is, under r1zero.train."""
    config: str
    """The dataclass in that module whose fields are the flags."""
    function: str
    """The function in that module that does the work; it takes the config."""
    purpose: str
    """What it does, for the list of commands."""
    is_text: bool = False
    """Whether its work is the text on stdout. Then it has failed if nobody can take that."""


COMMANDS = {
    "demo": Command(
        module="recipes.demo",
        config="DemoConfig",
        function="demo",
        purpose="R1-Zero from nothing: a base model, GRPO, control, report",
    ),
    "r1": Command(
        module="recipes.r1",
        config="R1Config",
        function="r1",
        purpose="from R1-Zero to R1: cold start, reasoning, rejection sampling, all scenarios",
    ),
    "distill": Command(
        module="recipes.distill",
        config="DistillConfig",
        function="distill",
        purpose="distillation or RL for a small model: six arms from one student",
    ),
    "recipe minimal": Command(
        module="recipes.minimal",
        config="MinimalConfig",
        function="minimal",
        purpose="the smallest whole loop, with probes, in two minutes",
    ),
    "recipe chatgpt": Command(
        module="recipes.chatgpt",
        config="ChatGPTConfig",
        function="chatgpt",
        purpose="ChatGPT's recipe on a toy: SFT, rankings, reward model, PPO",
    ),
    "recipe countdown-qwen2.5-1.5b": Command(
        module="recipes.open_model_table",
        config="CountdownQwen15B",
        function="open_model",
        purpose="R1-Zero on Qwen2.5-1.5B, with its control",
    ),
    "recipe countdown-qwen2.5-3b": Command(
        module="recipes.open_model_table",
        config="CountdownQwen3B",
        function="open_model",
        purpose="R1-Zero on Qwen2.5-3B, with its control",
    ),
    "recipe gsm8k-qwen2.5-0.5b": Command(
        module="recipes.open_model_table",
        config="GSM8KQwen05B",
        function="open_model",
        purpose="GSM8K on Qwen2.5-0.5B, with its control",
    ),
    "recipe gsm8k-smollm2-360m": Command(
        module="recipes.open_model_table",
        config="GSM8KSmolLM2",
        function="open_model",
        purpose="GSM8K on SmolLM2-360M-Instruct, with its control",
    ),
    "recipe math-qwen3-0.6b": Command(
        module="recipes.open_model_table",
        config="MathQwen06B",
        function="open_model",
        purpose="MATH on Qwen3-0.6B-Base, with its control",
    ),
    "recipe math-olmo2-1b": Command(
        module="recipes.open_model_table",
        config="MathOLMo2",
        function="open_model",
        purpose="MATH on OLMo-2-1B, with its control",
    ),
    "pretrain": Command(
        module="pretrain",
        config="PretrainConfig",
        function="pretrain",
        purpose="train a base model from random weights",
    ),
    "sft": Command(
        module="sft",
        config="SFTConfig",
        function="sft",
        purpose="fine-tune a model on prompt/response pairs or messages",
    ),
    "reward-model": Command(
        module="reward_model",
        config="RewardModelConfig",
        function="reward_model",
        purpose="train a reward model on rankings of answers",
    ),
    "process-reward": Command(
        module="process_reward",
        config="ProcessRewardConfig",
        function="process_reward",
        purpose="train a process reward on answers with labelled steps",
    ),
    "grpo": Command(
        module="grpo",
        config="GRPOConfig",
        function="grpo",
        purpose="R1-Zero: GRPO straight on a base model, with rule rewards",
    ),
    "collect": Command(
        module="collect",
        config="CollectConfig",
        function="collect",
        purpose="sample answers, keep the good ones, and write them as data for sft",
    ),
    "compare": Command(
        module="lab.compare",
        config="CompareConfig",
        function="compare",
        purpose="a classic mistake of GRPO beside the right run",
    ),
    "diagnose": Command(
        module="cli.diagnose",
        config="DiagnoseConfig",
        function="diagnose",
        purpose="say in plain words what a GRPO run's log means",
        is_text=True,
    ),
    "show": Command(
        module="cli.show",
        config="ShowConfig",
        function="show",
        purpose="what the model wrote in a step of GRPO, and what it earned",
        is_text=True,
    ),
    "plan": Command(
        module="cli.plan",
        config="PlanConfig",
        function="plan",
        purpose="predict whether a GRPO run fits a card, how long it takes, what it costs",
        is_text=True,
    ),
    "eval": Command(
        module="cli.eval",
        config="EvalConfig",
        function="run_eval",
        purpose="measure a model on held-out problems, with intervals",
    ),
    "grade": Command(
        module="cli.grade",
        config="GradeConfig",
        function="grade",
        purpose="say what reward a response earns, and why",
        is_text=True,
    ),
    "export": Command(
        module="cli.export",
        config="ExportConfig",
        function="export",
        purpose="write a model as a Hugging Face folder, with a model card",
    ),
    "card": Command(
        module="cli.card",
        config="CardConfig",
        function="write_card",
        purpose="write a model card: how a model was made, what was measured, what it cost",
    ),
    "chat": Command(
        module="cli.chat",
        config="ChatConfig",
        function="chat",
        purpose="type problems, or talk: see what the model thinks and answers",
        is_text=True,
    ),
}


def purposes(beginning: str = "") -> list[str]:
    """A line per command whose name begins like this."""
    commands = {name: c for name, c in COMMANDS.items() if name.startswith(beginning)}
    width = max((len(name) for name in commands), default=0)
    return [f"  {name:<{width}} {command.purpose}" for name, command in commands.items()]


def usage_of_half(first_word: str) -> str | None:
    """The text of `r1zero recipe --help`; None if no command of two words begins like this."""
    lines = purposes(f"{first_word} ")
    if not lines:
        return None
    usage = f"usage: r1zero {first_word} <name> [--flags]"
    help_ = f"r1zero {first_word} <name> --help lists the flags of one."
    return "\n".join([usage, "", *lines, "", help_])


def usage() -> str:
    """The text of `r1zero --help`."""
    return "\n".join(
        [
            "usage: r1zero <command> [--flags]",
            "",
            "commands:",
            *purposes(),
            "",
            "r1zero <command> --help lists the flags of a command;",
            "--traceback shows where an error came from, --version what is installed.",
            "Start with: r1zero demo",
        ]
    )


def versions() -> str:
    """The text of `r1zero --version`: what is installed, without importing it."""
    from ..versions import package_version

    parts = [f"{name} {package_version(name)}" for name in ("r1zero", "torch")]
    return f"{parts[0]} (Python {platform.python_version()}, {parts[1]})"


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """(the command, the words behind it). The name of a command may have two words."""
    two = " ".join(words[:2])
    if two in COMMANDS:
        return two, words[2:]
    return words[0], words[1:]


# ---- text for a terminal ----


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Printable text on one line, for a message."""
    return printable(" ".join(text.split()))


@contextmanager
def short_warnings(command: str):
    """Warnings on one line, like errors, without the line of code that they came from."""

    def show(message, category, filename, lineno, file=None, line=None):
        say(f"r1zero {command}: warning: {one_line(str(message))}")

    with warnings.catch_warnings():
        # A warning informs. Under PYTHONWARNINGS=error it would end the work.
        if any(option.startswith("error") for option in sys.warnoptions):
            warnings.simplefilter("default")
        warnings.showwarning = show  # the hook that the module documents for this
        yield


# ---- the command ----


def tell_of_lost_text(error: Exception) -> int:
    """Say that stdout cannot be written; returns the exit code."""
    # A reader who went away, as in `r1zero grade ... | head`, need not be told.
    if not isinstance(error, BrokenPipeError):
        why = getattr(error, "strerror", None) or error
        say(f"r1zero: the text cannot be written to standard output: {why}")
    return 1


def tell_of(error: BaseException, name: str, config) -> int:
    """Say what an error means; returns the exit code."""
    code, message = explain(error, config)
    if message is None:
        say("".join(traceback.format_exception(error)).rstrip())
        message = (
            "this is a fault of r1zero, not of yours; please report it with the lines above "
            "and the command that you gave"
        )
    say(f"r1zero {name}: {one_line(message) or type(error).__name__}")
    return code


def run(name: str, flags: list[str], show_traceback: bool, output: Output) -> int:
    """Parse the flags, call the command, and turn what it raises into an exit code."""
    command = COMMANDS[name]
    is_text, config, code = command.is_text, None, 0
    try:
        with short_warnings(name):
            module = import_module(f"..{command.module}", package=__package__)
            config = parse_flags(name, getattr(module, command.config), flags)
            getattr(module, command.function)(config)
    except SystemExit as stop:  # tyro's, after --help
        code, is_text = stop.code or 0, True
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback and not isinstance(error, Stopped):
            raise
        if error is not output.error:
            return tell_of(error, name, config)
        is_text = True
    lost = output.lost() if is_text else None
    return tell_of_lost_text(lost) if lost else code


def print_text(text: str, output: Output) -> int:
    """Print what was asked for; returns the exit code."""
    try:
        print(text)
    except (OSError, ValueError):
        pass  # `output` knows
    lost = output.lost()
    return tell_of_lost_text(lost) if lost else 0


def main(argv: list[str] | None = None) -> int:
    """The console script `r1zero`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    with ready_streams() as output, ends_like_ctrl_c():
        name, flags = command_of(argv or ["--help"])
        if name == "help" and flags:
            asked, _ = command_of(flags)
            if asked in COMMANDS or usage_of_half(asked):
                name, flags = asked, ["--help"]
        if name in ("-h", "--help", "help"):
            return print_text(usage(), output)
        if name in ("-V", "--version", "version"):
            return print_text(versions(), output)
        if name in COMMANDS:
            return run(name, flags, show_traceback, output)
        half = usage_of_half(name)
        if half and flags in (["-h"], ["--help"]):
            return print_text(half, output)
        if half:  # `r1zero recipe`, or one that there is not
            say(f"r1zero: there is no command {one_line(' '.join(argv[:2]))!r}; {half}")
            return 2
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        say(
            f"r1zero: there is no command {one_line(name)!r}{hint}; the commands are "
            f"{', '.join(COMMANDS)}, and r1zero --help says what they do"
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
