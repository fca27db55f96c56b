"""Training throughput of the demo's model, as a share of what the machine reaches in a plain matrix product.

    python -m benchmarks.training                 about half a minute
    python -m benchmarks.training --rounds 60 --out training.json

A step is what pretraining does: take a batch, forward, backward, clip, AdamW, in fp32. There are two kinds of
batches of 2,048 tokens: the demo's corpus (whole documents of different lengths) and windows of one length.
Steps take turns with products of two 1024 x 1024 matrices, and each step is held against the products right
before and after it. Only the FLOPs that the model needs count (`flops_per_token`): what backward computes
anew, padding, and all that is no matrix product count as loss.

Then the profiler says where the time of a step goes, and how fast the matrix products are inside it.
"""
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from r1zero.kernels.reference import VOCAB_SLICE
from r1zero.model.config import preset
from r1zero.model.optimizer import OptimConfig, make_optimizer
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token
from r1zero.train.batches import TokenStream
from r1zero.train.fit import train_step
from r1zero.train.machine import reuse_memory
from r1zero.train.pretrain import PretrainConfig, corpus_batches

from .common import finish, show, spread, table, time_of

GROUPS = {  # of the profiler's operators, by the first prefix that fits
    "matrix products": ("aten::mm", "aten::addmm", "MLP"),  # the MLP's loop with its SwiGLU
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "Attention"),
    "optimizer": ("aten::_fused_adamw", "aten::_foreach", "Optimizer."),
    "data": ("data",),
    "copies and gathers": ("aten::copy_", "aten::cat", "aten::index", "aten::_index", "aten::embedding",
                           "aten::fill_", "aten::gather", "aten::zero_", "aten::repeat_interleave"),
    "norms, RoPE, SwiGLU, loss": ("aten::", "RMSNorm", "RoPE", "SwiGLU", "LinearLogprob"),
    "Python, autograd": ("",),
}
LEARNING_RATE = 1e-3
WARM_UP = 3  # steps before the timed ones and before the profiled ones


@dataclass(frozen=True)
class Flags:
    """Training throughput against the matrix-product rate."""

    rounds: int = 30
    """Timed steps of each kind."""
    batch_tokens: int = 2048
    """Tokens in a step."""
    seq_len: int = 128
    """Length of a window in the batches of one length."""
    documents: int = 2000
    """Documents of the corpus to draw from."""
    model: str = "demo"
    """A preset, or depth=N."""
    matrix: int = 1024
    """Rows and columns of the matrix product that sets the rate."""
    profiled_steps: int = 10
    """Steps under the profiler."""
    out: str | None = None
    """File for the line of JSON."""


class Steps:
    """Successive optimizer steps on the batches of a source; remembers the tokens and FLOPs of each."""

    def __init__(self, batches, vocab_size: int, f: Flags):
        self.config, self.batches, self.batch_tokens = preset(f.model, vocab_size), batches, f.batch_tokens
        self.model, self.optim = Transformer(self.config).init_weights(0), OptimConfig()
        self.optimizer = make_optimizer(self.model, self.optim)
        self.tokens, self.flops = [], []

    def __call__(self) -> None:
        with record_function("data"):
            batch = self.batches.batch(len(self.flops))
        train_step(self.model, self.optimizer, batch, LEARNING_RATE, self.optim, self.batch_tokens)
        lengths = batch.inputs.cu_seqlens.diff().double()
        # attention's FLOPs go with the square of a length: so its mean over tokens, not over sequences
        seqlen = float(lengths.square().sum() / lengths.sum())
        self.tokens.append(len(batch.targets))
        self.flops.append(self.tokens[-1] * flops_per_token(self.config, seqlen, training=True))


