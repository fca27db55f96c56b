"""Process rewards: labels by rollouts, files of steps, the loop, and GRPO with one."""
import json
import math
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from r1zero.eval.response import Sample
from r1zero.eval.sampler import ModelSampler
from r1zero.eval.tasks.base import Grade
from r1zero.eval.tasks.steps import StepCheck
from r1zero.model.checkpoint import CheckpointError, load_model
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.rl.rewards import RewardConfig
from r1zero.train.answers import Answer
from r1zero.train.cli.main import main
from r1zero.train.collect import CollectConfig, collect
from r1zero.train.grpo import grpo
from r1zero.train.interrupt import Stopped
from r1zero.train.log import read_metrics
from r1zero.train.process_reward import (
    ProcessRewardConfig,
    load_process_reward,
    process_reward,
    resampled,
)
from r1zero.train.run import read_record
from r1zero.train.sample_file import StepLabelFile
from r1zero.train.step_file import encode_steps, read_steps
from r1zero.train.step_labels import StepLabels

from ..rl.cases import Bandit, tiny
from .loop_cases import grpo_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome

CPU = torch.device("cpu")
EOS = Tokenizer.bytes().eos_id


@dataclass(frozen=True)
class Letters(Bandit):
    """Each two characters are a step, which is true if the second is ASCII; right: the last is."""
    chat: bool = False
    files = ()

    @staticmethod
    def step_ends(response, is_whole=True):
        ends = [*range(2, len(response), 2)]
        return [*ends, len(response)] if is_whole and response else ends

    def check_step(self, problem, steps):
        return StepCheck(steps[-1][-1].isascii(), all(step[-1].isascii() for step in steps))

    def grade(self, problem, response):
        return Grade(float(response[-1:].isascii() and bool(response)), response, "")


def collect_config(base, out, **changes) -> CollectConfig:
    options = dict(task=Letters(), problems=8, samples=3, max_new_tokens=6, keep=("all",), label_steps=2)
    return CollectConfig(run=str(base), out=str(out), device="cpu", batch=4, **options | changes)


def config(run, base, data, **changes) -> ProcessRewardConfig:
    optim = OptimConfig(lr=1e-2, warmup=2, schedule="constant", weight_decay=0.0)
    common = dict(steps=6, save_every=2, answers_per_step=16, optim=optim, device="cpu", held_out=0.25)
    return ProcessRewardConfig(run=str(run), base=str(base), data=str(data), **{**common, **changes})


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def count_so_far(n: int, seed: int = 0) -> list[dict]:
    """Answers of letters, each a step; good are those that are an `a`. Shares: 0.8 and 0.2 of that."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        letters = rng.choice(list("aaaabc"), 5)
        steps = [{"end": k, "true": bool(letter == "a"), "reaches": bool((letters[: k + 1] == "a").all()),
                  "share": 0.8 if letter == "a" else 0.2} for k, letter in enumerate(letters)]
        lines.append({"prompt": f"{i}: ", "tokens": [*map(ord, letters), EOS], "steps": steps})
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, answers with labelled steps, and a process reward of them in prm/."""
    folder = tmp_path_factory.mktemp("prm")
    save_base(folder / "base")
    collect(collect_config(folder / "base", folder / "steps.jsonl"))
    write(folder / "a.jsonl", count_so_far(150))
    process_reward(config(folder / "prm", folder / "base", folder / "a.jsonl", steps=30, save_every=15))
    return folder


# ---- labels ----

