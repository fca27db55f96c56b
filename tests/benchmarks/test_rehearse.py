"""The GPU's tests are rehearsed without one: what they launch is known, compiled ahead, and reported."""
import csv
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks import aot, correct, generation, gpu, rehearse
from r1zero.kernels import rope
from r1zero.kernels.dispatch import HAS_TRITON, INTERPRETING

needs_compiler = pytest.mark.skipif(not HAS_TRITON or INTERPRETING, reason="needs Triton's compiler")
PICKED = ("-m", "gpu", "tests/kernels/gpu/test_elementwise.py", "-k",
          "its_gradient and (64 or 128) and (rope or swiglu)")


# ---- the rehearsal

@needs_compiler
def test_a_rehearsal_finds_what_the_launchers_launch_bf16_first():
    rehearsal = rehearse.Rehearsal(90)
    rehearse.rehearse(rehearsal, *PICKED)
    assert rehearsal.tests == 12 and rehearsal.unrehearsed == {}
    kinds = [rehearse.dtype_of(launch) for launch in rehearsal.kernels]
    assert list(dict.fromkeys(kinds)) == ["bf16", "fp16", "fp32"]
    assert kinds.index("fp16") == kinds.count("bf16")
    table = aot.empty(1000, 32, dtype=torch.float32)
    for H in (18, 3):
        for backward in (False, True):
            [launch] = aot.launches_of(90, rope.rope_rotate, aot.empty(1000, H, 64), table, table, backward)
            assert launch in rehearsal.kernels
    many = 100 * list(rehearsal.kernels)
    assert rehearse.minutes(many, 1) > 8 * rehearse.minutes(many, 16)


@needs_compiler
def test_the_tests_of_two_to_the_31_elements_are_rehearsed_too():
    """They need 40 GB on a GPU, and none here."""
    rehearsal = rehearse.Rehearsal(90)
    rehearse.rehearse(rehearsal, "-m", "gpu", "tests/kernels/gpu", "-k", "two_to_the_31 or beyond_32_bits")
    assert rehearsal.tests == 6 and rehearsal.unrehearsed == {}
    found = {launch[1].removesuffix("_kernel") for launch in rehearsal.kernels}
    assert found >= {"attention_fwd", "rmsnorm_fwd", "rmsnorm_bwd", "rope_fwd", "swiglu_fwd", "swiglu_bwd",
                     "logprob_tiles_fwd", "moe_product"}


def test_numbers_from_the_cpu_are_kept_and_others_are_made_up():
    with rehearse.without_a_gpu(90):
        lengths = torch.tensor([3, 0, 2], dtype=torch.int32).cuda()
        offsets = torch.cat([lengths[:1] * 0, lengths.cumsum(0)])
        assert lengths.is_meta and offsets.tolist() == [0, 3, 3, 5] and offsets.diff().max().item() == 3
        assert torch.rand(3, device="cuda").repeat_interleave(lengths).shape == (5,)
        x = torch.rand(3, device="cuda")
        assert x.is_meta and x.sum().item() == 0.0 and torch.equal(x, x + 1) and bool((x < 0).all())
        offsets += 1  # nothing is known of what is written in place
        assert offsets.tolist() == [0, 0, 0, 0]
    assert torch.tensor([1]).device.type == "cpu"


@needs_compiler
@pytest.mark.slow
def test_every_test_but_those_on_graphs_is_rehearsed_to_its_end():
    rehearsal = rehearse.Rehearsal(90)
    rehearse.rehearse(rehearsal)
    assert len(rehearsal.unrehearsed) == 2 and all("graph" in name for name in rehearsal.unrehearsed)
    assert 500 < len(rehearsal.kernels) < 1100


@needs_compiler
def test_kernels_are_compiled_into_the_cache_and_a_bad_one_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    table = aot.empty(1000, 32, dtype=torch.float32)
    [good] = aot.launches_of(90, rope.rope_rotate, aot.empty(1000, 3, 64), table, table, False)
    bad = (good[0], "no_such_kernel", good[2])
    compilers = rehearse.Compilers(90, 1)
    compilers.pool = ThreadPoolExecutor(1)
    compilers.add(good)
    compilers.add(bad)
    [fault] = compilers.finish().items()
    assert fault[0] == bad and fault[1].startswith("AttributeError")
    assert len(list(tmp_path.rglob("rope_fwd_kernel.cubin"))) == 1
    printed = capsys.readouterr()
    assert "DOES NOT COMPILE  no_such_kernel" in printed.err and "2 of 2 kernels compiled" in printed.out


# ---- results, row by row

CASES = """
import pytest, torch
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "a sum"
def test_large(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
def test_cut(): raise KeyboardInterrupt
def test_late(): pass
"""


def test_results_are_written_row_by_row_and_memory_ends_one_case(tmp_path, capsys):
    (tmp_path / "test_cases.py").write_text(CASES)
    flags = ["-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path / "test_cases.py")]
    code = correct.main(["--out", str(tmp_path), "--tests", *flags])
    assert code == pytest.ExitCode.INTERRUPTED
    with open(tmp_path / "correct.csv", newline="", encoding="utf-8") as file:
        rows = {row["test"].split("::")[1]: row for row in csv.DictReader(file)}
    assert {name: row["result"] for name, row in rows.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_large": "skipped"}
    assert "a sum" in rows["test_wrong"]["why"]
    assert rows["test_large"]["why"].startswith("out of memory: CUDA")
    assert "test_large" in (tmp_path / "correct.xml").read_text()
    assert "1 passed, 1 failed, 1 skipped" in capsys.readouterr().out


# ---- benchmarks.gpu

def test_a_stage_whose_packages_are_missing_is_left_out_in_one_line(tmp_path, capsys):
    command = (sys.executable, "-c", "print('ran')")
    stages = {"bare": gpu.Stage(command, 20, ("no_such_package", "json")), "whole": gpu.Stage(command, 20)}
    assert gpu.run(["bare", "whole"], tmp_path, stages) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "has no" in line]
    assert "has no no_such_package, so these stages are left out: bare;" in line
    found = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["result"] for stage in found] == ["missing", "ok"]


def test_a_stage_at_its_limit_writes_what_it_has(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what there is')"
    done = gpu.run_stage("cut", gpu.Stage((sys.executable, "-c", code), 1), tmp_path, {})
    assert done["result"] == "out of time" and (tmp_path / "cut.log").read_text() == "what there is\n"


def test_a_cache_that_cannot_be_written_moves(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert gpu.environment(tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert "cannot be written" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert gpu.environment(tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / "cache")


def test_driver_clocks_and_power_are_what_nvidia_smi_says(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1, 143771 MiB, 0 MiB, P0, 1980 MHz'\n")
    tool.chmod(0o755)
    [found] = gpu.gpus(str(tool))
    assert found["name"] == "NVIDIA H200" and found["driver_version"] == "570.1"
    assert found["clocks.sm"] == "1980 MHz"
    assert gpu.gpus(str(tmp_path / "none")) == []


def test_generation_goes_on_where_memory_does_not_suffice():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    assert generation.unless_out_of_memory(too_large) == "out of memory: CUDA out of memory."
    assert generation.unless_out_of_memory(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        generation.unless_out_of_memory(lambda: 1 / 0)
