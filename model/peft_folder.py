"""Folders of adapters in PEFT's layout, which peft, vLLM and SGLang load.

    write_adapters("out", model, "Qwen/Qwen2.5-0.5B")     a model with adapters (lora.py)
    folder_of_base("out")                                 the base that they are for
    merge_folder("out", model)                            W + s B A of a folder, into a plain model

    adapter_config.json           rank, alpha, which matrices, and the name of the base
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight [r, n_in], .lora_B.weight
    r1zero_base.json              fingerprints of the base's weights; PEFT's own folders have none

PEFT loads a folder with wrong names, half a pair or another scale with a warning, if that, and
computes something else. Here each of these is an error, which lists all that is wrong.

Left out: what is not plain LoRA (DoRA, biases, ranks that vary, embeddings, stacked experts).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .config_experts import is_latent
from .config_json import family_of
from .families import FAMILIES
from .files import atomic_write_json, new_folder
from .huggingface import check_free
from .lora import LoRAConfig, adapters_of
from .transformer import Transformer
from .weight_files import named, opened, read_json
from .weight_map import Part, names_of, parts_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "r1zero_base.json"  # apart, since peft may refuse a key that it does not know
PREFIX = "base_model.model."
# Keys of adapter_config.json that are read, or change nothing once the adapters are trained. All
# others belong to another method, or will: they must be empty.
HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config"),
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_config", "megatron_core", "eva_config", "qalora_group_size"),
    "init_lora_weights",
}
EMPTY = (None, False, "none", [], {})
# Ways to begin that leave the base as it is.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds adapters in PEFT's layout."""
    try:
        return (Path(folder) / CONFIG).is_file()
    except OSError:
        return False


def matrices_of(model: Transformer) -> dict[str, list[Part]]:
    """{our parameter: the matrices of a Hugging Face model that lie in it}, weights only."""
    family = FAMILIES[family_of(model.config)]
    with torch.device("meta"):
        plain = Transformer(model.config)
    parts = parts_of(plain, names_of(family, model.config), is_latent(family))
    matrices: dict[str, list[Part]] = {}
    for part in parts:
        if len(part.shape) == 2 and part.parameter != "embed":
            matrices.setdefault(part.parameter, []).append(part)
    return matrices


def key_of(part: Part, letter: str) -> str:
    """The name of a matrix's A or B in a file."""
    return f"{PREFIX}{part.name.removesuffix('weight')}lora_{letter}.weight"


# ---- writing ----


def write_adapters(
    folder: str | Path,
    model: Transformer,
    lora: LoRAConfig,
    base_name: str,
    base_weights: Iterable[str] = (),
) -> None:
    """Write the adapters of a model, in fp32. base_name: its base, a folder or a name of the hub.

    base_weights: fingerprints of the base's weights, any of which a reader may find.
    Raises ValueError for a folder that holds something, and for a model without adapters.
    """
    folder = Path(folder)
    check_free(folder)
    adapted = adapters_of(model)
    if not adapted:
        raise ValueError("the model has no adapters; export it whole (without --adapters)")
    is_mixture = model.config.moe or model.config.latent  # DeepSeek's classes all count as one
    if is_mixture and any(".mlp." in name for name in adapted):
        raise ValueError(
            "peft (0.21) takes adapters of a mixture's dense or shared MLPs for those of its "
            "experts; export the whole model (without --adapters), or train with --lora.layers "
            "attention"
        )
    # 1. The adapters of each matrix, under its name in the family.
    tensors, targets = {}, set()
    for parameter, parts in matrices_of(model).items():
        module = adapted.get(parameter.removesuffix(".weight"))
        if module is None:
            continue
        for part, A in zip(parts, module.lora_A, strict=True):
            tensors[key_of(part, "A")] = A
            B = module.lora_B[part.index]
            tensors[key_of(part, "B")] = B if part.order is None else B[part.order]
            targets.add(part.name.removesuffix(".weight").rpartition(".")[2])
    # 2. What they are multiplied by, and what they are for.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as unfinished:
        ready = {name: tensor.detach().cpu().float().clone() for name, tensor in tensors.items()}
        save_file(ready, unfinished / WEIGHTS, metadata={"format": "pt"})
        atomic_write_json(unfinished / CONFIG, config)
        if base_weights:
            known = {"base": base_name, "weights": sorted(base_weights)}
            atomic_write_json(unfinished / BASE, known)


# ---- reading ----


