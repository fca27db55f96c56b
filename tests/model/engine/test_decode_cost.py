"""What a decoding step costs beside its arithmetic: programs, bytes from the host, waits for the device.

The presets are counted on the meta device, at their own max_seq_len, so no memory is needed.
"""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1zero.kernels import dispatch
from r1zero.kernels.decode_attention import SPLIT, can_capture, decode_attention_grid
from r1zero.kernels.dispatch import HAS_TRITON
from r1zero.model.config import preset
from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.pages import PagedKV, Pages, doublings
from r1zero.model.engine.requests import Request
from r1zero.model.transformer import Transformer

from .cases import CONFIG, PROMPTS, Watched, agree, everything_is_free, mixed_requests

ROWS, STEPS = 256, 512
HOST = torch.device("cpu")
READS = {torch.ops.aten.is_nonzero.default: lambda x: True,
         torch.ops.aten.to.dtype_layout: lambda x: torch.zeros(x.shape, dtype=x.dtype, device="cpu")}


class NoLayers:
    """Stands in for a model's layers, whose work is not counted here; it notes what attention would read."""

    def __init__(self, config):
        self.config, self.tables = config, []

    def __call__(self, tokens, positions, kv, routing=None):
        if isinstance(kv, PagedKV):
            self.tables.append(kv.table)
        return torch.empty(len(tokens), self.config.d_model, device="meta")

    def logits(self, hidden):
        return torch.empty(len(hidden), self.config.vocab_size, device="meta")


class Transfers(TorchDispatchMode):
    """Counts what operators bring from the host to the meta device, and how often the host waits for it.

    What is read back from the meta device is True, or 0.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.waits = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = READS.get(func)
        if read and args[0].is_meta and (kwargs or {}).get("device", HOST).type == "cpu":
            self.reads += 1
            return read(args[0])
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        sent = [x.nbytes for x in tensors if x.is_cpu and x.ndim]
        if sent and isinstance(result, torch.Tensor) and result.is_meta:
            given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            self.bytes += sum(sent)
            self.waits += not given.get("non_blocking", False)
        return result


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
    """256 rows of 592 to 599 tokens need 1,536 programs of attention per layer.

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


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b"])
def test_a_step_sends_the_pages_that_are_new(name):
    """256 rows of 80 to 87 tokens go on for 512. A row takes a page every 16 steps.

    When the whole table was sent, a step sent 1.0 MB on average and 2.1 MB at most (0.5b), 4.1 MB and 8.4 MB
    (1.5b), and the host waited for the device in every other step.
    """
    cache, _ = begin(name)
    decode(cache)  # sends the prompts' pages and lengths
    steps = []
    for _ in range(STEPS):
        with Transfers() as transfers:
            decode(cache)
        steps.append((transfers.bytes, transfers.waits))
    sent, waits = np.array(steps).T
    entry = 2 * 8  # an index and a value
    assert sent.max() == ROWS // 8 * entry and sent.sum() == entry * ROWS * STEPS // PAGE
    assert waits.sum() == 0
    with torch.inference_mode(), Transfers() as transfers:
        cache.cut(ROWS - 5)
        cache.decode(torch.zeros(cache.n, dtype=torch.int64, device="meta"))
    assert transfers.bytes <= (5 * 2 + ROWS // 8) * entry and transfers.waits == 0


def test_rows_that_finish_together_are_read_back_together():
    """64 rows end in one step. When each was read by itself, that step waited 2 x 64 times more."""
    with torch.device("meta"):
        model = Transformer(preset("qwen2.5-0.5b", 151_936), torch.bfloat16)
    engine = Engine(model, max_rows=64, cache_tokens=1 << 15, paged=True)
    engine.cache.weights = NoLayers(model.config)
    requests = [Request([1, 2, 3], 4, i, stop_ids=(9,), top_logprobs=2 * (i % 2)) for i in range(64)]
    for served, kinds in ((requests[::2], 2), (requests, 4)):
        ids, reads = engine.submit(served), []
        while engine.n_unfinished:
            with Transfers() as transfers:
                engine.step()
            reads.append(transfers.reads)
        # in any step: are all rows finite, and which have stopped?
        assert reads == [2, 2, 2, 2 + kinds]
        ended = [engine.completed.pop(i) for i in ids]
        assert [c.top_ids.shape if c.top_ids is not None else None for c in ended] == [
            (4, 2) if r.top_logprobs else None for r in served]


def test_the_devices_table_is_the_hosts():
    """In any step, as far as it is read: rows begin, grow, move, end, wait again and are cancelled."""
    model = Watched(1.0)
    requests = mixed_requests(40) + [Request(PROMPTS[i % 6], 40, i) for i in range(9)]
    engine = Engine(model, max_rows=13, cache_tokens=18 * PAGE, paged=True)
    cache, step, seen = engine.cache, engine.cache._step, []

    def checked(n, width):
        host = cache.page_table
        assert torch.equal(cache.lengths[:n].long(), torch.from_numpy(host.lengths[:n]))
        for row in range(n):
            read = host.lengths[row] // PAGE + 1  # with the new token's page
            assert cache.table[row, :read].tolist() == host.pages[row, :read].tolist()
            assert (host.pages[row, :read] > 0).all() if row < cache.n else read == 1
        seen.append((n, cache.n))
        return step(n, width)

    cache._step = checked
    preempted, preempt = [], engine.scheduler.preempt
    engine.scheduler.preempt = lambda: preempted.append(1) or preempt()
    for event in engine.stream(requests):
        if event.index in (41, 45) and len(event.tokens) == 1:
            engine.cancel(event.id)
    assert preempted and any(n > rows for n, rows in seen)
    everything_is_free(engine)


@torch.inference_mode()
def test_the_longest_row_decides_and_its_end_is_seen_at_once():
    cache, layers = begin("qwen2.5-0.5b", mixed=True)
    decode(cache)
    cache.empty(np.array([0]))
    decode(cache)
    assert [table.shape for table in layers.tables] == [(256, 256), (256, 16)]
    assert {table.stride(0) for table in layers.tables} == {2048}  # views, at an address that graphs may hold


@pytest.mark.parametrize("arch,dtype,graphs", [(90, torch.bfloat16, True), (75, torch.float16, False),
                                               (90, torch.float64, False)])
def test_graphs_hold_the_kernel_and_not_plain_pytorch_which_reads_lengths(arch, dtype, graphs, monkeypatch):
    monkeypatch.setattr(dispatch, "arch_of", lambda device: arch)
    pages = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))  # in place of a tensor on a GPU
    assert can_capture(pages) == (graphs and HAS_TRITON)


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
