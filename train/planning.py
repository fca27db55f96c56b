"""Does a run fit a card, with which settings, how long does it take, and what does it cost?

`choose` goes down a ladder of settings, from the fastest to the smallest, and takes the first that
fits; model/memory.py says what each takes. `seconds_per_step` is an estimate from what must be
computed and read, and from the card's published numbers: it can be wrong by a factor of two.

Left out: several cards, and memory of the host that an offloaded reference takes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..model.config import ModelConfig, preset
from ..model.lora import LoRAConfig
from ..model.memory import Prediction, Setup, model_without_memory, predict, smallest_card, usable

GIB = 2**30
MEMORIES = (8, 12, 16, 24, 48, 80, 141)  # GiB of cards that people have
MICRO_TOKENS = (16_384, 8192, 4096, 2048, 1024)
LORA_RANK = 16
FEWEST_ROWS = 1 / 8  # of all answers of a step are sampled at one time, or more; else it crawls


@dataclass(frozen=True)
class Card:
    """What its maker publishes of a GPU: dense 16-bit products with sums in fp32, and memory."""

    memory: int
    """GiB that a program can have: of l4, a10g, a40 and l40s, error correction takes a twelfth."""
    tflops: float
    terabytes_per_second: float


CARDS = {
    "rtx-3060": Card(12, 25, 0.36),
    "rtx-3090": Card(24, 71, 0.94),
    "rtx-4060": Card(8, 30, 0.27),
    "rtx-4080": Card(16, 97, 0.72),
    "rtx-4090": Card(24, 165, 1.01),
    "rtx-5090": Card(32, 209, 1.79),
    "l4": Card(22, 121, 0.30),
    "a10g": Card(22, 70, 0.60),
    "a40": Card(44, 150, 0.70),
    "l40s": Card(44, 362, 0.86),
    "a100": Card(80, 312, 2.04),
    "h100": Card(80, 989, 3.35),
    "h200": Card(141, 989, 4.80),
}
# Shares of the published numbers that a run is taken to reach.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.35, 0.5


@dataclass(frozen=True)
class Work:
    """What one step of GRPO has to do."""

    answers: int
    """Sampled per step."""
    prompt_tokens: int
    new_tokens: int
    """Of each answer; a plan takes them all to be as long as they may be."""
    compares: bool = True
    """Whether the reference's log-probs are computed."""

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Choice:
    """Settings that fit, and what they take."""

    setup: Setup
    predicted: Prediction

    @property
    def rows(self) -> int:
        """Answers that the cache has room for at one time."""
        return max(1, min(self.setup.rows, self.predicted.cache_tokens // self.setup.longest))

    @property
    def flags(self) -> str:
        """The flags of r1zero grpo that say this."""
        setup = self.setup
        flags = [f"--micro-tokens {setup.micro_tokens}"]
        if setup.lora.rank:
            flags.append(f"--lora.rank {setup.lora.rank}")
        if setup.recompute:
            flags.append("--recompute")
        if setup.moments != "fp32":
            flags.append(f"--optim.moments {setup.moments}")
        if setup.reference == "cpu":
            flags.append("--ref-offload")
        if setup.reference == "none":
            flags.append("--loss.kl-coef 0 --kl-samples 0")
        return " ".join(flags)


# ---- the models of the recipes ----

QWEN25 = dict(rope_theta=1e6, qkv_bias=True, max_seq_len=32_768)
SHAPES = {
    "SmolLM2-360M": ModelConfig(
        vocab_size=49_152,
        n_layers=32,
        d_model=960,
        n_heads=15,
        n_kv_heads=5,
        head_dim=64,
        d_ff=2560,
        max_seq_len=8192,
    ),
    "Qwen2.5-0.5B": preset("qwen2.5-0.5b", 151_936),
    "Qwen3-0.6B": preset("qwen3-0.6b", 151_936),
    "OLMo-2-1B": ModelConfig(
        vocab_size=100_352,
        n_layers=16,
        d_model=2048,
        n_heads=16,
        n_kv_heads=16,
        head_dim=128,
        d_ff=8192,
        post_norm=True,
        qk_norm_full_width=True,
        tie_embeddings=False,
        max_seq_len=4096,
    ),
    "Qwen2.5-1.5B": preset("qwen2.5-1.5b", 151_936),
    "Qwen2.5-3B": ModelConfig(
        vocab_size=151_936,
        n_layers=36,
        d_model=2048,
        n_heads=16,
        n_kv_heads=2,
        head_dim=128,
        d_ff=11_008,
        **QWEN25,
    ),
}


# ---- what fits ----


def ladder(setup: Setup) -> Iterator[Setup]:
    """Settings to try, the fastest first. What is asked for in `setup` already, stays."""
    seen = set()
    with_adapters = replace(setup, lora=replace(setup.lora, rank=setup.lora.rank or LORA_RANK))
    smaller = dict(recompute=True, reference="none" if setup.reference == "none" else "cpu")
    rungs = [
        setup,
        replace(setup, recompute=True),
        replace(setup, **smaller),
        replace(setup, **smaller, moments="bf16"),
        with_adapters,
        replace(with_adapters, recompute=True),
    ]
    for rung in rungs:
        if rung.lora.rank:
            rung = replace(rung, reference=setup.reference)  # it shares the weights anyway
        if rung not in seen:
            seen.add(rung)
            yield rung


def micro_sizes(setup: Setup) -> list[int]:
    """Numbers of tokens per micro-batch to try; one holds the longest answer at least."""
    larger = [size for size in MICRO_TOKENS if size > setup.longest]
    return [*larger, setup.longest]


def choose(setup: Setup, total: float) -> Choice | None:
    """The first rung that fits a card of `total` bytes, with the largest micro-batch; or None.

    Settings under which enough answers are sampled at one time come first.
    """
    room = usable(total)
    for fewest in (math.ceil(setup.rows * FEWEST_ROWS), 2):
        for rung in ladder(setup):
            for size in micro_sizes(rung):
                tried = replace(rung, micro_tokens=size)
                choice = Choice(tried, predict(tried, room))
                if choice.predicted.peak <= room and choice.rows >= min(fewest, setup.rows):
                    return choice
    return None


def smallest(setup: Setup) -> tuple[Setup, float]:
    """(the settings that take the least, the bytes of the smallest card that would do)."""
    rungs = [replace(rung, micro_tokens=rung.longest) for rung in ladder(setup)]
    needs = [smallest_card(rung) for rung in rungs]
    least = min(range(len(rungs)), key=needs.__getitem__)
    return rungs[least], needs[least]


def smallest_full(setup: Setup) -> float:
    """Bytes of the smallest card on which all weights can be trained."""
    full = replace(setup, lora=LoRAConfig())
    rungs = [rung for rung in ladder(full) if not rung.lora.rank]
    return min(smallest_card(replace(rung, micro_tokens=rung.longest)) for rung in rungs)


# ---- how long ----


def seconds_per_step(choice: Choice, work: Work, card: Card) -> tuple[float, float]:
    """(sampling, update) of one step, estimated."""
    setup = choice.setup
    model = model_without_memory(setup)
    flops = card.tflops * 1e12 * COMPUTE_SHARE
    bandwidth = card.terabytes_per_second * 1e12 * BANDWIDTH_SHARE

    # 1. Each new token of the rows that run at one time reads all weights, and the rows' cache.
    rounds = work.answers / choice.rows
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2) * setup.dtype.itemsize
    mean_length = work.prompt_tokens + work.new_tokens / 2
    cache = choice.rows * mean_length * model.cache_bytes_per_token
    decoding = rounds * work.new_tokens * (weights + cache) / bandwidth

    # 2. The update: forward is 1, backward 2, or 1 where weights are frozen; once more forward with
    #    --recompute; the reference.
    n_tokens = work.answers * work.longest
    passes = (2 if setup.lora.rank else 3) + setup.recompute + work.compares
    update = passes * n_tokens * model.flops_per_token(work.longest) / flops
    return decoding, update


# ---- in words ----


def gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.1f}"


def gib_needed(n_bytes: float) -> str:
    """Rounded up: a card of what is said does fit."""
    return f"{math.ceil(10 * n_bytes / GIB) / 10:.1f}"


def parts_in_words(predicted: Prediction) -> list[str]:
    """A line for each part that is there, and the peak."""
    lines = [f"  {name:<28} {gib(size):>6} GiB" for name, size in predicted.parts.items() if size]
    return [*lines, f"  {'peak':<28} {gib(predicted.peak):>6} GiB"]


def setting_in_words(setup: Setup) -> str:
    """The settings of a choice, short: for a table."""
    words = [f"LoRA {setup.lora.rank}" if setup.lora.rank else "all weights"]
    if setup.recompute:
        words.append("recompute")
    if setup.reference == "cpu" and not setup.lora.rank:
        words.append("reference on the CPU")
    if setup.moments != "fp32":
        words.append("bf16 moments")
    return ", ".join(words)
