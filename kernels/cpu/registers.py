"""8-wide float32 vectors, and tiles of matrix products held in registers, for the compiled loops.

LLVM unrolls loops of 8 before its vectoriser sees them, so we build the vectors ourselves. On a CPU
with shorter registers LLVM splits a vector into two or four. Arrays are flat, float32 and
contiguous; nothing checks that all 8 numbers lie inside. Needs Numba.

PyTorch starts and joins all threads for each product. Where a loop has many small products in a
row, a thread computes them alone, one after another, on numbers that are still in its cache. A tile
of 6 x 16 of the result, or of 12 x 8, stays in 12 registers for the whole sum:

    out[i, j] = start[i, j] + sum over k of a[i, k] b[k, j]      i < rows, j < 16 or 8, k < depth

The sum runs in the order of k and every step is rounded alike, so a number is the same whatever is
computed beside it.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .compile import LANES, TILE_ROWS, f32, part, small_ordered_part

LINE = 16  # float32 numbers in a cache line
NARROW_ROWS = 2 * TILE_ROWS  # rows of a tile that is 8 columns wide
BYTE, INT, FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
F32x8 = ir.VectorType(FLOAT, LANES)


# ---- the type: 8 float32 numbers ----


class Vector(types.Type):
    """Numba's type of a vector."""


vector = Vector("float32 x 8")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, F32x8)


def address(context, builder, signature, array, i, to):
    """The address of array[i], as a pointer to the LLVM type `to`."""
    first = context.make_array(signature.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(first, [i]), to.as_pointer())


def shuffle(builder, a, b, indices):
    """8 of the 16 numbers of two vectors."""
    return builder.shuffle_vector(a, b or a, ir.Constant(ir.VectorType(INT, LANES), indices))


def broadcast(builder, number):
    """A vector that holds one number 8 times."""
    first = builder.insert_element(F32x8(ir.Undefined), number, INT(0))
    return shuffle(builder, first, None, [0] * LANES)


# ---- memory ----


@intrinsic
def load(typing, x, i):
    """x[i : i + 8]"""

    def code(context, builder, signature, args):
        return builder.load(address(context, builder, signature, *args, F32x8), align=4)

    return vector(x, types.intp), code


@intrinsic
def store(typing, x, i, v):
    """x[i : i + 8] = v"""

    def code(context, builder, signature, args):
        builder.store(args[2], address(context, builder, signature, *args[:2], F32x8), align=4)

    return types.void(x, types.intp, v), code


def prefetcher(locality: int):
    """A function for loops: prefetch the 64 bytes around x[i], which may lie behind the end.

    locality: LLVM's, from 0 (read once) to 3 (keep in all caches).
    """

    @intrinsic
    def fetch(typing, x, i):
        def code(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
            llvm = builder.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], kind)
            to_read, data = INT(0), INT(1)
            pointer = address(context, builder, signature, *args, BYTE)
            builder.call(llvm, [pointer, to_read, INT(locality), data])

        return types.void(x, types.intp), code

    return fetch


prefetch = prefetcher(3)
prefetch_once = prefetcher(0)


# ---- arithmetic ----


@intrinsic
def fill(typing, x):
    """A vector that holds x 8 times."""

    def code(context, builder, signature, args):
        return broadcast(builder, args[0])

    return vector(types.float32), code


def operation(build):
    """build(builder, a, b) of two vectors as a function for loops."""

    @intrinsic
    def of_two(typing, a, b):
        return vector(a, b), lambda context, builder, signature, args: build(builder, *args)

    return of_two


add = operation(lambda builder, a, b: builder.fadd(a, b))
subtract = operation(lambda builder, a, b: builder.fsub(a, b))
multiply = operation(lambda builder, a, b: builder.fmul(a, b))
divide = operation(lambda builder, a, b: builder.fdiv(a, b))
larger = operation(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))


@intrinsic
def add_product(typing, total, a, b):
    """total + a b, rounded once or twice."""

    def code(context, builder, signature, args):
        product = builder.fmul(*args[1:], flags=["contract"])
        return builder.fadd(args[0], product, flags=["contract"])

    return vector(total, a, b), code


