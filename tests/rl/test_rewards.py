"""Rewards see what was sampled: the tokens and the end of each answer, the same in training and eval."""
from types import SimpleNamespace

import numpy as np
import pytest

from r1zero.eval.harness import evaluate
from r1zero.eval.response import response_text
from r1zero.eval.sampler import ModelSampler
from r1zero.eval.tasks.base import Grade
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.model.engine.requests import Completion
from r1zero.model.tokenizer import Tokenizer
from r1zero.rl import naive
from r1zero.rl.rewards import Grader, RewardConfig, judge
from r1zero.rl.rollouts import GroupSampler, sample_groups

from .cases import algorithm

BYTES = Tokenizer.bytes()
PROBLEM = CountdownProblem((3, 7, 9), 13)
RIGHT = "<think>t</think><answer>9-3+7</answer>"


class Scripted:
    """An engine that gives these (tokens, finish reason) to the requests in turn."""

    def __init__(self, *answers):
        self.tokenizer, self.version, self.answers = BYTES, 0, answers
        self.model = SimpleNamespace(config=SimpleNamespace(max_seq_len=10**6))

    def refresh(self, version):
        self.version = version

    def generate(self, requests):
        return [Completion(np.array(tokens), np.zeros(len(tokens), np.float32), reason)
                for _, (tokens, reason) in zip(requests, self.answers, strict=True)]


ids = BYTES.encode
CASES = {  # name: (tokens, finish reason, accuracy, format)
    "well formed": ([*ids(RIGHT), BYTES.eos_id], "stop", 1, 1),
    "cut off behind its answer": (ids(RIGHT), "length", 1, 0),
    "spaces up to the limit": (ids(RIGHT + " " * 200), "length", 1, 0),
    "spaces, then the end": ([*ids(RIGHT + " " * 200), BYTES.eos_id], "stop", 1, 0),
    "a special token in a tag": ([*ids(RIGHT[:20]), BYTES.bos_id, *ids(RIGHT[20:]), BYTES.eos_id],
                                 "stop", 0, 0),
    "a special token in the thoughts": ([*ids(RIGHT[:7]), BYTES.bos_id, *ids(RIGHT[7:]), BYTES.eos_id],
                                        "stop", 1, 1),
    "no answer": ([BYTES.eos_id], "stop", 0, 0),
}
EXPECTED = [case[2:] for case in CASES.values()]


def rollouts():
    seeds = np.arange(len(CASES))
    engine = Scripted(*(case[:2] for case in CASES.values()))
    return sample_groups(engine, [Countdown.prompt(PROBLEM)], len(CASES), 300, 1.0, seeds, [PROBLEM])


def test_training_eval_the_naive_page_and_a_graded_line_agree():
    config = RewardConfig()
    sampled = rollouts()
    rewards = Grader(algorithm())(Countdown, sampled)
    assert list(zip(rewards.accuracy, rewards.format, strict=True)) == EXPECTED
    for (name, (tokens, reason, accuracy, form)), text, why in zip(
            CASES.items(), sampled.texts, rewards.why, strict=True):
        assert text == response_text(BYTES, tokens)
        assert ("It was cut off at the token limit." in why) == (reason == "length"), name
        assert naive.reward_of(Countdown, PROBLEM, tokens, BYTES) == pytest.approx(accuracy + 0.2 * form)
    engine = Scripted(*(case[:2] for case in CASES.values()))
    sampler = ModelSampler(engine.model, BYTES, 300, engine=engine)
    kept = []
    result = evaluate(lambda prompts, n: kept.extend(sampler(prompts, n)) or [kept[0]], Countdown(),
                      [PROBLEM], len(CASES), progress=False)
    assert result.format_rate.mean == pytest.approx(np.mean([form for _, form in EXPECTED]))
    assert result.accuracy.mean == pytest.approx(np.mean([accuracy for accuracy, _ in EXPECTED]))
    assert [one.text for one in kept[0]] == sampled.texts
    for one, sample in zip(kept[0], sampled.samples(), strict=True):
        assert list(one.tokens) == list(sample.tokens) and one.finish_reason == sample.finish_reason
        assert judge(Countdown, [sample], config)[1]["format"][0] in (0.0, 1.0)


def test_a_reward_gets_problem_text_tokens_and_reason_of_each_sample():
    """Groups of two problems: each sample has the problem of its own group, and its own tokens."""
    problems = [PROBLEM, CountdownProblem((1, 2), 3)]
    answers = [(ids(f"{n}"), "stop" if n % 2 else "length") for n in range(4)]
    sampled = sample_groups(Scripted(*answers), ["a", "bcd"], 2, 9, 1.0, np.arange(4), problems)
    seen = [(sample.problem, sample.text, list(sample.tokens), sample.cut_off)
            for sample in sampled.samples()]
    assert seen == [(problems[n // 2], f"{n}", ids(f"{n}"), n % 2 == 0) for n in range(4)]


def test_a_task_that_pays_for_tokens_can_be_trained_on_through_the_samplers():
    """The step's own sampler hands the same samples on."""
    task = SimpleNamespace(problems=lambda split, n, start: [PROBLEM] * n, prompt=Countdown.prompt,
                           grade=lambda problem, text: Grade(1.0, text, "Yes."))
    config = algorithm(prompts_per_step=1, group_size=2, max_new_tokens=9)
    sampler = GroupSampler(Scripted((ids("a"), "stop"), (ids("b"), "length")))
    samples = sampler.sample(task, config, 0).samples()
    assert [sample.finish_reason for sample in samples] == ["stop", "length"]
