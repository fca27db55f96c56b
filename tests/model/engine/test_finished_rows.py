"""Finished rows that stay in the batch for a while: who may meet them, and when they go."""
import pytest

from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request

from .cases import PROMPTS, Watched, agree, both_caches, everything_is_free


@both_caches
def test_finished_rows_stay_in_the_batch_for_a_while(paged):
    model = Watched(-9.0)
    to_the_end = Request([5, 6] * 125, 6, 7)  # max_seq_len, and then many more steps beside the others
    requests = [to_the_end, *(Request(PROMPTS[i % 6], 5 if i < 3 else 40, i) for i in range(20))]
    later = [Request([9, 9], 30, 50), Request([8], 30, 51)]
    engine = Engine(model, paged=paged)
    ids = engine.submit(requests)
    while len(engine.completed) < 4:
        engine.step()
    for _ in range(10):
        engine.step()
    assert engine.scheduler.n_finished == 4 and len(engine.scheduler.running) == 21
    for unknown in (-1, 10**6, None):
        engine.cancel(unknown)
    with pytest.raises(ValueError, match="while 17 requests are being served"):
        engine.refresh()
    ids += engine.submit(later)
    engine.step()
    assert engine.scheduler.n_finished == 0 and len(engine.scheduler.running) == 19
    engine.cancel(ids[-1])
    while engine.n_unfinished:
        engine.step()
    agree(model, [*requests, later[0]], [engine.completed.pop(i) for i in ids[:-1]])
    assert engine.completed.pop(ids[-1]).finish_reason == "cancelled"
    everything_is_free(engine)


@both_caches
def test_finished_rows_are_dropped_before_a_sequence_is_preempted(paged):
    model = Watched(-9.0)
    requests = [Request([5, 6, 7], 4 if i < 3 else 45, i) for i in range(6)]
    # three rows of 48 tokens, and the six as long as they are short
    engine = Engine(model, paged=paged, cache_tokens=9 * PAGE + 3 * PAGE)
    engine.scheduler.preempt = None  # never called
    agree(model, requests, engine.generate(requests))
    everything_is_free(engine)


@both_caches
def test_rows_with_filters_are_dropped_at_once(paged):
    engine = Engine(Watched(-9.0), paged=paged)
    engine.submit([Request([5], 3 if i < 2 else 9, i, top_k=4 * (i < 2), top_logprobs=2 * (i < 2))
                   for i in range(12)])
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.running) == 10
    assert engine.rows.filters is None and engine.rows.top_n == 0