@intrinsic
def transpose(typing, x, at, stride, to, to_at, to_stride):
    """8 x 8: to[to_at + i to_stride + j] = x[at + j stride + i]"""

    def pointers(context, builder, kind, array, first, step):
        indices = [
            builder.add(first, builder.mul(step, ir.Constant(step.type, i))) for i in range(LANES)
        ]
        signature = types.void(kind)
        return [address(context, builder, signature, array, i, F32x8) for i in indices]

    def code(context, builder, signature, args):
        rows = pointers(context, builder, signature.args[0], *args[:3])
        v = [builder.load(p, align=4) for p in rows]
        halves = [[i // 2 + i % 2 * LANES for i in range(n, n + LANES)] for n in (0, LANES)]
        # three rounds of interleaving transpose an 8 x 8 block
        for _ in range(3):
            v = [shuffle(builder, v[i // 2], v[i // 2 + 4], halves[i % 2]) for i in range(LANES)]
        columns = pointers(context, builder, signature.args[3], *args[3:])
        for column, p in zip(v, columns, strict=True):
            builder.store(column, p, align=4)

    return types.void(x, *[types.intp] * 2, to, *[types.intp] * 2), code


@intrinsic
def nearest(typing, x):
    """Each number rounded to a whole number."""

    def code(context, builder, signature, args):
        kind = ir.FunctionType(F32x8, [F32x8])
        rint = builder.module.declare_intrinsic("llvm.rint.v8f32", [], kind)
        return builder.call(rint, args)

    return vector(x), code


@intrinsic
def two_to_the(typing, k):
    """2^k for whole numbers from -126 to 127: k goes to where a float32 has its exponent."""

    def code(context, builder, signature, args):
        kind = ir.VectorType(INT, LANES)
        bias, bits = (ir.Constant(kind, [n] * LANES) for n in (127, 23))
        exponent = builder.add(builder.fptosi(args[0], kind), bias)
        return builder.bitcast(builder.shl(exponent, bits), F32x8)

    return vector(k), code


@intrinsic
def zero_below(typing, x, limit, y):
    """y, but 0 where x < limit."""

    def code(context, builder, signature, args):
        below = builder.fcmp_ordered("<", *args[:2])
        return builder.select(below, ir.Constant(F32x8, [0.0] * LANES), args[2])

    return vector(x, limit, y), code


def reduction(name, flag, *start):
    """One number of a vector as a function for loops, by one of LLVM's reductions."""

    @intrinsic
    def of_one(typing, x):
        def code(context, builder, signature, args):
            begin = [ir.Constant(FLOAT, number) for number in start]
            kind = ir.FunctionType(FLOAT, [FLOAT] * len(begin) + [F32x8])
            reduce = builder.module.declare_intrinsic(f"llvm.vector.reduce.{name}.v8f32", [], kind)
            return builder.call(reduce, [*begin, *args], fastmath=(flag,))

        return types.float32(x), code

    return of_one


total_of = reduction("fadd", "reassoc", 0.0)
largest_of = reduction("fmax", "nnan")  # none of them NaN


@part
def exp_up_to_88(x):
    """compile.exp of 8 numbers, none of them above 88."""
    lowest = fill(f32(-87))
    y = larger(x, lowest)  # in this order NaN stays
    k = nearest(multiply(y, fill(f32(1.44269504))))
    r = add_product(add_product(y, k, fill(f32(-0.693359375))), k, fill(f32(2.12194440e-4)))
    p = add_product(fill(f32(1.3981999507e-3)), fill(f32(1.9875691500e-4)), r)
    p = add_product(fill(f32(8.3334519073e-3)), p, r)
    p = add_product(fill(f32(4.1665795894e-2)), p, r)
    p = add_product(fill(f32(1.6666665459e-1)), p, r)
    p = add_product(fill(f32(5.0000001201e-1)), p, r)
    p = add_product(add(r, fill(f32(1))), multiply(p, r), r)
    return zero_below(x, lowest, multiply(p, two_to_the(k)))


# ---- tiles of a matrix product ----


class Layout(NamedTuple):
    """Where a matrix lies in a flat array.

    Of a matrix a, `step` leads to the next column. The others have 8 columns side by side, and
    `step` leads to the next 8 columns: it is 8 where all 16 are neighbours.
    """

    at: int
    """Index of the first number."""
    row: int
    """Row stride."""
    step: int


def tile_pointers(context, builder, kind, array, at, row, next, rows, panels):
    """Where the one or two vectors (panels) of each row begin."""

    def index(i, j):
        down, right = builder.mul(row, row.type(i)), builder.mul(next, next.type(j))
        return builder.add(at, builder.add(down, right))

    return [
        address(context, builder, types.void(kind), array, index(i, j), F32x8)
        for i in range(rows)
        for j in range(panels)
    ]


def tile_loader(rows: int, panels: int):
    """A function for loops: the tile at x[at], as a tuple of one or two vectors per row."""
    tile = types.UniTuple(vector, rows * panels)

    @intrinsic
    def load_tile(typing, x, at, row, next):
        def code(context, builder, signature, args):
            pointers = tile_pointers(context, builder, x, *args, rows, panels)
            return context.make_tuple(builder, tile, [builder.load(p, align=4) for p in pointers])

        return tile(x, *[types.intp] * 3), code

    return load_tile


def tile_storer(panels: int):
    """A function for loops: write the tile to x[at]."""

    @intrinsic
    def store_tile(typing, tile, x, at, row, next):
        def code(context, builder, signature, args):
            rows = tile.count // panels
            pointers = tile_pointers(context, builder, x, *args[1:], rows, panels)
            for i, pointer in enumerate(pointers):
                builder.store(builder.extract_value(args[0], i), pointer, align=4)

        return types.void(tile, x, *[types.intp] * 3), code

    return store_tile


def outer_adder(panels: int):
    """A function for loops: the tile + the outer product of a column of a, at a[a_at], and a row of
    b."""

    @intrinsic
    def add_outer(typing, tile, a, a_at, a_row, b, b_at, b_next):
        def code(context, builder, signature, args):
            old, a_array, a_at, a_row, b_array, b_at, b_next = args
            one_row = b_at.type(0)
            pointers = tile_pointers(context, builder, b, b_array, b_at, one_row, b_next, 1, panels)
            row, new = [builder.load(p, align=4) for p in pointers], []
            for i in range(tile.count // panels):
                index = builder.add(a_at, builder.mul(a_row, a_row.type(i)))
                pointer = address(context, builder, types.void(a), a_array, index, FLOAT)
                x = broadcast(builder, builder.load(pointer, align=4))
                for j in range(panels):
                    product = builder.fmul(x, row[j], flags=["contract"])
                    so_far = builder.extract_value(old, i * panels + j)
                    new.append(builder.fadd(so_far, product, flags=["contract"]))
            return context.make_tuple(builder, tile, new)

        return tile(tile, a, *[types.intp] * 2, b, *[types.intp] * 2), code

    return add_outer


load_6 = tile_loader(TILE_ROWS, 2)
load_2 = tile_loader(2, 2)
load_1 = tile_loader(1, 2)
store_tile = tile_storer(2)
add_outer = outer_adder(2)
load_narrow_12 = tile_loader(NARROW_ROWS, 1)
load_narrow_4 = tile_loader(4, 1)
load_narrow_1 = tile_loader(1, 1)
store_narrow = tile_storer(1)
add_outer_narrow = outer_adder(1)


@small_ordered_part
def product(a, a_in, rows, depth, b, b_in, start, start_in, out, out_in):
    """16 columns of any number of rows, 6 at a time; start may be out. x_in is the Layout of x.

    Indices are written out in the innermost loops. With a name for their constant part, backward of
    attention takes 1.16 of the time.
    """
    i = 0
    while i + TILE_ROWS <= rows:
        tile = load_6(start, start_in.at + i * start_in.row, start_in.row, start_in.step)
        for k in range(depth):
            tile = add_outer(tile, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                             b, b_in.at + k * b_in.row, b_in.step)  # fmt: skip
        store_tile(tile, out, out_in.at + i * out_in.row, out_in.row, out_in.step)
        i += TILE_ROWS
    while i + 2 <= rows:
        pair = load_2(start, start_in.at + i * start_in.row, start_in.row, start_in.step)
        for k in range(depth):
            pair = add_outer(pair, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                             b, b_in.at + k * b_in.row, b_in.step)  # fmt: skip
        store_tile(pair, out, out_in.at + i * out_in.row, out_in.row, out_in.step)
        i += 2
    if i < rows:
        last = load_1(start, start_in.at + i * start_in.row, start_in.row, start_in.step)
        for k in range(depth):
            last = add_outer(last, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                             b, b_in.at + k * b_in.row, b_in.step)  # fmt: skip
        store_tile(last, out, out_in.at + i * out_in.row, out_in.row, out_in.step)


@small_ordered_part
def narrow_product(a, a_in, rows, depth, b, b_in, start, start_in, out, out_in):
    """8 columns of any number of rows, 12 at a time; start may be out. Only a's Layout has a
    step."""
    i = 0
    while i + NARROW_ROWS <= rows:
        tile = load_narrow_12(start, start_in.at + i * start_in.row, start_in.row, 0)
        for k in range(depth):
            tile = add_outer_narrow(tile, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                                    b, b_in.at + k * b_in.row, 0)  # fmt: skip
        store_narrow(tile, out, out_in.at + i * out_in.row, out_in.row, 0)
        i += NARROW_ROWS
    while i + 4 <= rows:
        four = load_narrow_4(start, start_in.at + i * start_in.row, start_in.row, 0)
        for k in range(depth):
            four = add_outer_narrow(four, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                                    b, b_in.at + k * b_in.row, 0)  # fmt: skip
        store_narrow(four, out, out_in.at + i * out_in.row, out_in.row, 0)
        i += 4
    while i < rows:
        last = load_narrow_1(start, start_in.at + i * start_in.row, start_in.row, 0)
        for k in range(depth):
            last = add_outer_narrow(last, a, a_in.at + i * a_in.row + k * a_in.step, a_in.row,
                                    b, b_in.at + k * b_in.row, 0)  # fmt: skip
        store_narrow(last, out, out_in.at + i * out_in.row, out_in.row, 0)
        i += 1
