"""Files of weights as Hugging Face lays them out: one safetensors file, or shards with an index.

    stored_tensors(folder)      every tensor's file, shape and dtype, from the headers alone
    copy_tensor(target, ...)    a tensor to its place, a piece at a time
    write_tensors(folder, ...)  one file, or shards of at most 4 GiB

Only what the index names is read: old shards often stay beside a new one. Weights may be fp8 with a
scale for each block (DeepSeek-V3, arXiv 2412.19437, section 3.3); that is only read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import atomic_write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 1 << 23  # how much of a file is read at one time
SHARD_BYTES = 4 << 30  # the largest file that is written
MOST_NAMED = 6  # names that a message lists
# Names of dtypes in a safetensors file. A weight in fp8 has its scales under a name of their own.
PLAIN_DTYPES = ("F32", "BF16", "F16")
FP8, SCALE = "F8_E4M3", "_scale_inv"
SCALE_DTYPES = (*PLAIN_DTYPES, "F8_E8M0")


# ---- what there is ----


def opened(path: Path):
    """An open safetensors file. Raises ValueError for a damaged one."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path} cannot be read ({reason}); it is damaged, cut off, or only points to the "
            "weights (then: git lfs pull). Fetch it again"
        ) from None


class Reader:
    """Reads rows of tensors, and keeps the file open in between.

    To open one takes milliseconds, and a mixture of experts has thousands of small tensors.
    But what was read of a mapped file counts as memory until it is closed. So it is opened anew
    when a piece's worth was read.
    """

    def __init__(self):
        self.path, self.file, self.n_bytes = None, None, 0

    def rows(self, path: Path, name: str, rows: slice) -> torch.Tensor:
        """These rows of a tensor, as in the file."""
        if path != self.path or self.n_bytes >= PIECE_BYTES:
            self.path, self.file = None, None  # the old one is closed first
            self.path, self.file, self.n_bytes = path, opened(path), 0
        piece = self.file.get_slice(name)[rows]
        self.n_bytes += piece.nbytes
        return piece


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    reader: Reader
    """That of all tensors of the folder."""

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """These rows of the tensor, as in the file. name: its own."""
        return self.reader.rows(self.path, name, rows)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by name: of the one file, or of the shards that the index names.

    Only headers are read. Raises ValueError for missing or damaged files.
    """
    files, reader = files_of(folder), Reader()
    stored = {}
    for path, names in files.items():
        with opened(path) as file:
            for name in file.keys() if names is None else names.intersection(file.keys()):
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                stored[name] = Stored(path, shape, dtype, reader)
    return stored


def files_of(folder: Path) -> dict[Path, set[str] | None]:
    """{file: the tensors that count in it}; None is all of them."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not single.exists():
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}; other formats (.bin, .gguf) are "
                "not read: take the safetensors of the model"
            )
        return {single: None}

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch it again")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(folder / file, set()).add(name)
    missing = sorted(path.name for path in files if not path.exists())
    # A folder that was saved over may keep the index of what was there before.
    if single.exists() and single not in files:
        if len(missing) == len(files):
            return {single: None}
        raise ValueError(
            f"{folder} holds {SINGLE}, and {INDEX}, which names other files; remove what is old"
        )
    if missing:
        raise ValueError(
            f"{folder} lacks {named(missing)} of {len(files)} files that {INDEX} names; fetch them"
        )
    return files


def named(names: list[str]) -> str:
    """The first few names, and how many there are more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; take all files of the model") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; take it from the model anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; take it from the model anew")
    return content


# ---- reading ----


def pieces(stored: Stored, name: str, multiple: int = 1):
    """Yield (rows, their numbers as in the file), piece by piece.

    multiple: a piece has a multiple of so many rows.
    """
    n_rows = stored.shape[0]
    row_bytes = 4 * max(1, torch.Size(stored.shape[1:]).numel())
    step = max(1, PIECE_BYTES // (row_bytes * multiple)) * multiple
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        yield rows, stored.rows(name, rows)


def copy_tensor(
    target: torch.Tensor,
    name: str,
    stored: dict[str, Stored],
    block: tuple[int, int] | None,
    order: torch.Tensor | None = None,
) -> None:
    """Copy a tensor of a file to its place, in the target's dtype.

    block: as `fp8_block`. order: [rows], which row of the target each row of the file is.
    Raises ValueError for numbers that are not finite there.
    """
    is_fp8 = stored[name].dtype == FP8
    scale = None
    if is_fp8:
        scale = stored[name + SCALE].rows(name + SCALE, slice(None)).float()
    for rows, piece in pieces(stored[name], name, block[0] if is_fp8 else 1):
        if is_fp8:
            blocks = slice(rows.start // block[0], -(-rows.stop // block[0]))
            piece = dequantised(piece, scale[blocks], block)
        if order is None:
            written = target[rows].copy_(piece)
        else:
            written = piece.to(target)
            target.index_copy_(0, order[rows].to(target.device), written)
        # Least and largest: NaN is both. (isfinite would take memory of its own.)
        if not torch.stack(written.aminmax()).isfinite().all():
            raise ValueError(
                f"{name} has numbers that are not finite in {target.dtype}; fetch "
                f"{stored[name].path.name} again, or take other weights"
            )


def dequantised(fp8: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """w * scale in fp32. fp8: [rows, columns], whole blocks but for the edges; scale: one for each
    block (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""
    n_rows, n_columns = fp8.shape
    # A block may be larger than the matrix.
    block_rows, block_columns = min(block[0], n_rows), min(block[1], n_columns)
    wide = scale.repeat_interleave(block_rows, 0).repeat_interleave(block_columns, 1)
    return fp8.float() * wide[:n_rows, :n_columns]


# ---- writing ----


def shards_of(sizes: dict[str, int], most_bytes: int) -> list[list[str]]:
    """Names in files of at most `most_bytes`, in order; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    room = most_bytes
    for name, n_bytes in sizes.items():
        if n_bytes > room and shards[-1]:
            shards.append([])
            room = most_bytes
        shards[-1].append(name)
        room -= n_bytes
    return shards


def write_tensors(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    most_bytes: int = SHARD_BYTES,
    kept_fp32: frozenset[str] = frozenset(),
) -> None:
    """Write tensors in this dtype. Only the copies of one shard are held at a time.

    kept_fp32: names of those that are written in fp32 all the same.
    Raises ValueError for numbers that are not finite in this dtype.
    """
    dtypes = {name: torch.float32 if name in kept_fp32 else dtype for name in tensors}
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}
    shards, weight_map = shards_of(sizes, most_bytes), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        ready = {}
        for name in names:
            tensor = tensors[name].detach().to("cpu", dtypes[name])
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name} has numbers that are not finite in {tensor.dtype}; take another "
                    "checkpoint, or another dtype"
                )
            # The format has no views: each tensor gets memory of its own.
            ready[name] = tensor.clone(memory_format=torch.contiguous_format)
            weight_map[name] = file
        # Other libraries look for this metadata.
        save_file(ready, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        atomic_write_json(folder / INDEX, index)
