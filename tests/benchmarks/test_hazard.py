"""Operand A of an asynchronous matrix product is not written before its wait; another assembler is tried."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aot, hazard
from r1zero.kernels.dispatch import HAS_TRITON, tl, triton

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
PRODUCT = "HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR4].tnspB, R88, gsb0"  # reads R120 to R123
OTHER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"  # A in shared memory
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


# ---- a few instructions, as nvdisasm prints them ----

def sass(*lines: str) -> str:
    """nvdisasm's text of instructions and labels."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        guard, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
        guard = f"@{guard}" if guard else ""
        text.append(f"        /*{address:04x}*/ {guard:>15} {rest} ;")
        address += 16
    return "\n".join(text)


def found(*lines: str) -> list[tuple[str, tuple[int, ...]]]:
    """The opcode of each instruction that writes A too early, and the registers."""
    return [(item.writer.opcode, item.registers) for item in hazard.hazards(sass(*lines, "EXIT"))]


def test_a_write_before_the_wait_is_found_and_one_behind_it_is_not():
    assert found(PRODUCT, "FADD R121, R1, R2", WAIT) == [("FADD", (121,))]
    assert found(PRODUCT, WAIT, "FADD R121, R1, R2") == []
    assert found("FADD R121, R1, R2", PRODUCT, WAIT) == []
    assert found(PRODUCT, "FADD R119, R120, R121", "STS [R121], R122", "FADD R124, R1, R2", WAIT) == []
    [item] = hazard.hazards(sass(PRODUCT, "FADD R121, R1, R2", WAIT))
    assert str(item) == f"FADD R121, R1, R2 at 0010 writes R121 before the wait that covers {PRODUCT} at 0000"


def test_a_product_with_both_operands_in_shared_memory_reads_no_registers():
    assert found(OTHER, "FADD R24, R1, R2", "FADD R8, R1, R2", WAIT) == []


def test_a_write_on_the_next_round_of_a_loop_is_found():
    loop = [".L_x_1:", "FADD R120, R1, R2", PRODUCT, "@!P0 BRA `(.L_x_1)", WAIT]
    assert found(*loop) == [("FADD", (120,))]
    assert found(".L_x_1:", "FADD R120, R1, R2", PRODUCT, WAIT, "@!P0 BRA `(.L_x_1)") == []
    # as the forward kernel of attention does: the wait of the other product covers this one too
    assert found(".L_x_1:", OTHER, WAIT, "FADD R120, R1, R2", PRODUCT, "@!P0 BRA `(.L_x_1)", WAIT) == []


def test_both_ways_of_a_branch_are_walked():
    skips = [PRODUCT, "@P1 BRA `(.L_x_2)", WAIT, ".L_x_2:", "FADD R120, R1, R2", WAIT]
    assert found(*skips) == [("FADD", (120,))]
    assert found(*[line.replace("@P1 BRA ", "BRA.U UP0, ") for line in skips]) == [("FADD", (120,))]
    # a jump for certain does not come by what stands behind it, one under a condition may
    jumps = [PRODUCT, "BRA `(.L_x_2)", "FADD R120, R1, R2", ".L_x_2:", WAIT]
    assert found(*jumps) == []
    assert found(*[line.replace("BRA ", "@P1 BRA ") for line in jumps]) == [("FADD", (120,))]
    assert found(*[line.replace("BRA ", "BRA.U UP0, ") for line in jumps]) == [("FADD", (120,))]
    # nor does the end
    assert found(PRODUCT, "EXIT", "FADD R120, R1, R2") == []
    assert found(PRODUCT, "@P0 EXIT", "FADD R120, R1, R2") == [("FADD", (120,))]


def test_a_wait_for_all_but_n_groups_covers_those_with_n_newer_ones():
    all_but_one, write = WAIT.replace("0x0", "0x1"), "FADD R120, R1, R2"
    assert found(PRODUCT, all_but_one, write, WAIT) == [("FADD", (120,))]
    assert found(PRODUCT, OTHER, all_but_one, write, WAIT) == []
    assert found(PRODUCT, OTHER, WAIT.replace("0x0", "0x2"), write, WAIT) == [("FADD", (120,))]
    # a group ends with gsb0: two products of one group are no two groups
    first = PRODUCT.replace(", gsb0", "")
    assert found(first, PRODUCT.replace("R120", "R124"), all_but_one, write, WAIT) == [("FADD", (120,))]
    assert found(first, PRODUCT.replace("R120", "R124"), WAIT, write) == []
    # what no group holds yet is not waited for
    assert found(first, WAIT, write, OTHER, WAIT) == [("FADD", (120,))]


def test_a_write_or_wait_under_a_predicate_may_happen_or_not():
    assert found(PRODUCT, "@P3 FADD R120, R1, R2", WAIT) == [("FADD", (120,))]
    assert found(PRODUCT, "@!PT LDS R120, [R1]", WAIT) == []
    assert found(PRODUCT, f"@P0 {WAIT}", "FADD R120, R1, R2", WAIT) == [("FADD", (120,))]


