"""Every kernel in every configuration that can be chosen, compiled without a GPU for six chips.

    python -m benchmarks.aot                                    all, for six chips: over an hour of a core
    python -m benchmarks.aot --archs 90 --ops rmsnorm,swiglu    some of them
    python -m benchmarks.aot --cases 'attention bf16 D=(64|128)'

The launchers of the op files are called with tensors of device "meta", which have a shape and no memory. A
stand-in for Triton's driver says which chip this is; Triton's own hook notes what it is about to compile, so
types, specialisation and block sizes are a real launch's. Each kernel is then compiled, and checked:

- no spills: no stack, no local memory, no STL or LDL instruction;
- shared memory within what one program may have on that chip;
- a matrix product in 16 bit of 64 rows or more runs on the chip's own matrix instruction;
- no registers of an asynchronous matrix product of sm_90 are written before its wait (hazard.py);
- the number of tokens and the lengths, which change from step to step, do not make a new kernel.

Prints a table and one line of JSON; the exit code is 1 if a check fails. Runs in a process of its own without
TRITON_INTERPRET, which would run the interpreter instead of the compiler. Triton caches what it compiles.
"""
import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from r1zero.kernels import chips, dispatch
from r1zero.kernels.chips import KNOWN_CHIPS, matrix_unit
from r1zero.model.config import PRESETS, ModelConfig, preset

from .common import finish, table
from .hazard import hazards, products_from_registers
from .kernel_ops import OPS

if dispatch.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
MOE_TESTED = {(8, 128, 96), (1, 256, 128), (8, 256, 128), (4, 100, 36), (3, 48, 32), (1, 128, 96),
              (8, 2048, 768), (4, 256, 128), (8, 2048, 128)}  # experts per token, d_model, width
LATENT = (192, 128)  # widths of a key and of a value in DeepSeek's attention
UNEQUAL = (LATENT, (48, 32), (32, 80))
# what is compiled for each chip, unless flags say otherwise
DTYPES_BY_ARCH = {80: list(DTYPES), 90: list(DTYPES)} | dict.fromkeys((86, 89, 100, 120), ["bf16"])
INSTRUCTIONS = {"mma": "HMMA", "wgmma": "HGMMA", "tcgen05": "UTC"}  # the last UTCHMMA, UTCQMMA, ...
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", re.MULTILINE)
DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \* ")  # rows and type of the first operand


# ---- what is launched: the cases, a plain table ----

@dataclass(frozen=True)
class Case:
    """One way to call an op. `launch(sizes)` calls its launchers; all `sizes` must need the same kernels."""

    op: str
    label: str
    launch: Callable
    sizes: tuple = (4096, 4099, 1)  # tokens


def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@cache
def models() -> list[ModelConfig]:
    return [preset(name, vocab_size=1000) for name in PRESETS]


def widths_of(model: ModelConfig) -> tuple[int, int]:
    """Of a query or key, and of a value."""
    return model.head_dim, model.latent.value_dim if model.latent else model.head_dim


def sizes_of(op: str, letter: str) -> set[int]:
    """What benchmarks.kernels measures of this size."""
    cases = (case for x in OPS.values() for case in (*x.full_size, *x.smoke))
    return {case.shape[letter] for case in cases if case.op == op}


def mixed(dtype: str) -> list[str]:
    """Types of weights that meet this type: a model's weights are in fp32."""
    return list(dict.fromkeys((dtype, "fp32")))


