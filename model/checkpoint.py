"""Checkpoints: everything that a run needs to continue bit for bit, in plain safetensors and JSON.

    <run>/checkpoints/step_00000100/model.safetensors       one file per group of tensors
                                    optimizer.safetensors
                                    state.json              step, state, size and CRC of each file
    <run>/checkpoints/best.json                             which step has the highest score so far

A checkpoint is written under another name, flushed to the disk, and renamed. So at any moment
(kill, power cut, full disk) the newest folder named `step_...` is whole. A bad disk or an
interrupted copy can still damage one; its sizes and checksums show it when it is read. Then a
warning names it, and the checkpoint before it is used.

Left out: pickles (they run code when read), saving in the background, sharded files, signatures (a
CRC finds damage, not malice). Only one process may write to a run folder.
"""

import hashlib
import json
import math
import re
import shutil
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import ModelConfig
from .files import UNFINISHED, atomic_write_json, flush
from .huggingface import is_huggingface, read_model
from .lora import LoRAConfig, adapter_tensors, adapters_of, add_adapters, merge_adapters
from .peft_folder import BASE, adapters_in, base_in, folder_of_base, is_peft, merge_folder
from .peft_folder import CONFIG as PEFT_CONFIG
from .precision import Precision, choose_precision
from .tokenizer import Tokenizer
from .transformer import Transformer

FORMAT = "r1zero checkpoint"
VERSION = 2  # raise it when the names or the meaning of what is saved change
# .old: the checkpoint that is being replaced, between two renames
FOLDER_NAME = re.compile(r"step_(\d{8,})(\.old)?")
# A model of the Hugging Face hub: its owner and its name
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KEPT_BASE = "base"  # in the folder of a run with adapters: what they are for
LISTINGS = 5  # how often a folder is looked at again, if what was in it is gone meanwhile


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message says which, why, and how to mend it."""


class VersionError(CheckpointError):
    """A checkpoint has another format than this r1zero reads."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """By group and name; on the CPU, unless `load_model` read a Hugging Face folder."""
    state: dict
    """As JSON returns it: lists for tuples, strings for keys."""
    path: Path
    fingerprint: str = ""
    """Of weights that adapters were added to: of the two apart, since their sum rounds differently
    from machine to machine."""

    @property
    def weights_fingerprint(self) -> str:
        """What tells the weights from others."""
        return self.fingerprint or weights_digest(self.tensors["model"])


# ---- tensors in one file ----


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _split_repeats(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors to store, {name: earlier name of the very same tensor}), as with tied weights."""
    stored, same, first_name = {}, {}, {}
    for name, tensor in tensors.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if memory in first_name:
            same[name] = first_name[memory]
        else:
            stored[name] = tensor
            first_name[memory] = name
    return stored, same


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    ready, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format has no views: of two tensors in one storage the second becomes a copy.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    # Other libraries look for this metadata.
    save_file(ready, path, metadata={"format": "pt"})


def _read_tensors(path: Path, expected: dict) -> dict[str, torch.Tensor]:
    """The tensors of a file, if its size and checksum are the expected ones."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path.name} has {size} bytes, expected {expected['bytes']}")
        if _crc32(path) != expected["crc32"]:
            raise CheckpointError(f"{path.name} does not match its checksum")
        # load_file maps the file at any address; a clone is aligned as a fresh tensor is.
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    return tensors | {name: tensors[first] for name, first in expected["same"].items()}


# ---- one checkpoint folder ----


def _write_folder(folder: Path, step: int, groups: dict, state: dict) -> None:
    """Write and flush all files of a checkpoint. groups: {name: the result of `_split_repeats`}."""
    # 1. One file of tensors per group.
    folder.mkdir()
    files = {}
    for group, (tensors, same) in groups.items():
        path = folder / f"{group}.safetensors"
        _write_tensors(path, tensors)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path), "same": same}

    # 2. The state, and a checksum to find damage by. The content goes to JSON and back first, since
    #    the reader computes the checksum of what it reads: string keys, lists for tuples.
    content = json.loads(json.dumps({"step": step, "files": files, "state": state}))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "crc32": zlib.crc32(json.dumps(content).encode()),
        "content": content,
    }
    text = json.dumps(document, indent=1) + "\n"
    (folder / "state.json").write_text(text, encoding="utf-8")

    # 3. Readable as the umask says (save_file lets only the owner read), and flushed to the disk.
    mode = (folder / "state.json").stat().st_mode & 0o777
    for path in folder.iterdir():
        with suppress(OSError):  # some mounts know no modes: then all files have the same
            path.chmod(mode)
        flush(path)
    flush(folder)


def _read_content(path: Path) -> dict:
    """The step, the files and the state in state.json, if it is whole and of this version."""
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
    version = document.get("version")
    if version != VERSION:
        mend = "train the run again with this one" if version == 1 else "use the one that wrote it"
        raise VersionError(f"its format is version {version}, this r1zero reads {VERSION}; {mend}")
    content = document.get("content")
    if zlib.crc32(json.dumps(content).encode()) != document.get("crc32"):
        raise CheckpointError("state.json does not match its checksum")
    return content


def _read_folder(folder: Path, groups: tuple[str, ...] | None) -> Checkpoint:
    """Read and check one checkpoint. Raises CheckpointError with the bare reason."""
    content = _read_content(folder / "state.json")
    tensors = {}
    for name, expected in content["files"].items():
        group = name.removesuffix(".safetensors")
        if groups is None or group in groups:
            tensors[group] = _read_tensors(folder / name, expected)
    return Checkpoint(content["step"], tensors, content["state"], folder)


# ---- the folder of all checkpoints of a run ----


def _folders(root: Path) -> dict[int, list[Path]]:
    """{step: its folders}, newest step first. A step's .old folder comes second."""
    found: dict[int, list[Path]] = {}
    for path in sorted(root.iterdir(), key=lambda path: path.name):  # "step_1" < "step_1.old"
        if match := FOLDER_NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items(), reverse=True))


