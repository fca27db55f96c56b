"""Which requests are in the batch: who waits, who begins, who must go back, and when rows are
dropped.

Waiting requests begin in the order they came, their prompts prefilled whole, as far as rows, cache
and `tokens_per_step` allow. Equal prompts that begin together (the samples of a group) are
prefilled once. Where the cache has no room for one more token in every row, the youngest sequence
is preempted: it goes back to the front of the queue with the tokens that it has. It is prefilled
again later, and samples the same tokens as it would have, since its random numbers depend on seed
and position alone.

Finished rows stay in the batch for a while where nobody waits for them: compacting the batch after
every sequence costs more than decoding a few rows for nobody.

Left out: priorities, chunked prefill, prefixes shared between groups.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from .cache import PAGE, Cache
from .requests import Completion, Request
from .rows import Rows
from .text import TextStream


@dataclass
class ServedRequest:
    """One request while it is being served, and the sequence of tokens that it has so far."""

    id: int
    request: Request
    prefix: tuple[int, ...]
    """What a prefill reads: the prompt, and the tokens from before it was preempted."""
    text: TextStream | None
    """The text of its tokens, for requests with stop texts and for streams."""
    streamed: bool
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """(tokens, logp), or (tokens, logp, top_ids, top_logp), of each time that it was in a row."""

    @property
    def n_collected(self) -> int:
        return sum(len(tokens) for tokens, *_ in self.parts)

    def completion(self, reason: str, version: int) -> Completion:
        """All parts joined; none where it was cancelled before it began."""
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        parts = self.parts or [nothing]
        tokens, logp, *likeliest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        text = self.text.shown if self.request.stop else None
        return Completion(tokens, logp, reason, version, text, *likeliest)


class Scheduler:
    """The queue of waiting sequences and the rows of the running ones, which the cache and `rows`
    mirror."""

    def __init__(self, cache: Cache, rows: Rows, max_rows: int, tokens_per_step: int):
        self.cache, self.rows = cache, rows
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self.waiting: deque[ServedRequest] = deque()
        self.running: list[ServedRequest | None] = []
        """The sequence of each row; None for a finished row. The last running one takes all rows
        with it."""
        self.n_finished = 0
        """Finished rows among them."""
        self.emitting: list[int] = []
        """Rows whose tokens are looked at one by one: they have stop texts, or are streamed."""

    def unfinished(self) -> list[ServedRequest]:
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
        # A prefill costs a pass over the weights: it is not worth that for a few of many rows.
        worth_it = min(len(self.waiting), -(-self.max_rows // 16))
        if n and n_free < worth_it:
            return None
        prompts, which = self._choose(n_free, self.tokens_per_step - n)
        if not which:
            return None
        new = [self.waiting.popleft() for _ in which]
        which = np.array(which)
        logits = self.cache.admit(np.arange(n, n + len(new)), prompts, which)
        self.running += new
        self.rows.begin(new)
        self._find_emitting()
        # The samples of a group begin with the logits of their one prompt.
        return logits[torch.from_numpy(which).to(logits.device)]

    def _choose(self, n_free: int, budget: int) -> tuple[list[tuple[int, ...]], list[int]]:
        """How many of the waiting sequences begin: (their different prompts, the prompt of each
        one).

        budget: tokens that may be prefilled. One sequence alone always begins: `submit` has seen to
        it that the cache can hold it.
        """
        index_of: dict[tuple[int, ...], int] = {}
        which: list[int] = []
        n_tokens = longest = n_pages = 0
        for sequence in islice(self.waiting, n_free):
            length = len(sequence.prefix)
            longest = max(longest, length)
            if sequence.prefix not in index_of:
                n_tokens += length
                n_pages += length // PAGE  # full pages are shared by all samples of a group
            n_pages += length % PAGE > 0  # the last one, which is written on, is not
            fits = n_tokens <= budget and self.cache.fits(len(which) + 1, longest, n_pages)
            if not fits and (self.running or which):
                break
            which.append(index_of.setdefault(sequence.prefix, len(index_of)))
        return list(index_of), which

    # ---- sequences go back, or end ----

    def make_room(self) -> bool:
        """Make room in the cache for one more token in every row; True if that took a
        preemption."""
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

    def remove(self, ids: set[int]) -> list[ServedRequest]:
        """Take these sequences out of queue and batch, with the tokens that they have."""
        queued = [s for s in self.waiting if s.id in ids]
        self.waiting = deque(s for s in self.waiting if s.id not in ids)
        rows = [row for row, s in enumerate(self.running) if s is not None and s.id in ids]
        return queued + (self.release(np.array(rows)) if rows else [])

    def release(self, rows: np.ndarray) -> list[ServedRequest]:
        """Take the sequences out of these rows, with the tokens that they have sampled there."""
        released = [self.running[row] for row in rows.tolist()]
        for row, sequence in zip(rows.tolist(), released, strict=True):
            sequence.parts.append(self.rows.take(row, sequence.request.top_logprobs))
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
        """Drop the finished rows: the last running rows move into their places."""
        finished = np.flatnonzero([s is None for s in self.running])
        n = len(self.running) - len(finished)
        is_running = np.ones(len(self.running), bool)
        is_running[finished] = False
        dst = finished[finished < n]
        src = n + np.flatnonzero(is_running[n:])
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
        self.emitting = [
            row for row, s in enumerate(self.running) if s is not None and (s.text or s.streamed)
        ]
