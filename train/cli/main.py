"""The command line: `r1zero <command> [--flags]`.

`python -m r1zero.train.cli.main <command> [--flags]` is the same, for where the script is not on
the path.

A command is a frozen dataclass, whose fields are its flags (tyro reads them), and a function that
takes it. Its module is imported when the command is called, so that `r1zero --help` and `r1zero
grade` do not wait for torch. To add a command, add a line to COMMANDS.

    exit code   what happened
    0           done, or stopped by Ctrl-C after saving
    1           the computation failed (NaN, out of memory), or a fault of r1zero itself
    2           flags, files or data that the user can mend; one line says how
    130         broken off by Ctrl-C

`--traceback`, anywhere, shows where an error came from instead. Left out: shell completion beyond
tyro's own, config files (a shell script with flags is one), an alias for every flag.
"""

import difflib
import io
import os
import sys
import traceback
import warnings
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    module: str
    """Where it is, under r1zero.train."""
    config: str
    """The dataclass in that module whose fields are the flags."""
    function: str
    """The function in that module that does the work; it takes the config."""
    purpose: str
    """What it does, for the list of commands."""


COMMANDS = {
    "demo": Command(
        module="recipes.demo",
        config="DemoConfig",
        function="demo",
        purpose="R1-Zero from nothing: a base model, GRPO, control, report",
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
        purpose="fine-tune a model on prompt/response pairs",
    ),
    "grpo": Command(
        module="grpo",
        config="GRPOConfig",
        function="grpo",
        purpose="R1-Zero: GRPO straight on a base model, with rule rewards",
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
    ),
    "chat": Command(
        module="cli.chat",
        config="ChatConfig",
        function="chat",
        purpose="type problems, see what the model thinks and answers",
    ),
}

# The flags that decide how much memory a command takes, as far as it has them.
MEMORY_FLAGS = (
    "micro_tokens",
    "batch",
    "samples",
    "prompts_per_step",
    "group_size",
    "max_new_tokens",
    "seq_len",
    "model",
)


def usage() -> str:
    """The text of `r1zero --help`."""
    lines = [f"  {name:<10} {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: r1zero <command> [--flags]",
            "",
            "commands:",
            *lines,
            "",
            "r1zero <command> --help lists the flags of a command;",
            "--traceback shows where an error came from. Start with: r1zero demo",
        ]
    )


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
        print(f"r1zero {command}: warning: {one_line(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # the hook that the module documents for this
        yield


# ---- flags ----


def refusal_behind(error: BaseException | None) -> ValueError | None:
    """The ValueError of a config's __post_init__ behind `error`, None if there is none."""
    while error is not None:
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and "__post_init__" in names:
            return error
        error = error.__context__
    return None


def parse_flags(command: str, config_class: type, flags: list[str]):
    """The command's config from its flags.

    Raises SystemExit as tyro does, with tyro's own text, for --help and unknown flags; ValueError
    for a value that the config refuses.
    """
    import tyro  # a quarter of a second, not needed for the list of commands

    # tyro frames a refused value over several lines; its text is held back, to print one line
    # instead.
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            # A preset's options are the defaults of the flags that are not given.
            presets = getattr(config_class, "defaults_of", None)
            default = {"default": presets(flags)} if presets else {}
            return tyro.cli(config_class, args=flags, prog=f"r1zero {command}", **default)
    except SystemExit as stop:
        if refusal := refusal_behind(stop):
            raise refusal from None
        sys.stderr.write(text.getvalue())
        raise


# ---- errors ----


def is_out_of_memory(error: BaseException) -> bool:
    """Python's and NumPy's MemoryError, and what torch raises on a GPU and on a CPU."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def is_non_finite(error: BaseException) -> bool:
    """A NaN or infinity that stopped the computation."""
    if isinstance(error, RuntimeError):
        # Imports torch, which a RuntimeError mostly comes from.
        from ...model.engine.sampling import NonFiniteError

        return isinstance(error, NonFiniteError)
    return isinstance(error, FloatingPointError)


def explain(error: BaseException, config) -> tuple[int, str | None]:
    """(exit code, what to tell the user); None for a fault of r1zero."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "broken off"
    if is_out_of_memory(error):
        flags = [f"--{name.replace('_', '-')}" for name in MEMORY_FLAGS if hasattr(config, name)]
        advice = (
            f"lower {', '.join(flags)}" if flags else "close other programs, or give it less data"
        )
        return 1, f"out of memory; {advice} ({str(error)[:200] or type(error).__name__})"
    if is_non_finite(error):
        return 1, str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"{where}{error.strerror or error}"
    if isinstance(error, ValueError):  # a CheckpointError is one
        return 2, str(error)
    return 1, None


# ---- the command ----


def run(name: str, flags: list[str], show_traceback: bool) -> int:
    """Parse the flags, call the command, and turn what it raises into an exit code."""
    command = COMMANDS[name]
    config = None
    try:
        with short_warnings(name):
            module = import_module(f"..{command.module}", package=__package__)
            config = parse_flags(name, getattr(module, command.config), flags)
            getattr(module, command.function)(config)
            sys.stdout.flush()  # so that a reader who went away is noticed here
        return 0
    except SystemExit as stop:  # tyro's
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # Whoever read our output has gone, as in `r1zero grade ... | head`. Python would complain
        # as it ends, if stdout still led there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if show_traceback:
            raise
        code, message = explain(error, config)
        if message is None:
            traceback.print_exception(error)
            message = (
                "this is a fault of r1zero, not of yours; please report it with the lines above "
                "and the command that you gave"
            )
        print(f"r1zero {name}: {one_line(message) or type(error).__name__}", file=sys.stderr)
        return code


def main(argv: list[str] | None = None) -> int:
    """The console script `r1zero`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    # A model can write characters that a terminal lacks, and a pipe can bring bytes that are no
    # text.
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *flags = argv
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(
            f"r1zero: there is no command {one_line(name)!r}{hint}; the commands are "
            f"{', '.join(COMMANDS)}, and r1zero --help says what they do",
            file=sys.stderr,
        )
        return 2
    return run(name, flags, show_traceback)


if __name__ == "__main__":
    sys.exit(main())
