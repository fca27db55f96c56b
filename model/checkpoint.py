"""Checkpoints: everything a run needs to go on bit for bit, in plain safetensors and JSON.

    <run>/checkpoints/step_00000100/model.safetensors       one file for each group of tensors
                                    optimizer.safetensors
                                    state.json              step, the caller's state, each file's size and CRC
    <run>/checkpoints/best.json                             which step scored highest so far

A checkpoint is written aside, flushed to the disk, and renamed into place. So at any moment (kill, power cut,
full disk) the newest folder named `step_…` is whole. What is torn in spite of that (a bad disk, a broken-off
copy) is found by its sizes and checksums when it is read; a warning names it, and the one before it is used.
optimizer_state.py makes named tensors of an optimizer's state.

Left out: pickles (they run code when read), saving in the background, sharded files, signatures (a CRC finds
damage, not malice). Only one process may write to a run folder.
"""

import json
import math
import os
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import ModelConfig
from .tokenizer import Tokenizer
from .transformer import Transformer

FORMAT, VERSION = "r1zero checkpoint", 1
FOLDER_NAME = re.compile(
    r"step_(\d{8,})(\.old)?"
)  # .old: the one being replaced, between two renames
ASIDE = ".tmp-"  # what begins with this is unfinished; the next save removes it


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message says which one, why, and how to mend it."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read: tensors by group and name, on the CPU; state as JSON gives it back."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict
    path: Path


# ---- files that appear whole or not at all ----


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file at `path`: a reader sees the former text or the new one, whatever happens in between.

    Raises OSError with the file's name (no space, no permission); the former text is then still there.
    """
    path = Path(path)
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def atomic_write_json(path: str | Path, value: object) -> None:
    """`atomic_write_text` of a JSON value, indented for people."""
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


# ---- tensors in one file ----


def _split_repeats(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors to store, {name: the earlier name that holds the very same tensor}), as with a tied head."""
    stored, same, first_name = {}, {}, {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place in first_name:
            same[name] = first_name[place]
        else:
            stored[name] = tensor
            first_name[place] = name
    return stored, same


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    ready, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:  # two views; the format has none
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    save_file(ready, path, metadata={"format": "pt"})  # the metadata that other libraries look for


def _read_tensors(path: Path, expected: dict) -> dict[str, torch.Tensor]:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path.name} has {size} bytes, expected {expected['bytes']}")
        if _crc32(path) != expected["crc32"]:
            raise CheckpointError(f"{path.name} does not match its checksum")
        # load_file maps the file, at any address; a clone is aligned as the tensor was before it was saved.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    return tensors | {name: tensors[first] for name, first in expected["same"].items()}


# ---- one checkpoint folder ----


def _write_folder(folder: Path, step: int, groups: dict, state: dict) -> None:
    """Write and flush all files of a checkpoint. groups: {name: what `_split_repeats` gave}."""
    folder.mkdir()
    files = {}
    for group, (tensors, same) in groups.items():
        path = folder / f"{group}.safetensors"
        _write_tensors(path, tensors)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path), "same": same}
    # There and back once, so that what is summed is what a reader will have: string keys, lists for tuples.
    content = json.loads(json.dumps({"step": step, "files": files, "state": state}))
    check = zlib.crc32(json.dumps(content).encode())
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "crc32": check, "content": content}, indent=1
    )
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")
    mode = (folder / "state.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)  # save_file leaves its files unreadable for anybody but the owner
        _flush(path)
    _flush(folder)


def _read_content(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("state.json is missing") from error
    except OSError as error:
        raise CheckpointError(f"state.json cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("state.json is not valid JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError("state.json was not written by r1zero")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"its format is version {document.get('version')}, this r1zero reads {VERSION}"
        )
    content = document.get("content")
    if zlib.crc32(json.dumps(content).encode()) != document.get("crc32"):
        raise CheckpointError("state.json does not match its checksum")
    return content


def _read_folder(folder: Path) -> Checkpoint:
    """Read and check one checkpoint. Raises CheckpointError with the bare reason; the caller completes it."""
    content = _read_content(folder / "state.json")
    tensors = {
        name.removesuffix(".safetensors"): _read_tensors(folder / name, expected)
        for name, expected in content["files"].items()
    }
    return Checkpoint(content["step"], tensors, content["state"], folder)


# ---- the folder of all checkpoints of a run ----


def _folders(root: Path) -> dict[int, list[Path]]:
    """{step: its folders}, newest step first. A folder that is being replaced (.old) is its step's second."""
    found: dict[int, list[Path]] = {}
    for path in sorted(root.iterdir(), key=lambda path: path.name):  # "step_1" < "step_1.old"
        if match := FOLDER_NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items(), reverse=True))


