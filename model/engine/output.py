"""What the rows of the batch have sampled so far, until their sequences end.

Every step writes one column: a token and its log-prob per row, and the likeliest tokens where a
request asks for them. So the tokens of a sequence are the columns of its row from its first step
on, and nothing has to be appended to a list per sequence. Columns that no sequence needs any more
go when the memory is full.

Shapes: B rows, C columns, K likeliest tokens that are reported.
"""

import numpy as np
import torch
import torch.nn.functional as F

LEAST_COLUMNS = 128  # that memory is taken for


class Output:
    """The columns of a batch of at most `max_rows` rows, numbered by the step that wrote them."""

    def __init__(self, max_rows: int, device: torch.device):
        self.max_rows, self.device = max_rows, device
        self.newest = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """[B], the newest token of each row."""
        self.columns: dict[str, torch.Tensor] = {}
        """tokens and logp [B, C]; if a request asks for them, top_ids and top_logp [B, C, K]."""
        self.first_step = 0
        """The step of column 0."""

    def make_room(self, step: int, n: int, births: np.ndarray, top_n: int) -> None:
        """Memory for the column of `step`, with the `top_n` likeliest tokens.

        n: rows in use; births: [n] the step of each one's first token.
        """
        if self._has_column(step) and self._has_likeliest(top_n):
            return
        # Keep the columns from the oldest sequence's first one on, and have as many again free.
        oldest = int(births.min())
        first, end = oldest - self.first_step, step - self.first_step
        n_kept = end - first
        old = self.columns
        self.columns = self._allocate(max(LEAST_COLUMNS, 2 * n_kept), top_n)
        for name in self.columns.keys() & old.keys():
            kept = old[name][:n, first:end]
            # The sequences of now may ask for more of the likeliest tokens, or for fewer.
            if kept.ndim == 3:
                kept = with_last_size(kept, top_n)
            self.columns[name][:n, :n_kept] = kept
        self.first_step = oldest

    def _has_column(self, step: int) -> bool:
        if not self.columns:
            return False
        n_columns = self.columns["tokens"].shape[1]
        return step - self.first_step < n_columns

    def _has_likeliest(self, top_n: int) -> bool:
        if top_n == 0:
            return True
        return "top_ids" in self.columns and self.columns["top_ids"].shape[2] >= top_n

    def _allocate(self, n_columns: int, top_n: int) -> dict[str, torch.Tensor]:
        shape = (self.max_rows, n_columns)
        columns = {
            "tokens": torch.zeros(shape, dtype=torch.int64, device=self.device),
            "logp": torch.zeros(shape, device=self.device),
        }
        if top_n:
            shape = (*shape, top_n)
            columns["top_ids"] = torch.zeros(shape, dtype=torch.int64, device=self.device)
            columns["top_logp"] = torch.zeros(shape, device=self.device)
        return columns

    def write(self, step: int, sampled: tuple[torch.Tensor, ...]) -> None:
        """Write the column of `step`.

        sampled: tokens and logp [n], and, if a row reports them, top_ids and top_logp [n, k].
        """
        tokens = sampled[0]
        n, column = len(tokens), step - self.first_step
        for values, new in zip(self.columns.values(), sampled, strict=False):
            if values.ndim == 3:  # there is room for those of a row that asked for more
                values = values[..., : new.shape[1]]
            values[:n, column] = new
        self.newest[:n] = tokens

    def take(
        self, rows: np.ndarray, births: np.ndarray, end: int, top_ns: np.ndarray
    ) -> list[tuple[np.ndarray, ...]]:
        """(tokens, logp) of each row, and (top_ids, top_logp) where it reports likeliest tokens.

        rows: [N]. births: [N] the step of each one's first token. end: the step behind its last.
        top_ns: [N] likeliest tokens to report.
        """
        # The device is read once for each kind of column, not once for each row.
        oldest = births.min()
        first, end = int(oldest) - self.first_step, end - self.first_step
        index = torch.from_numpy(rows).to(self.device)
        columns = [x[:, first:end][index].cpu().numpy() for x in self.columns.values()]

        # Each row's own part of it, copied: the rest of what was read need not stay in memory.
        taken = []
        for row, (start, top_n) in enumerate(zip(births - oldest, top_ns, strict=True)):
            part = [x[row, start:].copy() for x in columns[:2]]
            if top_n:
                part += [x[row, start:, :top_n].copy() for x in columns[2:]]
            taken.append(tuple(part))
        return taken

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        """What rows `src` have becomes that of rows `dst`."""
        to = torch.from_numpy(dst).to(self.device)
        by = torch.from_numpy(src).to(self.device)
        self.newest[to] = self.newest[by]
        for values in self.columns.values():
            values[to] = values[by]


def with_last_size(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values [..., K] with zeros added, or cut off, to [..., size]."""
    missing = max(0, size - values.shape[-1])
    return F.pad(values, (0, missing))[..., :size]
