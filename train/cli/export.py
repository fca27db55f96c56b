"""Write a model as a Hugging Face folder, which transformers, vLLM and SGLang load.

    r1zero export --run runs/rl --out models/mine
    r1zero export --run runs/rl --which best --out models/mine --dtype bf16

The folder holds the weights, config.json, the tokenizer and a model card: that of `r1zero card`
(report/card.py), with all settings of the run, and the license and the base that the flags name. Of
paths it names the last part only.

Left out: uploads, GGUF, quantised weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ...eval.console import show
from ...model.checkpoint import Checkpoint, load_adapted, load_checkpoint, weights_digest
from ...model.huggingface import check_free, is_huggingface, write_model
from ...model.lora import LoRAConfig, adapter_tensors
from ...model.peft_folder import write_adapters
from ...model.precision import DTYPES, Precision
from ...model.transformer import Transformer
from ..cost import cost_of, is_run
from ..report.card import body_of, sections_of, shape_in_words
from ..report.measured import measurements
from ..report.run_in_words import folder_of, without_folders
from ..versions import git_commit, package_version
from .eval import load_run, which_of


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as a Hugging Face folder."""

    run: str
    """Folder of the run, of a checkpoint, of a Hugging Face model, or of adapters in PEFT's
    layout."""
    which: str = "last"
    """Which checkpoint of the run to load: last, best, or a step number."""
    out: str
    """Folder to write; there must be none of that name."""
    dtype: str = "fp32"
    """Dtype of the weights in the files: fp32, bf16 or fp16."""
    adapters: bool = False
    """Write the adapters of a run with --lora.rank alone, in fp32 and in PEFT's layout, instead of
    the whole model."""
    base_model: str = ""
    """What the weights were trained from, by its name on the hub, for the model card, and for the
    folder of --adapters, which names the folder of the run's base otherwise."""
    license: str = ""
    """License of the weights, such as apache-2.0, for the model card."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.adapters and self.dtype != "fp32":
            raise ValueError(f"--dtype is {self.dtype}, but adapters are written in fp32; leave it")


# ---- the model card ----


def origin(checkpoint: Checkpoint) -> list[str]:
    """Where the weights come from: what is known of their run, and all of its settings."""
    settings = without_folders(checkpoint.state.get("settings", {}))
    name = folder_of(checkpoint).name
    if not settings:
        return [
            "## Where it comes from",
            "",
            f"The weights of `{name}`, not trained any further.",
            "",
        ]
    text = json.dumps(settings, indent=1)
    facts = sections_of({name: checkpoint})
    return [*facts, "All settings of the run:", "", "```json", text, "```", ""]


def front_matter(config: ExportConfig) -> list[str]:
    """What the hub reads of a card. JSON's strings are YAML's."""
    named = {"base_model": config.base_model, "license": config.license}
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [r1zero]",
        *(f"{key}: {json.dumps(value)}" for key, value in named.items() if value),
        "---",
    ]


def card_of(checkpoint: Checkpoint, model: Transformer, flags: ExportConfig) -> str:
    """The text of a model card."""
    commit = git_commit()
    version = f"r1zero {package_version('r1zero')}" + (f" (commit {commit[:12]})" if commit else "")
    folder = folder_of(checkpoint)
    runs = {folder.name: checkpoint}
    if is_run(folder):
        body = body_of(folder, runs, cost_of(folder))
    else:
        found = measurements(folder, runs)
        body = ["## Measured", "", *(found or ["Nothing on held-out problems.", ""])]
    return "\n".join(
        [
            *front_matter(flags),
            "",
            f"# {Path(flags.out).name}",
            "",
            f"Written by {version}: {shape_in_words(model.config)}.",
            "",
            *origin(checkpoint),
            *body,
        ]
    )


def export(config: ExportConfig) -> None:
    """Write the folder. Raises ValueError for bad flags and for models that cannot be written."""
    out = Path(config.out)
    check_free(out)
    if config.adapters:
        export_adapters(config)
        return
    device, precision = torch.device("cpu"), Precision(torch.float32)
    model, tokenizer, checkpoint = load_run(config.run, config.which, device, precision)
    card = card_of(checkpoint, model, config)
    write_model(out, model, tokenizer, DTYPES[config.dtype], card)
    show(f"written: {out}")


def export_adapters(config: ExportConfig) -> None:
    """Write the adapters of a run. Raises ValueError for a run without."""
    checkpoint = load_checkpoint(config.run, which_of(config.which), groups=("model",))
    lora = checkpoint.state.get("lora")
    if lora is None:
        raise ValueError(
            f"--adapters: {checkpoint.path} holds a whole model; leave the flag out to export it"
        )
    precision = Precision(torch.float32)
    model, _ = load_adapted(checkpoint, torch.device("cpu"), precision)
    name = config.base_model or lora["base"]
    # The base's fingerprint; of one that has adapters itself, also that of its sum.
    trained = adapter_tensors(model)
    frozen = {name: t for name, t in model.state_dict().items() if name not in trained}
    fingerprints = {lora["base_weights"], weights_digest(frozen)}
    write_adapters(config.out, model, LoRAConfig(**lora["config"]), name, fingerprints)
    show(f"written: {config.out}, adapters of {name}")
    if Path(name).is_dir() and not is_huggingface(name):
        show(
            f"peft and vLLM cannot read that base; export it (r1zero export --run {name} "
            "--out DIR), and name the new folder under base_model_name_or_path in "
            "adapter_config.json"
        )
