"""Code of the user's own, named on the command line: my_module:MyTask.

    find_named("my_module:MyTask", "--task")

The module may be a file in the current folder, or any module that Python can import. The folder is
added behind the other places that Python looks in, so that a file of the user's never takes the
place of a package, and it stays there: what is pickled is found again in a process that is spawned.

Left out: paths to files, and names within classes. Code that is named here runs with all rights of
the user, like any script.
"""

import importlib
import os
import re
import sys
import traceback
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAMED = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


def is_named(text: str) -> bool:
    """Whether a value names code of the user's own; names of ours have no colon."""
    return ":" in text


def find_named(text: str, flag: str) -> Any:
    """What `module:name` names. flag: who asks, for the errors.

    Raises ValueError, on one line, for another form, a module that is missing or raises when it is
    imported, and a name that it does not have.
    """
    match = NAMED.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{flag} is {text!r}, expected module:name, such as my_module:MyThing for MyThing in "
            "my_module.py"
        )
    module = _import(match[1], f"{flag} {text}")
    if not hasattr(module, match[2]):
        names = [name for name in vars(module) if not name.startswith("_")]
        where = getattr(module, "__file__", None) or match[1]
        raise ValueError(
            f"{flag} {text}: {where} has no {match[2]}; it has {', '.join(names[:10]) or 'nothing'}"
        )
    return getattr(module, match[2])


def _import(name: str, what: str) -> ModuleType:
    """The module of that name. what: the flag with its value, for the errors."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    _check_name_is_free(name.partition(".")[0], folder, what)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise ValueError(
                f"{what}: there is no module {missing}, neither in this folder ({folder}) nor "
                "among the installed packages"
            ) from None
        raise ValueError(f"{what}: {name} {told(error, name)}") from error
    except (Exception, SystemExit) as error:  # whatever the code of a user may raise
        raise ValueError(f"{what}: {name} {told(error, name)}") from error


def _check_name_is_free(name: str, folder: str, what: str) -> None:
    """ValueError if the folder has a module of this name, and another one would be imported."""
    here = PathFinder.find_spec(name, [folder])
    if here is None or here.origin is None:
        return
    first = find_spec(name)
    if first is not None and first.origin != here.origin:
        raise ValueError(
            f"{what}: Python knows another module {name} ({first.origin}); rename {here.origin}"
        )


def told(error: BaseException, module: str) -> str:
    """What a module raised, and where: "raised KeyError: 'x' (my_module.py, line 3)"."""
    kind = type(error).__name__
    text = " ".join(str(error).split())[:200]
    lines = lines_in(error, module)
    where = f" ({lines[-1]})" if lines else ""
    return f"raised {kind}{': ' if text else ''}{text}{where}"


def lines_in(error: BaseException, module: str) -> list[str]:
    """The lines of a module that an error came through: "my_module.py, line 3"."""
    return [
        f"{os.path.basename(frame.f_code.co_filename)}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == module
    ]
