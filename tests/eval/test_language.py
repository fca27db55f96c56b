"""The share of words of the language that was asked for: by hand."""
import pytest

from r1zero.eval.language import consistency, main_script, words_by_script
from r1zero.eval.response import Sample, has_language, language_of
from r1zero.eval.tasks.assistant import Assistant
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem

CHINESE = "因此答案是"  # five characters


@pytest.mark.parametrize("text, counts", [
    ("So the answer is 42.", {"LATIN": 4}),
    ("x + y = 2 * z", {}),
    (r"\frac{1}{2} \times \sqrt{ab}", {"LATIN": 1}),  # ab alone
    (CHINESE, {"CJK": 5}),
    (f"So {CHINESE} 42", {"LATIN": 1, "CJK": 5}),
    (f"{CHINESE}the", {"LATIN": 1, "CJK": 5}),  # in one run of letters
    ("Значит ответ", {"CYRILLIC": 2}),
    ("それは三", {"CJK": 4}),
    ("don't_stop", {"LATIN": 2}),  # don, stop; the lone t is no word
    ("", {}), ("12 + 30 = 42", {}), ("\ud800\x00", {}),
])
def test_words_are_counted_by_script(text, counts):
    assert dict(words_by_script(text)) == counts


def test_the_consistency_is_a_share_of_words():
    assert consistency("What is it?", "So it is 因此 42") == 3 / 5
    assert consistency("这是什么?", "So it is 因此 42") == 2 / 5
    assert consistency("What is it?", "17 + 25 = 42") == 1.0  # thinking in numbers is no fault
    assert consistency("これは何ですか?", "三足す四は七、so") == 6 / 7  # kana and characters are one language
    assert consistency("3 7 9 ->", "So 因此") == 1.0  # no words, no language
    assert main_script("1 + 1") is None and main_script("我 say so, 你好吗") == "CJK"


def test_a_task_in_words_is_judged_by_its_question_and_not_by_its_template():
    task = Countdown(template="r1_zero")
    problem = task.problem("train", 0)
    assert has_language(task) and not has_language(Countdown())
    for thoughts, share in (("So let us see", 1.0), (f"{CHINESE} so yes", 2 / 7)):
        sample = Sample(problem, f"<think>{thoughts}</think> <answer>1 {CHINESE}</answer>")
        assert language_of(task, sample) == share


def test_thoughts_behind_an_empty_answer_or_the_last_one_are_thoughts():
    task = Countdown(template="r1_zero")
    problem = task.problem("train", 0)
    for response in (f"</think><answer></answer>{CHINESE}<answer>1</answer>",
                     f"</think><answer>1</answer>{CHINESE}", f"<answer>1</answer> <answer>{CHINESE}"):
        assert language_of(task, Sample(problem, response)) == 0
    assert language_of(task, Sample(problem, f"So it is <answer>1 {CHINESE}</answer>")) == 1


def test_a_task_may_have_a_rule_of_its_own():
    problem = Assistant.problem_from_text("3 7 9 → 13")
    assert language_of(Assistant, Sample(problem, "<think>1-1=0 对;1-1=0 ok</think>")) == 0.5
    assert language_of(Countdown(), Sample(CountdownProblem((1, 2), 3), "<think>ok</think>")) == 1.0
