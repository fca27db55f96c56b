"""Does the peak memory of a training step grow with vocabulary x tokens?

    python -m benchmarks.memory             about a minute
    python -m benchmarks.memory --vocabularies 1000 16000 --out memory.json

One step (forward, backward, clip, AdamW) on the log-probs of the next tokens, at the demo's width and several
vocabularies, each in a fresh process; beside it the same step with all logits at once (`F.cross_entropy`).
Each is measured at two numbers of tokens, and a line through the two tells

- what a further token adds: activations and logits. With sliced logits it may grow until the vocabulary fills
  a slice (VOCAB_SLICE in kernels/reference.py) and no further; with all logits at once it grows on with V.
- what is there for any number of tokens: gradients of weights, as far as they are alive at the peak. A tied
  head has two for a moment, its own and the embedding's, before they are added up. Like the weights and
  AdamW's two moments, which are named apart, they hold V x d_model each and must grow with V.

Measured in two ways. Tensors: the bytes that PyTorch's allocator handed out during the step and had not got
back, at their highest (its profiler reports each of them). Process: the highest resident memory during the
step above that before it (Linux's VmHWM, reset for the step). Both begin after a first step of a few tokens,
so that the moments are there and the libraries are warm; the gradients are not.

Nothing is timed here, so freed memory goes back to the system at once (`reuse_memory()` is not called).
"""
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch.profiler import ProfilerActivity, profile

from r1zero.model.config import preset
from r1zero.model.optimizer import OptimConfig, make_optimizer, optimizer_step
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from .common import finish, table

HEADS = ("sliced", "materialised")
# glibc: give back what is freed at once, and never keep more than this; elsewhere it is not read
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Flags:
    """Peak memory of a training step over vocabularies."""

    vocabularies: tuple[int, ...] = (1_000, 16_000, 151_000)
    """Sizes of the vocabulary."""
    tokens: tuple[int, int] = (1024, 2048)
    """Tokens in a step, fewer and more."""
    seq_len: int = 128
    """Tokens of a sequence."""
    model: str = "demo"
    """A preset, or depth=N."""
    out: str | None = None
    """File for the line of JSON."""
    child: str | None = None
    """Internal: the one case that a fresh process measures, as JSON."""


# ---- in the fresh process ----

def resident_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process; None where there is no such thing."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Make VmHWM begin anew from what is resident now. False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def allocated_peak(prof) -> int:
    """Highest number of bytes that were allocated after the profiler's start and not freed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    totals = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    if not totals:
        raise RuntimeError("the profiler of this version of torch reported no allocation; this benchmark "
                           "needs torch 2.11 to 2.13")
    return max(totals)


def measure(case: dict) -> dict:
    """Peak of one step, by tensors and by process. case: model, vocabulary, tokens, seq_len, head."""
    config = preset(case["model"], case["vocabulary"])
    model, optim = Transformer(config).init_weights(0), OptimConfig()
    optimizer = make_optimizer(model, optim)

    def batch(n: int, length: int):
        rng = torch.Generator().manual_seed(0)
        rows = torch.randint(config.vocab_size, (n, length + 1), generator=rng)
        return pack(list(rows[:, :-1].numpy())), rows[:, 1:].flatten()

    def step(packed, targets) -> None:
        hidden = model.hidden_states(packed)
        if case["head"] == "sliced":
            loss = -model.logprobs(hidden, targets)[0].mean()
        else:
            loss = F.cross_entropy(F.linear(hidden, model.head), targets)
        loss.backward()
        optimizer_step(model, optimizer, 1e-3, optim)

    step(*batch(1, 8))
    inputs = batch(case["tokens"] // case["seq_len"], case["seq_len"])
    was_reset, before = reset_peak(), resident_bytes("VmRSS")
    step(*inputs)
    after = resident_bytes("VmHWM")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step(*inputs)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(x.numel() * x.element_size()
                  for state in optimizer.state.values() for x in state.values() if x.ndim)
    return {"weights": parameters, "gradients": parameters, "moments": moments,
            "second_head_gradient": model.embed.numel() * 4 if config.tie_embeddings else 0,
            "inputs": sum(x.numel() * x.element_size()
                          for x in (inputs[0].tokens, inputs[0].positions, inputs[0].cu_seqlens, inputs[1])),
            "tensors_peak": allocated_peak(prof),
            "process_peak": after - before if was_reset and after and before else None}


# ---- the whole ----

def in_fresh_process(case: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    if result.returncode:
        raise RuntimeError(f"measuring {case} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main(f: Flags) -> dict | None:
    if f.child is not None:
        print(json.dumps(measure(json.loads(f.child))))
        return None
    few, many = f.tokens
    if not f.seq_len <= few < many or few % f.seq_len or many % f.seq_len:
        raise ValueError(f"--tokens is {few} {many}, expected two rising multiples of --seq-len {f.seq_len}")

    cases = []
    for vocabulary in f.vocabularies:
        for head in HEADS:
            case = {"model": f.model, "vocabulary": vocabulary, "head": head, "seq_len": f.seq_len}
            less, more = (in_fresh_process({**case, "tokens": tokens}) for tokens in f.tokens)
            slope = (more["tensors_peak"] - less["tensors_peak"]) / (many - few)
            cases.append({**case, "few": less, "many": more, "bytes_per_further_token": slope,
                          "bytes_at_no_tokens": more["tensors_peak"] - slope * many})

    def mb(n: float | None) -> str:
        return "unknown" if n is None else f"{n / 1e6:.0f}"

    print(f"\nOne training step of {f.model} on {many:,} tokens, fp32; MB. Peak: the most that the step "
          "holds\nat a time, on top of the weights, their moments and the inputs.\n")
    columns = ("weights", "moments", "inputs", "process_peak", "tensors_peak")
    table(["vocabulary", "logits", "weights", "moments", "inputs", "peak, process", "peak, tensors",
           "= any T", "+ tokens", "KB a token"],
          [[f"{x['vocabulary']:,}", x["head"], *[mb(x["many"][name]) for name in columns],
            mb(x["bytes_at_no_tokens"]), mb(x["bytes_per_further_token"] * many),
            f"{x['bytes_per_further_token'] / 1e3:.1f}"] for x in cases])
    return finish("memory", {"flags": vars(f), "cases": cases}, f.out)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
