"""The log-prob without logits against materialised logits, on a CPU: time, and memory over tokens.

    python -m benchmarks.linear_logprob                       about three minutes
    python -m benchmarks.linear_logprob --picture memory.png --out linear_logprob.json

Forward and backward of the sum of all log-probs at T tokens, d_model M, vocabulary V, fp32, both sides in one
process, in turns. Memory is the most that PyTorch's allocator held at one time beyond the inputs, minus the
results that both must give (dh and dw). The GPU's line is no measurement: it is what the Triton path
allocates for the same sizes in bf16, by the formula in kernels/linear_logprob.py.

On a GPU, time and memory are measured by `python -m benchmarks.kernels --ops linear_logprob`.
"""
from dataclasses import dataclass

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from torch.profiler import ProfilerActivity, profile

from r1zero.kernels import reference
from r1zero.kernels.chips import KNOWN_CHIPS, Chip
from r1zero.kernels.linear_logprob import SLICE, linear_logprob, logprob_config
from r1zero.train.machine import reuse_memory

from .common import finish, show, spread, table, time_of
from .memory import allocated_peak

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Flags:
    """Sliced against materialised logits."""

    tokens: tuple[int, ...] = (256, 512, 1024, 2048)
    """Memory is measured at each, time at the last."""
    d_model: int = 512
    vocabulary: int = 151_936
    rounds: int = 3
    """Timed turns of each side."""
    picture: str | None = None
    """File for the picture of memory over tokens."""
    out: str | None = None
    """File for the line of JSON."""


def sliced(h, w, targets):
    return linear_logprob(h, w, targets)[0].sum()


def materialised(h, w, targets):
    return -F.cross_entropy(h @ w.T, targets, reduction="sum")


SIDES = {"sliced": sliced, "materialised": materialised}


def inputs(T: int, f: Flags):
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(T, f.d_model, generator=rng).requires_grad_()
    w = (torch.randn(f.vocabulary, f.d_model, generator=rng) * f.d_model**-0.5).requires_grad_()
    return h, w, torch.randint(f.vocabulary, (T,), generator=rng)


def peak_beyond_results(side, T: int, f: Flags) -> int:
    """Bytes at the peak of forward and backward, without dh and dw."""
    h, w, targets = inputs(T, f)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        torch.autograd.grad(side(h, w, targets), (h, w))
    return allocated_peak(prof) - 4 * (h.numel() + w.numel())


def triton_workspace(T: int, f: Flags, chip: Chip = KNOWN_CHIPS[90]) -> int:
    """Bytes that the Triton path holds at its peak in bf16, beyond its results."""
    tiles = -(-f.vocabulary // logprob_config("tiles", torch.bfloat16, chip, f.d_model)["BLOCK_V"])
    return max(12 * T * tiles, 4 * T * f.d_model + 2 * T * SLICE)


def plot(f: Flags, memory: dict[str, list[float]], path: str) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4))
    logits = [4 * T * f.vocabulary / 1e6 for T in f.tokens]
    for (name, values), style in zip(memory.items(), ("o-", "s-", "^--"), strict=True):
        axis.plot(f.tokens, values, style, label=name)
    axis.plot(f.tokens, logits, ":", color="grey", label="one tensor of fp32 logits")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MB beyond inputs and gradients",
             title=f"Forward and backward of log-probs, V = {f.vocabulary:,}, d_model = {f.d_model}")
    axis.set_xticks(f.tokens, [f"{T:,}" for T in f.tokens])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_ylim(top=20 * max(logits))  # room for the legend
    axis.legend(loc="upper left", ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(f: Flags) -> dict:
    bytes_at = {name: [peak_beyond_results(side, T, f) for T in f.tokens] for name, side in SIDES.items()}
    bytes_at["Triton, bf16 (by formula)"] = [triton_workspace(T, f) for T in f.tokens]
    T, logits = f.tokens[-1], [4 * T * f.vocabulary for T in f.tokens]
    print(f"\nV = {f.vocabulary:,}, d_model = {f.d_model}, slices of {reference.VOCAB_SLICE:,} columns. "
          "MB beyond inputs, dh and dw:\n")
    table(["tokens", *bytes_at, "one tensor of logits", "sliced / logits"],
          [[f"{n:,}", *[f"{values[i] / 1e6:.0f}" for values in bytes_at.values()], f"{logits[i] / 1e6:.0f}",
            f"{bytes_at['sliced'][i] / logits[i]:.3f}"] for i, n in enumerate(f.tokens)])
    reuse_memory()
    batch, times = inputs(T, f), {name: [] for name in SIDES}
    for turn in range(f.rounds + 1):
        for name, side in SIDES.items():
            took = time_of(lambda side=side: torch.autograd.grad(side(*batch), batch[:2]))
            if turn:  # the first one touches new memory
                times[name].append(took)
    ratio = spread([b / a for a, b in zip(times["sliced"], times["materialised"], strict=True)])
    print(f"{T:,} tokens: sliced {show(spread(times['sliced']), 's')}, materialised "
          f"{show(spread(times['materialised']), 's')}; materialised / sliced {show(ratio, 'x')}\n")
    if f.picture:
        plot(f, {name: [x / 1e6 for x in values] for name, values in bytes_at.items()}, f.picture)
    return finish("linear_logprob", {"flags": vars(f), "bytes": bytes_at, "seconds": times, "ratio": ratio},
                  f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
