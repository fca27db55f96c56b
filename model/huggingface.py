"""Hugging Face folders: open weights in, our weights out.

    model, tokenizer = read_model("Qwen2.5-0.5B", device)
    write_model("out", model, tokenizer, torch.bfloat16)

A folder holds config.json (config_json.py), files of weights (weight_files.py) and those of the
tokenizer (tokens/json_file.py). families.py says what each family calls its tensors, weight_map.py
where each of them belongs. Experts are read one by one or stacked, and written one by one.

Reading compares every name and shape with the config before the first number is read, and lists all
that is wrong in one error; transformers fills a missing tensor with random numbers. Then each
tensor is copied to its place a piece at a time: there is no second copy of the weights.

Left out: quantised weights other than fp8 with scales per block, pickled weights (.bin), downloads.
"""

import shutil
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from .config import ModelConfig
from .config_experts import has_pairs_side_by_side, is_latent
from .config_json import config_of, content_of, family_named, family_of
from .config_keys import Complaints, is_count
from .families import FAMILIES
from .files import UNFINISHED, atomic_write_json, atomic_write_text, flush
from .precision import Precision, choose_precision
from .tokenizer import Tokenizer
from .tokens.json_file import is_like_qwen2, read_tokenizer, write_tokenizer
from .transformer import Transformer
from .weight_files import (
    INDEX,
    Stored,
    copy_tensor,
    pieces,
    read_json,
    stored_tensors,
    write_tensors,
)
from .weight_map import (
    HEAD,
    Part,
    check_tensors,
    expected_shapes,
    names_of,
    next_token_layers,
    parts_of,
)

CONFIG = "config.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---- config.json ----


def is_huggingface(folder: str | Path) -> bool:
    """Whether a folder is a model of Hugging Face's layout, and not one of our runs."""
    folder = Path(folder)
    try:
        is_ours = (folder / "checkpoints").exists() or (folder / "state.json").exists()
        return not is_ours and any((folder / name).is_file() for name in (CONFIG, INDEX))
    except OSError:
        return False  # whoever reads it as a run says why it cannot be read


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a folder's model. Raises ValueError, listing all that we cannot compute."""
    path = Path(folder) / CONFIG
    content = read_json(path)
    complaints = Complaints()
    complaints.of(fp8_block, content)
    config = complaints.of(config_of, content)
    try:
        complaints.raise_all()
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return config


def fp8_block(content: dict) -> tuple[int, int] | None:
    """(rows, columns) that share a scale, where the weights are fp8; None where they are plain.

    Raises ValueError, which goes on after the name of the file, for other quantised formats.
    """
    quantisation = content.get("quantization_config")
    if not quantisation:
        return None
    if not isinstance(quantisation, dict):
        raise ValueError(f"has quantization_config {quantisation!r}; expected an object")
    method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(is_count(n) for n in block)
    if method != "fp8" or not is_block:
        raise ValueError(
            f"has quantization_config with quant_method {method!r} and weight_block_size {block}; "
            "r1zero reads fp8 with a scale per block, and weights that are not quantised"
        )
    return tuple(block)


# ---- reading ----


@dataclass(frozen=True)
class Matched:
    """A folder whose tensors, by their headers, are those that its config describes."""

    parts: list[Part]
    stored: dict[str, Stored]
    block: tuple[int, int] | None
    """As `fp8_block` returns it."""
    has_redundant_head: bool


def matched(folder: Path, config: ModelConfig) -> Matched:
    """What should be there, and what is: names, shapes and dtypes, without a number of the files.

    Raises ValueError for tensors that are not those of the config.
    """
    content = read_json(folder / CONFIG)
    family, block = family_named(content), fp8_block(content)
    stored = stored_tensors(folder)
    ignored = next_token_layers(stored, config.n_layers)
    try:
        with torch.device("meta"):
            model = Transformer(config)
        names = names_of(family, config, stored)
        parts = parts_of(model, names, has_pairs_side_by_side(content, family))
        expected = expected_shapes(parts, stored, block, config.tie_embeddings)
        check_tensors(expected, stored, block is not None, ignored)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    except RuntimeError:  # a number of bytes above 2^63
        raise ValueError(
            f"{folder / CONFIG} describes tensors that are larger than any memory; take the "
            "config.json of these weights"
        ) from None
    if ignored:
        warnings.warn(
            f"{folder}: {', '.join(ignored)}* are not read: they only predict tokens further ahead",
            stacklevel=2,
        )
    return Matched(parts, stored, block, HEAD in expected and config.tie_embeddings)


@contextmanager
def default_dtype(dtype: torch.dtype):
    """New tensors have this dtype while the block runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_weights(
    folder: str | Path,
    config: ModelConfig,
    device: torch.device,
    precision: Precision | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The model of a folder. At its peak, memory holds the weights and a piece of a file.

    precision: what it computes in; None is the device's own choice, as with --dtype auto.
    dtype: of the parameters. Raises ValueError for tensors that are not those of the config.
    """
    folder = Path(folder)
    # What is there is compared with what should be, before any memory is taken.
    return filled(folder, config, matched(folder, config), device, precision, dtype)


