"""Supervised fine-tuning on conversations, with the loss on what the assistant says.

    r1zero sft --run runs/chat --base runs/shakespeare --data pairs.jsonl --steps 100
    r1zero sft --run runs/chat --base runs/base --data reasoning.jsonl:3 --data general.jsonl:1

The loop itself is in fit.py, the same as in pretraining. A target that is part of a prompt has
weight 0; the tokens of a response and its end token have weight 1. conversations.py says what a
file may hold, and how a conversation becomes tokens.

Left out: tools, and thoughts that a template keeps apart from an answer.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import tyro

from ..eval.console import say
from ..model.balance import BalanceConfig
from ..model.checkpoint import load_model
from ..model.lora import LoRAConfig
from ..model.optimizer import OptimConfig
from ..model.transformer import Transformer
from .adapters import default_optim, loading_device
from .batches import DocumentBatches
from .compute_flags import ComputeFlags
from .conversations import (
    cut_off_in,
    encode_chats,
    encode_conversations,
    read_chats,
    read_conversations,
)
from .fit import fit
from .inputs import base_parts, file_parts
from .machine import pick_device, reuse_memory
from .mixture import MixedOrder, parse_sources, parts_of, weights_input
from .run import Run, RunConfig, at_least


@dataclass(frozen=True, kw_only=True)
class SFTConfig(ComputeFlags, RunConfig):
    """Fine-tune a model on pairs or conversations."""

    # Compared by content on resume. (skip_bad decides whether data is refused, never what is read.)
    PATHS: ClassVar[tuple[str, ...]] = ("base", "data")
    FREE: ClassVar[tuple[str, ...]] = ("skip_bad",)

    base: str
    """Folder of the run, checkpoint, Hugging Face model or adapters in PEFT's layout to start
    from."""
    data: tuple[str, ...]
    """The .jsonl files whose lines have the fields prompt and response, or the field messages: a
    list of objects with role (system, user or assistant) and content. Texts are trained on as they
    stand, or with --chat through the chat template: without it a line break joins system and user
    messages that follow each other, and the end token follows each assistant's. A number behind a
    file, as in a.jsonl:3 b.jsonl:1, is its share of the conversations."""
    chat: bool = False
    """Put each conversation through the model's chat template."""
    skip_bad: bool = False
    """Go on without the lines of the data that are bad, and say how many there are."""
    batch_tokens: int = 1024
    """Maximum number of tokens in one optimizer step. Conversations are never cut."""
    micro_tokens: int = 2048
    """Number of tokens per forward and backward pass. It changes memory and speed, nothing else; in
    a model with experts, also what their auxiliary loss is measured on."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, warmup=5, weight_decay=0.0)
    )
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    seed: int = 0
    """Seed of the order of the conversations."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ComputeFlags.__post_init__(self)
        at_least(self, 1, "batch_tokens", "micro_tokens")
        at_least(self, 0, "seed")

    @classmethod
    def defaults_of(cls, flags: list[str]) -> "SFTConfig":
        """The defaults of the command line: with --lora.rank, the learning rate times 10."""
        defaults = cls(run=tyro.MISSING, base=tyro.MISSING, data=tyro.MISSING)
        return replace(defaults, optim=default_optim(flags, defaults.optim))


def sft(config: SFTConfig) -> Transformer:
    """Run the loop; returns the trained model.

    Raises ValueError for bad flags or data, and Stopped after Ctrl-C.
    """
    reuse_memory()
    device = pick_device(config.device)
    precision = config.precision(device)
    run = Run(config, "sft")
    sources = parse_sources(config.data)
    parts = parts_of(sources)
    model, tokenizer, base = load_model(
        config.base, loading_device(config.lora, device), precision=precision
    )
    model.recomputes = config.recompute
    run.check_inputs(
        {
            "base": base_parts(base, tokenizer),
            "data": file_parts([Path(source.path) for source in sources]),
            "data weights": weights_input(sources),
        }
    )
    run.check_model(model, tokenizer)
    run.adapt(model, base)
    model.to(device)
    if config.lora.rank:  # what is no adapter stays, the bias of a mixture's balance too
        config = replace(config, balance=replace(config.balance, bias_rate=0.0))
    # Lines of the data to conversations, and those to tokens: as they stand, or by the template.
    read, encode = read_conversations, encode_conversations
    if config.chat:
        read, encode = read_chats, encode_chats
    files = [read(source.path, config.skip_bad) for source in sources]
    for source, file in zip(sources, files, strict=True):
        if n_cut_off := cut_off_in(source.path):
            say(
                f"{source.path}: {n_cut_off:,} of {len(file):,} answers were cut off at the limit "
                "of tokens, and an end token follows them all the same, which teaches to stop in "
                "mid-thought; r1zero collect --keep finished leaves such out"
            )
    documents, trained = encode(tokenizer, [each for file in files for each in file])
    order = MixedOrder([len(file) for file in files], parts, config.seed) if parts else None
    batches = DocumentBatches(
        documents,
        config.batch_tokens,
        model.config.max_seq_len,
        config.seed,
        trained,
        order,
    )
    with run:
        fit(run, model, tokenizer, batches, config)
    return model
