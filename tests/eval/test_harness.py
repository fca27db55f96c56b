"""The harness: pass@k against counting, intervals by simulation, the whole with samplers that are known."""
import json
import random
from itertools import combinations
from math import sqrt

import pytest

from r1zero.eval.harness import (
    Sampled,
    evaluate,
    interval,
    majority_at_k,
    majority_right,
    pass_at_k,
    same_answer_of,
)
from r1zero.eval.tasks.arithmetic import Arithmetic
from r1zero.eval.tasks.countdown import Countdown, solve
from r1zero.eval.tasks.game24 import Game24
from r1zero.eval.tasks.gsm8k import GSM8K
from r1zero.eval.tasks.jsonl import JSONL

TASK = Countdown(high=9)


class Oracle:
    """A sampler that answers sample s of problem i right if right(i, s); it counts its calls."""

    def __init__(self, problems, right, n_tokens=lambda i, s: 10):
        self.place = {TASK.prompt(problem): i for i, problem in enumerate(problems)}
        self.answers = [next(solve(problem, "+-")) for problem in problems]
        self.right, self.n_tokens, self.calls = right, n_tokens, []

    def __call__(self, prompts, n_samples):
        self.calls.append(len(prompts))
        return [[self.sample(self.place[prompt], s) for s in range(n_samples)] for prompt in prompts]

    def sample(self, i, s):
        answer = f"<answer>{self.answers[i] if self.right(i, s) else '1+1'}</answer>"
        text = f"<think>hm</think>{answer}" if s % 2 == 0 else answer
        return Sampled(text, self.n_tokens(i, s), "length" if s == 1 else "eos")


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_against_all_draws(n):
    for n_right in range(n + 1):
        responses = [True] * n_right + [False] * (n - n_right)
        for k in range(1, n + 1):
            draws = list(combinations(responses, k))
            assert pass_at_k(n, n_right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_with_many_samples():
    assert pass_at_k(10**5, 1, 10**4) == pytest.approx(0.1, abs=1e-12)
    assert pass_at_k(200, 100, 100) == pytest.approx(1.0)
    assert pass_at_k(200, 0, 200) == 0.0 and pass_at_k(200, 200, 1) == 1.0


def test_pass_at_k_is_unbiased():
    """Averaged over sets of n it is the chance 1 - (1 - p)^k; the naive 1 - (1 - c/n)^k is lower."""
    rng, p, n, k = random.Random(0), 0.15, 8, 4
    counts = [sum(rng.random() < p for _ in range(n)) for _ in range(20_000)]
    truth = 1 - (1 - p) ** k
    assert sum(pass_at_k(n, c, k) for c in counts) / len(counts) == pytest.approx(truth, abs=0.008)
    assert sum(1 - (1 - c / n) ** k for c in counts) / len(counts) < truth - 0.03


def rows_of(answers, right="a"):
    return [{"answer": None if a == "-" else a, "accuracy": float(a == right)} for a in answers]


@pytest.mark.parametrize("answers, is_right", [
    ("aab", 1), ("abb", 0), ("bbaa", 0), ("abba", 1),  # with as many votes, the first given counts
    ("--a", 1), ("---", 0), ("-b-a", 0), ("cbaca", 0), ("cbaaca", 1), ("a", 1), ("b", 0)])
def test_the_majority_is_the_answer_with_most_votes(answers, is_right):
    assert majority_right(rows_of(answers), str.__eq__) == is_right


def test_answers_that_are_alike_share_their_votes():
    rows = rows_of(["1/2", "3", "0.5", "3", "2/4"], right=None)
    for row in rows:
        row["accuracy"] = float(row["answer"] != "3")
    value = {"1/2": 0.5, "0.5": 0.5, "2/4": 0.5, "3": 3}
    assert majority_right(rows, lambda a, b: value[a] == value[b]) == 1
    assert majority_right(rows, str.__eq__) == 0


def test_maj_at_k_is_the_mean_over_votes_of_k_responses():
    rows = rows_of("aabbbabac")  # aab bba bac: right, wrong, wrong (the first of a tie)
    assert majority_at_k(rows, 3, str.__eq__) == pytest.approx(1 / 3)
    assert majority_at_k(rows, 4, str.__eq__) == 0.5  # aabb bbab, and c is left over
    assert majority_at_k(rows, 1, str.__eq__) == pytest.approx(4 / 9)
    assert majority_at_k(rows, 9, str.__eq__) == 1


def test_a_vote_of_expressions_is_by_what_they_are_worth():
    rows = rows_of(["9-3+7", "7+9-3", "9+7+3", "(7-3)+9", "9+7+3"], right=None)
    for row in rows:
        row["accuracy"] = float(row["answer"] != "9+7+3")
    for task in (Countdown, Game24):
        alike = same_answer_of(task)
        assert majority_right(rows, alike) == 1
        assert alike("1*6", "6*1 ") and not alike("1*6", "2*3") and not alike("1*6", "6")
        assert alike("6*1=6", "1*6 = 6") and not alike("6*1=6", "6*1") and not alike("6*1=6", "6*1=7")
        assert alike("six", " six") and not alike("six", "6")


def test_a_vote_of_numbers_is_by_value_where_numbers_are_graded(tmp_path):
    assert Arithmetic.same_answer("42", "+42") and Arithmetic.same_answer("42", " 42.0")
    assert not Arithmetic.same_answer("42", "042") and Arithmetic.same_answer("x", "x ")
    assert GSM8K.same_answer("$1,018", "1018.0") and GSM8K.same_answer("x", "x")
    assert not GSM8K.same_answer("x", "1")
    (tmp_path / "a.jsonl").write_text('{"prompt": "9+9=", "answer": "18"}\n')
    path = str(tmp_path / "a.jsonl")
    by_number, by_text = (JSONL(path, test_share=0, grader=grader) for grader in ("number", "exact"))
    assert same_answer_of(by_number)("18", "18.0") and not same_answer_of(by_text)("18", "18.0")


def test_a_users_own_vote_that_raises_is_told_with_the_answers():
    class Own(Arithmetic):
        @staticmethod
        def same_answer(answer, other):
            return int(answer) == int(other)

    with pytest.raises(ValueError, match="of arithmetic raised ValueError: .*answers 'x' and '1'"):
        same_answer_of(Own())("x", "1")
    assert same_answer_of(Own())("1", "01") is True


def test_maj_at_k_of_an_evaluation_and_the_speed_of_sampling():
    problems = TASK.problems("test", 6)
    # Samples 0 and 2 are right for even problems, sample 3 for the others; the wrong ones say 1+1.
    oracle = Oracle(problems, lambda i, s: s in (0, 2) if i % 2 == 0 else s == 3)
    result = evaluate(oracle, TASK, problems, 4, ks=(1, 2, 4), progress=False)
    assert result.maj_at[1] == pytest.approx(result.accuracy) and result.maj_at[4].mean == 0.5
    assert result.maj_at[2].mean == pytest.approx((2 + 0) / 4)
    assert result.maj_at[4].low < 0.5 < result.maj_at[4].high and result.tokens_per_second > 0
    record, table = result.to_dict(), result.table()
    assert record["maj_at"] == {"1": result.accuracy.mean, "2": 0.5, "4": 0.5}
    assert record["maj_at_95"]["4"] == [result.maj_at[4].low, result.maj_at[4].high]
    assert record["tokens_per_second"] == result.tokens_per_second and record["truncated"] == 0.25
    for piece in ("maj@2 ", "maj@4 ", "cut off        25.0%", "tokens per second"):
        assert piece in table
    assert "maj@1" not in table


def test_interval_is_wilsons_for_single_samples():
    estimate = interval([1.0] * 3 + [0.0] * 7)  # textbook: 3 of 10
    assert estimate.mean == pytest.approx(0.3)
    assert (estimate.low, estimate.high) == pytest.approx((0.10779, 0.60323), abs=1e-5)
    for n, half in ((128, 0.085), (500, 0.043), (1024, 0.030)):
        right = round(0.6 * n)
        estimate = interval([1.0] * right + [0.0] * (n - right))
        assert (estimate.high - estimate.low) / 2 == pytest.approx(half, abs=1.5e-3)


@pytest.mark.parametrize("n", [1, 2, 10, 512])
@pytest.mark.parametrize("n_samples", [1, 4])
def test_interval_never_closes(n, n_samples):
    """None or all of n right: Wilson's z^2 / (n + z^2), near the rule of three."""
    nothing, everything = interval([0.0] * n, n_samples), interval([1.0] * n, n_samples)
    assert nothing.mean == nothing.low == 0.0 and everything.mean == everything.high == 1.0
    assert nothing.high == pytest.approx(3.8415 / (n + 3.8415), abs=1e-4)
    assert everything.low == pytest.approx(1 - nothing.high)
    for score in (0.25, 0.5, 1 / 3):
        same = interval([score] * n, n_samples)
        assert 0.0 < same.low < score < same.high < 1.0


def test_interval_knows_that_samples_of_a_problem_are_alike():
    agreeing = interval([0.0, 1.0] * 50, n_samples=4)  # all four samples agree: as if there were one
    assert agreeing == interval([0.0, 1.0] * 50)
    independent = interval([0.5] * 100, n_samples=4)  # no more scatter than 400 coins have
    assert independent == pytest.approx(interval([0.0, 1.0] * 200))
    assert interval([0.499, 0.501] * 50, n_samples=4) == pytest.approx(independent)
    assert interval([0.25, 0.75] * 50, n_samples=4).low > agreeing.low


@pytest.mark.parametrize(
    ("n", "n_samples", "alpha", "beta"),
    [(40, 1, 1.0, 1.0), (60, 4, 0.3, 0.7), (60, 4, 20.0, 20.0), (100, 4, 0.1, 3.0), (200, 8, 3.0, 0.2)],
)
def test_interval_coverage(n, n_samples, alpha, beta):
    """In 95 % of simulated evaluations it holds the true rate; problems are like Beta(alpha, beta)."""
    rng, truth, held = random.Random(1), alpha / (alpha + beta), 0
    for _ in range(800):
        chances = [rng.betavariate(alpha, beta) for _ in range(n)]
        scores = [sum(rng.random() < p for _ in range(n_samples)) / n_samples for p in chances]
        low, high = interval(scores, n_samples)[1:]
        held += low <= truth <= high
    assert 0.925 <= held / 800 <= 0.985


def test_evaluate_counts_everything(tmp_path):
    problems = TASK.problems("test", 10)
    # Of the four samples 0, 1 or 2 are right.
    oracle = Oracle(problems, right=lambda i, s: s < i % 3, n_tokens=lambda i, s: i + s)
    out = tmp_path / "new" / "responses.jsonl"
    result = evaluate(oracle, TASK, problems, n_samples=4, ks=(1, 2, 4), out=out, batch=4, progress=False)
    assert oracle.calls == [4, 4, 2]
    n_right = [i % 3 for i in range(10)]
    assert (result.task, result.n_problems, result.n_samples) == ("countdown", 10, 4)
    assert result.accuracy.mean == pytest.approx(sum(n_right) / 40)
    assert result.pass_at[1] == pytest.approx(result.accuracy)
    for k in (1, 2, 4):
        assert result.pass_at[k].mean == pytest.approx(sum(pass_at_k(4, c, k) for c in n_right) / 10)
        assert result.pass_at[k].low < result.pass_at[k].mean < result.pass_at[k].high
    assert result.format_rate.mean == 0.5
    assert result.truncated == 0.25
    assert result.mean_tokens == 6.0

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], line["accuracy"]) for line in lines] == [
        (i, float(s < i % 3)) for i in range(10) for s in range(4)
    ]
    assert lines[5] == {
        "index": 1,
        "problem": {"numbers": list(problems[1].numbers), "target": problems[1].target, "template": "plain"},
        "prompt": TASK.prompt(problems[1]),
        "response": "<answer>1+1</answer>",
        "accuracy": 0.0,
        "format": 0.0,
        "answer": "1+1",
        "why": TASK.grade(problems[1], "<answer>1+1</answer>").why,
        "n_tokens": 2,
        "finish_reason": "length",
    }


