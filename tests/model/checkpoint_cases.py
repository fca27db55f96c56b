"""What the tests of checkpoints share: a small checkpoint, and the check that it is whole."""
from pathlib import Path

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, save_checkpoint


def save(run, step, **options):
    weight, moment = torch.full((50,), float(step)), torch.full((50,), -1.0)
    tensors = {"model": {"w": weight}, "optimizer": {"w/exp_avg": moment}}
    return save_checkpoint(run, step, tensors, {"step": step, "text": "naïve"}, **options)


def two_saved(run) -> Path:
    """A run with checkpoints of steps 1 and 2; returns the second."""
    save(run, 1)
    return save(run, 2)


def assert_sound(found, step):
    assert found.step == step and found.state == {"step": step, "text": "naïve"}
    assert torch.equal(found.tensors["model"]["w"], torch.full((50,), float(step)))
    assert torch.equal(found.tensors["optimizer"]["w/exp_avg"], torch.full((50,), -1.0))


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def fails(match: str):
    """The next lines raise CheckpointError, in one line, with a message like `match`."""
    return pytest.raises(CheckpointError, match=rf"\A(?=.*{match})[^\n]+\Z")
