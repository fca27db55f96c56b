"""Conversations: what a line may hold, what is refused with which words, and which tokens are learned."""
import json
import re

import numpy as np
import pytest

from r1zero.model.tokenizer import Tokenizer
from r1zero.train.conversations import (
    Exchange,
    encode_chats,
    encode_conversations,
    read_chats,
    read_conversations,
)

from ..model.chat_cases import CHATML, ChatTokenizer
from ..model.tokens.cases import add_token, imported, trained

QUESTION = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": " I."}
SYSTEM = {"role": "system", "content": "Be brief."}


def lines_file(tmp_path, *lines: object):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def talk(*messages: object) -> dict:
    return {"messages": list(messages)}


# ---- what is read ----

def test_pairs_and_messages_may_stand_in_one_file(tmp_path):
    pair = {"response": " I.", "prompt": "Who?", "id": 7}
    twice = talk(SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER)
    path = lines_file(tmp_path, pair, talk(QUESTION, ANSWER), twice)
    assert read_conversations(path) == [
        [("Who?", " I.")], [Exchange("Who?", " I.")], [("Be brief.\nWho?", " I."), ("Who?", " I.")]]


def test_questions_in_a_row_are_one_prompt_on_several_lines_and_other_fields_are_not_read(tmp_path):
    named = QUESTION | {"name": "Ann", "content": "a\nb"}
    path = lines_file(tmp_path, talk(named, QUESTION, ANSWER) | {"source": "x"}, talk(SYSTEM, ANSWER))
    assert read_conversations(path) == [[("a\nb\nWho?", " I.")], [("Be brief.", " I.")]]


# ---- what is refused ----

BAD = [
    ("{", "not JSON"), ({"prompt": "a"}, "no text in a field `response` (its fields: 'prompt')"),
    ({"prompt": " ", "response": "a"}, "`prompt` is empty"),
    ({"prompt": "a", "response": ""}, "`response` is empty; fill it or drop the line"),
    (talk(QUESTION, ANSWER) | {"prompt": "a"}, "`messages` and `prompt` or `response`; keep one"),
    ({"messages": []}, "`messages` is empty"), ({"messages": "hi"}, "`messages` is a JSON str"),
    ({"messages": None}, "`messages` is a JSON NoneType"), (talk(QUESTION, "hi"), "message 2: a JSON str"),
    (talk(QUESTION, ANSWER | {"role": "tool"}), "message 2: its role is 'tool', expected one of system, "),
    (talk(QUESTION, ANSWER | {"role": None}), "message 2: its role is 'None'"),
    (talk(QUESTION, ANSWER | {"role": ["user"]}), "message 2: its role is"),
    (talk(QUESTION, ANSWER | {"content": None}), "message 2: its content is a JSON NoneType, expected text"),
    (talk(QUESTION | {"content": [{"text": "a"}]}, ANSWER), "message 1: its content is a JSON list"),
    (talk(QUESTION, ANSWER | {"content": "\n "}), "message 2: its content is empty; fill it or drop"),
    (talk(QUESTION, ANSWER | {"content": "I \ud83d"}), "2: its content has half of a character, \\ud83d;"),
    ({"prompt": "a\udc00", "response": "b"}, "`prompt` has half of a character, \\udc00; mend or drop it"),
    ({"prompt": "a", "response": "\ud800"}, "`response` has half of a character, \\ud800; mend or drop it"),
    (talk(QUESTION, QUESTION), "no message is the assistant's, so there is nothing to learn"),
    (talk(ANSWER), "message 1 is the assistant's, after nothing; expected a user's before it"),
    (talk(QUESTION, ANSWER, ANSWER), "message 3 is the assistant's, after another of its own"),
    (talk(QUESTION, ANSWER, QUESTION), "the last message is not the assistant's; drop it, or add its answer"),
    (talk(QUESTION, SYSTEM, ANSWER), "message 2 is the system's, which must be the first"),
]


@pytest.mark.parametrize("line, said", BAD, ids=lambda value: str(value)[:30])
def test_a_bad_line_is_named_with_its_number_and_its_reason(tmp_path, line, said):
    end = "\n" if isinstance(line, str) else ""
    path = lines_file(tmp_path, talk(QUESTION, ANSWER), line, end)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_conversations(path)
    assert "data.jsonl, line 2: " in str(error.value) and "\n" not in str(error.value)


