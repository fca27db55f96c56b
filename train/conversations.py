"""Conversations for fine-tuning: lines of JSON -> prompts and responses -> tokens.

    {"prompt": "Who is there?", "response": " Nay, answer me."}
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "Who is there?"},
                  {"role": "assistant", "content": " Nay, answer me."}]}

A file may hold both kinds of lines. By default texts stand as they are, and roles have no tokens of
their own: a line break joins system and user messages that follow each other, and the end token
follows each assistant's message. So one question and its answer are the same tokens whichever way
they are written, and `r1zero chat` asks as training did. With --chat the model's chat template
writes each conversation (`encode_chats`).

Only what the assistant says is trained on, the end token included. Left out: tool calls, content
that is not text, and other fields of a message, which are not read.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..eval.lines import Kept, json_object, parse_lines, read_lines
from ..eval.response import quoted
from ..model.chat_template import (
    PROMPT_DATE,
    check_has_template,
    check_message_spelling,
    render,
)
from ..model.tokenizer import Tokenizer
from .data import texts_of

ROLES = ("system", "user", "assistant")
EXPECTED = (
    'lines like {"prompt": "...", "response": "..."} or {"messages": [{"role": "user", "content": '
    '"..."}, {"role": "assistant", "content": "..."}]}'
)

# In a text quotes are escaped, so this is a field of the line.
CUT_OFF = re.compile(rb'"finish_reason":\s*"length"')


class Exchange(NamedTuple):
    """What the assistant is told and asked, and what it says."""

    prompt: str
    response: str


class Message(NamedTuple):
    """One message of a conversation, with the fields of its JSON."""

    role: str
    content: str


Conversation = list[Exchange]


# ---- files to text ----


def read_conversations(path: str | Path, skip_bad: bool = False) -> Kept[Conversation]:
    """The conversations of a .jsonl file; a pair of prompt and response is one of one exchange.

    Raises ValueError, which names up to ten bad lines with their reasons; see `parse_lines`.
    """
    lines = read_lines(path)
    return parse_lines(path, lines, conversation_of, EXPECTED, skip_bad).values()


def cut_off_in(path: str | Path) -> int:
    """How many answers in a file were cut off at the limit of tokens, as `r1zero collect` notes
    it."""
    return sum(bool(CUT_OFF.search(line.data)) for line in read_lines(path))


def conversation_of(line: str) -> Conversation:
    """The conversation in a line of JSON. Raises ValueError for a line that is none."""
    record = json_object(line)
    has_pair = any(field in record for field in Exchange._fields)
    if "messages" not in record:
        return [exchange_of(line)]
    if has_pair:
        raise ValueError("it has `messages` and `prompt` or `response`; keep one of the two kinds")
    return exchanges_of(messages_of(record["messages"]))


def exchange_of(line: str) -> Exchange:
    """The fields `prompt` and `response` of a line; ValueError for one that is empty."""
    texts = texts_of(line, Exchange._fields)
    for field, text in zip(Exchange._fields, texts, strict=True):
        if not text.strip():
            raise ValueError(f"`{field}` is empty; fill it or drop the line")
        check_characters(f"`{field}`", text)
    return Exchange(*texts)


def check_characters(what: str, text: str) -> None:
    """Raise ValueError for half of an escaped character, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{what} has half of a character, {half}; mend or drop it") from None


