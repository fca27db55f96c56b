"""The generation engine: continuous batching over one key/value cache, for training, evaluation and chat.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt, max_new_tokens=64, seed=1), ...])
    for event in engine.stream(requests): ...        # tokens and text as they come; engine.cancel(event.id)

A step: one token of every live row is decoded, waiting prompts are prefilled whole as far as rows, places
and `tokens_per_step` allow, a token is drawn for all rows at once, and sequences that are done leave; where
none waits for their rows, these stay as holes until a smaller batch holds the others. Equal prompts that
begin together (the samples of a group) are prefilled once. Where the cache is too small for all to go on, the
youngest sequence is put back to the front of the queue with what it has; it is prefilled again later and goes
on with the same draws, since they depend on seed and place alone.

Weights must not change while requests are being served. On a CPU the engine reads the trainer's where they
lie, and looks for them anew when the first requests are submitted. On a GPU it decodes from one
copy if the compute dtype is not the weights' own, at fixed addresses that the CUDA graphs hold: `refresh()`
rewrites it in place. `refresh(version)` also says which weights these are: each Completion's number.

Nothing in a step is done sequence by sequence in Python, but for those that begin or end in it, have stop
texts, or are streamed. Left out: chunked prefill, prefixes shared between groups, speculative decoding.

Columns: every step writes a column of the output, so a live row's tokens are its columns from its birth on.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch
import torch.nn.functional as F

from ..transformer import Transformer
from .cache import PAGE, tokens_within
from .pages import Pages
from .requests import Completion, Event, Request, check_requests
from .sampling import counter_uniform, sample_tokens, signed
from .slots import Slots
from .text import TextStream

AHEAD = 32  # columns of random numbers that are made at one time
CPU_CACHE = 1 << 30  # bytes, where no number is given
NEVER = 1 << 62  # the column at which a hole is done
GPU_CACHE_SHARE = 0.85  # of the memory that is free


@dataclass
class _Sequence:
    id: int
    request: Request
    text: TextStream | None
    streamed: bool
    parts: list = field(default_factory=list)
    """(tokens, logp, top ids, top log-probs) from before it was put back."""
    prefix: tuple[int, ...] = ()
    """Prompt and what it has: what a prefill reads."""


HOLE = _Sequence(
    object(), None, None, False
)  # in a row whose sequence is done; nobody knows its id


class Engine:
    """Raises ValueError for requests that cannot be served, NonFiniteError for NaN logits, and RuntimeError
    in `generate` and `stream` where an error in another caller's step has ended their requests."""

    def __init__(
        self,
        model: Transformer,
        tokenizer=None,
        *,
        max_rows: int = 256,
        tokens_per_step: int = 8192,
        cache_tokens: int | None = None,
        paged: bool | None = None,
        longest: int | None = None,
        reserve: int = 0,
    ):
        """max_rows: sequences decoded at one time. tokens_per_step: decoded and prefilled together (but never
        less than one prompt). cache_tokens: places in the cache; None: enough for max_rows sequences of
        `longest` tokens (None: max_seq_len), as far as 1 GiB on a CPU, 85 % of the free memory less `reserve`
        bytes on a GPU go; but never less than one of max_seq_len. paged: None is pages but where the compiled
        loops of a CPU can serve."""
        if max_rows < 1 or tokens_per_step < 1:
            raise ValueError(
                f"engine: max_rows is {max_rows}, tokens_per_step {tokens_per_step}; expected 1 "
                "or more"
            )
        if cache_tokens is not None and cache_tokens < 1:
            raise ValueError(f"engine: cache_tokens is {cache_tokens}; expected 1 or more, or None")
        c, self.device = model.config, model.embed.device
        on_gpu = self.device.type == "cuda"
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self.token_bytes = 2 * c.n_layers * c.n_kv_heads * c.head_dim * model.compute_dtype.itemsize
        with torch.inference_mode():
            if paged is None:
                paged = not Slots.serves(model)
            self.cache = (Pages if paged else Slots)(model, max_rows)
            if cache_tokens is None:  # free memory is read when the copy of the weights is there
                free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else 0
                cache_tokens = tokens_within(
                    free * GPU_CACHE_SHARE - reserve if on_gpu else CPU_CACHE,
                    self.token_bytes,
                    max_rows,
                    longest,
                    c.max_seq_len,
                )
            self.cache.allocate(cache_tokens)
        self.cache_tokens, self.version, self.ids = cache_tokens, 0, count()
        self.lost_before, self.error = 0, ""  # requests with ids below are gone; what ended them
        self._reset()

    def plan(self) -> str:
        """What the cache takes, for people."""
        kind = "pages" if isinstance(self.cache, Pages) else "slots, allocated as they are needed"
        copy = (
            f"; the copy of the weights takes {self.cache.copy_bytes / 2**20:,.0f} MiB"
            if self.cache.copy_bytes
            else ""
        )
        return (
            f"key/value cache: up to {self.cache_tokens:,} tokens x {self.token_bytes:,} bytes = "
            f"{self.cache_tokens * self.token_bytes / 2**20:,.0f} MiB in {kind}; at most {self.max_rows} "
            f"sequences at a time, {self.tokens_per_step:,} tokens a step{copy}"
        )

    def _reset(self) -> None:
        """Forget all requests."""
        n = self.max_rows
        self.waiting: deque[_Sequence] = deque()
        self.live: list[_Sequence] = []  # and holes, but there is a sequence if there is a hole
        self.n_holes = 0
        self.finished: dict[int, Completion] = {}
        self.cancelled: set[int] = set()
        self.events: dict[int, tuple[list[int], str]] = {}  # of streamed requests: new tokens, text
        self.t = 0
        # in the order in which `_admit` fills them
        kinds = {
            "seed": np.int64,
            "birth": np.int64,
            "origin": np.int64,
            "limit": np.int64,
            "order": np.int64,
            "temperature": np.float32,
            "top_k": np.int64,
            "top_p": np.float32,
            "min_p": np.float32,
            "top_n": np.int64,
        }
        self.rows = {name: np.zeros(n, kind) for name, kind in kinds.items()}
        self.rows["stop_ids"] = np.full((n, 1), -1, np.int64)
        self.tokens = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.out: dict[str, torch.Tensor] = {}
        self.uniforms, self.uniforms_end = None, 0

    def refresh(self, version: int | None = None) -> None:
        """Take the trainer's weights as they are now; version: their number, by default the next one.

        Raises ValueError while requests are being served: one answer, one set of weights.
        """
        n = len(self.live) - self.n_holes + len(self.waiting)
        if n:
            raise ValueError(
                f"engine: refresh() while {n} requests are being served; let them end, or "
                "cancel them"
            )
        if self.device.type != "cpu":  # there `submit` takes them
            with torch.inference_mode():
                self.cache.refresh()
        self.version = self.version + 1 if version is None else version

    # ---- requests in, completions out ----

    def submit(self, requests: Sequence[Request], streamed: bool = False) -> list[int]:
        """Queue requests for `step`; their ids. Raises ValueError, and queues none, if one is impossible."""
        check_requests(self.model, requests, self.tokenizer)
        longest = max(requests, key=lambda r: len(r.prompt) + r.max_new_tokens)
        needed = self.cache.needed(len(longest.prompt) + longest.max_new_tokens)
        if needed > self.cache_tokens:
            raise ValueError(
                f"engine: a prompt of {len(longest.prompt)} tokens and max_new_tokens "
                f"{longest.max_new_tokens} need {needed} places, but the cache has "
                f"{self.cache_tokens}; give it cache_tokens={needed} or more"
            )
        if not self.live and not self.waiting and self.device.type == "cpu":
            with torch.inference_mode():
                self.cache.refresh()  # the trainer may have changed its weights in place, or replaced them
        new, prefixes = [], {}  # the samples of a group share theirs
        for r in requests:
            text = (
                TextStream(self.tokenizer, r.stop)
                if r.stop or streamed and self.tokenizer
                else None
            )
            if id(r.prompt) not in prefixes:
                prefixes[id(r.prompt)] = tuple(map(int, r.prompt))
            new.append(_Sequence(next(self.ids), r, text, streamed, prefix=prefixes[id(r.prompt)]))
        self.waiting += new
        return [s.id for s in new]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Serve them all; completions in the order of the requests."""
        ids = self.submit(requests)
        left = set(ids)
        try:
            while not self.finished.keys() >= left:
                self.step()
                self._check_not_lost(ids)
            return [self.finished.pop(i) for i in ids]
        finally:
            self._abandon(left)

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Serve them, with an event for each token as it comes; leaving the loop cancels what is left."""
        index = {i: place for place, i in enumerate(self.submit(requests, streamed=True))}
        try:
            while index:
                self._check_not_lost(index)
                self.step()
                for i in [i for i in self.events if i in index]:
                    self._check_not_lost(index)  # others may step the engine between two events
                    done = self.finished.pop(i, None)
                    event = Event(i, index[i], *self.events.pop(i), done)
                    if done:
                        del index[i]
                    yield event
        finally:
            self._abandon(set(index))

    def _check_not_lost(self, ids) -> None:
        if min(ids) < self.lost_before:
            raise RuntimeError(
                "engine: these requests were ended by an error in a step that another caller "
                f"made ({self.error}); submit them again"
            )

    def _abandon(self, ids: set[int]) -> None:
        """Cancel what is left of these requests, and keep nothing of them."""
        self.cancelled |= ids & {s.id for s in (*self.live, *self.waiting)}
        if self.cancelled & ids:
            self._drop_cancelled()
        for i in ids:
            self.finished.pop(i, None), self.events.pop(i, None)

    def cancel(self, id: int) -> None:
        """End a request with the next step; what it has so far is its completion, "cancelled"."""
        if any(s.id == id for s in (*self.live, *self.waiting)):
            self.cancelled.add(id)

    # ---- a step ----

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every live row. Raises NonFiniteError, and forgets all requests, for NaN logits."""
        try:
            self._step()
        except BaseException as error:
            self.lost_before, self.error = next(self.ids), f"{type(error).__name__}: {error}"
            self._reset()
            self.cache.clear()  # of NaN, too, which a mask would not hide
            raise

    def _step(self) -> None:
        if self.cancelled:
            self._drop_cancelled()
        put_back = False
        if self.n_holes and (self.waiting or not self.cache.can_step()):
            self._close_up()
        while self.live and not self.cache.can_step():
            self._put_back()
            put_back = True
        n = len(self.live)
        logits = self.cache.decode(self.tokens[:n]) if n else None
        if self.waiting and not put_back:
            new = self._admit()
            if new is not None:
                logits = new if logits is None else torch.cat([logits, new])
        n = len(self.live)
        if n == 0:
            return
        self._make_columns()
        t = self.t
        sampled = sample_tokens(
            logits, self.temperature, self._uniforms(), self.filters, self.top_n
        )
        for column, value in zip(self.out.values(), sampled, strict=False):
            if (
                column.ndim == 3
            ):  # they may have been made for a row that wanted more of the likeliest
                column = column[..., : self.top_n]
            column[:n, t] = value
        tokens = self.tokens[:n]
        tokens.copy_(sampled[0])
        self.t += 1
        stopped = (tokens[:, None] == self.stop_ids).any(1).cpu().numpy()
        if self.speaking:
            self._speak(stopped)
        if self.next_limit == t or stopped.any():
            gone = np.flatnonzero(stopped | (self.rows["limit"][:n] == t))
            for row, reason in zip(
                gone.tolist(), np.where(stopped[gone], "stop", "length").tolist(), strict=True
            ):
                self._finish(self.live[row], self._take_out(row), reason)
            self._leave(gone)

    def _uniforms(self) -> torch.Tensor:
        """[B] random numbers of this column: functions of (seed, place in the sequence)."""
        if self.uniforms is None or self.t >= self.uniforms_end:
            columns = self.t + torch.arange(AHEAD, device=self.device)
            seeds, origin = (
                torch.from_numpy(self.rows[name][: len(self.live)]).to(self.device)[:, None]
                for name in ("seed", "origin")
            )
            self.uniforms, self.uniforms_end = (
                counter_uniform(seeds, columns - origin),
                self.t + AHEAD,
            )
        return self.uniforms[:, AHEAD - (self.uniforms_end - self.t)]

    def _make_columns(self) -> None:
        """Room for one more column; old ones go when no live row needs them."""
        wanted = self.top_n
        have = self.out["top_ids"].shape[2] if "top_ids" in self.out else 0
        if self.out and self.t < self.out["tokens"].shape[1] and have >= wanted:
            return
        n, first = len(self.live), int(self.rows["birth"][: len(self.live)].min())
        kept, old = self.t - first, self.out
        shape = (self.max_rows, max(128, 2 * kept))
        self.out = {
            "tokens": torch.zeros(shape, dtype=torch.int64, device=self.device),
            "logp": torch.zeros(shape, device=self.device),
        }
        if wanted:
            self.out["top_ids"] = torch.zeros(*shape, wanted, dtype=torch.int64, device=self.device)
            self.out["top_logp"] = torch.zeros(*shape, wanted, device=self.device)
        for name in self.out.keys() & old.keys():
            part = old[name][:n, first : self.t]
            if part.ndim == 3:  # rows that want more of the likeliest than before have just begun
                part = F.pad(part, (0, max(0, wanted - part.shape[2])))[..., :wanted]
            self.out[name][:n, :kept] = part
        for name in ("birth", "origin", "limit"):
            self.rows[name] -= first
        self.uniforms_end -= first
        self.next_limit -= first
        self.t = kept

    def _speak(self, stopped: np.ndarray) -> None:
        """Text and events of the rows that have stop texts or are streamed."""
        tokens = self.tokens[: len(self.live)].tolist()
        for row in self.speaking:
            s, new = self.live[row], ""
            if s.text:
                new = s.text.feed(tokens[row])
                stopped[row] |= s.text.stopped
            if s.streamed:
                self._tell(s.id, [tokens[row]], new)

    # ---- rows begin and end ----

    def _admit(self) -> torch.Tensor | None:
        """Prefill what may begin now; the new rows' logits."""
        n, budget = len(self.live), self.tokens_per_step - len(self.live)
        room = self.max_rows - n
        # a prefill costs a pass over the weights: it is worth that for a sixteenth of the rows
        if n and room < min(len(self.waiting), -(-self.max_rows // 16)):
            return None
        place_of: dict[tuple, int] = {}  # the prompts that begin now
        which, n_tokens, longest, pages = [], 0, 0, 0
        for s in islice(self.waiting, room):
            length, first = len(s.prefix), s.prefix not in place_of
            n_tokens += length * first
            longest = max(longest, length)
            pages += length // PAGE * first + (length % PAGE > 0)  # full ones are shared
            too_much = n_tokens > budget or not self.cache.fits(len(which) + 1, longest, pages)
            if too_much and (n or which):  # one alone always goes: `submit` has seen to that
                break
            which.append(place_of.setdefault(s.prefix, len(place_of)))
        if not which:
            return None
        which = np.array(which)
        new = [self.waiting.popleft() for _ in which]
        logits = self.cache.admit(np.arange(n, n + len(new)), list(place_of), which)
        self.live += new
        width = max([self.rows["stop_ids"].shape[1], *(len(s.request.stop_ids) for s in new)])
        wider = width - self.rows["stop_ids"].shape[1]
        self.rows["stop_ids"] = np.pad(
            self.rows["stop_ids"], ((0, 0), (0, wider)), constant_values=-1
        )
        of_each = []
        for s in new:
            r, n_done = s.request, sum(len(part[0]) for part in s.parts)
            of_each.append(
                (
                    signed(r.seed),
                    self.t,
                    self.t - len(s.prefix),
                    self.t + r.max_new_tokens - n_done - 1,
                    s.id,
                    r.temperature,
                    r.top_k,
                    r.top_p,
                    r.min_p,
                    r.top_logprobs,
                    [*r.stop_ids, *[-1] * (width - len(r.stop_ids))],
                )
            )
        for name, values in zip(self.rows, zip(*of_each, strict=True), strict=True):
            self.rows[name][n : n + len(new)] = values
        self.uniforms = None
        self._rows_changed()
        return logits[torch.from_numpy(which).to(self.device)]

    def _rows_changed(self) -> None:
        """What a step needs to know of all live rows together."""
        n, rows = len(self.live), self.rows
        if n == 0:
            return

        def on_device(name):
            return torch.from_numpy(rows[name][:n]).to(self.device)

        t = rows["temperature"][:n]
        alike = t.min() == t.max()
        self.temperature = self.live[0].request.temperature if alike else on_device("temperature")
        filtered = rows["top_k"][:n].any() or rows["top_p"][:n].min() < 1 or rows["min_p"][:n].any()
        self.filters = tuple(map(on_device, ("top_k", "top_p", "min_p"))) if filtered else None
        self.top_n = int(rows["top_n"][:n].max())
        self.stop_ids = on_device("stop_ids")
        self.next_limit = int(rows["limit"][:n].min())
        self.speaking = [row for row, s in enumerate(self.live) if s.text or s.streamed]

    def _take_out(self, row: int) -> tuple:
        """(tokens, logp, top ids, top log-probs) of a live row since its birth."""
        columns, n = (
            slice(int(self.rows["birth"][row]), self.t),
            self.live[row].request.top_logprobs,
        )
        # on a CPU the same memory: PyTorch's own indexing takes many times as long as NumPy's
        rows = [x.numpy()[row] if x.is_cpu else x[row].cpu().numpy() for x in self.out.values()]
        found = [x[columns] for x in rows[:2]] + [x[columns, :n] for x in rows[2:] if n]
        return tuple(x.copy() for x in found)

    def _tell(self, id: int, tokens: list[int], text: str) -> None:
        """Add to the event that the next reader of the stream gets."""
        before, so_far = self.events.get(id, ([], ""))
        self.events[id] = before + tokens, so_far + text

    def _finish(self, s: _Sequence, last: tuple | None, reason: str) -> None:
        parts = [*s.parts, *([last] if last else [])] or [
            (np.zeros(0, np.int64), np.zeros(0, np.float32))
        ]
        joined = [np.concatenate(x) for x in zip(*parts, strict=True)]
        tail = s.text.feed(None) if s.text else ""
        if s.streamed:
            self._tell(s.id, [], tail)
        text = s.text.shown if s.request.stop else None
        self.finished[s.id] = Completion(
            joined[0], joined[1], reason, self.version, text, *joined[2:]
        )

    def _leave(self, gone: np.ndarray) -> None:
        """Free these rows. Where a plain draw for them is all that it costs the others, they are holes for a
        while: they go on, from nothing, for nobody."""
        for row in gone.tolist():
            self.live[row] = HOLE
        n, self.n_holes = len(self.live), self.n_holes + len(gone)
        plain = (
            self.filters is None
            and not self.top_n
            and not isinstance(self.temperature, torch.Tensor)
        )
        if self.waiting or not plain or self.cache.width(n - self.n_holes) < self.cache.width(n):
            return self._close_up()
        self.cache.empty(gone)
        self.rows["birth"][gone], self.rows["limit"][gone], self.stop_ids[gone] = self.t, NEVER, -1
        self.next_limit = int(self.rows["limit"][:n].min())

    def _close_up(self) -> None:
        """The last live rows move into the holes."""
        gone, self.n_holes = np.flatnonzero([s is HOLE for s in self.live]), 0
        n = len(self.live) - len(gone)
        to = gone[gone < n]
        stays = np.ones(len(self.live), bool)
        stays[gone] = False
        by = n + np.flatnonzero(stays[n:])
        for a, b in zip(to.tolist(), by.tolist(), strict=True):
            self.live[a] = self.live[b]
        del self.live[n:]
        if len(to):
            for x in self.rows.values():
                x[to] = x[by]
            to_d, by_d = torch.from_numpy(to).to(self.device), torch.from_numpy(by).to(self.device)
            for x in (
                self.tokens,
                *self.out.values(),
                *([] if self.uniforms is None else [self.uniforms]),
            ):
                x[to_d] = x[by_d]
            self.cache.move(to, by)
        if self.uniforms is not None:
            self.uniforms = self.uniforms[:n]
        self.cache.cut(n)
        self._rows_changed()

    def _put_back(self) -> None:
        """The youngest sequence waits again, with what it has."""
        row = int(self.rows["order"][: len(self.live)].argmax())
        s = self.live[row]
        s.parts.append(self._take_out(row))
        s.prefix = (*s.prefix, *s.parts[-1][0].tolist())
        self.waiting.appendleft(s)
        self._leave(np.array([row]))

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        for s in [s for s in self.waiting if s.id in self.cancelled]:
            self._finish(s, None, "cancelled")
        self.waiting = deque(s for s in self.waiting if s.id not in self.cancelled)
        gone = [row for row, s in enumerate(self.live) if s.id in self.cancelled]
        for row in gone:
            self._finish(self.live[row], self._take_out(row), "cancelled")
        if gone:
            self._leave(np.array(gone))
        self.cancelled.clear()
