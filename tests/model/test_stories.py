"""A trained model, 1 MB: its greedy text is the published one, through the naive sampler and the engine."""
import struct

import pytest
import torch

from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.huggingface import read_config, read_weights

from .huggingface_cases import CPU, DATA

FOLDER = DATA / "models" / "stories260k_hf"
BOS = 1
needs_stories = pytest.mark.skipif(not FOLDER.exists(), reason=f"{FOLDER} is not there")


def vocabulary() -> list[bytes]:
    """The pieces of tok512.bin (llama2.c): after the longest length, (score, length, bytes) of each."""
    data = (FOLDER.parent / "tok512.bin").read_bytes()
    pieces, at = [], 4
    while at < len(data):
        _, length = struct.unpack_from("<fi", data, at)
        piece = data[at + 8: at + 8 + length]
        at += 8 + length
        is_byte = piece.startswith(b"<0x") and length == 6
        pieces.append(bytes([int(piece[3:5], 16)]) if is_byte else piece)
    return pieces


def text_of(ids) -> str:
    pieces = vocabulary()
    text = b"".join(pieces[i] for i in ids)
    return text.decode().removeprefix(" ")  # the piece after BOS loses its space


@needs_stories
@pytest.mark.parametrize("paged", [None, True])
def test_the_greedy_text_is_the_published_one(paged):
    model = read_weights(FOLDER, read_config(FOLDER), CPU)
    expected = (FOLDER.parent / "stories260k_greedy.txt").read_text()
    request = Request([BOS], 256, seed=0, temperature=0.0, stop_ids=(BOS,))
    [completion] = Engine(model, max_rows=2, paged=paged).generate([request])
    assert text_of(completion.tokens).strip() == expected.strip()
    if paged:
        short = Request([BOS], 100, seed=0, temperature=0.0, stop_ids=(BOS,))
        assert generate_naive(model, short).tokens.tolist() == completion.tokens[:100].tolist()


@needs_stories
def test_with_rope_on_neighbouring_pairs_it_is_another_text():
    model = read_weights(FOLDER, read_config(FOLDER), CPU)
    with torch.no_grad():
        for block in model.blocks:
            rows = block.attn.qkv.weight[:96].unflatten(0, (12, 2, 4)).transpose(1, 2)
            block.attn.qkv.weight[:96] = rows.flatten(0, 2)
    tokens = generate_naive(model, Request([BOS], 20, seed=0, temperature=0.0)).tokens
    assert not text_of(tokens).startswith("Once upon a time, there was a little girl named Lily.")
