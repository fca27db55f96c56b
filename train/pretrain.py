"""Pretraining: next-token prediction on real text, or on the demo's corpus of worked Countdown attempts.

    r1zero pretrain --run runs/shakespeare --data tinyshakespeare.txt --steps 500
    r1zero pretrain --run runs/base --data countdown --model demo --steps 1000

Real text becomes windows of `seq_len` tokens, the corpus whole documents; `--batch-tokens` of them make one
optimizer step. The last tenth of a real text is held out and scored in bits per byte, which does not depend
on the tokenizer, beside what a model that knows only how often each token occurs would reach.

Left out: data too large for memory, mixing of sources, sharding.
"""

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from ..eval.tasks.countdown import Countdown
from ..kernels.linear_logprob import check_targets
from ..model.config import preset
from ..model.optimizer import OptimConfig, learning_rate, make_optimizer, optimizer_step
from ..model.packed import Packed
from ..model.tokenizer import Tokenizer
from ..model.transformer import Transformer, count_parameters, flops_per_token
from .data import (
    Batch,
    DocumentBatches,
    TokenStream,
    encode_documents,
    read_documents,
    split_tail,
    tail_batches,
    unigram_bits_per_byte,
)
from .recipes.demo_corpus import CorpusConfig, documents, words
from .run import Run, RunConfig, pick_device, reuse_memory


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Pretrain a model from random weights."""

    data: tuple[str, ...]
    """Text files, .jsonl files (field `text`) or folders of them; or the word countdown for the demo's
    corpus."""
    tokenizer: str = "bpe"
    """bpe (trained on the data), bytes, or a .tiktoken file of ranks. The corpus brings its own."""
    vocab_size: int = 1024
    """Size of the trained vocabulary."""
    model: str = "demo"
    """A preset (demo, tiny, qwen2.5-0.5b, ...) or depth=N."""
    seq_len: int = 128
    """Tokens in a window of real text."""
    batch_tokens: int = 2048
    """Tokens in one optimizer step."""
    micro_tokens: int = 2048
    """Tokens in one forward and backward pass; changes memory and speed, not the result."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    task: Countdown = field(default_factory=Countdown)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    documents: int = 50_000
    """Documents in the corpus."""
    tail_share: float = 0.1
    """Share of a real text that is held out, at its end."""
    seed: int = 0
    """Of the weights, the corpus and the order of batches."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("seq_len", "batch_tokens", "micro_tokens", "documents", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
                )
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, expected 0 or more")
        if not 0 < self.tail_share < 1:
            raise ValueError(
                f"--tail-share is {self.tail_share}, expected more than 0 and "
                "less than 1, such as 0.1"
            )
        preset(
            self.model, self.vocab_size
        )  # an unknown name is told now, not after the data is made


def split_batch(batch: Batch, micro_tokens: int):
    """Cut a batch between sequences into micro-batches of at most `micro_tokens` (but at least one
    sequence)."""
    if len(batch.targets) <= micro_tokens:
        yield batch
        return
    ends = batch.inputs.cu_seqlens.numpy()
    first = 0
    while first < len(ends) - 1:
        last = int(np.searchsorted(ends, ends[first] + micro_tokens, side="right")) - 1
        last = max(last, first + 1)
        a, b = int(ends[first]), int(ends[last])
        cu = batch.inputs.cu_seqlens[first : last + 1] - a
        packed = Packed(
            batch.inputs.tokens[a:b], batch.inputs.positions[a:b], cu, int(cu.diff().max())
        )
        yield Batch(packed, batch.targets[a:b], batch.weight[a:b])
        first = last


def train_step(model, optimizer, batch: Batch, lr: float, optim: OptimConfig, micro_tokens: int):
    """One optimizer step. Returns (mean loss in nats over the weighted tokens, gradient norm), as floats.

    The mean's denominator is the whole batch's, so the gradient does not depend on `micro_tokens`.
    """
    device, denominator, total = model.embed.device, float(batch.weight.sum()), 0.0
    check_targets(batch.targets, model.config.vocab_size)
    for part in split_batch(batch, micro_tokens):
        # what predicts a token of a prompt is left out before the head's matrix products
        rows = None if part.weight.all() else part.weight.nonzero().flatten()
        targets, weight = (
            (part.targets, part.weight) if rows is None else (part.targets[rows], part.weight[rows])
        )
        logp, _ = model.logprobs(
            model.hidden_states(part.inputs.to(device)),
            targets.to(device),
            rows=None if rows is None else rows.to(device),
        )
        loss = -(logp * weight.to(device)).sum() / denominator
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        return total, math.nan
    return total, optimizer_step(model, optimizer, lr, optim)


def fit(run: Run, model: Transformer, tokenizer: Tokenizer, batches, c) -> None:
    """The loop that pretrain and sft share: `batches.batch(step)` is the data of a step, so resuming needs no
    more."""
    optimizer = make_optimizer(model, c.optim)
    run.restore(model, tokenizer, optimizer)
    tokens, started = 0, time.perf_counter()
    for step in run.steps():
        batch = batches.batch(step)
        lr = learning_rate(step, c.steps, c.optim)
        loss, norm = train_step(model, optimizer, batch, lr, c.optim, c.micro_tokens)
        run.check_finite(step, model, loss=loss, gradient_norm=norm)
        tokens += len(batch.targets)
        speed = tokens / (time.perf_counter() - started)
        run.log(
            step,
            {
                "loss": loss,
                "gradient_norm": norm,
                "lr": lr,
                "tokens": len(batch.targets),
                "tokens_per_s": speed,
            },
            show=("loss", "tokens_per_s"),
        )
        if run.due(step, c.save_every):
            run.save(step, model, tokenizer, optimizer)


@torch.inference_mode()
def bits_per_byte(model: Transformer, tail: np.ndarray, n_bytes: int, seq_len: int) -> float:
    """Cross-entropy of a held-out text in bits per byte: comparable across tokenizers."""
    nats = 0.0
    for batch in tail_batches(tail, seq_len, 16):
        device = model.embed.device
        hidden = model.hidden_states(batch.inputs.to(device))
        logp, _ = model.logprobs(hidden, batch.targets.to(device))
        nats -= float(logp.double().sum())
    return nats / math.log(2) / n_bytes


def make_tokenizer(name: str, texts: list[str], vocab_size: int) -> Tokenizer:
    if name == "bytes":
        return Tokenizer.bytes()
    if name == "bpe":
        return Tokenizer.train(texts, vocab_size)
    return Tokenizer.from_ranks_file(name)


def corpus_batches(c: PretrainConfig) -> tuple[Tokenizer, DocumentBatches]:
    """The demo's tokenizer and its corpus as batches."""
    tokenizer = Tokenizer.from_words(words(c.task))
    texts = documents(c.task, c.documents, c.corpus, c.seed)
    ids = encode_documents(tokenizer, texts)
    max_seq_len = preset(c.model, tokenizer.vocab_size).max_seq_len
    return tokenizer, DocumentBatches(ids, c.batch_tokens, max_seq_len, c.seed)