def test_the_result_as_json_and_as_a_table():
    problems = TASK.problems("test", 8)
    result = evaluate(Oracle(problems, lambda i, s: i % 2 == 0), TASK, problems, 2, ks=(1, 2), progress=False)
    record = json.loads(json.dumps(result.to_dict()))
    assert record["accuracy"] == 0.5 and record["pass_at"] == {"1": 0.5, "2": 0.5}
    low, high = record["accuracy_95"]
    assert low < 0.5 < high and high - 0.5 == pytest.approx(0.5 - low)
    table = result.table()
    for piece in ("countdown: 8 problems x 2", "pass@1 ", "pass@2 ", f"50.0%   [{low:.1%}, {high:.1%}]"):
        assert piece in table


def test_duplicate_problems_stay_apart():
    """Groups are by place, never by prompt."""
    problem = TASK.problem("test", 0)
    answers = iter([[Sampled(f"<answer>{next(solve(problem))}</answer>", 1, "eos")], [Sampled("", 1, "eos")]])
    result = evaluate(lambda prompts, n: list(answers), TASK, [problem] * 2, progress=False)
    assert result.n_problems == 2 and result.accuracy.mean == 0.5


def test_lines_are_written_as_it_goes(tmp_path):
    """After a crash the finished batches are in the file, whole lines only, whatever the text holds."""
    problems, out, partial = TASK.problems("test", 6), tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    calls, nasty = [], "line\nbreak \ud800 \x00 \u2028"

    def failing(prompts, n_samples):
        calls.append(len(partial.read_bytes().splitlines()))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [[Sampled(nasty, 3, "eos")] * n_samples for _ in prompts]

    with pytest.raises(KeyboardInterrupt):
        evaluate(failing, TASK, problems, n_samples=2, out=out, batch=2, progress=False)
    assert calls == [0, 4, 8]  # on the disk before the next batch is sampled
    text = partial.read_bytes().decode("ascii")
    assert not out.exists()
    assert text.count("\n") == 8 and text.endswith("\n")
    assert [json.loads(line)["response"] for line in text.split("\n")[:-1]] == [nasty] * 8


def test_faults_of_the_caller(tmp_path):
    problems = Arithmetic().problems("test", 3)

    def sampler(prompts, n):
        return [[Sampled("", 0, "eos")] * n for _ in prompts]

    def run(**changes):
        given = {"sampler": sampler, "task": Arithmetic(), "problems": problems, "progress": False} | changes
        return evaluate(**given)

    assert run().accuracy.mean == 0.0
    for changes, why in (
        ({"problems": []}, "no problems"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"batch": 0}, "batch 0"),
        ({"ks": (1, 3), "n_samples": 2}, "pass@3 needs 1 <= k <= n_samples, but n_samples is 2"),
        ({"ks": (0,)}, "pass@0"),
        ({"sampler": lambda prompts, n: [[]] * len(prompts)}, "must give each of 3 prompts 1 responses"),
        ({"sampler": lambda prompts, n: sampler(prompts[1:], n)}, "must give each of 3 prompts"),
        ({"out": tmp_path}, "cannot write results"),
    ):
        with pytest.raises(ValueError, match=why):
            run(**changes)


def test_interval_width_follows_the_number_of_problems():
    narrow, wide = interval([0.0, 1.0] * 200), interval([0.0, 1.0] * 50)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(sqrt(4), rel=0.03)
