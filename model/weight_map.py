"""Where each tensor of a Hugging Face folder belongs in our parameters.

    parts = parts_of(model, names)       one part per tensor: its name, parameter, index and shape
    expected = expected_shapes(parts, stored, ...)
    check_tensors(expected, stored, ...)

q, k and v lie below each other in one of our parameters, and so do gate and up. All experts of a
layer are one parameter [E, ...]; a file has them one by one, or stacked as we do.

RoPE rotates pairs of numbers. In our models the two lie half a part of a head apart; DeepSeek's
files have them side by side. So the rows of that part are put into another order: the first of each
pair, then the second.

Layers that predict further tokens (DeepSeek-V3's model.layers.61) are no part of our model. They
are known by a tensor of their own, and ignored.
"""

from dataclasses import dataclass

import torch

from .config import ModelConfig
from .families import DIRECT_QUERY_NAMES, STACKED_EXPERTS, STACKED_NAMES, Family, names_in_file
from .transformer import Transformer
from .weight_files import FP8, PLAIN_DTYPES, SCALE, SCALE_DTYPES, Stored, named

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Tables of angles that old files of Llama hold; they follow from the config.
REDUNDANT = ".rotary_emb.inv_freq"
# Only layers that predict further tokens have this matrix.
NEXT_TOKEN_LAYER = ".eh_proj.weight"


# ---- the parts ----


@dataclass(frozen=True)
class Part:
    """A tensor of a file: a part of one of our parameters."""

    name: str
    """In the file."""
    parameter: str
    index: tuple
    """Of the parameter: rows, or an expert and its rows."""
    shape: tuple[int, ...]
    order: torch.Tensor | None = None
    """[rows]: where in the part each row of the file lies; None: where it is in the file."""


def names_of(family: Family, config: ModelConfig, stored=()) -> dict[str, tuple[str, ...]]:
    """What the family calls the tensors of such a model. stored: names in the files, which say
    whether the experts are stacked there."""
    names = family.names
    if config.latent is not None and config.latent.q_rank is None:
        names = names | DIRECT_QUERY_NAMES
    if any(name.endswith(STACKED_EXPERTS) for name in stored):
        names = names | STACKED_NAMES
    return names


def parts_of(
    model: Transformer, names: dict[str, tuple[str, ...]], pairs_side_by_side: bool = False
) -> list[Part]:
    """The parts of all parameters, and of the routers' biases.

    names: as `names_of` returns them. pairs_side_by_side: whether the files have those that RoPE
    rotates so.
    """
    parts = []
    for parameter, tensor in model.state_dict().items():
        in_file = names_in_file(names, parameter)
        if "{expert}" in in_file[0]:
            parts += expert_parts(parameter, tensor, in_file)
            continue
        order = order_of_pairs(parameter, model.config) if pairs_side_by_side else None
        start = 0
        for name, size in zip(in_file, sizes_of(parameter, tensor, model.config), strict=True):
            index = (slice(start, start + size),)
            parts.append(Part(name, parameter, index, (size, *tensor.shape[1:]), order))
            start += size
    return parts


