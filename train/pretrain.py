"""Pretraining: next-token prediction on real text, or on the demo's corpus of worked Countdown
attempts.

    r1zero pretrain --run runs/shakespeare --data tinyshakespeare.txt --steps 500
    r1zero pretrain --run runs/base --data countdown --model demo --steps 1000
    r1zero pretrain --run runs/mixed --data books.txt:3 --data code/:1

Real text becomes windows of `seq_len` tokens, the corpus whole documents; `--batch-tokens` of them
make one optimizer step. The last tenth of a real text is held out. At the end it is scored in bits
per byte, which does not depend on the tokenizer, beside a model that only knows how often each
token occurs.

The loop itself is in fit.py. Left out: data too large for memory, sharding.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ..eval.console import show
from ..eval.tasks.assistant import Assistant
from ..eval.tasks.countdown import Countdown
from ..model.balance import BalanceConfig
from ..model.config import preset
from ..model.files import atomic_write_json
from ..model.optimizer import OptimConfig
from ..model.tokenizer import Tokenizer
from ..model.transformer import (
    Transformer,
    count_active_parameters,
    count_parameters,
    flops_per_token,
)
from .batches import DocumentBatches, TokenStream, tail_batches
from .compute_flags import ComputeFlags
from .data import encode_documents, is_jsonl, read_documents, split_tail, text_files
from .fit import fit
from .inputs import Inputs, file_parts
from .machine import pick_device, reuse_memory
from .mixture import MixedOrder, check_different, parse_sources, parts_of, weights_input
from .recipes import minimal_text, r1_corpus
from .recipes.demo_corpus import CorpusConfig, documents, words
from .recipes.r1_corpus import AuthorsConfig
from .run import Run, RunConfig, at_least

MADE_HERE = ("countdown", "minimal", "assistant")  # a --data that stands for the corpus of a recipe
TAIL_BATCH = 16  # windows of held-out text that are scored at a time


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(ComputeFlags, RunConfig):
    """Pretrain a model from random weights."""

    # Compared by content on resume. (skip_bad decides whether data is refused, never what is read.)
    PATHS: ClassVar[tuple[str, ...]] = ("data", "tokenizer")
    FREE: ClassVar[tuple[str, ...]] = ("skip_bad",)

    data: tuple[str, ...]
    """Text files, .jsonl files (field `text`) or folders of them. A number behind one, as in
    books.txt:3 code:1, is its share of the windows of text. A single word stands for the corpus of
    a recipe: countdown for the demo's, minimal for that of the smallest recipe, assistant for that
    of r1zero r1."""
    skip_bad: bool = False
    """Go on without the lines of .jsonl files that are bad, and say how many there are."""
    tokenizer: str = "bpe"
    """Tokenizer for real text: bpe (trained on the data), bytes, or a .tiktoken file of ranks. The
    corpus of a recipe brings its own."""
    vocab_size: int = 1024
    """Size of the vocabulary, where the tokenizer is trained."""
    model: str = "demo"
    """Size of the model: a preset (demo and tiny, with room for 256 tokens; demo-moe and tiny-moe,
    the same with experts; qwen2.5-0.5b, ...) or depth=N, with room for 512."""
    seq_len: int = 128
    """Number of tokens in a window of real text."""
    batch_tokens: int = 2048
    """Number of tokens in one optimizer step."""
    micro_tokens: int = 2048
    """Number of tokens per forward and backward pass. It changes memory and speed, nothing else; in
    a model with experts, also what their auxiliary loss is measured on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    task: Countdown = field(default_factory=Countdown)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    authors: AuthorsConfig = field(default_factory=AuthorsConfig)
    documents: int = 50_000
    """Number of documents in the corpus of a recipe."""
    tail_share: float = 0.1
    """Share of a real text that is held out, at its end."""
    seed: int = 0
    """Seed of the weights, the corpus and the order of batches."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        ComputeFlags.__post_init__(self)
        at_least(self, 1, "seq_len", "batch_tokens", "micro_tokens", "documents", "vocab_size")
        at_least(self, 0, "seed")
        if not 0 < self.tail_share < 1:
            raise ValueError(
                f"--tail-share is {self.tail_share}, expected more than 0 and "
                "less than 1, such as 0.1"
            )
        if self.skip_bad and self.is_made_here:
            raise ValueError(
                f"--skip-bad is for text from files, and {self.data[0]} is made here; leave it out"
            )
        # An unknown preset is refused now, not after the data is made.
        preset(self.model, self.vocab_size)

    @property
    def is_made_here(self) -> bool:
        """Whether the text is the corpus of a recipe."""
        return len(self.data) == 1 and self.data[0] in MADE_HERE


# ---- what to train on ----


def make_tokenizer(name: str, texts: list[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that --tokenizer names; `texts` and `vocab_size` are to train one."""
    if name == "bytes":
        return Tokenizer.bytes()
    if name == "bpe":
        return Tokenizer.train(texts, vocab_size)
    return Tokenizer.from_ranks_file(name)


