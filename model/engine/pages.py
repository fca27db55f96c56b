"""Split off model/cache.py."""

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.decode_attention import decode_attention
from ..attention import KV, RecordingKV
from ..packed import pack
from ..transformer import Transformer
from .cache import PAGE, pages_for


class PagedKV(KV):
    """One new token per row, whose keys and values are written behind the row's last one, in place.

    caches: a pair [P, G, page, D] per layer; table: [B, W] int32, the pages of each row; lengths: [B] int32,
    the tokens that the cache holds so far.
    """

    def __init__(self, caches, table: torch.Tensor, lengths: torch.Tensor):
        self.caches, self.table = caches, table
        self.positions, self.seen = lengths.long(), lengths + 1
        page_size = caches[0][0].shape[2]
        pages = table.gather(1, (self.positions // page_size)[:, None])
        self.pages, self.slots = pages[:, 0].long(), self.positions % page_size

    def attend(self, layer, q_THD, k_TGD, v_TGE):
        k_cache, v_cache = self.caches[layer]
        k_cache[self.pages, :, self.slots] = k_TGD
        v_cache[self.pages, :, self.slots] = v_TGE
        return decode_attention(q_THD, k_cache, v_cache, self.table, self.seen)


class Pages:
    """`n_tokens` places in pages, on any device; on a GPU a step is a CUDA graph."""

    def __init__(self, model: Transformer, n_rows: int):
        self.model, self.config, self.dtype = model, model.config, model.compute_dtype
        self.n_rows = n_rows
        self.device = model.embed.device
        self.weights = (
            model  # unless the trainer's are in another dtype: then one copy, rewritten in place
        )
        if model.embed.dtype != self.dtype and self.device.type == "cuda":
            self.weights = type(model)(model.config, self.dtype).to(self.device, self.dtype)
        self.copy_bytes = (
            0
            if self.weights is model
            else sum(p.numel() * p.element_size() for p in self.weights.parameters())
        )
        self.refresh()

    def allocate(self, n_tokens: int) -> None:
        c, n_rows, self.n_pages = self.config, self.n_rows, n_tokens // PAGE
        # page 0 belongs to no one: rows that only fill up a batch size read and write there
        shape = (self.n_pages + 1, c.n_kv_heads, PAGE, c.head_dim)
        self.kv = [
            tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
            for _ in range(c.n_layers)
        ]
        width = pages_for(min(c.max_seq_len, self.n_pages * PAGE))
        self.table = torch.zeros(n_rows, width, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(n_rows, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=self.device)
        # the host's own copies of the two, and who uses a page
        self.table_h, self.lengths_h = self.table.cpu().numpy().copy(), np.zeros(n_rows, np.int64)
        self.graphs = {}
        self._empty()  # not clear(): on a CPU zeros take memory when they are first touched
        self.sizes = sorted({min(n_rows, 1 << i) for i in range(n_rows.bit_length() + 1)})

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the copy in place: its addresses are in the graphs."""
        if self.weights is not self.model:
            for mine, theirs in zip(
                self.weights.parameters(), self.model.parameters(), strict=True
            ):
                mine.copy_(theirs)

    # ---- room ----

    def needed(self, total: int) -> int:
        return pages_for(total) * PAGE

    def can_step(self) -> bool:
        return int((self.lengths_h[: self.n] % PAGE == 0).sum()) <= len(self.free)

    def fits(self, n: int, longest: int, pages: int) -> bool:
        """As in Slots; with a page in hand for every row to go on."""
        n += self.n
        return n <= self.n_rows and pages + n <= len(self.free)

    def _take(self, n: int) -> np.ndarray:
        pages = np.array([self.free.pop() for _ in range(n)], np.int64)
        self.users[pages] = 1
        return pages

    def _release(self, row: int) -> None:
        pages = self.table_h[row, : pages_for(self.lengths_h[row])]
        self.users[pages] -= 1
        self.free += pages[self.users[pages] == 0].tolist()
        self.table_h[row], self.lengths_h[row] = 0, 0

    def _upload(self) -> None:
        self.table.copy_(torch.from_numpy(self.table_h))
        self.lengths.copy_(torch.from_numpy(self.lengths_h))

    # ---- rows ----

    def admit(
        self, rows: np.ndarray, prompts: list[Sequence[int]], which: np.ndarray
    ) -> torch.Tensor:
        """Prefill the prompts, and give rows[i] the pages of prompts[which[i]]; logits of the prompts [P, V].

        Full pages are shared; the last, which a row goes on writing, is its own.
        """
        packed = pack(prompts, self.device)
        recording = RecordingKV(packed)
        hidden = self.weights(packed.tokens, packed.positions, recording)
        ends = np.cumsum([len(p) for p in prompts])
        shared = {}
        place_T, token_T = (
            [],
            [],
        )  # where each key is written, and which one: one more time for each copy

        def write(page: int, first: int, end: int) -> None:
            token_T.append(np.arange(first, end))
            place_T.append(page * PAGE + np.arange(end - first))

        for row, p in zip(rows.tolist(), which.tolist(), strict=True):
            length = len(prompts[p])
            first, full = int(ends[p]) - length, length // PAGE
            if self.lengths_h[row]:
                self._release(row)
            if p not in shared:
                shared[p] = self._take(full)
                for i, page in enumerate(shared[p]):
                    write(page, first + i * PAGE, first + (i + 1) * PAGE)
            else:
                self.users[shared[p]] += 1
            self.table_h[row, :full], self.lengths_h[row] = shared[p], length
            if length % PAGE:
                self.table_h[row, full] = self._take(1)[0]
                write(self.table_h[row, full], first + full * PAGE, first + length)
        places, tokens = (
            torch.from_numpy(np.concatenate(x)).to(self.device) for x in (place_T, token_T)
        )
        for caches, new in zip(self.kv, recording.kept, strict=True):
            for cache, x in zip(caches, new, strict=True):
                cache[places // PAGE, :, places % PAGE] = x.to(self.dtype)[tokens]
        self.n = max(self.n, int(rows.max()) + 1)
        self._upload()
        return self.weights.logits(hidden[packed.cu_seqlens[1:].long() - 1])

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        for to, by in zip(dst.tolist(), src.tolist(), strict=True):
            self._release(to)
            self.table_h[to], self.lengths_h[to] = self.table_h[by], self.lengths_h[by]
            self.table_h[by], self.lengths_h[by] = 0, 0

    def empty(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self._release(row)
        self._upload()

    def cut(self, n: int) -> None:
        for row in range(n, self.n):
            if self.lengths_h[row]:
                self._release(row)
        self.n = n
        self._upload()

    def clear(self) -> None:
        for cache in (x for pair in self.kv for x in pair):
            cache.zero_()  # in place: its address is in the graphs
        self._empty()

    def _empty(self) -> None:
        self.table_h[:], self.lengths_h[:] = 0, 0
        self.users = np.zeros(self.n_pages + 1, np.int64)
        self.free = list(range(self.n_pages, 0, -1))
        self.n = 0
        self._upload()

    # ---- one token a row ----

    def width(self, n: int) -> int:
        return next(size for size in self.sizes if size >= n) if n else 0

    def _step(self, n: int) -> torch.Tensor:
        kv = PagedKV(self.kv, self.table[:n], self.lengths[:n])
        hidden = self.weights(self.tokens[:n], kv.positions, kv)
        return self.weights.logits(hidden)

    def _graph(self, n: int):
        """A function that does the step of n rows: on a GPU the replay of a graph, captured once."""
        if self.device.type != "cuda":
            return lambda: self._step(n)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled before the capture
            self._step(n)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(n)

        def replay():
            graph.replay()
            return logits

        return replay

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B], the newest of each row, not in the cache yet -> logits [B, V] of what follows."""
        n = self.n
        full = np.flatnonzero(self.lengths_h[:n] % PAGE == 0)
        if len(full):
            self.table_h[full, self.lengths_h[full] // PAGE] = self._take(len(full))
            self.table.copy_(torch.from_numpy(self.table_h))
        size = self.width(n)
        if size not in self.graphs:
            self.graphs[size] = self._graph(size)
        self.tokens[:n] = tokens
        logits = self.graphs[size]()[:n]
        self.lengths_h[:n] += 1
        self.lengths[:n] += 1
        return logits
