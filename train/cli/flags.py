"""The words of a command line, looked at before tyro makes a config of them.

tyro takes the last of two values without a word, and its messages are boxes of many lines. So every
word is looked up here first, in a table of flags that comes from the command's config:

    --data a --data b               a list that is given twice has the values of both
    --steps 1 --steps 2             any other value that is given twice is refused
    --resume --no-resume            a switch in both senses is refused
    --options high=1 high=2         a name=value of a list is refused if its name comes twice
    --steps many, --lr nan          what is no finite number, or too large for 64 bits, is refused
    --run ""                        an empty text is refused, but for what a model may have written

A refusal is a ValueError of one line. Left out: everything else, which is tyro's (--help, types,
defaults) or the config's own (ranges, and which flags go together).
"""

import difflib
import math
import os
import shutil
import sys
import traceback
import types
import typing
from collections import deque
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from .streams import Screen

TEXTS = ("--response", "--problem", "--answer")  # may be empty, as an answer of a model may be
NAMED = ("--options",)  # lists of name=value
INT_MIN, INT_END = -(2**63), 2**63
SEED_END = 2**64  # a seed is any integer of 64 bits, with or without a sign
WIDTHS = 40, 160  # columns of --help; in fewer than 9 tyro looks for a place to break for ever
NEGATIVE = ("-inf", "-infinity", "-nan")  # values, although they begin like a flag


# ---- the flags of a config ----


@dataclass(frozen=True)
class Flag:
    """One flag: a field of a config, or of a config within it."""

    name: str
    """As it is typed, with hyphens: --loss.kl-coef."""
    type: Any
    """Of its value, or of the values of a list: int, float, str or bool."""
    is_list: bool
    is_optional: bool
    """Whether it may be None."""
    is_required: bool
    path: tuple[str, ...]
    """The field that it sets: ("loss", "kl_coef")."""

    @property
    def is_switch(self) -> bool:
        return self.type is bool and not self.is_optional and not self.is_list

    @property
    def opposite(self) -> str:
        """The name that switches it off: --no-resume, --optim.no-x."""
        before, dot, last = self.name[2:].rpartition(".")
        return f"--{before}{dot}no-{last}"


def flags_of(config_class: type, prefix: str = "", path: tuple[str, ...] = ()) -> list[Flag]:
    """All flags of a config, those of the configs within it too."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    found = []
    for field in fields(config_class):
        hint, options = without_options(hints[field.name])
        name = options.get("name") or field.name.replace("_", "-")
        if options.get("prefix_name", True):
            name = prefix + name
        if is_dataclass(hint):
            found += flags_of(hint, f"{name}.", (*path, field.name))
            continue
        kind, is_optional = without_none(hint)
        is_list = typing.get_origin(kind) in (tuple, list)
        if is_list:
            kind = typing.get_args(kind)[0]
        is_required = field.default is field.default_factory is MISSING
        at = (*path, field.name)
        found.append(Flag(f"--{name}", kind, is_list, is_optional, is_required, at))
    return found


def without_options(hint: Any) -> tuple[Any, dict]:
    """(the type in Annotated[type, ...], what tyro.conf.arg says of it)."""
    options = {}
    for note in getattr(hint, "__metadata__", ()):
        for name in ("name", "prefix_name"):
            if getattr(note, name, None) is not None:
                options[name] = getattr(note, name)
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint, options


def without_none(hint: Any) -> tuple[Any, bool]:
    """(the type, whether it may be None instead)."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0], len(kinds) < len(typing.get_args(hint))


def names_of(flags: list[Flag]) -> dict[str, tuple[Flag, str]]:
    """By each name that can be typed: its flag, and that name."""
    names = {}
    for flag in flags:
        names[flag.name] = flag, flag.name
        if flag.is_switch:
            names[flag.opposite] = flag, flag.opposite
    return names


# ---- the words ----


@dataclass(frozen=True)
class Given:
    """A flag as it was typed, with its values; flag None for words that belong to none."""

    flag: Flag | None
    name: str
    values: list[str]
    words: list[str]


