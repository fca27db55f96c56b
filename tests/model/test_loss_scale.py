"""Loss scaling: gradients in fp16 keep their precision; an overflow costs an update and half the scale."""
import math

import pytest
import torch

from r1zero.model.loss_scale import LEAST_SCALE, LossScaler
from r1zero.model.optimizer import OptimConfig, make_optimizer, optimizer_step
from r1zero.model.packed import pack

from .model_cases import CONFIGS, scattered, sequences

CONFIG = OptimConfig(lr=0.1, clip_grad=1e9, weight_decay=0.5)


def learner(dtype: torch.dtype):
    """(model, optimizer, scaler) whose model computes in `dtype`."""
    model = scattered(CONFIGS["qwen2"], dtype=torch.float32)
    model.compute_dtype = dtype
    return model, make_optimizer(model, CONFIG), LossScaler.of(model)


def backward(model, scaler: LossScaler, size: float = 1.0) -> None:
    """The gradient of `size` times a mean log-prob, in two micro-batches."""
    torch.manual_seed(0)
    for lengths in ((5, 9), (3,)):
        packed = pack(sequences(*lengths))
        logp, _ = model.logprobs(model.hidden_states(packed), packed.tokens)
        scaler.scale(-size * logp.sum() / 17).backward()


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_gradient_in_fp16_is_the_exact_one_to_the_precision_of_fp16(size):
    found = {}
    for dtype in (torch.float64, torch.float16):
        model, optimizer, scaler = learner(dtype)
        assert scaler.enabled == (dtype == torch.float16)
        backward(model, scaler, size)
        scaler.unscale(optimizer)
        found[dtype] = {name: p.grad / size for name, p in model.named_parameters()}
    for name, expected in found[torch.float64].items():
        error = (found[torch.float16][name] - expected).norm() / expected.norm()
        assert error < 32 * 2**-11, (name, float(error))  # a few roundings per layer add up


def test_without_the_scale_small_gradients_are_lost_in_fp16():
    model, _, _ = learner(torch.float16)
    backward(model, LossScaler(), 1e-7)
    lost = sum(float((p.grad == 0).sum()) for p in model.blocks.parameters())
    assert lost > 0.5 * sum(p.numel() for p in model.blocks.parameters())


def test_an_overflow_skips_one_update_halves_the_scale_and_leaves_every_bit():
    model, optimizer, scaler = learner(torch.float16)
    backward(model, scaler)
    assert optimizer_step(model, optimizer, 0.1, CONFIG, scaler) > 0 and scaler.skipped == 0
    before, moments = weights(model), [s["exp_avg"].clone() for s in optimizer.state.values()]
    backward(model, scaler)
    model.norm.grad[3] = float("inf")  # as a product in fp16 beyond 65504
    assert optimizer_step(model, optimizer, 0.1, CONFIG, scaler) == 0.0
    assert scaler.metrics() == {"loss_scale": 2.0**15, "skipped_updates": 1}
    assert same(before, weights(model)) and all(p.grad is None for p in model.parameters())
    assert same(moments, [s["exp_avg"] for s in optimizer.state.values()])
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}
    backward(model, scaler)  # the next one is as usual
    assert optimizer_step(model, optimizer, 0.1, CONFIG, scaler) > 0 and scaler.skipped == 1
    assert scaler.value == 2.0**15 and not same(before, weights(model))


def test_a_gradient_beyond_fp16_overflows_by_itself():
    model, optimizer, scaler = learner(torch.float16)
    norms = []
    while not norms or norms[-1] == 0.0:
        backward(model, scaler, 1e4)
        norms.append(optimizer_step(model, optimizer, 0.0, CONFIG, scaler))
    assert scaler.skipped == len(norms) - 1 > 2 and scaler.value == 2.0 ** (16 - scaler.skipped)
    exact, optimizer, off = learner(torch.float64)
    backward(exact, off, 1e4)
    assert norms[-1] == pytest.approx(optimizer_step(exact, optimizer, 0.0, CONFIG, off), rel=0.01)


def test_a_gradient_that_no_scale_mends_is_told_at_last():
    model, optimizer, scaler = learner(torch.float16)
    before, norm = weights(model), 0.0
    while norm == 0.0:
        backward(model, scaler)
        model.norm.grad[3] = float("nan")
        norm = optimizer_step(model, optimizer, 0.1, CONFIG, scaler)
    assert math.isnan(norm) and scaler.value == LEAST_SCALE and scaler.skipped == 16
    assert same(before, weights(model)) and model.norm.grad[3].isnan()  # left to find the reason


def test_the_scale_doubles_after_2000_good_steps_and_a_copy_goes_on_where_it_was():
    model, optimizer, scaler = learner(torch.float16)

    def step(scaler: LossScaler) -> None:
        scaler.scale(torch.zeros(()))
        model.norm.grad = torch.ones_like(model.norm)
        scaler.unscale(optimizer)
        scaler.stepped()

    for _ in range(1999):
        step(scaler)
    assert scaler.counters() == {"loss_scale": 2.0**16, "skipped_updates": 0, "steps_since_scaling": 1999}
    other = LossScaler("cpu", enabled=True)
    other.load(scaler.counters())
    for one in (scaler, other):
        step(one)
        assert one.counters() == {"loss_scale": 2.0**17, "skipped_updates": 0, "steps_since_scaling": 0}


def test_a_scaler_that_is_off_does_nothing():
    scaler, loss = LossScaler(), torch.ones(())
    assert scaler.scale(loss) is loss and scaler.metrics() == scaler.counters() == {}
    scaler.load({"loss_scale": 8.0})
    assert scaler.value == 1.0 and not scaler.overflowed() and scaler.skipped == 0
