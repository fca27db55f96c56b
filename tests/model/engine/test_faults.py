"""What one request, one caller or one error must not do to others; and how much memory the cache takes."""
import numpy as np
import pytest
import torch

from r1zero.model.config import ModelConfig, preset
from r1zero.model.engine.cache import tokens_within
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import NonFiniteError, keep_likeliest
from r1zero.model.engine.slots import Slots
from r1zero.model.transformer import Transformer

from .cases import EOS, PROMPTS, Watched, both_caches, everything_is_free, naive_of, needs_numba, same

GOOD = Request([5], 9, 1)


def test_an_unfiltered_row_keeps_its_tail_in_filtered_company():
    logits = torch.randn(64, 32_000) * 3
    top_k = torch.zeros(64, dtype=torch.int64)
    top_k[0] = 5
    found = keep_likeliest(logits, top_k, torch.ones(64), torch.zeros(64))
    assert torch.equal(found[1:], logits[1:]) and int(found[0].isfinite().sum()) == 5
    tiny = keep_likeliest(logits, top_k * 0, torch.full((64,), 0.0), torch.zeros(64))
    assert tiny.isfinite().sum(1).eq(1).all()  # a top_p that fp32 rounds to 0


@both_caches
def test_the_number_of_the_likeliest_may_shrink_and_grow(paged):
    requests = [Request([5], 2, 1, top_logprobs=5), Request([6], 6, 2, top_logprobs=2),
                Request([7], 9, 3), Request([8], 5, 4, top_logprobs=29)]
    engine = Engine(Watched(-9.0), paged=paged, max_rows=2)
    together = engine.generate(requests)
    for r, c in zip(requests, together, strict=True):
        alone, = engine.generate([r])
        assert np.array_equal(c.tokens, alone.tokens)
        if r.top_logprobs:
            assert np.array_equal(c.top_ids, alone.top_ids)
            assert np.allclose(c.top_logp, alone.top_logp, atol=1e-4)


@both_caches
def test_greedy_rows_report_the_same_in_any_company(paged):
    engine = Engine(Watched(-9.0), paged=paged)
    greedy = Request([5], 4, 1, 0.0, top_k=1, top_logprobs=3)
    alone, = engine.generate([greedy])
    among, _ = engine.generate([greedy, Request([6], 4, 1, top_p=0.5)])
    assert np.array_equal(alone.tokens, among.tokens) and np.isfinite(among.top_logp).all()
    assert np.allclose(alone.top_logp, among.top_logp, atol=1e-5)


@pytest.mark.parametrize("change,message", [
    ({"top_logprobs": 30}, "top_logprobs is 30"), ({"seed": 1.5}, "seed is 1.5"),
    ({"seed": 2**70}, "64 bits"),
    ({"top_k": 2**70}, "top_k"), ({"top_k": 1.5}, "top_k is 1.5"), ({"stop_ids": (2**70,)}, "stop_ids"),
    ({"stop_ids": {1, 2}}, "stop_ids"), ({"stop_ids": 3}, "stop_ids"),
    ({"temperature": 1e-42}, "1e-6 or more"), ({"temperature": "hot"}, "expected numbers"),
    ({"min_p": None}, "expected numbers"), ({"stop": "ab"}, "stop is"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"), ({"prompt": [5.7]}, "whole numbers"),
    ({"prompt": iter([5])}, "whole numbers")])
def test_a_bad_request_is_refused_and_others_go_on(change, message):
    engine = Engine(Watched(-9.0))
    stream = engine.stream([GOOD])
    tokens = next(stream).tokens
    with pytest.raises(ValueError, match=message):
        engine.generate([Request(**{"prompt": [5], "max_new_tokens": 9, **change})])
    for event in stream:
        tokens = tokens + event.tokens
    assert tokens == engine.generate([GOOD])[0].tokens.tolist()


def test_no_more_likely_tokens_are_reported_than_the_head_has_rows():
    config = preset("tiny", 29, vocab_in_use=20)
    engine = Engine(Transformer(config).init_weights(0))
    found, = engine.generate([Request([28], 2, top_logprobs=20)])
    assert found.top_ids.shape == (2, 20) and found.top_ids.max() == 19
    with pytest.raises(ValueError, match="top_logprobs is 21; expected .* from 0 to the 20 tokens"):
        engine.generate([Request([28], 2, top_logprobs=21)])


def test_seeds_of_any_kind():
    engine, seeds = Engine(Watched(-9.0)), (np.int64(-1), 2**64 - 1, -1, np.int32(-1))
    found = [engine.generate([Request(np.array([5, 6]), 5, seed)])[0].tokens.tolist() for seed in seeds]
    assert found == [generate_naive(engine.model, Request([5, 6], 5, 2**64 - 1)).tokens.tolist()] * 4
    with pytest.raises(ValueError, match="only the engine reports"):
        generate_naive(engine.model, Request([5], 2, top_logprobs=2))
    with pytest.raises(ValueError, match="stop texts need"):
        generate_naive(engine.model, Request([5], 2, stop=("x",)))
    for n_tokens in (0, -40):
        with pytest.raises(ValueError, match="cache_tokens is"):
            Engine(engine.model, cache_tokens=n_tokens)


@both_caches
def test_nan_does_not_stay_in_the_cache(paged):
    model = Watched()
    engine, weight = Engine(model, paged=paged), model.blocks[0].mlp.down.weight
    good = weight[3, 3].item()
    with torch.no_grad():
        weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError):
        engine.generate([Request(p, 5) for p in PROMPTS])
    with torch.no_grad():
        weight[3, 3] = good
    for r in [Request(p, 5, stop_ids=(EOS,)) for p in PROMPTS[::-1]]:
        assert same(engine.generate([r])[0], naive_of(model, r), model, r)
    engine.generate([Request(p, 5) for p in PROMPTS[::-1]])