@torch.no_grad()
def filled(
    folder: Path,
    config: ModelConfig,
    match: Matched,
    device: torch.device,
    precision: Precision | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A model with the tensors of a folder. match: as `matched` returns it; the rest as in
    `read_weights`."""
    precision = precision or choose_precision("auto", False, device)

    # 1. Memory in this dtype, to which nothing has been written.
    with torch.device(device), default_dtype(dtype):
        model = Transformer(config, precision.dtype, precision.fp32_head)

    # 2. Each tensor into its place there.
    tensors = model.state_dict()
    try:
        for part in match.parts:
            target = tensors[part.parameter][part.index]
            copy_tensor(target, part.name, match.stored, match.block, part.order)
        if match.has_redundant_head:
            check_head(model, match.stored[HEAD])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model


def check_head(model: Transformer, head: Stored) -> None:
    """Raise ValueError if a file holds a head that is not the embedding, though they are tied."""
    for rows, piece in pieces(head, HEAD):
        if not torch.equal(model.embed[rows], piece.to(model.embed)):
            raise ValueError(
                f"{HEAD} is not the embedding, though {CONFIG} says (or means, where it does not "
                "say) tie_word_embeddings true; set it to false if the head is the model's own, "
                "or remove the tensor"
            )


def read_model(
    folder: str | Path, device: torch.device, precision: Precision | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a folder. Arguments as in `read_weights`.

    Rows of the embedding behind the tokenizer's last id are padding, and are never sampled.
    Raises ValueError, and then nothing is read, if the files do not fit each other.
    """
    folder = Path(folder)
    config = read_config(folder)
    # The tokenizer takes memory for as many ids as config.json says: are there as many rows?
    match = matched(folder, config)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    if tokenizer.n_ids < config.vocab_size:
        config = replace(config, vocab_in_use=tokenizer.n_ids)
    return filled(folder, config, match, device, precision), tokenizer


# ---- writing ----


def write_config(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Write config.json and generation_config.json."""
    eos = list(tokenizer.eos_ids)
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": tokenizer.pad_id,
    }
    name = DTYPE_NAMES[dtype]
    content = content_of(family_of(config), config) | ends | {"dtype": name, "torch_dtype": name}
    atomic_write_json(folder / CONFIG, content)
    # From here readers take the tokens that end a text.
    atomic_write_json(folder / "generation_config.json", ends)


def config_to_write(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config as which a model is written.

    Beside a qwen2, transformers (5.24) loads every tokenizer as Qwen's and gives wrong ids, without
    a word. Another family with a bias on `out` too computes the same, if that bias is zero.
    """
    if family_of(config) == "qwen2" and not is_like_qwen2(tokenizer):
        return replace(config, out_bias=True)
    return config


def write_model(
    folder: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    card: str = "",
) -> None:
    """Write a folder that transformers, vLLM and `read_model` read. It appears whole or not at all.

    dtype: of the weights in the files. card: text of its README.md.
    Raises ValueError for a folder that holds something, for a model that no family of open models
    describes, and where the folder cannot be written.
    """
    folder = Path(folder)
    check_free(folder)
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    config = config_to_write(model.config, tokenizer)
    tensors, kept_fp32 = tensors_to_write(model, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        write_config(unfinished, config, tokenizer, dtype)
        write_tokenizer(unfinished, tokenizer)
        write_tensors(unfinished, tensors, dtype, kept_fp32=kept_fp32)
        if card:
            atomic_write_text(unfinished / "README.md", card)
        make_readable(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{folder} cannot be written: {reason}; make room, or give another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tensors_to_write(
    model: Transformer, config: ModelConfig
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """({name in the file: tensor}, the names of those that stay fp32). config: as which the model
    is written."""
    family, ours = FAMILIES[family_of(config)], model.state_dict()
    with torch.device("meta"):
        parts = parts_of(Transformer(config), names_of(family, config), is_latent(family))
    tensors = {}
    for part in parts:
        if part.parameter in ours:
            tensor = ours[part.parameter][part.index]
        else:  # a bias of `out`
            tensor = torch.zeros(part.shape)
        tensors[part.name] = tensor if part.order is None else tensor[part.order]
    kept_fp32 = (part.name for part in parts if stays_fp32(part.parameter, config))
    return tensors, frozenset(kept_fp32)


def stays_fp32(parameter: str, config: ModelConfig) -> bool:
    """Whether a parameter is never rounded: the bias that experts are chosen by, which moves by
    less than bf16's steps, and routers that compute in fp32."""
    is_bias = parameter.endswith(".router.balance_bias")
    return is_bias or ".router.linear." in parameter and config.moe.fp32_router


def check_free(folder: Path) -> None:
    """Raise ValueError unless a folder can be made there, or an empty one replaced."""
    # An empty folder is replaced: whoever stands in it would stand in none.
    if folder.name in ("", "..") or folder.resolve() == Path.cwd():
        raise ValueError(f"{folder} is no name for a new folder; give one to make, such as out")
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} is there already; give the name of a folder to make")


def make_readable(folder: Path) -> None:
    """Give all files the mode that the umask says (save_file lets only the owner read), and flush
    them."""
    mode = (folder / CONFIG).stat().st_mode & 0o777
    for path in folder.iterdir():
        with suppress(OSError):  # some mounts know no modes: then all files have the same
            path.chmod(mode)
        flush(path)
    flush(folder)