def test_steps_are_labelled_by_the_task_and_by_completions_of_the_ids_that_were_sampled(folder):
    model, tokenizer, _ = load_model(str(folder / "base"), CPU)
    engine, task, rows = Engine(model, tokenizer), Letters(), read(folder / "steps.jsonl")
    shares = []
    for row in rows:
        text, tokens = row["response"], row["tokens"]
        ends = task.step_ends(text, row["finish_reason"] != "length")
        texts = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        assert "".join(step["text"] for step in row["steps"]) == "".join(texts)
        for k, step in enumerate(row["steps"]):
            so_far = [each["text"] for each in row["steps"][: k + 1]]
            check = task.check_step(0, so_far)
            assert (step["true"], step["reaches"]) == check
            n_left = 6 - (step["end"] + 1)
            if tokens[step["end"]] == EOS:
                assert step["share"] == float(row["right"])
            elif n_left == 0:
                assert step["share"] is None
            else:
                seeds = sample_seeds(2, 0, row["index"], row["sample"], step["end"]).tolist()
                begun = tokens[: step["end"] + 1]
                ids = [*tokenizer.encode(row["prompt"]), *begun]
                found = engine.generate([Request(ids, n_left, s, 1.0, stop_ids=(EOS,)) for s in seeds])
                answers = [[*begun, *each.tokens.tolist()] for each in found]
                answers = [a[:-1] if a[-1] == EOS else a for a in answers]
                right = [task.grade(0, tokenizer.decode(a, keep_special=True)).accuracy for a in answers]
                assert step["share"] == np.mean(right)
                shares.append(step["share"])
    assert len(rows) > 15 and 0.0 in shares and 1.0 in shares
    record = json.loads((folder / "steps.jsonl.summary.json").read_text())
    steps = [step for row in rows for step in row["steps"]]
    assert record["labels"]["steps"] == len(steps) and record["labels"]["completion_tokens"] > 50
    assert record["labels"]["completion_seconds"] > 0
    assert record["labels"]["true"] == pytest.approx(np.mean([step["true"] for step in steps]))


def test_labels_do_not_depend_on_the_other_problems_of_a_call(folder, tmp_path):
    collect(collect_config(folder / "base", tmp_path / "x.jsonl", label_steps=0))
    exact = read(tmp_path / "x.jsonl")
    assert all(step["share"] is None for row in exact for step in row["steps"])


class AllRight(Letters):
    """Every answer is right."""

    def grade(self, problem, response):
        return Grade(1.0, response, "")


def test_nine_right_completions_of_nine_are_a_share_of_1(folder, tmp_path):
    out = tmp_path / "nine.jsonl"
    collect(collect_config(folder / "base", out, task=AllRight(), problems=2, label_steps=9))
    shares = {share for line in read_steps(out) for share in line.labels["soft"] if not math.isnan(share)}
    assert shares == {1.0}
    config = collect_config(folder / "base", tmp_path / "y.jsonl", problems=5, start=3)
    collect(config)
    rows = [row for row in read(folder / "steps.jsonl") if 3 <= row["index"] < 8]
    assert read(tmp_path / "y.jsonl") == rows


class Interrupted(Letters):
    """A signal comes while the answers to the sixth problem are labelled."""
    countdown: ClassVar[list[int]] = []

    def check_step(self, problem, steps):
        if len(steps) == 1 and self.countdown and self.countdown.pop() == 0:
            signal.raise_signal(signal.SIGINT)
        return super().check_step(problem, steps)


def test_a_collection_that_is_stopped_while_it_labels_goes_on_behind_its_labels(folder, tmp_path):
    """To the same lines, whatever half a line a crash has left; and with other answers they are sampled."""
    out, labels = tmp_path / "x.jsonl", tmp_path / "x.jsonl.labels.partial"
    Interrupted.countdown[:] = range(15)  # three answers per problem
    stopping = collect_config(folder / "base", out, task=Interrupted())
    with fails(Stopped, "all samples are in .*x.jsonl.partial; go on with --resume"):
        collect(stopping)
    kept = read(labels)
    assert [line["index"] for line in kept] == [*range(len(kept))] and 3 <= len(kept) < 8 and not out.exists()
    with open(labels, "a") as file:
        file.write('{"index": 7, "half')
    collect(replace(stopping, task=Letters(), resume=True))
    assert read(out) == read(folder / "steps.jsonl") and not labels.exists()
    summaries = [json.loads(path.read_text())["labels"]
                 for path in (tmp_path / "x.jsonl.summary.json", folder / "steps.jsonl.summary.json")]
    assert summaries[0]["completion_tokens"] == summaries[1]["completion_tokens"]

    # What is kept is taken, and not sampled again, but for the same steps and number of completions.
    file, asked = StepLabelFile(out), {"index": 0, "completions": 2, "steps": [[0, 2]]}
    file.append(asked | {"shares": [0.5], "tokens": 3, "seconds": 1.0})
    model, tokenizer, _ = load_model(str(folder / "base"), CPU)
    answer = Answer(0, Sample(0, "abc", (97, 98, 99), "length"), {"accuracy": 0.0}, 0.0, None)
    changed = {"problems": [["q.jsonl", "another digest"]]}  # the answers that decide what is right
    for n, graders, is_kept in ((2, {}, True), (2, changed, False), (3, {}, False)):
        sampler = ModelSampler(model, tokenizer, 6)
        counted = StepLabels(Letters(), sampler, n, StepLabelFile(out), graders)
        [line] = counted.lines("p", [answer], {"index": 0})
        assert (counted.seconds == 1.0) == (counted.n_tokens == 3) == is_kept
        if n == 3:
            assert line["steps"][0]["share"] != 0.5  # of three completions it is no half


