"""How far the engine's log-probs are from the trainer's, by dtype, with and without an fp32 head.

    python -m benchmarks.logp_gap --base runs/demo/seed0/base --picture gap.png --out gap.json
    python -m benchmarks.logp_gap                             random weights, for a quick look

The engine samples answers to Countdown problems as in a step of GRPO, and the trainer scores the same tokens.
Both have the same weights. What is between their log-probs is rounding: the engine decodes one token per row
against its cache, and the trainer takes whole sequences. GRPO takes both for one policy, so a gap is a wrong
importance ratio. Peers: the precisions, on the same problems and seeds, in one process.

Sources: fp16 against this gap, arXiv 2510.26788; the fp32 head, arXiv 2506.13585 and 2510.13786.
"""
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np
import torch
import tyro

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import load_model
from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.precision import DTYPES, Precision, choose_precision
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.rollouts import over_all_tokens, response_logprobs, sample_groups
from r1zero.train.machine import pick_device, reuse_memory

from .common import finish, table

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"fp32": "tab:green", "bf16": "tab:red", "fp16": "tab:blue"}
MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Flags:
    """The log-prob gap by dtype."""

    base: str | None = None
    """Run folder of a model that knows Countdown. None: the model `tiny` with random weights."""
    problems: int = 16
    samples: int = 16
    """Answers per problem."""
    new_tokens: int = 128
    """Maximum number of new tokens per answer."""
    seed: int = 0
    device: str = "auto"
    picture: str | None = None
    """File for the picture: how many tokens have a larger gap."""
    out: str | None = None
    """File for the line of JSON."""


def model_in(precision: Precision, f: Flags) -> tuple[Transformer, Tokenizer]:
    """The model of the base, or one with random weights, that computes in `precision`."""
    device = pick_device(f.device)
    if f.base is not None:
        return load_model(f.base, device, precision=precision)[:2]
    tokenizer = Tokenizer.bytes()
    model = Transformer(preset("tiny", tokenizer.vocab_size), precision.dtype, precision.fp32_head)
    return model.init_weights(f.seed).to(device), tokenizer


def gaps_in(precision: Precision, f: Flags) -> np.ndarray:
    """[R]: |trainer's - engine's log-prob| of each sampled token."""
    model, tokenizer = model_in(precision, f)
    task = Countdown(n_numbers=3, high=20, ops="+-")
    problems = task.problems("train", f.problems)
    prompts = [task.prompt(problem) for problem in problems]
    seeds = sample_seeds(f.problems * f.samples, f.seed)
    engine = Engine(model, tokenizer)
    rollouts = sample_groups(engine, prompts, f.samples, f.new_tokens, 1.0, seeds, problems)
    logp_R = over_all_tokens(lambda batch: response_logprobs(model, batch, 1.0)[0], rollouts, MICRO_TOKENS,
                             model.device)
    return np.abs(logp_R.cpu().double().numpy() - np.concatenate(rollouts.sampler_logp))


def numbers_of(gaps_R: np.ndarray) -> dict[str, float]:
    """What the table shows of the gaps."""
    return {"tokens": len(gaps_R), "mean": float(gaps_R.mean()), "p99": float(np.quantile(gaps_R, 0.99)),
            "max": float(gaps_R.max())}


def plot(gaps: dict[tuple[str, bool], np.ndarray], path: str) -> None:
    """For each precision, the share of tokens whose gap is larger than x."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    for (dtype, fp32_head), gaps_R in gaps.items():
        if dtype == "fp32" and fp32_head:
            continue  # the same bits as without
        x = np.sort(gaps_R)
        share = 1 - np.arange(len(x)) / len(x)
        axis.plot(np.maximum(x, 1e-9), share, "--" if fp32_head else "-", color=COLOURS[dtype],
                  label=f"{dtype}, fp32 head" if fp32_head else dtype)
    axis.set(xscale="log", yscale="log", xlim=(1e-8, 1), xlabel="gap between engine and trainer, in nats",
             ylabel="share of tokens with a larger gap", title="Log-probs of sampled tokens, by dtype")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(f: Flags) -> dict:
    reuse_memory()
    gaps = {}
    for dtype in DTYPES:
        for fp32_head in (False, True):
            precision = choose_precision(dtype, fp32_head, pick_device(f.device))
            with torch.no_grad():
                gaps[dtype, fp32_head] = gaps_in(precision, f)
    found = {f"{dtype}{', fp32 head' if fp32_head else ''}": numbers_of(gaps_R)
             for (dtype, fp32_head), gaps_R in gaps.items()}
    table(["computed in", "tokens", "mean gap", "99 %", "largest"],
          [[name, f"{n['tokens']:,}", *(f"{n[key]:.2g}" for key in ("mean", "p99", "max"))]
           for name, n in found.items()])
    if f.picture:
        plot(gaps, f.picture)
    return finish("logp_gap", {"flags": asdict(f), "gaps": found}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
