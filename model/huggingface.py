"""Hugging Face folders: open weights in, our weights out.

    model, tokenizer = read_model("Qwen2.5-0.5B", device)
    write_model("out", model, tokenizer, torch.bfloat16)

A folder holds config.json (config_json.py), the weights as model.safetensors or as shards beside
model.safetensors.index.json, and the tokenizer's files (tokenizer_json.py). families.py says what
each family calls its tensors; q, k and v lie below each other in one of our parameters, and so do
gate and up.

Reading checks every name and shape before the first number is read, and lists all that is wrong in
one error: transformers fills a missing tensor with random numbers. Then each tensor is copied into
its place a piece at a time, so that no second copy of the weights exists.

Weights may be fp32, bf16, fp16, or fp8 with a scale per block (DeepSeek-V3, Qwen3-FP8), which is
only read. Left out: all other quantised formats, pickled weights (.bin), downloads.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import ModelConfig
from .config_json import config_of, content_of, family_named, family_of
from .families import FAMILIES, names_in_file
from .files import UNFINISHED, atomic_write_json, atomic_write_text, flush
from .precision import Precision, choose_precision
from .transformer import Transformer

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 1 << 24  # how much of a file is read at one time
SHARD_BYTES = 4 << 30  # the largest file that is written
MOST_NAMED = 6  # tensors of a kind that a message names
# Names of dtypes in a safetensors file that we read as they are, and those of torch for config.json.
PLAIN_DTYPES = ("F32", "BF16", "F16")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FP8, SCALE = "F8_E4M3", "_scale_inv"
# Tables of angles that old files of Llama hold; they follow from the config.
REDUNDANT = ".rotary_emb.inv_freq"


# ---- what lies in a folder ----


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder is a model of Hugging Face's layout, and not one of our runs."""
    folder = Path(folder)
    is_ours = (folder / "checkpoints").exists() or (folder / "state.json").exists()
    return not is_ours and any((folder / name).is_file() for name in (CONFIG, INDEX))


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


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a folder's model. Raises ValueError for one that we cannot compute."""
    path = Path(folder) / CONFIG
    content = read_json(path)
    try:
        fp8_block(content)
        return config_of(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} {error}") from None


def fp8_block(content: dict) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, where the weights are fp8; None where they are plain.

    Raises ValueError, which goes on after the name of the file, for other quantised formats.
    """
    quantisation = content.get("quantization_config")
    if not quantisation:
        return None
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)
    if method != "fp8" or not is_block:
        raise ValueError(
            f"has quantization_config with quant_method {method!r} and weight_block_size {block}; "
            "r1zero reads fp8 with a scale per block, and weights that are not quantised"
        )
    return tuple(block)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""


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


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder by name: of the one file, or of the shards that the index names.

    Only headers are read. Raises ValueError for missing or damaged files.
    """
    files = files_of(folder)
    stored = {}
    for path, names in files.items():
        with opened(path) as file:
            for name in file.keys() if names is None else names.intersection(file.keys()):
                part = file.get_slice(name)
                stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
    return stored


