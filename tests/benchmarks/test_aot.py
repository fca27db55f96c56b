"""The kernels compile for the three chips without a GPU, and the checks see a kernel that is bad."""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import aot
from r1zero.kernels.chips import matrix_unit
from r1zero.kernels.dispatch import HAS_TRITON, tl, triton
from r1zero.model.config import preset

from .launch_cases import benchmark_cases, gpu_tests, launches, needs, one_step, presets

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


# ---- toy kernels, good and bad ----

@triton.jit(do_not_specialize=["T"])
def good_kernel(x, T, M, eps, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, i < T * M) + eps, i < T * M)


@triton.jit
def specialised_kernel(x, T, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, i.to(tl.float32), i < T)


@triton.jit
def product_kernel(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr):
    rows, columns, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, K)
    left = tl.load(x + rows[:, None] * K + k[None])
    right = tl.load(x + columns[None] * K + k[:, None])
    tl.store(y + rows[:, None] * COLUMNS + columns[None], tl.dot(left, right).to(y.dtype.element_ty))


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.zeros((BLOCK + 1,), tl.float32))


def row_of(kernel, arch: int, *args, **kwargs) -> dict:
    """What the table says about one launch of a kernel."""
    [launch] = aot.launches_of(arch, lambda: kernel[(1,)](*args, **kwargs))
    return aot.compiled(aot.Kernel("toy", *launch[:2], arch, launch[2], ["case"]))


def product(arch: int, rows: int, columns: int, k: int, dtype=torch.bfloat16, **options) -> dict:
    x = aot.empty(256, dtype=dtype)
    return row_of(product_kernel, arch, x, x, ROWS=rows, COLUMNS=columns, K=k, **options)


@pytest.mark.parametrize("arch, instruction", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_good_kernel_has_no_complaints(arch, instruction):
    row = product(arch, 64, 64, 64)
    assert instruction in row["matrix"] and row["complaints"] == [] and row["dots"] == [(64, "bf16")]
    assert row["registers"] > 16 and row["shared"] > 0 and row["warps"] == 4
    row = row_of(good_kernel, arch, aot.empty(64), 4, 16, 0.5, BLOCK=64, num_warps=1)
    assert row["complaints"] == row["matrix"] == row["dots"] == [] and row["warps"] == 1
    assert row["types"] == ["*bf16"] and aot.config_of(row) == "BLOCK=64 1 warps 3 stages"


def test_a_kernel_that_spills_is_reported():
    row = product(80, 128, 128, 32, num_warps=1)
    assert row["stack"] + row["local"] > 0 and row["spill_instructions"] > 0
    [complaint] = row["complaints"]
    assert complaint.startswith(f"spills: {row['stack']} bytes of stack")


def test_a_kernel_with_too_much_shared_memory_is_reported():
    row = product(90, 128, 128, 512, num_warps=8)
    assert row["shared"] > 227 * 1024
    assert [text for text in row["complaints"] if "bytes of shared memory, sm_90 has 232448" in text]
    x = aot.empty(256)
    [(module, name, data)] = aot.launches_of(
        121, lambda: product_kernel[(1,)](x, x, ROWS=64, COLUMNS=64, K=64))
    row = aot.compiled(aot.Kernel("toy", module, name, 121, data, ["case"], limit=1024))  # says the chip
    assert row["complaints"] == [f"{row['shared']} bytes of shared memory, sm_121 has 1024"]


def test_a_product_without_the_chips_matrix_instruction_is_reported():
    assert product(90, 32, 32, 32, num_warps=1)["complaints"] == []  # too small for it
    row = product(90, 64, 64, 32, num_warps=1)  # one warp cannot issue it
    assert row["matrix"] == ["HMMA"]
    assert row["complaints"] == ["a product of 64 rows without HGMMA instructions, with HMMA"]
    assert product(90, 64, 64, 32, torch.float32, num_warps=1)["complaints"] == []  # 16 bit only


def test_a_kernel_that_does_not_compile_is_a_row_too():
    [complaint] = row_of(broken_kernel, 90, aot.empty(64), BLOCK=64)["complaints"]
    assert complaint.startswith("does not compile: ")


# ---- recording ----

def test_each_kernel_is_recorded_once_and_sizes_that_recompile_are_named():
    def good(T):
        good_kernel[(T,)](aot.empty(T, 48), T, 48, 1e-6, BLOCK=64, num_warps=2)

    def specialised(T):
        specialised_kernel[(T,)](aot.empty(T), T, BLOCK=64)

    def another(T):
        (good if T > 1 else specialised)(T)

    cases = [aot.Case("toy", "first", good), aot.Case("toy", "second", good)]
    kernels, complaints = aot.record(cases, [80, 90])
    assert [(k.name, k.arch, k.cases) for k in kernels] == [
        ("good_kernel", 80, ["first", "second"]), ("good_kernel", 90, ["first", "second"])]
    data = json.loads(kernels[0].data)
    assert data["signature"] == {"x": "*bf16", "T": "i32", "M": "i32", "eps": "fp32", "BLOCK": "constexpr"}
    assert complaints == []  # T is 4096, then 4099, then 1
    kernels, [complaint] = aot.record([aot.Case("toy", "third", specialised)], [90])
    assert len(kernels) == 3  # T is divisible by 16, or not, or 1
    assert complaint == "specialised_kernel, third, sm_90: compiled again when sizes change, because of T"
    _, [complaint] = aot.record([aot.Case("toy", "fourth", another)], [90])
    assert complaint.endswith("other sizes launch ['specialised_kernel'], not ['good_kernel']")


# ---- the command ----

def run_aot(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "benchmarks.aot", *flags], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "TRITON_INTERPRET": "0", **environment})