def _discard(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so a half-removed one never looks damaged."""
    doomed = path.with_name(f"{UNFINISHED}{path.name}-discarded")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _tidy(root: Path) -> None:
    """Undo an interrupted save: remove unfinished files, rename an .old checkpoint back."""
    try:
        for path in root.glob("step_*.old"):
            if path.with_suffix("").exists():
                _discard(path)
            else:
                path.rename(path.with_suffix(""))
        for path in root.glob(f"{UNFINISHED}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError:
        pass  # the next save tries again, and reports what is in its way


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Give a finished checkpoint its name. It may replace one of the same step."""
    # No call replaces a whole folder: between these two renames readers take the .old one.
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        final.rename(old)
    unfinished.rename(final)
    flush(final.parent)
    if old.exists():
        _discard(old)


def _read_best(root: Path) -> dict | None:
    """{"step", "score"} of the best checkpoint; None if no checkpoint is marked, or not legibly."""
    try:
        best = json.loads((root / "best.json").read_text(encoding="utf-8"))
        return {"step": int(best["step"]), "score": float(best["score"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def mark_best(run: str | Path, step: int, score: float) -> None:
    """What `save_checkpoint` does with a score, for a run that was killed before it did it."""
    _mark_best(Path(run) / "checkpoints", step, score)


def _mark_best(root: Path, step: int, score: float) -> None:
    best = _read_best(root)
    # A mark on a checkpoint that is gone, or was saved again, no longer counts.
    stale = best is None or best["step"] == step or best["step"] not in _folders(root)
    if not math.isnan(score) and (stale or score > best["score"]):
        atomic_write_json(root / "best.json", {"step": step, "score": score})


def _prune(root: Path, step: int, keep_last: int) -> None:
    """Keep the best checkpoint and the last `keep_last` up to `step`.

    Later ones exist if the run was resumed from an earlier step. They stay, and do not count:
    otherwise the checkpoint that was just saved could be the one to go.
    """
    best = _read_best(root)
    folders = {s: paths for s, paths in _folders(root).items() if s <= step}
    for old_step in list(folders)[keep_last:]:
        if best is not None and old_step == best["step"]:
            continue
        for path in folders[old_step]:
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
    """Save a checkpoint of `step` in the run folder, remove old ones, and return its path.

    tensors: groups of named tensors of any device and dtype; each group becomes a file. A tensor
        with several names in a group (tied weights) is stored once and comes back as one tensor.
    state: JSON: configs, tokenizer, optimizer scalars, data position, random streams. It comes back
        as JSON returns it: lists for tuples, strings for keys.
    keep_last: how many of the newest stay, in addition to the best one.
    score: higher is better. The first checkpoint with the highest score is the best; NaN never is.
    Raises CheckpointError if it cannot be written (disk full, no permission); earlier checkpoints
    are then intact.
    """
    if keep_last < 1:
        raise ValueError(
            f"keep_last is {keep_last}, expected 1 or more: what is not kept cannot be resumed"
        )
    assert step >= 0, step
    for group in tensors:
        assert group.isidentifier(), f"groups become file names, and {group!r} cannot be one"
    groups = {group: _split_repeats(named) for group, named in tensors.items()}
    root = Path(run) / "checkpoints"
    final = root / f"step_{step:08d}"
    unfinished = root / f"{UNFINISHED}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        _write_folder(unfinished, step, groups, state)
        _put_in_place(unfinished, final)
        if score is not None:
            _mark_best(root, step, score)
    # Every exception, also Ctrl-C or a state that is no JSON: leave nothing half-done.
    except BaseException as error:
        _tidy(root)
        if isinstance(error, (OSError, SafetensorError)):
            stored = [tensor for stored, _ in groups.values() for tensor in stored.values()]
            needed = sum(tensor.nbytes for tensor in stored)
            raise CheckpointError(_cannot_save(root, step, needed, error)) from error
        raise
    # It is saved. That an old one cannot be removed is no reason to stop.
    try:
        _prune(root, step, keep_last)
    except OSError as error:
        warnings.warn(f"an old checkpoint in {root} cannot be removed: {error}", stacklevel=2)
    return final


def _cannot_save(root: Path, step: int, needed: int, error: Exception) -> str:
    """The message: why, how much memory was needed and is free, what is still intact."""
    reason = getattr(error, "strerror", None) or str(error)
    try:
        free = f"{shutil.disk_usage(root).free / 1e6:,.1f} MB are free"
    except OSError:
        free = "the folder cannot be read"
    earlier = "There is no earlier checkpoint"
    if steps := checkpoint_steps(root.parent):
        earlier = f"The checkpoint of step {steps[-1]} is intact"
    return (
        f"cannot save the checkpoint of step {step} in {root}: {reason}. It needs "
        f"{needed / 1e6:,.1f} MB, {free}. {earlier}; make room, or the folder writable, and resume"
    )


def checkpoint_steps(run: str | Path) -> list[int]:
    """The steps with a checkpoint in the run folder, oldest first; the files are not checked."""
    try:
        return sorted(_folders(Path(run) / "checkpoints"))
    except OSError:
        return []


def _find_checkpoints(folder: Path) -> dict[int, list[Path]] | None:
    """`_folders` of a run; None if `folder` is itself one checkpoint.

    Raises CheckpointError for a folder without checkpoints.
    """
    if not folder.is_dir():
        if HUB_NAME.fullmatch(str(folder)) and not folder.parent.exists():
            raise CheckpointError(
                f"{folder} does not exist; models are not fetched by name. If it is one of the "
                f"hub: hf download {folder} --local-dir {folder.name}, then give {folder.name}"
            )
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {found}; expected the folder of a run, which holds checkpoints/, or of an "
            "open model, which holds config.json"
        )
    if (folder / "state.json").exists() or FOLDER_NAME.fullmatch(folder.name):
        return None
    root = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if not root.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        holds = ", ".join(names[:5] + ["…"] * (len(names) > 5)) or "nothing"
        raise CheckpointError(
            f"{folder} is not the folder of a run: it holds {holds}, and no checkpoints/. "
            "Give the folder that training wrote to, or one of a Hugging Face model"
        )
    folders = _folders(root)
    if not folders:
        raise CheckpointError(
            f"{root} holds no checkpoint yet; start the run afresh or give another folder"
        )
    return folders


def _in_order(root: Path, steps: list[int], which: str | int) -> list[int]:
    """The steps to try, the wanted one first. steps: all there are, newest first."""
    if which == "last":
        return steps
    if which == "best":
        best = _read_best(root)
        if best is None and not (root / "best.json").exists():
            raise CheckpointError(
                f"{root} marks no checkpoint as the best; ask for the last, or for one of "
                f"the steps {steps[::-1]}"
            )
        if best is None or best["step"] not in steps:
            warnings.warn(
                f"{root / 'best.json'} names no checkpoint; using the last one", stacklevel=4
            )
            return steps
        return [best["step"], *(step for step in steps if step != best["step"])]
    if which not in steps:
        raise CheckpointError(
            f"{root} has no checkpoint {which!r}; expected 'last', 'best' or one of "
            f"the steps {steps[::-1]}"
        )
    return [which]


def _choose(folder: Path, which: str | int) -> list[Path]:
    """The checkpoints to try, in order. Raises CheckpointError if there is none."""
    folders = _find_checkpoints(folder)
    if folders is None:
        return [folder]
    root = next(iter(folders.values()))[0].parent
    steps = _in_order(root, list(folders), which)
    return [path for step in steps for path in folders[step]]


def _listed(folder: Path, which: str | int) -> list[Path]:
    """The checkpoints to try, in order. Raises CheckpointError if there is none."""
    try:
        return _choose(folder, which)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {folder}: {error.strerror}; give one you may read"
        ) from error


def _first_sound(
    paths: list[Path], groups: tuple[str, ...] | None
) -> tuple[Checkpoint | None, dict[str, CheckpointError]]:
    """(the first checkpoint that can be used, or None; what is wrong with those before it)."""
    errors = {}
    for path in paths:
        try:
            checkpoint = _read_folder(path, groups)
        except CheckpointError as error:
            errors[path.name] = error
            continue
        if errors:
            unusable = "; ".join(f"{name}: {error}" for name, error in errors.items())
            warnings.warn(f"using {path} because others cannot be used: {unusable}", stacklevel=3)
        return checkpoint, errors
    return None, errors


def load_checkpoint(
    folder: str | Path, which: str | int = "last", groups: tuple[str, ...] | None = None
) -> Checkpoint:
    """Read a checkpoint from a run folder, its checkpoints/ folder, or one checkpoint's folder.

    which: "last", "best" or a step. If the last or the best is damaged, a warning says so and the
        newest sound one is used. A step or folder that was named is never replaced by another.
    groups: the groups of tensors to read; None is all. The files of the others may be missing.
    Raises CheckpointError if there is none to use.
    """
    folder = Path(folder)
    for _ in range(LISTINGS):
        paths = _listed(folder, which)
        checkpoint, errors = _first_sound(paths, groups)
        if checkpoint is not None:
            return checkpoint
        # A trainer that goes on beside us removes old checkpoints: then look again.
        if _listed(folder, which) == paths:
            break
    if all(isinstance(error, VersionError) for error in errors.values()):
        raise VersionError(f"{paths[0]} cannot be used: {errors[paths[0].name]}")
    reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
    raise CheckpointError(
        f"no usable checkpoint in {folder} ({reasons}). Restore it from a copy, "
        "name another step, or start the run afresh in another folder"
    )


def check_config(found: dict, expected: dict, where: str | Path) -> None:
    """Raise CheckpointError, naming each differing field, unless a config is as expected.

    Tuples and lists count as equal. where: the checkpoint's path, for the message.
    """
    found = json.loads(json.dumps(found))
    expected = json.loads(json.dumps(expected))
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


# ---- a model from a checkpoint ----


def build_model(
    config: dict,
    weights: dict[str, torch.Tensor],
    device: torch.device,
    precision: Precision | None = None,
) -> Transformer:
    """A model of a checkpoint's config and weights.

    precision: what it computes in; None is the device's own choice, as with --dtype auto.
    """
    precision = precision or choose_precision("auto", False, device)
    model = Transformer(ModelConfig(**config), precision.dtype, precision.fp32_head)
    check_shapes(weights, model)
    model.load_state_dict(weights)
    return model.to(device)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a module: all tensors, or what is trained of an adapted one."""
    return adapter_tensors(module) if adapters_of(module) else module.state_dict()


def load_tensors(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: str | Path
) -> None:
    """Load what `tensors_of` gave. Raises CheckpointError unless it is of such a module."""
    check_shapes(tensors, module, f"{where}: ")
    module.load_state_dict(tensors, strict=False)


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """32 hex digits of all names, dtypes, shapes and numbers."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def check_shapes(
    weights: dict[str, torch.Tensor], module: torch.nn.Module, where: str = ""
) -> None:
    """Raise CheckpointError unless the weights are those of the module, name by name."""
    there = {name: list(tensor.shape) for name, tensor in weights.items()}
    here = {name: list(tensor.shape) for name, tensor in tensors_of(module).items()}
    differ = [
        f"{name} is {there.get(name, 'missing')}, expected {here.get(name, 'none of that name')}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise CheckpointError(
            f"{where}the weights do not fit their config: {'; '.join(differ[:3])}{more}; give a "
            "checkpoint that is whole"
        )


def load_model(
    folder: str,
    device: torch.device,
    which: str | int = "last",
    precision: Precision | None = None,
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The model, tokenizer and checkpoint of a run, without the optimizer's tensors.

    A folder of a Hugging Face model is taken too, and one of adapters in PEFT's layout; then the
    checkpoint is of step 0. Of adapters, a run's or PEFT's, the model is an ordinary one: their
    base, with the adapters added to it. In all of these cases the checkpoint's tensors are the
    model's own parameters: they change when it is trained.
    Arguments as in `load_checkpoint` and `build_model`.
    Raises CheckpointError if there is none to use, ValueError if it holds no model.
    """
    if is_peft(folder):
        _check_last(folder, "holds adapters, which have", which)
        return _load_peft(Path(folder), device, precision)
    if is_huggingface(folder):
        _check_last(folder, "is a Hugging Face model, which has", which)
        return _load_huggingface(Path(folder), device, precision)
    checkpoint = load_checkpoint(folder, which, groups=("model",))
    if "lora" in checkpoint.state:
        return _load_merged(checkpoint, device, precision)
    has_state = {"model_config", "tokenizer"} <= checkpoint.state.keys()
    if not has_state or "model" not in checkpoint.tensors:
        raise ValueError(
            f"{checkpoint.path} holds no model; give a folder that pretrain, sft, grpo or demo "
            "wrote"
        )
    model_config, weights = checkpoint.state["model_config"], checkpoint.tensors["model"]
    model = build_model(model_config, weights, device, precision)
    tokenizer = Tokenizer.from_dict(checkpoint.state["tokenizer"])
    return model, tokenizer, checkpoint


def load_adapted(
    checkpoint: Checkpoint, device: torch.device, precision: Precision | None = None
) -> tuple[Transformer, Tokenizer]:
    """The base of a checkpoint that holds adapters alone, with these beside its weights.

    Raises CheckpointError if the base is not where it was, or has other weights.
    """
    kept = checkpoint.state["lora"]
    mend = (
        "restore it there, use `r1zero export` where it still is, or name its new place once with "
        "--resume --base"
    )
    folder = Path(kept["base"])
    if not folder.exists():  # the base's own run may have removed it
        linked = checkpoint.path.parent.parent / KEPT_BASE / folder.name
        folder = linked if linked.exists() else folder
    try:
        model, tokenizer, base = load_model(str(folder), device, precision=precision)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path} holds adapters alone, and their base cannot be loaded: {error}; "
            f"{mend}"
        ) from error
    if base.weights_fingerprint != kept["base_weights"]:
        raise CheckpointError(
            f"{checkpoint.path} holds adapters of other weights than {kept['base']} has now; {mend}"
        )
    add_adapters(model, LoRAConfig(**kept["config"]), seed=0)
    load_tensors(model, checkpoint.tensors["model"], checkpoint.path)
    return model, tokenizer


def _load_merged(
    checkpoint: Checkpoint, device: torch.device, precision: Precision | None
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The model of a checkpoint that holds adapters alone: its base, with these added to it."""
    model, tokenizer = load_adapted(checkpoint, device, precision)
    base_weights = checkpoint.state["lora"]["base_weights"]
    fingerprint = f"{base_weights}+{weights_digest(checkpoint.tensors['model'])}"
    tensors = {"model": merge_adapters(model).state_dict()}
    step, state, path = checkpoint.step, checkpoint.state, checkpoint.path
    return model, tokenizer, Checkpoint(step, tensors, state, path, fingerprint)


def _check_last(folder: str, what: str, which: str | int) -> None:
    """Raise ValueError for another checkpoint than the last, of a folder that has none."""
    if which != "last":
        raise ValueError(f"{folder} {what} no checkpoint {which!r}; ask for the last")


def _load_peft(
    folder: Path, device: torch.device, precision: Precision | None
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    """The base of a folder of adapters, with these added to it."""
    base_folder = folder_of_base(folder)
    model, tokenizer, base = load_model(str(base_folder), device, precision=precision)
    found, expected = base.weights_fingerprint, base_in(folder)
    if expected["weights"] and found not in expected["weights"]:
        raise CheckpointError(
            f"{folder} holds adapters of {expected['base']}, and {base_folder} has other weights; "
            f"put the path of that base into {folder / PEFT_CONFIG}, or remove {folder / BASE} if "
            "this is the same model in another precision"
        )
    fingerprint = f"{found}+{weights_digest(adapters_in(folder))}"
    merge_folder(folder, model)
    tensors = {"model": model.state_dict()}
    return model, tokenizer, Checkpoint(0, tensors, base.state, folder, fingerprint)


def _load_huggingface(
    folder: Path, device: torch.device, precision: Precision | None
) -> tuple[Transformer, Tokenizer, Checkpoint]:
    model, tokenizer = read_model(folder, device, precision)
    weights = model.state_dict()
    state = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.to_dict()}
    return model, tokenizer, Checkpoint(0, {"model": weights}, state, folder)