def corpus_batches(config: PretrainConfig) -> tuple[Tokenizer, DocumentBatches]:
    """The tokenizer of a recipe, and its corpus as batches."""
    if config.data == ("minimal",):
        tokenizer = Tokenizer.from_words(minimal_text.words())
        texts = minimal_text.documents(config.documents, config.seed)
    elif config.data == ("assistant",):
        puzzles = config.task
        task = Assistant(
            n_numbers=puzzles.n_numbers, high=puzzles.high, ops=puzzles.ops, seed=puzzles.seed
        )
        tokenizer = Tokenizer.from_words(r1_corpus.words(task))
        texts = r1_corpus.documents(task, config.documents, config.authors, config.seed)
    else:
        tokenizer = Tokenizer.from_words(words(config.task))
        texts = documents(config.task, config.documents, config.corpus, config.seed)
    ids = encode_documents(tokenizer, texts)
    max_seq_len = preset(config.model, tokenizer.vocab_size).max_seq_len
    return tokenizer, DocumentBatches(ids, config.batch_tokens, max_seq_len, config.seed)


def text_batches(
    config: PretrainConfig,
) -> tuple[Tokenizer, TokenStream | DocumentBatches, np.ndarray]:
    """Tokenizer, training windows and held-out tail of a real text.

    The end of each source of a mixture is held out; without weights, the end of all the text.
    """
    # 1. The sources that are mixed, or one that all files make together.
    sources = parse_sources(config.data)
    parts = parts_of(sources)
    groups = [[source.path] for source in sources]
    if parts is None:
        groups = [[source.path for source in sources]]
    texts = [read_documents(group, config.skip_bad) for group in groups]

    # 2. The tokenizer is trained on the training part only, or the tail would not be held out.
    shares = [first_share(each, 1 - config.tail_share) for each in texts]
    training_texts = [text for share in shares for text in share]
    tokenizer = make_tokenizer(config.tokenizer, training_texts, config.vocab_size)

    # 3. The windows.
    tokens = [np.concatenate(encode_documents(tokenizer, each)) for each in texts]
    halves = [split_tail(each, config.tail_share) for each in tokens]
    tail = np.concatenate([tail for _, tail in halves])
    if parts is None:
        [(train, _)] = halves
        batch_size = max(1, config.batch_tokens // config.seq_len)
        return tokenizer, TokenStream(train, config.seq_len, batch_size, config.seed), tail
    return tokenizer, mixed_windows(config, [train for train, _ in halves], parts), tail


def mixed_windows(
    config: PretrainConfig, texts: list[np.ndarray], parts: list[int]
) -> DocumentBatches:
    """The windows of several texts, mixed: each of seq_len tokens and the target behind its last.

    Raises ValueError for a text that is shorter than that.
    """
    length = config.seq_len + 1
    windows, sizes = [], []
    for number, tokens in enumerate(texts, 1):
        # Two windows that follow each other share a token: the last target of the first.
        starts = range(0, len(tokens) - config.seq_len, config.seq_len)
        if not starts:
            raise ValueError(
                f"source {number} of --data has {len(tokens)} tokens to train on, but one sequence "
                f"of --seq-len {config.seq_len} needs {length}; give more text or a smaller "
                "--seq-len"
            )
        windows += [tokens[start : start + length] for start in starts]
        sizes.append(len(starts))
    batch_tokens = max(config.batch_tokens, config.seq_len)
    order = MixedOrder(sizes, parts, config.seed)
    return DocumentBatches(windows, batch_tokens, config.seq_len, config.seed, order=order)


def first_share(texts: list[str], share: float) -> list[str]:
    """The beginning of the texts: `share` of all their characters."""
    left = int(sum(len(text) for text in texts) * share)
    kept = []
    for text in texts:
        kept.append(text[:left])
        left = max(0, left - len(text))
    return kept


def inputs_of(config: PretrainConfig) -> Inputs:
    """What the run depends on: the content of its files, and whether they are read line by line.

    (The flags say all about the corpus of a recipe.)
    """
    if config.is_made_here:
        return {"data": [[config.data[0], "by its flags"]]}
    sources = parse_sources(config.data)
    files = [file for source in sources for file in text_files(Path(source.path))]
    if parts_of(sources):
        check_different(files)
    kinds = [[str(file), "lines" if is_jsonl(file) else "text"] for file in files]
    return {
        "data": file_parts(files),
        "kind of data": kinds,
        "data weights": weights_input(sources),
    }


# ---- how well a held-out text is predicted ----


@torch.inference_mode()
def bits_per_byte(model: Transformer, tail: np.ndarray, n_bytes: int, seq_len: int) -> float:
    """Cross-entropy of a held-out text in bits per byte: comparable across tokenizers.

    tail: its tokens, of which the first is not predicted; n_bytes: bytes of the others.
    """
    device = model.embed.device
    nats = 0.0
    for batch in tail_batches(tail, seq_len, TAIL_BATCH):
        hidden_TM = model.hidden_states(batch.inputs.to(device))
        logp_T, _ = model.logprobs(hidden_TM, batch.targets.to(device))
        nats -= float(logp_T.cpu().double().sum())
    return nats / math.log(2) / n_bytes


def unigram_bits_per_byte(
    train: np.ndarray, tail: np.ndarray, n_bytes: int, vocab_size: int
) -> float:
    """Bits per byte if each token of `tail` is predicted by its frequency in `train`.

    One is added to each count. To compare with a model, give the tokens that it predicts, tail[1:],
    and `tokenizer.count_bytes` of those. Raises ValueError for a tail without a byte of text.
    """
    if n_bytes < 1:
        raise ValueError(
            f"the held-out tail has {n_bytes} bytes of text; give more text or hold out a "
            "larger share"
        )
    counts_V = np.bincount(train, minlength=vocab_size) + 1.0
    assert len(counts_V) == vocab_size, "tokens of another vocabulary"
    assert tail.max(initial=0) < vocab_size, "tokens of another vocabulary"
    bits_V = -np.log2(counts_V / counts_V.sum())
    return float(bits_V[tail].sum() / n_bytes)


# ---- the command ----


def pretrain(config: PretrainConfig) -> Transformer:
    """Run the loop; returns the trained model.

    Raises ValueError for bad flags or data, FloatingPointError for a loss that is not finite, and
    Stopped after Ctrl-C.
    """
    reuse_memory()
    device = pick_device(config.device)
    precision = config.precision(device)
    run = Run(config, "pretrain")

    # 1. What to train on: the corpus of a recipe, or a real text with its end held out.
    tail = None
    if config.is_made_here:
        tokenizer, batches = corpus_batches(config)
    else:
        tokenizer, batches, tail = text_batches(config)
        # Before the training: a tail without text is refused here.
        n_bytes = tokenizer.count_bytes(tail[1:])
        unigram = unigram_bits_per_byte(batches.tokens, tail[1:], n_bytes, tokenizer.vocab_size)

    run.check_inputs(inputs_of(config))

    # 2. A model with random weights, as large as the preset and the vocabulary say.
    model_config = preset(config.model, tokenizer.vocab_size)
    model = Transformer(model_config, precision.dtype, precision.fp32_head)
    model.init_weights(config.seed).to(device)
    model.recomputes = config.recompute
    n_active, active = count_active_parameters(model_config), ""
    if model_config.moe:
        active = f"{n_active:,} of them active per token, "
    show(
        f"model {config.model}: {count_parameters(model_config):,} parameters, {active}"
        f"vocabulary {tokenizer.vocab_size:,}, "
        f"{flops_per_token(model_config, config.seq_len, True) / 1e6:.1f} MFLOPs per training token"
    )

    run.check_model(model, tokenizer)

    # 3. Train it.
    with run:
        fit(run, model, tokenizer, batches, config)

    # 4. Score the held-out text. The result goes to a file before it is shown.
    if tail is not None:
        bits = bits_per_byte(model, tail, n_bytes, config.seq_len)
        result = {"bytes": n_bytes, "bits_per_byte": bits, "unigram_bits_per_byte": unigram}
        atomic_write_json(run.folder / "held_out.json", result)
        show(
            f"held-out tail of {n_bytes:,} bytes: {bits:.3f} bits per byte; a unigram "
            f"model reaches {unigram:.3f}"
        )
    return model
