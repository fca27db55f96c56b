"""The key/value cache in pages, on any device; on a GPU, decoding is a CUDA graph.

Keys and values lie in pages of PAGE tokens, one pair of tensors per layer, at fixed addresses.
Attention finds those of a row through a table of page numbers (page_table.py), as in vLLM (Kwon et
al. 2023, arXiv 2309.06180). So rows of any length lie in one memory without gaps, and the samples
of a group share the pages of their prompt. The routes of a mixture of experts, where they are
asked for, lie in pages of their own with the same numbers: who shares a prompt's keys has its
routes.

A decoding step is captured and replayed: a small model's step is otherwise bound by the launching
of its kernels. A graph's work is fixed by two numbers, the rows and the columns of the page table
that it reads. Both are rounded up to powers of two, so that a step costs what is in use, not what
the model's longest sequence would. There is one graph for each pair that occurs, captured at its
first step. Everything that a graph reads or writes is a static tensor, or lies in a memory pool
that all graphs share: they run one after another. The logits are computed behind the graph, since a
pool could give their memory to nobody else.

Shapes: B rows, T flat tokens of a prefill, P prompts, N pages, G kv heads, D width of a key, E
width of a value, W pages that a row may have, M d_model, V vocabulary, L layers with experts, K
experts per token.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ...kernels.decode_attention import SPLIT, can_capture, decode_attention
from ...kernels.latent_attention import latent_decode_attention
from ..attention import KV, PrefillKV
from ..moe import Router
from ..packed import Packed, pack
from ..routes import UNKNOWN, Routing, route_dtype, route_shape
from ..transformer import Transformer
from .cache import PAGE, pages_for
from .page_table import PageTable


class PagedKV(KV):
    """What attention reads and writes when every row has one new token: the pages of the cache.

    Those of latent attention hold the rotated part of a key, shared by all heads, where others hold
    keys, and the latents where others hold values.
    """

    reads_latents = True

    def __init__(self, caches: list, table: torch.Tensor, lengths: torch.Tensor):
        """caches: keys [N, G, PAGE, D] and values [N, G, PAGE, E] of each layer.

        table: [B, W] int32, the pages of each row.
        lengths: [B] int32, the tokens that each row has so far.
        """
        self.caches, self.table = caches, table
        # The new token stands behind the row's last one: at which offset, in which page?
        self.positions = lengths.long()
        self.pages = table.gather(1, (self.positions // PAGE)[:, None])[:, 0].long()
        self.offsets = self.positions % PAGE
        self.lengths = lengths + 1  # attention sees the new token, too

    def attend(
        self,
        layer: int,
        q_BHD: torch.Tensor,
        k_BGD: torch.Tensor,
        v_BGE: torch.Tensor,
        window: int | None = None,
        scale: float | None = None,
        kept=None,
    ):
        """Write the new keys and values to their pages; attention [B, H, E] over the whole row."""
        k_cache, v_cache = self._write(layer, k_BGD, v_BGE)
        return decode_attention(
            q_BHD, k_cache, v_cache, self.table, self.lengths, scale, window=window
        )

    def attend_latents(self, layer, q_latent_BHL, q_rope_BHR, latent_B1L, k_rope_B1R, scale):
        """Write the new latents to their pages; attention [B, H, L] over the whole row."""
        rope_cache, latent_cache = self._write(layer, k_rope_B1R, latent_B1L)
        return latent_decode_attention(
            q_latent_BHL, q_rope_BHR, latent_cache, rope_cache, self.table, self.lengths, scale
        )

    def _write(
        self, layer: int, k_BGD: torch.Tensor, v_BGE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what the new tokens have to their pages. Returns the layer's caches."""
        k_cache, v_cache = self.caches[layer]
        k_cache[self.pages, :, self.offsets] = k_BGD
        v_cache[self.pages, :, self.offsets] = v_BGE
        return k_cache, v_cache


