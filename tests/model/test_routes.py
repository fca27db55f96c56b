"""Routes of a mixture of experts: what a replay changes and what it leaves alone, where its gradient goes,
and which routes are refused."""
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r1zero.model.balance import Balance
from r1zero.model.config import ModelConfig
from r1zero.model.moe import Router
from r1zero.model.moe_config import ROUTING, MoEConfig
from r1zero.model.packed import pack
from r1zero.model.routes import (
    RecordedRouting,
    Routing,
    check_routes,
    differ,
    route_bytes,
    route_dtype,
    route_shape,
)

from .model_cases import CONFIGS, SHAPE, scattered, sequences
from .moe_cases import softmax

MIXTURES = {name: config for name, config in CONFIGS.items() if config.moe is not None}
MIXTURES["norms behind"] = dataclasses.replace(CONFIGS["mixtral"], post_norm=True)
each_mixture = pytest.mark.parametrize("name", MIXTURES)


def random_routes(n_tokens, config, seed=0):
    """[T, L, K] uint8: different experts for each token and layer."""
    n_layers, n_chosen = route_shape(config)
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_tokens, n_layers, config.moe.n_experts, generator=rng)
    return scores.argsort(-1)[..., :n_chosen].to(torch.uint8)


def recorded(model, packed, replayed=None):
    """(hidden states, the routes that were taken)"""
    routing = RecordedRouting(replayed)
    return model.hidden_states(packed, routing), torch.from_numpy(routing.routes(model.config))


@each_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_of_the_own_choice_changes_no_bit(name, dtype):
    model = scattered(MIXTURES[name], dtype=torch.float32)
    model.compute_dtype = dtype
    packed = pack(sequences(9, 5))
    expected, routes = recorded(model, packed)
    assert routes.shape == (14, *route_shape(model.config)) and routes.dtype == torch.uint8
    routing = Routing(routes)
    assert torch.equal(model.hidden_states(packed, routing), expected)
    assert torch.equal(expected, model.hidden_states(packed)) and not routing.flipped().any()


@each_mixture
def test_a_replay_of_another_choice_is_taken_and_where_it_differs_is_known(name):
    model = scattered(MIXTURES[name])
    packed = pack(sequences(9, 5))
    hidden, own = recorded(model, packed)
    others = random_routes(14, model.config)
    others[3] = own[3].flip(-1)  # the same experts in another order
    routing = RecordedRouting(others)
    changed = model.hidden_states(packed, routing)
    assert torch.equal(torch.from_numpy(routing.routes(model.config)), others)
    assert (changed - hidden).abs().max() > 1e-3
    flipped = routing.flipped()
    assert flipped.shape == (14, route_shape(model.config)[0])
    # Below the first layer with experts nothing has changed, so its own choice is that of before.
    by_hand = [set(a) != set(b) for a, b in zip(others[:, 0].tolist(), own[:, 0].tolist(), strict=True)]
    assert flipped[:, 0].tolist() == by_hand and any(by_hand) and not by_hand[3]


def test_a_token_without_a_route_chooses_for_itself():
    model = scattered(CONFIGS["mixtral"])
    packed = pack(sequences(9, 5))
    hidden, own = recorded(model, packed)
    unknown = own.to(torch.int16)
    unknown[4:7] = -1
    found, taken = recorded(model, packed, unknown)
    assert torch.equal(found, hidden) and torch.equal(taken, own)


@pytest.mark.parametrize("family", ROUTING)
def test_the_gates_of_a_replay_are_from_the_scores_of_all_experts(family):
    """Of scores that are zeroed outside of the router's own choice, a replayed expert's gate would be 0."""
    config = MoEConfig(16, 4, 6, **{**ROUTING[family], "shared_gate": False})
    router, x = Router(12, config), torch.randn(20, 12)
    with torch.no_grad():
        for p in (*router.parameters(), *router.buffers()):
            p.normal_()
    replayed = torch.rand(20, 16).argsort(-1)[:, None, :4]
    routes = router(x, Routing(replayed))
    assert torch.equal(routes.experts, replayed[:, 0])
    for t, logits in enumerate(routes.logits.tolist()):
        experts = replayed[t, 0].tolist()
        if config.scores == "logits":
            gates = softmax([logits[e] for e in experts])
        else:
            is_softmax = config.scores == "softmax"
            scores = softmax(logits) if is_softmax else torch.tensor(logits).sigmoid().tolist()
            gates = [scores[e] for e in experts]
            if config.normalise:
                gates = [gate / sum(gates) for gate in gates]
        assert routes.gates[t].tolist() == pytest.approx([g * config.scale for g in gates], rel=1e-4)


def loss_of(model, packed, routing):
    logp, _ = model.logprobs(model.hidden_states(packed, routing), packed.tokens.roll(-1))
    return logp.sum()