def test_labels_are_for_all_answers_of_a_task_with_steps(folder, tmp_path):
    with fails(ValueError, "--keep has right; give --keep all"):
        collect_config(folder / "base", tmp_path / "x", keep=("right", "formed"))
    for name in ("model", "process"):
        with fails(ValueError, f"--rewards.{name} is for r1zero grpo, and r1zero collect has no"):
            collect(collect_config(folder / "base", tmp_path / "x", rewards=RewardConfig(**{name: "x"})))
    with fails(ValueError, "--label-steps is -1, expected 0 or more"):
        collect_config(folder / "base", tmp_path / "x", label_steps=-1)

    @dataclass(frozen=True)
    class Plain(Bandit):
        chat: bool = False
        files = ()

    with fails(ValueError, "--chat with --label-steps: .*leave out --chat"):
        collect(collect_config(folder / "base", tmp_path / "x", task=Letters(chat=True)))
    with fails(ValueError, "--label-steps is given, but the task bandit does not say"):
        collect(collect_config(folder / "base", tmp_path / "x", task=Plain()))
    assert not list(tmp_path.iterdir())


def test_two_steps_that_end_in_one_token_are_one(folder):
    model, tokenizer, _ = load_model(str(folder / "base"), CPU)

    class Marks(Letters):
        @staticmethod
        def step_ends(response, is_whole=True):
            return [1, 2, 3]

    eos = "<|eos|>"  # spelled, where it does not end the answer: seven characters of one token
    labels = StepLabels(Marks(), ModelSampler(model, tokenizer, 4), 0)
    found = labels._exact(Sample(0, f"{eos}a", (EOS, 97, EOS), "stop"))
    assert [(step["end"], step["text"]) for step in found] == [(0, "<|e")]


def test_an_answer_that_was_cut_off_in_its_first_step_has_no_line(folder):
    model, tokenizer, _ = load_model(str(folder / "base"), CPU)
    labels = StepLabels(Letters(), ModelSampler(model, tokenizer, 4), 0)
    answers = [Answer(i, Sample(0, "ab"[:n], (97, 98)[:n], "length"), {"accuracy": 0.0}, 0.0, None)
               for i, n in enumerate((1, 2))]
    whole = Answer(2, Sample(0, "ab", (97, 98, EOS), "stop"), {"accuracy": 1.0}, 0.0, None)
    assert [line["sample"] for line in labels.lines("p", [*answers, whole], {"index": 0})] == [2]


# ---- files ----

GOOD = {"prompt": "p", "tokens": [97, 98, EOS], "steps": [
    {"end": 0, "true": True, "reaches": False, "share": 0.25}, {"end": 2, "true": False, "share": None}]}


def test_labels_stay_what_they_are(tmp_path):
    [line] = read_steps(write(tmp_path / "s.jsonl", [GOOD]))
    same = [[*map(str, line.labels[name])] for name in ("true", "reaches", "soft", "hard")]
    assert same == [["1.0", "0.0"], ["0.0", "nan"], ["0.25", "nan"], ["1.0", "nan"]]
    [steps] = encode_steps(Tokenizer.bytes(), [line], tiny().config, "soft")
    assert steps.tokens.tolist() == [ord("p"), 97, 98, EOS] and steps.ends.tolist() == [1, 3]
    assert steps.labels[0] == 0.25 and math.isnan(steps.labels[1]) and set(steps.facts) == {"true"}


def with_step(**change) -> dict:
    return GOOD | {"steps": [GOOD["steps"][0] | change]}


