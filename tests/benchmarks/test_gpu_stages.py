"""The stages of `make gpu` on a bare machine, with torch, triton, numpy, pytest, einops and matplotlib alone.

They run in a process that sees no package but these and what these require themselves."""
import json
import os
import subprocess
import sys
from pathlib import Path

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
from benchmarks import aot, generation, gpu, kernels, tune
assert kernels.main(["--smoke", "--ops", "rope", "--out-dir", sys.argv[1]]) == 0
generation.main(generation.Flags(rounds=1, warmup=0, prompts=1, group_size=1, new_tokens=2, cases="equal"))
collect = ["-m", "gpu", "tests/kernels/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
assert pytest.main(collect) == 0
"""


def test_the_stages_run_without_any_other_package(tmp_path):
    done = run_bare(STAGES, str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_attention_at_every_head_dim" in done.stdout


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
