"""A function or class of the user's own, named on the command line as my_module:name.

The module is imported from wherever Python finds it, the current folder included. The folder comes
last, so that a file called random.py there shadows nothing, and it stays among the places to look:
what is pickled is found again in a process that is spawned.

Errors are for the author of the module: one line that says what is missing, or what was raised and
where. Left out: paths of files (my_module is a name that can be imported).
"""

import os
import sys
import traceback
from importlib import import_module, invalidate_caches
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDERS: set[str] = set()  # the current folders that were put among the places to look


def is_named(text: str) -> bool:
    """Whether a value names something of the user's own; names of ours have no colon."""
    return ":" in text


def load_named(spec: str, flag: str) -> Any:
    """What `my_module:name` names. flag: the flag that it was given by, for messages.

    Raises ValueError for anything else, for a module that cannot be imported, and for a name that
    it does not have.
    """
    module_name, _, name = spec.partition(":")
    words = [*module_name.split("."), name]
    if not all(word.isidentifier() for word in words):
        raise ValueError(f"{flag} is {spec!r}, expected module:name, as in my_module:{name or 'x'}")
    module = import_own(module_name, flag)
    if not hasattr(module, name):
        known = [each for each in vars(module) if not each.startswith("_")]
        where = getattr(module, "__file__", None) or module_name
        raise ValueError(f"{flag}: {where} has no {name!r}; it has {', '.join(known) or 'nothing'}")
    return getattr(module, name)


def import_own(module_name: str, flag: str) -> ModuleType:
    """Import a module of the user's. Raises ValueError as `load_named` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
        FOLDERS.add(here)
    invalidate_caches()  # the file may be younger than what Python remembers of the folder
    forget_former(module_name.partition(".")[0], here)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{flag}: there is no module {error.name}, neither installed nor in {here}"
            ) from error
        raise ValueError(f"{flag}: {module_name} needs another module: {error}") from error
    except (Exception, SystemExit) as error:  # whatever its author wrote
        raise ValueError(f"{flag}: importing {module_name} {raised(error)}") from error


def forget_former(name: str, folder: str) -> None:
    """Forget a module of a former current folder if this one has a module of that name too.

    A notebook that moves from folder to folder does that.
    """
    own = PathFinder.find_spec(name, [folder])
    first = find_spec(name) if own is not None else None
    if first is None or first.origin in (None, own.origin):
        return
    former = FOLDERS & {str(parent) for parent in Path(first.origin).parents} - {folder}
    if not former:
        return
    sys.path[:] = [place for place in sys.path if place not in former]
    for loaded in list(sys.modules):
        if loaded == name or loaded.startswith(f"{name}."):
            del sys.modules[loaded]


def passed_through(error: BaseException, module_name: str) -> bool:
    """Whether an error came through the lines of a module."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == module_name for frame, _ in frames)


def raised(error: BaseException) -> str:
    """`raised KeyError: 'x' (my_module.py, line 3)`"""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"raised {type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) or not frames:  # which says itself where
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
