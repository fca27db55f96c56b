"""The optimizer: its schedule begins and ends where it should; a step clips and refuses NaN and infinity."""
import dataclasses
import math

import pytest
import torch

from r1zero.model.optimizer import (
    OptimConfig,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_step,
    optimizer_tensors,
)

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


def test_fused_adamw_takes_the_steps_of_the_plain_one():
    """Against torch's loop over parameters: with weight decay on matrices alone, and moving moments."""
    config = OptimConfig(weight_decay=0.1, clip_grad=1e9)
    fused, plain = tiny(0), tiny(0)
    optimizers = {model: make_optimizer(model, config) for model in (fused, plain)}
    assert all(group["fused"] for group in optimizers[fused].param_groups)
    for group in optimizers[plain].param_groups:
        group |= {"fused": False, "foreach": False}
    for _ in range(4):
        for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        norms = [optimizer_step(model, optimizers[model], 0.01, config) for model in (fused, plain)]
        assert norms[0] == norms[1]
    for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


# ---- moments in bf16 ----

def test_a_step_with_moments_in_bf16_is_adamw_with_rounded_moments():
    """Against the formula, with the moments rounded to bf16 after every step."""
    config = OptimConfig(moments="bf16", weight_decay=0.1, beta2=0.9, eps=1e-8)
    layer = torch.nn.Linear(5, 7)
    optimizer = make_optimizer(layer, config)
    expected = layer.weight.detach().double().clone()
    mean = square = torch.zeros(7, 5, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.randn(7, 5)
        layer.weight.grad, layer.bias.grad = gradient.clone(), torch.zeros(7)
        optimizer_step(layer, optimizer, 0.01, dataclasses.replace(config, clip_grad=1e9))
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.9 * square + 0.1 * gradient.double() ** 2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
        mean, square = mean.bfloat16().double(), square.bfloat16().double()
        assert (layer.weight - expected).abs().max() < 1e-4  # a bit may round the other way
    state = optimizer.state[layer.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert float(state["step"]) == 5


def test_moments_in_bf16_go_into_a_checkpoint_and_back():
    config = OptimConfig(moments="bf16")
    layers = [torch.nn.Linear(5, 7) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    gradients = [torch.randn(7, 5) for _ in range(3)]

    def step(layer, optimizer, gradient):
        layer.weight.grad = gradient.clone()
        optimizer_step(layer, optimizer, 0.1, config)

    optimizers = [make_optimizer(layer, config) for layer in layers]
    step(layers[0], optimizers[0], gradients[0])
    tensors, rest = optimizer_tensors(optimizers[0], layers[0].named_parameters())
    layers[1].load_state_dict(layers[0].state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer_tensors(optimizers[1], layers[1].named_parameters(), copies, rest)
    for gradient in gradients[1:]:
        for layer, optimizer in zip(layers, optimizers, strict=True):
            step(layer, optimizer, gradient)
    assert layers[0].weight.equal(layers[1].weight)
    assert optimizers[1].state[layers[1].weight]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("options, told", [
    (dict(moments="fp8"), "--optim.moments is 'fp8', expected fp32 or bf16"),
    (dict(moments="bf16", beta2=0.999), "a beta of 0.999: .* never falls; expected .* at most 0.99"),
])
def test_moments_that_cannot_be_kept_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        OptimConfig(**options)
