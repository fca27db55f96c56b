"""A request while it is being served, waiting or running, and the tokens that it has so far."""

from dataclasses import dataclass, field

import numpy as np

from .requests import Completion, Request
from .text import TextStream


@dataclass
class Sequence:
    """A request that waits or runs."""

    id: int
    request: Request
    prefix: tuple[int, ...]
    """What a prefill reads: the prompt, and the tokens from before it was preempted."""
    text: TextStream | None
    """The text of its tokens, for requests with stop texts and for streams."""
    streamed: bool
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """(tokens, logp), or (tokens, logp, top_ids, top_logp), of each time that it was in a row."""
    routes: np.ndarray | None = None
    """[n, L, K], the experts of the n tokens that were read, the prompt's among them, until it left
    its last row; None if none are kept."""

    @property
    def emits(self) -> bool:
        """Does somebody want each token as it comes?"""
        return self.streamed or self.text is not None

    @property
    def n_collected(self) -> int:
        """Tokens that it has from before it was preempted."""
        return sum(len(tokens) for tokens, *_ in self.parts)

    def completion(self, reason: str, version: int) -> Completion:
        """What it has sampled, all parts joined."""
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        parts = self.parts or [nothing]  # it was cancelled before it began
        tokens, logp, *likeliest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        text = self.text.shown if self.request.stop else None
        return Completion(tokens, logp, reason, version, text, *likeliest, routes=self.routes)
