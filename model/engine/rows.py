"""The rows of the batch as arrays: what each request asked for, and the sampling for all of them.

A step does nothing one sequence at a time in Python. So seeds, limits, temperatures and filters lie
in one table, with a summary that is made again only when rows begin, move or end. What has been
sampled is in output.py.

The random number of a token is a function of (seed of the request, position in the sequence). A
row's position grows by one with each step, so its numbers are made for many steps at a time.

Shapes: B rows in use, V vocabulary.
"""

import numpy as np
import torch

from .output import Output
from .sampling import Filters, counter_uniform, sample_tokens, signed
from .sequence import Sequence

AHEAD = 32  # steps whose random numbers are made at one time
NEVER = 1 << 62  # the step at which a finished row ends
NO_TOKEN = -1  # fills the table of stop tokens

ROW = np.dtype(
    [
        ("seed", np.int64),
        ("birth", np.int64),  # the step that samples its first token
        ("origin", np.int64),  # the step at which it would have been at position 0
        ("limit", np.int64),  # the step before which it has all its tokens
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_n", np.int64),  # likeliest tokens to report
    ]
)


class Rows:
    """Rows 0 .. n - 1 of at most `max_rows`, each with one sequence, or finished."""

    def __init__(self, max_rows: int, device: torch.device):
        self.n = 0
        self.step = 0
        """How many steps there have been: the number of the one that is next, or under way."""
        self.device = device
        self.output = Output(max_rows, device)
        self._table = np.zeros(max_rows, ROW)
        self._stop_ids = np.full((max_rows, 1), NO_TOKEN)
        self._uniforms: torch.Tensor | None = None  # [B, AHEAD], from step `_uniforms_first` on
        self._uniforms_first = 0
        # The summary: what a step needs to know of all rows together.
        self.temperature: float | torch.Tensor = 1.0
        """One for all rows, or [B] float32."""
        self.filters: Filters | None = None
        """top_k, top_p and min_p, each [B]; None if no row has any."""
        self.top_n = 0
        """The most of the likeliest tokens that a row reports."""
        self.stop_ids = torch.from_numpy(self._stop_ids[:0]).to(device)
        """[B, S], the stop tokens of each row."""
        self.next_limit = NEVER
        """The first step before which a row has all its tokens."""

    # ---- rows begin, move and end ----

    def begin(self, sequences: list[Sequence]) -> None:
        """These sequences take the rows behind the others."""
        first, self.n = self.n, self.n + len(sequences)
        self._table[first : self.n] = [self._entry(sequence) for sequence in sequences]
        self._set_stop_ids(first, [sequence.request.stop_ids for sequence in sequences])
        self._uniforms = None
        self._summarise()

    def _entry(self, sequence: Sequence) -> tuple:
        """A row of the table, in the order of ROW."""
        request = sequence.request
        n_left = request.max_new_tokens - sequence.n_collected
        return (
            signed(request.seed),
            self.step,
            self.step - len(sequence.prefix),
            self.step + n_left,
            request.temperature,
            request.top_k,
            request.top_p,
            request.min_p,
            request.top_logprobs,
        )

    def _set_stop_ids(self, first: int, stop_ids: list[tuple[int, ...]]) -> None:
        """Stop tokens of the rows from `first` on; the table grows as wide as the longest list."""
        width = max([self._stop_ids.shape[1], *map(len, stop_ids)])
        missing = width - self._stop_ids.shape[1]
        if missing:
            wider = ((0, 0), (0, missing))
            self._stop_ids = np.pad(self._stop_ids, wider, constant_values=NO_TOKEN)
        padded = [[*ids, *[NO_TOKEN] * (width - len(ids))] for ids in stop_ids]
        self._stop_ids[first : self.n] = padded

    def retire(self, rows: np.ndarray) -> None:
        """These rows are finished and stay in the batch: they never end, and need no old column."""
        self._table["birth"][rows] = self.step
        self._table["limit"][rows] = NEVER
        self.stop_ids[rows] = NO_TOKEN
        self.next_limit = int(self._table["limit"][: self.n].min())

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        """Rows `src` become rows `dst`. `cut` follows."""
        for values in (self._table, self._stop_ids):
            values[dst] = values[src]
        self.output.move(dst, src)
        if self._uniforms is not None:
            self._uniforms[dst] = self._uniforms[src]

    def cut(self, n: int) -> None:
        """Keep rows 0 .. n - 1."""
        self.n = n
        if self._uniforms is not None:
            self._uniforms = self._uniforms[:n]
        if n:
            self._summarise()

    def _summarise(self) -> None:
        """Bring the summary up to date with the table."""
        table = self._table[: self.n]
        temperature = table["temperature"]
        alike = temperature.min() == temperature.max()
        # Cast here: not every device has float64.
        per_row = torch.from_numpy(temperature.astype(np.float32))
        self.temperature = float(temperature[0]) if alike else per_row.to(self.device)

        filtered = table["top_k"].any() or table["top_p"].min() < 1 or table["min_p"].any()
        names = ("top_k", "top_p", "min_p")
        self.filters = tuple(self._tensor(name) for name in names) if filtered else None

        self.top_n = int(table["top_n"].max())
        self.stop_ids = torch.from_numpy(self._stop_ids[: self.n]).to(self.device)
        self.next_limit = int(table["limit"].min())

    def _tensor(self, name: str) -> torch.Tensor:
        """[B], one field of the table on the device."""
        return torch.from_numpy(self._table[name][: self.n]).to(self.device)

    @property
    def plain(self) -> bool:
        """Is sampling cheap: one temperature for all rows, no filters, no reports?"""
        return self.filters is None and not self.top_n and isinstance(self.temperature, float)

    # ---- one step ----

    @property
    def newest(self) -> torch.Tensor:
        """[B] int64, the newest token of each row."""
        return self.output.newest[: self.n]

    def sample(self, logits: torch.Tensor) -> None:
        """Sample one token per row from logits [B, V], and write it to the output.

        Raises NonFiniteError for NaN or infinite logits.
        """
        births = self._table["birth"][: self.n]
        self.output.make_room(self.step, self.n, births, self.top_n)
        uniforms = self._next_uniforms()
        sampled = sample_tokens(logits, self.temperature, uniforms, self.filters, self.top_n)
        self.output.write(self.step, sampled)
        self.step += 1

    def _next_uniforms(self) -> torch.Tensor:
        """[B] random numbers of this step."""
        if self._uniforms is None or self.step >= self._uniforms_first + AHEAD:
            steps = self.step + torch.arange(AHEAD, device=self.device)
            positions = steps - self._tensor("origin")[:, None]
            self._uniforms = counter_uniform(self._tensor("seed")[:, None], positions)
            self._uniforms_first = self.step
        return self._uniforms[:, self.step - self._uniforms_first]

    def reached_stop(self) -> np.ndarray:
        """[B] bool: is the newest token one of the row's stop tokens?"""
        return (self.newest[:, None] == self.stop_ids).any(1).cpu().numpy()

    def ended(self, stopped: np.ndarray) -> np.ndarray:
        """The rows that are done: those that stopped [B], and those that have all their tokens."""
        if self.step < self.next_limit and not stopped.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(stopped | (self._table["limit"][: self.n] == self.step))

    def take(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """What each of these rows has sampled since it began: (tokens, logp), and (top_ids,
        top_logp) too if its request asks for likeliest tokens."""
        of_rows = self._table[rows]
        return self.output.take(rows, of_rows["birth"], self.step, of_rows["top_n"])
