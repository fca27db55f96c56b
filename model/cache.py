"""The key/value cache of the sequences that are being decoded, and decoding against it: slots or pages.

Both hold their live sequences in rows 0 .. n - 1 and answer the same questions of the scheduler (engine.py):

    fits(n, ...)           may n more begin, too?          can_step()   is there room for a token in each row?
    admit(rows, ...)       prefill                         decode(...)  one token a row: logits
    move(dst, src), cut(n) rows change places; what lies behind n is free
    allocate(n_tokens)     once, before all others         clear()      no row, and no NaN, is left

`Slots` is the CPU's. Rows are aligned at their ENDS: the newest token of every row stands in the same column,
so keys and values are written as one slice and read as one window, from the longest sequence's first column
on; a mask hides what lies before a shorter one. Its decode path is the model's own arithmetic with as few
operators as it takes (15 a layer), on the trainer's weights, which it reads where they lie: only the matrix
of q, k and v is laid out anew, so that RoPE is one complex product, with its norm's weight and the scores'
scale in it.

`Pages` is the GPU's, and can be run anywhere: fixed pages of PAGE tokens, a table of page numbers for each
row, prompts' full pages shared by the samples of a group (reference counts), the last one copied for each.
Its decode path is the model's, at a few fixed batch sizes, each captured as a CUDA graph on static tensors.

Shapes: B rows, L layers, H query heads, G kv heads, R = H / G, D head_dim, S columns, T flat tokens.
"""
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels.rope import rope_table
from .packed import pack, positions_of
from .transformer import Transformer

PAGE = 16   # tokens in a page; slots grow by as many columns
SLACK = 64  # columns that slots have in hand, where they may, so that they seldom move