def _discard(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a half-removed one never looks like a torn one."""
    doomed = path.with_name(f"{ASIDE}{path.name}-discarded")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _tidy(root: Path) -> None:
    """Undo what an interrupted save left: unfinished files go, a checkpoint that was moved aside returns."""
    try:
        for path in root.glob("step_*.old"):
            if path.with_suffix("").exists():
                _discard(path)
            else:
                path.rename(path.with_suffix(""))
        for path in root.glob(f"{ASIDE}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError:
        pass  # the next save tries again; if what is left is in its way, that save tells


def _put_in_place(aside: Path, final: Path) -> None:
    former = final.with_name(f"{final.name}.old")
    if final.exists():
        final.rename(
            former
        )  # no call replaces a whole folder; until the next rename readers take .old
    aside.rename(final)
    _flush(final.parent)
    if former.exists():
        _discard(former)


def _read_best(root: Path) -> dict | None:
    """{"step", "score"} of the best checkpoint, or None where there is no mark or not a legible one."""
    try:
        best = json.loads((root / "best.json").read_text(encoding="utf-8"))
        return {"step": int(best["step"]), "score": float(best["score"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def mark_best(run: str | Path, step: int, score: float) -> None:
    """Do what `save_checkpoint` does with a score, for a run that was killed before it came to that."""
    _mark_best(Path(run) / "checkpoints", step, score)


def _mark_best(root: Path, step: int, score: float) -> None:
    best = _read_best(root)
    stale = best is None or best["step"] == step or best["step"] not in _folders(root)
    if not math.isnan(score) and (stale or score > best["score"]):
        atomic_write_json(root / "best.json", {"step": step, "score": score})


def _prune(root: Path, step: int, keep_last: int) -> None:
    """Keep the best and the last `keep_last` up to `step`. Later ones (the run was resumed from before them)
    are left alone: if they counted, the very checkpoint just saved could be the one to go."""
    best = _read_best(root)
    folders = {s: paths for s, paths in _folders(root).items() if s <= step}
    for old in list(folders)[keep_last:]:
        if best is None or old != best["step"]:
            for path in folders[old]:
                _discard(path)


# ---- the whole ----


def save_checkpoint(
    run: str | Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict,
    *,
    keep_last: int = 2,
    score: float | None = None,
) -> Path:
    """Save a checkpoint of `step` in the run folder, remove those that are too old, and return its path.

    tensors: groups of named tensors of any device and dtype; each group becomes a file. A tensor with several
        names in a group (tied weights) is stored once and comes back as one tensor.
    state: JSON: configs, tokenizer, optimizer scalars, data position, random streams. It comes back as JSON
        gives it: lists for tuples, strings for keys.
    keep_last: how many of the newest stay; the best one stays besides.
    score: higher is better; the first that is highest marks its checkpoint as the best. NaN is never best.
    Raises CheckpointError if it cannot be written (disk full, no permission); earlier ones are then intact.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last is {keep_last}, expected 1 or more: what is not kept cannot be resumed"
        )
    assert step >= 0, step
    assert all(group.isidentifier() for group in tensors), (
        f"groups become file names: {list(tensors)}"
    )
    groups = {group: _split_repeats(named) for group, named in tensors.items()}
    root = Path(run) / "checkpoints"
    final = root / f"step_{step:08d}"
    aside = root / f"{ASIDE}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        _write_folder(aside, step, groups, state)
        _put_in_place(aside, final)
        if score is not None:
            _mark_best(root, step, score)
        _prune(root, step, keep_last)
    except (
        BaseException
    ) as error:  # also Ctrl-C, or a state that is no JSON: leave nothing half-done
        _tidy(root)
        if isinstance(error, (OSError, SafetensorError)):
            needed = sum(
                tensor.nbytes for stored, _ in groups.values() for tensor in stored.values()
            )
            raise CheckpointError(_cannot_save(root, step, needed, error)) from error
        raise
    return final