@pytest.mark.parametrize("line, told", [
    (with_step(true=-100), "`true` of a step is -100, expected true, false, null or a share"),
    (with_step(share=1.5), "`share` of a step is 1.5"),
    (with_step(share=float("nan")), "`share` of a step is nan"),
    (with_step(share="1"), "`share` of a step is '1'"),
    (with_step(end=3), r"the ends of the steps, \[3\], do not rise within 3 tokens"),
    (with_step(end=-1), r"\[-1\], do not rise"),
    (with_step(end=True), "the `end` of a step is missing or no whole number"),
    (GOOD | {"steps": GOOD["steps"][::-1]}, "do not rise"),
    (GOOD | {"steps": []}, "`steps` is empty"),
    (GOOD | {"steps": [1]}, "`steps` is missing or another kind"),
    (GOOD | {"tokens": "ab"}, "`tokens` is missing or another kind"),
    (GOOD | {"tokens": [-1]}, "`tokens` has a number that is no token id"),
    (GOOD | {"prompt": ""}, "`prompt` is missing, empty"),
    (GOOD | {"response": ["ab"]}, "`response` is no text"),
])
def test_a_line_that_holds_no_steps_is_named_with_its_fault(tmp_path, line, told):
    path = write(tmp_path / "s.jsonl", [GOOD, line])
    with fails(ValueError, f"line 2: .*{told}"):
        read_steps(path)
    assert len(read_steps(path, skip_bad=True)) == 1


def test_what_nobody_can_learn_from_is_refused_before_there_is_a_folder(folder, tmp_path):
    def train(lines, **changes):
        data = write(tmp_path / "s.jsonl", lines)
        process_reward(config(tmp_path / "run", folder / "base", data, **changes))

    with fails(ValueError, "no step in .*s.jsonl has the label that --labels soft asks for; collect"):
        train([with_step(share=None)], labels="soft")
    with fails(ValueError, "tokens of answer 1 of .*s.jsonl .* spell 'b' under .* `response` says 'c'; give"):
        train([GOOD | {"response": "ab"}, GOOD | {"response": "ac"}])
    with fails(ValueError, "of 1 answers 0 are held out"):
        train([GOOD], held_out=0.01)
    with fails(ValueError, "answer 0 .* has an answer of 301 tokens"):
        train([GOOD | {"tokens": [97] * 300}])
    with fails(ValueError, "answer 0 .* has the token id 5000"):
        train([GOOD | {"tokens": [97, 5000, 97]}])
    with fails(ValueError, "--labels is 'good', expected one of true, reaches, hard, soft"):
        train([GOOD], labels="good")
    assert not (tmp_path / "run").exists()


def test_a_file_without_the_label_is_named_whatever_the_weights_and_answers_without_are_counted(
        folder, tmp_path, capsys):
    exact = write(tmp_path / "exact.jsonl", [with_step(share=None)] * 2)
    some = write(tmp_path / "some.jsonl", [*count_so_far(40), with_step(share=None)])
    for weights in ((":2", ":1"), ("", "")):
        data = tuple(path + weight for path, weight in zip((some, exact), weights, strict=True))
        with fails(ValueError, "no step in .*exact.jsonl has the label .* soft asks for; .*leave it out"):
            process_reward(replace(config(tmp_path / "run", folder / "base", "", labels="soft"), data=data))
    assert "some.jsonl: 1 answers without a label soft are left out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- the loop ----

def test_it_learns_which_steps_are_true_on_prompts_that_it_has_not_seen(folder):
    found = read_record(folder / "prm/run.json")["process_reward"]
    measured = found["measured"]
    assert found["labels"] == "true" and found["steps"] == 5 * found["answers"] > 100
    assert measured["AUC, its labels"] == measured["AUC, true"] and measured["AUC, true"][0] > 0.99
    assert measured["AUC, reaches"][0] < measured["AUC, true"][0] and "AUC, step 3" in measured
    assert {"AUC, last step", "AUC, before it", "first error before it, f1"} <= set(measured)
    assert measured["first error, f1"][0] > 0.9
    assert all(low <= value <= high for value, low, high in measured.values())
    rows = read_metrics(folder / "prm")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [row["step"] for row in rows if "held_out_auc" in row] == [15, 30]
    assert rows[-1]["held_out_auc"] == measured["AUC, its labels"][0] and rows[-1]["accuracy"] > 0.9


def test_with_soft_labels_its_scores_are_the_shares(folder, tmp_path):
    process_reward(config(tmp_path / "run", folder / "base", folder / "a.jsonl", labels="soft", steps=30))
    model, tokenizer, _ = load_process_reward(str(tmp_path / "run"), CPU)
    lines = read_steps(folder / "a.jsonl")
    steps = encode_steps(tokenizer, lines, model.trunk.config, "soft")
    scores = model.probabilities([a.tokens for a in steps], [a.ends for a in steps], 1000)
    scores, shares = np.concatenate(scores), np.concatenate([a.labels for a in steps])
    assert scores[shares > 0.5].mean() == pytest.approx(0.8, abs=0.07)
    assert scores[shares < 0.5].mean() == pytest.approx(0.2, abs=0.07)


