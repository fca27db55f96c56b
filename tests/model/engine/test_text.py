"""What the engine samples from and emits: filters, log-probs of the likeliest, stop texts, streams."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import counter_uniform, keep_likeliest, sample_tokens
from r1zero.model.engine.text import TextStream
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer

from ...rl.cases import tiny
from .cases import EOS, PROMPTS, Watched, both_caches

BYTES = Tokenizer.bytes()


def kept(logits, top_k=0, top_p=1.0, min_p=0.0):
    row = torch.tensor([logits])
    found = keep_likeliest(row, *(torch.tensor([x]) for x in (top_k, top_p, min_p)))[0]
    assert torch.equal(found[found.isfinite()], row[0][found.isfinite()])
    return found.isfinite().nonzero().flatten().tolist()


def test_filters_by_hand():
    logits = np.log([0.1, 0.4, 0.2, 0.25, 0.05]).tolist()
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2) == [1, 3] and kept(logits, top_k=9) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.39) == [1] and kept(logits, top_p=0.41) == [1, 3]
    assert kept(logits, top_p=0.9) == [0, 1, 2, 3] and kept(logits, top_p=1e-9) == [1]
    assert kept(logits, min_p=0.45) == [1, 2, 3] and kept(logits, min_p=1.0) == [1]
    assert kept(logits, top_k=3, top_p=0.5) == [1, 3]  # of the three, 0.4 is 47 %
    assert kept([0.0] * 5, top_k=2) == [0, 1] and kept([0.0] * 5, min_p=1.0) == [0, 1, 2, 3, 4]


def test_each_row_has_its_own_settings_and_its_own_distribution():
    logits = torch.randn(6, 50)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 1.0])
    filters = (torch.tensor([0, 3, 0, 0, 2, 0]), torch.tensor([1, 1, 0.6, 1, 1, 1]),
               torch.tensor([0, 0, 0, 0.2, 0, 0]))
    u = counter_uniform(torch.arange(6), torch.arange(6))
    tokens, logp, ids, likeliest = sample_tokens(logits, temperature, u, filters, top_n=3)
    for i in range(6):
        t = float(temperature[i])
        token, lp = sample_tokens(logits[i : i + 1], t, u[i : i + 1], tuple(x[i : i + 1] for x in filters))
        assert int(token) == int(tokens[i]) and float(lp) == pytest.approx(float(logp[i]), abs=1e-6)
        own = tuple(x[i : i + 1] if t else x[:1] for x in filters)  # none at temperature 0
        of = keep_likeliest(logits[i : i + 1] / (t or 1), *own).log_softmax(-1)[0]
        assert torch.allclose(likeliest[i], of.topk(3).values) and torch.equal(ids[i], of.topk(3).indices)
        assert t == 0 or float(of[tokens[i]]) == pytest.approx(float(logp[i]), abs=1e-6)


@both_caches
def test_filtered_requests_are_the_oracles_in_mixed_company(paged):
    model, kinds = Watched(), [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8}]
    requests = [Request(PROMPTS[i % 6], 9, i, (1.0, 0.7, 0.0)[i % 3], stop_ids=(EOS,), **kinds[i % 5],
                        top_logprobs=i % 4) for i in range(30)]
    equal = 0
    for r, c in zip(requests, Engine(model, max_rows=13, paged=paged).generate(requests), strict=True):
        naive = generate_naive(model, replace(r, top_logprobs=0))
        equal += np.array_equal(c.tokens, naive.tokens)
        assert not np.array_equal(c.tokens, naive.tokens) or np.abs(c.logp - naive.logp).max() < 1e-4
        if r.top_logprobs:
            assert c.top_ids.shape == c.top_logp.shape == (len(c.tokens), r.top_logprobs)
            for position, token in enumerate(c.tokens):
                if r.temperature and token in c.top_ids[position]:
                    at = c.top_ids[position].tolist().index(token)
                    assert c.top_logp[position, at] == pytest.approx(c.logp[position], abs=1e-5)
        else:
            assert c.top_ids is None
    assert equal >= 29


# ---- text ----

def said(stream, tokens):
    """What is shown after each token, and at the end; stops as the engine does."""
    shown = []
    for token in tokens:
        shown.append(stream.feed(token))
        if stream.stopped:
            break
    return [*shown, stream.feed(None)]


def test_half_characters_and_beginnings_of_stop_texts_wait():
    assert said(TextStream(BYTES, ()), "aé€".encode()) == ["a", "", "é", "", "", "€", ""]
    assert said(TextStream(BYTES, ()), "€".encode()[:2]) == ["", "", "\ufffd"]
    assert said(TextStream(BYTES, ("END",)), b"xENxE") == ["x", "", "", "ENx", "", "E"]
    assert said(TextStream(BYTES, ("END", "a\n")), b"xEEND..") == ["x", "", "E", "", "", ""]
    stream = TextStream(BYTES, ("bc", "b"))
    assert said(stream, b"abc") == ["a", "", ""] and stream.stopped and stream.shown == "a"
    assert said(TextStream(BYTES, ()), [97, BYTES.eos_id]) == ["a", "", ""]


@both_caches
def test_stop_texts_end_an_answer_and_others_go_on(paged):
    model = Transformer(tiny().config).init_weights(0)
    engine = Engine(model, BYTES, paged=paged, max_rows=3, cache_tokens=3 * 64)
    plain = [Request([65, 66], 40, seed) for seed in range(6)]
    whole = engine.generate(plain)
    assert all(c.text is None for c in whole)
    stops = [(BYTES.decode(c.tokens[20:22]), "never") for c in whole]
    stopped = engine.generate([Request(r.prompt, 40, r.seed, stop=stop)
                               for r, stop in zip(plain, stops, strict=True)])
    checked = 0
    for a, b, stop in zip(whole, stopped, stops, strict=True):
        n = len(b.tokens)
        assert np.array_equal(a.tokens[:n], b.tokens)
        text = BYTES.decode(b.tokens)
        if b.finish_reason == "stop":
            assert b.text == text[: text.index(stop[0])] and n <= 22
            checked += 1
    assert checked >= 3


def test_a_stream_says_what_generate_says_and_text_adds_up():
    engine = Engine(Transformer(tiny().config).init_weights(0), BYTES)
    requests = [Request([65 + i], 30, i, stop_ids=(BYTES.eos_id,)) for i in range(5)]
    texts, tokens, done = [""] * 5, [[] for _ in range(5)], {}
    for event in engine.stream(requests):
        texts[event.index] += event.text
        tokens[event.index] += event.tokens
        if event.completion:
            done[event.index] = event.completion
    for i, c in enumerate(engine.generate(requests)):
        assert tokens[i] == c.tokens.tolist() == done[i].tokens.tolist()
        assert texts[i] == BYTES.decode(c.tokens)


def test_a_stream_and_a_batch_at_one_time():
    engine = Engine(Watched())
    alone = engine.generate([Request([5], 12, 1), Request([6], 12, 2)])
    found = []
    for event in engine.stream([Request([5], 12, 1)]):
        found += event.tokens
        if len(found) == 3:
            other, = engine.generate([Request([6], 12, 2)])
    assert found == alone[0].tokens.tolist() and np.array_equal(other.tokens, alone[1].tokens)
