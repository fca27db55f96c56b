"""Which flags must be the same when a run is resumed.

All of them, but for those that only say where, how long or on what a run computes (the fields of
RunConfig, and a config's `FREE`) and those that name a file or folder (a config's `PATHS`), whose
content is compared instead (inputs.py). A config's `RENAMED` has the flags that were switches once:
which of today's values False and True stood for.
"""

import json
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from ..model.checkpoint import check_config
from .cli.flags import flags_of


def settings_of(config, free: set[str]) -> dict:
    """The flags that must not change, as JSON types: what a checkpoint keeps.

    free: names of flags that may change, besides the config's own `FREE`.
    """
    free = free | set(getattr(config, "FREE", ()))
    kept = {name: value for name, value in asdict(config).items() if name not in free}
    return as_json(kept)


def as_json(value) -> dict:
    return json.loads(json.dumps(value))


def defaults_of(config) -> dict:
    """The flags that have a default, at it, as JSON types; those of parts too."""
    defaults = {}
    for field in fields(config):
        value = field.default
        if field.default_factory is not MISSING:
            value = field.default_factory()
        if value is not MISSING:
            defaults[field.name] = asdict(value) if is_dataclass(value) else value
    return as_json(defaults)


def check_settings(then: dict, now: dict, config, where: Path) -> None:
    """Raise CheckpointError, naming each difference, unless two `settings_of` say the same.

    then: of the run that wrote the checkpoint at `where`; now: of this run, whose config is
    `config`. A flag that did not exist then counts as its default.
    """
    then = dict(then)
    for name, renamed in getattr(config, "RENAMED", {}).items():
        if isinstance(then.get(name), bool):
            then[name] = renamed[then[name]]
    then = with_defaults(then, now, config)
    paths = paths_of(config)
    names = {flag.path: flag.name for flag in flags_of(type(config))}
    check_config(as_flags(without(then, paths), names), as_flags(without(now, paths), names), where)


def with_defaults(then: dict, now: dict, config) -> dict:
    """`then`, with each flag that is in `now` and did not exist then at its default."""
    filled = dict(then)
    for name, default in defaults_of(config).items():
        if name not in now:
            continue
        filled.setdefault(name, default)
        if isinstance(now[name], dict) and isinstance(filled[name], dict):
            known = {inner: value for inner, value in default.items() if inner in now[name]}
            filled[name] = known | filled[name]
    return filled


def paths_of(config) -> tuple[str, ...]:
    """The flags that name a file: `PATHS`, and the option that names a task's second file."""
    paths = getattr(config, "PATHS", ())
    task = getattr(config, "task", None)
    return (*paths, "task.options.test") if getattr(task, "has_second", False) else paths


def as_flags(settings: dict, names: dict[tuple[str, ...], str], path: tuple[str, ...] = ()) -> dict:
    """The settings under the names of their flags: {"--optim.lr": 0.01, ...}."""
    found = {}
    for name, value in settings.items():
        at = (*path, name)
        if isinstance(value, dict):
            found |= as_flags(value, names, at)
        else:
            found[names.get(at, ".".join(at))] = value
    return found


def without(settings: dict, paths: tuple[str, ...]) -> dict:
    """The settings without some flags; "task.data" is one of a part, and "task.options.test" the
    words test=VALUE of a flag with several."""
    kept = dict(settings)
    for path in paths:
        name, _, inner = path.partition(".")
        if not inner:
            kept.pop(name, None)
        elif isinstance(kept.get(name), dict):
            kept[name] = without(kept[name], (inner,))
        elif isinstance(kept.get(name), list):
            kept[name] = [word for word in kept[name] if not word.startswith(f"{inner}=")]
    return kept