def folder_of_base(folder: str | Path) -> Path:
    """The folder of the base of these adapters. Raises ValueError if it is not on this machine."""
    folder = Path(folder)
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    candidates = [Path(name), folder / name] if isinstance(name, str) and name else []
    for candidate in candidates:
        if is_peft(candidate):
            raise ValueError(
                f"{folder} holds adapters of {candidate}, which holds adapters itself; export that "
                "one as a whole model (r1zero export), and name it in "
                f"{folder / CONFIG} under base_model_name_or_path"
            )
        if candidate.is_dir():
            return candidate
    if not candidates:
        raise ValueError(
            f"{folder / CONFIG} names no base; put its path there, under base_model_name_or_path"
        )
    raise ValueError(
        f"{folder} holds adapters of {name!r}, which is no folder here; models are not fetched by "
        f"name: put the path of the base into {folder / CONFIG}, under base_model_name_or_path"
    )


def base_in(folder: str | Path) -> dict:
    """{"base": its name, "weights": fingerprints} of the base that a folder was written for; no
    fingerprints in a folder of others. Raises ValueError for a damaged file."""
    path = Path(folder) / BASE
    if not path.exists():
        return {"base": "", "weights": []}
    known = read_json(path)
    if not isinstance(known.get("base"), str) or not isinstance(known.get("weights"), list):
        raise ValueError(f"{path} is damaged; take it anew from the folder's source, or remove it")
    return known


def scale_in(path: Path) -> tuple[float, int]:
    """(what B A is multiplied by, the rank). Raises ValueError for what is not plain LoRA."""
    config = read_json(path)
    complaints = [
        f"{key} is {value!r}, which plain LoRA has not"
        for key, value in config.items()
        if key not in HARMLESS and value not in EMPTY
    ]
    init = config.get("init_lora_weights")
    if init not in PLAIN_INITS:
        complaints.append(f"init_lora_weights is {init!r}, which changes the base")
    if config.get("peft_type") != "LORA":
        complaints.append(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)  # PEFT's default
    if not (isinstance(rank, int) and rank > 0):
        complaints.append(f"r is {rank!r}, expected a whole number above 0")
    if not (isinstance(alpha, int | float) and 0 < alpha < float("inf")):
        complaints.append(f"lora_alpha is {alpha!r}, expected a number above 0")
    if complaints:
        raise ValueError(f"{path} has adapters that are not read: {'; '.join(complaints)}")
    return LoRAConfig(rank, float(alpha), rslora=bool(config.get("use_rslora"))).scale, rank


def adapters_in(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder. Raises ValueError for a damaged file."""
    if not (Path(folder) / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS}; take all files of the adapters")
    with opened(Path(folder) / WEIGHTS) as file:
        return {key.replace(".default.", "."): file.get_tensor(key) for key in file.keys()}


@torch.no_grad()
def merge_folder(folder: str | Path, model: Transformer) -> None:
    """Add the adapters of a folder to the weights of a plain model, in place.

    Raises ValueError, and then no weight has changed, for adapters of another model, half a pair,
    numbers that are not finite, and adapters of a head that is the embedding.
    """
    path = Path(folder) / WEIGHTS
    scale, rank = scale_in(Path(folder) / CONFIG)
    tensors = adapters_in(folder)

    # 1. Which matrix has which pair? All complaints come together.
    expected, places = {}, []
    for parameter, parts in matrices_of(model).items():
        for part in parts:
            A, B = key_of(part, "A"), key_of(part, "B")
            n_out, n_in = part.shape
            if A in tensors or B in tensors:
                expected |= {A: (rank, n_in), B: (n_out, rank)}
                places.append((parameter, part, A, B))
    check_adapters(path, tensors, expected)

    # 2. W + s B A.
    parameters = dict(model.named_parameters())
    for parameter, part, A, B in places:
        update = tensors[B].float() @ tensors[A].float()
        if part.order is not None:
            update = update[part.order.argsort()]
        parameters[parameter][part.index] += (scale * update).to(parameters[parameter])


def check_adapters(path: Path, tensors: dict, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError, listing all that is wrong, unless these are the expected tensors."""
    both = [key for key in expected if key in tensors]
    kinds = {
        "missing": [key for key in expected if key not in tensors],
        "of no matrix of this model": [key for key in tensors if key not in expected],
        "of another shape": [key for key in both if tuple(tensors[key].shape) != expected[key]],
        "not finite": [key for key in both if not torch.isfinite(tensors[key]).all()],
    }
    complaints = [f"{len(keys)} {what}: {named(keys)}" for what, keys in kinds.items() if keys]
    if not tensors:
        complaints.append("it holds no adapter")
    if complaints:
        raise ValueError(
            f"{path} does not fit its base; {'; '.join(complaints)}. Names are "
            f"{PREFIX}<module>.lora_A.weight, and .lora_B.weight"
        )
