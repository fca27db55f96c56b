"""What a run depends on, known by its content: the base, the data, the problems of a task.

The spelling of a path says nothing about what lies there. A slash at its end, a link or a moved
folder change no input; another model under the same name does. So a checkpoint keeps fingerprints
of its inputs, and a run that is resumed compares them.

An input is a list of parts, each with a name and a fingerprint: [["weights", "3f0c..."], ...] for a
base, [["a.jsonl", "91d2..."], ...] for data. Parts are compared in their order. A name is only for
messages: a file that was renamed is the same file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..eval.tasks.hub import is_on_hub
from ..model.checkpoint import Checkpoint
from ..model.tokenizer import Tokenizer
from ..rl.plugin import source_of

MOST_NAMED = 5  # parts that a message names

Parts = list[list[str]]
Inputs = dict[str, Parts]


def digest(chunks: Iterable[bytes]) -> str:
    """32 hex digits of all the bytes."""
    hasher = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()


def base_parts(base: Checkpoint, tokenizer: Tokenizer) -> Parts:
    """A base model as an input: its weights, its shape and its tokenizer."""
    shape = json.dumps(base.state["model_config"], sort_keys=True)
    return [
        ["weights", base.weights_fingerprint],
        ["shape", digest([shape.encode()])],
        ["tokenizer", tokenizer.fingerprint()],
    ]


def file_parts(paths: Iterable[Path]) -> Parts:
    """Files as an input. Raises ValueError for one that cannot be read.

    Of a data set on the hub, only the name is known before it is loaded.
    """
    parts = []
    for path in paths:
        if is_on_hub(str(path)):
            parts.append([str(path), digest([str(path).encode()])])
            continue
        try:
            parts.append([str(path), digest([Path(path).read_bytes()])])
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from None
    return parts


def task_parts(task) -> Inputs:
    """The files of problems and the code of a task, where it has any. task: the flags
    (task_flags.py)."""
    found: Inputs = {}
    if files := getattr(task, "files", None):
        found["problems"] = file_parts([Path(file) for file in files])
    if source := getattr(task, "source", None):
        found["task"] = file_parts([source])
    return found


def plugin_parts(spec: str | None) -> Inputs:
    """The code of a reward of the user's own, if there is one. One of this package counts no more
    than the code of its tasks."""
    ours = __package__.partition(".")[0]
    source = None
    if spec is not None and not spec.startswith(f"{ours}."):
        source = source_of(spec)
    return {"plugin": file_parts([source])} if source else {}


def changes_of(found: Inputs, expected: Inputs) -> str:
    """What changed between the inputs of a checkpoint and those of now, in words; "" if nothing.

    An input that the checkpoint does not know (it is of an older version) is not compared.
    """
    changes = [
        f"{name} ({difference})"
        for name, parts in expected.items()
        if name in found and (difference := difference_of(found[name], parts))
    ]
    return ", ".join(changes)


def difference_of(found: Parts, expected: Parts) -> str:
    """What differs between two contents of an input, in words; empty if nothing does."""
    then, now = [value for _, value in found], [value for _, value in expected]
    if then == now:
        return ""
    gone = names_without(found, now)
    new = names_without(expected, then)
    changed = [name for name in gone if name in new]
    words = [
        listed("changed", changed),
        listed("gone", [name for name in gone if name not in changed]),
        listed("new", [name for name in new if name not in changed]),
    ]
    return ", ".join(filter(None, words)) or "the same files in another order"


def names_without(parts: Parts, values: list[str]) -> list[str]:
    """The names of the parts whose fingerprint is not among the values; each value serves once."""
    left = Counter(values)
    names = []
    for name, value in parts:
        if left[value]:
            left[value] -= 1
        else:
            names.append(name)
    return names


def listed(what: str, names: list[str]) -> str:
    """ "changed: a, b"; empty without names."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{what}: {', '.join(names[:MOST_NAMED])}{more}" if names else ""
