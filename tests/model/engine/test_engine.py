"""The engine against the oracle that recomputes everything, in whatever company, order, batch and cache."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1zero.kernels.cpu import compile as cpu
from r1zero.model.config import LatentShape
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.pages import Pages
from r1zero.model.engine.requests import Request, group_requests
from r1zero.model.engine.sampling import NonFiniteError, sample_seeds
from r1zero.model.engine.slots import Slots
from r1zero.model.moe_config import MoEConfig
from r1zero.model.packed import pack
from r1zero.model.rope_scaling import RopeScaling

from .cases import (
    CONFIG,
    EOS,
    PROMPTS,
    Watched,
    agree,
    both_caches,
    everything_is_free,
    mixed_requests,
    naive_of,
    needs_numba,
    same,
)


@both_caches
@pytest.mark.parametrize("eos_bias", [0.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_engine_is_the_naive_loop(temperature, eos_bias, paged):
    model, requests = Watched(eos_bias), mixed_requests(temperature=temperature)
    engine = Engine(model, paged=paged)
    completions = engine.generate(requests)
    agree(model, requests, completions)
    everything_is_free(engine)
    for r, c in zip(requests, completions, strict=True):
        assert c.tokens.dtype == np.int64 and c.logp.dtype == np.float32 and EOS not in c.tokens[:-1]
        assert c.finish_reason == ("stop" if c.tokens[-1] == EOS else "length")
        assert c.finish_reason == "stop" or len(c.tokens) == r.max_new_tokens


@both_caches
def test_padding_of_the_vocabulary_is_never_sampled(paged):
    model, requests = Watched(config=replace(CONFIG, vocab_in_use=23)), mixed_requests(48, temperature=3.0)
    found = Engine(model, paged=paged).generate(requests)
    agree(model, requests, found)
    assert 15 < max(token for c in found for token in c.tokens.tolist()) < 23


KINDS = {
    "window and a layer without RoPE": dict(window=7, window_layers=(0,), nope_layers=(1,)),
    "post-norm": dict(post_norm=True, qk_norm=False, qk_norm_full_width=True),
    "biases": dict(out_bias=True, mlp_bias=True),
    "experts": dict(moe=MoEConfig(8, 3, 20, d_shared=16, dense_layers=(0,), scores="sigmoid",
                                  balance_bias=True, n_groups=4, groups_per_token=2)),
    "yarn": dict(rope_scaling=RopeScaling("yarn", 8.0, original_max_seq_len=24)),
    "latents": dict(n_kv_heads=4, qk_norm=False, qkv_bias=False, latent=LatentShape(
        kv_rank=10, q_rank=12, rope_dim=4, value_dim=6)),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_layers_that_no_compiled_loop_knows_decode_from_pages(kind):
    model, requests = Watched(config=replace(CONFIG, **kind)), mixed_requests()
    engine = Engine(model)
    assert isinstance(engine.cache, Pages)
    agree(model, requests, engine.generate(requests))


@both_caches
def test_stretched_rope_decodes_from_any_cache(paged):
    scaling = RopeScaling("llama3", 8.0, original_max_seq_len=24)
    model, requests = Watched(config=replace(CONFIG, rope_scaling=scaling)), mixed_requests()
    agree(model, requests, Engine(model, paged=paged).generate(requests))


@both_caches
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 17, 64])
def test_batch_size_and_order_change_nothing(rows, paged):
    model, requests = Watched(2.0), mixed_requests(64)
    engine = Engine(model, max_rows=rows, paged=paged)
    order = np.random.default_rng(rows).permutation(64)
    found = engine.generate([requests[i] for i in order])
    agree(model, [requests[i] for i in order], found, edges=2)
    everything_is_free(engine)


@both_caches
@pytest.mark.parametrize("cache_tokens", [48, 96, 160])
def test_a_small_cache_loses_nothing(cache_tokens, paged):
    model = Watched(-5.0)
    requests = [Request(r.prompt, 24, r.seed, stop_ids=(EOS,)) for r in mixed_requests(20)]
    engine = Engine(model, max_rows=16, cache_tokens=cache_tokens, paged=paged)
    preempted, preempt = [], engine.scheduler.preempt
    engine.scheduler.preempt = lambda: preempted.append(1) or preempt()
    agree(model, requests, engine.generate(requests))
    everything_is_free(engine)
    assert preempted or cache_tokens == 48


@both_caches
def test_a_cache_too_small_for_one_sequence(paged):
    engine = Engine(Watched(), cache_tokens=2 * PAGE, paged=paged)
    engine.generate([Request([5] * 4, 2 * PAGE - 4)])
    with pytest.raises(ValueError, match="prompt of 4 tokens and max_new_tokens 29 need a cache of 48 "
                                         "tokens, but it has 32; give the engine cache_tokens=48"):
        engine.generate([Request([5], 3), Request([5] * 4, 2 * PAGE - 3)])
    everything_is_free(engine)


@both_caches
def test_cancelling_in_the_middle(paged):
    model = Watched(-5.0)
    requests = [Request(PROMPTS[i % 6], 20, i, stop_ids=(EOS,)) for i in range(12)]
    whole = Engine(model, paged=paged).generate(requests)
    engine = Engine(model, max_rows=8, paged=paged)  # four of them wait
    victims, found = {2: 5, 3: 1, 7: 12, 11: 0}, {i: [] for i in range(12)}
    for event in engine.stream(requests):
        found[event.index].append(event)
        if event.index == 0:  # the ids of a stream follow one another
            for i, n in victims.items():
                if n == len(found[0]) - 1:
                    engine.cancel(event.id + i)
    for i, events in found.items():
        c = events[-1].completion
        assert [t for e in events for t in e.tokens] == c.tokens.tolist()
        if i in victims:
            assert c.finish_reason == "cancelled" and len(c.tokens) < 20
            assert np.array_equal(c.tokens, whole[i].tokens[: len(c.tokens)])
        else:
            same(c, whole[i], model, requests[i])
    assert not len(found[11][-1].completion.tokens)  # it never began
    everything_is_free(engine)


@both_caches
def test_leaving_a_stream_frees_its_rows(paged):
    engine = Engine(Watched(-5.0), paged=paged)
    for event in engine.stream([Request([5, 6], 30, i) for i in range(5)]):
        if event.index == 3:
            break
    del event
    everything_is_free(engine)
    assert len(engine.generate([Request([5], 4)])[0].tokens) == 4


@both_caches
@settings(max_examples=25)
@given(data=st.data())
def test_every_request_is_answered_once_and_no_page_is_lost(paged, data):
    requests = data.draw(st.lists(st.builds(
        Request, prompt=st.sampled_from(PROMPTS), max_new_tokens=st.integers(1, 15), seed=st.integers(0, 99),
        temperature=st.sampled_from([0.0, 0.8, 1.0]), top_k=st.sampled_from([0, 0, 3]),
        stop_ids=st.sampled_from([(), (EOS,), (EOS, 7, 9)])), min_size=1, max_size=20))
    engine = Engine(Watched(1.0), max_rows=data.draw(st.integers(1, 9)), paged=paged,
                    tokens_per_step=data.draw(st.integers(1, 40)),
                    cache_tokens=PAGE * data.draw(st.integers(2, 12)))
    ids = engine.submit(requests)
    to_cancel = data.draw(st.lists(st.sampled_from(ids), max_size=3, unique=True))
    for steps in range(10_000):
        if not engine.n_unfinished:
            break
        if steps == 4:
            for i in to_cancel:
                engine.cancel(i)
        engine.step()
    assert sorted(engine.completed) == ids
    for i, r in zip(ids, requests, strict=True):
        c = engine.completed.pop(i)
        assert len(c.tokens) == len(c.logp) <= r.max_new_tokens
        assert c.finish_reason != "cancelled" or i in to_cancel
        assert c.finish_reason != "length" or len(c.tokens) == r.max_new_tokens
    everything_is_free(engine)


@both_caches
def test_any_of_several_stop_tokens_ends_an_answer(paged):
    model = Watched()
    kinds = [(EOS, 7, 9, 11, 13), (), (EOS,)]
    requests = [Request(PROMPTS[i % 6], 25, i, stop_ids=kinds[i % 3]) for i in range(18)]
    completions = Engine(model, paged=paged, max_rows=7).generate(requests)
    agree(model, requests, completions)
    last = {int(c.tokens[-1]) for r, c in zip(requests, completions, strict=True) if len(r.stop_ids) == 5}
    assert len(last & {7, 9, 11, 13}) > 1
    assert all(len(c.tokens) == 25 for r, c in zip(requests, completions, strict=True) if not r.stop_ids)


@both_caches
def test_a_group_is_prefilled_once_and_finished_rows_leave_smaller_batches(paged):
    model = Watched(2.0)
    requests = group_requests(PROMPTS, 16, 20, 1.0, sample_seeds(96, 5), (EOS,))
    engine = Engine(model, paged=paged)
    decoded, decode = [], engine.cache.decode
    engine.cache.decode = lambda tokens: decoded.append(len(tokens)) or decode(tokens)
    lengths = np.array([len(c.tokens) for c in engine.generate(requests)])
    assert model.prefilled == [[len(p) for p in dict.fromkeys(map(tuple, PROMPTS))]]
    live = [int((lengths > t).sum()) for t in range(1, lengths.max())]
    assert all(n <= rows <= engine.cache.width(n) for n, rows in zip(live, decoded, strict=True))
    assert decoded[-1] < decoded[0] / 4


def test_shared_pages_are_shared():
    engine = Engine(Watched(-9.0), paged=True, cache_tokens=40 * PAGE)
    engine.submit([Request([5] * (PAGE + 3), 5, seed) for seed in range(9)])
    engine.step()
    table = engine.cache.page_table
    assert table.n_pages - len(table.free) == 1 + 9  # one for all, and the last for each
    while engine.n_unfinished:
        engine.step()
    engine.completed.clear()
    everything_is_free(engine)


def test_new_weights_are_seen_and_counted():
    model, request = Watched(), Request([5, 6], 12, 3)
    engine = Engine(model)
    first, = engine.generate([request])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    unannounced, = engine.generate([request])  # on a CPU they are the trainer's
    assert same(unannounced, naive_of(model, request), model, request)
    for p in model.parameters():
        p.data = p.data * 0.95  # other tensors, at other addresses
    unannounced, = engine.generate([request])
    assert same(unannounced, naive_of(model, request), model, request)
    engine.refresh(version=7)
    second, = engine.generate([request])
    assert (first.weights_version, second.weights_version) == (0, 7)
    assert same(second, naive_of(model, request), model, request) and first.logp[0] != second.logp[0]
    engine.submit([request])
    with pytest.raises(ValueError, match="refresh.. while 1 requests"):
        engine.refresh()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logp_is_the_trainers(temperature):
    model = Watched()
    requests = group_requests(PROMPTS, 4, 12, temperature, sample_seeds(24, 4), (EOS,))
    for r, c in zip(requests, Engine(model).generate(requests), strict=True):
        with torch.no_grad():
            hidden = model.hidden_states(pack([[*r.prompt, *c.tokens.tolist()]]))
            logp, _ = model.logprobs(hidden[len(r.prompt) - 1 : -1], torch.from_numpy(c.tokens), temperature)
        assert np.abs(c.logp - logp.numpy()).max() < 1e-5


@needs_numba
def test_bf16_is_near_fp32():
    requests = group_requests(PROMPTS, 4, 2, 1.0, sample_seeds(24, 7), (EOS,))
    engines = [Engine(Watched(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    assert [type(engine.cache) for engine in engines] == [Slots, Pages]
    with pytest.raises(ValueError, match="paged is False, but the decoder computes in float32, .* torch.bf"):
        Engine(Watched(dtype=torch.bfloat16), paged=False)
    wide, narrow = (engine.generate(requests) for engine in engines)
    pairs = [(a, b) for a, b in zip(wide, narrow, strict=True) if a.tokens.tolist() == b.tokens.tolist()]
    assert len(pairs) >= 20 and max(np.abs(a.logp - b.logp).max() for a, b in pairs) < 0.1


def test_without_numba_there_are_pages_and_the_same_answers(monkeypatch):
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    model, requests = Watched(), mixed_requests(6)
    engine = Engine(model)
    assert isinstance(engine.cache, Pages)
    agree(model, requests, engine.generate(requests))


def test_long_answers_move_through_slots_and_columns():
    model = Watched(-9.0)
    requests = [Request(PROMPTS[i % 6], n, i) for i, n in enumerate((200, 3, 150, 90, 200, 5, 180, 40))]
    engine = Engine(model, max_rows=3)
    for r, c in zip(requests, engine.generate(requests), strict=True):
        assert same(c, generate_naive(model, r), model, r)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@both_caches
def test_broken_weights_are_named_and_forgotten(value, paged):
    model = Watched()
    engine, weight = Engine(model, paged=paged), model.blocks[1].mlp.down.weight
    good = weight[3, 3].item()
    with torch.no_grad():
        weight[3, 3] = value
    with pytest.raises(NonFiniteError, match="logits .* in 6 of 6 rows"):
        engine.generate([Request(p, 5) for p in PROMPTS])
    everything_is_free(engine)
    with torch.no_grad():
        weight[3, 3] = good
    agree(model, requests := mixed_requests(6), engine.generate(requests))


@pytest.mark.parametrize("change,message", [
    ({"prompt": []}, "at least one token"), ({"prompt": [1, 29]}, "token id 29"), ({"prompt": [-1]}, "id -1"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -0.1}, "temperature -0.1"),
    ({"temperature": float("nan")}, "temperature nan"), ({"temperature": float("inf")}, "temperature inf"),
    ({"prompt": [1] * 255}, "a prompt of 255 tokens and max_new_tokens 2 pass .* max_seq_len 256"),
    ({"top_k": -1}, "top_k is -1"), ({"top_p": 0.0}, "top_p 0.0"), ({"min_p": 1.1}, "min_p 1.1"),
    ({"top_logprobs": -1}, "top_logprobs is -1"), ({"stop": ("x",)}, "stop texts need a tokenizer"),
])
def test_requests_that_cannot_be_served(change, message):
    engine = Engine(Watched())
    engine.generate([Request([1], 2)])
    with pytest.raises(ValueError, match=message):
        engine.generate([Request([1], 2), Request(**{"prompt": [1], "max_new_tokens": 2, **change})])
    everything_is_free(engine)
    for empty in ({"max_rows": 0}, {"tokens_per_step": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            Engine(Watched(), **empty)


def test_groups_that_do_not_add_up():
    with pytest.raises(ValueError, match="5 seeds for 2 prompts x 2 samples; expected 4"):
        group_requests([[1], [2]], 2, 2, 1.0, torch.zeros(5), (EOS,))
    with pytest.raises(ValueError, match="n_samples is 0"):
        group_requests([[1]], 0, 2, 1.0, torch.zeros(0), (EOS,))
    with pytest.raises(ValueError, match="0 prompts"):
        Engine(Watched()).generate([])


def test_the_plan_names_the_cache():
    plan = Engine(Watched(), cache_tokens=4096).plan()
    assert "4,096 tokens x 256 bytes = 1 MiB in slots" in plan and CONFIG.n_layers == 2
