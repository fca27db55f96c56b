"""The toy world of two languages and plain requests: prompts, grades and languages by hand."""
import pytest

from r1zero.eval.response import Sample, grade_response
from r1zero.eval.tasks.assistant import Assistant, Puzzle, Request
from r1zero.eval.tasks.base import is_held_out
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem

TASK = Assistant()
PUZZLE = Puzzle(CountdownProblem((3, 7, 9), 13), "zh")


def test_puzzles_requests_and_languages_take_turns():
    problems = TASK.problems("train", 8)
    assert [type(problem) for problem in problems] == [Puzzle, Request] * 4
    assert [problem.language for problem in problems[::2]] == ["en", "zh"] * 2
    puzzles = Assistant(kinds="puzzles", languages="zh").problems("train", 4)
    assert [puzzle.countdown for puzzle in puzzles] == [puzzle.countdown for puzzle in problems[::2]]
    assert {puzzle.language for puzzle in puzzles} == {"zh"}
    requests = Assistant(kinds="requests").problems("train", 4)
    assert requests == problems[1::2]


def test_requests_may_begin_late():
    late = Assistant(requests_from=3)
    kinds = [type(problem) for problem in late.problems("train", 7)]
    assert kinds == [Puzzle] * 4 + [Request, Puzzle, Request]
    assert late.problems("test", 8) == TASK.problems("test", 8)
    puzzles = [problem for problem in late.problems("train", 7) if isinstance(problem, Puzzle)]
    assert puzzles == Assistant(kinds="puzzles").problems("train", 5)
    assert late.problem("train", 4) == Assistant(kinds="requests").problem("train", 0)


def test_puzzles_are_countdowns_and_have_its_splits():
    puzzles = Assistant(kinds="puzzles")
    assert puzzles.size("test") == Countdown().size("test")
    assert TASK.size("test") == 2 * Countdown().size("test")
    assert Assistant(kinds="requests").size("test") is None
    for split in ("train", "test"):
        found = [puzzle.countdown for puzzle in puzzles.problems(split, 50)]
        assert found == Countdown().problems(split, 50)
        for request in Assistant(kinds="requests").problems(split, 200):
            assert is_held_out(("say", request.numbers), 0.2) == (split == "test")
            assert 2 <= len(request.numbers) <= 5 and max(request.numbers) <= 20


def test_what_a_prompt_says_can_be_typed_again():
    assert Assistant.prompt(PUZZLE) == "3 7 9 → 13"
    assert Assistant.prompt(Request((3, 7))) == "say 3 7:"
    for problem in TASK.problems("train", 20):
        assert Assistant.problem_from_text(Assistant.prompt(problem)) == problem


@pytest.mark.parametrize("record, prompt", [
    ({"say": [3, "7"]}, "say 3 7:"),
    ({"numbers": [3, 7, 9], "target": 13}, "3 7 9 -> 13"),
    ({"numbers": [3, 7, 9], "target": 13, "language": "zh"}, "3 7 9 → 13"),
])
def test_a_record_is_a_problem(record, prompt):
    assert Assistant.prompt(Assistant.problem_from_record(record)) == prompt


@pytest.mark.parametrize("record, message", [
    ({"say": 3}, "\"say\" is '3', expected a list of 1 to 5 numbers"),
    ({"say": [1] * 6}, "expected a list of 1 to 5 numbers"),
    ({"say": []}, "expected a list of 1 to 5 numbers"),
    ({"numbers": [3], "target": 3, "language": "fr"}, "expected en or zh"),
    ({"numbers": [3], "target": 3, "language": None}, "expected en or zh"),
])
def test_a_record_that_is_no_problem_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Assistant.problem_from_record(record)


@pytest.mark.parametrize("options, message", [
    ({"kinds": "sums"}, "kinds is 'sums'; it must be one of puzzles, requests, both"),
    ({"languages": "fr"}, "languages is 'fr'; it must be one of en, zh, both"),
    ({"n_numbers": 9}, "n_numbers is 9"), ({"requests_from": -1}, "requests_from is -1"),
])
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Assistant(**options)