def first_share(texts: list[str], share: float) -> list[str]:
    """The beginning of the texts, `share` of their characters."""
    left, kept = int(sum(len(text) for text in texts) * share), []
    for text in texts:
        kept.append(text[:left])
        left = max(0, left - len(text))
    return kept


def text_batches(c: PretrainConfig) -> tuple[Tokenizer, TokenStream, np.ndarray]:
    """Tokenizer, training windows and held-out tail of real text; the tokenizer is trained on the training
    part."""
    texts = read_documents(c.data)
    tokenizer = make_tokenizer(c.tokenizer, first_share(texts, 1 - c.tail_share), c.vocab_size)
    train, tail = split_tail(np.concatenate(encode_documents(tokenizer, texts)), c.tail_share)
    return (
        tokenizer,
        TokenStream(train, c.seq_len, max(1, c.batch_tokens // c.seq_len), c.seed),
        tail,
    )


def pretrain(c: PretrainConfig) -> Transformer:
    """Run the loop. Raises ValueError for bad flags or data, FloatingPointError for a loss that is not
    finite."""
    reuse_memory()
    device, tail = pick_device(c.device), None
    if c.data == ("countdown",):
        tokenizer, batches = corpus_batches(c)
    else:
        tokenizer, batches, tail = text_batches(c)
    config = preset(c.model, tokenizer.vocab_size)
    model = Transformer(config, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.init_weights(c.seed).to(device)
    print(
        f"model {c.model}: {count_parameters(config):,} parameters, vocabulary {tokenizer.vocab_size:,}, "
        f"{flops_per_token(config, c.seq_len, True) / 1e6:.1f} MFLOPs a training token"
    )
    with Run(c, "pretrain") as run:
        fit(run, model, tokenizer, batches, c)
    if tail is not None:
        n_bytes = tokenizer.count_bytes(tail[1:])
        unigram = unigram_bits_per_byte(batches.tokens, tail[1:], n_bytes, tokenizer.vocab_size)
        bits = bits_per_byte(model, tail, n_bytes, c.seq_len)
        print(
            f"held-out tail of {n_bytes:,} bytes: {bits:.3f} bits per byte; a unigram "
            f"model reaches {unigram:.3f}"
        )
    return model