def hyphened(word: str) -> str:
    """The name in --name=value, with hyphens for underscores, as tyro reads it."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def looks_like_flag(word: str, names: dict) -> bool:
    """Whether tyro takes a word for a flag, and not for the value of the flag before it."""
    if word == "--" or hyphened(word) in names:
        return True
    bare = word.partition("=")[0].lstrip("-")
    return word.startswith("-") and bare[:1].isalpha() and word.lower() not in NEGATIVE


def split_words(words: list[str], names: dict) -> list[Given]:
    """Each flag with its values, in order."""
    left, given = deque(words), []
    while left:
        word = left.popleft()
        if hyphened(word) not in names:
            given.append(Given(None, word, [], [word]))
            continue
        flag, name = names[hyphened(word)]
        values, taken = [], [word]
        if "=" in word:
            values.append(word.partition("=")[2])
        limit = math.inf if flag.is_list else not flag.is_switch
        while left and len(values) < limit and not looks_like_flag(left[0], names):
            values.append(left[0])
            taken.append(left.popleft())
        given.append(Given(flag, name, values, taken))
    return given


def join_lists(given: list[Given], names: dict) -> list[str]:
    """The words for tyro: the values of a list stand where it was given first."""
    words = []
    for one in given:
        same = [other for other in given if other.flag is one.flag]
        if one.flag is None or not one.flag.is_list or len(same) == 1:
            words += one.words
        elif one is same[0]:
            words += list_words(one.name, [v for other in same for v in other.values], names)
    return words


def list_words(name: str, values: list[str], names: dict) -> list[str]:
    """The words of a list flag. Raises ValueError for a value that tyro would take for a flag."""
    for value in values[1:]:
        if looks_like_flag(value, names):
            raise ValueError(
                f"{name} got {value!r}, which looks like a flag; give it first, as {name}={value}"
            )
    if values and looks_like_flag(values[0], names):
        return [f"{name}={values[0]}", *values[1:]]
    return [name, *values]


# ---- what is refused ----


def check_words(given: list[Given], flags: list[Flag], names: dict) -> None:
    """Raise ValueError, on one line, for what was given twice, is missing or is no value."""
    first: dict[str, Given] = {}
    for one in given:
        if one.flag is None:
            raise ValueError(unknown(one.name, names))
        if not one.values and not one.flag.is_switch:
            raise ValueError(
                f"{one.name} needs a value behind it; one that begins with a hyphen is given as "
                f"{one.name}=-x"
            )
        if not one.flag.is_list:
            check_once(first.setdefault(one.flag.name, one), one)
        for value in one.values:
            check_value(one.flag, value)
    check_names(given)
    typed = {one.flag.name for one in given}
    missing = [flag.name for flag in flags if flag.is_required and flag.name not in typed]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given")


def unknown(word: str, names: dict) -> str:
    """What to say of a word that belongs to no flag."""
    if not word.startswith("-"):
        return f"there is no flag before {word!r}; a value follows its flag, as in --steps 10"
    close = difflib.get_close_matches(hyphened(word), names, n=1)
    # Some commands train a model (--base), others only read one (--run).
    other = {"--base": "--run", "--run": "--base"}.get(word.partition("=")[0])
    if other in names:
        close = [other]
    return f"there is no flag {word}" + (f"; did you mean {close[0]}?" if close else "")


def check_once(first: Given, second: Given) -> None:
    """first: the same flag, as it was given before, or `second` itself."""
    flag = second.flag
    if flag.is_switch:
        if second.values:
            raise ValueError(
                f"{second.name} takes no value, got {second.values[0]!r}; give {flag.name} or "
                f"{flag.opposite}"
            )
        if first.name != second.name:
            raise ValueError(f"{first.name} and {second.name} were both given; give one of them")
    elif first is not second:
        raise ValueError(
            f"{second.name} was given twice, as {first.values[0]!r} and as {second.values[0]!r}; "
            "give it once"
        )


def check_value(flag: Flag, text: str) -> None:
    if flag.is_optional and text == "None":
        if flag.name in TEXTS:
            raise ValueError(f"{flag.name} None would be no text; give that text in a file")
        return
    if flag.type is str and not text and flag.name not in TEXTS:
        raise ValueError(f"{flag.name} is empty; give it a value, or leave it out")
    if flag.type is int:
        check_whole(flag.name, text)
    if flag.type is float:
        check_number(flag.name, text)


def check_whole(name: str, text: str) -> None:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name} is {shortened(text)}, expected a whole number") from None
    is_seed = name.rpartition(".")[2].endswith("seed")
    if not INT_MIN <= value < (SEED_END if is_seed else INT_END):
        raise ValueError(f"{name} is {shortened(value)}, expected a number that fits in 64 bits")


def check_number(name: str, text: str) -> None:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {shortened(text)}, expected a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")


def shortened(value: str | int) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:30]}... ({len(text)} characters)"


def check_names(given: list[Given]) -> None:
    """Refuse a name that comes twice in a list of name=value."""
    seen: dict[tuple[str, str], str] = {}
    for one in given:
        for value in one.values if one.name in NAMED else ():
            name = value.partition("=")[0]
            key = one.name, name
            if key in seen:
                raise ValueError(
                    f"{one.name} has {name!r} twice, as {seen[key]} and as {value}; give it once"
                )
            seen[key] = value


# ---- tyro ----


@contextmanager
def readable_width():
    """A width in which tyro can set its text; the variable COLUMNS is how it is told."""
    former = os.environ.get("COLUMNS")
    least, most = WIDTHS
    os.environ["COLUMNS"] = str(min(most, max(least, shutil.get_terminal_size().columns)))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if former is not None:
            os.environ["COLUMNS"] = former


def refusal_behind(error: BaseException | None) -> ValueError | None:
    """The ValueError of a config's __post_init__ behind `error`, None if there is none."""
    while error is not None:
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and "__post_init__" in names:
            return error
        error = error.__context__
    return None


