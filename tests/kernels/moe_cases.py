"""Mixtures of experts to test, and what a back end makes of them."""
import torch

from r1zero.kernels.moe import moe_mlp

from .naive_ops import naive_moe


def routes(T, E, K, choose="random", device="cpu"):
    """[T, K]. choose: "random", "one" (all tokens on the last experts), "few" (half are empty)."""
    if choose == "one":
        return (torch.arange(K, device=device) + E - 1).remainder(E).expand(T, K)
    if choose == "few":
        return torch.rand(T, K + 1, device=device).topk(K).indices * 2
    return torch.rand(T, E, device=device).topk(K).indices


def case(T, E, K, M=8, F=4, dtype=torch.float64, choose="random", weight_dtype=None, device="cpu"):
    """Arguments of moe_mlp, numbers of order 1."""
    wide = torch.promote_types(dtype, torch.float32)

    def new(*shape, scale=1.0):
        return torch.randn(shape, dtype=wide, device=device) * scale

    gate_up, down = new(E, 2 * F, M, scale=M**-0.5), new(E, M, F, scale=F**-0.5)
    weight_dtype = weight_dtype or dtype
    return [new(T, M).to(dtype), new(T, K), routes(T, E, K, choose, device), gate_up.to(weight_dtype),
            down.to(weight_dtype)]


def results(arguments, impl, dy):
    """[y, and the gradients of x, gates, gate_up, down]. impl: a back end, or "naive"."""
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in arguments]
    y = naive_moe(*leaves).to(leaves[0].dtype) if impl == "naive" else moe_mlp(*leaves, impl=impl)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(a.grad for a in leaves if a.is_floating_point())]


def exact(arguments, dy):
    """The same in fp64 and in the plainest way. Weights are rounded to x's dtype, as the op does."""
    x, gates, experts, *weights = arguments
    weights = [w.to(x.dtype).double() for w in weights]
    return results([x.double(), gates.double(), experts, *weights], "naive", dy.to(x.dtype).double())
