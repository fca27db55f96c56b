"""A prompt that knows which part of it a user wrote.

A template such as R1-Zero's spells `<think>`, and for some models that is a control token (Qwen3).
In the frame it stands for the token. In the question it does not, because whoever wrote the
question must not write control tokens. So the two are told apart until the text becomes ids
(`encode_prompts` in chat_template.py).
"""


class FramedText(str):
    """A question between two texts of ours; to all else it is the whole as plain text."""

    parts: tuple[str, str, str]
    """(before, question, after)."""

    def __new__(cls, before: str, question: str, after: str) -> "FramedText":
        made = super().__new__(cls, f"{before}{question}{after}")
        made.parts = (before, question, after)
        return made

    def __getnewargs__(self) -> tuple[str, str, str]:
        """What a copy in another process is made from."""
        return self.parts