class PageWritingKV(PrefillKV):
    """Writes each layer's keys and values of a prefill to their pages as they come, so that none is
    held until the last layer."""

    def __init__(self, packed: Packed, caches: list, slots: torch.Tensor, tokens: torch.Tensor):
        """caches: as in PagedKV. slots, tokens: [K], as `Pages._lay_out` returns them."""
        super().__init__(packed)
        self.caches, self.tokens = caches, tokens
        self.pages, self.offsets = slots // PAGE, slots % PAGE

    def keep(self, layer: int, k_TGD: torch.Tensor, v_TGE: torch.Tensor) -> None:
        for cache, new in zip(self.caches[layer], (k_TGD, v_TGE), strict=True):
            cache[self.pages, :, self.offsets] = new[self.tokens].to(cache.dtype)


class PageRouting(Routing):
    """Writes the experts of each layer to the pages of the tokens."""

    def __init__(
        self,
        routes: torch.Tensor,
        kv: PagedKV | PageWritingKV,
        tokens: torch.Tensor | slice = slice(None),
        replayed_TLK: torch.Tensor | None = None,
    ):
        """routes: [N, PAGE, L, K]. kv: knows the pages and offsets. tokens: which ones are written
        there, as in PageWritingKV."""
        super().__init__(replayed_TLK)
        self.routes, self.tokens = routes, tokens
        self.pages, self.offsets = kv.pages, kv.offsets

    def keep(self, layer: int, experts_TK: torch.Tensor) -> None:
        experts = experts_TK[self.tokens].to(self.routes.dtype)
        self.routes[self.pages, self.offsets, layer] = experts


