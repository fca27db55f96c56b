"""The routes that the engine gives with an answer: those of all tokens that were read, the prompt's with the
cache, and after a preemption the same as before."""
import dataclasses

import numpy as np
import pytest
import torch

from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.moe_config import MoEConfig
from r1zero.model.packed import pack
from r1zero.model.routes import Routing, check_routes

from .cases import CONFIG, EOS, PROMPTS, Watched, everything_is_free, mixed_requests

MIXTURE = dataclasses.replace(CONFIG, n_layers=3, moe=MoEConfig(6, 2, 8, dense_layers=(1,)))
LONG = list(range(4, 28)) * 2  # three pages of prompt


def logp_under(model, request, completion, routes):
    """The log-probs of the answer as a trainer computes them, with these routes replayed."""
    sequence = [*request.prompt, *completion.tokens.tolist()]
    with torch.no_grad():
        hidden = model.hidden_states(pack([sequence[:-1]]), Routing(torch.from_numpy(routes)))
        logp = model.logits(hidden).log_softmax(-1)[len(request.prompt) - 1 :]
    return logp.gather(1, torch.from_numpy(completion.tokens)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("rows, cache_tokens", [(4, None), (16, 96)], ids=["few rows", "a small cache"])
def test_the_engine_gives_the_routes_of_the_naive_loop(rows, cache_tokens):
    model = Watched(-2.0, config=MIXTURE)
    requests = mixed_requests(9) + [Request(LONG, 5, seed, stop_ids=(EOS,)) for seed in range(2)]
    engine = Engine(model, max_rows=rows, cache_tokens=cache_tokens, keep_routes=True)
    found = engine.generate(requests)
    for request, completion in zip(requests, found, strict=True):
        naive = generate_naive(model, request)
        n_read = len(request.prompt) + len(completion.tokens) - 1  # the last token was never read
        assert completion.routes.shape == (n_read, 2, 2) and completion.routes.dtype == np.uint8
        assert np.array_equal(completion.tokens, naive.tokens)
        assert np.array_equal(completion.routes, naive.routes)
    lengths = [len(r.prompt) + len(c.tokens) for r, c in zip(requests, found, strict=True)]
    check_routes([completion.routes for completion in found], lengths, MIXTURE)
    everything_is_free(engine)


def test_a_prompt_is_read_once_and_all_of_its_group_have_its_routes():
    model = Watched(-2.0, config=MIXTURE)
    requests = [Request(LONG, 5, seed, stop_ids=(EOS,)) for seed in range(6)]
    found = Engine(model, keep_routes=True).generate(requests)
    assert model.prefilled == [[len(LONG)]]
    for completion in found:
        assert np.array_equal(completion.routes[: len(LONG)], found[0].routes[: len(LONG)])
        assert not np.shares_memory(completion.routes, found[0].routes) or completion is found[0]


def test_routes_are_given_where_they_are_asked_for_and_dense_models_have_none():
    request = Request(PROMPTS[0], 4)
    for model, keep_routes in ((Watched(config=MIXTURE), False), (Watched(), True)):
        [completion] = Engine(model, keep_routes=keep_routes).generate([request])
        assert completion.routes is None
    assert generate_naive(Watched(), request).routes is None
    one, two = (Engine(Watched(config=MIXTURE), keep_routes=keep) for keep in (False, True))
    assert two.token_bytes == one.token_bytes + 4  # two layers with experts, two experts


def with_other_routes_from_the_first_preemption(engine, requests):
    """(completions, {request: the routes that it was given in the place of its own as it was preempted})"""
    given, preempt, rng = {}, engine.scheduler.preempt, np.random.default_rng(0)

    def preempt_with_other_routes():
        youngest = max(s.id for s in engine.scheduler.running if s is not None)
        preempt()
        [sequence] = [s for s in engine.scheduler.waiting if s.id == youngest]
        assert len(sequence.routes) == len(sequence.prefix) - 1  # its newest token was not read yet
        if youngest not in given:
            experts = np.broadcast_to(np.arange(6, dtype=np.uint8), (*sequence.routes.shape[:2], 6))
            given[youngest] = sequence.routes = rng.permuted(experts, axis=-1)[..., :2]

    engine.scheduler.preempt = preempt_with_other_routes
    return engine.generate(requests), given


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_was_preempted_reads_its_tokens_again_through_the_same_experts(temperature):
    """Its first log-probs were sampled with those routes. At temperature 0 all answers are alike until then,
    and yet those with other routes do not share a prefill."""
    model = Watched(-9.0, config=MIXTURE)
    requests = [Request([5, 6, 7], 40, seed, temperature) for seed in range(6)]
    engine = Engine(model, max_rows=6, cache_tokens=160, keep_routes=True)
    found, given = with_other_routes_from_the_first_preemption(engine, requests)
    assert len(given) >= 2
    for number, routes in given.items():
        assert np.array_equal(found[number].routes[: len(routes)], routes)
        assert found[number].routes.shape == (3 + 40 - 1, 2, 2)
    if temperature:  # what is sampled later has the log-probs of a trainer that replays them
        for number, (request, completion) in enumerate(zip(requests, found, strict=True)):
            first = len(given[number]) - 2 if number in given else 0
            expected = logp_under(model, request, completion, completion.routes)
            np.testing.assert_allclose(completion.logp[first:], expected[first:], rtol=0, atol=1e-4)
    everything_is_free(engine)


def test_a_request_that_is_cancelled_has_the_routes_of_what_was_read():
    model = Watched(-9.0, config=MIXTURE)
    engine = Engine(model, max_rows=2, keep_routes=True)
    ids = engine.submit([Request(PROMPTS[0], 20, seed) for seed in range(3)])
    for _ in range(4):
        engine.step()
    engine.cancel(ids[0]), engine.cancel(ids[2])
    engine.step()
    assert engine.completed[ids[0]].routes.shape == (3 + 4 - 1, 2, 2)
    assert engine.completed[ids[2]].routes is None  # it had not begun
