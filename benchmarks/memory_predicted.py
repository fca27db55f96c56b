"""Does a step take the memory that `r1zero plan` predicts (model/memory.py)?

    python -m benchmarks.memory_predicted                 a quarter of an hour on one core, 6 GB
    python -m benchmarks.memory_predicted --options       what each option saves: ten minutes, 6 GB
    python -m benchmarks.memory_predicted --device cuda   both against the allocator of a GPU: seconds

Four shapes, all weights or LoRA, with and without --recompute; or one shape with each option of memory. What
is measured is an update: of two micro-batches or more, so that the second one meets the gradients of the
first, and AdamW. A reference, where there is one, scores them before. Predicted and measured are bytes of
tensors; weights, moments and the reference are among them.

On a CPU in fp32 each case has a process of its own, and the profiler tells what PyTorch hands out. On a GPU
in bf16 the allocator tells it; "reserved" is what it has taken from the driver, gaps and all.

Left out: the engine, whose parts are counted and not estimated (tests/model/test_memory.py).
"""
import argparse
import copy
import gc
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from r1zero.model.config import preset
from r1zero.model.lora import AdapterCopy, LoRAConfig, add_adapters, cast_frozen
from r1zero.model.memory import Setup, predict
from r1zero.model.optimizer import OptimConfig, make_optimizer, optimizer_step
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from .common import finish, table
from .memory import allocated_peak, bytes_of, in_fresh_process, megabytes


@dataclass(frozen=True)
class Case:
    """An update to measure."""

    model: str
    vocabulary: int
    tokens: int  # per micro-batch
    seq_len: int = 128
    micro_batches: int = 2
    lora: int = 0  # a rank
    recompute: bool = False
    moments: str = "fp32"
    reference: str = "none"  # device, cpu, or none

    def setup(self, device: torch.device) -> Setup:
        """The same for the prediction."""
        on_gpu = device.type != "cpu"
        return Setup(preset(self.model, self.vocabulary), micro_tokens=self.tokens, longest=self.seq_len,
                     dtype=torch.bfloat16 if on_gpu else torch.float32, on_gpu=on_gpu,
                     lora=LoRAConfig(self.lora), recompute=self.recompute, moments=self.moments,
                     reference=self.reference)


# Much of the memory is weights, activations, head, or experts.
SHAPES = (Case("smollm2-135m", 49_152, 2048), Case("depth=8", 8_000, 20_480), Case("demo", 151_936, 32_768),
          Case("demo-moe", 50_000, 32_768))