def cast_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The same modules, whatever they are, over weights of their own in `dtype`.

    What an fp32 head or an fp32 router reads keeps its dtype.
    """
    kept = set()
    if model.fp32_head:
        head = [model.embed] if model.config.tie_embeddings else model.lm_head.parameters()
        kept = {id(p) for p in (model.norm, *head)}

    fp32_routers = [m for m in model.modules() if isinstance(m, Router) and m.config.fp32_router]
    kept |= {id(p) for router in fp32_routers for p in router.parameters()}

    # deepcopy takes what the memo has in the place of a parameter, so none is copied as it is.
    copies = {}
    for p in model.parameters():
        copied = p.detach().clone() if id(p) in kept else p.detach().to(dtype)
        copies[id(p)] = nn.Parameter(copied, False)
    return copy.deepcopy(model, copies)


class Pages:
    """A `Cache` of `n_tokens` in pages, for at most `n_rows` rows."""

    def __init__(self, model: Transformer, n_rows: int, keep_routes: bool = False):
        """keep_routes: of a mixture of experts, for `routes_of`."""
        self.model, self.n_rows = model, n_rows
        self.keeps_routes = keep_routes and model.config.moe is not None
        self.routes: torch.Tensor | None = None
        self.dtype, self.device = model.compute_dtype, model.device
        self.n = 0
        # Decode from the trainer's own weights, unless a GPU would have to cast them in every step:
        # then from one copy in the compute dtype, which is rewritten in place.
        self.weights = model
        self.copy_bytes = 0
        if model.embed.dtype != self.dtype and self.device.type != "cpu":
            self.weights = cast_copy(model, self.dtype)
            self.copy_bytes = sum(p.numel() * p.element_size() for p in self.weights.parameters())
        self.refresh()

    def allocate(self, n_tokens: int) -> None:
        n_pages, max_seq_len = n_tokens // PAGE, self.model.config.max_seq_len
        width = pages_for(min(max_seq_len, n_pages * PAGE))
        self.page_table = PageTable(n_pages, self.n_rows, width)
        # What graphs read and write: keys and values, and the device's copy of the page table.
        shapes = [block.attn.cache_shape for block in self.model.blocks]
        self.caches = [self._layer_cache(n_pages, shape) for shape in shapes]
        if self.keeps_routes:
            config = self.model.config
            shape = n_pages + 1, PAGE, *route_shape(config)
            self.routes = self._zeros(*shape, dtype=route_dtype(config))
        # It lies in one tensor, so that a step's changes are one copy and one write.
        self.table_and_lengths = self._zeros(self.n_rows * (width + 1), dtype=torch.int32)
        table, self.lengths = self.table_and_lengths.split([self.n_rows * width, self.n_rows])
        self.table = table.view(self.n_rows, width)
        self.tokens = self._zeros(self.n_rows, dtype=torch.int64)
        self.sizes = doublings(1, self.n_rows)
        # Fewer pages than a program of attention reads would save none.
        self.widths = doublings(SPLIT // PAGE, width)
        # At most len(sizes) * len(widths), but rows grow longer and fewer: most pairs never occur.
        self.graphs: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}
        capturable = all(block.mlp.can_capture(self.dtype) for block in self.model.blocks)
        self.captures = self.device.type == "cuda" and can_capture(self.caches[0][0]) and capturable
        self.graph_pool = torch.cuda.graph_pool_handle() if self.captures else None

    def _zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _layer_cache(
        self, n_pages: int, shape: tuple[int, int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer; one page more, since page 0 belongs to nobody."""
        n_kv_heads, key_width, value_width = shape
        keys = self._zeros(n_pages + 1, n_kv_heads, PAGE, key_width, dtype=self.dtype)
        values = self._zeros(n_pages + 1, n_kv_heads, PAGE, value_width, dtype=self.dtype)
        return keys, values

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the copy of the weights in place, if there is one: graphs hold its addresses."""
        if self.weights is self.model:
            return
        theirs = self.model.state_dict()
        for name, mine in self.weights.state_dict().items():
            mine.copy_(theirs[name])

    def clear(self) -> None:
        for cache in self.caches:
            for values in cache:
                values.zero_()  # in place: graphs hold its address
        self.n = 0
        self.page_table.reset()
        self.table_and_lengths.zero_()

    # ---- is there room? ----

    def needed(self, total: int) -> int:
        return pages_for(total) * PAGE

    def can_step(self) -> bool:
        return len(self.page_table.full(self.n)) <= len(self.page_table.free)

    def fits(self, n: int, longest: int, pages: int) -> bool:
        # With a page in hand for every row to go on.
        n += self.n
        return n <= self.n_rows and pages + n <= len(self.page_table.free)

    # ---- rows ----

    def admit(
        self,
        rows: np.ndarray,
        prompts: list[Sequence[int]],
        which: np.ndarray,
        routes: list[np.ndarray | None] | None = None,
    ) -> torch.Tensor:
        slots, tokens = self._lay_out(rows, which, [len(prompt) for prompt in prompts])
        self.n = max(self.n, int(rows.max()) + 1)

        # Prefill all prompts as one flat batch, each once. Every layer writes the keys and values
        # of the tokens to the pages of the rows.
        packed = pack(prompts, self.device)
        kv = PageWritingKV(packed, self.caches, slots, tokens)
        routing = None
        if self.routes is not None:
            known_TLK = self._known_routes(prompts, routes)
            routing = PageRouting(self.routes, kv, tokens, known_TLK)
        hidden_TM = self.weights(packed.tokens, packed.positions, kv, routing=routing)

        # The last token of each prompt predicts the first one of its samples.
        last = packed.cu_seqlens[1:].long() - 1
        return self.weights.logits(hidden_TM[last])

    def _lay_out(
        self, rows: np.ndarray, which: np.ndarray, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the rows their pages. Returns (slots, tokens), [K]: what is written where.

        Flat token tokens[i] of the prefill is written to slot slots[i]; slot s is offset s % PAGE
        of page s // PAGE. Full pages are written once and shared. The last page of a prompt, which
        a row goes on writing, is written for each row.
        """
        table, starts = self.page_table, np.cumsum(lengths) - lengths
        shared: dict[int, np.ndarray] = {}  # the full pages of each prompt
        slots, tokens = [], []
        for row, prompt in zip(rows.tolist(), which.tolist(), strict=True):
            start, length = starts[prompt], lengths[prompt]
            n_shared = length // PAGE * PAGE
            if prompt in shared:
                table.share(shared[prompt])
            else:
                shared[prompt] = table.take(length // PAGE)
                slots.append(slots_of(shared[prompt], n_shared))
                tokens.append(start + np.arange(n_shared))
            own = table.take(1 if length % PAGE else 0)
            slots.append(slots_of(own, length % PAGE))
            tokens.append(start + np.arange(n_shared, length))
            table.begin(row, np.concatenate([shared[prompt], own]), length)
        return self._send(np.concatenate(slots)), self._send(np.concatenate(tokens))

    def _known_routes(
        self, prompts: list[Sequence[int]], routes: list[np.ndarray | None] | None
    ) -> torch.Tensor | None:
        """[T, L, K] to replay, UNKNOWN for tokens that had no routes before; None if none had."""
        if routes is None or all(known is None for known in routes):
            return None
        parts = []
        for prompt, known in zip(prompts, routes, strict=True):
            part = np.full((len(prompt), *self.routes.shape[2:]), UNKNOWN, np.int16)
            if known is not None:
                part[: len(known)] = known
            parts.append(part)
        return self._send(np.concatenate(parts))

    def routes_of(self, rows: np.ndarray) -> list[np.ndarray | None]:
        if self.routes is None:
            return [None] * len(rows)
        table = self.page_table
        lengths = table.lengths[rows]
        slots = [
            slots_of(table.pages[row, : pages_for(length)], length)
            for row, length in zip(rows, lengths, strict=True)
        ]
        # The device is read once for all rows.
        index = self._send(np.concatenate(slots))
        found_TLK = self.routes.flatten(0, 1)[index].cpu().numpy()
        return [part.copy() for part in np.split(found_TLK, np.cumsum(lengths)[:-1])]

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        for to, by in zip(dst.tolist(), src.tolist(), strict=True):
            self.page_table.move(to, by)

    def cut(self, n: int) -> None:
        self.page_table.release(range(n, self.n))
        self.n = n

    def empty(self, rows: np.ndarray) -> None:
        self.page_table.release(rows.tolist())

    def _upload(self) -> None:
        """Write what has changed in the page table to the device's copy of it."""
        changes = self.page_table.changes()
        if changes.shape[1]:
            index, values = self._send(changes)
            self.table_and_lengths[index] = values.int()

    def _send(self, array: np.ndarray) -> torch.Tensor:
        """A copy on the device. Nobody waits for it: its memory on the host is pinned."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    # ---- one token per row ----

    def width(self, n: int) -> int:
        return next(size for size in self.sizes if size >= n) if n else 0

    def table_width(self, n: int) -> int:
        """Columns of the page table that n rows need for one token more, rounded up."""
        n_pages = pages_for(self.page_table.lengths[:n].max() + 1)
        return next(width for width in self.widths if width >= n_pages)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        # A row whose last page is full gets another one for its new token.
        n, table = self.n, self.page_table
        full = table.full(n)
        if len(full):
            table.extend(full)
        self._upload()

        # Rows n and up to the batch size have length 0 and page 0: what they compute is not read.
        shape = self.width(n), self.table_width(n)
        if shape not in self.graphs:
            self.graphs[shape] = self._graph(*shape)
        self.tokens[:n] = tokens
        hidden_BM = self.graphs[shape]()
        logits = self.weights.logits(hidden_BM)[:n]

        table.lengths[:n] += 1
        self.lengths[:n] += 1
        return logits

    def _graph(self, n: int, width: int) -> Callable[[], torch.Tensor]:
        """A function that decodes n rows of `width` pages: on a GPU the replay of a graph, captured
        here."""
        if not self.captures:
            return lambda: self._step(n, width)
        # Kernels are compiled in a run before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(n, width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.graph_pool):
            hidden_BM = self._step(n, width)

        def replay() -> torch.Tensor:
            """The next replay of any graph may write over what this returns."""
            graph.replay()
            return hidden_BM

        return replay

    def _step(self, n: int, width: int) -> torch.Tensor:
        """Hidden states [n, M] of the newest token of each row, which is written to the cache."""
        kv = PagedKV(self.caches, self.table[:n, :width], self.lengths[:n])
        routing = None if self.routes is None else PageRouting(self.routes, kv)
        return self.weights(self.tokens[:n], kv.positions, kv, routing=routing)


def doublings(least: int, most: int) -> list[int]:
    """least, 2 least, 4 least ... below `most`, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def slots_of(pages: np.ndarray, n: int) -> np.ndarray:
    """[n] int64, the first n slots of these pages."""
    return (pages[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:n]
