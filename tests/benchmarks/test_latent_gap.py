"""The benchmark of latent attention's two forms runs at toy size, and its numbers are the gaps'."""
import json

import numpy as np
import pytest
import torch

from benchmarks import latent_gap
from r1zero.model.transformer import Transformer


def test_the_gap_of_both_forms_at_toy_size(tmp_path, capsys):
    out = tmp_path / "gap.json"
    record = latent_gap.main(latent_gap.Flags(sequences=2, tokens=20, device="cpu", out=str(out)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record == json.loads(out.read_text())
    gaps = record["gaps"]
    forms = ("expanded", "absorbed")
    assert list(gaps) == [f"{name}, {form}" for name in ("fp32", "bf16", "bf16, fp32 head") for form in forms]
    for form in forms:
        assert gaps[f"fp32, {form}"]["max"] < 1e-4 < gaps[f"bf16, {form}"]["mean"] < 0.1
        assert 1e-4 < gaps[f"bf16, fp32 head, {form}"]["mean"] < 0.1


def test_all_forms_are_one_policy():
    model = Transformer(latent_gap.SMALL, torch.float64).init_weights(0).double()
    tokens = torch.randint(512, (2, 20))
    with torch.no_grad():
        logps = [latent_gap.logps_of(model, tokens, form) for form in ("packed", "expanded", "absorbed")]
    for other in logps[1:]:
        np.testing.assert_allclose(other, logps[0], rtol=0, atol=1e-9)


def test_the_numbers_of_the_gaps():
    found = latent_gap.numbers_of(np.zeros(101), np.arange(101) / 100)
    assert found["tokens"] == 101 and found["mean"] == pytest.approx(0.5) and found["max"] == 1.0
    assert found["k3"] == pytest.approx(np.mean([np.exp(i / 100) - i / 100 - 1 for i in range(101)]))
