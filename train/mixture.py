"""Data from several sources, mixed by weight: `--data reasoning.jsonl:3 --data general.jsonl:1`.

A weight is a share of documents (conversations, or windows of a text), as DeepSeek-R1 mixes 600,000
samples of reasoning with 200,000 others. It is no share of tokens: a source of longer documents
takes more of those. Without any weight the sources are read as one, each document once per epoch.

An epoch of a mixture holds exactly the shares, and about as many documents as there are. Each
source is gone over in an order of its own, and again from its start when it is used up: a small
source with a large weight is repeated, a large one with a small weight lasts for several epochs.

The order is a pure function of (seed, epoch), so a resumed run needs no more than its step. Source:
DeepSeek-R1, arXiv 2501.12948, appendix B.3.3. Left out: weights that change during a run.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..eval.tasks.base import stable_hash
from .batches import shuffled
from .inputs import Parts

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
MOST_PARTS = 100_000  # documents that the exact shares of a mixture may need


class Source(NamedTuple):
    """A file or a folder of data, and its weight."""

    path: str
    weight: Fraction | None = None
    """None where none was given."""


# ---- from words to sources ----


def parse_sources(words: str | Sequence[str]) -> list[Source]:
    """The sources that `--data` names, such as a.jsonl:3; a single text is one word.

    Raises ValueError for a weight that is none.
    """
    return [parse_source(word) for word in ([words] if isinstance(words, str) else words)]


def parse_source(word: str) -> Source:
    """One source. A word that names something there is a path, whatever colons it holds."""
    path, colon, weight = word.rpartition(":")
    if os.path.lexists(word) or not colon:
        return Source(word)
    try:
        value = float(weight)
    except ValueError:
        raise ValueError(
            f"--data is {word!r}: there is no such file, and {weight!r} behind its last colon is "
            "no weight; expected a path, or a path and a number, as in a.jsonl:3"
        ) from None
    if not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise ValueError(
            f"--data is {word!r}, whose weight is {weight}; expected a number from "
            f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, as in a.jsonl:3"
        )
    if not path:
        raise ValueError(f"--data is {word!r}, a weight without a file; give one, as in a.jsonl:3")
    return Source(path, Fraction(weight))


def check_different(paths: Sequence[str | Path]) -> None:
    """Raise ValueError for a file or folder that is given twice, under any spelling."""
    seen = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            raise ValueError(
                f"--data mixes {seen[place]} twice (the second time as {path}); give it once, with "
                "a larger weight if it should count for more"
            )
        seen[place] = path


def parts_of(sources: Sequence[Source]) -> list[int] | None:
    """The shares as whole numbers, such as [3, 1]; None for one source, or without any weight.

    A source without a weight beside others that have one counts as 1. Raises ValueError for a
    source that is given twice, and for shares that only very many documents could hold exactly.
    """
    if len(sources) == 1 or all(source.weight is None for source in sources):
        return None
    check_different([source.path for source in sources])
    weights = [Fraction(1) if source.weight is None else source.weight for source in sources]
    # Times the least common denominator, by the greatest common divisor.
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    parts = [part // math.gcd(*whole) for part in whole]
    if sum(parts) > MOST_PARTS:
        raise ValueError(
            f"--data: the weights are to each other as {' to '.join(map(str, parts))}, expected "
            f"whole numbers that add up to at most {MOST_PARTS:,}; give rounder ones, such as 3 "
            "and 1"
        )
    return parts


def weights_input(sources: Sequence[Source]) -> Parts:
    """The weights as an input of a run (inputs.py): who resumes must give the same."""
    return [[source.path, str(source.weight)] for source in sources]


# ---- the order of documents ----


class MixedOrder:
    """Called with an epoch, [n] int64: which document comes first, second, ...

    Documents are numbered source after source.
    """

    def __init__(self, sizes: Sequence[int], parts: Sequence[int], seed: int):
        """sizes: documents of each source, all at least 1; parts: as `parts_of` gives them."""
        assert len(sizes) == len(parts) and min(sizes) > 0
        n_rounds = math.ceil(sum(sizes) / sum(parts))
        self.sizes = list(sizes)
        self.counts = [part * n_rounds for part in parts]
        """Documents of each source in an epoch."""
        self.seed = seed

    def __call__(self, epoch: int) -> np.ndarray:
        # 1. From each source the documents that are next in its own order.
        chosen, first = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            chosen.append(first + self.documents_of(number, epoch * count, count))
            first += size
        together = np.concatenate(chosen)
        # 2. All of them in one order.
        return together[shuffled(len(together), self.seed, epoch)]

    def documents_of(self, source: int, start: int, count: int) -> np.ndarray:
        """[count] documents of a source from `start` on in its endless order, counted from its own
        first."""
        size = self.sizes[source]
        seed = stable_hash("source of a mixture", self.seed, source)
        rounds = range(start // size, (start + count - 1) // size + 1)
        endless = np.concatenate([shuffled(size, seed, each) for each in rounds])
        skipped = start - rounds.start * size
        return endless[skipped : skipped + count]
