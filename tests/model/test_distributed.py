"""Sums over processes, with the processes stood in for."""
import numpy as np
import torch

from r1zero.model import distributed


def test_one_process_leaves_everything_as_it_is():
    x, layer = np.ones(3, np.float32), torch.nn.Linear(2, 2)
    assert distributed.n_processes() == 1 and distributed.all_sum(x) is x
    distributed.sum_gradients(layer)
    assert layer.weight.grad is None


def test_trainable_gradients_are_summed_and_frozen_ones_never_made(monkeypatch):
    """A process without a gradient takes part with zeros, or the others would wait for it."""
    summed = []
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: summed.append(tuple(x.shape)))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4).requires_grad_(False))
    model[0].weight.grad = torch.ones(3, 2)
    distributed.sum_gradients(model)
    assert summed == [(3, 2), (3,)]
    assert torch.equal(model[0].weight.grad, torch.ones(3, 2))
    assert torch.equal(model[0].bias.grad, torch.zeros(3))
    assert model[1].weight.grad is None and model[1].bias.grad is None
