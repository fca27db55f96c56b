"""The optimizer: its schedule begins and ends where it should; a step clips and refuses NaN and infinity."""
import math

import pytest
import torch

from r1zero.model.optimizer import OptimConfig, learning_rate, make_optimizer, optimizer_step

from ..rl.cases import Capture, tiny


def test_learning_rate_warms_up_and_ends_where_it_should():
    c = OptimConfig(lr=2.0, warmup=4, final_lr=0.1)
    rates = [learning_rate(step, 20, c) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(4 + 7, 19, c) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    constant = OptimConfig(lr=2.0, warmup=2, schedule="constant")
    assert [learning_rate(step, 5, constant) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, 1, OptimConfig(lr=2.0, warmup=0)) == 2.0
    assert learning_rate(30, 20, c) == pytest.approx(0.2)  # beyond the end it stays


def test_an_optimizer_step_clips_decays_matrices_only_and_refuses_what_is_not_finite():
    model, c = tiny(), OptimConfig(clip_grad=1.0, weight_decay=0.5)
    optimizer = make_optimizer(model, c)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == \
        {name: 0.5 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    n = sum(p.numel() for p in model.parameters())
    capture = Capture(model)
    assert optimizer_step(model, capture, 0.1, c) == pytest.approx(3 * math.sqrt(n), rel=1e-4)
    clipped = torch.cat([g.flatten() for g in capture.grads[0].values()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-4) and capture.param_groups[0]["lr"] == 0.1
    before = model.embed.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.norm.grad[3] = float("nan")
    assert math.isnan(optimizer_step(model, optimizer, 0.1, c)) and torch.equal(model.embed, before)
    assert not optimizer.state  # nor did the moments move
