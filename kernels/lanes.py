"""Vectors of 8 float32 for the compiled loops: what a compiler does not make by itself of an inner loop of 8,
which it unrolls before it looks for vectors.

Where registers are shorter, one becomes two or four of them. Arrays are flat, float32 and contiguous, and
nothing checks that all 8 places are inside. Needs Numba.
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .cpu import LANES

LINE = 16  # float32 that memory gives at once
BYTE, INT, F32x8 = ir.IntType(8), ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)


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


@intrinsic
def prefetch(typing, x, i):
    """Ask for the 64 bytes around x[i], which may lie behind the end."""
    def code(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], kind)
        to_read, nearest, data = INT(0), INT(3), INT(1)
        builder.call(ask, [address(context, builder, signature, *args, BYTE), to_read, nearest, data])
    return types.void(x, types.intp), code


@intrinsic
def fill(typing, x):
    """x in all 8."""
    def code(context, builder, signature, args):
        return pick(builder, builder.insert_element(F32x8(ir.Undefined), args[0], INT(0)), None, [0] * LANES)
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
        return builder.fadd(args[0], builder.fmul(*args[1:], flags=["contract"]), flags=["contract"])
    return vector(total, a, b), code


@intrinsic
def transpose(typing, x, at, stride, to, to_at, to_stride):
    """8 x 8: to[to_at + i to_stride + j] = x[at + j stride + i]"""
    def places(context, builder, kind, array, first, step):
        numbers = [builder.add(first, builder.mul(step, ir.Constant(step.type, i))) for i in range(LANES)]
        return [address(context, builder, types.void(kind), array, number, F32x8) for number in numbers]

    def code(context, builder, signature, args):
        v = [builder.load(p, align=4) for p in places(context, builder, signature.args[0], *args[:3])]
        halves = [[i // 2 + i % 2 * LANES for i in range(n, n + LANES)] for n in (0, LANES)]
        for _ in range(3):  # a riffle of 64 cards, dealt in 8 heaps: the third one has rows for columns
            v = [pick(builder, v[i // 2], v[i // 2 + 4], halves[i % 2]) for i in range(LANES)]
        for row, p in zip(v, places(context, builder, signature.args[3], *args[3:]), strict=True):
            builder.store(row, p, align=4)
    return types.void(x, *[types.intp] * 2, to, *[types.intp] * 2), code
