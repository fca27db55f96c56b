"""Attention and what its keys and values are read from: the batch, a recording prefill, a cache."""
import weakref

import numpy as np
import pytest
import torch

from r1zero.kernels.rope import rope_table
from r1zero.model.attention import KV, PackedKV, RecordingKV, gather_keys, rotate
from r1zero.model.config import preset
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.pages import PagedKV, PageWritingKV
from r1zero.model.packed import pack

from ..kernels.naive_ops import naive_attention
from .model_cases import CONFIGS, each_config, scattered, sequences


class NaiveCache(KV):
    """One sequence, fed in any number of parts: all keys and values so far, and the definition."""

    def __init__(self, n_layers):
        self.k, self.v = ([[] for _ in range(n_layers)] for _ in "kv")

    def attend(self, layer, q_THD, k_TGD, v_TGE, window=None, scale=None, kept=None):
        self.k[layer].append(k_TGD)
        self.v[layer].append(v_TGE)
        k, v = torch.cat(self.k[layer]), torch.cat(self.v[layer])
        return naive_attention(q_THD, k, v, [len(q_THD)], lengths_k=[len(k)], scale=scale,
                               window=window)


def cache_shapes(model):
    """What a cache holds of one token, in its first and in its second tensor."""
    n_kv_heads, *widths = model.blocks[0].attn.cache_shape
    return [(n_kv_heads, width) for width in widths]


@each_config
def test_packed_recording_and_naive_keys_and_values_give_the_same_hidden_states(config):
    model, batch = scattered(config), sequences(9, 1, 30)
    packed, recording = pack(batch), RecordingKV(pack(batch))
    with torch.no_grad():
        expected = model.hidden_states(packed)
        assert torch.equal(model(packed.tokens, packed.positions, PackedKV(packed)), expected)
        assert torch.equal(model(packed.tokens, packed.positions, recording), expected)
        for tokens, hidden in zip(batch, expected.split([9, 1, 30]), strict=True):
            cache, parts = NaiveCache(config.n_layers), []
            for part in torch.arange(len(tokens)).split(4):
                parts.append(model(torch.tensor(tokens)[part], part, cache))
            torch.testing.assert_close(torch.cat(parts), hidden, rtol=1e-9, atol=1e-9)
    assert len(recording.kept) == config.n_layers
    for kept in recording.kept:
        assert [x.shape[1:] for x in kept] == cache_shapes(model) and {len(x) for x in kept} == {40}


def test_the_fused_and_the_recorded_prefill_agree_in_fp32():
    """head_dim is a multiple of 16, so the compiled loop of a CPU serves the fused one."""
    config = preset("tiny", 19, n_kv_heads=2, n_heads=4, qk_norm=True)
    model, packed = scattered(config, dtype=torch.float32), pack(sequences(40, 0, 7, 1))
    with torch.no_grad():
        recorded = model(packed.tokens, packed.positions, RecordingKV(packed))
        torch.testing.assert_close(model.hidden_states(packed), recorded, rtol=1e-4, atol=1e-4)


def test_rotated_heads_over_shared_prefixes_are_the_fused_ones():
    """`attend` is what attention with its own way of rotating calls; it must read prefixes, too."""
    packed = pack(sequences(20, 3, 5, 9), after=np.array([-1, -1, 0, 0]))
    qkv = torch.randn(len(packed.tokens), 4 + 2 * 2, 6, dtype=torch.float64)
    cos, sin = rope_table(packed.positions, 6, 100.0)
    fused = PackedKV(packed).rotate_and_attend(0, qkv, cos, sin, 2)
    q, k, v = rotate(qkv, cos, sin, 2)
    assert torch.equal(PackedKV(packed).attend(0, q, k, v), fused)
    k, v = gather_keys(k, v[:, :, :4], packed.keys)  # values narrower than keys
    assert k.shape == (77, 2, 6) and v.shape == (77, 2, 4)
    assert torch.equal(v, rotate(qkv, cos, sin, 2)[2][packed.keys][:, :, :4])


def test_a_recording_serves_one_pass_without_shared_prefixes():
    model, packed = scattered(CONFIGS["plain"]), pack([[1, 2], [3]])
    recording = RecordingKV(packed)
    model(packed.tokens, packed.positions, recording)
    with pytest.raises(AssertionError, match="one forward pass"):
        model(packed.tokens, packed.positions, recording)
    with pytest.raises(AssertionError, match="no shared prefixes"):
        RecordingKV(pack([[1, 2], [3]], after=np.array([-1, 0])))


class Held(PageWritingKV):
    """Knows which layers' keys and values are alive, by weak references."""

    def __init__(self, *args):
        super().__init__(*args)
        self.alive = set()

    def keep(self, layer, k_TGD, v_TGE):
        assert not self.alive, "an earlier layer's keys or values are still held"
        for entry in ((layer, "k", k_TGD), (layer, "v", v_TGE)):
            self.alive.add(entry[:2])
            weakref.finalize(entry[2], self.alive.discard, entry[:2])
        super().keep(layer, k_TGD, v_TGE)