@each_mixture
def test_the_routers_gradient_under_a_replay_is_that_of_finite_differences(name):
    torch.manual_seed(0)
    model = scattered(MIXTURES[name])
    packed = pack(sequences(6, 4))
    others = random_routes(10, model.config)
    loss_of(model, packed, Routing(others)).backward()
    for router in Balance(model).routers:
        weight = router.linear.weight
        assert weight.grad.abs().max() > 1e-3
        for index in weight.grad.abs().flatten().topk(3).indices.tolist():
            flat, step, found = weight.data.view(-1), 1e-5, []
            for sign in (1, -1):
                flat[index] += sign * step
                with torch.no_grad():
                    found.append(float(loss_of(model, packed, Routing(others))))
                flat[index] -= sign * step
            expected = (found[0] - found[1]) / 2 / step
            assert float(weight.grad.flatten()[index]) == pytest.approx(expected, rel=1e-4)


def test_what_is_computed_again_for_the_backward_pass_replays_too_and_counts_once():
    model = scattered(CONFIGS["mixtral"])
    packed, others = pack(sequences(6, 4)), random_routes(10, model.config)
    found = []
    for recompute in (False, True):
        model.zero_grad()
        routing = Routing(others)
        if recompute:
            hidden = checkpoint(model.hidden_states, packed, routing, use_reentrant=False)
        else:
            hidden = model.hidden_states(packed, routing)
        before = routing.flipped().clone()
        hidden.square().sum().backward()
        assert torch.equal(routing.flipped(), before) and before.any() and before.shape == (10, 2)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layers_are_counted_among_those_with_experts():
    config = dataclasses.replace(
        CONFIGS["mixtral"], n_layers=5, moe=MoEConfig(5, 2, 7, dense_layers=(0, 2)))
    model = scattered(config)
    assert [router.layer for router in Balance(model).routers] == [0, 1, 2] and route_shape(config) == (3, 2)
    others = random_routes(7, config)
    assert torch.equal(recorded(model, pack(sequences(7)), others)[1], others)


def test_a_byte_per_expert_is_enough_up_to_256():
    shapes = [ModelConfig(**SHAPE, moe=MoEConfig(n, 4, 3)) for n in (256, 257)]
    assert [route_dtype(config) for config in shapes] == [torch.uint8, torch.int16]
    assert [route_bytes(config) for config in shapes] == [8, 16]
    assert route_shape(CONFIGS["plain"]) == (0, 0)


def test_routes_differ_by_their_experts_in_whatever_order():
    routes = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [0, 1]]], dtype=torch.uint8)
    others = torch.tensor([[[1, 0], [2, 4]], [[4, 5], [1, 0]]], dtype=torch.uint8)
    assert differ(routes, others).tolist() == [[False, True], [False, False]]


def test_the_last_of_the_most_experts_survives_as_a_route():
    config = ModelConfig(**SHAPE, moe=MoEConfig(32_768, 1, 3))
    assert torch.tensor(32_767).to(route_dtype(config)) == 32_767


MIXTRAL = CONFIGS["mixtral"]  # 2 layers, 2 of 5 experts


def spoiled(index, value):
    routes = [random_routes(n - 1, MIXTRAL).numpy() for n in (4, 6)]
    routes[1][index] = value
    return routes


@pytest.mark.parametrize("routes, message", [
    (spoiled((2, 1, 0), 5), "expert 5 is none of the model's, expected 0 to 4"),
    ([r.astype(np.int64) for r in spoiled((0, 0, 0), 0)][:1] + [np.full((5, 2, 2), -1)], "expert -1 is none"),
    (spoiled((2, 1), 3), "a token goes through an expert twice"),
    ([r[:, :1] for r in spoiled(0, [0, 1])], r"of sequence 0 are \[3, 1, 2\] uint8, expected \[3, 2, 2\]"),
    ([r[..., :1] for r in spoiled(0, [0, 1])], r"are \[3, 2, 1\] uint8, expected \[3, 2, 2\]"),
    ([spoiled(0, [0, 1])[0], np.ones((6, 2, 2), np.uint8)], r"are \[6, 2, 2\] uint8, expected \[5, 2, 2\]"),
    ([r.astype(np.float32) for r in spoiled(0, [0, 1])], "float32, expected .* integers"),
    (spoiled(0, [0, 1])[:1], "got 1 arrays for 2 sequences"),
])
def test_routes_of_another_model_or_length_are_refused_in_one_line(routes, message):
    with pytest.raises(ValueError, match=message) as error:
        check_routes(routes, [4, 6], MIXTRAL)
    assert "\n" not in str(error.value)


def test_routes_that_fit_pass_and_a_dense_model_takes_none():
    check_routes(spoiled(0, [0, 1]), [4, 6], MIXTRAL)
    check_routes([], [], MIXTRAL)
    with pytest.raises(ValueError, match="the model is dense"):
        check_routes(spoiled(0, [0, 1]), [4, 6], CONFIGS["plain"])
    model = scattered(MIXTRAL)
    whole = random_routes(7, MIXTRAL)
    for routes in (whole[:6], whole[:, :1], whole[..., :1]):
        with pytest.raises(ValueError, match="routes are .* expected the routes of these tokens, from this"):
            model.hidden_states(pack(sequences(7)), Routing(routes))