@pytest.mark.parametrize("instruction, registers", [
    ("FADD R122, R1, R2", [122]),
    ("IMAD.WIDE.U32 R118, R1, R2, RZ", []),
    ("IMAD.WIDE.U32 R122, P0, R1, R2, RZ", [122, 123]),
    ("LDS.64 R118, [R1]", []),
    ("LDS.64 R122, [R1+UR4+0x10]", [122, 123]),
    ("LDG.E.128 R116, desc[UR4][R2.64]", []),
    ("LDG.E.128 R118, desc[UR4][R2.64]", [120, 121]),
    ("LDSM.16.M88.4 R118, [R1]", [120, 121]),
    ("LDSM.16.M88.2 R119, [R1]", [120]),
    ("LDSM.16.M88 R119, [R1]", []),
    ("CS2R R122, SRZ", [122, 123]),
    ("CS2R.32 R122, SR_CLOCKLO", [122]),
    ("DADD R122, R2, R4", [122, 123]),
    ("F2F.F64.F32 R122, R2", [122, 123]),
    ("HMMA.16816.F32.BF16 R118, R4, R8, R118", [120, 121]),
    ("HMMA.16816.F16 R118, R4, R8, R118", []),
    ("HGMMA.64x8x16.F32.BF16 R118, gdesc[UR4], R118", [120, 121]),
    ("HGMMA.64x8x16.F16 R118, gdesc[UR4], R118", []),
    ("SHFL.BFLY PT, R121, R1, 0x2, 0x1f", [121]),
    ("IADD3 R121, P0, R1, R2, RZ", [121]),
    ("ISETP.GE.AND P2, PT, R120, R121, PT", []),
    ("STG.E.128 desc[UR4][R120.64], R120", []),
    ("LDGSTS.E.BYPASS.128 [R120], desc[UR16][R120.64], !P2", []),
    ("WARPSYNC R120", []),
    ("R2UR UR4, R120", []),
    ("MOV RZ, R120", []),
    ("BAR.SYNC.DEFER_BLOCKING 0x0", []),
])
def test_which_registers_an_instruction_writes(instruction, registers):
    opcode = instruction.split()[0]
    assert found(PRODUCT, instruction, WAIT) == ([(opcode, tuple(registers))] if registers else [])


def test_a_branch_that_cannot_be_followed_is_an_error():
    with pytest.raises(ValueError, match="BRX R4 -0x10 at 0010: expected a branch to a label"):
        hazard.hazards(sass(PRODUCT, "BRX R4 -0x10", WAIT))
    assert hazard.hazards(sass(OTHER, "BRX R4 -0x10", WAIT)) == []  # nothing to walk from


# ---- what the compiler makes ----