def rmsnorm_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import rmsnorm

    def launch(T, heads, M, dtype, weight_dtype, with_residual):
        x = empty(T, *heads, M, dtype=dtype)
        w, residual = empty(M, dtype=weight_dtype), torch.empty_like(x) if with_residual else None
        y, total, r = rmsnorm.rmsnorm_fwd(x, w, 1e-6, residual)
        dsums = (None, total) if with_residual else (None,)
        for dsum in dsums:
            rmsnorm.rmsnorm_bwd(y, dsum, total if with_residual else x, w, r)

    def launch_views(T, shape, part, M, dtype, weight_dtype):
        x, w = empty(T, *shape, dtype=dtype)[part], empty(M, dtype=weight_dtype)
        _, _, r = rmsnorm.rmsnorm_fwd(x, w, 1e-6, None)
        for dy in (empty(*x.shape, dtype=dtype), x):
            rmsnorm.rmsnorm_bwd(dy, None, x, w, r)

    in_models = {model.d_model for model in models()}
    tested = {1, 64, 128, 500, 896, 1536, 2048, 4096, 8192, 12288, 16384}
    for name in dtypes:
        for M in sorted(tested | in_models | sizes_of("rmsnorm", "M")):
            for residual in (False, True):
                for weight in mixed(name) if M in in_models else (name,):
                    yield Case("rmsnorm", f"{name} M={M} weight {weight}" + " residual" * residual,
                               lambda T, a=((), M, DTYPES[name], DTYPES[weight], residual): launch(T, *a))
        for D in head_dims:  # q and k are normed head by head, in place in the fused projection
            for weight in mixed(name) if D == 128 else (name,):
                types = DTYPES[name], DTYPES[weight]
                yield Case("rmsnorm", f"{name} D={D} weight {weight}",
                           lambda T, a=((8,), D, *types, False): launch(T, *a))
                if D == 128:
                    for heads in (16, 8):  # qwen3's query and key heads
                        rows = slice(None), slice(24 - heads, 24)
                        yield Case("rmsnorm", f"{name} D={D} weight {weight} {heads} of 32 heads",
                                   lambda T, a=((32, D), rows, D, *types): launch_views(T, *a))
        for first in (0, 3):  # rows aligned to 16 bytes, and not
            rows, dtype = (slice(None), slice(first, first + 2048)), DTYPES[name]
            yield Case("rmsnorm", f"{name} M=2048 of 4096 from {first}",
                       lambda T, a=((4096,), rows, 2048, dtype, dtype): launch_views(T, *a))
        # the latents in their product, and all heads of a q or k in theirs
        parts = {(model.latent.kv_rank, model.latent.rope_dim) for model in models() if model.latent}
        parts |= {(n * model.head_dim, model.n_kv_heads * model.head_dim) for model in models()
                  for n in (model.n_heads, model.n_kv_heads) if model.qk_norm_full_width}
        for M, rest in sorted(parts):
            rows = slice(None), slice(0, M)
            for weight in mixed(name):
                types = DTYPES[name], DTYPES[weight]
                yield Case("rmsnorm", f"{name} M={M} of {M + rest} weight {weight}",
                           lambda T, a=((M + rest,), rows, M, *types): launch_views(T, *a))


