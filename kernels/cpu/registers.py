"""Vectors of 8 float32 for the compiled loops: what a compiler does not make by itself of an inner loop of 8,
which it unrolls before it looks for vectors.

Where registers are shorter, one becomes two or four of them. Arrays are flat, float32 and contiguous, and
nothing checks that all 8 places are inside. Needs Numba.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .compile import LANES, f32, part

LINE = 16  # float32 that memory gives at once
BYTE, INT, FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
F32x8 = ir.VectorType(FLOAT, LANES)


class Vector(types.Type):
    """Numba's name for one."""


vector = Vector("float32 x 8")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, F32x8)


def address(context, builder, signature, array, i, to):
    first = context.make_array(signature.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(first, [i]), to.as_pointer())


def pick(builder, a, b, which):
    """Some of the 16 of two vectors."""
    return builder.shuffle_vector(a, b or a, ir.Constant(ir.VectorType(INT, LANES), which))


def in_all(builder, number):
    """A vector that holds a number 8 times."""
    return pick(
        builder, builder.insert_element(F32x8(ir.Undefined), number, INT(0)), None, [0] * LANES
    )


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


def asking(nearness: int):
    """A function for loops: ask for the 64 bytes around x[i], which may lie behind the end."""

    @intrinsic
    def ask(typing, x, i):
        def code(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
            fetch = builder.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], kind)
            to_read, data = INT(0), INT(1)
            place = address(context, builder, signature, *args, BYTE)
            builder.call(fetch, [place, to_read, INT(nearness), data])

        return types.void(x, types.intp), code

    return ask


prefetch, prefetch_once = (
    asking(3),
    asking(0),
)  # to stay in all caches, or to be read once and make room


@intrinsic
def fill(typing, x):
    """x in all 8."""

    def code(context, builder, signature, args):
        return in_all(builder, args[0])

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
        return builder.fadd(
            args[0], builder.fmul(*args[1:], flags=["contract"]), flags=["contract"]
        )

    return vector(total, a, b), code


@intrinsic
def transpose(typing, x, at, stride, to, to_at, to_stride):
    """8 x 8: to[to_at + i to_stride + j] = x[at + j stride + i]"""

    def places(context, builder, kind, array, first, step):
        numbers = [
            builder.add(first, builder.mul(step, ir.Constant(step.type, i))) for i in range(LANES)
        ]
        return [
            address(context, builder, types.void(kind), array, number, F32x8) for number in numbers
        ]

    def code(context, builder, signature, args):
        v = [
            builder.load(p, align=4) for p in places(context, builder, signature.args[0], *args[:3])
        ]
        halves = [[i // 2 + i % 2 * LANES for i in range(n, n + LANES)] for n in (0, LANES)]
        for _ in range(
            3
        ):  # a riffle of 64 cards, dealt in 8 heaps: the third one has rows for columns
            v = [pick(builder, v[i // 2], v[i // 2 + 4], halves[i % 2]) for i in range(LANES)]
        for row, p in zip(v, places(context, builder, signature.args[3], *args[3:]), strict=True):
            builder.store(row, p, align=4)

    return types.void(x, *[types.intp] * 2, to, *[types.intp] * 2), code


@intrinsic
def nearest(typing, x):
    """Each rounded to a whole number."""

    def code(context, builder, signature, args):
        rint = builder.module.declare_intrinsic(
            "llvm.rint.v8f32", [], ir.FunctionType(F32x8, [F32x8])
        )
        return builder.call(rint, args)

    return vector(x), code


@intrinsic
def two_to_the(typing, k):
    """2^k for whole numbers from -126 to 127: they are put where a float32 has its exponent."""

    def code(context, builder, signature, args):
        kind = ir.VectorType(INT, LANES)
        bias, bits = (ir.Constant(kind, [n] * LANES) for n in (127, 23))
        return builder.bitcast(
            builder.shl(builder.add(builder.fptosi(args[0], kind), bias), bits), F32x8
        )

    return vector(k), code


@intrinsic
def zero_below(typing, x, limit, y):
    """y, but 0 where x < limit."""

    def code(context, builder, signature, args):
        below = builder.fcmp_ordered("<", *args[:2])
        return builder.select(below, ir.Constant(F32x8, [0.0] * LANES), args[2])

    return vector(x, limit, y), code


def across(name, flag, *start):
    """A number of a vector as a function for loops, by an instruction of LLVM's."""

    @intrinsic
    def of_one(typing, x):
        def code(context, builder, signature, args):
            begin = [ir.Constant(FLOAT, number) for number in start]
            kind = ir.FunctionType(FLOAT, [FLOAT] * len(begin) + [F32x8])
            reduce = builder.module.declare_intrinsic(f"llvm.vector.reduce.{name}.v8f32", [], kind)
            return builder.call(reduce, [*begin, *args], fastmath=(flag,))

        return types.float32(x), code

    return of_one


total_of = across("fadd", "reassoc", 0.0)
largest_of = across("fmax", "nnan")  # none of them NaN


@part
def exp_up_to_88(x):
    """cpu.exp of 8 numbers that are not above 88."""
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