def unboxed(text: str) -> str:
    """The first paragraph of one of tyro's boxes."""
    lines = [line.strip("│| ") for line in text.splitlines()]
    kept = []
    for line in lines[1:]:
        if line[:3] in ("───", "---", "Got"):
            break
        kept.append(line)
    return " ".join(kept)


def is_for_tyro(word: str) -> bool:
    """Whether a word asks for something that tyro alone does: help, or a shell's completions."""
    return word in ("-h", "--help") or word.startswith("--tyro-")


def parse_flags(command: str, config_class: type, words: list[str]):
    """The command's config from its flags.

    Raises SystemExit as tyro does, with tyro's own text, for --help; ValueError, on one line, for
    flags that cannot be used and for values that the config refuses.
    """
    import tyro  # a quarter of a second, not needed for the list of commands

    flags = flags_of(config_class)
    names = names_of(flags)
    given = split_words(words, names)
    if not any(one.flag is None and is_for_tyro(one.name) for one in given):
        try:
            check_words(given, flags, names)
            words = join_lists(given, names)
        except ValueError as error:
            raise ValueError(f"{error} (see r1zero {command} --help)") from None
    # tyro frames a refused value over several lines, so its text is held back.
    out, error = Screen(sys.stdout), Screen(sys.stdout)
    try:
        with readable_width(), redirect_stdout(out), redirect_stderr(error):
            # A preset's options are the defaults of the flags that are not given.
            presets = getattr(config_class, "defaults_of", None)
            default = {"default": presets(words)} if presets else {}
            return tyro.cli(config_class, args=words, prog=f"r1zero {command}", **default)
    except SystemExit as stop:
        if refusal := refusal_behind(stop):
            raise refusal from None
        if stop.code:
            raise ValueError(unboxed(error.getvalue()) or "these flags cannot be used") from None
        sys.stdout.write(out.getvalue())
        raise
