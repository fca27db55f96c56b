"""Index tensors make no new kernel when they begin at another address, as slices of a batch do."""
from collections.abc import Callable

import pytest
import torch

from benchmarks import aot
from r1zero.kernels import attention, decode_attention, grpo, linear_logprob, moe_triton
from r1zero.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def at(skipped: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that begins `skipped` elements behind an address divisible by 16."""
    size = torch.Size(shape).numel()
    return aot.empty(size + skipped, dtype=dtype)[skipped:].view(shape)


def attention_kernels(skipped: int) -> None:
    q, out, dout = (aot.empty(300, 4, 64) for _ in range(3))
    k, v = (aot.empty(300, 2, 64) for _ in range(2))
    lse, cu = aot.empty(4, 300, dtype=torch.float32), at(skipped, 4, dtype=torch.int32)
    rest = (cu, cu, 100, 100, 0.125, -1, 0.0)
    attention.attention_fwd(q, k, v, *rest)
    attention.attention_bwd(dout, q, k, v, out, lse, None, *rest)


def decode_kernels(skipped: int) -> None:
    pages = aot.empty(64, 2, 16, 64)
    table, lengths = at(skipped, 3, 8, dtype=torch.int32), at(skipped, 3, dtype=torch.int32)
    decode_attention.decode_attention_fwd(aot.empty(3, 4, 64), pages, pages, table, lengths, 0.125)


def logprob_kernels(skipped: int) -> None:
    h, weight, targets = aot.empty(100, 64), aot.empty(1000, 64), at(skipped, 100, dtype=torch.int64)
    logp, entropy, lse = linear_logprob.logprob_fwd(h, weight, targets, None, 1.0, 0.0)
    linear_logprob.logprob_bwd(logp, None, h, weight, targets, None, lse, entropy, 1.0, 0.0, True, True)


def moe_kernels(skipped: int) -> None:
    order, place = at(skipped, 200, dtype=torch.int64), at(skipped, 100, 2, dtype=torch.int64)
    ends = at(skipped, 4, dtype=torch.int32)
    inputs = (aot.empty(100, 64), aot.empty(100, 2, dtype=torch.float32), aot.empty(4, 128, 64),
              aot.empty(4, 64, 64), order, place, ends)
    moe_triton.moe_bwd(moe_triton.moe_fwd(*inputs), *inputs, True, True)


def grpo_kernels(skipped: int) -> None:
    samples, tokens = (aot.empty(n, dtype=torch.float32) for n in (8, 100))
    grpo.grpo_advantages_fwd(samples, at(skipped, 5, dtype=torch.int32), True)
    offsets = at(skipped, 9, dtype=torch.int32)
    grpo.policy_loss_fwd(tokens, tokens, None, tokens, tokens, offsets, 0.2, 0.28, 0.1, "clip", "")


def specialisations(launch: Callable, addresses: tuple[int, ...]) -> dict[str, int]:
    """How many kernels there are of each name, over launches whose tensors begin at these elements."""
    found = {launched for skipped in addresses for launched in aot.launches_of(90, launch, skipped)}
    names = [name for _, name, _ in found]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("launch, kernels", [(attention_kernels, 4), (decode_kernels, 2),
                                             (logprob_kernels, 5), (moe_kernels, 10), (grpo_kernels, 3)])
def test_the_address_of_an_index_tensor_makes_no_new_kernel(launch, kernels):
    once = specialisations(launch, (0,))
    assert sum(once.values()) == kernels  # the product for dh is another one than for dw
    assert specialisations(launch, (0, 1, 2, 3)) == once


def test_the_address_of_a_tensor_of_numbers_does_make_one():
    def launch(skipped):
        pages, lengths = aot.empty(64, 2, 16, 64), aot.empty(3, dtype=torch.int32)
        q, table = at(skipped, 3, 4, 64, dtype=torch.bfloat16), aot.empty(3, 8, dtype=torch.int32)
        decode_attention.decode_attention_fwd(q, pages, pages, table, lengths, 0.125)

    assert specialisations(launch, (0, 1))["decode_attention_fwd_kernel"] == 2