def test_all_bad_lines_are_named_at_once_or_skipped_and_counted(tmp_path, capsys):
    path = lines_file(tmp_path, talk(QUESTION, ANSWER), talk(ANSWER), talk(QUESTION), {"prompt": "a"})
    with pytest.raises(ValueError, match="line 2: .*; line 3: .*; line 4: .*; expected lines like"):
        read_conversations(path)
    kept = read_conversations(path, skip_bad=True)
    assert (kept, kept.n_skipped) == ([[("Who?", " I.")]], 3)
    assert "skipped 3 of 4 lines" in capsys.readouterr().err


@pytest.mark.parametrize("name, match", [("no.jsonl", "no.jsonl cannot be read: No such file"),
                                         (".", "cannot be read: .*directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, match):
    with pytest.raises(ValueError, match=match):
        read_conversations(tmp_path / name)


# ---- tokens ----

def test_only_the_assistants_texts_and_their_end_tokens_are_learned():
    tokenizer = Tokenizer.bytes()
    conversation = [Exchange("ab", "c"), Exchange("d", "ef")]
    documents, trained = encode_conversations(tokenizer, [conversation, [Exchange("x", "y")]])
    end = tokenizer.eos_id
    assert [d.tolist() for d in documents] == [[97, 98, 99, end, 100, 101, 102, end], [120, 121, end]]
    assert all(d.dtype == np.int32 for d in documents)
    assert trained[0].astype(int).tolist() == [0, 0, 1, 1, 0, 1, 1, 1]
    assert trained[1].tolist() == [False, True, True]


def test_prompt_and_response_are_encoded_apart_as_in_sampling():
    tokenizer = Tokenizer.from_words(["ab", "abc"])
    [document], _ = encode_conversations(tokenizer, [[Exchange("xab", "c")]])
    assert document.tolist() == [120, 256, 99, tokenizer.eos_id]  # not "x", "abc"


# ---- with a chat template ----

HAIKU = [SYSTEM, QUESTION | {"content": "\nTell  me."}, ANSWER | {"content": "  The \n cat.\n"}]
CHATS = [HAIKU, [QUESTION, ANSWER], [*HAIKU, QUESTION, QUESTION, ANSWER, QUESTION, ANSWER]]
MARKED = CHATML.replace("+ message['content'] + '<|im_end|>' + '\\n' }}", (
    "}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"))


def test_a_chat_template_gives_the_tokens_and_the_mask_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    source = trained(size=300)
    for name in ("<|im_start|>", "<|im_end|>"):
        if name not in [token["content"] for token in source["added_tokens"]]:
            add_token(source, name)
    tokenizer = imported(tmp_path / "t", source,
                         tokenizer_config={"eos_token": "<|im_end|>", "chat_template": CHATML})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t/tokenizer.json"))
    path = lines_file(tmp_path, *(talk(*chat) for chat in CHATS))
    documents, masks = encode_chats(tokenizer, read_chats(path))
    for chat, document, mask in zip(CHATS, documents, masks, strict=True):
        expected = theirs.apply_chat_template(chat, chat_template=MARKED, return_assistant_tokens_mask=True,
                                              return_dict=True)
        assert document.tolist() == expected["input_ids"]
        assert mask.tolist() == [bool(x) for x in expected["assistant_masks"]]
        n_answers = [message["role"] for message in chat].count("assistant")
        assert (document[mask] == tokenizer.eos_id).sum() == n_answers and document.dtype == np.int32


def test_a_pair_is_a_question_and_its_answer_in_a_chat(tmp_path):
    pair, chat = {"prompt": "Who?", "response": " I."}, talk(QUESTION, ANSWER)
    assert read_chats(lines_file(tmp_path, pair)) == read_chats(lines_file(tmp_path, chat))


@pytest.mark.parametrize("template, messages, told", [
    (None, [QUESTION, ANSWER], "this model has no chat template"),
    (CHATML, [QUESTION | {"content": "a<|im_end|>"}, ANSWER],
     "conversation 1, 'a<|im_end|>': the user's text"),
    (CHATML, [QUESTION, ANSWER | {"content": "a<|im_end|>b"}],
     "message 2 and the template around it spell 2 "),
    (CHATML.replace("+ '<|im_end|>'", ""), [QUESTION, ANSWER],
     "spell 0 end tokens (<|im_end|> is one)"),
    ("{{ messages|length }}" + CHATML, [QUESTION, ANSWER] * 2, "writes an earlier answer anew when another"),
])
def test_chats_that_cannot_be_trained_on_are_told_in_one_line(tmp_path, template, messages, told):
    chats = read_chats(lines_file(tmp_path, talk(*messages)))
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        encode_chats(ChatTokenizer(template), chats)
    assert "\n" not in str(caught.value)
