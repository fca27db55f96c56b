"""Matrix products inside the compiled loops for a CPU (see kernels/cpu.py), of what lies in its caches.

PyTorch's products start and join all threads each time. Where a loop has many small ones in a row, a thread
does them alone here, one after another, on what it has just written. A tile of 6 x 16 of the result stays in
12 registers for the whole sum:

    out[i, j] = start[i, j] + sum over k of a[i, k] b[k, j]        i < rows, j < 16, k < depth

with k in its order and each step rounded alike: a number is the same whatever is computed beside it.

Matrices are pieces of flat arrays, given as (array, first place, places from row to row). Those of b, start
and out have their 16 columns side by side; a has any number of places from column to column. Nothing checks
that they are inside. Needs Numba.
"""
from numba import types
from numba.extending import intrinsic

from .cpu import LANES, TILE_COLUMNS, TILE_ROWS, small_ordered_part
from .lanes import FLOAT, F32x8, address, in_all, vector


def vectors(context, builder, kind, array, at, row, rows):
    """Where the two vectors of each row begin."""
    def place(i, j):
        return builder.add(at, builder.add(builder.mul(row, row.type(i)), row.type(j)))
    return [address(context, builder, types.void(kind), array, place(i, j), F32x8)
            for i in range(rows) for j in range(0, TILE_COLUMNS, LANES)]


def take_tile(rows: int):
    """A function for loops: the tile at x[at], as a tuple of 2 vectors a row."""
    tile = types.UniTuple(vector, 2 * rows)

    @intrinsic
    def take(typing, x, at, row):
        def code(context, builder, signature, args):
            places = vectors(context, builder, x, *args, rows)
            return context.make_tuple(builder, tile, [builder.load(p, align=4) for p in places])
        return tile(x, *[types.intp] * 2), code

    return take


@intrinsic
def put_tile(typing, tile, x, at, row):
    """The tile, to x[at]."""
    def code(context, builder, signature, args):
        for i, place in enumerate(vectors(context, builder, x, *args[1:], tile.count // 2)):
            builder.store(builder.extract_value(args[0], i), place, align=4)
    return types.void(tile, x, *[types.intp] * 2), code


@intrinsic
def add_outer(typing, tile, a, a_at, a_row, b, b_at):
    """The tile + a column of a, at a[a_at], times a row of b."""
    def code(context, builder, signature, args):
        old, a_array, a_at, a_row, b_array, b_at = args
        row = [builder.load(p, align=4)
               for p in vectors(context, builder, b, b_array, b_at, b_at.type(0), 1)]
        new = []
        for i in range(tile.count // 2):
            place = builder.add(a_at, builder.mul(a_row, a_row.type(i)))
            x = builder.load(address(context, builder, types.void(a), a_array, place, FLOAT), align=4)
            x = in_all(builder, x)
            for j in range(2):
                product = builder.fmul(x, row[j], flags=["contract"])
                new.append(builder.fadd(builder.extract_value(old, 2 * i + j), product, flags=["contract"]))
        return context.make_tuple(builder, tile, new)
    return tile(tile, a, *[types.intp] * 2, b, types.intp), code


take_6, take_2, take_1 = take_tile(TILE_ROWS), take_tile(2), take_tile(1)


@small_ordered_part
def product(a, a_at, a_row, a_step, rows, depth, b, b_at, b_row, start, start_at, start_row, out, out_at,
            out_row):
    """Of any number of rows, 6 at a time; start may be out."""
    i = 0
    while i + TILE_ROWS <= rows:
        tile = take_6(start, start_at + i * start_row, start_row)
        for k in range(depth):
            tile = add_outer(tile, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row)
        put_tile(tile, out, out_at + i * out_row, out_row)
        i += TILE_ROWS
    while i + 2 <= rows:
        pair = take_2(start, start_at + i * start_row, start_row)
        for k in range(depth):
            pair = add_outer(pair, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row)
        put_tile(pair, out, out_at + i * out_row, out_row)
        i += 2
    if i < rows:
        last = take_1(start, start_at + i * start_row, start_row)
        for k in range(depth):
            last = add_outer(last, a, a_at + i * a_row + k * a_step, a_row, b, b_at + k * b_row)
        put_tile(last, out, out_at + i * out_row, out_row)
