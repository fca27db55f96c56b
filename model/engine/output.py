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
    """The columns of a batch of at most `max_rows` rows. Steps are counted from 0 and never
    reset."""

    def __init__(self, max_rows: int, device: torch.device):
        self.max_rows, self.device = max_rows, device
        self.newest = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """[B], the newest token of each row."""
        self.columns: dict[str, torch.Tensor] = {}
        """tokens and logp [B, C]; top_ids and top_logp [B, C, K] once a request has asked for
        them."""
        self.first_step = 0
        """The step of column 0."""

    def make_room(self, step: int, n: int, births: np.ndarray, top_n: int) -> None:
        """Memory for the column of `step`, with the `top_n` likeliest tokens.

        n: rows in use; births: [n] the step of each one's first token.
        """
        old = self.columns
        column = step - self.first_step
        has_column = bool(old) and column < old["tokens"].shape[1]
        has_likeliest = top_n == 0 or ("top_ids" in old and old["top_ids"].shape[2] >= top_n)
        if has_column and has_likeliest:
            return
        # Keep the columns from the oldest sequence's first on, and as many again are free.
        oldest = int(births.min())
        n_kept = step - oldest
        kept = slice(oldest - self.first_step, column)
        self.columns = self._allocate(max(LEAST_COLUMNS, 2 * n_kept), top_n)
        for name in self.columns.keys() & old.keys():
            values = old[name][:n, kept]
            if values.ndim == 3:  # other sequences ask for more, or for fewer, than those before
                missing = max(0, top_n - values.shape[2])
                values = F.pad(values, (0, missing))[..., :top_n]
            self.columns[name][:n, :n_kept] = values
        self.first_step = oldest

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
        """Write the column of `step`: tokens and logp [n], and, if asked, top_ids and top_logp [n,
        k]."""
        tokens = sampled[0]
        n, column = len(tokens), step - self.first_step
        for values, new in zip(self.columns.values(), sampled, strict=False):
            if values.ndim == 3:  # there is room for those of a row that asked for more
                values = values[..., : new.shape[1]]
            values[:n, column] = new
        self.newest[:n] = tokens

    def take(self, row: int, first: int, end: int, top_n: int) -> tuple[np.ndarray, ...]:
        """(tokens, logp) of a row's steps `first` to `end`; with top_n also (top_ids, top_logp)."""
        part = slice(first - self.first_step, end - self.first_step)
        taken = []
        for values in self.columns.values():
            # NumPy sees the same memory on a CPU, and indexes it many times as fast as PyTorch.
            of_row = values.numpy()[row] if values.is_cpu else values[row].cpu().numpy()
            of_row = of_row[part] if values.ndim == 2 else of_row[part, :top_n]
            taken.append(of_row.copy())
        return tuple(taken) if top_n else tuple(taken[:2])

    def move(self, dst: np.ndarray, src: np.ndarray) -> None:
        """What rows `src` have becomes that of rows `dst`."""
        to = torch.from_numpy(dst).to(self.device)
        by = torch.from_numpy(src).to(self.device)
        for values in (self.newest, *self.columns.values()):
            values[to] = values[by]
