"""Batches: targets that stand one further, epochs without gap or repeat, micro-batches that lose nothing."""
import itertools

import numpy as np
import pytest
import torch

from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.batches import DocumentBatches, TokenStream, shuffled, split_batch, tail_batches
from r1zero.train.conversations import Exchange, encode_conversations

from .loop_cases import few_documents

EOS = Tokenizer.bytes().eos_id


def some_documents(n: int = 40, most: int = 30) -> list[list[int]]:
    """Document i is i * 100, i * 100 + 1, ...: every token tells where it is from."""
    return [list(range(i * 100, i * 100 + 2 + (i * 7) % most)) for i in range(n)]


def sequences(batch) -> list[list[tuple[int, int, float]]]:
    """(input, target, weight) of each token, by sequence, with the Packed fields checked by a plain loop."""
    cu = batch.inputs.cu_seqlens.tolist()
    tokens, targets, weight = batch.inputs.tokens.tolist(), batch.targets.tolist(), batch.weight.tolist()
    assert cu[0] == 0 and cu[-1] == len(tokens) == len(targets) == len(weight)
    assert batch.inputs.max_seqlen == max(b - a for a, b in itertools.pairwise(cu))
    assert batch.inputs.positions.tolist() == [p for a, b in itertools.pairwise(cu) for p in range(b - a)]
    assert batch.inputs.tokens.dtype == batch.inputs.positions.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.cu_seqlens.dtype == torch.int32 and batch.weight.dtype == torch.float32
    rows = list(zip(tokens, targets, weight, strict=True))
    return [rows[a:b] for a, b in itertools.pairwise(cu)]


def same(a, b) -> bool:
    return sequences(a) == sequences(b)


# ---- a held-out text --------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 9, 10, 17, 30])
def test_tail_batches_predict_each_token_but_the_first_once(n):
    batches = list(tail_batches(np.arange(n), seq_len=8, batch_size=2))
    rows = [row for batch in batches for sequence in sequences(batch) for row in sequence]
    assert rows == [(i, i + 1, 1.0) for i in range(n - 1)]
    assert all(batch.inputs.max_seqlen <= 8 and len(sequences(batch)) <= 2 for batch in batches)


def test_tail_batches_refuse_a_single_token():
    with pytest.raises(ValueError, match="has 1 tokens"):
        list(tail_batches(np.arange(1), 8, 2))


# ---- windows of one long text ------------------------------------------------------------------------------