def break_once(engine, monkeypatch, error):
    def broken(tokens):
        monkeypatch.undo()
        raise error
    monkeypatch.setattr(engine.cache, "decode", broken)


@both_caches
def test_other_callers_are_told_of_an_error(paged, monkeypatch):
    engine = Engine(Watched(-9.0), paged=paged)
    one, two = engine.stream([GOOD]), engine.stream([GOOD, Request([6], 9, 2)])
    next(one), next(two)  # two is between the events of one step
    break_once(engine, monkeypatch, NonFiniteError("broken"))
    with pytest.raises(NonFiniteError):
        engine.generate([GOOD])
    for stream in (one, two):
        with pytest.raises(RuntimeError, match="another caller made .NonFiniteError: broken.; submit"):
            next(stream)
    assert len(engine.generate([GOOD])[0].tokens) == 9


@pytest.mark.parametrize("moment", ["between steps", "in a step"])
@both_caches
def test_an_interrupt_leaves_nothing_behind(paged, moment, monkeypatch):
    engine, step = Engine(Watched(-9.0), paged=paged, max_rows=2), Engine.step

    def interrupted(self):
        step(self)
        raise KeyboardInterrupt

    if moment == "between steps":
        monkeypatch.setattr(Engine, "step", interrupted)
    else:
        break_once(engine, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate([GOOD, Request([6], 9, 2), Request([7], 9, 3)])
    monkeypatch.undo()
    everything_is_free(engine)
    assert not engine._cancelled
    engine.refresh()
    assert len(engine.generate([GOOD])[0].tokens) == 9


def test_the_cache_is_as_large_as_the_rows_need():
    assert tokens_within(1e9, 1000, 4, 20, 256) == 4 * 48
    assert tokens_within(1e9, 1000, 100, 20, 256) == 100 * 48
    assert tokens_within(2e6, 1000, 100, 20, 256) == 2000
    assert tokens_within(1e9, 1000, 100, None, 256) == tokens_within(1e9, 1000, 100, 999, 256) == 100 * 272
    assert tokens_within(-5e9, 1000, 100, None, 256) == tokens_within(-5e9, 1000, 100, 200, 256) == 256
    # of an open model with a long context no more is taken than its requests may need
    assert tokens_within(-5e9, 1000, 100, 20, 131_072) == 48
    assert Engine(Watched(), longest=20, max_rows=64).cache_tokens == 64 * 48


def test_the_plan_names_the_copy_of_the_weights():
    engine = Engine(Watched())
    assert "copy" not in engine.plan()
    engine.cache.copy_bytes = 5 << 20
    assert "the copy of the weights takes 5 MiB" in engine.plan()


@needs_numba
def test_slots_grow_layer_by_layer(monkeypatch):
    config = ModelConfig(vocab_size=29, n_layers=8, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
                         max_seq_len=4096)
    engine = Engine(Transformer(config).init_weights(0))
    engine.submit([Request([5], 300, 1)])
    engine.step()
    assert isinstance(engine.cache, Slots)
    decoder, seen = engine.cache.decoder, []
    old, zeros = decoder.kv[0].shape, np.zeros

    def watched(*shape, **options):
        seen.append(sum(x.shape == old for x in decoder.kv))  # old ones that are still there
        return zeros(*shape, **options)

    monkeypatch.setattr(np, "zeros", watched)
    decoder._make_room(1, 2000)
    assert seen[-1] == 1
