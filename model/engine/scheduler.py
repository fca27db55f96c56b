"""Which requests are in the batch: who begins, who must go back, and when rows are dropped.

Admission: waiting requests begin in the order in which they came, as far as rows, cache and
`tokens_per_step` allow. A prompt is prefilled whole. Equal prompts that begin together, as the
samples of a group do, are prefilled once.

Preemption: where the cache has no room for one more token in every row, the youngest sequence goes
back to the front of the queue with the tokens that it has. It is prefilled again later, and samples
the same tokens as it would have, since random numbers depend on seed and position alone. Where the
routes of a mixture of experts are kept, its tokens take the same experts again: all log-probs of an
answer belong to its one set of routes.

Finished rows stay in the batch for a while where nobody waits for them: compacting the batch after
every sequence costs more than decoding a few rows for nobody.

Left out: priorities, chunked prefill, prefixes shared between groups.
"""

from collections import deque
from itertools import islice

import numpy as np
import torch

from .cache import PAGE, Cache
from .rows import Rows
from .sequence import Sequence


class Scheduler:
    """The queue of waiting sequences, and the batch: row i of it is row i of `cache` and `rows`."""

    def __init__(self, cache: Cache, rows: Rows, max_rows: int, tokens_per_step: int):
        self.cache, self.rows = cache, rows
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence | None] = []
        """The sequence of each row; None in a finished row. If none runs, there are no rows."""
        self.n_finished = 0
        """How many rows are finished."""
        self.emitting: list[int] = []
        """Rows whose new token is looked at by itself: they have stop texts, or are streamed."""

    def unfinished(self) -> list[Sequence]:
        """All sequences that are being served, running or waiting."""
        return [s for s in self.running if s is not None] + list(self.waiting)

    @property
    def n_unfinished(self) -> int:
        return len(self.running) - self.n_finished + len(self.waiting)

    # ---- sequences begin ----

    def admit(self) -> torch.Tensor | None:
        """Prefill what may begin now; logits [new rows, V] of their first tokens, or None."""
        n = len(self.running)
        n_free = self.max_rows - n
        # A prefill costs a pass over the weights. It is worth that for a sixteenth of all rows.
        enough = min(len(self.waiting), -(-self.max_rows // 16))
        if n and n_free < enough:
            return None

        # Prefill each different prompt once, and give the new rows their keys and values.
        firsts, prompt_of_row = self._choose(n_free, self.tokens_per_step - n)
        n_new = len(prompt_of_row)
        if n_new == 0:
            return None
        which = np.array(prompt_of_row)
        prompts = [sequence.prefix for sequence in firsts]
        routes = [sequence.routes for sequence in firsts]
        logits = self.cache.admit(np.arange(n, n + n_new), prompts, which, routes)

        new = [self.waiting.popleft() for _ in range(n_new)]
        self.running += new
        self.rows.begin(new)
        self._find_emitting()
        # The samples of a group begin with the logits of their one prompt.
        return logits[torch.from_numpy(which).to(logits.device)]

    def _choose(self, n_free: int, budget: int) -> tuple[list[Sequence], list[int]]:
        """The first of the waiting sequences that may begin: one for each different prompt, and the
        index of each one's prompt.

        n_free: rows. budget: tokens that may be prefilled. One sequence alone always begins: the
        engine refuses requests that the cache cannot hold.
        """
        index_of: dict[tuple, int] = {}
        firsts: list[Sequence] = []
        prompt_of_row: list[int] = []
        n_tokens = longest = n_pages = 0
        for sequence in islice(self.waiting, n_free):
            length = len(sequence.prefix)
            longest = max(longest, length)
            # One that was preempted with routes takes them again, and shares with nobody.
            prompt = sequence.prefix, id(sequence.routes)
            if prompt not in index_of:
                n_tokens += length
                n_pages += length // PAGE  # full pages are shared by all samples of a group
            n_pages += length % PAGE > 0  # the last one, which is written on, is not
            fits = n_tokens <= budget and self.cache.fits(len(prompt_of_row) + 1, longest, n_pages)
            if not fits and (self.running or prompt_of_row):
                break
            if prompt not in index_of:
                index_of[prompt] = len(firsts)
                firsts.append(sequence)
            prompt_of_row.append(index_of[prompt])
        return firsts, prompt_of_row

    # ---- sequences go back, or end ----

    def make_room(self) -> bool:
        """Make room in the cache for one more token in every row; was a sequence preempted?"""
        if self.n_finished and (self.waiting or not self.cache.can_step()):
            self.compact()
        preempted = False
        while self.running and not self.cache.can_step():
            self.preempt()
            preempted = True
        return preempted

    def preempt(self) -> None:
        """The youngest sequence waits again, before all others, with the tokens that it has."""
        row = max(range(len(self.running)), key=lambda row: self.running[row].id)
        # Put it into the queue first: where somebody waits, a released row is dropped at once.
        self.waiting.appendleft(self.running[row])
        [sequence] = self.release(np.array([row]))
        tokens = sequence.parts[-1][0]
        sequence.prefix = (*sequence.prefix, *tokens.tolist())

    def remove(self, ids: set[int]) -> list[Sequence]:
        """Take these sequences out of the queue and out of the batch."""
        queued = [s for s in self.waiting if s.id in ids]
        self.waiting = deque(s for s in self.waiting if s.id not in ids)
        rows = [row for row, s in enumerate(self.running) if s is not None and s.id in ids]
        return queued + (self.release(np.array(rows)) if rows else [])

    def release(self, rows: np.ndarray) -> list[Sequence]:
        """Take the sequences out of these rows, with the tokens that they have sampled there, and
        the routes of all tokens that the cache has of them."""
        released = [self.running[row] for row in rows.tolist()]
        taken = self.rows.take(rows), self.cache.routes_of(rows)
        for sequence, part, routes in zip(released, *taken, strict=True):
            sequence.parts.append(part)
            sequence.routes = routes
        for row in rows.tolist():
            self.running[row] = None
        self.n_finished += len(rows)

        # A finished row may stay where it costs the others next to nothing: nobody waits for it,
        # sampling for it is cheap, and the batch is decoded at the same size without it.
        n = len(self.running)
        smaller = self.cache.width(n - self.n_finished) < self.cache.width(n)
        if self.waiting or smaller or not self.rows.plain:
            self.compact()
        else:
            self.cache.empty(rows)
            self.rows.retire(rows)
            self._find_emitting()
        return released

    def compact(self) -> None:
        """Drop the finished rows: the last running ones move to where they were."""
        is_finished = np.array([s is None for s in self.running])
        n = int((~is_finished).sum())
        dst = np.flatnonzero(is_finished[:n])
        src = n + np.flatnonzero(~is_finished[n:])
        if len(dst):
            for to, by in zip(dst.tolist(), src.tolist(), strict=True):
                self.running[to] = self.running[by]
            self.rows.move(dst, src)
            self.cache.move(dst, src)
        del self.running[n:]
        self.n_finished = 0
        self.cache.cut(n)
        self.rows.cut(n)
        self._find_emitting()

    def _find_emitting(self) -> None:
        self.emitting = [row for row, s in enumerate(self.running) if s is not None and s.emits]
