"""Balance of experts: the losses against loops in fp64, the bias that moves once per step, the counts."""
import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r1zero.model import distributed
from r1zero.model.balance import Balance, BalanceConfig, aux_loss, probabilities, z_loss
from r1zero.model.moe import Routes
from r1zero.model.moe_config import MoEConfig
from r1zero.model.packed import pack

from .model_cases import CONFIGS, scattered, sequences
from .moe_cases import best, softmax

DEEPSEEK = CONFIGS["deepseek's mixture"]  # its layer 0 is dense


def naive_aux(logits, experts, error=None):
    """Of one layer with softmax scores, from the definition. error: what public code got wrong."""
    T, E, K = len(logits), len(logits[0]), len(experts[0])
    p = [softmax(row) for row in logits]
    if error == "softmax twice":  # transformers #45111
        p = [softmax(row) for row in p]
    if error == "chosen experts only":  # aprender #2162
        p = [[value if e in chosen else 0.0 for e, value in enumerate(row)]
             for row, chosen in zip(p, experts, strict=True)]
    f = [sum(row.count(e) for row in experts) / (T if error == "sums to K" else T * K) for e in range(E)]
    mean_p = [sum(row[e] for row in p) / T for e in range(E)]
    return E * sum(a * b for a, b in zip(f, mean_p, strict=True))


def watched(logits, K):
    """(a Balance that has just watched layers with these logits of 5 experts, the experts)."""
    balance = Balance(scattered(CONFIGS["mixtral"]))
    experts = [torch.tensor([best(row, K) for row in layer.tolist()]) for layer in logits]
    for i, (chosen, layer) in enumerate(zip(experts, logits, strict=True)):
        balance._routes[i] = Routes(chosen, None, layer)
    return balance, experts


def random_logits(n_layers=2, T=30, E=5):
    return [(2 * torch.randn(T, E, dtype=torch.float64)).requires_grad_() for _ in range(n_layers)]


def test_the_losses_are_the_formulas_per_layer_and_then_their_mean():
    logits = random_logits()
    balance, experts = watched(logits, 2)
    balance.config = BalanceConfig(aux_coef=0.7, z_coef=0.2)
    loss = balance.loss(0.25)
    layers = [naive_aux(row.tolist(), e.tolist()) for row, e in zip(logits, experts, strict=True)]
    z = np.mean([[math.log(sum(map(math.exp, row))) ** 2 for row in layer.tolist()] for layer in logits])
    assert float(loss.detach()) == pytest.approx(0.25 * (0.7 * np.mean(layers) + 0.2 * z), rel=1e-12)
    metrics = balance.metrics()
    assert metrics["aux_loss"] == pytest.approx(np.mean(layers) / 4)
    assert metrics["z_loss"] == pytest.approx(z / 4)
    entropies = [-sum(p * math.log(p) for p in softmax(row)) for layer in logits for row in layer.tolist()]
    assert metrics["router_entropy"] == pytest.approx(np.mean(entropies) / 4)


@pytest.mark.parametrize("error", ["softmax twice", "chosen experts only", "sums to K"])
def test_each_public_error_would_move_the_loss(error):
    (logits,) = random_logits(1)
    with torch.no_grad():
        logits[:, 1] += 4  # an expert that most tokens prefer
    experts = [best(row, 2) for row in logits.tolist()]
    counts = torch.bincount(torch.tensor(experts).flatten(), minlength=5)
    found = float(aux_loss(probabilities(logits, MoEConfig(5, 2, 3)), counts).detach())
    assert found == pytest.approx(naive_aux(logits.tolist(), experts), rel=1e-12)
    assert abs(found - naive_aux(logits.tolist(), experts, error)) > 0.05


def test_the_gradient_of_the_losses_is_a_finite_difference():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0, 4, 4, 1])
    for scores in ("softmax", "sigmoid"):
        config = MoEConfig(5, 2, 3, scores=scores)
        assert torch.autograd.gradcheck(lambda x, c=config: aux_loss(probabilities(x, c), counts), [logits])
    assert torch.autograd.gradcheck(z_loss, [logits])


def test_perfect_balance_costs_1_and_two_unequal_layers_do_not_cancel():
    """Layers that are pooled before the product would look balanced here (transformers #28255)."""
    uniform = torch.full((4, 4), 0.25)
    assert float(aux_loss(uniform, torch.tensor([2, 2, 2, 2]))) == pytest.approx(1.0)
    left = torch.tensor([[9.0, 9, -9, -9, -9]] * 10, dtype=torch.float64)
    balance, _ = watched([left, left.flip(1)], 2)
    balance.config = BalanceConfig(aux_coef=1.0, z_coef=0.0)
    assert float(balance.loss(1.0)) == pytest.approx(2.5, rel=1e-3)  # the worst of 5 experts, 2 per token
    for scores in ("softmax", "sigmoid"):
        p = probabilities(3 * torch.randn(9, 5), MoEConfig(5, 2, 3, scores=scores))
        assert torch.allclose(p.sum(-1), torch.ones(9))


