"""Mixtures by weight: every epoch has exactly the shares, and every document comes in turn."""
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from r1zero.model.checkpoint import CheckpointError
from r1zero.train.batches import DocumentBatches, TokenStream
from r1zero.train.mixture import MixedOrder, Source, parse_sources, parts_of
from r1zero.train.pretrain import pretrain, text_batches
from r1zero.train.sft import SFTConfig, sft

from .loop_cases import SENTENCE, pretrain_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome


def two_files(folder) -> tuple[str, str]:
    """Seven pairs, and three others."""
    paths = []
    for name, n in (("a", 7), ("b", 3)):
        lines = [json.dumps({"prompt": f"{name}{i}=", "response": "xy"[: 1 + i % 2]}) for i in range(n)]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return tuple(map(str, paths))


def sft_config(run, base, *data: str, **changes) -> SFTConfig:
    options = dict(batch_tokens=16, micro_tokens=8, save_every=2, steps=6, device="cpu") | changes
    return SFTConfig(run=str(run), base=str(base), data=data, **options)


# ---- from words to sources ----

def test_a_number_behind_the_last_colon_is_a_weight_and_what_is_there_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:3").write_text("x")
    words = ["a.jsonl:3", "b.jsonl", "odd:3", "odd:3:0.5", "C:/data/c.jsonl:1e2"]
    assert parse_sources(words[:3]) == [Source("a.jsonl", Fraction(3)), Source("b.jsonl"), Source("odd:3")]
    assert parse_sources(words[3]) == [Source("odd:3", Fraction(1, 2))]
    assert parse_sources(words[4:]) == [Source("C:/data/c.jsonl", Fraction(100))]
    assert parse_sources("one.jsonl") == [Source("one.jsonl")]


@pytest.mark.parametrize(("weights", "parts"), [
    ([3, 1], [3, 1]), ([6, 2], [3, 1]), (["0.7", "0.3"], [7, 3]), ([None, 4], [1, 4]),
    (["0.5", None], [1, 2]), ([None, None], None), ([5], None), ([1, 1], [1, 1]),
])
def test_shares_are_the_smallest_whole_numbers(weights, parts):
    given = [Source(str(i), None if w is None else Fraction(w)) for i, w in enumerate(weights)]
    assert parts_of(given) == parts


@pytest.mark.parametrize(("words", "match"), [
    (["a:0", "b"], "weight is 0; expected a number from"),
    (["a:-1"], "weight is -1"), (["a:nan"], "weight is nan"), (["a:inf"], "weight is inf"),
    (["a:1e999"], "weight is 1e999"), (["a:"], "'' behind its last colon is no weight"),
    (["a:many"], "'many' behind its last colon"), (["a:3/4"], "'3/4' behind"),
    (["C:\\data\\c.jsonl"], "there is no such file"), (["hub:owner/name"], "there is no such file"),
    ([":3"], "a weight without a file"), (["a:3", "./a:1"], "mixes a twice"), (["a:1", "a"], "give it once"),
    (["a:1", "b:0.000011"], r"1000000 to 11.*add up to at most 100,000"),
])
def test_bad_sources_are_refused_in_one_line(words, match):
    with fails(ValueError, match):
        parts_of(parse_sources(words))


# ---- the order ----

@pytest.mark.parametrize(("sizes", "parts"), [([10, 10], [3, 1]), ([3, 50], [3, 1]), ([7, 2, 1], [1, 5, 2]),
                                             ([1, 1], [1, 9])])
def test_every_epoch_has_exactly_the_shares_and_each_source_is_gone_over_evenly(sizes, parts):
    order = MixedOrder(sizes, parts, seed=5)
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    used = Counter()
    for epoch in range(6):
        documents = order(epoch)
        shares = np.bincount(source_of[documents], minlength=len(sizes))
        assert (shares * sum(parts) == len(documents) * np.array(parts)).all()
        assert sum(sizes) <= len(documents) < sum(sizes) + sum(parts)
        used.update(documents.tolist())
        for source in range(len(sizes)):  # no document is used again before all others were
            counts = [used[i] for i in np.flatnonzero(source_of == source).tolist()]
            assert max(counts) - min(counts) <= 1
    assert (order(3) == MixedOrder(sizes, parts, seed=5)(3)).all()
    assert not (order(0) == order(1)).all() or sum(sizes) == 2


def test_sources_of_one_size_are_shuffled_apart_and_the_seed_counts():
    order = MixedOrder([20, 20], [1, 1], seed=0)
    first, second = order.documents_of(0, 0, 20), order.documents_of(1, 0, 20)
    assert sorted(first) == sorted(second) == list(range(20)) and first.tolist() != second.tolist()
    assert order(0).tolist() != MixedOrder([20, 20], [1, 1], seed=1)(0).tolist()
    both = order(0) // 20
    assert 0 < both[:10].sum() < 10  # the sources are mingled, and do not follow each other