def sizes_of(parameter: str, tensor: torch.Tensor, config: ModelConfig) -> list[int]:
    """How many rows each tensor of the files has in a parameter."""
    n_rows = len(tensor)
    if ".qkv." in parameter:
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return [q, kv, kv]
    return [n_rows // 2, n_rows // 2] if ".gate_up." in parameter else [n_rows]


def expert_parts(parameter: str, tensor: torch.Tensor, in_file: tuple[str, ...]) -> list[Part]:
    """The parts of a stack of experts [E, rows, columns] that the files hold one by one."""
    n_experts, n_rows, n_columns = tensor.shape
    size = n_rows // len(in_file)
    return [
        Part(
            name=name.format(expert=expert),
            parameter=parameter,
            index=(expert, slice(i * size, (i + 1) * size)),
            shape=(size, n_columns),
        )
        for expert in range(n_experts)
        for i, name in enumerate(in_file)
    ]


def order_of_pairs(parameter: str, config: ModelConfig) -> torch.Tensor | None:
    """Where each row of a file lies in a parameter that RoPE rotates a part of; None for others."""
    latent = config.latent
    if latent is None:
        return None
    if parameter.endswith("attn.q_up.weight"):  # per head: not rotated, rotated
        n_heads, n_before = config.n_heads, config.head_dim - latent.rope_dim
    elif parameter.endswith("attn.kv_down.weight"):  # the latent, and one part for all heads
        n_heads, n_before = 1, latent.kv_rank
    else:
        return None
    n_pairs = latent.rope_dim // 2
    before = torch.arange(n_before, device="cpu")
    # The j-th pair: rows 2j and 2j + 1 of the file, rows j and n_pairs + j of ours.
    pairs = torch.arange(2 * n_pairs, device="cpu").view(2, n_pairs).t().flatten()
    head = torch.cat([before, n_before + pairs])
    starts = len(head) * torch.arange(n_heads, device="cpu")
    return (starts[:, None] + head).flatten()


# ---- what should be there, and what is ----


def expected_shapes(
    parts: list[Part], stored: dict[str, Stored], block: tuple[int, int] | None, tied: bool
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what the files should hold. block: as `fp8_block` returns it."""
    expected = {part.name: part.shape for part in parts}
    matrices = [part for part in parts if len(part.shape) == 2 and block is not None]
    for part in matrices:
        if part.name in stored and stored[part.name].dtype == FP8:
            # A scale for each block; blocks at the edges may be cut off.
            sizes = zip(part.shape, block, strict=True)
            expected[part.name + SCALE] = tuple(-(-size // step) for size, step in sizes)
    # A redundant head is compared with the embedding when that is read.
    if tied and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]
    return expected


def next_token_layers(stored: dict[str, Stored], n_layers: int) -> tuple[str, ...]:
    """What the names of layers begin with that only predict further tokens. They lie behind the
    model's own."""
    found = [name for name in stored if name.endswith(NEXT_TOKEN_LAYER)]
    layers = {name.removesuffix(NEXT_TOKEN_LAYER) + "." for name in found}
    own = {f"model.layers.{layer}." for layer in range(n_layers)}
    return tuple(sorted(layers - own))


def check_tensors(
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
    is_fp8: bool,
    ignored: tuple[str, ...] = (),
) -> None:
    """Raise ValueError, listing all tensors that are missing, too many, or not as expected.

    ignored: what names begin with that may be there besides.
    """
    both = {name: stored[name] for name in expected if name in stored}
    missing = [name for name in expected if name not in stored]
    extra = [
        name
        for name in stored
        if not (name in expected or name.endswith(REDUNDANT) or name.startswith(ignored))
    ]
    misshapen = [
        f"{name} is {list(tensor.shape)} and not {list(expected[name])}"
        for name, tensor in both.items()
        if tensor.shape != expected[name]
    ]
    odd = [
        f"{name} is {tensor.dtype}"
        for name, tensor in both.items()
        if tensor.dtype not in readable_dtypes(name, expected[name], is_fp8)
    ]
    kinds = {
        "missing": missing,
        "not of this model": extra,
        "of another shape": misshapen,
        "of a dtype that is not read": odd,
    }
    complaints = [f"{len(names)} {what}: {named(names)}" for what, names in kinds.items() if names]
    if HEAD in missing:
        complaints.append("without a head, config.json must say tie_word_embeddings true")
    is_stacked = any(name.endswith(STACKED_EXPERTS) for name in stored)
    if is_stacked and any(".experts." in name for name in extra):
        complaints.append("some experts are stacked in one tensor; then all must be")
    if complaints:
        raise ValueError(
            f"the tensors are not those that config.json describes; {'; '.join(complaints)}"
        )


def readable_dtypes(name: str, shape: tuple[int, ...], is_fp8: bool) -> tuple[str, ...]:
    """The dtypes that a tensor may have in a file."""
    if is_fp8 and name.endswith(SCALE):
        return SCALE_DTYPES
    # Only matrices have blocks.
    return (*PLAIN_DTYPES, FP8) if is_fp8 and len(shape) == 2 else PLAIN_DTYPES
