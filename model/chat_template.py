"""From messages to the text and the tokens that a chat model was trained on.

    messages = [{"role": "user", "content": "Hello"}]
    render(tokenizer, messages)                 the text, as Hugging Face makes it
    encode_messages(tokenizer, messages)        its token ids
    encode_prompt(tokenizer, "3 7 9 -> 13")     the ids of a prompt of any model

The template belongs to the tokenizer and is run in a sandbox (chat_sandbox.py). Turns are told
apart by control tokens such as <|im_end|>. A user who types one would speak as somebody else, and
so would the result of a tool, so every message but the assistant's is refused if it spells one.
What the assistant said may hold tokens of its own, such as <think>; whether it wrote them as tokens
or spelled them in letters is for the caller to see (`forged`).

Some templates write today's date into the text (Llama 3.1 and 3.2). The prompts of a run must not
change with the day, so `encode_prompt` has one date for all days. It is the date that Llama's
template falls back to.

Left out: tools, pictures, and `continue_final_message`. What was sampled is never rendered again
to be trained on, because a template may change it (Qwen3's drops the thoughts of earlier turns).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from .framed_text import FramedText
from .tokenizer import Tokenizer

PROMPT_DATE = datetime(2024, 7, 26)
TRUSTED_ROLE = "assistant"
# The names under which templates look for what a model thought. The first is the usual one.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; other fields are handed to the template too."""


# ---- messages to text ----


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    now: Callable[[], datetime] = datetime.now,
    **variables: Any,
) -> str:
    """The text of a conversation, equal to transformers' `apply_chat_template(tokenize=False)`.

    add_generation_prompt: end where the assistant's next message begins. now: the clock of
    strftime_now. variables: what a template may ask for besides, such as enable_thinking=False or
    date_string="26 Jul 2024"; data of JSON's kinds.

    Raises ValueError for a tokenizer without a template, for messages that are no list of objects,
    and for whatever the template refuses or fails at.
    """
    check_has_template(tokenizer)
    values = {
        **special_variables(tokenizer),
        "tools": None,
        "documents": None,
        **plain_data(variables),
        "messages": [checked_message(message, n) for n, message in enumerate(messages, 1)],
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": lambda form: now().strftime(form),
    }
    if not values["messages"]:
        raise ValueError("the conversation is empty; give at least one message")
    try:
        from .chat_sandbox import run_template

        return run_template(tokenizer.chat_template, values)
    except ImportError as error:
        raise ValueError(
            f"chat templates need jinja2: pip install 'jinja2>=3.1.6' ({error})"
        ) from None
    except Exception as error:  # a template is somebody's program, and may raise anything
        kind = type(error).__name__
        raise ValueError(
            f"the model's chat template refused the messages: {error or kind} ({kind})"
        ) from error


def check_has_template(tokenizer: Tokenizer) -> None:
    """ValueError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model has no chat template: it is a base model, or its chat_template.jinja is "
            "missing; leave out --chat, or put the file beside its tokenizer.json"
        )


def special_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that templates write, spelled."""
    spelled = {"eos_token": tokenizer.token_text(tokenizer.eos_id)}
    if tokenizer.bos_id is not None:
        spelled["bos_token"] = tokenizer.token_text(tokenizer.bos_id)
    return spelled


def checked_message(message: Message, number: int) -> dict[str, Any]:
    """A message as plain data, without fields that are null; ValueError for one that is none."""
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise ValueError(f"message {number} is a {kind}, expected an object with role and content")
    given = {name: value for name, value in plain_data(message).items() if value is not None}
    # Templates call the thoughts by different names; all of them find the same text.
    thoughts = next((given[name] for name in THOUGHTS if name in given), None)
    if thoughts is None:
        return given
    return {"thinking": thoughts, **given, "reasoning_content": thoughts}


def plain_data(value: Any) -> Any:
    """A copy of data of JSON's kinds; ValueError for any other, whose methods a template could
    call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(name): plain_data(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(inner) for inner in value]
    kind = type(value).__name__
    raise ValueError(f"a chat template got a {kind}, expected text, numbers, lists and objects")


# ---- text to tokens ----


def check_spelling(tokenizer: Tokenizer, text: Any, whose: str = "the text") -> None:
    """ValueError if what somebody typed spells a control token, which is named."""
    found = tokenizer.control_tokens_in(str(text))
    if found:
        raise ValueError(
            f"{whose} spells {ascii(found[0])}, a control token of this model, and would seem to "
            "come from somebody else; write it in another way"
        )


def texts_in(value: Any) -> Iterator[str]:
    """All texts in data of JSON's kinds, but for the names of fields."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
    elif value is not None:
        yield str(value)


