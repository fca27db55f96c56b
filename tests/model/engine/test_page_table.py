"""Which pages belong to which row: pages are shared, moved and freed, and never lost."""
import numpy as np

from r1zero.model.engine.cache import PAGE
from r1zero.model.engine.page_table import PageTable


def in_use(table):
    return table.n_pages - len(table.free)


def test_shared_pages_are_free_when_the_last_row_leaves():
    table = PageTable(n_pages=6, n_rows=3, width=3)
    prompt = table.take(2)
    for row in range(3):
        if row:
            table.share(prompt)
        table.begin(row, np.concatenate([prompt, table.take(1)]), 2 * PAGE + 3)
    assert in_use(table) == 2 + 3 and table.users[prompt].tolist() == [3, 3]
    table.release([0, 2])
    assert in_use(table) == 3 and table.lengths.tolist() == [0, 2 * PAGE + 3, 0]
    table.release([1])
    assert in_use(table) == 0 and not table.users.any() and not table.pages.any()


def test_a_row_that_moves_takes_its_pages_along():
    table = PageTable(n_pages=6, n_rows=3, width=3)
    table.begin(0, table.take(1), PAGE)
    table.begin(2, table.take(2), PAGE + 1)
    moved = table.pages[2].tolist()
    table.move(0, 2)
    assert table.pages[0].tolist() == moved and table.lengths.tolist() == [PAGE + 1, 0, 0]
    assert in_use(table) == 2
    table.move(0, 1)  # an empty row
    assert in_use(table) == 0


def test_full_rows_get_a_page_for_their_next_token():
    table = PageTable(n_pages=6, n_rows=3, width=3)
    for row, length in enumerate((PAGE, PAGE - 1, 0)):
        table.begin(row, table.take(1 if length else 0), length)
    assert table.full(3).tolist() == [0, 2] and table.full(2).tolist() == [0]
    table.extend(table.full(3))
    assert table.pages[0, 1] > 0 and table.pages[2, 0] > 0 and in_use(table) == 4
    assert len(set(table.pages[table.pages > 0].tolist())) == 4


def test_what_has_changed_is_told_once_with_its_last_value():
    table = PageTable(n_pages=6, n_rows=3, width=3)
    assert table.changes().shape == (2, 0)
    table.begin(0, table.take(1), PAGE)
    table.extend(table.full(1))
    table.begin(2, table.take(2), PAGE + 1)
    assert table.changes().tolist() == [[0, 1, 6, 7, 9 + 0, 9 + 2], [1, 2, 3, 4, PAGE, PAGE + 1]]
    assert table.changes().shape == (2, 0)
    table.move(0, 2)
    table.release([0])
    # Row 0 had two pages for a moment. A row without tokens is read at its first entry alone.
    index, values = table.changes()
    assert index.tolist() == [0, 1, 6, 9, 11] and values.tolist() == [0] * 5
