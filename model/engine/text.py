"""The text of a sequence as its tokens come, up to the first stop text.

A token may end inside a character, and what looks like the beginning of a stop text may turn out to
be one. Both wait until it is known what they are, so the pieces that are shown add up to the text
and never have to be taken back.
"""

import codecs


class TextStream:
    """Token by token to text."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        """Has a stop text been reached?"""
        self.shown = ""
        """All that `feed` has returned."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not shown yet

    def feed(self, token: int | None) -> str:
        """Text that can be shown after one more token. None ends the text: then all of it is."""
        is_end = token is None
        piece = b"" if is_end else self.tokenizer.token_bytes(token)
        self._held += self._decoder.decode(piece, final=is_end)
        self._look_for_stop()

        # What may become a stop text waits, but not at the end.
        n_waiting = 0 if is_end or self.stopped else self._possible_stop()
        n_shown = len(self._held) - n_waiting
        new, self._held = self._held[:n_shown], self._held[n_shown:]
        self.shown += new

        if self.stopped:
            self._decoder.reset()  # half a character behind the stop text is never shown
        return new

    def _look_for_stop(self) -> None:
        """Cut the held text at the first stop text in it."""
        found = [self._held.find(stop) for stop in self.stop]
        found = [index for index in found if index >= 0]
        if found and not self.stopped:
            self.stopped = True
            self._held = self._held[: min(found)]

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        longest = 0
        for stop in self.stop:
            for n in range(1, len(stop)):
                if self._held.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest
