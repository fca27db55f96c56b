"""What was sampled reaches the grader: how it ended, its special tokens, its padding, and where it ends."""
import re
import time

import pytest

from r1zero.eval.response import (
    MAX_SPACE_AROUND,
    MAX_SPACE_RUN,
    Sample,
    grade_response,
    own_response,
    parse_response,
    response_text,
)
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.model.tokenizer import Tokenizer

PROBLEM = CountdownProblem((3, 7, 9), 13)
RIGHT = "<think>t</think><answer>9-3+7</answer>"
BYTES = Tokenizer.bytes()
# A tokenizer with two end tokens and another special one, as open models have.
LARGE = Tokenizer("bytes", BYTES.pattern, BYTES.ranks, eos_ids=(257, 258), bos_id=256,
                  special_tokens={"<|begin|>": 256, "<|end|>": 257, "<|turn|>": 258, "<|tool|>": 259})


def grade(text, **more):
    return grade_response(Countdown, Sample(PROBLEM, text, **more))


# ---- how it ended ----

@pytest.mark.parametrize("reason", ["stop", "eos", None, "cancelled"])
def test_an_answer_that_ended_keeps_its_format(reason):
    assert (grade(RIGHT, finish_reason=reason).accuracy, grade(RIGHT, finish_reason=reason).format) == (1, 1)


def test_an_answer_that_was_cut_off_earns_no_format_and_its_block_counts():
    cut = grade(RIGHT, finish_reason="length")
    assert (cut.accuracy, cut.format, cut.answer) == (1.0, 0.0, "9-3+7")
    assert cut.why_format == "It was cut off at the token limit."
    broken = grade("<answer>9-3+7</answer>", finish_reason="length")
    assert broken.why_format == "It was cut off at the token limit. There is no <think> tag."


# ---- special tokens ----

@pytest.mark.parametrize("tokenizer", [BYTES, LARGE])
def test_only_the_end_token_that_stopped_it_is_left_out_of_the_text(tokenizer):
    ids = tokenizer.encode(RIGHT)
    assert response_text(tokenizer, ids) == RIGHT
    for end in tokenizer.eos_ids:
        name = tokenizer.name_of_special[end]
        assert response_text(tokenizer, [*ids, end]) == RIGHT
        assert response_text(tokenizer, [*ids, end, end]) == f"{RIGHT}{name}"
        assert response_text(tokenizer, [end, *ids]) == f"{name}{RIGHT}"
    assert response_text(tokenizer, []) == "" == response_text(tokenizer, [tokenizer.eos_id])


@pytest.mark.parametrize("special", LARGE.special_tokens)
def test_a_special_token_anywhere_but_in_the_thoughts_is_seen_by_the_grader(special):
    ids = LARGE.encode(RIGHT)
    for place in range(len(ids)):
        text = response_text(LARGE, [*ids[:place], LARGE.special_tokens[special], *ids[place:]])
        graded = grade(text)
        in_thoughts = len("<think>") <= place <= len("<think>t")
        assert special in text and (graded.accuracy + graded.format == 2) == in_thoughts


# ---- padding ----

@pytest.mark.parametrize("gap", [0, 1, 2, MAX_SPACE_AROUND])
def test_a_little_white_space_around_and_between_the_blocks_is_fine(gap):
    for space in (" ", "\n", "\r", "\t"):
        s = space * gap
        assert parse_response(f"{s}<think>a</think>{s}<answer>b</answer>{s}").well_formed


TEMPLATE = "<think> reasoning process here </think> <answer> answer here </answer>"  # of the paper
LOOPS = "".join("    " * n + f"for i{n} in x:\n" for n in range(1, 12))
CODE = f"def f(x):\n{LOOPS}\n\n{' ' * 48}pass\n"


@pytest.mark.parametrize("text", [TEMPLATE, f"<think>\n{CODE}</think>\n\n<answer>\n{CODE}\n</answer>\n"])
def test_the_papers_template_and_indented_code_are_well_formed(text):
    assert parse_response(text).well_formed


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n", "\xa0", "\u3000", "\x0b"])
def test_padding_with_white_space_is_not_paid_wherever_it_is(space):
    run = (space * (MAX_SPACE_RUN + 1))[: MAX_SPACE_RUN + 1]
    around = (space * (MAX_SPACE_AROUND + 1))[: MAX_SPACE_AROUND + 1]
    think, answer = "<think>a</think>", "<answer>c</answer>"
    for text in (f"<think>a{run}b</think>{answer}", f"<think>{run}</think>{answer}",
                 f"{think}<answer>c{run}</answer>", f"{around}{think}{answer}",
                 f"{think}{around}{answer}", f"{think}{answer}{around}"):
        response = parse_response(text)
        assert not response.well_formed and response.answer.startswith("c")
        assert "white space" in response.why or "There is text" in response.why
    assert parse_response(f"<think>a{run[1:]}b{run[1:]}</think><answer>c</answer>").well_formed


# ---- where a response ends ----

ASKS = "\nQuestion:"
QUESTION = re.compile(ASKS)


@pytest.mark.parametrize("text, own", [
    ("a\nQuestion: b", "a"), ("a", "a"), ("", ""), ("\nQuestion: b", ""), ("Question: b", "Question: b"),
    ("a\r\nQuestion: b\nQuestion: c", "a\r"), ("a\n Question: b", "a\n Question: b"),
    ("<think>x\nQuestion: b</think>c\nQuestion: d", "<think>x\nQuestion: b</think>c"),  # quoted in thoughts
    ("<think>x\nQuestion: b\n<think>y</think>", "<think>x"),  # the thoughts of the next question
    ("<think>x\nQuestion: b", "<think>x"), ("a\nQuestion: b<think>c</think>", "a"),
    ("</think>\nQuestion: b", "</think>"), ("</think><think>\nQuestion: b", "</think><think>")])
def test_a_response_ends_where_the_next_question_begins(text, own):
    assert own_response(text, QUESTION) == own


@pytest.mark.parametrize("text", ["<think>" * 10**5 + ASKS * 10**5, "\nQuestion" * 10**5, "</think>" * 10**6,
                                  "<think>" + "\n" * 10**6])
def test_finding_the_end_takes_linear_time(text):
    started = time.process_time()
    own_response(text, QUESTION)
    assert time.process_time() - started < 1.0