# ---- in the loops ----

def test_one_source_trains_as_ever_whatever_its_weight_and_two_without_weights_are_one(tmp_path):
    base = save_base(tmp_path / "base")
    a, b = two_files(tmp_path)
    both = tmp_path / "both.jsonl"
    both.write_text((tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text())
    rows = {}
    for name, data in {"one": (a,), "weighted": (f"{a}:3",), "both": (str(both),), "two": (a, b),
                       "mixed": (f"{a}:1", f"{b}:1"), "half": (a, f"{b}:1")}.items():
        sft(sft_config(tmp_path / name, base, *data, steps=2))
        rows[name] = outcome(tmp_path / name)["rows"]
    assert rows["one"] == rows["weighted"] != rows["both"]
    assert rows["both"] == rows["two"] != rows["mixed"] == rows["half"]


def test_a_mixture_goes_on_bit_for_bit_and_with_other_weights_it_is_refused(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    a, b = two_files(tmp_path)
    data = f"{a}:3", f"{b}:1"
    sft(sft_config(tmp_path / "whole", base, *data))
    broken_at(monkeypatch, 5, sft, sft_config(tmp_path / "run", base, *data))
    for other in ((f"{a}:2", f"{b}:1"), (a, b)):
        with fails(CheckpointError, "data weights .changed: .*a.jsonl"):
            sft(sft_config(tmp_path / "run", base, *other, resume=True))
    with fails(CheckpointError, "data .*another order"):
        sft(sft_config(tmp_path / "run", base, *data[::-1], resume=True))
    sft(sft_config(tmp_path / "run", base, *data, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_windows_of_mixed_texts_hold_one_source_each_and_the_end_of_each_is_held_out(tmp_path):
    letters, digits = tmp_path / "letters.txt", tmp_path / "digits.txt"
    letters.write_text("ab" * 200)
    digits.write_text("01" * 100)
    config = pretrain_config(tmp_path / "run", "", seq_len=16, batch_tokens=64)
    config = type(config)(**vars(config) | {"data": (f"{letters}:1", f"{digits}:3")})
    tokenizer, batches, tail = text_batches(config)
    assert isinstance(batches, DocumentBatches)
    ends = [[*tokenizer.encode(text)[1:], tokenizer.eos_id] for text in ("ab" * 20, "01" * 10)]
    assert tail.tolist() == ends[0] + ends[1]
    assert len(batches.lengths) == 360 // 16 + 180 // 16  # every token but the rest is a target
    seen = Counter()
    index = 0
    while batches.epoch(index) < 4:
        batch = batches.batch(index)
        assert batch.inputs.cu_seqlens.diff().tolist() == [16] * (len(batch.targets) // 16)
        windows = batch.inputs.tokens.view(-1, 16), batch.targets.view(-1, 16)
        for inputs, targets in zip(*windows, strict=True):
            assert inputs[1:].tolist() == targets[:-1].tolist()
            seen[tokenizer.decode(inputs.tolist())[0].isdigit()] += 1
        index += 1
    assert seen[True] == 3 * seen[False] > 0


def test_texts_without_weights_are_one_stream_as_ever(tmp_path):
    paths = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} {SENTENCE}" * 9)
        paths.append(str(tmp_path / name))
    config = pretrain_config(tmp_path / "run", "", tokenizer="bytes")
    tokenizer, batches, tail = text_batches(type(config)(**vars(config) | {"data": tuple(paths)}))
    tokens = [token for name in ("a.txt", "b.txt") for token in
              [*tokenizer.encode(f"{name} {SENTENCE}" * 9), tokenizer.eos_id]]
    assert isinstance(batches, TokenStream) and [*batches.tokens, *tail] == tokens


def test_a_mixture_with_a_short_text_or_a_file_twice_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text(SENTENCE * 20)
    (folder / "short.txt").write_text("tiny text")
    config = pretrain_config(tmp_path / "run", "")
    long, short, gone = (str(folder / f"{name}.txt") for name in ("long", "short", "gone"))
    for data, match in [((f"{long}:1", f"{short}:1"), "source 2 of --data has 8 tokens"),
                        ((f"{folder}:1", f"{long}:2"), "mixes .*long.txt twice"),
                        ((f"{gone}:1", str(folder)), "gone.txt cannot be read"),
                        (("countdown:3", str(folder)), "countdown cannot be read")]:
        with fails(ValueError, match):
            pretrain(type(config)(**vars(config) | {"data": data}))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    a, _ = two_files(tmp_path)
    with fails(ValueError, "empty.jsonl is empty"):
        sft(sft_config(tmp_path / "run", save_base(tmp_path / "base"), f"{a}:1", f"{empty}:1"))
    assert not (tmp_path / "run").exists()
