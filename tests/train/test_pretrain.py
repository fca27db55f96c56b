"""Pretraining learns a text, on a tokenizer that has not seen the tail, and measures the tail right."""
import math
import re

import numpy as np
import pytest

from r1zero.train.log import read_metrics
from r1zero.train.pretrain import bits_per_byte, first_share, pretrain, text_batches, unigram_bits_per_byte

from ..rl.cases import naive_logp, tiny
from .loop_cases import SENTENCE, pretrain_config, text_file


def test_pretraining_learns_a_text_and_beats_the_unigram_baseline(tmp_path, capsys):
    data = text_file(tmp_path, SENTENCE * 60)
    c = pretrain_config(tmp_path / "run", data, steps=80, seq_len=32, batch_tokens=256, micro_tokens=256)
    pretrain(c)
    rows = read_metrics(c.run)
    assert [row["step"] for row in rows] == list(range(1, 81))
    assert rows[0]["loss"] > 5 > 1.0 > rows[-1]["loss"]  # at first about log 258 = 5.6 nats, or more
    found = re.search(r"([\d.]+) bits per byte; a unigram model reaches ([\d.]+)", capsys.readouterr().out)
    model_bits, unigram_bits = map(float, found.groups())
    assert 3.0 < unigram_bits < 4.5 and model_bits < 0.5 * unigram_bits
    counts = np.bincount(np.frombuffer(SENTENCE.encode(), np.uint8))
    p = counts[counts > 0] / counts.sum()
    assert unigram_bits == pytest.approx(-(p * np.log2(p)).sum(), abs=0.2)  # the entropy of the letters


def test_the_tokenizer_is_trained_on_the_first_share_of_the_text(tmp_path):
    texts = ["abcd", "", "efgh", "ijkl"]
    assert "".join(first_share(texts, 0.5)) == "abcdef" and "".join(first_share(texts, 1.0)) == "abcdefghijkl"
    pytest.importorskip("tokenizers")
    data = text_file(tmp_path, "abcabd " * 90 + "xyzxyz " * 10)  # the tail has words of its own
    tokenizer, _, _ = text_batches(pretrain_config(tmp_path / "run", data, tokenizer="bpe", vocab_size=270))
    assert len(tokenizer.encode("abcabd")) < 6 == len(tokenizer.encode("xyzxyz"))


def test_bits_per_byte_of_a_tail_are_those_of_its_tokens_one_by_one():
    model, tail = tiny(), np.frombuffer(SENTENCE.encode(), np.uint8)[:23]
    nats = 0.0
    for start in range(0, 22, 8):  # windows of 8 targets, each seen from its own beginning
        nats -= float(naive_logp(model, tail[start : start + 9].astype(np.int64), 1, 1.0)[0].sum().detach())
    assert bits_per_byte(model, tail, 22, 8) == pytest.approx(nats / np.log(2) / 22, rel=1e-5)


def test_unigram_bits_per_byte_by_hand():
    train, tail = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    expected = -(math.log2(4 / 7) + math.log2(2 / 7) + math.log2(1 / 7)) / 5  # counts 3, 1, 0, and 1 to each
    assert unigram_bits_per_byte(train, tail, 5, vocab_size=3) == pytest.approx(expected, rel=1e-12)
    assert unigram_bits_per_byte(np.arange(256), np.arange(256), 256, 256) == pytest.approx(8)
    with pytest.raises(ValueError, match="0 bytes"):
        unigram_bits_per_byte(train, tail, 0, 3)