@triton.jit
def converted_kernel(x, y, z, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A product whose operand A is converted on the way, so it lies in registers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(x + m[:, None] * 4096 + start + k[None, :]).to(tl.bfloat16)
        right = tl.load(y + (start + k)[:, None] * 4096 + n[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(z + m[:, None] * 4096 + n[None, :], acc.to(tl.bfloat16))


@needs_triton
@pytest.mark.parametrize("stages, faults", [(3, 1), (1, 0)])
def test_a_kernel_whose_operand_is_overwritten_too_early_is_reported(stages, faults):
    x, y = aot.empty(256, dtype=torch.int8), aot.empty(256)
    sizes = {"M": 64, "N": 64, "BLOCK_K": 64}

    def launch():
        converted_kernel[(1,)](x, y, y, 1000, **sizes, num_stages=stages, num_warps=4)

    [(module, name, data)] = aot.launches_of(90, launch)
    row = aot.compiled(aot.Kernel("toy", module, name, 90, data, ["case"]))
    assert len(row["complaints"]) == faults, row["complaints"]
    assert all(re.match(r"\d+ writes to registers that a product may still read", text) and
               "num_stages=1" in text for text in row["complaints"])


@needs_triton
def test_attention_takes_operands_from_registers_and_waits_before_it_writes_them():
    [case] = [case for case in aot.attention_cases(["bf16"], [64]) if case.label == "bf16 D=64 group 2"]
    kernels, _ = aot.record([case], [90])
    rows = {row["kernel"].removeprefix("attention_"): row for row in map(aot.compiled, kernels)}
    for name in ("fwd_kernel", "bwd_dkdv_kernel", "bwd_dq_kernel"):
        assert rows[name]["products_from_registers"] > 0 and rows[name]["hazards"] == []


@needs_triton
@pytest.mark.slow
def test_no_assembler_here_overwrites_an_operand_of_attention(tmp_path):
    in_use = hazard.assembler_in_use(90)
    for version, path in hazard.assemblers().items():
        if version == in_use:  # test_aot.py compiles everything with it
            continue
        flags = ["--archs", "90", "--ops", "attention", "--dtypes", "bf16"]
        done = subprocess.run([sys.executable, "-m", "benchmarks.aot", *flags], cwd=ROOT, capture_output=True,
                              text=True, env={**os.environ, "TRITON_PTXAS_PATH": str(path)})
        rows = json.loads(done.stdout.splitlines()[-1])["kernels"]
        assert [row["hazards"] for row in rows if row["hazards"]] == [], version
        assert sum(row["products_from_registers"] for row in rows) > 100


# ---- once more with another assembler ----

OTHER_ASSEMBLER = ("99.0.1", Path("/other/ptxas"))
TOYS = """
import os
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("name", ["a-b", "c::d e"])
def test_needs_another(name):
    assert os.environ["TRITON_PTXAS_PATH"] == "/other/ptxas" and os.path.isdir(os.environ["TRITON_CACHE_DIR"])

class TestInAClass:
    def test_never_passes(self):
        assert False

def test_passes_at_once():
    pass
"""


@needs_triton
def test_what_failed_is_repeated_with_the_other_assembler_and_both_results_are_told(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/test_toy.py").write_text(TOYS)
    names = ["test_needs_another[a-b]", "test_needs_another[c::d e]", "TestInAClass::test_never_passes"]
    failed = [f"sub/test_toy.py::{name}" for name in names]
    report = hazard.repeat(failed, tmp_path, 120, 90, dict(os.environ), OTHER_ASSEMBLER, tmp_path)
    in_use = hazard.assembler_in_use(90)
    results = [{in_use: "failed", "99.0.1": result} for result in ("passed", "passed", "failed")]
    assert report == {"in_use": in_use, "other": "99.0.1", "tests": dict(zip(failed, results, strict=True))}
    assert json.loads((tmp_path / "assemblers.json").read_text()) == report
    assert "test_passes_at_once" not in (tmp_path / "assemblers.log").read_text()  # nobody asked for it
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[0] == f"{failed[0]}: failed with ptxas {in_use}, passed with ptxas 99.0.1"


@needs_triton
def test_a_repetition_without_time_or_failures_or_another_assembler(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_toy.py").write_text("import time\n\ndef test_endless():\n    time.sleep(600)\n")
    failed, in_use = ["test_toy.py::test_endless"], hazard.assembler_in_use(100)
    report = hazard.repeat(failed, tmp_path, 0, 100, dict(os.environ), OTHER_ASSEMBLER, tmp_path)
    assert report["tests"] == {failed[0]: {in_use: "failed", "99.0.1": "not run"}}
    monkeypatch.setattr(hazard, "rerun", None)  # nothing else is started
    assert hazard.repeat([], tmp_path, 60, 100, {}, OTHER_ASSEMBLER)["tests"] == {}
    monkeypatch.setattr(hazard, "assemblers", lambda: {in_use: Path("/this/ptxas")})
    monkeypatch.setattr(hazard, "assembler_in_use", lambda arch: in_use)
    capsys.readouterr()
    report = hazard.repeat(failed, tmp_path, 60, 100, {})
    assert report == {"in_use": in_use, "other": None, "tests": {failed[0]: {in_use: "failed"}}}
    assert capsys.readouterr().out.startswith(f"1 failed with ptxas {in_use}, and there is no other")


def test_results_are_read_from_a_log_that_was_cut():
    log = """
        collected 6 items
        sub/test_toy.py::test_a[x y] PASSED                [ 16%]
        sub/test_toy.py::test_b PASSED                     [ 33%]
        sub/test_toy.py::test_b ERROR                      [ 33%]
        sub/test_toy.py::Class::test_c FAILED              [ 50%]
        sub/test_toy.py::test_d SKIPPED (needs a device)   [ 66%]
        [gw3] [ 83%] FAILED sub/test_toy.py::test_e[x y]
        sub/test_toy.py::test_f """
    assert hazard.outcomes("\n".join(line.strip() for line in log.splitlines())) == {
        "sub/test_toy.py::test_a[x y]": "passed", "sub/test_toy.py::test_b": "failed",
        "sub/test_toy.py::Class::test_c": "failed", "sub/test_toy.py::test_d": "skipped",
        "sub/test_toy.py::test_e[x y]": "failed"}


@needs_triton
def test_assemblers_are_found_by_version_newest_first(tmp_path, monkeypatch):
    def write(folder: Path, text: str) -> Path:
        folder.mkdir(parents=True)
        path = folder / "ptxas"
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
        return path

    newest = write(tmp_path / "cuda/bin", "Cuda compilation tools, release 99.10, V99.10.2")
    older = write(tmp_path / "path", "Cuda compilation tools, release 99.9, V99.9.100")
    write(tmp_path / "other/bin", "no assembler")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    monkeypatch.setenv("PATH", str(older.parent), prepend=os.pathsep)
    found = hazard.assemblers()
    assert list(found.items())[:2] == [("99.10.2", newest), ("99.9.100", older)]
    assert hazard.assembler_in_use(90) in found and hazard.assembler_in_use(100) in found  # Triton's own
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(older))
    assert hazard.assembler_in_use(90) == "99.9.100"