def test_a_run_resumes_to_the_same_bits_whatever_the_micro_batch(folder, tmp_path, monkeypatch):
    base, data = folder / "base", folder / "a.jsonl"
    process_reward(config(tmp_path / "whole", base, data))
    broken_at(monkeypatch, 5, process_reward, config(tmp_path / "run", base, data))
    process_reward(config(tmp_path / "run", base, data, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    process_reward(config(tmp_path / "small", base, data, micro_tokens=1))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "small")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    write(tmp_path / "b.jsonl", count_so_far(150, seed=1))
    with fails(CheckpointError, "have changed: data"):
        process_reward(config(tmp_path / "run", base, tmp_path / "b.jsonl", resume=True))


def test_an_interval_is_of_whole_answers():
    values = np.array([0.0] * 50 + [1.0] * 50)
    value, low, high = resampled(lambda chosen: values[chosen].mean(), 100)
    assert value == 0.5 and 0.38 < low < 0.43 and 0.57 < high < 0.62


def test_the_command_says_what_it_learns_from(folder, tmp_path, capsys):
    words = ["process-reward", "--run", str(tmp_path / "x"), "--base", str(folder / "base"), "--data",
             str(folder / "a.jsonl"), "--steps", "1", "--device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert "steps to train on" in out.err and "first error, found" in out.out
    assert main(["grade", "--response", "x", "--problem", "3 7 9 -> 13", "--rewards.process", "x"]) == 2
    assert "r1zero grade has no process reward" in capsys.readouterr().err


# ---- GRPO with one ----

def rl_config(folder, run, **changes):
    rewards = dict(accuracy_weight=0.0, format_weight=0.0, process=str(folder / "prm"))
    options = dict(rewards=rewards, steps=4, task=Letters(), max_new_tokens=6)
    return grpo_config(run, folder / "base", **{**options, **changes})


def test_grpo_raises_the_scores_of_the_steps(folder, tmp_path):
    grpo(rl_config(folder, tmp_path / "run", steps=12, prompts_per_step=8))
    rows = read_metrics(tmp_path / "run")
    scores = [row["reward_process"] for row in rows]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.1
    assert rows[0]["reward"] == 0 and rows[0]["steps_per_answer"] > 0


def test_a_grpo_run_with_one_resumes_to_the_same_bits_and_knows_it_by_its_content(
        folder, tmp_path, monkeypatch):
    grpo(rl_config(folder, tmp_path / "whole"))
    broken_at(monkeypatch, 3, grpo, rl_config(folder, tmp_path / "run"))
    grpo(rl_config(folder, tmp_path / "run", resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    other = config(tmp_path / "other", folder / "base", folder / "a.jsonl", steps=2)
    process_reward(other)
    with fails(CheckpointError, "have changed: process reward .*weights"):
        grpo(rl_config(folder, tmp_path / "run", resume=True, rewards=dict(
            accuracy_weight=0.0, format_weight=0.0, process=other.run)))


def test_what_is_no_process_reward_or_does_not_fit_is_refused_before_there_is_a_folder(folder, tmp_path):
    def refused(told: str, **changes):
        with fails(ValueError, told):
            grpo(rl_config(folder, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    refused("base/checkpoints/step_00000000 holds no process reward; give a folder that r1zero process-",
            rewards=dict(process=str(folder / "base")))
    refused("prm/checkpoints/step_00000030 holds no reward model; give a folder that r1zero reward-model",
            rewards=dict(model=str(folder / "prm")))
    refused("--rewards.process is given, but the task bandit does not say", task=Bandit())
    refused("--rewards.process with --chat: .*leave out either", task=Letters(chat=True))
    refused("--rewards.model with --chat", task=Letters(chat=True), rewards=dict(model=str(folder / "prm")))
    save_base(tmp_path / "short", max_seq_len=32)
    process_reward(config(tmp_path / "prm2", tmp_path / "short", folder / "a.jsonl", steps=1))
    refused("--rewards.process .*prm2 has room for 32 tokens", max_new_tokens=40,
            rewards=dict(process=str(tmp_path / "prm2")))
    with fails(ValueError, "holds a reward model, which scores answers and writes none"):
        load_model(str(folder / "prm"), CPU)