PLAIN = replace(SHAPES[0], reference="device")
OPTIONS = {
    "all weights": PLAIN,
    "--recompute": replace(PLAIN, recompute=True),
    "--optim.moments bf16": replace(PLAIN, moments="bf16"),
    "no KL, so no reference": replace(PLAIN, reference="none"),
    "a quarter of --micro-tokens": replace(PLAIN, tokens=PLAIN.tokens // 4, micro_batches=8),
    "--lora.rank 16": replace(PLAIN, lora=16),
    "--lora.rank 16 --recompute": replace(PLAIN, lora=16, recompute=True),
}
LARGER = {"tokens": 16_384, "seq_len": 1024}  # on a GPU
ON_GPU = [replace(case, **LARGER | {"tokens": 8 * case.tokens}) for case in OPTIONS.values()]
ON_GPU += [replace(PLAIN, reference="cpu", **LARGER)]
ON_GPU += [replace(SHAPES[3], tokens=131_072, lora=lora) for lora in (0, 16)]


# ---- one update ----

def make_policy(setup: Setup, device: torch.device) -> Transformer:
    """A policy with random weights."""
    with torch.device(device):
        model = Transformer(setup.model, setup.dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if setup.lora.rank:
        cast_frozen(add_adapters(model, setup.lora, seed=0).to(device))
    model.recomputes = setup.recompute
    return model


def make_reference(setup: Setup, policy: Transformer) -> torch.nn.Module | None:
    """The model that its KL is measured to, or the adapters of that model, as rl/update.py has them."""
    if setup.reference == "none":
        return None
    if setup.lora.rank:
        return AdapterCopy(policy)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    cast_frozen(frozen)
    return frozen.to("cpu" if setup.reference == "cpu" else policy.device)


def add_gradients(case: Case, policy: Transformer, reference, n_sequences: int) -> None:
    """The gradient of all micro-batches, each of so many sequences, after the reference has scored them."""
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randint(policy.config.vocab_size, (n_sequences, case.seq_len + 1), generator=rng)
               for _ in range(case.micro_batches)]

    def logp(model: Transformer, rows: torch.Tensor) -> torch.Tensor:
        packed, targets = pack(list(rows[:, :-1].numpy()), policy.device), rows[:, 1:].flatten()
        return model.logprobs(model.hidden_states(packed), targets.to(policy.device))[0]

    if reference is not None:
        scorer = policy if case.lora else reference.to(policy.device)  # adapters cost nothing more
        with torch.no_grad():
            for rows in batches:
                logp(scorer, rows)
        if case.reference == "cpu":
            reference.to("cpu")
    for rows in batches:
        (-logp(policy, rows).mean()).backward()


def launch_all() -> None:
    """Launch every kernel that the cases of a GPU need, for rehearse.py."""
    for case in ON_GPU:
        device = torch.device("cuda")
        setup = case.setup(device)
        setup = replace(setup, model=replace(setup.model, n_layers=2))  # others launch what the second does
        policy = make_policy(setup, device)
        add_gradients(case, policy, make_reference(setup, policy), 1)


def measure(case: Case, device: torch.device) -> dict:
    """Predicted and measured bytes of an update."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    setup = case.setup(device)
    policy, optim = make_policy(setup, device), OptimConfig(moments=case.moments)
    reference, optimizer = make_reference(setup, policy), make_optimizer(policy, optim)

    def update(n_sequences: int) -> None:
        add_gradients(case, policy, reference, n_sequences)
        optimizer_step(policy, optimizer, 1e-3, optim)

    update(1)  # makes the moments
    found = {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        update(case.tokens // case.seq_len)
        found["measured"] = torch.cuda.max_memory_allocated() - before
        found["reserved"] = torch.cuda.max_memory_reserved()
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            update(case.tokens // case.seq_len)
        held = [*policy.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
        held += reference.state_dict().values() if reference is not None else []
        found["measured"] = bytes_of(held) + allocated_peak(prof)
    parts = predict(setup)
    held_bytes = parts.weights + parts.moments + parts.reference
    found["predicted"] = held_bytes + max(parts.update, parts.visiting)
    return found | {"parts": parts.parts}


# ---- all cases ----

def in_turn(cases: list[Case], measured, out: str | None) -> list[dict]:
    """What each case takes; written after each. One that does not fit a GPU is named."""
    results = []
    for case in cases:
        try:
            found = measured(case)
            print(f"{case}: {found['predicted'] / found['measured']:.3f}", flush=True)
        except torch.OutOfMemoryError as error:
            found = {"error": str(error).splitlines()[0]}
            print(f"{case}: {found['error']}", flush=True)
        results.append(asdict(case) | found)
        if out:
            Path(out).write_text(json.dumps({"cases": results}) + "\n", encoding="utf-8")
    return results


def compared(case: dict) -> list[str]:
    """Predicted, measured, and their ratio, for a table."""
    if "error" in case:
        return ["", "does not fit", ""]
    ratio = case["predicted"] / case["measured"]
    return [megabytes(case["predicted"]), megabytes(case["measured"]), f"{ratio:.3f}"]


def show_cases(results: list[dict]) -> None:
    table(["model", "vocabulary", "tokens", "trained", "recompute", "moments", "reference", "predicted",
           "measured", "ratio"],
          [[case["model"], f"{case['vocabulary']:,}", f"{case['micro_batches']} x {case['tokens']:,}",
            f"LoRA {case['lora']}" if case["lora"] else "all", "yes" if case["recompute"] else "no",
            case["moments"], case["reference"], *compared(case)] for case in results])


def show_options(results: list[dict]) -> None:
    plain = results[0]["measured"]
    saved = [f"{1 - case['measured'] / plain:.0%}" for case in results]
    table(["option", "predicted", "measured", "ratio", "saves"],
          [[name, *compared(case), share] for name, case, share in zip(OPTIONS, results, saved, strict=True)])
    print("--ref-offload saves nothing on a CPU, whose memory the reference is in anyway.\n")


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Python's own parser: the machine with the GPU may have no other."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory_predicted", description=__doc__.splitlines()[0])
    parser.add_argument("--options", action="store_true", help="Measure one shape with each option.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Device to measure.")
    parser.add_argument("--out", help="File for the line of JSON.")
    parser.add_argument("--child", help="Internal: the case that a fresh process measures, as JSON.")
    return parser.parse_args(argv)


def measure_here(case: Case, device: torch.device) -> dict:
    """The same in this process, which gives back what the last case had."""
    gc.collect()
    torch.cuda.empty_cache()
    return measure(case, device)


def measure_apart(case: Case) -> dict:
    """The same in a process of its own."""
    return in_fresh_process(asdict(case), "benchmarks.memory_predicted")


def main(flags: argparse.Namespace, measured=None) -> dict | None:
    """measured: what measures a case, unless it is as said above."""
    device = torch.device(flags.device)
    if flags.child is not None:
        print(json.dumps(measure(Case(**json.loads(flags.child)), device)))
        return None
    if flags.device == "cuda":
        cases, measured, show = ON_GPU, measured or partial(measure_here, device=device), show_cases
    elif flags.options:
        cases, measured, show = list(OPTIONS.values()), measured or measure_apart, show_options
    else:
        cases = [replace(shape, lora=lora, recompute=recompute) for shape in SHAPES for lora in (0, 16)
                 for recompute in (False, True)]
        measured, show = measured or measure_apart, show_cases
    results = in_turn(cases, measured, flags.out)
    print("\nAn update; MB of tensors: weights, moments and reference included.\n")
    show(results)
    settings = {name: value for name, value in vars(flags).items() if name != "child"}
    return finish("memory_predicted", {"flags": settings, "cases": results}, flags.out)


if __name__ == "__main__":
    main(parsed())