def check_message_spelling(tokenizer: Tokenizer, message: Message) -> None:
    """ValueError for a message that spells a control token in any field; not the assistant's."""
    if not isinstance(message, Mapping) or message.get("role") == TRUSTED_ROLE:
        return
    role = message.get("role")
    whose = f"the {role}'s text" if str(role).isidentifier() else "a message"
    for text in texts_in(message):
        check_spelling(tokenizer, text, whose)


def forged(tokenizer: Tokenizer, text: str, tokens: Sequence[int]) -> str | None:
    """A control token that the text of an answer spells more often than its tokens hold it.

    Rendered again, it would be read as one. None if there is no such.
    """
    for spelled in tokenizer.control_tokens_in(text):
        control = tokenizer.encode_template(spelled)[-1]
        if text.count(spelled) > list(tokens).count(control):
            return spelled
    return None


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    now: Callable[[], datetime] = datetime.now,
    **variables: Any,
) -> list[int]:
    """The token ids of a conversation, up to where the assistant's next message begins.

    The template writes the beginning-of-text token itself, if the model has one. Raises ValueError
    as `render` does, and for a message that spells a control token and is not the assistant's.
    """
    for message in messages:
        check_message_spelling(tokenizer, message)
    return tokenizer.encode_template(render(tokenizer, messages, now=now, **variables))


def encode_safely(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, in which no question makes a control token; its frame may.

    Equal to Hugging Face's ids of the whole where the question spells no control token.
    """
    before, question, after = text.parts if isinstance(text, FramedText) else ("", text, "")
    # The question and the frame around it, up to the next control tokens, are encoded as one text:
    # a token may reach from the one into the other, as the space before a word does.
    ends = [before.rfind(name) + len(name) for name in spelled_in(tokenizer, before)]
    starts = [after.find(name) for name in spelled_in(tokenizer, after)]
    end, start = max(ends, default=0), min(starts, default=len(after))
    middle = f"{before[end:]}{question}{after[:start]}"
    return [
        *tokenizer.encode_template(before[:end]),
        *tokenizer.encode(middle),
        *tokenizer.encode_template(after[start:]),
    ]


def spelled_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """The control tokens in a text that stand there letter by letter."""
    return [name for name in tokenizer.control_tokens_in(text) if name in text]


def encode_as_message(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt as a user's message, up to where the answer begins.

    ValueError for a control token, unless the frame of a `FramedText` spells it and the question
    does not.
    """
    before, question, after = text.parts if isinstance(text, FramedText) else ("", text, "")
    check_spelling(tokenizer, question, "the user's text")
    ours = [*tokenizer.control_tokens_in(before), *tokenizer.control_tokens_in(after)]
    if not set(tokenizer.control_tokens_in(text)) <= set(ours):
        check_spelling(tokenizer, text, "the user's text")
    messages = [{"role": "user", "content": str(text)}]
    return tokenizer.encode_template(render(tokenizer, messages, now=lambda: PROMPT_DATE))


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], chat: bool) -> list[list[int]]:
    """`encode_prompt` of each text."""
    if chat:
        return [encode_as_message(tokenizer, text) for text in texts]
    if any(isinstance(text, FramedText) for text in texts):
        encoded = [encode_safely(tokenizer, text) for text in texts]
    else:
        encoded = tokenizer.encode_batch(texts)
    if tokenizer.adds_bos:
        return [[tokenizer.bos_id, *ids] for ids in encoded]
    return encoded


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool = False) -> list[int]:
    """The token ids of a prompt: the one place where its text becomes ids.

    chat: the text is a user's message, and the template is put around it. Otherwise the model
    continues the text, in which nothing but the frame of a `FramedText` makes a control token; ids
    begin with bos if the model was trained so. Raises ValueError as `encode_messages` does.
    """
    [ids] = encode_prompts(tokenizer, [text], chat)
    return ids


def encode_problems(tokenizer: Tokenizer, texts: Sequence[str], chat: bool) -> list[list[int]]:
    """`encode_prompts` of a list of problems; an error names the problem by its number, from 0."""
    if chat:
        check_has_template(tokenizer)
    encoded = []
    for number, text in enumerate(texts):
        try:
            encoded.append(encode_prompt(tokenizer, text, chat))
        except ValueError as error:
            raise ValueError(
                f"problem {number} (the first is 0), {ascii(text[:60])}: {error}"
            ) from error
    return encoded
