"""The stages of `make gpu` on a bare machine, with torch, triton, numpy, pytest, einops and matplotlib alone.

They run in a process that sees no package but these and what these require themselves."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.correct import COLUMNS, Rows

ROOT = Path(__file__).parents[2]
HIDDEN = """
import importlib.metadata as metadata, importlib.machinery, re, sys
from packaging.requirements import Requirement

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

there, stack = set(), ["torch", "triton", "numpy", "pytest", "einops", "matplotlib"]
while stack:
    name = plain(stack.pop())
    if name in there:
        continue
    there.add(name)
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    stack += [r.name for r in map(Requirement, lines) if not r.marker or r.marker.evaluate({"extra": ""})]
hidden = {top for top, packages in metadata.packages_distributions().items()
          if top not in ("r1zero", "pip", "setuptools") and not any(plain(p) in there for p in packages)}
find_spec = importlib.machinery.PathFinder.find_spec

class OnlyThese:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in hidden else find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = OnlyThese
assert "tyro" in hidden and "torch" not in hidden and not hidden & set(sys.modules) - {"distutils-precedence"}
"""


def run_bare(code: str, *argv: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", HIDDEN + code, *argv], cwd=ROOT, capture_output=True,
                          text=True, env=environment)


STAGES = """
import pytest
from benchmarks import aot, generation, gpu, kernels, memory_predicted, tune
assert kernels.main(["--smoke", "--ops", "rope", "--out-dir", sys.argv[1]]) == 0
generation.main(generation.Flags(rounds=1, warmup=0, prompts=1, group_size=1, new_tokens=2, cases="equal"))
import torch
memory_predicted.measure(memory_predicted.Case("tiny", 300, 64, seq_len=32), torch.device("cpu"))
collect = ["-m", "gpu", "tests/kernels/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
assert pytest.main(collect) == 0
"""


def test_the_stages_run_without_any_other_package(tmp_path):
    done = run_bare(STAGES, str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert all(name in done.stdout for name in gpu.SANITIZED)


def test_hidden_packages_are_hidden():
    done = run_bare("import tyro")
    assert done.returncode == 1 and "No module named 'tyro'" in done.stderr


def test_the_tests_that_failed_are_read_from_the_rows_of_the_correctness_stage(tmp_path):
    assert gpu.failed_tests(tmp_path / "none.csv") == []
    rows = Rows(tmp_path / "correct.csv")
    for name, outcome in (("a.py::one", "passed"), ("a.py::two[bf16, 3]", "failed"), ("b.py::t", "skipped")):
        rows.write((name, outcome, "0.1", "why, in words"))
    assert gpu.failed_tests(tmp_path / "correct.csv") == ["a.py::two[bf16, 3]"]


def test_what_failed_is_repeated_and_both_results_are_in_the_summary(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "repeat_with_another_assembler",
                        lambda failed, out, env: asked.append(failed) or {"in_use": "12.8", "other": "13.5"})
    rows = f"{','.join(COLUMNS)}\\nt,failed,0.1,why\\n"
    code = f"open({str(tmp_path / 'correct.csv')!r}, 'w').write('{rows}')"
    stages = {"correct": gpu.Stage((sys.executable, "-c", code), 30)}
    gpu.run(["correct"], tmp_path, stages)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert asked == [["t"]] and summary["stages"][0]["assemblers"]["other"] == "13.5"


# ---- the sanitizer

def program(folder: Path, name: str, *lines: str) -> str:
    """A program of a few lines of shell, in place of one that this machine may not have."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def run_sanitizer(tmp_path: Path, **changes) -> tuple[int, dict]:
    """(exit code, its part of the summary) of this stage, as if there were a GPU."""
    stage = replace(gpu.STAGES["sanitizer"], gpu=False, needs=(), **changes)
    code = gpu.run(["sanitizer"], tmp_path, {"sanitizer": stage})
    return code, json.loads((tmp_path / "summary.json").read_text())["stages"][0]


@pytest.mark.parametrize("exit_code, result", [(0, "ok"), (9, "failed")])
def test_a_few_kernels_run_under_compute_sanitizer(tmp_path, monkeypatch, exit_code, result):
    print_all = 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING: $@"'
    program(tmp_path / "bin", "compute-sanitizer", print_all, f"exit {exit_code}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    code, done = run_sanitizer(tmp_path)
    assert done["result"] == result and code == (exit_code > 0) and done["limit"] <= 120
    said = (tmp_path / "sanitizer.log").read_text()
    assert said.startswith("1: --tool memcheck --error-exitcode 9 ") and all(x in said for x in gpu.SANITIZED)
    assert f"benchmarks.correct --out {tmp_path}/sanitizer --tests" in said


def test_without_compute_sanitizer_or_time_one_line_says_so_and_nothing_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    code, done = run_sanitizer(tmp_path)
    assert code == 0 and done == {"stage": "sanitizer", "result": "left out",
                                  "why": "compute-sanitizer is not on PATH"}
    assert capsys.readouterr().out.splitlines() == ["sanitizer: left out: compute-sanitizer is not on PATH"]
    program(tmp_path / "empty", "compute-sanitizer")
    code, done = run_sanitizer(tmp_path, least=gpu.MOST)
    assert code == 0 and done["why"].endswith(" s are left, and it takes 600 or more")


# ---- a machine that nobody thought of

OLD = "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."


def test_why_no_gpu_can_be_used_is_said_in_pytorchs_words(tmp_path):
    old = program(tmp_path, "python", "echo Traceback >&2", f"echo '{OLD}' >&2", "exit 1")
    assert gpu.why_no_gpu(old) == OLD
    assert gpu.why_no_gpu(program(tmp_path, "fine")) is None
    assert "No such file" in gpu.why_no_gpu(str(tmp_path / "none"))
    assert gpu.why_no_gpu(program(tmp_path, "dumb", "exit 3")) == "it does not say why"


def test_with_a_driver_too_old_and_another_triton_what_can_run_still_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: OLD)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.9.1")
    command = (sys.executable, "-c", "print('ran')")
    stages = {"compile": gpu.Stage(command, 30), "correct": gpu.Stage(command, 30, gpu=True),
              "kernels": gpu.Stage(command, 30, gpu=True)}
    assert gpu.run(list(stages), tmp_path, stages) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Triton is 3.9.1, and the kernels have been compiled with 3.6 and 3.7 only")
    assert said[1] == f"no GPU can be used ({OLD}), so these stages are left out: correct, kernels"
    found = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [stage["result"] for stage in found] == ["ok", "missing", "missing"]
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.7.1")
    assert gpu.untested_triton() is None
