"""What a command imports before it works, and that nothing which only Linux has is needed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported_by(*words: str) -> set[str]:
    """The modules that a command imports, as a process of its own."""
    command = [sys.executable, "-X", "importtime", "-m", "r1zero.train.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


HEAVY = {"torch", "numba", "matplotlib", "wandb", "triton", "safetensors", "tiktoken", "transformers"}


@pytest.mark.parametrize("words, also", [
    (["--help"], {"numpy", "tyro"}), (["--version"], {"numpy", "tyro"}), (["grade", "--help"], set())])
def test_a_command_that_computes_nothing_waits_for_nothing(words, also):
    found = imported_by(*words)
    assert "r1zero.train.cli.streams" in found and found & (HEAVY | also) == set()


def test_the_loops_wait_for_no_plot_and_no_service():
    found = imported_by("demo", "--help")
    unused = {"matplotlib", "wandb", "pandas", "datasets", "transformers", "torch._dynamo", "torch._inductor"}
    assert "r1zero.train.grpo" in found and found & unused == set()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_what_only_linux_has_is_not_needed(tmp_path, platform):
    command = [sys.executable, "-m", "tests.elsewhere", platform, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert f"everything works on {platform}" in done.stdout, done.stderr[-3000:]
