"""Split off model/cache.py."""

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.cpu import compile as cpu
from ...kernels.cpu.columns import embed_loop, rmsnorm_columns_loop
from ...kernels.cpu.decode_attention import (
    ROW_BLOCK,
    decode_attention_loop,
    move_rows_loop,
    write_rows_loop,
)
from ...kernels.cpu.elementwise import swiglu_fwd_loop
from ...kernels.cpu.layer import finish_layer_loop, groups_of, project_loop
from ...kernels.rope import rope_table
from ..attention import RecordingKV
from ..packed import pack
from ..transformer import Transformer
from .cache import PAGE, pages_for

ROW_STEP = 16  # a product for a few rows more, up to a multiple of this, takes half the time of an odd number


SLACK = 64  # columns that slots have in hand, where they may, so that they seldom move


class Slots:
    """At most `n_tokens` places: rows x columns (and those of up to 7 rows more, since rows go in blocks of 8
    where there may be as many). Within a block each number of all rows lies side by side, as a vector for the
    loop that reads them, and what a step reads of one kv head is one run of memory."""

    copy_bytes = 0  # of weights: it reads the trainer's

    def __init__(self, model: Transformer, n_rows: int):
        self.model, self.config = model, model.config
        self.n_rows, self.n_tokens = n_rows, 0
        self.block = ROW_BLOCK if n_rows >= ROW_BLOCK else 1
        self.lengths = np.zeros(n_rows, np.int64)
        self.n = self.longest = 0  # rows in use, and the largest of their lengths
        # keys, values of layer 0, of layer 1, ...: [blocks, G, columns, D, block]
        self.kv: list[np.ndarray] = []
        self.scale, self.eps = (
            np.float32(self.config.head_dim**-0.5),
            np.float32(self.config.norm_eps),
        )
        self.t = {"x": torch.empty(0, 0, 0)}
        self.refresh()

    @staticmethod
    def serves(model: Transformer) -> bool:
        return cpu.serves(None, *model.parameters()) and model.compute_dtype == torch.float32

    def refresh(self) -> None:
        """Find the trainer's weights: they are read where they lie."""
        model = self.model
        if not self.serves(model):
            raise ValueError(
                "engine: paged is False, but slots are for float32 on a CPU with Numba; the "
                f"model is in {model.embed.dtype} and computes in {model.compute_dtype} on "
                f"{model.embed.device.type}; expected paged=True or None"
            )
        c, self.layers, self.befores, self.afters = self.config, [], [], []
        for block in self.model.blocks:
            attn, mlp = block.attn, block.mlp
            bias = None if attn.qkv.bias is None else attn.qkv.bias.detach()[:, None]
            head_norms = [w.detach() for w in (attn.q_norm, attn.k_norm) if w is not None]
            self.layers.append(
                (
                    cpu.array(block.attn_norm),
                    attn.qkv.weight.detach(),
                    bias,
                    [cpu.array(w) for w in head_norms],
                    attn.out.weight.detach(),
                    cpu.array(block.mlp_norm),
                    mlp.gate_up.weight.detach(),
                    mlp.down.weight.detach(),
                )
            )
            # as the loops take them: flat, a bias for each of the columns, a norm's weight for each head
            biases = (torch.zeros(1) if bias is None else bias).repeat(1, cpu.LANES)
            norms = [
                w.expand(n, -1) for w, n in zip(head_norms, (c.n_heads, c.n_kv_heads), strict=False)
            ]
            before = (
                block.attn_norm,
                attn.qkv.weight,
                biases,
                torch.cat(norms or [torch.empty(0)]),
            )
            after = (attn.out.weight, block.mlp_norm, mlp.gate_up.weight, mlp.down.weight)
            self.befores.append([cpu.array(w).reshape(-1) for w in before])
            self.afters.append([cpu.array(w).reshape(-1) for w in after])
        self.norm, self.zeros = cpu.array(model.norm), np.zeros(cpu.LANES, np.float32)
        self.embed, self.head = cpu.array(model.embed), cpu.array(model.head).reshape(-1)
        self.own_logits = type(model).logits is not Transformer.logits  # those of a subclass
        self.n_weights = sum(p.numel() for p in model.blocks.parameters())

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

    def _measure(self) -> None:
        self.longest = int(self.lengths[: self.n].max()) if self.n else 0

    def can_step(self) -> bool:
        return self.n * self.places(self.longest + 1) <= self.n_tokens

    def fits(self, n: int, longest: int, pages: int) -> bool:
        """May n more rows begin, of prompts of at most `longest` tokens in `pages` pages, shared ones counted
        once? With some columns in hand for all to go on."""
        n += self.n
        return (
            n <= self.n_rows and n * self.places(max(self.longest, longest) + PAGE) <= self.n_tokens
        )

    def _make_room(self, n: int, longest: int) -> None:
        """For n rows of `longest` tokens."""
        columns, rows = (self.kv[0].shape[2], len(self.kv[0]) * self.block) if self.kv else (0, 0)
        if n <= rows and longest <= columns:
            return
        if max(n, rows) * max(self.places(longest), columns) <= self.n_tokens:
            rows, columns = max(n, rows), max(self.places(longest), columns)
        else:
            rows, columns = n, self.places(longest)
        for slack in (SLACK, PAGE):
            if rows * self.places(longest + slack) <= self.n_tokens:
                columns = max(columns, self.places(longest + slack))
                break
        c, live = self.config, self.longest
        shape = (-(-rows // self.block), c.n_kv_heads, columns, c.head_dim, self.block)
        self.kv = self.kv or [None] * (2 * c.n_layers)
        for i, source in enumerate(
            self.kv
        ):  # one by one: the old and the new are never there together
            # zeros: what a row has not written is read beside the others, with no weight, so must be finite
            self.kv[i] = np.zeros(shape, np.float32)
            if live:
                blocks = min(len(source), shape[0])
                self.kv[i][:blocks, :, :live] = source[:blocks, :, :live]
        self.angles = [
            x.numpy() for x in rope_table(torch.arange(columns), c.head_dim, c.rope_theta)
        ]

    # ---- rows ----

    def admit(
        self, rows: np.ndarray, prompts: list[Sequence[int]], which: np.ndarray
    ) -> torch.Tensor:
        """Prefill the prompts, and lay prompts[which[i]] into rows[i]; logits of the prompts [P, V]."""
        n = max(self.n, int(rows.max()) + 1)
        self._make_room(n, max([self.longest, *map(len, prompts)]))
        packed = pack(prompts)
        recording = RecordingKV(packed)
        hidden = self.model(packed.tokens, packed.positions, recording)
        firsts, lengths = packed.cu_seqlens.numpy()[which], packed.cu_seqlens.diff().numpy()[which]
        self.n, self.lengths[rows] = n, lengths
        self._measure()
        cpu.threads()
        for cache, new in zip(self.kv, (x for pair in recording.kept for x in pair), strict=True):
            write_rows_loop(cpu.array(new), firsts, lengths, rows, cache)
        return self.model.logits(hidden[packed.cu_seqlens[1:].long() - 1])

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        self.lengths[dst] = self.lengths[src]
        self._measure()
        cpu.threads()
        for cache in self.kv:
            move_rows_loop(src, self.lengths[dst], dst, cache)

    def cut(self, n: int) -> None:
        self.n = n
        self._measure()

    def empty(self, rows: np.ndarray) -> None:
        self.lengths[rows] = 0
        self._measure()

    def clear(self) -> None:
        self.kv, self.n, self.longest = [], 0, 0

    # ---- one token a row: features first, [tiles, M, columns], the layout for small products ----

    @staticmethod
    def width(n: int) -> int:
        return -(-n // ROW_STEP) * ROW_STEP if n > 1 else n

    def _groups(self, n_weights: int) -> int:
        return groups_of(self.n, torch.get_num_threads(), n_weights)

    def _buffers(self, tiles: int, columns: int) -> None:
        """What a step writes, rows in so many tiles: as tensors and as the same memory for the loops."""
        c = self.config
        n_qkv = c.n_heads + 2 * c.n_kv_heads
        shapes = {
            "qkv": (n_qkv, c.head_dim),
            "out": (c.n_heads, c.head_dim),
            "x": (1, c.d_model),
            "y": (1, c.d_model),
            "gate_up": (2, c.d_ff),
            "act": (1, c.d_ff),
        }
        self.a = {
            name: np.zeros((tiles, *shape, columns), np.float32) for name, shape in shapes.items()
        }
        self.t = {name: torch.from_numpy(x).view(tiles, -1, columns) for name, x in self.a.items()}
        self.flat = {name: x.reshape(-1) for name, x in self.a.items()}
        self.logits = np.empty((c.vocab_size, tiles * columns), np.float32)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B], the newest of each row, not in the cache yet -> logits [B, V] of what follows; the next
        step may write over them."""
        n, groups = self.n, self._groups(self.n_weights)
        self._make_room(n, self.longest + 1)
        columns = cpu.LANES if groups else self.width(n)
        tiles = -(-n // columns)
        have, _, width = self.t["x"].shape
        if width != columns or have < tiles:
            self._buffers(tiles, columns)
        cpu.threads()
        embed_loop(self.embed, cpu.array(tokens), self.a["x"][:tiles, 0])
        logits = self._blocks(tiles, groups) if groups else self.model.logits(self._products())
        self.lengths[:n] += 1
        self.longest += 1
        return logits[:n]

    def _attend(self, k_cache: np.ndarray, v_cache: np.ndarray) -> None:
        decode_attention_loop(
            self.a["qkv"],
            *self.angles,
            self.scale,
            self.lengths[: self.n],
            k_cache,
            v_cache,
            self.a["out"],
        )

    def _blocks(self, n: int, groups: int) -> torch.Tensor:
        """Each thread has some rows to itself, but for attention."""
        a, D, in_qkv = self.flat, self.config.head_dim, self.a["qkv"][0].size
        head = self.head[:0] if self.own_logits or not self._groups(len(self.head)) else self.head
        befores = [*self.befores, (self.norm, head, self.zeros, self.zeros[:0])]
        results = [(a["qkv"], in_qkv, cpu.LANES)] * len(self.afters)
        results.append((self.logits.reshape(-1), cpu.LANES, self.logits.shape[1]))
        project_loop(a["x"], self.eps, *befores[0], D, n, groups, a["y"], *results[0])
        for i, after in enumerate(self.afters):
            self._attend(self.kv[2 * i], self.kv[2 * i + 1])
            finish_layer_loop(
                a["x"],
                a["out"],
                self.eps,
                *after,
                self.zeros,
                n,
                groups,
                a["gate_up"],
                a["act"],
                *befores[i + 1],
                D,
                a["y"],
                *results[i + 1],
            )
        if len(head):
            return torch.from_numpy(self.logits).t()
        return self.model.logits(self.t["y"][:n].transpose(1, 2).flatten(0, 1))

    def _norm(self, weight: np.ndarray) -> torch.Tensor:
        rmsnorm_columns_loop(self.a["x"][0], weight, self.eps, self.a["y"][0])
        return self.t["y"][0]

    def _products(self) -> torch.Tensor:
        """All threads share each product, which is PyTorch's."""
        x, qkv, out, gate_up, act = (
            self.t[name][0] for name in ("x", "qkv", "out", "gate_up", "act")
        )
        H, G, width = self.config.n_heads, self.config.n_kv_heads, x.shape[1]
        heads = [self.a["qkv"][0, :H], self.a["qkv"][0, H : H + G]]
        for (
            attn_norm,
            w_qkv,
            bias,
            head_norms,
            w_out,
            mlp_norm,
            w_up,
            w_down,
        ), k_cache, v_cache in zip(self.layers, self.kv[::2], self.kv[1::2], strict=True):
            y = self._norm(attn_norm)
            if bias is None:
                torch.mm(w_qkv, y, out=qkv)
            else:
                torch.addmm(bias, w_qkv, y, out=qkv)
            for part, weight in zip(heads, head_norms, strict=False):
                rmsnorm_columns_loop(part, weight, self.eps, part)
            self._attend(k_cache, v_cache)
            x.addmm_(w_out, out)
            torch.mm(w_up, self._norm(mlp_norm), out=gate_up)
            swiglu_fwd_loop(self.flat["gate_up"], width, len(act) * width, self.a["act"][0, 0])
            x.addmm_(w_down, act)
        return self._norm(self.norm).t()
