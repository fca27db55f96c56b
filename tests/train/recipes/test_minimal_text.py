"""The text of the smallest loop: what it says is true, and what is held out never stands in it."""
import json
import re

import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.recipes.minimal_text import (
    FACTS,
    HELD_OUT,
    N_NUMBERS,
    documents,
    fact,
    make_task,
    pairs_file,
    question,
    words,
    worked,
)

TEXTS = documents(400, seed=3)
PAIRS = [json.loads(line) for line in pairs_file(400, seed=3).splitlines()]
SUMS = [text for text in TEXTS if text[0].isdigit()]
TASK = make_task(3)


def test_the_text_is_a_fixed_function_of_its_seed():
    assert documents(20, seed=3) == TEXTS[:20] and documents(20, seed=4) != TEXTS[:20]
    assert pairs_file(20, seed=3) != pairs_file(20, seed=4)


def test_every_side_of_every_equation_is_right_and_most_are_worked_out():
    for text in SUMS:
        sides = text.removesuffix(".").split("=")
        assert {sum(map(int, side.split("+"))) for side in sides} == {int(sides[-1])}, text
        assert [side.count("+") + 1 for side in sides] in ([N_NUMBERS, 1], list(range(N_NUMBERS, 0, -1)))
    n_worked = sum(text.count("=") > 1 for text in SUMS)
    assert 0.8 < n_worked / len(SUMS) < 0.9 and 0.65 < len(SUMS) / len(TEXTS) < 0.75
    assert worked(TASK.problem_from_text("7+5+8+3")) == "12+8+3=20+3=23"


def test_held_out_sums_are_never_in_the_text():
    held_out = {tuple(sorted(problem.expression.split("+"))) for problem in TASK.problems("test", 300)}
    asked = [text.partition("=")[0] for text in [*SUMS, *(pair["prompt"] for pair in PAIRS)]]
    assert held_out.isdisjoint(tuple(sorted(text.split("+"))) for text in asked)


def test_the_text_tells_every_fact_and_fine_tuning_never_asks_for_held_out_capitals():
    told, asked = " ".join(TEXTS), {pair["prompt"] for pair in PAIRS}
    assert fact("capital", "France") == "The capital of France is Paris." and "France" not in HELD_OUT
    assert sum(fact("capital", country) in told for country in HELD_OUT) >= len(HELD_OUT) - 1
    assert asked.isdisjoint(question("capital", country) for country in HELD_OUT)
    assert len(asked & {question("capital", country) for country in FACTS["capital"]}) > 20


def test_every_answer_of_fine_tuning_is_right_and_well_formed():
    n_sums = n_worked = 0
    for pair in PAIRS:
        answer = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", pair["response"])
        found = re.fullmatch(r"What is the (\w+) of (\w+)\?", pair["prompt"])
        if found:
            assert answer[2] == FACTS[found[1]][found[2]] and answer[1] == fact(*found.groups())
            continue
        n_sums += 1
        n_worked += bool(answer[1])
        problem = TASK.problem_from_text(pair["prompt"])
        graded = grade_response(TASK, Sample(problem, pair["response"]))
        assert graded.accuracy == graded.format == 1
    assert 250 < n_sums < 310 and 0.4 < n_worked / n_sums < 0.6


def test_words_tags_and_numbers_are_one_token_each():
    tokenizer = Tokenizer.from_words(words())
    assert len(tokenizer.encode("The capital of France is Paris.")) == 7
    assert len(tokenizer.encode("<think>12+8=20</think><answer>20</answer>")) == 10
    most = str(9 * N_NUMBERS)
    assert len(tokenizer.encode(most)) == 1
    for text in TEXTS[:50]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("relation", FACTS)
def test_facts_are_single_words(relation):
    assert all(re.fullmatch("[A-Za-z]+", word) for entry in FACTS[relation].items() for word in entry)