def throughput(kinds: dict[str, Steps], n: int, rounds: int) -> tuple[dict, dict]:
    """The spread of the matrix product's FLOP/s, and each kind's tokens/s, FLOP/s and share of that rate."""
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)

    def product_rate() -> float:
        return 2 * n**3 / np.median([time_of(lambda: torch.mm(a, b, out=c)) for _ in range(3)])

    rates, seconds, shares = [], {name: [] for name in kinds}, {name: [] for name in kinds}
    for _ in range(WARM_UP + rounds):
        for name, step in kinds.items():
            before, elapsed, after = product_rate(), time_of(step), product_rate()
            rates += [before, after]
            seconds[name].append(elapsed)
            shares[name].append(step.flops[-1] / elapsed / ((before + after) / 2))
    figures = {}
    for name, step in kinds.items():
        elapsed, tokens, flops = (np.array(x[WARM_UP:]) for x in (seconds[name], step.tokens, step.flops))
        figures[name] = {"tokens_per_s": spread(tokens / elapsed), "flops_per_s": spread(flops / elapsed),
                         "step_s": spread(elapsed), "share_of_rate": spread(shares[name][WARM_UP:]),
                         "tokens_per_step": float(tokens.mean()), "flops_per_step": float(flops.mean())}
    return spread(rates[2 * len(kinds) * WARM_UP :]), figures


def group_of(operator: str) -> str:
    return next(group for group, prefixes in GROUPS.items() if operator.startswith(prefixes))


def breakdown(step: Steps, n: int) -> dict:
    """Shares of a step's time by kind of work, under the profiler, and the rate of its matrix products."""
    elapsed = 0.0
    # its first steps are not kept: then the profiler's own memory is in place, and its hunger for new pages
    # does not fall on the operators
    plan = schedule(wait=0, warmup=WARM_UP, active=n)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan) as prof:
        for i in range(WARM_UP + n):
            if i > 0:
                prof.step()
            seconds = time_of(step)
            elapsed += seconds if i >= WARM_UP else 0.0
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in prof.key_averages():
        if not event.key.startswith("ProfilerStep"):
            spent[group_of(event.key)] += event.self_cpu_time_total * 1e-6
    spent["Python, autograd"] += elapsed - sum(spent.values())  # what no event covers
    # of the head's logits only the last slice is kept: the others are computed a second time
    c = step.config
    again = (c.vocab_size - 1) // VOCAB_SLICE * VOCAB_SLICE
    flops = sum(step.tokens[-n:]) * (flops_per_token(c, 0, training=True) + 2 * again * c.d_model)
    return {"shares": {group: seconds / elapsed for group, seconds in spent.items()}, "step_s": elapsed / n,
            "matrix_products_flops_per_s": flops / spent["matrix products"]}


def main(f: Flags) -> dict:
    reuse_memory()
    tokenizer, documents = corpus_batches(PretrainConfig(
        run="", data=("countdown",), model=f.model, documents=f.documents, batch_tokens=f.batch_tokens))
    windows = TokenStream(documents.tokens, f.seq_len, max(1, f.batch_tokens // f.seq_len))
    kinds = {"documents": Steps(documents, tokenizer.vocab_size, f),
             f"windows of {f.seq_len}": Steps(windows, tokenizer.vocab_size, f)}
    rate, figures = throughput(kinds, f.matrix, f.rounds)
    for name, step in kinds.items():
        figures[name]["breakdown"] = breakdown(step, f.profiled_steps)

    parameters = count_parameters(kinds["documents"].config)
    print(f"\n{f.model}: {parameters:,} parameters, vocabulary {tokenizer.vocab_size:,}, fp32, "
          f"{torch.get_num_threads()} threads; median (20 % to 80 % quantile) of {f.rounds} steps")
    print(f"matrix product {f.matrix}^3: {show(rate, ' GFLOP/s', 1e-9, 0)}\n")
    table(["batches", "tokens/s", "ms a step", "GFLOP/s", "% of the product's rate"],
          [[name, show(x["tokens_per_s"], digits=0), show(x["step_s"], scale=1e3, digits=0),
            show(x["flops_per_s"], scale=1e-9, digits=0), show(x["share_of_rate"], scale=100, digits=1)]
           for name, x in figures.items()])
    parts = [x["breakdown"] for x in figures.values()]
    speeds = [x["matrix_products_flops_per_s"] / rate["median"] for x in parts]
    table(["where a step's time goes, %", *figures],
          [[group, *[f"{x['shares'][group] * 100:.1f}" for x in parts]] for group in GROUPS]
          + [["speed of its matrix products, % of the rate", *[f"{x * 100:.0f}" for x in speeds]]])
    return finish("training", {"flags": vars(f), "parameters": parameters, "vocabulary": tokenizer.vocab_size,
                               "product_flops_per_s": rate, "batches": figures}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
