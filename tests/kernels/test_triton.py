"""Starts the tests of the Triton kernels, which need a process of their own: tests/kernels/interpreter/."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1zero.kernels.dispatch import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/kernels/interpreter", "-q", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
