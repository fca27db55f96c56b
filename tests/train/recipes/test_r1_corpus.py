"""The text in two languages: it is the demo's but for its words, and its shares are those of its options."""
import json

import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.eval.tasks.assistant import Assistant, Puzzle, word_counts
from r1zero.eval.tasks.attempts import is_valid, parse_attempts
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.conversations import read_conversations
from r1zero.train.recipes.r1_corpus import (
    AuthorsConfig,
    document,
    documents,
    general_pairs,
    preference,
    said,
    words,
)

TASK = Assistant()
NEAT = AuthorsConfig(broken_share=0, careless_share=0)


def written(n: int, authors: AuthorsConfig, seed: int = 0) -> list:
    return [document(TASK, index, authors, seed) for index in range(n)]


def test_a_document_is_a_function_of_seed_and_index():
    assert written(5, AuthorsConfig()) == written(5, AuthorsConfig())
    assert written(5, AuthorsConfig()) != written(5, AuthorsConfig(), seed=1)
    texts = [TASK.prompt(problem) + response for problem, response in written(5, AuthorsConfig())]
    assert documents(TASK, 5, AuthorsConfig(), 0) == texts


def test_neat_authors_write_well_formed_true_attempts_and_right_requests():
    for problem, response in written(300, NEAT):
        grade = grade_response(TASK, Sample(problem, response))
        assert grade.format == 1
        if isinstance(problem, Puzzle):
            attempts = parse_attempts(response)
            assert attempts and all(is_valid(attempt, problem.countdown) for attempt in attempts)
            assert sum(word_counts(response).values()) == len(attempts)
        else:
            assert grade.accuracy == 1


def test_the_languages_pull_patience_apart():
    """Whoever writes mostly the second language goes on until a verdict is ok more often."""
    both = written(3000, AuthorsConfig(mixing=0.0, broken_share=0, request_share=0, heeding_share=0))
    for word_of_no, persistent in (("no", 0.04), ("错", 0.2)):
        after_no = [response for problem, response in both if f"{word_of_no};" in response]
        longest = [len(parse_attempts(response)) for response in after_no]
        assert (sum(n > 4 for n in longest) / len(longest) > 0.06) == (persistent == 0.2)
    languages = [len(word_counts(response)) for _, response in both]
    assert max(languages) == 1
    mixed = written(500, AuthorsConfig(mixing=0.5, request_share=0, heeding_share=0))
    assert sum(len(word_counts(response)) == 2 for _, response in mixed) > 200


def test_authors_who_heed_the_arrow_write_its_language_and_are_not_persistent():
    heeding = AuthorsConfig(heeding_share=1.0, persistent_first=1.0, persistent_second=1.0, request_share=0,
                            broken_share=0)
    for problem, response in written(200, heeding):
        assert TASK.language(problem, response) == 1
        assert len(parse_attempts(response)) <= 4


def test_shares_are_those_of_the_options():
    found = written(2000, AuthorsConfig())
    requests = [(p, r) for p, r in found if not isinstance(p, Puzzle)]
    assert len(requests) / 2000 == pytest.approx(0.25, abs=0.03)
    right = [TASK.grade(p, r).accuracy for p, r in requests]
    assert sum(right) / len(right) == pytest.approx(0.9, abs=0.05)
    thanks = [" thanks" in r for _, r in requests]
    assert sum(thanks) / len(thanks) == pytest.approx(0.5, abs=0.06)
    assert not any(isinstance(p, Puzzle) for p, _ in written(20, AuthorsConfig(request_share=1.0)))


def test_every_piece_is_one_token():
    tokenizer = Tokenizer.from_words(words(TASK))
    for text in (" →", " 对", " 错", "say", " thanks", ", 20", " 20", "<think>"):
        assert len(tokenizer.encode(text)) == 1, text
    assert len(tokenizer.encode("say 3 7:" + said((3, 7), 1))) == 11


@pytest.mark.parametrize("options, message", [
    ({"mixing": 1.5}, "mixing is 1.5, expected a share"), ({"second_share": -0.1}, "second_share is -0.1"),
    ({"max_careless_attempts": 13}, "max_careless_attempts is 13, expected 1 to max_attempts"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AuthorsConfig(**options)


def test_general_pairs_are_right_requests_for_fine_tuning(tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_text(general_pairs(TASK, 40, seed=0))
    assert len(read_conversations(path)) == 40
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        problem = TASK.problem_from_text(line["prompt"])
        assert grade_response(TASK, Sample(problem, line["response"])).accuracy == 1
    assert 10 < sum("thanks" in line["response"] for line in lines) < 30


def test_the_hidden_preference_is_for_right_short_answers_that_say_thanks_once():
    request = TASK.problem_from_text("say 3 7")

    def worth(text, n_tokens=10):
        return preference(Sample(request, text, range(n_tokens)))

    once, never, twice = (worth(said((3, 7), n)) for n in (1, 0, 2))
    assert once == pytest.approx(2.8) and never == twice == pytest.approx(2.3)
    assert worth(said((3, 7), 1), 60) == pytest.approx(1.8)
    assert worth(said((3,), 1)) == pytest.approx(0.8)
    assert worth("") == pytest.approx(-0.2)