def pages_for(n_tokens) -> int:
    return -(-n_tokens // PAGE)


def tokens_of(prompts: Sequence[Sequence[int]], which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows that hold prompts[which[i]]: ([B] lengths, [sum] flat index of each row's tokens)."""
    lengths = np.array([len(p) for p in prompts], np.int64)
    firsts = (np.cumsum(lengths) - lengths)[which]
    return lengths[which], np.repeat(firsts, lengths[which]) + positions_of(lengths[which])


class Slots:
    """At most `n_tokens` places: rows x columns."""

    copy_bytes = 0  # of weights; q, k and v aside, none if the dtype is the same

    def __init__(self, model: Transformer, n_rows: int):
        self.model, self.config, self.dtype = model, model.config, model.compute_dtype
        self.n_rows, self.n_tokens = n_rows, 0
        self.start = np.zeros(n_rows, np.int64)  # each row's first column
        self.n, self.column = 0, -1  # live rows; the column of their newest token
        self.kv: list[torch.Tensor] = []  # keys, values of layer 0, of layer 1, ...: [rows, G, columns, D]
        self.refresh()

    # ---- weights ----

    def refresh(self) -> None:
        """Read the trainer's weights: all but q, k, v where they lie, if the dtype is the same."""
        c, dtype = self.config, self.dtype
        pairs = torch.arange(c.head_dim).view(2, -1).T.flatten()  # RoPE's pairs side by side, as complex
        heads = torch.arange((c.n_heads + 2 * c.n_kv_heads) * c.head_dim).view(-1, c.head_dim)
        heads[: c.n_heads + c.n_kv_heads] = heads[: c.n_heads + c.n_kv_heads, pairs]  # not the values
        order, n_q = heads.flatten(), c.n_heads * c.head_dim
        self.pairs, self.layers = pairs, []
        for block in self.model.blocks:
            attn, mlp = block.attn, block.mlp
            qkv = attn.qkv.detach()[order] * block.attn_norm.detach()  # the norm's weight, once for all
            bias = None if attn.qkv_bias is None else attn.qkv_bias.detach()[order]
            norms = [w.detach()[pairs] for w in (attn.q_norm, attn.k_norm) if w is not None]
            for x in (norms[:1] if norms else [qkv[:n_q]] if bias is None else [qkv[:n_q], bias[:n_q]]):
                x *= c.head_dim ** -0.5  # and the scale of the scores
            self.layers.append((
                qkv.to(dtype).t(), None if bias is None else bias.to(dtype), [w.to(dtype) for w in norms],
                attn.out.detach().to(dtype).t(), block.mlp_norm.detach().to(dtype),
                mlp.gate_up.detach().to(dtype), mlp.down.detach().to(dtype).t()))
        self.embed, self.norm = self.model.embed.detach(), self.model.norm.detach().to(dtype)

    # ---- room ----

    def allocate(self, n_tokens: int) -> None:
        """Tensors are made when they are needed."""
        self.n_tokens = n_tokens

    @staticmethod
    def places(longest: int) -> int:
        return pages_for(longest) * PAGE

    def needed(self, total: int) -> int:
        """Places for one sequence of so many tokens."""
        return self.places(total)

    @property
    def longest(self) -> int:
        return int(self.column + 1 - self.start[:self.n].min()) if self.n else 0

    def can_step(self) -> bool:
        return self.n * self.places(self.longest + 1) <= self.n_tokens

    def fits(self, n: int, longest: int, pages: int) -> bool:
        """May n more rows begin, of prompts of at most `longest` tokens in `pages` pages, shared ones counted
        once? With some columns in hand for all to go on."""
        n += self.n
        return n <= self.n_rows and n * self.places(max(self.longest, longest) + PAGE) <= self.n_tokens

    def _lay_out(self, n: int, longest: int) -> None:
        """Make room for n rows, and the newest tokens stand where a sequence of `longest` tokens ends."""
        rows, columns = self.kv[0].shape[::2] if self.kv else (0, 0)
        span = longest + 1
        lo, hi = self.column + 1 - self.longest, self.column + 1
        larger = n > rows or span > columns or rows * columns > self.n_tokens
        if larger:
            rows = max(n, rows) if max(n, rows) * max(self.places(span), columns) <= self.n_tokens else n
            for slack in (SLACK, PAGE, 0):
                columns = max(self.places(span + slack), columns if slack else 0)
                if rows * columns <= self.n_tokens:
                    break
            self._buffers(rows, columns)
        c, shift = self.config, span - 2 - self.column
        self.kv = self.kv or [None] * (2 * c.n_layers)
        for i, source in enumerate(self.kv):  # one by one: the old and the new are never there together
            shape = (rows, c.n_kv_heads, columns, c.head_dim)
            # zeros: what a mask hides must still be finite
            target = torch.zeros(shape, dtype=self.dtype) if larger else source
            if self.n and (shift or larger):
                live = source[: self.n, :, lo:hi]
                target[: self.n, :, lo + shift : hi + shift] = live if larger else live.clone()
            self.kv[i] = target
        self.column += shift
        self.start[: self.n] += shift

    def _buffers(self, rows: int, columns: int) -> None:
        """What a step writes, so that it allocates little."""
        c = self.config
        new = lambda *shape: torch.empty(shape, dtype=self.dtype)  # noqa: E731
        self.qkv = new(rows, c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        self.q, self.out = (new(rows, c.n_heads, c.head_dim) for _ in range(2))
        self.gate_up = new(2 * c.d_ff * rows)
        self.scores = new(rows * c.n_heads * columns)
        self.mask = torch.zeros(rows, columns, dtype=self.dtype)
        cos, sin = rope_table(torch.arange(columns), c.head_dim, c.rope_theta)
        self.turns = torch.complex(cos.float(), sin.float())  # [columns, D / 2], of every position

    def _rows_changed(self) -> None:
        start = torch.from_numpy(self.start[: self.n])
        self.first = int(start.min()) if self.n else 0
        self.start_B = start.clone()
        self.ragged = self.n > 0 and self.first < int(start.max())
        if self.ragged:
            hidden = torch.arange(self.mask.shape[1]) < start[:, None]
            self.mask[: self.n] = torch.zeros(()).masked_fill(hidden, float("-inf"))

    # ---- rows ----

    def admit(self, rows: np.ndarray, prompts: list[Sequence[int]], which: np.ndarray) -> torch.Tensor:
        """Prefill the prompts, and lay prompts[which[i]] into rows[i]; logits of the prompts [P, V]."""
        n = max(self.n, int(rows.max()) + 1)
        longest = max([self.longest, *map(len, prompts)])
        if not self.kv or n > len(self.kv[0]) or self.n == 0 or self.column + 1 < longest:
            self._lay_out(n, longest)
        lengths, tokens = tokens_of(prompts, which)
        self.n, self.start[rows] = n, self.column + 1 - lengths
        packed = pack(prompts)
        hidden, kept = self.model.prefill(packed)
        places = np.repeat(self.start[rows], lengths) + positions_of(lengths)
        rows_T, places, tokens = map(torch.from_numpy, (np.repeat(rows, lengths), places, tokens))
        new = [x for k, v in kept for x in (k[..., self.pairs], v)]
        for cache, x in zip(self.kv, new, strict=True):
            cache[rows_T, :, places] = x.to(self.dtype)[tokens]
        self._rows_changed()
        return self.model.logits(hidden[packed.cu_seqlens[1:].long() - 1])

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        to, by = torch.from_numpy(dst), torch.from_numpy(src)
        for cache in self.kv:
            window = cache[:, :, self.first : self.column + 1]
            window[to] = window[by]
        self.start[dst] = self.start[src]

    def cut(self, n: int) -> None:
        self.n = n
        self._rows_changed()

    def clear(self) -> None:
        self.kv, self.column = [], -1
        self.n = 0

    # ---- one token a row ----

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """rmsnorm in a third of the time that F.rms_norm, nine operators on a CPU, takes."""
        if x.dtype != torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, self.config.norm_eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(self.config.norm_eps).rsqrt_()
        return torch.mul(x, r) if weight is None else torch.mul(x, r).mul_(weight)

    def _turn(self, x: torch.Tensor, turns: torch.Tensor, out: torch.Tensor) -> None:
        """RoPE of pairs that lie side by side: a product of complex numbers."""
        x, out = x.unflatten(-1, (-1, 2)), out.unflatten(-1, (-1, 2))
        if x.dtype == torch.float32:
            torch.mul(torch.view_as_complex(x), turns, out=torch.view_as_complex(out))
        else:
            out.copy_(torch.view_as_real(torch.view_as_complex(x.float()) * turns))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B], the newest of each row, not in the cache yet -> logits [B, V] of what follows."""
        if self.column + 1 >= self.kv[0].shape[2]:
            self._lay_out(self.n, self.longest)
            self._rows_changed()
        self.column += 1
        c, n, place = self.config, self.n, self.column
        H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
        qkv, q, out = self.qkv[:n], self.q[:n], self.out[:n]
        gate_up = self.gate_up[: 2 * c.d_ff * n].view(-1, n)  # features first: two threads share it better
        S = place + 1 - self.first
        scores = self.scores[: n * H * S].view(n * G, H // G, S)
        turns = self.turns[place - self.start_B][:, None]
        mask = self.mask[:n, None, self.first : place + 1] if self.ragged else None
        k, v = qkv[:, H : H + G], qkv[:, H + G :]
        x = F.embedding(tokens, self.embed).to(self.dtype)
        for k_cache, v_cache, (w_qkv, bias, head_norms, w_out, mlp_norm, w_up, w_down) in zip(
                self.kv[::2], self.kv[1::2], self.layers, strict=True):
            y = self._norm(x)
            if bias is None:
                torch.mm(y, w_qkv, out=qkv.view(n, -1))
            else:
                torch.addmm(bias, y, w_qkv, out=qkv.view(n, -1))
            if head_norms:
                qkv[:, :H] = self._norm(qkv[:, :H], head_norms[0])
                qkv[:, H : H + G] = self._norm(k, head_norms[1])
            self._turn(qkv[:, :H], turns, q)
            self._turn(k, turns, k_cache[:n, :, place])
            v_cache[:n, :, place] = v
            keys, values = (x.flatten(0, 1)[: n * G, self.first : place + 1] for x in (k_cache, v_cache))
            torch.bmm(q.view(n * G, -1, D), keys.transpose(1, 2), out=scores)
            if mask is not None:
                scores.view(n, H, S).add_(mask)
            torch.bmm(scores.softmax(-1), values, out=out.view(n * G, -1, D))
            x.addmm_(out.view(n, -1), w_out)
            torch.mm(w_up, self._norm(x, mlp_norm).t(), out=gate_up)
            gate, up = gate_up.chunk(2)
            x.addmm_(F.silu(gate, inplace=True).mul_(up).t(), w_down)
        return self.model.logits(self._norm(x, self.norm))


class Pages:
    """`n_tokens` places in pages, on any device; on a GPU a step is a CUDA graph."""

    def __init__(self, model: Transformer, n_rows: int):
        self.model, self.config, self.dtype = model, model.config, model.compute_dtype
        self.n_rows = n_rows
        self.device = model.embed.device
        self.weights = model  # unless the trainer's are in another dtype: then one copy, rewritten in place
        if model.embed.dtype != self.dtype and self.device.type == "cuda":
            self.weights = type(model)(model.config, self.dtype).to(self.device, self.dtype)
        self.copy_bytes = 0 if self.weights is model else \
            sum(p.numel() * p.element_size() for p in self.weights.parameters())
        self.refresh()

    def allocate(self, n_tokens: int) -> None:
        c, n_rows, self.n_pages = self.config, self.n_rows, n_tokens // PAGE
        # page 0 belongs to no one: rows that only fill up a batch size read and write there
        shape = (self.n_pages + 1, c.n_kv_heads, PAGE, c.head_dim)
        self.kv = [tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
                   for _ in range(c.n_layers)]
        width = pages_for(min(c.max_seq_len, self.n_pages * PAGE))
        self.table = torch.zeros(n_rows, width, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(n_rows, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=self.device)
        # the host's own copies of the two, and who uses a page
        self.table_h, self.lengths_h = self.table.cpu().numpy().copy(), np.zeros(n_rows, np.int64)
        self.graphs = {}
        self.clear()
        self.sizes = sorted({min(n_rows, 1 << i) for i in range(n_rows.bit_length() + 1)})

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the copy in place: its addresses are in the graphs."""
        if self.weights is not self.model:
            for mine, theirs in zip(self.weights.parameters(), self.model.parameters(), strict=True):
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

    def admit(self, rows: np.ndarray, prompts: list[Sequence[int]], which: np.ndarray) -> torch.Tensor:
        """Prefill the prompts, and give rows[i] the pages of prompts[which[i]]; logits of the prompts [P, V].

        Full pages are shared; the last, which a row goes on writing, is its own.
        """
        packed = pack(prompts, self.device)
        hidden, kept = self.weights.prefill(packed)
        ends = np.cumsum([len(p) for p in prompts])
        shared = {}
        place_T, token_T = [], []  # where each key is written, and which one: one more time for each copy

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
        places, tokens = (torch.from_numpy(np.concatenate(x)).to(self.device) for x in (place_T, token_T))
        for caches, new in zip(self.kv, kept, strict=True):
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

    def cut(self, n: int) -> None:
        for row in range(n, self.n):
            if self.lengths_h[row]:
                self._release(row)
        self.n = n
        self._upload()

    def clear(self) -> None:
        for cache in (x for pair in self.kv for x in pair):
            cache.zero_()  # in place: its address is in the graphs
        self.table_h[:], self.lengths_h[:] = 0, 0
        self.users = np.zeros(self.n_pages + 1, np.int64)
        self.free = list(range(self.n_pages, 0, -1))
        self.n = 0
        self._upload()

    # ---- one token a row ----

    def _step(self, n: int) -> torch.Tensor:
        hidden = self.weights.decode(self.tokens[:n], self.lengths[:n], self.kv, self.table[:n])
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
        size = next(size for size in self.sizes if size >= n)
        if size not in self.graphs:
            self.graphs[size] = self._graph(size)
        self.tokens[:n] = tokens
        logits = self.graphs[size]()[:n]
        self.lengths_h[:n] += 1
        self.lengths[:n] += 1
        return logits