def files_of(folder: Path) -> dict[Path, set[str] | None]:
    """{file: the tensors that count in it}; None is all of them."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not single.exists():
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}; weights in other formats (.bin, .gguf) "
                "are not read: take the safetensors of the model"
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


# ---- where each tensor belongs ----


@dataclass(frozen=True)
class Part:
    """Rows of one of our parameters, which are a tensor of the file."""

    name: str
    """In the file."""
    parameter: str
    rows: slice
    shape: tuple[int, ...]


def parts_of(model: Transformer, names: dict[str, tuple[str, ...]]) -> list[Part]:
    """The parts of all parameters. names: of the family, as in families.py."""
    config, parts = model.config, []
    for parameter, tensor in model.named_parameters():
        sizes = [len(tensor)]
        if ".qkv." in parameter:
            q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
            sizes = [q, kv, kv]
        elif ".gate_up." in parameter:
            sizes = [config.d_ff, config.d_ff]
        start = 0
        for name, size in zip(names_in_file(names, parameter), sizes, strict=True):
            rows = slice(start, start + size)
            parts.append(Part(name, parameter, rows, (size, *tensor.shape[1:])))
            start += size
    return parts


def check_tensors(
    parts: list[Part], stored: dict[str, Stored], block: tuple[int, int] | None, tied: bool
) -> None:
    """Raise ValueError, listing all tensors that are missing, too many, or not as expected."""
    expected = {part.name: part.shape for part in parts}
    if block is not None:
        matrices = [part for part in parts if len(part.shape) == 2]
        for part in matrices:
            if part.name in stored and stored[part.name].dtype == FP8:
                # A block at the edge may be cut off.
                sizes = zip(part.shape, block, strict=True)
                expected[part.name + SCALE] = tuple(-(-size // step) for size, step in sizes)
    # A redundant head is compared with the embedding later.
    if tied and "lm_head.weight" in stored:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]

    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected and not name.endswith(REDUNDANT)]
    both = [name for name in expected if name in stored]
    misshapen = [
        f"{name} is {list(stored[name].shape)} and not {list(expected[name])}"
        for name in both
        if stored[name].shape != expected[name]
    ]
    readable = PLAIN_DTYPES if block is None else (*PLAIN_DTYPES, FP8)
    odd = [
        f"{name} is {stored[name].dtype}"
        for name in both
        if stored[name].dtype not in readable and not name.endswith(SCALE)
    ]
    complaints = [
        f"{len(names)} {what}: {named(names)}"
        for what, names in (
            ("missing", missing),
            ("not of this model", extra),
            ("of another shape", misshapen),
            (f"of a dtype that is none of {', '.join(readable)}", odd),
        )
        if names
    ]
    if "lm_head.weight" in missing:
        complaints.append(
            f"a model without a head of its own says tie_word_embeddings true in {CONFIG}"
        )
    if complaints:
        raise ValueError(
            f"the tensors are not those that {CONFIG} describes; {'; '.join(complaints)}"
        )


# ---- reading ----


def pieces(stored: Stored, name: str, multiple: int = 1):
    """Yield (rows, their numbers as in the file), piece by piece.

    The file is opened for each piece: what is read of a mapped file counts as memory until it is
    closed. multiple: a piece has a multiple of so many rows.
    """
    n_rows = stored.shape[0]
    row_bytes = 4 * max(1, torch.Size(stored.shape[1:]).numel())
    step = max(1, PIECE_BYTES // (row_bytes * multiple)) * multiple
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        with opened(stored.path) as file:
            yield rows, file.get_slice(name)[rows]


def copy_tensor(target: torch.Tensor, name: str, stored: dict[str, Stored], block) -> None:
    """Copy a tensor of a file to its place, in the target's dtype. block: as `fp8_block`."""
    is_fp8 = stored[name].dtype == FP8
    scale = None
    if is_fp8:
        with opened(stored[name + SCALE].path) as file:
            scale = file.get_tensor(name + SCALE).float()
    for rows, piece in pieces(stored[name], name, block[0] if is_fp8 else 1):
        if is_fp8:
            blocks = slice(rows.start // block[0], -(-rows.stop // block[0]))
            piece = dequantised(piece, scale[blocks], block)
        target[rows].copy_(piece)


def dequantised(
    fp8: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """w * scale in fp32. fp8: [rows, columns], whole blocks but for the edges; scale: one for each
    block (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""
    n_rows, n_columns = fp8.shape
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return fp8.float() * wide[:n_rows, :n_columns]


def check_head(model: Transformer, stored: dict[str, Stored]) -> None:
    """Raise ValueError if a file holds a head that is not the embedding, though they are tied."""
    for rows, piece in pieces(stored["lm_head.weight"], "lm_head.weight"):
        if not torch.equal(model.embed[rows], piece.to(model.embed)):
            raise ValueError(
                f"lm_head.weight is not the embedding, though {CONFIG} says (or means, where it "
                "does not say) tie_word_embeddings true; set it to false if the head is the "
                "model's own, or remove the tensor"
            )


@torch.no_grad()
def read_weights(
    folder: str | Path,
    config: ModelConfig,
    device: torch.device,
    precision: Precision | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a folder. Peak memory is its weights and a piece of a file.

    precision: what it computes in; None is the device's own choice, as with --dtype auto.
    dtype: of the parameters. Raises ValueError for tensors that are not those of the config.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG)
    names, block = family_named(content).names, fp8_block(content)
    precision = precision or choose_precision("auto", False, device)

    # 1. All shapes, and whether the files have them, before any memory is taken.
    with torch.device("meta"):
        model = Transformer(config, precision.dtype, precision.fp32_head).to(dtype)
    parts, stored = parts_of(model, names), stored_tensors(folder)
    tied = config.tie_embeddings
    try:
        check_tensors(parts, stored, block, tied)
        # 2. Memory that nothing has touched yet, and each tensor into its place.
        model = model.to_empty(device=device)
        parameters = dict(model.named_parameters())
        for part in parts:
            copy_tensor(parameters[part.parameter][part.rows], part.name, stored, block)
        if tied and "lm_head.weight" in stored:
            check_head(model, stored)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model