@pytest.mark.parametrize("answer, accuracy", [
    ("3, 7, 9", 1), ("3, 7, 9 thanks", 1), ("3, 7, 9 thanks thanks", 1), (" 3, 7, 9 ", 1),
    ("3, 7", 0), ("3, 9, 7", 0), ("3 7 9", 0), ("3,7,9", 0), ("thanks", 0), ("", 0), ("3, 7, 9thanks", 0),
    ("thanks 3, 7, 9", 0), ("3, 7, 9, 9", 0), ("03, 7, 9", 0),
])
def test_a_request_is_right_if_its_numbers_are_said_in_order(answer, accuracy):
    grade = Assistant.grade(Request((3, 7, 9)), f"<think></think><answer>{answer}</answer>")
    assert grade.accuracy == accuracy and grade.answer == answer


def test_a_request_without_an_answer_block_or_with_another_question_behind_it():
    request = Request((3, 7))
    assert Assistant.grade(request, "3, 7").accuracy == 0
    ran_on = "<think></think><answer>3, 7</answer>{}<think></think><answer>4</answer>"
    for question in ("\nsay 4", "say 4", "\n3 7 -> 10", "3 7 → 10"):
        assert Assistant.grade(request, ran_on.format(question)).accuracy == 1
    assert Assistant.grade(request, ran_on.format("")).accuracy == 0


def test_a_puzzle_is_graded_as_countdown_whatever_its_language():
    for language in ("en", "zh"):
        puzzle = Puzzle(PUZZLE.countdown, language)
        for answer in ("9-3+7", "9+3-7", "13"):
            response = f"<think></think><answer>{answer}</answer>"
            assert Assistant.grade(puzzle, response) == Countdown.grade(puzzle.countdown, response)
    assert Assistant.same_answer("9-3+7", "(9-3)+7") and not Assistant.same_answer("9-3+7", "9+3-7")
    assert Assistant.same_answer("3, 7 thanks", "3, 7") and not Assistant.same_answer("3, 7", "7, 3")


@pytest.mark.parametrize("thoughts, share", [
    ("9-7=2,2+3=5,5-13=-8 错;9-3=6,6+7=13,13-13=0 对", 1),
    ("9-7=2,2+3=5,5-13=-8 no;9-3=6,6+7=13,13-13=0 对", 0.5),
    ("9-7=2,2+3=5,5-13=-8 no", 0), ("9-7=2", 1), ("", 1),
    ("1 no;1 no;1 no;1 错", 0.25),
])
def test_the_language_is_that_of_the_verdicts(thoughts, share):
    response = f"<think>{thoughts}</think><answer>ok</answer>"  # the answer is no thought
    assert Assistant.language(PUZZLE, response) == share
    assert Assistant.language(Request((3,)), response) == 1
    n_words = thoughts.count("o") + thoughts.count("对") + thoughts.count("错")
    if n_words:
        in_english = Puzzle(PUZZLE.countdown, "en")
        assert Assistant.language(in_english, response) == 1 - share


@pytest.mark.parametrize("response", [
    "<think></think>9-3=6,6+7=13,13-13=0 ok<answer>9-3+7</answer>",  # closed at once
    "<think>9-7=2 错</think> no<answer>9-3+7</answer> ok",
    "<answer></answer><think>9-3=6,6+7=13 ok</think><answer>9-3+7</answer>",  # an empty block before
    "<answer>9-3+7</answer><think>ok</think><answer>",  # a block that is not closed
    "no<answer>ok</answer>",
])
def test_thoughts_in_the_other_language_count_wherever_they_stand(response):
    assert Assistant.language(PUZZLE, response) < 0.5


def test_only_requests_are_for_a_reward_model():
    assert Assistant.judged_by_model(Request((3,))) and not Assistant.judged_by_model(PUZZLE)


@pytest.mark.parametrize("text", ["", "<answer>", "</answer>" * 3, "\ud800", "say " * 1000, "<think>" * 500,
                                  " thanks" * 100_000, "<answer>" + " thanks" * 20_000 + "</answer>"])
def test_hostile_text_is_no_answer_and_takes_no_time(text):
    for problem in (PUZZLE, Request((3, 7))):
        assert grade_response(Assistant, Sample(problem, text)).accuracy == 0
        assert 0 <= Assistant.language(problem, text) <= 1