def micro_step(balance, model, lengths=(7, 5), recompute=False):
    packed = pack(sequences(*lengths))
    with balance.watch():
        if recompute:
            hidden = checkpoint(model.hidden_states, packed, use_reentrant=False)
        else:
            hidden = model.hidden_states(packed)
    loss = hidden.square().sum() + balance.loss(1.0)
    loss.backward()


def test_the_bias_moves_once_per_step_towards_experts_that_had_too_little():
    model = scattered(DEEPSEEK)
    [router] = Balance(model).routers
    balance, before = Balance(model, BalanceConfig(bias_rate=0.01)), router.balance_bias.clone()
    for lengths in ((7, 5), (11,), (2, 1)):
        micro_step(balance, model, lengths)
    [counts] = balance.counts_LE
    assert counts.sum() == 26 * 3 and torch.equal(router.balance_bias, before)
    balance.update()
    expected = 0.01 * (counts.double().mean() - counts).sign()
    torch.testing.assert_close(router.balance_bias - before, expected)
    assert 0 < (expected > 0).sum() < 8
    # A new step counts anew; and a rate of 0 moves nothing.
    balance.begin()
    still = Balance(model, BalanceConfig(bias_rate=0.0))
    after = router.balance_bias.clone()
    micro_step(still, model)
    still.update()
    assert not balance.counts_LE.any() and balance.metrics() == {} and torch.equal(router.balance_bias, after)


def test_the_bias_follows_the_counts_of_all_processes(monkeypatch):
    model = scattered(DEEPSEEK)
    balance = Balance(model, BalanceConfig(bias_rate=0.5))
    [router] = balance.routers
    before = router.balance_bias.clone()
    micro_step(balance, model)
    elsewhere = torch.tensor([500, 0, 0, 0, 0, 0, 0, 1000], dtype=torch.float64)
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: x.add_(elsewhere))
    balance.update()
    assert ((router.balance_bias - before) / 0.5).round().tolist() == [-1, 1, 1, 1, 1, 1, 1, -1]
    # A process without tokens takes part, or the others would wait for it.
    balance.begin()
    balance.update()
    assert ((router.balance_bias - before) / 0.5).round().tolist() == [-2, 2, 2, 2, 2, 2, 2, -2]


def test_a_forward_pass_that_is_done_again_for_the_backward_is_counted_once():
    model = scattered(DEEPSEEK)
    counts = []
    for recompute in (False, True):
        torch.manual_seed(0)
        balance = Balance(model)
        micro_step(balance, model, recompute=recompute)
        counts.append(balance.counts_LE[0].tolist())
        counts.append(model.blocks[1].mlp.router.linear.weight.grad.clone())
        model.zero_grad()
    assert counts[0] == counts[2] and sum(counts[0]) == 12 * 3
    torch.testing.assert_close(counts[1], counts[3])


def test_a_layer_that_runs_twice_is_noted_once_and_a_micro_batch_counts_once():
    model, packed = scattered(DEEPSEEK), pack(sequences(7, 5))
    balance = Balance(model)
    with balance.watch():
        model.hidden_states(packed)
        model.hidden_states(packed)
    assert float(balance.loss(1.0).detach()) > 0 and balance.loss(1.0) == 0.0
    assert balance.counts_LE[0].sum() == 12 * 3


def test_what_is_not_watched_is_not_counted_and_no_hook_stays():
    model = scattered(DEEPSEEK)
    balance = Balance(model)
    model.hidden_states(pack(sequences(6)))
    assert balance.loss(1.0) == 0.0 and balance.metrics() == {}
    with pytest.raises(KeyError), balance.watch():
        raise KeyError
    assert not any(router._forward_hooks for router in balance.routers)


def test_the_metrics_tell_load_dead_experts_and_the_largest_load():
    logits = torch.full((8, 5), -5.0)
    logits[:, 0], logits[:7, 1], logits[7:, 3] = 5.0, 4.0, 4.0
    balance, _ = watched([logits, logits], 2)
    balance.loss(1.0)
    metrics = balance.metrics()
    assert metrics["expert_load"] == [[2.5, 2.1875, 0.0, 0.3125, 0.0]] * 2
    assert metrics["expert_load_max"] == 2.5 and metrics["experts_dead"] == 0.4


def test_a_model_without_balance_biases_is_only_counted():
    model = scattered(CONFIGS["mixtral"])
    balance, before = Balance(model), {name: value.clone() for name, value in model.state_dict().items()}
    micro_step(balance, model)
    balance.update()
    assert balance.counts_LE.sum(1).tolist() == [12 * 2] * 2 and len(balance.metrics()) == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_dense_model_has_nothing_to_balance():
    model = scattered(CONFIGS["plain"])
    balance = Balance(model)
    with balance.watch():
        model.hidden_states(pack(sequences(4)))
    assert balance.loss(1.0) == 0.0 and balance.metrics() == {} and not balance.routers
    balance.update()


@pytest.mark.parametrize("change", [
    dict(aux_coef=-0.1), dict(z_coef=float("nan")), dict(bias_rate=float("inf"))])
def test_bad_coefficients_are_refused_under_the_name_of_their_flag(change):
    [(name, value)] = change.items()
    flag = "--balance." + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} is {value}, expected 0 or more"):
        BalanceConfig(**change)
