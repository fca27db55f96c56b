"""Which pages belong to which row: the bookkeeping of a paged cache, on the host.

A page holds PAGE tokens, in all layers. Row b reads its pages in the order pages[b, 0], pages[b,
1], ... Rows whose prompts are equal share the full pages of the prompt: a page counts its users,
and is free again when the last one leaves. The page that a row goes on writing is its own.

Page 0 belongs to nobody: rows that only fill up a batch size read and write there.

The device has a copy of the table and of the lengths. `changes` says which of their entries are
new, so a step sends those alone: a table is megabytes, and a step changes a few numbers. Entries
behind a row's last page are read by nobody and may be old on the device. A row without tokens is
still decoded where it fills up a batch size: its first entry is read, and must be page 0.

Shapes: B rows, W pages that a row may have, K entries.
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
        self._changed_pages: list[np.ndarray] = []  # flat indices of entries of `pages`
        self._changed_lengths: list[int] = []  # rows

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
        self._note(row, len(pages))

    def release(self, rows: Iterable[int]) -> None:
        """These rows leave their pages, and have no tokens."""
        for row in rows:
            pages = self.pages[row, : pages_for(self.lengths[row])]
            self.users[pages] -= 1
            self.free += pages[self.users[pages] == 0].tolist()
            self._forget(row)

    def move(self, dst: int, src: int) -> None:
        """Row `src` becomes row `dst`, which leaves its own pages; `src` has none then."""
        self.release([dst])
        n_pages = pages_for(self.lengths[src])
        self.begin(dst, self.pages[src, :n_pages], self.lengths[src])
        self._forget(src)

    def full(self, n: int) -> np.ndarray:
        """Those of the first n rows whose last page is full: their next token begins a page."""
        return np.flatnonzero(self.lengths[:n] % PAGE == 0)

    def extend(self, rows: np.ndarray) -> None:
        """Each of these full rows gets a page more."""
        flat = rows * self.pages.shape[1] + self.lengths[rows] // PAGE
        self.pages.reshape(-1)[flat] = self.take(len(rows))
        self._changed_pages.append(flat)

    # ---- the device's copy ----

    def _forget(self, row: int) -> None:
        """This row has no pages and no tokens."""
        self.pages[row, : pages_for(self.lengths[row])] = 0
        self.lengths[row] = 0
        self._note(row, 1)

    def _note(self, row: int, n_pages: int) -> None:
        """The first pages of this row, and its length, are new."""
        first = row * self.pages.shape[1]
        self._changed_pages.append(np.arange(first, first + n_pages))
        self._changed_lengths.append(row)

    def changes(self) -> np.ndarray:
        """[2, K] int64, indices and values: what has changed since the last call, and the device
        must write.

        An index counts through all of `pages`, row by row, and then through `lengths`.
        """
        if not self._changed_pages:
            return np.zeros((2, 0), np.int64)
        # What has changed twice is sent once, with the value that it has now.
        pages = np.unique(np.concatenate(self._changed_pages))
        rows = np.unique(np.array(self._changed_lengths, np.int64))
        self._changed_pages, self._changed_lengths = [], []
        index = np.concatenate([pages, self.pages.size + rows])
        values = np.concatenate([self.pages.reshape(-1)[pages], self.lengths[rows]])
        return np.stack([index, values])
