"""Supervised fine-tuning on prompt/response pairs: the loss is on the response and its end token, never on
the prompt.

    r1zero sft --run runs/chat --base runs/shakespeare --data pairs.jsonl --steps 100

Left out: chat templates and multi-turn conversations; a pair is trained as it stands, prompt then response.
"""

from dataclasses import dataclass, field

from ..model.checkpoint import load_model
from ..model.optimizer import OptimConfig
from .data import DocumentBatches, encode_pairs, read_pairs
from .pretrain import fit
from .run import Run, RunConfig, pick_device, reuse_memory


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Fine-tune a model on pairs."""

    base: str
    """Folder of the run (or checkpoint) to start from."""
    data: str
    """A .jsonl file with the fields prompt and response."""
    batch_tokens: int = 1024
    """Most tokens in one optimizer step; whole pairs only."""
    micro_tokens: int = 2048
    """Tokens in one forward and backward pass; changes memory and speed, not the result."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-3, warmup=5, weight_decay=0.0)
    )
    seed: int = 0
    """Of the order of the pairs."""

    def __post_init__(self):
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, expected 0 or more")
        if self.batch_tokens < 1 or self.micro_tokens < 1:
            raise ValueError(
                f"--batch-tokens is {self.batch_tokens} and --micro-tokens {self.micro_tokens}, "
                "expected 1 or more"
            )


def sft(c: SFTConfig):
    """Run the loop; returns the model. Raises ValueError for bad flags or data."""
    reuse_memory()
    model, tokenizer, _ = load_model(c.base, pick_device(c.device))
    ids, prompt_lengths = encode_pairs(tokenizer, read_pairs(c.data))
    batches = DocumentBatches(ids, c.batch_tokens, model.config.max_seq_len, c.seed, prompt_lengths)
    with Run(c, "sft") as run:
        fit(run, model, tokenizer, batches, c)
    return model
