"""Which pages belong to which row: the bookkeeping of a paged cache, on the host.

A page holds PAGE tokens, in all layers. Row b reads its pages in the order pages[b, 0], pages[b,
1], ... Rows whose prompts are equal share the full pages of the prompt: a page counts its users,
and is free again when the last one leaves. The page that a row goes on writing is its own.

Page 0 belongs to nobody: rows that only fill up a batch size read and write there.

Shapes: B rows, W pages of the longest sequence.
"""

from collections.abc import Iterable

import numpy as np

from .cache import PAGE, pages_for


class PageTable:
    """Pages 1 .. n_pages, and the rows that use them."""

    def __init__(self, n_pages: int, n_rows: int, width: int):
        self.n_pages = n_pages
        self.pages = np.zeros((n_rows, width), np.int32)
        """[B, W], the pages of each row; 0 behind its last one."""
        self.lengths = np.zeros(n_rows, np.int64)
        """[B], the tokens of each row."""
        self.reset()

    def reset(self) -> None:
        """No row has a page."""
        self.pages[:] = 0
        self.lengths[:] = 0
        self.users = np.zeros(self.n_pages + 1, np.int64)
        self.free = list(range(self.n_pages, 0, -1))

    def take(self, n: int) -> np.ndarray:
        """[n] free pages, with one user each."""
        pages = np.array([self.free.pop() for _ in range(n)], np.int64)
        self.users[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """One more row uses these pages."""
        self.users[pages] += 1

    def begin(self, row: int, pages: np.ndarray, length: int) -> None:
        """A free row gets its pages, for a prompt of `length` tokens."""
        self.pages[row, : len(pages)] = pages
        self.lengths[row] = length

    def release(self, rows: Iterable[int]) -> None:
        """These rows leave their pages, and have no tokens."""
        for row in rows:
            pages = self.pages[row, : pages_for(self.lengths[row])]
            self.users[pages] -= 1
            self.free += pages[self.users[pages] == 0].tolist()
            self.pages[row] = 0
            self.lengths[row] = 0

    def move(self, dst: int, src: int) -> None:
        """Row `src` becomes row `dst`, which leaves its own pages; `src` has none then."""
        self.release([dst])
        self.pages[dst] = self.pages[src]
        self.lengths[dst] = self.lengths[src]
        self.pages[src] = 0
        self.lengths[src] = 0

    def full(self, n: int) -> np.ndarray:
        """Those of the first n rows whose last page is full: their next token begins a page."""
        return np.flatnonzero(self.lengths[:n] % PAGE == 0)

    def extend(self, rows: np.ndarray) -> None:
        """Each of these full rows gets a page more."""
        self.pages[rows, self.lengths[rows] // PAGE] = self.take(len(rows))