def rope_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import rope

    def launch(T, heads, part, D, dtype):
        cos, sin = empty(T, D // 2, dtype=torch.float32), empty(T, D // 2, dtype=torch.float32)
        for backward in (False, True):
            rope.rope_rotate(empty(T, heads, D, dtype=dtype)[:, part], cos, sin, backward)

    heads = {(model.head_dim, n) for model in models() if not model.latent
             for n in (model.n_heads, model.n_kv_heads)}
    heads |= {(model.rope_dim, model.n_heads + 1) for model in models() if model.latent}
    for name in dtypes:
        found = {(D, H) for D in {2, 192, *head_dims} for H in (3, 32)} | heads
        found |= {(8, H) for H in (2, 3)}  # of the smoke test
        for D, H in sorted(found):
            yield Case("rope", f"{name} H={H} D={D}",
                       lambda T, a=(H, slice(None), D, DTYPES[name]): launch(T, *a))
        for D in sorted({2, 192, *head_dims}):
            yield Case("rope", f"{name} H=6 of 9 D={D}",
                       lambda T, a=(9, slice(1, 7), D, DTYPES[name]): launch(T, *a))


def swiglu_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import mlp

    def launch(T, F, margin, dtype):
        gate_up = empty(T, 2 * F + 2 * margin, dtype=dtype)[:, margin : 2 * F + margin]
        mlp.swiglu_fwd(gate_up)
        mlp.swiglu_bwd(empty(T, F, dtype=dtype), gate_up)

    tested = {1, 128, 344, 896, 1024, 2048, 4864, 8192}
    in_models = {model.d_ff for model in models()} | {
        model.moe.d_shared for model in models() if model.moe and model.moe.d_shared}
    for name in dtypes:
        for F in sorted(tested | in_models | sizes_of("swiglu", "F")):
            for margin in (0, 1) if F in tested else (0,):  # of columns, behind which rows are not aligned
                yield Case("swiglu", f"{name} F={F}" + " not aligned" * margin,
                           lambda T, a=(F, margin, DTYPES[name]): launch(T, *a),
                           sizes=(4096, 4099) if margin else (4096, 4099, 1))


def attention_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import attention

    def launch(sizes, widths, dtype, group, window, softcap):
        (N, Tq, Tk, max_q, max_k), (D, E) = sizes, widths
        q, k = empty(Tq, 2 * group, D, dtype=dtype), empty(Tk, 2, D, dtype=dtype)
        v, out, dout = empty(Tk, 2, E, dtype=dtype), *(empty(Tq, 2 * group, E, dtype=dtype) for _ in range(2))
        lse, cu = empty(2 * group, Tq, dtype=torch.float32), empty(N + 1, dtype=torch.int32)
        rest = (cu, cu, max_q, max_k, D**-0.5, window, softcap)
        attention.attention_fwd(q, k, v, *rest)
        for dlse in (None, torch.empty_like(lse)):
            attention.attention_bwd(dout, q, k, v, out, lse, dlse, *rest)

    # sequences, tokens of q and of k, longest of q and of k
    lengths = {"": ((4, 4096, 4096, 2048, 2048), (5, 4099, 5003, 2049, 2501)),
               " one query": ((64, 64, 65536, 1, 1024), (3, 3, 9001, 1, 3001))}
    in_use = {(widths_of(model), model.n_heads // model.n_kv_heads) for model in models()}
    cases = (case.shape for x in (OPS["attention"].full_size, OPS["attention"].smoke) for case in x)
    in_use |= {((s["D"], s["E"]), s["H"] // s["G"]) for s in cases}
    in_use |= {((64, 64), group) for group in (1, 3, 5, 7)} | {((128, 128), 128)}
    equal = [(D, D) for D in head_dims]
    for name in dtypes:
        found = [(widths, 3, -1, 0.0) for widths in (*equal, *UNEQUAL)]
        options = ((-1, 0.0), (256, 0.0), (-1, 30.0), (256, 30.0))
        found += [(widths, 2, *extras) for widths in equal
                  if name == "bf16" or widths[0] in (32, 64, 128, 256) for extras in options]
        found += [(LATENT, 1, *extras) for extras in options]
        found += [(widths, group, -1, 0.0) for widths, group in sorted(in_use) if name == "bf16"]
        for widths, group, window, softcap in dict.fromkeys(found):
            label = f"{name} D={widths[0]}" + f" E={widths[1]}" * (widths[0] != widths[1])
            label += f" group {group}" + " window" * (window >= 0) + " softcap" * (softcap > 0)
            for what, sizes in lengths.items():
                if what and group != 2 and (widths, group) not in in_use:
                    continue
                yield Case("attention", label + what, sizes=sizes,
                           launch=lambda s, a=(widths, DTYPES[name], group, window, softcap): launch(s, *a))
    if "fp16" in dtypes:
        yield Case("attention", "fp16 D=32 group 1 one query", sizes=lengths[" one query"],
                   launch=lambda s: launch(s, (32, 32), torch.float16, 1, -1, 0.0))


def decode_attention_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import decode_attention

    def launch(sizes, H, G, D, dtype, window=None, softcap=None):
        B, pages, width = sizes
        cache, lengths = empty(pages, G, 16, D, dtype=dtype), empty(B, dtype=torch.int32)
        decode_attention.decode_attention_fwd(empty(B, H, D, dtype=dtype), cache, cache,
                                              empty(B, width, dtype=torch.int32), lengths, D**-0.5, window,
                                              softcap)

    sizes = ((64, 4096, 256), (5, 100, 16))  # rows, pages, pages per row
    for name in dtypes:
        found = [(2 * group, 2, D) for D in head_dims for group in (1, 6, 7, 20)]
        found += [(model.n_heads, model.n_kv_heads, model.head_dim) for model in models() if not model.latent]
        for H, G, D in dict.fromkeys(found):
            yield Case("decode_attention", f"{name} D={D} group {H // G}, {G} groups",
                       sizes=sizes, launch=lambda s, a=(H, G, D, DTYPES[name]): launch(s, *a))
        for D in head_dims:
            for window, softcap in ((100, None), (100, 20.0), (None, 20.0)):
                extras = " window" * (window is not None) + " softcap" * (softcap is not None)
                yield Case("decode_attention", f"{name} D={D} group 6{extras}", sizes=sizes,
                           launch=lambda s, a=(12, 2, D, DTYPES[name], window, softcap): launch(s, *a))


def logprob_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import linear_logprob

    def launch(T, V, M, dtype, weight_dtype, softcap):
        h, weight = empty(T, M, dtype=dtype), empty(V, M, dtype=weight_dtype)
        targets, rest = empty(T, dtype=torch.int64), (1.0, softcap)
        logp, entropy, lse = linear_logprob.logprob_fwd(h, weight, targets, None, *rest)
        for dentropy in (None, entropy):
            linear_logprob.logprob_bwd(logp, dentropy, h, weight, targets, None, lse, entropy, *rest, True,
                                       True)

    in_models = {model.d_model for model in models()}
    widths = {64, 100, 896, 912, 2048} | in_models | sizes_of("linear_logprob", "M")
    for name in dtypes:
        for M in sorted(widths):
            for weight in mixed(name):
                for softcap in (0.0, 30.0) if weight == name else (0.0,):
                    yield Case("linear_logprob", f"{name} M={M} weight {weight}" + " softcap" * (softcap > 0),
                               lambda T, a=(9001, M, DTYPES[name], DTYPES[weight], softcap): launch(T, *a))


def moe_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import moe_triton

    def launch(T, E, K, M, F, dtype, weight_dtype):
        x, gates = empty(T, M, dtype=dtype), empty(T, K, dtype=torch.float32)
        weights = empty(E, 2 * F, M, dtype=weight_dtype), empty(E, M, F, dtype=weight_dtype)
        order, place = empty(T * K, dtype=torch.int64), empty(T, K, dtype=torch.int64)
        inputs = x, gates, *weights, order, place, empty(E, dtype=torch.int32)
        moe_triton.moe_bwd(moe_triton.moe_fwd(*inputs), *inputs, True, True)

    in_models = {(model.moe.experts_per_token, model.d_model, model.moe.d_expert)
                 for model in models() if model.moe}
    measured = {tuple(case.shape[letter] for letter in "KMF")
                for case in (*OPS["moe"].full_size, *OPS["moe"].smoke)}
    for name in dtypes:
        for K, M, F in sorted(MOE_TESTED | in_models | measured):
            for weight in mixed(name):
                yield Case("moe", f"{name} K={K} M={M} F={F} weight {weight}",
                           lambda T, a=(64, K, M, F, DTYPES[name], DTYPES[weight]): launch(T, *a))


def grpo_cases(dtypes: list[str], head_dims: list[int]) -> Iterator[Case]:
    from r1zero.kernels import grpo

    def launch(N, objective, estimator, index):
        offsets = empty(N + 1, dtype=index)
        samples, tokens = (empty(n, dtype=torch.float32) for n in (N, 7 * N))
        for normalise in (False, True):
            grpo.grpo_advantages_fwd(samples, offsets, normalise)
        ref = tokens if estimator else None
        settings = (0.2, 0.28, 0.1, objective, estimator)
        grpo.policy_loss_fwd(tokens, tokens, ref, tokens, tokens, offsets, *settings)

    # log-probs are in fp32, whatever the model's dtype
    for objective in grpo.OBJECTIVES:
        for estimator in ("", *grpo.KL_ESTIMATORS):
            for index in (torch.int32, torch.int64):
                label = objective + f" reference {estimator}" * bool(estimator)
                label += " int64" * (index == torch.int64)
                yield Case("grpo", label, lambda N, a=(objective, estimator, index): launch(N, *a))


CASES = {"rmsnorm": rmsnorm_cases, "rope": rope_cases, "swiglu": swiglu_cases, "attention": attention_cases,
         "decode_attention": decode_attention_cases, "linear_logprob": logprob_cases, "moe": moe_cases,
         "grpo": grpo_cases}


# ---- what Triton would compile for them ----

class StandInDriver:
    """Stands in for Triton's driver: enough of one to compile for a chip that is not there."""

    made = count()

    def __init__(self, arch: int):
        self.arch, self.device = arch, f"sm_{arch}, number {next(StandInDriver.made)}"

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device  # Triton keeps one set of kernels a device: a new chip has none yet

    def get_current_stream(self, device):
        return 0


@contextmanager
def chip(arch: int):
    driver.set_active(StandInDriver(arch))
    try:
        yield
    finally:
        driver.set_active(None)  # the next one to ask gets what the machine has


@dataclass
class Kernel:
    """A kernel with its types, constants and options, for one chip, and the cases that need it."""

    op: str
    module: str
    name: str
    arch: int
    data: str  # JSON, as Triton's hook gives it and `preload` takes it
    cases: list[str] = field(default_factory=list)
    limit: int | None = None  # bytes of shared memory, where the chip is none of KNOWN_CHIPS


def recorded(launch: Callable, *args) -> list[tuple[str, str, str]]:
    """(module, kernel, data) of what `launch(*args)` would compile; it neither compiles nor launches."""
    found = []

    def note(*, fn, compile, **_):
        found.append((fn.module, fn.name, compile["specialization_data"]))
        return True  # instead of compiling, and launching

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        launch(*args)
    return found


def launches_of(arch: int, launch: Callable, *args) -> list[tuple[str, str, str]]:
    """The same on that chip."""
    with chip(arch), mock.patch.object(chips, "chip_of", lambda device: KNOWN_CHIPS[arch]):
        return recorded(launch, *args)


def differences(one: str, other: str) -> str:
    """Which arguments are specialised differently in two launches of a kernel."""
    one, other = json.loads(one), json.loads(other)
    names = list(one["signature"])
    found = [name for name in names if one["signature"][name] != other["signature"][name]]
    for part in ("constant", "attrs"):
        was, now = ({path[0]: value for path, value in zip(x[f"{part}_keys"], x[f"{part}_vals"], strict=True)}
                    for x in (one, other))
        found += [names[i] for i in was.keys() | now.keys() if was.get(i) != now.get(i)]
    found += [key for key in one["options"] if one["options"][key] != other["options"][key]]
    return ", ".join(sorted(set(found)))


def record(cases: list[Case], archs: list[int]) -> tuple[list[Kernel], list[str]]:
    """The kernels that the cases need, each once, and complaints about sizes that make a new kernel."""
    kernels, complaints = {}, set()
    for arch in archs:
        for case in cases:
            launches = [launches_of(arch, case.launch, size) for size in case.sizes]
            for others in launches[1:]:
                was, now = ([name for _, name, _ in found] for found in (launches[0], others))
                if was != now:
                    complaints.add(f"{case.op}, {case.label}, sm_{arch}: other sizes launch {now}, not {was}")
                    continue
                for (_, name, data), (_, _, other) in zip(launches[0], others, strict=True):
                    if data != other:
                        complaints.add(f"{name}, {case.label}, sm_{arch}: compiled again when sizes change, "
                                       f"because of {differences(data, other)}")
            for module, name, data in sum(launches, []):
                kernel = kernels.setdefault((arch, data), Kernel(case.op, module, name, arch, data))
                if case.label not in kernel.cases:
                    kernel.cases.append(case.label)
    return list(kernels.values()), sorted(complaints)


# ---- compiling, and what came of it ----

def tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def limit_of(kernel: Kernel) -> int:
    """Bytes of shared memory that one program may have."""
    return kernel.limit or KNOWN_CHIPS[kernel.arch].shared_memory


def compiled(kernel: Kernel) -> dict:
    """Compile one kernel and read its machine code; a row of the table."""
    data = json.loads(kernel.data)
    constants = {list(data["signature"])[path[0]]: value
                 for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
    row = {"kernel": kernel.name, "op": kernel.op, "arch": kernel.arch, "cases": kernel.cases,
           "limit": limit_of(kernel),
           "constants": constants,
           "types": sorted({t for t in data["signature"].values() if t.startswith("*")}),
           "warps": data["options"]["num_warps"], "stages": data["options"]["num_stages"]}
    with chip(kernel.arch):
        jit_function = getattr(importlib.import_module(kernel.module), kernel.name)
        try:
            result = jit_function.preload(kernel.data)
        except Exception as error:  # whatever the compiler's passes raise is this row's result
            text = (str(error).strip() or repr(error)).splitlines()[-1]
            return {**row, "complaints": [f"does not compile: {type(error).__name__}: {text}"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", cubin.name)))
        sass = tool("nvdisasm", "-c", cubin.name)
    instructions = INSTRUCTION.findall(sass)
    row |= {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"]),
            "spill_instructions": sum(name in ("STL", "LDL") for name in instructions),
            "shared": result.metadata.shared,
            "matrix": sorted({name for name in instructions if name.endswith("MMA")}),
            "dots": sorted({(int(rows), kind) for rows, kind in DOT.findall(result.asm["ttir"])}),
            "products_from_registers": products_from_registers(sass),
            "hazards": [str(hazard) for hazard in hazards(sass)]}
    return {**row, "complaints": wrong(row)}


def wrong(row: dict) -> list[str]:
    """What is wrong with a kernel that compiled."""
    complaints, arch = [], row["arch"]
    if row["stack"] or row["local"] or row["spill_instructions"]:
        complaints.append(f"spills: {row['stack']} bytes of stack, {row['local']} local, "
                          f"{row['spill_instructions']} STL/LDL, at {row['registers']} registers")
    if row["shared"] > row["limit"]:
        complaints.append(f"{row['shared']} bytes of shared memory, sm_{arch} has {row['limit']}")
    tall = [rows for rows, kind in row["dots"] if rows >= 64 and kind in ("bf16", "f16")]
    instruction = INSTRUCTIONS[matrix_unit(arch)]
    if tall and not any(name.startswith(instruction) for name in row["matrix"]):
        complaints.append(f"a product of {tall[0]} rows without {instruction} instructions, "
                          f"with {'+'.join(row['matrix']) or 'none at all'}")
    if row["hazards"]:
        complaints.append(f"{len(row['hazards'])} writes to registers that a product may still read, first "
                          f"{row['hazards'][0]}; try num_stages=1 or a newer ptxas (TRITON_PTXAS_PATH)")
    return complaints


def config_of(row: dict) -> str:
    """Constants, warps and stages in a few words."""
    constants = [name if value is True else f"{name}={value}" for name, value in row["constants"].items()
                 if value is not None and value is not False]
    return " ".join([*constants, f"{row['warps']} warps {row['stages']} stages"])


def faults(row: dict) -> list[str]:
    return [f"{row['kernel']} [{config_of(row)}] sm_{row['arch']} ({row['cases'][0]}): {text}"
            for text in row["complaints"]]


def compile_all(kernels: list[Kernel], jobs: int) -> Iterator[dict]:
    """A row for each kernel, in their order, as they are ready."""
    try:
        from tqdm import tqdm
    except ImportError:  # not on every machine with a GPU
        bar = iter
    else:
        bar = partial(tqdm, total=len(kernels), unit="kernel", disable=None)  # on a terminal only
    if jobs == 1:
        yield from bar(map(compiled, kernels))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from bar(pool.map(compiled, kernels))


def listed(allowed, kind=str):
    def parse(text):
        values = [kind(word) for word in text.split(",")]
        for value in values:
            if value not in allowed:
                expected = ", ".join(map(str, allowed))
                raise argparse.ArgumentTypeError(f"{value!r}, expected some of {expected}")
        return values
    return parse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=listed(KNOWN_CHIPS, int), default=list(DTYPES_BY_ARCH))
    parser.add_argument("--ops", type=listed(CASES), default=list(CASES))
    parser.add_argument("--dtypes", type=listed(DTYPES),
                        help="all on sm_80 and sm_90 by default, bf16 on the other chips")
    parser.add_argument("--head-dims", type=listed(HEAD_DIMS, int), default=list(HEAD_DIMS))
    parser.add_argument("--cases", type=re.compile, default="", help="a regular expression, to be found in "
                        '"op case", such as "attention bf16 D=64 window"')
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--out", help="a file for the line of JSON")
    flags = parser.parse_args(argv)
    if not dispatch.HAS_TRITON or dispatch.INTERPRETING:
        problem = "TRITON_INTERPRET is set: unset it" if dispatch.HAS_TRITON else "Triton is not installed"
        print(f"benchmarks.aot: {problem}; nothing can be compiled", file=sys.stderr)
        return 2
    kernels, complaints = [], []
    for arch in flags.archs:
        dtypes = flags.dtypes or DTYPES_BY_ARCH.get(arch, ["bf16"])
        cases = [case for op in flags.ops for case in CASES[op](dtypes, flags.head_dims)
                 if re.search(flags.cases, f"{case.op} {case.label}")]
        needed, said = record(cases, [arch])
        kernels += needed
        complaints += said
    if not kernels:
        parser.error("no case is left; --cases " + flags.cases.pattern)
    rows = []
    for row in compile_all(kernels, flags.jobs):
        rows.append(row)
        for text in faults(row):  # at once: all of them take long
            print(f"WRONG  {text}", file=sys.stderr, flush=True)
    for text in complaints:
        print(f"WRONG  {text}", file=sys.stderr)
    complaints += [text for row in rows for text in faults(row)]
    table(["kernel", "first case", "config", "arch", "registers", "spills", "shared", "matrix instruction"],
          [[row["kernel"].removesuffix("_kernel"), row["cases"][0], config_of(row), f"sm_{row['arch']}",
            row.get("registers", "-"), row["stack"] + row["local"] if "stack" in row else "-",
            row.get("shared", "-"), "+".join(row.get("matrix", [])) or "-"] for row in rows])
    print("registers per thread; spills: bytes of stack and local memory; shared: bytes of shared memory\n")
    settings = vars(flags) | {"cases": flags.cases.pattern}
    finish("aot", {"flags": settings, "kernels": rows, "complaints": complaints}, flags.out)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
