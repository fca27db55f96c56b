"""A conversation of several turns with a chat model, through its own template.

Every line is a user's turn. What the model answers becomes a part of the conversation, and the
whole of it is rendered anew for the next turn, as chat models were trained: some templates leave
out the thoughts of earlier turns (Qwen3's). A turn that is broken off, or refused, is forgotten.

Nothing is dropped from a conversation without a word. When it has grown too long for the model, it
takes no more turns, and says so; `new` begins another one.

A line that spells a control token of the model is refused (model/chat_template.py). An answer that
spells one in letters would be read as that token when it is rendered for the next turn. So it is
shown, and then forgotten with its line.
"""

from ...eval.harness import Sampled
from ...eval.sampler import ModelSampler
from ...model.chat_template import Message, check_spelling, encode_messages, forged
from .main import printable
from .responses import labelled, printed, remarks

NEW = "new"
STARTED = "(a new conversation)"


class Conversation:
    """What was said so far, and the model that says the next thing."""

    greeting = f"type a message; {NEW} begins another conversation, quit or Ctrl-D ends"

    def __init__(self, sampler: ModelSampler, system: str | None = None):
        """system: the system's message, which every conversation begins with; None for none."""
        self.sampler = sampler
        self.beginning: list[Message] = []
        if system is not None:
            self.beginning.append({"role": "system", "content": system})
        self.messages = list(self.beginning)

    def read(self, line: str) -> None:
        """Raise ValueError for a line that no turn can be."""
        check_spelling(self.sampler.tokenizer, line, "the line")

    def reply(self, line: str) -> str:
        """The line and the answer to it. Raises ValueError as `prompt` and the sampler do."""
        if line.strip() == NEW:
            return f"{self.restart()}\n"
        prompt = self.prompt(line)
        *_, (_, sampled) = self.sampler.stream_tokens(prompt)
        notes = self.keep(line, sampled)
        answer = labelled([("", sampled.text)]) + (f"\n{notes}" if notes else "")
        return f"{printable(line)}\n{answer}\n"

    def stream(self, line: str) -> None:
        """Print the answer token by token. Raises ValueError likewise."""
        if line.strip() == NEW:
            print(self.restart())
            return
        sampled = printed(self.sampler.stream_tokens(self.prompt(line)))
        if notes := self.keep(line, sampled):
            print(notes)

    def restart(self) -> str:
        """Forget what was said, and say so."""
        self.messages = list(self.beginning)
        return STARTED

    def prompt(self, line: str) -> list[int]:
        """The token ids of the conversation with one more turn of the user.

        Raises ValueError for a line that spells a control token, for what the template refuses, and
        for a conversation that leaves no room for an answer.
        """
        asked = [*self.messages, {"role": "user", "content": line}]
        ids = encode_messages(self.sampler.tokenizer, asked)
        room = self.sampler.room
        if len(ids) <= room:
            return ids
        if self.messages == self.beginning:
            advice = "give a shorter message, or lower --max-new-tokens"
        else:
            advice = f"nothing was dropped; type {NEW} to begin another conversation"
        raise ValueError(
            f"the conversation would have {len(ids)} tokens, and the model has room for {room} "
            f"beside the {self.sampler.max_new_tokens} of an answer; {advice}"
        )

    def keep(self, line: str, sampled: Sampled) -> str:
        """Add a turn and the answer to it; returns the remarks on them.

        A turn whose answer forges a control token is left out.
        """
        notes = remarks(None, sampled)
        if spelled := forged(self.sampler.tokenizer, sampled.text, sampled.tokens):
            left_out = (
                f"(this turn is forgotten: its answer spells {ascii(spelled)} in letters, which "
                "would be read as the model's control token)"
            )
            return f"{notes}\n{left_out}" if notes else left_out
        self.messages.append({"role": "user", "content": line})
        self.messages.append({"role": "assistant", "content": sampled.text})
        return notes
