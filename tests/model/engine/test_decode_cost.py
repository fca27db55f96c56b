"""What a decoding step costs beside its arithmetic: programs, and one graph per size that occurs.

The presets are counted on the meta device, at their own max_seq_len, so no memory is needed.
"""
import dataclasses

import numpy as np
import pytest
import torch

from r1zero.kernels.decode_attention import SPLIT, decode_attention_grid
from r1zero.model.config import preset
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.pages import PagedKV, Pages, doublings
from r1zero.model.engine.requests import Request
from r1zero.model.transformer import Transformer

from .cases import CONFIG, Watched, agree, everything_is_free

ROWS, STEPS = 256, 520


class NoLayers:
    """Stands in for a model's layers, whose work is not counted here; it notes what attention would read."""

    def __init__(self, config):
        self.config, self.tables = config, []

    def __call__(self, tokens, positions, kv):
        if isinstance(kv, PagedKV):
            self.tables.append(kv.table)
        return torch.empty(len(tokens), self.config.d_model, device="meta")

    def logits(self, hidden):
        return torch.empty(len(hidden), self.config.vocab_size, device="meta")


@torch.inference_mode()
def begin(name, mixed=False):
    """(cache, layers): a cache with prompts of 80 to 87 tokens in all rows; mixed: one of 3000, too."""
    with torch.device("meta"):
        model = Transformer(preset(name, 151_936), torch.bfloat16)
    cache = Pages(model, ROWS)
    cache.allocate(max(model.config.max_seq_len, ROWS * 1024))
    cache.weights = layers = NoLayers(model.config)
    for row in range(ROWS):
        length = 3000 if mixed and row == 0 else 80 + row % 8
        cache.page_table.begin(row, cache.page_table.take(-(-length // PAGE)), length)
    cache.n = ROWS
    return cache, layers


@torch.inference_mode()
def decode(cache):
    return cache.decode(torch.zeros(cache.n, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b"])
def test_the_programs_of_a_step_follow_the_pages_in_use(name):
    """256 rows of 600 tokens need 1,536 programs of attention per layer.

    With a grid that follows max_seq_len they were 65,536 (0.5b) and 262,144 (1.5b).
    """
    cache, layers = begin(name)
    n_groups = layers.config.n_kv_heads
    for _ in range(STEPS):
        decode(cache)
        width = layers.tables[-1].shape[1]
        programs = np.prod(decode_attention_grid(ROWS, n_groups, width * PAGE))
        in_use = n_groups * int(np.ceil(cache.page_table.lengths / SPLIT).sum())
        assert in_use <= programs <= 2 * in_use + n_groups * ROWS
    assert in_use == 1536 and programs == 2048
    assert list(cache.graphs) == [(256, 16), (256, 32), (256, 64)]
    # One graph for each size that occurs, and not many that may.
    assert len(cache.sizes) * len(cache.widths) <= 9 * 10


@torch.inference_mode()
def test_the_longest_row_decides_and_its_end_is_seen_at_once():
    cache, layers = begin("qwen2.5-0.5b", mixed=True)
    decode(cache)
    cache.empty(np.array([0]))
    decode(cache)
    assert [table.shape for table in layers.tables] == [(256, 256), (256, 16)]
    assert {table.stride(0) for table in layers.tables} == {2048}  # views, at an address that graphs may hold


def test_the_sizes_are_doublings():
    assert doublings(1, 27) == [1, 2, 4, 8, 16, 27] and doublings(1, 8) == [1, 2, 4, 8]
    assert doublings(1, 1) == [1] and doublings(16, 5) == [5] and doublings(16, 100) == [16, 32, 64, 100]


def test_answers_that_grow_into_a_wider_table_are_the_naive_ones():
    """Rows pass 256 tokens, where the step begins to read more columns, and shorter rows go on after them."""
    model = Watched(-9.0, config=dataclasses.replace(CONFIG, max_seq_len=700))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 29, n).tolist() for n in (250, 3, 508)]
    requests = [Request(p, 9 - i, i) for i, p in enumerate(prompts)]
    engine = Engine(model, max_rows=2, paged=True)
    agree(model, requests, engine.generate(requests))
    assert list(engine.cache.graphs) == [(2, 16), (2, 32), (1, 32), (1, 44)]
    everything_is_free(engine)
