"""Split off model/generation.py."""

import codecs


class TextStream:
    """Token by token to text, cut at the first stop text."""

    def __init__(self, tokenizer, stop: tuple[str, ...]):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.shown, self.held = "", ""

    def feed(self, token: int | None) -> str:
        """What can be shown now; None ends the text."""
        piece = b"" if token is None else self.tokenizer.token_bytes(token)
        self.held += self.decoder.decode(piece, final=token is None)
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found and not self.stopped:
            self.held, self.stopped = self.held[: min(found)], True
        waits = 0
        if token is not None and not self.stopped:
            beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
            waits = max((len(part) for part in beginnings if self.held.endswith(part)), default=0)
        new, self.held = self.held[: len(self.held) - waits], self.held[len(self.held) - waits :]
        self.shown += new
        if self.stopped:
            self.decoder.reset()
        return new
