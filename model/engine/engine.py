"""The generation engine: continuous batching over one key/value cache, for training, evaluation and
chat.

    engine = Engine(model, tokenizer)
    completions = engine.generate([Request(prompt, max_new_tokens=64, seed=1), ...])
    for event in engine.stream(requests): ...        # tokens and text as they come
    engine.cancel(event.id)

`Engine._step` is the whole idea. Who is in the batch is decided in scheduler.py, what each row of
it asks for and has sampled lies in rows.py and output.py, and keys and values lie in slots.py or
pages.py. All requests may be served by any caller's steps: a stream and a batch can share one
engine.

Weights come in with `refresh()`, and must not change while requests are being served.

Left out: chunked prefill, prefixes shared between groups, speculative decoding.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Collection, Iterator
from itertools import count

import numpy as np
import torch

from ..lora import adapters_of, merged_bytes, merged_copy, refresh_merged
from ..routes import route_bytes
from ..transformer import Transformer
from .cache import (
    CPU_CACHE,
    TOKENS_PER_STEP,
    Cache,
    gpu_cache_bytes,
    step_bytes,
    tokens_within,
)
from .pages import Pages
from .requests import Completion, Event, Request, check_requests
from .rows import Rows
from .scheduler import Scheduler
from .sequence import Sequence
from .slots import Slots
from .text import TextStream


class Engine:
    """Serves requests with one model.

    Raises ValueError for requests that cannot be served and NonFiniteError for NaN logits.
    `generate` and `stream` raise RuntimeError where an error in another caller's step has ended
    their requests.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer=None,
        *,
        max_rows: int = 256,
        tokens_per_step: int = TOKENS_PER_STEP,
        cache_tokens: int | None = None,
        paged: bool | None = None,
        longest: int | None = None,
        reserve: int = 0,
        keep_routes: bool = False,
    ):
        """tokenizer: needed for stop texts and for the text of streams.

        max_rows: sequences that are decoded at one time.
        tokens_per_step: tokens decoded and prefilled in one step, but never less than one prompt.
        cache_tokens: size of the cache. None is enough for `max_rows` sequences of `longest` tokens
            (None: max_seq_len), within 1 GiB on a CPU, and on a GPU within 85 % of the free memory
            less `reserve` bytes and an estimate of what a step needs beside the cache (step_bytes
            in cache.py); never less than one sequence of max_seq_len.
        paged: True is pages, False is slots. None is slots where the compiled loops of a CPU can
            serve the model, and pages elsewhere.
        keep_routes: each Completion has the experts of its tokens, if the model is a mixture.
        """
        if max_rows < 1 or tokens_per_step < 1:
            raise ValueError(
                f"engine: max_rows is {max_rows}, tokens_per_step {tokens_per_step}; expected 1 "
                "or more"
            )
        if cache_tokens is not None and cache_tokens < 1:
            raise ValueError(f"engine: cache_tokens is {cache_tokens}; expected 1 or more, or None")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device
        self.max_rows, self.tokens_per_step = max_rows, tokens_per_step
        self.token_bytes = model.cache_bytes_per_token
        if keep_routes and model.config.moe is not None:
            self.token_bytes += route_bytes(model.config)
        with torch.inference_mode():
            # A model with adapters is decoded as one without, whose weights they are added to.
            decoded = self.decoded = merged_copy(model) if adapters_of(model) else model
            if paged is None:
                paged = not Slots.serves(decoded)
            self.cache: Cache = (
                Pages(decoded, max_rows, keep_routes) if paged else Slots(decoded, max_rows)
            )
            # Free memory is read when the cache has made its copy of the weights, if any.
            self.cache_tokens = cache_tokens or self._cache_tokens(longest, reserve)
            self.cache.allocate(self.cache_tokens)
        self.version = 0
        self._ids = count()
        self._lost_before, self._error = 0, ""  # requests with ids below are gone; what ended them
        self._reset()

    def _cache_tokens(self, longest: int | None, reserve: int) -> int:
        n_bytes: float = CPU_CACHE
        config = self.model.config
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            # One prompt alone may be longer than a step's tokens.
            longest_prompt = min(longest or config.max_seq_len, config.max_seq_len)
            n_tokens = max(self.tokens_per_step, longest_prompt)
            step = step_bytes(config, self.model.compute_dtype, n_tokens, self.max_rows)
            n_bytes = gpu_cache_bytes(free, reserve, step)
        return tokens_within(n_bytes, self.token_bytes, self.max_rows, longest, config.max_seq_len)

    def _reset(self) -> None:
        """Forget all requests."""
        self.rows = Rows(self.max_rows, self.device)
        self.scheduler = Scheduler(self.cache, self.rows, self.max_rows, self.tokens_per_step)
        self.completed: dict[int, Completion] = {}
        """Completions by request id, until their caller takes them."""
        self._cancelled: set[int] = set()
        self._events: dict[int, tuple[list[int], str]] = {}  # of streams: new tokens and text

    def plan(self) -> str:
        """What the cache takes, for people."""
        kind = "pages" if isinstance(self.cache, Pages) else "slots, allocated as they are needed"
        size = self.cache_tokens * self.token_bytes / 2**20
        plan = (
            f"key/value cache: up to {self.cache_tokens:,} tokens x {self.token_bytes:,} bytes = "
            f"{size:,.0f} MiB in {kind}; at most {self.max_rows} sequences at a time, "
            f"{self.tokens_per_step:,} tokens per step"
        )
        copied = self.cache.copy_bytes + merged_bytes(self.model)
        if copied:
            plan += f"; the copy of the weights takes {copied / 2**20:,.0f} MiB"
        return plan

    @property
    def n_unfinished(self) -> int:
        """Requests that are being served, running or waiting."""
        return self.scheduler.n_unfinished

    # ---- weights ----

    def refresh(self, version: int | None = None) -> None:
        """Take the trainer's weights as they are now.

        On a GPU the engine decodes from a copy in the compute dtype, unless that is the weights'
        own. The copy is rewritten in place, since CUDA graphs hold its addresses.

        On a CPU it reads the trainer's tensors where they lie, and `submit` finds them again before
        the first request: there a change is seen even without refresh(), which only counts.
        Matrices with adapters are copied on any device: the copy has the adapters added to them.

        version: number of these weights, for each Completion; None is the next one.
        Raises ValueError while requests are being served: one answer, one set of weights.
        """
        if self.n_unfinished:
            raise ValueError(
                f"engine: refresh() while {self.n_unfinished} requests are being served; let them "
                "end, or cancel them"
            )
        if self.device.type != "cpu":
            self._take_weights()
        self.version = self.version + 1 if version is None else version

    @torch.inference_mode()
    def _take_weights(self) -> None:
        """Rewrite the copy of the weights, or find the trainer's tensors."""
        if self.decoded is not self.model:
            refresh_merged(self.decoded, self.model)
        self.cache.refresh()

    # ---- requests in, completions out ----

    def submit(self, requests: Collection[Request], streamed: bool = False) -> list[int]:
        """Queue requests for `step`; their ids.

        Raises ValueError, and queues none, if one of them cannot be served.
        """
        check_requests(self.model, requests, self.tokenizer)
        self._check_cache_size(requests)
        # On a CPU the trainer may have replaced its tensors. To find them again costs next to
        # nothing without adapters, so the newest are always read.
        if self.device.type == "cpu" and not self.n_unfinished:
            self._take_weights()
        new = []
        prefixes: dict[int, tuple[int, ...]] = {}  # the samples of a group share theirs
        for request in requests:
            prompt = request.prompt
            if id(prompt) not in prefixes:
                prefixes[id(prompt)] = tuple(map(int, prompt))
            has_text = request.stop or (streamed and self.tokenizer)
            text = TextStream(self.tokenizer, request.stop) if has_text else None
            sequence = Sequence(next(self._ids), request, prefixes[id(prompt)], text, streamed)
            new.append(sequence)
        self.scheduler.waiting += new
        return [sequence.id for sequence in new]

    def _check_cache_size(self, requests: Collection[Request]) -> None:
        longest = max(requests, key=lambda r: len(r.prompt) + r.max_new_tokens)
        needed = self.cache.needed(len(longest.prompt) + longest.max_new_tokens)
        if needed > self.cache_tokens:
            raise ValueError(
                f"engine: a prompt of {len(longest.prompt)} tokens and max_new_tokens "
                f"{longest.max_new_tokens} need a cache of {needed} tokens, but it has "
                f"{self.cache_tokens}; give the engine cache_tokens={needed} or more"
            )

    def generate(self, requests: Collection[Request]) -> list[Completion]:
        """Serve them all; completions in the order of the requests."""
        ids = self.submit(requests)
        left = set(ids)
        try:
            while not self.completed.keys() >= left:
                self.step()
                self._check_not_lost(ids)
            return [self.completed.pop(i) for i in ids]
        finally:
            self._abandon(left)

    def stream(self, requests: Collection[Request]) -> Iterator[Event]:
        """Serve them, with an event for each token as it comes.

        Leaving the loop cancels those that have not ended.
        """
        index_of = {i: index for index, i in enumerate(self.submit(requests, streamed=True))}
        try:
            while index_of:
                self._check_not_lost(index_of)
                self.step()
                for i in [i for i in self._events if i in index_of]:
                    self._check_not_lost(index_of)  # others may step the engine between two events
                    index, completion = index_of[i], self.completed.pop(i, None)
                    tokens, text = self._events.pop(i)
                    if completion:
                        del index_of[i]
                    yield Event(i, index, tokens, text, completion)
        finally:
            self._abandon(set(index_of))

    def cancel(self, id: int) -> None:
        """End a request with the next step; its completion is what it has so far, "cancelled"."""
        if any(sequence.id == id for sequence in self.scheduler.unfinished()):
            self._cancelled.add(id)

    def _check_not_lost(self, ids: Collection[int]) -> None:
        if min(ids) < self._lost_before:
            raise RuntimeError(
                "engine: these requests were ended by an error in a step that another caller "
                f"made ({self._error}); submit them again"
            )

    def _abandon(self, ids: set[int]) -> None:
        """Cancel those of these requests that have not ended, and keep nothing of any."""
        unfinished = ids & {sequence.id for sequence in self.scheduler.unfinished()}
        if unfinished:
            self._cancelled |= unfinished
            self._drop_cancelled()
        for i in ids:
            self.completed.pop(i, None)
            self._events.pop(i, None)

    # ---- a step ----

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every running request.

        Raises NonFiniteError for NaN logits. After this or any other error all requests are
        forgotten.
        """
        try:
            self._step()
        except BaseException as error:
            self._lost_before = next(self._ids)
            self._error = f"{type(error).__name__}: {error}"
            self._reset()
            self.cache.clear()  # of NaN as well, which masked attention would still read
            raise

    def _step(self) -> None:
        scheduler, rows = self.scheduler, self.rows
        if self._cancelled:
            self._drop_cancelled()

        # Room: every row is about to write one token to the cache. Where it is full, the youngest
        # sequences go back to the queue.
        preempted = scheduler.make_room()

        # Decode: the newest token of every row [B] gives the logits [B, V] of the next one.
        logits = self.cache.decode(rows.newest) if rows.n else None

        # Prefill: waiting prompts begin, as many as fit, in rows behind the others. None does where
        # room had to be made for those that run.
        if scheduler.waiting and not preempted:
            new_logits = scheduler.admit()
            if logits is None:
                logits = new_logits
            elif new_logits is not None:
                logits = torch.cat([logits, new_logits])
        if logits is None:
            return

        # Sample: one token per row, with a random number of its own; it is collected in the output.
        rows.sample(logits)

        # Finish: a sequence ends with a stop token, a stop text, or its last token. Its row is
        # released, and its completion waits for its caller.
        stopped = rows.reached_stop()
        if scheduler.emitting:
            self._emit_text(stopped)
        ended = rows.ended(stopped)
        if len(ended):
            sequences = scheduler.release(ended)
            for sequence, by_stop in zip(sequences, stopped[ended].tolist(), strict=True):
                self._finish(sequence, "stop" if by_stop else "length")

    def _emit_text(self, stopped: np.ndarray) -> None:
        """Add to the text and the events of rows that have any; a stop text sets `stopped` [B]."""
        tokens = self.rows.newest.tolist()
        for row in self.scheduler.emitting:
            sequence, text = self.scheduler.running[row], ""
            if sequence.text:
                text = sequence.text.feed(tokens[row])
                stopped[row] |= sequence.text.stopped
            if sequence.streamed:
                self._record_event(sequence.id, [tokens[row]], text)

    def _record_event(self, id: int, tokens: list[int], text: str) -> None:
        """Add to the event that the next reader of the stream gets."""
        earlier_tokens, earlier_text = self._events.get(id, ([], ""))
        self._events[id] = (earlier_tokens + tokens, earlier_text + text)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """Make its completion, which waits until its caller takes it."""
        tail = sequence.text.feed(None) if sequence.text else ""
        if sequence.streamed:
            self._record_event(sequence.id, [], tail)
        self.completed[sequence.id] = sequence.completion(reason, self.version)

    @torch.inference_mode()
    def _drop_cancelled(self) -> None:
        for sequence in self.scheduler.remove(self._cancelled):
            self._finish(sequence, "cancelled")
        self._cancelled.clear()