def test_the_order_is_fixed_for_good():
    """If these change, runs no longer resume on the data they were on."""
    assert shuffled(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert shuffled(8, 0, 1).tolist() != shuffled(8, 1, 0).tolist() != shuffled(8, 0, 0).tolist()
    assert sorted(shuffled(1000, 2**64 - 1, 3)) == list(range(1000))


@pytest.mark.parametrize(("n", "seq_len", "batch_size"),
                         [(101, 10, 5), (108, 10, 3), (9, 8, 4), (2, 1, 1), (40, 4, 50)])
def test_stream_epochs_have_each_window_once(n, seq_len, batch_size):
    stream = TokenStream(np.arange(n), seq_len, batch_size, seed=1)
    n_windows = (n - 1) // seq_len
    windows = []
    for index in range(3 * n_windows):
        rows = sequences(stream.batch(index))
        assert len(rows) == batch_size
        for row in rows:
            first = row[0][0]
            assert row == [(first + i, first + i + 1, 1.0) for i in range(seq_len)] and first % seq_len == 0
            windows.append(first // seq_len)
    for epoch in range(3 * batch_size):
        assert sorted(windows[epoch * n_windows:(epoch + 1) * n_windows]) == list(range(n_windows))
    assert stream.epoch(n_windows) == batch_size
    if n_windows > 5:
        assert windows[:n_windows] != sorted(windows[:n_windows]) and windows[:n_windows] != windows[
            n_windows:2 * n_windows]


def test_stream_batches_depend_on_seed_and_index_only():
    tokens = np.arange(1000)
    asked_in_order = [TokenStream(tokens, 10, 4, seed=3).batch(i) for i in range(60)]
    stream = TokenStream(tokens.astype(np.int32), 10, 4, seed=3)
    for i in [59, 0, 30, 31, 0, 24, 25, 59, 1]:
        assert same(stream.batch(i), asked_in_order[i])
    assert not same(TokenStream(tokens, 10, 4, seed=4).batch(0), asked_in_order[0])


@pytest.mark.parametrize(("sizes", "match"), [
    (dict(seq_len=8, batch_size=1), "has 8 tokens, .*--seq-len 8 needs 9"),
    (dict(seq_len=0, batch_size=1), "seq_len is 0"), (dict(seq_len=4, batch_size=-1), "batch_size is -1"),
    (dict(seq_len=4, batch_size=1, seed=-1), "seed is -1")])
def test_stream_refuses(sizes, match):
    with pytest.raises(ValueError, match=match):
        TokenStream(np.arange(8), **sizes)


# ---- whole documents ---------------------------------------------------------------------------------------

def oracle(document: list[int], trained: np.ndarray) -> list[tuple[int, int, float]]:
    return [(document[i], document[i + 1], float(trained[i + 1])) for i in range(len(document) - 1)]


@pytest.mark.parametrize("budget", [31, 50, 100, 10_000])
def test_document_epochs_have_each_document_once_within_the_budget(budget):
    documents = some_documents()
    rng = np.random.default_rng(0)
    trained = [rng.random(len(document)) < 0.5 for document in documents]
    for flags in trained:
        flags[-1] = True  # each has something to learn
    batches = DocumentBatches(documents, budget, max_seq_len=64, seed=5, trained=trained)
    seen = {0: [], 1: [], 2: []}
    for index in itertools.count():
        if batches.epoch(index) == 3:
            break
        batch = batches.batch(index)
        lengths = [len(row) for row in sequences(batch)]
        assert sum(lengths) <= budget and lengths == sorted(lengths)
        for row in sequences(batch):
            i = row[0][0] // 100
            assert row == oracle(documents[i], trained[i])
            seen[batches.epoch(index)].append(i)
    assert all(sorted(order) == list(range(len(documents))) for order in seen.values())
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_batches_are_as_few_as_the_order_allows_and_even():
    documents = [[0] * 11 for _ in range(21)]  # 210 tokens; 100 a batch needs 3, greedily 100, 100, 10
    batches = DocumentBatches(documents, batch_tokens=100, max_seq_len=10)
    assert [len(batches.batch(i).targets) for i in range(3)] == [70, 70, 70] and batches.epoch(3) == 1


def test_document_batches_do_not_depend_on_what_was_asked_before():
    documents = some_documents()
    asked_in_order = [DocumentBatches(documents, 64, 64, seed=3).batch(i) for i in range(50)]
    batches = DocumentBatches([np.array(d) for d in documents], 64, 64, seed=3)
    for i in [49, 0, 20, 12, 13, 0, 49, 1]:
        assert same(batches.batch(i), asked_in_order[i])
    assert not same(DocumentBatches(documents, 64, 64, seed=4).batch(0), asked_in_order[0])


def test_prompts_are_not_trained_on():
    tokenizer = Tokenizer.bytes()
    documents, trained = encode_conversations(tokenizer, [[Exchange("ab", "cd")]])
    batch = DocumentBatches(documents, 100, 100, trained=trained).batch(0)
    assert sequences(batch) == [[(97, 98, 0.0), (98, 99, 1.0), (99, 100, 1.0), (100, EOS, 1.0)]]
    packed = pack([documents[0][:-1]])
    assert torch.equal(batch.inputs.tokens, packed.tokens)
    assert torch.equal(batch.inputs.positions, packed.positions)


@pytest.mark.parametrize(("documents", "arguments", "match"), [
    ([], {}, "no documents"), ([[1, 2], [1]], {}, "document 1 .* has 1 tokens, needs at least 2"),
    ([[]], {}, "document 0 .* has 0 tokens"),
    ([[1, 2], [1] * 12, [1] * 13], dict(max_seq_len=10),
     "document 1 .* has 12 tokens, but the model's max_seq_len 10 has room for 11 .* 2 of 3"),
    ([[1] * 12], dict(batch_tokens=10), "has 12 tokens, but --batch-tokens 10 has room for 11"),
    ([[1, 2]], dict(batch_tokens=0), "batch_tokens is 0"), ([[1, 2]], dict(max_seq_len=0), "is 0"),
    ([[1, 2]], dict(trained=[np.array([True, False])]), "document 0 .* all of them prompt"),
    ([[1, 2]], dict(seed=2**64), "seed is 1")])
def test_documents_that_cannot_be_used(documents, arguments, match):
    with pytest.raises(ValueError, match=match):
        DocumentBatches(documents, **(dict(batch_tokens=100, max_seq_len=100) | arguments))


def test_longest_documents_that_fit():
    assert len(DocumentBatches([[1] * 11], batch_tokens=10, max_seq_len=10).batch(0).targets) == 10


# ---- micro-batches -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("micro_tokens", [1, 7, 20, 30, 1000])
def test_split_batches_hold_everything_once(micro_tokens):
    batch = few_documents(2).batch(0)
    parts = list(split_batch(batch, micro_tokens))
    for name in ("tokens", "positions"):
        found = torch.cat([getattr(part.inputs, name) for part in parts])
        assert torch.equal(found, getattr(batch.inputs, name))
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.weight for part in parts]), batch.weight)
    assert torch.equal(torch.cat([p.inputs.cu_seqlens.diff() for p in parts]), batch.inputs.cu_seqlens.diff())
    for part in parts:
        lengths = part.inputs.cu_seqlens.diff()
        assert part.inputs.max_seqlen == lengths.max() and part.inputs.cu_seqlens.dtype == torch.int32
        assert part.inputs.cu_seqlens[0] == 0 and part.inputs.cu_seqlens[-1] == len(part.inputs.tokens)
        assert len(part.targets) <= micro_tokens or len(lengths) == 1
