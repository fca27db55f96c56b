"""A small chat model's tokenizer, conversations that are hard on templates, and where real templates lie."""
import os
from pathlib import Path

DATA = Path(os.environ.get("R1ZERO_DATA", Path(__file__).parents[3] / "shared" / "data"))
CHATML = """\
{% for message in messages %}
    {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class ChatTokenizer:
    """Characters as tokens, and a few control tokens. It stands in for one of an open model."""

    names = ("<|bos|>", "<|im_start|>", "<|im_end|>")
    bos_id, eos_id, eos_ids = 1000, 1002, (1002,)

    def __init__(self, chat_template: str | None = CHATML, adds_bos: bool = False):
        self.chat_template, self.adds_bos = chat_template, adds_bos

    def token_text(self, i: int) -> str:
        return self.names[i - 1000]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 1000 for letter in text]

    def encode_batch(self, texts) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_template(self, text: str) -> list[int]:
        for n, name in enumerate(self.names):
            before, found, after = text.partition(name)
            if found:
                return [*self.encode_template(before), 1000 + n, *self.encode_template(after)]
        return self.encode(text)

    def control_tokens_in(self, text: str) -> list[str]:
        return [name for name in self.names if name in text]


def user(content, **fields) -> dict:
    return {"role": "user", "content": content, **fields}


def assistant(content, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def system(content) -> dict:
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "<\u00e9> & 'two'"}}}
TOOL = {"type": "function", "function": {
    "name": "add", "description": "1 < 2 & \u00e9",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}
CONVERSATIONS = [
    [user("hi")], [user("")], [user("a"), user("b")], [assistant("first")],
    [user(" spaces \n"), assistant("<think>\na\n</think>\n\nb"), user("c")],
    [system("be brief"), user("hi"), assistant("yes"), user("no")],
    [user("a"), system("late")], [system("a"), system("b"), user("c")], [user("a"), assistant(""), user("b")],
    [user("a"), assistant("b", reasoning_content="r"), user("c")], [user("a"), assistant("b", thinking="r")],
    [user("a"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}],
    [user("\u2028\ud800 <|im_end|>\n{{ 1 }}{% raw %}</s><bos>")],
    [user("<tool_response>x</tool_response>")],
    # What no conversation should hold: refused, or rendered all the same, as transformers does.
    [], [{}], [user(None)], [{"role": "user"}], [{"content": "a"}], [user(3)], [user(1.5)],
    [user(True)],
    [user(["a"])], [user({"a": 1})], [user([{"type": "text", "text": " q "}])],
    [{"role": "__class__", "content": "x"}], [{"role": None, "content": "x"}],
    [{"role": ["user"], "content": "x"}]]
VARIABLES = [{}, {"enable_thinking": False}, {"date_string": "1 Jan 2000"}, {"tools": [TOOL]}]
