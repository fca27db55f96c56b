"""Packed: sequences as flat tokens, some of them after a shared prefix."""
import numpy as np
import pytest
import torch

from r1zero.model.packed import pack


def test_pack():
    packed = pack([[5, 6, 7], [], np.array([8]), (9, 1)])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 1] and packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4, 6] and packed.max_seqlen == 3
    assert packed.tokens.dtype == packed.positions.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32 and type(packed.max_seqlen) is int


@pytest.mark.parametrize("bad", [[], [[]], [[], []], [[1, -1]]])
def test_pack_refuses(bad):
    with pytest.raises(ValueError, match="pack: "):
        pack(bad)


def test_pack_with_shared_prefixes():
    packed = pack([[1, 2, 3], [9], [], [4, 5], [6], [7]], after=np.array([-1, -1, -1, 0, 1, 2]))
    assert packed.positions.tolist() == [0, 1, 2, 0, 3, 4, 1, 0]
    assert packed.tokens[packed.keys].tolist() == [1, 2, 3, 9, 1, 2, 3, 4, 5, 9, 6, 7]
    assert packed.cu_keys.tolist() == [0, 3, 4, 4, 9, 11, 12] and packed.max_keys == 5
    assert packed.cu_keys.dtype == torch.int32 and packed.keys.dtype == torch.int64
    for bad in ([-1, 2], [-1], [0, -1], [1, 0], [-2, -1]):
        with pytest.raises(ValueError, match="pack: after is .*expected for each the index of one"):
            pack([[1], [2]], after=np.array(bad))
