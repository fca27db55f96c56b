"""The benchmark of the log-prob gap runs at toy size, with random weights, and its numbers are the gaps'."""
import json

import numpy as np
import pytest

from benchmarks import logp_gap


def test_the_gap_by_dtype_at_toy_size(tmp_path, capsys):
    out, picture = tmp_path / "gap.json", tmp_path / "gap.png"
    flags = logp_gap.Flags(problems=2, samples=2, new_tokens=6, device="cpu", out=str(out),
                           picture=str(picture))
    record = logp_gap.main(flags)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record == json.loads(out.read_text())
    gaps = record["gaps"]
    assert list(gaps) == ["fp32", "fp32, fp32 head", "bf16", "bf16, fp32 head", "fp16", "fp16, fp32 head"]
    assert gaps["fp32"] == gaps["fp32, fp32 head"]  # it changes nothing there
    assert gaps["fp32"]["max"] < 1e-4 < gaps["fp16"]["max"] and gaps["fp16"]["mean"] < gaps["bf16"]["mean"]
    for dtype in ("bf16", "fp16"):
        assert gaps[f"{dtype}, fp32 head"]["mean"] < gaps[dtype]["mean"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_numbers_of_the_gaps():
    found = logp_gap.numbers_of(np.arange(101) / 100)
    assert found == {"tokens": 101, "mean": pytest.approx(0.5), "p99": pytest.approx(0.99), "max": 1.0}