FEW = "attention bf16 D=128 group (1|6)($|, )|" \
    "linear_logprob bf16 M=2048 weight bf16$|grpo clip reference k3$|" \
    "moe bf16 K=8 M=2048 F=768 weight bf16$|" \
    "rmsnorm bf16 M=2048 weight bf16|swiglu bf16 F=4864$|rope bf16 H=32 D=128"


@pytest.mark.parametrize("flags", [
    ("--archs", "90", "--cases", FEW.replace("D=128 group (1|6)", "D=(64|128) group (1|6)( one query)?")),
    ("--archs", "80,100", "--cases", FEW)])
def test_our_kernels_compile_without_spills_for_the_chips_own_matrix_units(flags, tmp_path):
    done = run_aot(*flags, "--jobs", "1", "--out", str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "aot.json").read_text()) and record["complaints"] == []
    rows = record["kernels"]
    assert {row["op"] for row in rows} == set(aot.CASES) and all(row["registers"] <= 255 for row in rows)
    for arch in map(int, flags[1].split(",")):
        products = [row for row in rows if row["arch"] == arch and row["dots"]]
        assert {row["kernel"] for row in products} >= {"attention_fwd_kernel", "logprob_dlogits_bwd_kernel"}
        for row in products:
            if min(tall for tall, _ in row["dots"]) >= 64:
                assert any(name.startswith(aot.INSTRUCTIONS[matrix_unit(arch)]) for name in row["matrix"])
        assert all(row["kernel"].split("_kernel")[0] in done.stdout for row in products)


def test_the_largest_tiles_fit_a_chip_of_99_kib():
    done = run_aot("--archs", "86", "--cases", "attention bf16 D=256 group 3$", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert 80_000 < max(row["shared"] for row in rows) <= 101_376 == rows[0]["limit"]


@pytest.mark.slow
def test_every_kernel_compiles():
    done = run_aot()
    assert done.returncode == 0, done.stderr


def test_no_op_compiles_again_when_the_tokens_change():
    cases = [case for make in aot.CASES.values() for case in make(list(aot.DTYPES), list(aot.HEAD_DIMS))]
    kernels, complaints = aot.record(cases, [90])
    assert complaints == [] and len(kernels) > 1000


@cache
def compiled_for(arch: int) -> set[str]:
    cases = [case for make in aot.CASES.values()
             for case in make(list(aot.DTYPES), list(aot.HEAD_DIMS))]
    return {needs(kernel.name, kernel.data) for kernel in aot.record(cases, [arch])[0]}


def not_compiled(calls, arch: int) -> list[str]:
    compiled, found = compiled_for(arch), []
    for name, call in calls:
        launched = launches(call, arch)
        assert launched, f"{name} launches nothing"
        found += [f"{kernel} of {name}" for kernel, data in launched if needs(kernel, data) not in compiled]
    return found


def test_what_models_benchmarks_and_tests_launch_is_compiled_ahead():
    some = list(gpu_tests())[::15]
    assert not_compiled([*presets(), *benchmark_cases(), *some], 90) == []
    other = preset("tiny", 1000, head_dim=48, n_heads=6)
    assert {text.split()[0] for text in not_compiled([("x", lambda: one_step(other))], 90)} >= {
        "attention_fwd_kernel", "rope_fwd_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_what_all_tests_on_a_gpu_launch_is_compiled_ahead(arch):
    calls = list(gpu_tests())
    assert len(calls) > 300 and not_compiled(calls, arch) == []


def test_a_bad_kernel_is_named_and_an_exit_code(monkeypatch, capsys):
    def cases(dtypes, head_dims):
        x = aot.empty(256)
        sizes = {"ROWS": 128, "COLUMNS": 128, "K": 32}
        yield aot.Case("toy", "tall", lambda T: product_kernel[(1,)](x, x, **sizes, num_warps=1))

    monkeypatch.setattr(aot, "CASES", {"toy": cases})
    assert aot.main(["--archs", "80", "--jobs", "1"]) == 1
    printed = capsys.readouterr()
    [complaint] = json.loads(printed.out.splitlines()[-1])["complaints"]
    assert printed.err == f"WRONG  {complaint}\n" and "(tall): spills: " in complaint


def test_it_refuses_the_interpreter_and_unknown_flags(capsys):
    done = run_aot(TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TRITON_INTERPRET is set" in done.stderr
    for flags, said in ((["--ops", "chess"], "expected some of rmsnorm"), (["--cases", "chess"], "no case")):
        with pytest.raises(SystemExit):
            aot.main(flags)
        assert said in capsys.readouterr().err