@each_config
def test_prefill_writes_pages_and_holds_nothing(config):
    """Two rows share a prompt's full page, and each has its own copy of the last one."""
    model, packed = scattered(config), pack(sequences(PAGE + 3, 5))
    tokens = torch.tensor([*range(PAGE + 3), *range(PAGE, PAGE + 3), *range(PAGE + 3, PAGE + 8)])
    slots = [*range(PAGE, 2 * PAGE)]
    for page, n in ((3, 3), (5, 3), (4, 5)):
        slots += range(page * PAGE, page * PAGE + n)
    slots = torch.tensor(slots)
    caches = [[torch.zeros(6, n_heads, PAGE, width) for n_heads, width in cache_shapes(model)]
              for _ in range(config.n_layers)]
    recording, writing = RecordingKV(packed), Held(packed, caches, slots, tokens)
    with torch.no_grad():
        expected = model(packed.tokens, packed.positions, recording)
        assert torch.equal(model(packed.tokens, packed.positions, writing), expected)
    for cache, kept in zip(caches, recording.kept, strict=True):
        for pages, values in zip(cache, kept, strict=True):
            written = pages.transpose(1, 2).flatten(0, 1)  # [slots, G, D]
            assert torch.equal(written[slots], values[tokens].float())
            written[slots] = 0
            assert not written.any()


@each_config
def test_prefill_and_decode_go_on_where_forward_stands(config):
    prompts = [PAGE - 2, 1, 2 * PAGE - 1]  # within a page, and on into the next
    model, batch, new = scattered(config), sequences(*prompts), sequences(4, 4, 4)
    table = torch.randperm(12)[:12].view(3, 4).int()  # of 13 pages, in any order
    with torch.no_grad():
        whole = [model.hidden_states(pack([s + n])) for s, n in zip(batch, new, strict=True)]
        packed = pack(batch)
        recording = RecordingKV(packed)
        hidden = model(packed.tokens, packed.positions, recording)
        assert torch.equal(hidden, model.hidden_states(packed))
        caches = []
        for pair in recording.kept:
            caches.append([torch.full((13, n_heads, PAGE, width), 1e3, dtype=torch.float64)
                           for n_heads, width in cache_shapes(model)])
            for x, cache in zip(pair, caches[-1], strict=True):
                for row, part in enumerate(x.split(prompts)):
                    for i, entry in enumerate(part):
                        cache[table[row, i // PAGE], :, i % PAGE] = entry
        for t in range(4):
            lengths = torch.tensor(prompts, dtype=torch.int32) + t
            kv = PagedKV(caches, table, lengths)
            hidden = model(torch.tensor(new)[:, t], kv.positions, kv)
            for row in range(3):
                assert torch.allclose(hidden[row], whole[row][int(lengths[row])], atol=1e-9)


def test_a_sequence_knows_nothing_of_its_neighbours():
    model = scattered(CONFIGS["qwen3"], dtype=torch.float32)
    batch = sequences(5, 0, 1, 9, 30, 2, 2, 1, 1, 1, 1)
    with torch.no_grad():
        alone = [model.hidden_states(pack([s])) if s else torch.zeros(0, 12) for s in batch]
        for order in (range(11), reversed(range(11)), torch.randperm(11).tolist()):
            order = list(order)
            together = model.hidden_states(pack([batch[i] for i in order]))
            together = together.split([len(batch[i]) for i in order])
            for i, hidden in zip(order, together, strict=True):
                assert torch.allclose(hidden, alone[i], atol=2e-5)


def test_no_token_sees_a_later_one():
    model, (tokens,) = scattered(CONFIGS["plain"]), sequences(9)
    with torch.no_grad():
        before, after = (model.hidden_states(pack([[*tokens[:6], x, *tokens[7:]]])) for x in (3, 4))
    assert torch.equal(before[:6], after[:6])
    assert all(not torch.allclose(a, b, atol=1e-6) for a, b in zip(before[6:], after[6:], strict=True))


@each_config
def test_shared_prefixes_change_neither_hidden_states_nor_gradients(config):
    model = scattered(config)
    prefixes, tails = sequences(140, 3, 0), sequences(5, 2, 150, 5, 7, 4, 1, *range(9))
    of = np.array([1, 0, 0, 1, -1, 2, 0, *[1] * 9])
    shared = pack([*prefixes, *tails], after=np.append([-1] * 3, of))
    whole = pack([prefixes[p] + tail for p, tail in zip(of, tails, strict=True)])  # prefix -1 is empty, too
    weight = torch.randn(len(tails), model.config.d_model, dtype=torch.float64)
    results = []
    for packed in (shared, whole):
        hidden, ends = model.hidden_states(packed), packed.cu_seqlens[-len(tails) :].tolist()
        parts = [hidden[end - len(tail) : end] for end, tail in zip(ends, tails, strict=True)]
        model.zero_grad()
        sum((part * w).sum() for part, w in zip(parts, weight, strict=True)).backward()
        results.append([torch.cat(parts), *(p.grad for p in model.parameters())])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)
