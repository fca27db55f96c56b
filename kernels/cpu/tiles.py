"""Matrix products inside the compiled loops for a CPU (see kernels/cpu.py), of what lies in its caches.

PyTorch's products start and join all threads each time. Where a loop has many small ones in a row, a thread
does them alone here, one after another, on what it has just written. A tile of 6 x 16 of the result, or of
12 x 8, stays in 12 registers for the whole sum:

    out[i, j] = start[i, j] + sum over k of a[i, k] b[k, j]        i < rows, j < 16 or 8, k < depth

with k in its order and each step rounded alike: a number is the same whatever is computed beside it.

Matrices are pieces of flat arrays, given as (array, first place, places from row to row). Those of b, start
and out have 8 columns side by side, and the other 8 `next` places after them, 8 where all 16 are neighbours;
a has any number of places from column to column. Nothing checks that they are inside. Needs Numba.
"""

from numba import types
from numba.extending import intrinsic

from .compile import TILE_ROWS, small_ordered_part
from .registers import FLOAT, F32x8, address, in_all, vector

NARROW_ROWS = 2 * TILE_ROWS


def vectors(context, builder, kind, array, at, row, next, rows, panels):
    """Where the vectors of each row begin."""

    def place(i, j):
        return builder.add(
            at, builder.add(builder.mul(row, row.type(i)), builder.mul(next, next.type(j)))
        )

    return [
        address(context, builder, types.void(kind), array, place(i, j), F32x8)
        for i in range(rows)
        for j in range(panels)
    ]


def take_tile(rows: int, panels: int):
    """A function for loops: the tile at x[at], as a tuple of one or two vectors a row."""
    tile = types.UniTuple(vector, rows * panels)

    @intrinsic
    def take(typing, x, at, row, next):
        def code(context, builder, signature, args):
            places = vectors(context, builder, x, *args, rows, panels)
            return context.make_tuple(builder, tile, [builder.load(p, align=4) for p in places])

        return tile(x, *[types.intp] * 3), code

    return take


def put_tile(panels: int):
    """A function for loops: the tile, to x[at]."""

    @intrinsic
    def put(typing, tile, x, at, row, next):
        def code(context, builder, signature, args):
            places = vectors(context, builder, x, *args[1:], tile.count // panels, panels)
            for i, place in enumerate(places):
                builder.store(builder.extract_value(args[0], i), place, align=4)

        return types.void(tile, x, *[types.intp] * 3), code

    return put


def add_outer(panels: int):
    """A function for loops: the tile + a column of a, at a[a_at], times a row of b."""

    @intrinsic
    def add(typing, tile, a, a_at, a_row, b, b_at, b_next):
        def code(context, builder, signature, args):
            old, a_array, a_at, a_row, b_array, b_at, b_next = args
            places = vectors(context, builder, b, b_array, b_at, b_at.type(0), b_next, 1, panels)
            row, new = [builder.load(p, align=4) for p in places], []
            for i in range(tile.count // panels):
                place = builder.add(a_at, builder.mul(a_row, a_row.type(i)))
                x = builder.load(
                    address(context, builder, types.void(a), a_array, place, FLOAT), align=4
                )
                x = in_all(builder, x)
                for j in range(panels):
                    product = builder.fmul(x, row[j], flags=["contract"])
                    so_far = builder.extract_value(old, i * panels + j)
                    new.append(builder.fadd(so_far, product, flags=["contract"]))
            return context.make_tuple(builder, tile, new)

        return tile(tile, a, *[types.intp] * 2, b, *[types.intp] * 2), code

    return add


take_6, take_2, take_1, put, add = (
    *(take_tile(n, 2) for n in (TILE_ROWS, 2, 1)),
    put_tile(2),
    add_outer(2),
)
narrow_12, narrow_4, narrow_1 = (take_tile(n, 1) for n in (NARROW_ROWS, 4, 1))
put_narrow, add_narrow = put_tile(1), add_outer(1)


@small_ordered_part
def product(
    a,
    a_at,
    a_row,
    a_step,
    rows,
    depth,
    b,
    b_at,
    b_row,
    b_next,
    start,
    start_at,
    start_row,
    start_next,
    out,
    out_at,
    out_row,
    out_next,
):
    """16 columns of any number of rows, 6 at a time; start may be out."""
    i = 0
    while i + TILE_ROWS <= rows:
        tile = take_6(start, start_at + i * start_row, start_row, start_next)
        for k in range(depth):
            tile = add(tile, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, b_next)
        put(tile, out, out_at + i * out_row, out_row, out_next)
        i += TILE_ROWS
    while i + 2 <= rows:
        pair = take_2(start, start_at + i * start_row, start_row, start_next)
        for k in range(depth):
            pair = add(pair, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, b_next)
        put(pair, out, out_at + i * out_row, out_row, out_next)
        i += 2
    if i < rows:
        last = take_1(start, start_at + i * start_row, start_row, start_next)
        for k in range(depth):
            last = add(last, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, b_next)
        put(last, out, out_at + i * out_row, out_row, out_next)


@small_ordered_part
def narrow_product(
    a,
    a_at,
    a_row,
    a_step,
    rows,
    depth,
    b,
    b_at,
    b_row,
    start,
    start_at,
    start_row,
    out,
    out_at,
    out_row,
):
    """8 columns of any number of rows, 12 at a time; start may be out."""
    i = 0
    while i + NARROW_ROWS <= rows:
        tile = narrow_12(start, start_at + i * start_row, start_row, 0)
        for k in range(depth):
            tile = add_narrow(tile, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, 0)
        put_narrow(tile, out, out_at + i * out_row, out_row, 0)
        i += NARROW_ROWS
    while i + 4 <= rows:
        four = narrow_4(start, start_at + i * start_row, start_row, 0)
        for k in range(depth):
            four = add_narrow(four, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, 0)
        put_narrow(four, out, out_at + i * out_row, out_row, 0)
        i += 4
    while i < rows:
        last = narrow_1(start, start_at + i * start_row, start_row, 0)
        for k in range(depth):
            last = add_narrow(last, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row, 0)
        put_narrow(last, out, out_at + i * out_row, out_row, 0)
        i += 1
