"""Does the peak memory of a training step grow with vocabulary x tokens?

    python -m benchmarks.memory             about a minute
    python -m benchmarks.memory --vocabularies 1000 16000 --out memory.json

One step is forward, backward, clip and AdamW on the log-probs of the next tokens, at the demo's width. It is
measured at several vocabularies, each in a fresh process. Beside it stands the same step with all logits at
once (`F.cross_entropy`). Each is measured at two numbers of tokens, and a line through the two tells

- what a further token adds: activations and logits. With sliced logits this grows until the vocabulary fills
  a slice (VOCAB_SLICE in kernels/reference.py), and no further. With all logits at once it grows on with V.
- what is there for any number of tokens: the gradients that are alive at the peak. A tied head has two for a
  moment, its own and the embedding's, before they are added. They hold V x d_model each and must grow with V.
  So must the weights and AdamW's two moments, which are listed apart.

Memory is measured in two ways. Tensors: the most bytes that PyTorch's allocator had handed out at one moment
of the step (its profiler reports each of them). Process: the highest resident memory during the step, minus
that before it (Linux's VmHWM, reset for the step). Both start after a first step of a few tokens: then the
moments exist and the libraries are warm, but there are no gradients.

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
from torch.profiler import ProfilerActivity, profile

from r1zero.model.config import preset
from r1zero.model.optimizer import OptimConfig, make_optimizer, optimizer_step
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from .common import finish, table

HEADS = ("sliced", "materialised")
# For glibc: give freed memory back at once, and never keep more than this. Others do not read it.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Flags:
    """Measure the peak memory of a training step at several vocabularies."""

    vocabularies: tuple[int, ...] = (1_000, 16_000, 151_000)
    """Sizes of the vocabulary to measure."""
    tokens: tuple[int, int] = (1024, 2048)
    """Two numbers of tokens per step, the smaller first."""
    seq_len: int = 128
    """Number of tokens per sequence."""
    model: str = "demo"
    """Size of the model: a preset or depth=N."""
    out: str | None = None
    """File for the line of JSON."""
    child: str | None = None
    """Internal: the case that a fresh process measures, as JSON."""


# ---- in the fresh process ----

def resident_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process; None on a system that does not tell them."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Reset VmHWM to what is resident now. Returns whether the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def allocated_peak(prof) -> int:
    """The most bytes that were allocated at one moment, counted from the profiler's start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    if not totals:
        raise RuntimeError("the profiler of this version of torch reported no allocation; this benchmark "
                           "needs torch 2.11 to 2.13")
    return max(totals)


def bytes_of(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def measure(case: dict) -> dict:
    """The peak of one step, by tensors and by process, in bytes.

    case: the model, the vocabulary, the head ("sliced" or "materialised"), tokens and seq_len.
    """
    config = preset(case["model"], case["vocabulary"])
    model = Transformer(config).init_weights(0)
    optim = OptimConfig()
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

    step(*batch(1, 8))  # makes the moments
    inputs = batch(case["tokens"] // case["seq_len"], case["seq_len"])
    was_reset = reset_peak()
    before = resident_bytes("VmRSS")
    step(*inputs)
    after = resident_bytes("VmHWM")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step(*inputs)

    packed, targets = inputs
    parameters = bytes_of(model.parameters())
    moments = bytes_of(x for state in optimizer.state.values() for x in state.values() if x.ndim)
    return {"weights": parameters, "gradients": parameters, "moments": moments,
            "second_head_gradient": model.embed.numel() * 4 if config.tie_embeddings else 0,
            "inputs": bytes_of((packed.tokens, packed.positions, packed.cu_seqlens, targets)),
            "tensors_peak": allocated_peak(prof),
            "process_peak": after - before if was_reset and after and before else None}


# ---- all cases ----

def in_fresh_process(case: dict, module: str = "benchmarks.memory") -> dict:
    """`measure(case)` of a module, in a process of its own. Raises RuntimeError with its last words if it
    fails."""
    command = [sys.executable, "-m", module, "--child", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    if result.returncode:
        raise RuntimeError(f"measuring {case} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def fitted(case: dict, tokens: tuple[int, int], measured) -> dict:
    """The case at fewer and at more tokens, and the line through the two."""
    few, many = tokens
    less, more = (measured({**case, "tokens": n}) for n in tokens)
    slope = (more["tensors_peak"] - less["tensors_peak"]) / (many - few)
    return {**case, "few": less, "many": more, "bytes_per_further_token": slope,
            "bytes_at_no_tokens": more["tensors_peak"] - slope * many}


def megabytes(n: float | None) -> str:
    return "unknown" if n is None else f"{n / 1e6:.0f}"


def main(flags: Flags, measured=in_fresh_process) -> dict | None:
    """measured: what measures a case, in a fresh process unless a test says otherwise."""
    if flags.child is not None:
        print(json.dumps(measure(json.loads(flags.child))))
        return None
    few, many = flags.tokens
    seq_len = flags.seq_len
    if not seq_len <= few < many or few % seq_len or many % seq_len:
        raise ValueError(f"--tokens is {few} {many}, expected two rising multiples of --seq-len {seq_len}")

    cases = []
    for vocabulary in flags.vocabularies:
        for head in HEADS:
            case = {"model": flags.model, "vocabulary": vocabulary, "head": head, "seq_len": seq_len}
            cases.append(fitted(case, flags.tokens, measured))
    print(f"\nOne training step of {flags.model} on {many:,} tokens, fp32; MB. Peak: the most that the step "
          "holds\nat one moment, on top of the weights, their moments and the inputs.\n")
    columns = ("weights", "moments", "inputs", "process_peak", "tensors_peak")
    table(["vocabulary", "logits", "weights", "moments", "inputs", "peak, process", "peak, tensors",
           "= any T", "+ tokens", "KB per token"],
          [[f"{case['vocabulary']:,}", case["head"], *[megabytes(case["many"][name]) for name in columns],
            megabytes(case["bytes_at_no_tokens"]), megabytes(case["bytes_per_further_token"] * many),
            f"{case['bytes_per_further_token'] / 1e3:.1f}"] for case in cases])
    return finish("memory", {"flags": vars(flags), "cases": cases}, flags.out)


if __name__ == "__main__":
    import tyro  # memory_predicted.py runs where it is not installed

    main(tyro.cli(Flags, description=__doc__))