def messages_of(value: Any) -> list[Message]:
    """The field `messages` of a line. Raises ValueError with the number of a bad message."""
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"a JSON {type(value).__name__}"
        raise ValueError(f"`messages` is {kind}, expected a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        try:
            messages.append(message_of(message))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def message_of(value: Any) -> Message:
    """One message: its role, and its content, which is text."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ValueError(f"its role is {quoted(str(role))}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"its content is a JSON {type(content).__name__}, expected text")
    if not content.strip():
        raise ValueError("its content is empty; fill it or drop the line")
    check_characters("its content", content)
    return Message(role, content)


def exchanges_of(messages: list[Message]) -> Conversation:
    """The messages as exchanges. Raises ValueError for an order that says nothing to learn from."""
    exchanges, asked = [], []
    for number, (role, content) in enumerate(messages, 1):
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is the system's, which must be the first")
        if role != "assistant":
            asked.append(content)
            continue
        if not asked:
            before = "another of its own" if exchanges else "nothing"
            raise ValueError(
                f"message {number} is the assistant's, after {before}; expected a user's before it"
            )
        exchanges.append(Exchange("\n".join(asked), content))
        asked = []
    if not exchanges:
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    if asked:
        raise ValueError("the last message is not the assistant's; drop it, or add its answer")
    return exchanges


def read_chats(path: str | Path, skip_bad: bool = False) -> Kept[list[Message]]:
    """The same conversations as `read_conversations`, as messages."""
    lines = read_lines(path)
    return parse_lines(path, lines, chat_of, EXPECTED, skip_bad).values()


def chat_of(line: str) -> list[Message]:
    """The messages in a line of JSON. Raises ValueError as `conversation_of` does."""
    [first, *_] = conversation_of(line)
    record = json_object(line)
    if "messages" in record:
        return messages_of(record["messages"])
    return [Message("user", first.prompt), Message("assistant", first.response)]


# ---- text to tokens ----


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(int32 tokens of each conversation; for each a bool array, True where a token is trained on).

    Both go to DocumentBatches. Prompts and responses are encoded separately, because in sampling a
    prompt is encoded before its response exists.
    """
    # All texts at once, in the order in which they are taken up again below.
    texts = [text for conversation in conversations for pair in conversation for text in pair]
    encoded = iter(tokenizer.encode_batch(texts))

    documents, trained = [], []
    for conversation in conversations:
        tokens, is_trained = [], []
        for _ in conversation:
            prompt = next(encoded)
            response = [*next(encoded), tokenizer.eos_id]
            tokens += prompt + response
            is_trained += [False] * len(prompt) + [True] * len(response)
        documents.append(np.array(tokens, np.int32))
        trained.append(np.array(is_trained))
    return documents, trained


# ---- text to tokens, with a chat template ----


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[list[Message]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As `encode_conversations`, written by the model's chat template.

    Raises ValueError, with the number of the conversation, for a tokenizer without a template, and
    for what the template refuses.
    """
    check_has_template(tokenizer)
    encoded = []
    for number, messages in enumerate(chats, 1):
        try:
            encoded.append(encode_chat(tokenizer, messages))
        except ValueError as error:
            start = quoted(messages[0].content[:60])
            raise ValueError(f"conversation {number}, {start}: {error}") from error
    documents = [np.array(tokens, np.int32) for tokens, _ in encoded]
    return documents, [np.array(is_trained) for _, is_trained in encoded]


def encode_chat(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """(the tokens of a conversation; for each, whether it is of an answer or its end token)."""
    whole = rendered(tokenizer, messages, False)
    pieces, done = [], 0
    for start, end in answers_in(tokenizer, messages, whole):
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    pieces.append((whole[done:], False))

    # Piece by piece: in sampling, too, a prompt is encoded before its answer exists.
    tokens, is_trained = [], []
    for text, is_answer in pieces:
        ids = tokenizer.encode_template(text)
        tokens += ids
        is_trained += [is_answer] * len(ids)
    return tokens, is_trained


def answers_in(
    tokenizer: Tokenizer, messages: list[Message], whole: str
) -> Iterator[tuple[int, int]]:
    """Where each answer of a conversation lies in its text, the end token included."""
    ends = [tokenizer.token_text(token) for token in tokenizer.eos_ids]
    for n, message in enumerate(messages):
        if message.role != "assistant":
            continue
        # 1. It lies between the prompt that asks for it and the conversation up to it.
        before = rendered(tokenizer, messages[:n], True)
        through = rendered(tokenizer, messages[: n + 1], False)
        if not (through.startswith(before) and whole.startswith(through)):
            raise ValueError(
                "the model's chat template writes an earlier answer anew when another message "
                "follows, so that no tokens are those that were sampled; keep one answer per "
                "conversation, or leave out --chat"
            )
        # 2. What the template writes behind the end token is no part of it.
        answer = through[len(before) :]
        found = [end for end in ends for _ in range(answer.count(end))]
        if len(found) != 1:
            raise ValueError(
                f"message {n + 1} and the template around it spell {len(found)} end tokens "
                f"({', '.join(ends)} is one), expected one, behind the answer"
            )
        yield len(before), len(before) + answer.index(found[0]) + len(found[0])


def rendered(tokenizer: Tokenizer, messages: list[Message], asks: bool) -> str:
    """The text of messages. asks: up to where the next answer begins."""
    fields = [message._asdict() for message in messages]
    for message in fields:
        check_message_spelling(tokenizer, message)
    return render(tokenizer, fields, asks, now=lambda: PROMPT_DATE)
