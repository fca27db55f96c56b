"""Decoding one token per row through a stack of dense layers, with the cache of keys and values.

kernels/decoder.py is the public door. The trainer's weights are read where they lie, without a
copy. Rows of the cache go in blocks of 8 (see decode_attention.py).

There are two ways through a layer:
- By blocks. Blocks of rows are independent outside attention, so each thread carries its blocks
  through the whole layer without synchronising, while they are still in its cache. A row comes out
  the same to the last bit whatever the others are, and on any number of threads. This way is taken
  only where PyTorch reports AVX2 exactly. With AVX-512 PyTorch's own products are faster, and on
  other CPUs the loops have never been measured.
- By products. All threads share each product, which is PyTorch's.

Left out: layers that are not dense, biases other than those of q, k and v, dtypes but float32.

Shapes: B rows, M features, N of a product's result, A of the query heads, H heads, F d_ff, V
vocabulary, S slots per row, D head_dim, G kv heads. The arrays of the loops are flat, but for those
with suffixes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..rope import rope_table
from .compile import (
    HAS_NUMBA,
    LANES,
    array,
    f32,
    loop,
    numba,
    ordered_loop,
    ordered_part,
    prepare,
)
from .compile import refuses as tensors_refuse
from .decode_attention import ROW_BLOCK, decode_attention_loop, move_rows_loop, write_rows_loop
from .elementwise import rmsnorm_columns_loop, swiglu_fwd_loop, swiglu_fwd_row

if TYPE_CHECKING:
    from ..decoder import DecoderWeights, LayerWeights

if HAS_NUMBA:
    from .registers import (
        LINE,
        NARROW_ROWS,
        Layout,
        add_product,
        fill,
        load,
        multiply,
        narrow_product,
        prefetch,
        product,
        store,
    )

MAX_BLOCKS = 8  # of a thread's group: what they hold stays in the nearer caches of a core
ROWS_PER_THREAD = 16  # fewer, and reading all weights for them takes longer than the arithmetic
SMALL = 4_000_000  # weights that the cores' shared cache holds: they may be read for a single block
ROW_STEP = 16  # a product for rows up to a multiple of this takes half the time of an odd number
SLOT_STEP = 16  # the cache grows by so many slots per row
SLACK = 64  # spare slots per row, where there is room, so that the cache seldom moves


# ---- the loops: features first, [tiles, M, columns], one column per row ----


@loop
def embed_loop(embed_VM, tokens_B, x_IMC):
    """The embeddings of the tokens as columns of tiles; 0 behind the last."""
    tiles, M, C = x_IMC.shape
    for n in numba.prange(tiles * M):
        i, m = n // M, n % M
        for c in range(C):
            b = i * C + c
            x_IMC[i, m, c] = embed_VM[tokens_B[b], m] if b < len(tokens_B) else f32(0)


@ordered_part
def norm_block(x, at, M, weight, w_at, eps, y):
    """Columns of x[at], [M, 8], normed, into y[at]."""
    r, total = np.empty(LANES, f32), fill(f32(0))
    for i in range(at, at + M * LANES, LANES):
        total = add_product(total, load(x, i), load(x, i))
    store(r, 0, total)
    for j in range(LANES):
        r[j] = f32(1) / np.sqrt(r[j] / f32(M) + eps)
    share = load(r, 0)
    for m in range(M):
        i = at + m * LANES
        store(y, i, multiply(multiply(load(x, i), share), fill(weight[w_at + m])))


@ordered_part
def multiply_blocks(w, N, K, x, start, start_block, start_row, out, out_block, out_row, first, end):
    """out = start + w x for w [N, K] and x [K, 8] of each block.

    Each 12 rows of w are read for all blocks, two at a time. *_block and *_row are the strides from
    block to block and from row to row.
    """
    for n in range(0, N, NARROW_ROWS):
        rows, b = min(NARROW_ROWS, N - n), first
        w_in = Layout(n * K, K, 1)
        for i in range((n + NARROW_ROWS) * K, min(n + 2 * NARROW_ROWS, N) * K, LINE):
            prefetch(w, i)
        while b + 2 <= end:
            x_in = Layout(b * K * LANES, LANES, K * LANES)
            start_in = Layout(b * start_block + n * start_row, start_row, start_block)
            out_in = Layout(b * out_block + n * out_row, out_row, out_block)
            product(w, w_in, rows, K, x, x_in, start, start_in, out, out_in)
            b += 2
        if b < end:
            x_in = Layout(b * K * LANES, LANES, K * LANES)
            start_in = Layout(b * start_block + n * start_row, start_row, start_block)
            out_in = Layout(b * out_block + n * out_row, out_row, out_block)
            narrow_product(w, w_in, rows, K, x, x_in, start, start_in, out, out_in)


@ordered_part
def project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row):
    """y = norm(x) and out = w y + bias of these blocks; then the first heads are normed."""
    M = len(norm)
    N, bias_row = len(w) // M, LANES if len(bias) > LANES else 0
    for b in range(first, end):
        norm_block(x, b * M * LANES, M, norm, 0, eps, y)
    multiply_blocks(w, N, M, y, bias, 0, bias_row, out, out_block, out_row, first, end)
    for b in range(first, end):
        for h in range(len(head_norms) // D):
            norm_block(out, b * out_block + h * D * LANES, D, head_norms, h * D, eps, out)


@ordered_loop
def project_loop(x, eps, norm, w, bias, head_norms, D, n_blocks, groups,
                 y, out, out_block, out_row):  # fmt: skip
    """From the residual stream to the heads: out = w norm(x) + bias of each block. The first heads
    are normed, with a row [D] of head_norms for each. bias: [N, 8], 8 times the same number, or 8
    zeros for all."""
    for g in numba.prange(groups):
        first, end = n_blocks * g // groups, n_blocks * (g + 1) // groups
        project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row)


@ordered_loop
def finish_layer_loop(x, mixed, eps, w_out, mlp_norm, w_up, w_down, zeros, n_blocks, groups,
                      gate_up, act, norm, w, bias, head_norms, D,
                      y, out, out_block, out_row):  # fmt: skip
    """What follows attention, whose result is mixed: x += w_out mixed and x += MLP(norm(x)). Then
    what comes before the next layer's attention, as in project_loop, or the model's last norm and
    logits."""
    M, C = len(norm), LANES
    A, F = len(w_out) // M, len(w_down) // M
    step, wide = M * C, F * C
    for g in numba.prange(groups):
        first, end = n_blocks * g // groups, n_blocks * (g + 1) // groups
        multiply_blocks(w_out, M, A, mixed, x, step, C, x, step, C, first, end)
        for b in range(first, end):
            norm_block(x, b * step, M, mlp_norm, 0, eps, y)
        multiply_blocks(w_up, 2 * F, M, y, zeros, 0, 0, gate_up, 2 * wide, C, first, end)
        for b in range(first, end):
            up, after = (2 * b + 1) * wide, (2 * b + 2) * wide
            swiglu_fwd_row(gate_up[up - wide : up], gate_up[up:after],
                           act[b * wide : (b + 1) * wide])  # fmt: skip
        multiply_blocks(w_down, M, F, act, x, step, C, x, step, C, first, end)
        project(x, eps, norm, w, bias, head_norms, D, first, end, y, out, out_block, out_row)


# ---- the decoder ----


def refuses(weights: DecoderWeights) -> str | None:
    """Why the loops cannot decode with these weights, in words; None if they can."""
    embed, layers, norm, head = weights
    of_layers = [x for layer in layers for x in layer]
    return tensors_refuse(embed, *of_layers, norm, head)


def groups_of(n_rows: int, n_threads: int, n_weights: int) -> int:
    """Number of groups of blocks, a multiple of the threads; 0 where PyTorch's products are faster.

    They are for few rows, and on a CPU that has more than AVX2. So whether a large model goes by
    blocks, and its last bits, depend on the numbers of rows and threads.
    """
    few = n_rows < (2 if n_weights <= SMALL else ROWS_PER_THREAD * n_threads)
    if few or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return 0
    return n_threads * -(-n_rows // (n_threads * MAX_BLOCKS * LANES))


class LayerArrays:
    """The weights of one layer, in the forms that the two ways of decoding read."""

    def __init__(self, layer: LayerWeights, n_heads: int, n_kv_heads: int):
        self.attn_norm, self.mlp_norm = array(layer.attn_norm), array(layer.mlp_norm)
        # by products: tensors, the bias as a column
        self.qkv, self.out = layer.qkv.detach(), layer.out.detach()
        self.gate_up, self.down = layer.gate_up.detach(), layer.down.detach()
        self.bias = None if layer.qkv_bias is None else layer.qkv_bias.detach()[:, None]
        norms = [w.detach() for w in (layer.q_norm, layer.k_norm) if w is not None]
        self.head_norms = [array(w) for w in norms]
        # by blocks: flat arrays, a bias for each of the 8 columns, a norm's weight for each head
        biases = (torch.zeros(1) if self.bias is None else self.bias).repeat(1, LANES)
        per_head = [w.expand(n, -1) for w, n in zip(norms, (n_heads, n_kv_heads), strict=False)]
        per_head = torch.cat(per_head or [torch.empty(0)])
        before = (layer.attn_norm, layer.qkv, biases, per_head)
        after = (layer.out, layer.mlp_norm, layer.gate_up, layer.down)
        self.before_attention = [array(w).reshape(-1) for w in before]
        self.after_attention = [array(w).reshape(-1) for w in after]


class Decoder:
    """Decodes one token per row against a cache of at most `n_slots` tokens.

    Its rows are 0 .. n_rows - 1, of which the first `n` are in use. The cache is a rectangle of
    rows and slots: it holds the rows in use (and up to 7 more, for rows go in blocks of 8), each as
    long as the longest. It is made when it is needed and grows.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        n_rows: int,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        rope_theta: float,
        rope_rescale: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        """Raises ValueError for weights that the loops cannot read, with the reason."""
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rope_theta, self.rope_rescale = rope_theta, rope_rescale
        self.eps, self.scale = f32(norm_eps), f32(head_dim**-0.5)
        self.block = ROW_BLOCK if n_rows >= ROW_BLOCK else 1
        self.n_rows, self.n_slots = n_rows, 0
        self.n = 0  # rows in use
        self.lengths = np.zeros(n_rows, np.int64)  # tokens in the cache, per row
        self.longest = 0  # the largest of the lengths in use
        # keys and values of layer 0, of layer 1, ...: [blocks, G, S, D, block]
        self.kv: list[np.ndarray] = []
        self.n_groups: int | None = None  # of blocks; None: groups_of chooses
        self.buffer_shape = (0, 0)
        self.load(weights)

    def load(self, weights: DecoderWeights) -> None:
        """Read these weights from now on, where they lie. Without a head, `decode` returns hidden
        states."""
        reason = refuses(weights)
        if reason:
            raise ValueError(f"decoder: {reason}")
        self.layers = [LayerArrays(w, self.n_heads, self.n_kv_heads) for w in weights.layers]
        self.embed, self.norm = array(weights.embed), array(weights.norm)
        self.head = None if weights.head is None else weights.head.detach()
        self.flat_head = None if weights.head is None else array(weights.head).reshape(-1)
        self.zeros = np.zeros(LANES, np.float32)
        of_layers = [x for layer in weights.layers for x in layer if x is not None]
        self.n_weights = sum(x.numel() for x in of_layers)
        self.d_model, self.d_ff = len(weights.norm), weights.layers[0].down.shape[1]
        self.n_logits = 0 if weights.head is None else len(weights.head)

    # ---- the cache ----

    @staticmethod
    def slots_for(length: int) -> int:
        """Slots that a row of so many tokens takes."""
        return -(-length // SLOT_STEP) * SLOT_STEP

    def _measure(self) -> None:
        self.longest = int(self.lengths[: self.n].max()) if self.n else 0

    def _make_room(self, n: int, longest: int) -> None:
        """Have room for n rows of `longest` tokens."""
        rows, slots = (len(self.kv[0]) * self.block, self.kv[0].shape[2]) if self.kv else (0, 0)
        if n <= rows and longest <= slots:
            return
        if max(n, rows) * max(self.slots_for(longest), slots) <= self.n_slots:
            rows, slots = max(n, rows), max(self.slots_for(longest), slots)
        else:
            rows, slots = n, self.slots_for(longest)
        for slack in (SLACK, SLOT_STEP):
            if rows * self.slots_for(longest + slack) <= self.n_slots:
                slots = max(slots, self.slots_for(longest + slack))
                break
        shape = (-(-rows // self.block), self.n_kv_heads, slots, self.head_dim, self.block)
        live = self.longest
        self.kv = self.kv or [None] * (2 * len(self.layers))
        # one by one, so that the old cache and the new are never there together
        for i, old in enumerate(self.kv):
            # zeros: unwritten slots are read beside others with weight 0, so they must be finite
            self.kv[i] = np.zeros(shape, np.float32)
            if live:
                blocks = min(len(old), shape[0])
                self.kv[i][:blocks, :, :live] = old[:blocks, :, :live]
        positions = torch.arange(slots)
        angles = rope_table(positions, self.head_dim, self.rope_theta, self.rope_rescale)
        self.angles = [x.numpy() for x in angles]

    def admit(
        self,
        rows: np.ndarray,
        firsts: np.ndarray,
        lengths: np.ndarray,
        kept: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Write prefilled keys and values into rows, which are in use from now on.

        rows, firsts, lengths: [P] int64; row rows[i] gets the lengths[i] tokens from firsts[i] on.
        kept: each layer's keys, already rotated, and values, [T, G, D] each.
        """
        n = max(self.n, int(rows.max()) + 1)
        self._make_room(n, max(self.longest, int(lengths.max())))
        self.n, self.lengths[rows] = n, lengths
        self._measure()
        prepare()
        for cache, new in zip(self.kv, (x for pair in kept for x in pair), strict=True):
            write_rows_loop(array(new), firsts, lengths, rows, cache)

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        """Copy rows src over rows dst."""
        self.lengths[dst] = self.lengths[src]
        self._measure()
        prepare()
        for cache in self.kv:
            move_rows_loop(src, self.lengths[dst], dst, cache)

    def cut(self, n: int) -> None:
        """Keep the first n rows in use."""
        self.n = n
        self._measure()

    def empty(self, rows: np.ndarray) -> None:
        """These rows start over with no tokens."""
        self.lengths[rows] = 0
        self._measure()

    def clear(self) -> None:
        """Free all rows and their memory."""
        self.kv, self.n, self.longest = [], 0, 0

    # ---- a step ----

    @staticmethod
    def width(n: int) -> int:
        """Rows that a step for n rows computes, where it goes by products."""
        return -(-n // ROW_STEP) * ROW_STEP if n > 1 else n

    def _groups(self, n_weights: int) -> int:
        if self.n_groups is not None:
            return self.n_groups
        return groups_of(self.n, torch.get_num_threads(), n_weights)

    def _make_buffers(self, tiles: int, columns: int) -> None:
        """What a step writes, rows in tiles of columns: as arrays, as flat arrays and as tensors,
        which share their memory."""
        n_qkv = self.n_heads + 2 * self.n_kv_heads
        shapes = {
            "qkv": (n_qkv, self.head_dim),
            "out": (self.n_heads, self.head_dim),
            "x": (1, self.d_model),
            "y": (1, self.d_model),
            "gate_up": (2, self.d_ff),
            "act": (1, self.d_ff),
        }
        self.arrays = {k: np.zeros((tiles, *s, columns), np.float32) for k, s in shapes.items()}
        self.flat = {k: x.reshape(-1) for k, x in self.arrays.items()}
        self.tensors = {
            k: torch.from_numpy(x).view(tiles, -1, columns) for k, x in self.arrays.items()
        }
        self.logits = np.empty((self.n_logits, tiles * columns), np.float32)
        self.buffer_shape = (tiles, columns)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token per row: its keys and values go into the cache, and what follows comes out.

        tokens: [n] int64, the newest of each row in use, not in the cache yet. Returns logits [n,
        V], or, for weights without a head, hidden states [n, M], in float32. The next step may
        overwrite them.
        """
        n, groups = self.n, self._groups(self.n_weights)
        self._make_room(n, self.longest + 1)
        columns = LANES if groups else self.width(n)
        tiles = -(-n // columns)
        if self.buffer_shape[1] != columns or self.buffer_shape[0] < tiles:
            self._make_buffers(tiles, columns)
        prepare()
        embed_loop(self.embed, array(tokens), self.arrays["x"][:tiles, 0])
        result = self._by_blocks(tiles, groups) if groups else self._by_products()
        self.lengths[:n] += 1
        self.longest += 1
        return result[:n]

    def _attend(self, layer: int) -> None:
        qkv, out, lengths = self.arrays["qkv"], self.arrays["out"], self.lengths[: self.n]
        k, v = self.kv[2 * layer : 2 * layer + 2]
        decode_attention_loop(qkv, *self.angles, self.scale, lengths, k, v, out)

    def _apply_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, M] -> [B, V], V first in memory: for few rows that product takes half the time."""
        return hidden if self.head is None else (self.head @ hidden.t()).t()

    def _by_blocks(self, n: int, groups: int) -> torch.Tensor:
        """Each thread has some blocks to itself, but for attention."""
        a, D, in_qkv = self.flat, self.head_dim, self.arrays["qkv"][0].size
        fused_head = self.head is not None and self._groups(self.head.numel()) > 0
        head = self.flat_head if fused_head else self.zeros[:0]
        # what each layer's attention, and the logits, are computed from
        inputs = [layer.before_attention for layer in self.layers]
        inputs.append((self.norm, head, self.zeros, self.zeros[:0]))
        # and where the products go: the array and the strides of its blocks and rows
        results = [(a["qkv"], in_qkv, LANES)] * len(self.layers)
        results.append((self.logits.reshape(-1), LANES, self.logits.shape[1]))
        project_loop(a["x"], self.eps, *inputs[0], D, n, groups, a["y"], *results[0])
        for i, layer in enumerate(self.layers):
            self._attend(i)
            finish_layer_loop(
                a["x"], a["out"], self.eps, *layer.after_attention, self.zeros, n, groups,
                a["gate_up"], a["act"], *inputs[i + 1], D, a["y"], *results[i + 1],
            )  # fmt: skip
        if fused_head:
            return torch.from_numpy(self.logits).t()
        return self._apply_head(self.tensors["y"][:n].transpose(1, 2).flatten(0, 1))

    def _normed(self, weight: np.ndarray) -> torch.Tensor:
        rmsnorm_columns_loop(self.arrays["x"][0], weight, self.eps, self.arrays["y"][0])
        return self.tensors["y"][0]

    def _by_products(self) -> torch.Tensor:
        """All threads share each product, which is PyTorch's."""
        names = ("x", "qkv", "out", "gate_up", "act")
        x, qkv, out, gate_up, act = (self.tensors[name][0] for name in names)
        H, G, width = self.n_heads, self.n_kv_heads, x.shape[1]
        heads = [self.arrays["qkv"][0, :H], self.arrays["qkv"][0, H : H + G]]
        for i, layer in enumerate(self.layers):
            y = self._normed(layer.attn_norm)
            if layer.bias is None:
                torch.mm(layer.qkv, y, out=qkv)
            else:
                torch.addmm(layer.bias, layer.qkv, y, out=qkv)
            for head, weight in zip(heads, layer.head_norms, strict=False):
                rmsnorm_columns_loop(head, weight, self.eps, head)
            self._attend(i)
            x.addmm_(layer.out, out)
            torch.mm(layer.gate_up, self._normed(layer.mlp_norm), out=gate_up)
            to_up = len(act) * width
            swiglu_fwd_loop(self.flat["gate_up"], width, to_up, self.arrays["act"][0, 0])
            x.addmm_(layer.down, act)
        return self._apply_head(self._normed(self.norm).t())