def _cannot_save(root: Path, step: int, needed: int, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    try:
        free = f"{shutil.disk_usage(root).free / 1e6:,.1f} MB are free"
    except OSError:
        free = "the folder cannot be read"
    steps = checkpoint_steps(root.parent)
    former = (
        f"The checkpoint of step {steps[-1]} is intact"
        if steps
        else "There is no earlier checkpoint"
    )
    return (
        f"cannot save the checkpoint of step {step} in {root}: {reason}. It needs "
        f"{needed / 1e6:,.1f} MB, {free}. {former}; make room, or the folder writable, and resume"
    )


def checkpoint_steps(run: str | Path) -> list[int]:
    """The steps that have a checkpoint in the run folder, oldest first, unchecked; empty if none."""
    try:
        return sorted(_folders(Path(run) / "checkpoints"))
    except OSError:
        return []


def _choose(folder: Path, which: str | int) -> list[Path]:
    """The checkpoints to try, in order. Raises CheckpointError where there is nothing to try."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {found}; expected the folder of a run, which holds checkpoints/"
        )
    if (folder / "state.json").exists() or FOLDER_NAME.fullmatch(folder.name):
        return [folder]
    root = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if not root.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        holds = ", ".join(names[:5] + ["…"] * (len(names) > 5)) or "nothing"
        raise CheckpointError(
            f"{folder} is not the folder of a run: it holds {holds}, and no checkpoints/. "
            "Give the folder that training wrote to"
        )
    folders = _folders(root)
    if not folders:
        raise CheckpointError(
            f"{root} holds no checkpoint yet; start the run afresh or give another folder"
        )
    steps = list(folders)
    if which == "best":
        best = _read_best(root)
        if best is None and not (root / "best.json").exists():
            raise CheckpointError(
                f"{root} marks no checkpoint as the best; ask for the last, or for one of "
                f"the steps {steps[::-1]}"
            )
        if best is None or best["step"] not in folders:
            warnings.warn(
                f"{root / 'best.json'} names no checkpoint; using the last one", stacklevel=3
            )
        else:
            steps = sorted(
                steps, key=lambda step: step != best["step"]
            )  # stable: the best, then the newest
    elif which != "last":
        if which not in folders:
            raise CheckpointError(
                f"{root} has no checkpoint {which!r}; expected 'last', 'best' or one of "
                f"the steps {steps[::-1]}"
            )
        steps = [which]
    return [path for step in steps for path in folders[step]]


def load_checkpoint(folder: str | Path, which: str | int = "last") -> Checkpoint:
    """Read a checkpoint from a run folder, its checkpoints/ folder, or the folder of one checkpoint.

    which: "last", "best" or a step. If the last or the best is torn or foreign, a warning says so and the
        newest sound one is used; a step or folder that was named is never replaced by another.
    Raises CheckpointError if there is none to use.
    """
    folder = Path(folder)
    try:
        paths = _choose(folder, which)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {folder}: {error.strerror}; give one you may read"
        ) from error
    reasons = []
    for path in paths:
        try:
            checkpoint = _read_folder(path)
        except CheckpointError as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if reasons:
            warnings.warn(
                f"using {path} in place of what cannot be used: {'; '.join(reasons)}", stacklevel=2
            )
        return checkpoint
    raise CheckpointError(
        f"no usable checkpoint in {folder} ({'; '.join(reasons)}). Restore it from a copy, "
        "name another step, or start the run afresh in another folder"
    )


def check_config(found: dict, expected: dict, where: str | Path) -> None:
    """Raise CheckpointError, naming each field that differs, if a checkpoint's config is not as expected.

    Tuples and lists count as equal. where: the checkpoint's path, for the message.
    """
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    differ = []
    for key in sorted(found.keys() | expected.keys()):
        there, here = found.get(key, "missing"), expected.get(key, "missing")
        if there != here:
            differ.append(f"{key} is {there} there and {here} here")
    if differ:
        raise CheckpointError(
            f"{where} was made with another config: {'; '.join(differ)}. Use the settings "
            "that it was made with, or another run folder"
        )


def build_model(
    config: dict, weights: dict[str, torch.Tensor], device: torch.device
) -> Transformer:
    """A model of a checkpoint's config and weights, in bf16 compute on a GPU and fp32 on a CPU."""
    model = Transformer(
        ModelConfig(**config), torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    model.load_state_dict(weights)
    return model.to(device)


def load_model(
    folder: str, device: torch.device, which="last"
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The model and tokenizer of a run's checkpoint. Raises CheckpointError if there is none to use."""
    checkpoint = load_checkpoint(folder, which)
    if (
        not {"model_config", "tokenizer"} <= checkpoint.state.keys()
        or "model" not in checkpoint.tensors
    ):
        raise ValueError(
            f"{checkpoint.path} holds no model; give a folder that pretrain, sft, grpo or demo "
            "wrote"
        )
    model = build_model(checkpoint.state["model_config"], checkpoint.tensors["model"], device)
    return model, Tokenizer.from_dict(checkpoint.state["tokenizer"]), checkpoint
