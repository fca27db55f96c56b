"""Every completion of a run is kept as it was trained on, once, whatever happens. Keeping decides nothing."""
import gzip
import json
import resource
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import load_model
from r1zero.rl.advantages import Advantages
from r1zero.train import rollout_log
from r1zero.train.cli.grade import GradeConfig, grade
from r1zero.train.grpo import grpo, make_learner
from r1zero.train.log import read_metrics
from r1zero.train.rollout_files import kept_steps, part_path, parts_of
from r1zero.train.rollout_log import RolloutLog, fields_of

from .loop_cases import QUICK, grpo_config, save_base
from .run_cases import broken_at, kept_samples


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of five steps whose groups are replaced where they are dead."""
    c = grpo_config(tmp_path_factory.mktemp("whole") / "run", base, algo="dapo")
    grpo(c)
    return c


class SmallNumbers(Countdown):
    """The task of a run, as its flags would make it."""

    def make(self):
        return QUICK


def learner_of(c):
    return make_learner(c, c.task.make(), load_model(c.base, torch.device("cpu")))


def shown(c, step: int = 0) -> list[tuple]:
    """What the learner shows of a step, without an update: (rollouts, rewards, advantages) of each part."""
    learner = learner_of(c)
    rollouts = learner.sampler.sample(c.task, c, step)
    rewards = learner.grader(c.task, rollouts)
    parts = [(rollouts, rewards, learner.credit(rewards, rollouts))]
    if rollouts.replaced is not None:
        parts.append((rollouts.replaced, learner.grader(c.task, rollouts.replaced), None))
    return parts


def log_of(folder, c, last_step=0, **options) -> RolloutLog:
    return RolloutLog(folder, last_step, learner_of(c).sampler.engine.tokenizer, **options)


def write_steps(log: RolloutLog, parts: list[tuple], steps) -> None:
    for step in steps:
        for part in parts:
            log.observe(*part)
        log.write(step)


# ---- what is kept ----

def test_each_sample_is_kept_with_what_it_earned(whole):
    samples = [sample for sample in kept_samples(Path(whole.run)) if sample["step"] == 1]
    n = 0
    for rollouts, rewards, advantages in shown(whole):
        for i, tokens in enumerate(rollouts.sequences):
            sample, start = samples[n], rollouts.prompt_lengths[i]
            assert sample["tokens"] == tokens[start:].tolist() and sample["response"] == rollouts.texts[i]
            assert sample["prompt"] == f"{sample['problem'] % 10}:" and sample["why"] == rewards.why[i]
            assert sample["problem"] == rollouts.problems[i // 4] and sample["group"] == n // 4 + 1
            assert sample["parts"] == {name: part[i] for name, part in rewards.parts.items()}
            assert sample["reward"] == rewards.total[i]
            assert sample["training_reward"] == rewards.training[i]
            assert sample["finish_reason"] == rollouts.finish_reasons[i]
            assert sample["replaced"] is (advantages is None)
            if advantages is None:
                assert sample["advantage"] is None
            else:
                first = advantages.per_token[rollouts.response_offsets[i]]
                assert sample["advantage"] == pytest.approx(first, abs=1e-6)
                assert "token_advantages" not in sample  # all tokens of an answer have the same
            n += 1
    assert n == len(samples) and {sample["replaced"] for sample in kept_samples(Path(whole.run))} == {
        True, False}


def test_where_the_tokens_of_an_answer_differ_each_has_its_advantage(whole, tmp_path):
    rollouts, rewards, _ = shown(whole)[0]
    each = np.arange(rollouts.response_offsets[-1]) / 7  # as a critic's
    write_steps(log_of(tmp_path, whole), [(rollouts, rewards, Advantages(each))], [0])
    samples = kept_samples(tmp_path)
    assert [len(sample["token_advantages"]) for sample in samples] == list(rollouts.response_lengths)
    kept = np.concatenate([sample["token_advantages"] for sample in samples])
    np.testing.assert_allclose(kept, each, atol=1e-6)
    for sample in samples:
        assert sample["advantage"] == pytest.approx(np.mean(sample["token_advantages"]), abs=1e-5)


def test_the_kept_lines_of_countdown_can_be_graded_again(base, tmp_path):
    c = grpo_config(tmp_path / "run", base, task=SmallNumbers(), steps=1)
    grpo(c)
    samples, lines = kept_samples(tmp_path / "run"), tmp_path / "lines.jsonl"
    lines.write_bytes(gzip.decompress(part_path(tmp_path / "run", 1).read_bytes()))
    graded = grade(GradeConfig(task="countdown", input=str(lines), out=str(tmp_path / "graded.jsonl")))
    assert [row["reward"] for row in graded] == [sample["reward"] for sample in samples]
    assert [row["why"] for row in graded] == [sample["why"] for sample in samples]


@dataclass
class Odd:
    """A problem that no JSON can hold as it is."""

    value: object


def test_a_problem_of_any_kind_is_kept_as_well_as_json_can():
    circle = []
    circle.append(circle)
    for value, kept in ((Fraction(1, 3), {"value": "1/3"}), ((1, 2), {"value": [1, 2]}),
                        ({(1, 2): 3}, "Odd(value={(1, 2): 3})"), (circle, "Odd(value=[[...]])"),
                        (threading.Lock(), None), (float("nan"), None)):
        found = fields_of(Odd(value))
        assert json.dumps(found) and (kept is None or found == kept)
    assert fields_of("3 7 -> 10") == "3 7 -> 10"


# ---- a share of the groups ----

def test_a_share_is_of_whole_groups_and_is_the_same_when_it_is_done_again(whole, tmp_path):
    c, found = grpo_config("none", whole.base, prompts_per_step=40), []
    parts = shown(c)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_steps(log_of(tmp_path / name, c, share=0.3), parts, [0, 1])
        found.append(kept_samples(tmp_path / name))
    assert found[0] == found[1]
    groups = [sorted({s["group"] for s in found[0] if s["step"] == step}) for step in (1, 2)]
    assert groups[0] != groups[1] and all(5 <= len(chosen) <= 20 for chosen in groups)
    assert len(found[0]) == 4 * sum(map(len, groups))


def test_a_share_of_nothing_keeps_nothing_and_still_cuts_what_is_done_again(whole, tmp_path):
    parts, log = shown(whole), log_of(tmp_path, whole)
    write_steps(log, parts, [0, 1, 2])
    write_steps(log_of(tmp_path, whole, last_step=1, share=0.0), parts, [1, 2])
    assert list(kept_steps(tmp_path)) == [1]
    c = grpo_config(tmp_path / "run", whole.base, steps=1, keep_rollouts=0)
    grpo(c)
    assert parts_of(tmp_path / "run") == []


# ---- each step once ----

def test_a_run_that_is_broken_off_and_resumed_has_each_step_once(whole, tmp_path, monkeypatch):
    c = grpo_config(tmp_path / "run", whole.base, algo="dapo")
    broken_at(monkeypatch, 4, grpo, c)  # after the checkpoint of step 2
    assert list(kept_steps(tmp_path / "run")) == [1, 2, 3, 4]
    path = part_path(tmp_path / "run", 1)
    path.write_bytes(path.read_bytes()[:-3])  # and while it wrote
    grpo(grpo_config(tmp_path / "run", whole.base, algo="dapo", resume=True))
    assert kept_samples(tmp_path / "run") == kept_samples(Path(whole.run))


def test_a_run_that_kept_nothing_so_far_begins_to_when_it_is_resumed(whole, tmp_path):
    grpo(grpo_config(tmp_path / "run", whole.base, algo="dapo", steps=2, keep_rollouts=0))
    grpo(grpo_config(tmp_path / "run", whole.base, algo="dapo", steps=5, resume=True))
    later = [sample for sample in kept_samples(Path(whole.run)) if sample["step"] > 2]
    assert kept_samples(tmp_path / "run") == later


def test_a_step_that_fails_is_not_kept(whole, tmp_path):
    parts, log = shown(whole), log_of(tmp_path, whole)
    log.observe(*parts[0])  # of a step that an error ended
    write_steps(log, parts, [0])
    assert len(kept_samples(tmp_path)) == sum(len(part[0].texts) for part in parts)


def test_a_full_part_is_followed_by_the_next_and_all_are_cut_on_resume(whole, tmp_path):
    parts = shown(whole)
    write_steps(log_of(tmp_path, whole, part_bytes=1000), parts, range(12))
    assert 4 <= len(parts_of(tmp_path)) <= 12 and list(kept_steps(tmp_path)) == list(range(1, 13))
    expected = kept_samples(tmp_path)
    write_steps(log_of(tmp_path, whole, last_step=5, part_bytes=1000), parts, range(5, 12))
    assert kept_samples(tmp_path) == expected
    part_path(tmp_path, 1).unlink()  # somebody has moved it away
    write_steps(log_of(tmp_path, whole, last_step=12, part_bytes=1000), parts, [12])
    assert list(kept_steps(tmp_path))[-1] == 13


def test_every_part_that_was_written_to_is_flushed_once_even_if_one_was_moved_away(
        whole, tmp_path, monkeypatch, capsys):
    flushed = []
    monkeypatch.setattr(rollout_log, "flush", flushed.append)
    parts, log = shown(whole), log_of(tmp_path, whole, part_bytes=1)
    write_steps(log, parts, range(4))
    written = [path for _, path in parts_of(tmp_path)]
    assert len(written) == 4
    log.sync()
    assert sorted(flushed) == sorted(written)
    log.sync()
    assert len(flushed) == len(written)  # nothing new
    write_steps(log, parts, range(4, 8))
    moved = parts_of(tmp_path)[-2][1]
    moved.unlink()
    log.sync()
    assert moved not in flushed and parts_of(tmp_path)[-1][1] in flushed
    assert capsys.readouterr().err == ""


# ---- keeping decides nothing ----

@pytest.mark.parametrize("how", ["folder", "foreign"])
def test_a_file_that_cannot_be_written_is_told_once_and_changes_nothing_else(whole, tmp_path, capsys, how):
    path = part_path(tmp_path / "run", 1)
    path.parent.mkdir()
    path.mkdir() if how == "folder" else path.write_bytes(b"the user's own")
    grpo(grpo_config(tmp_path / "run", whole.base, algo="dapo"))
    said = capsys.readouterr().err
    assert said.count("completions cannot be kept in") == 1 and "the run goes on without them" in said
    logs = [read_metrics(run) for run in (tmp_path / "run", whole.run)]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert how == "folder" or path.read_bytes() == b"the user's own"


def test_a_disk_that_fills_up_ends_the_keeping_and_leaves_whole_steps(whole, tmp_path, capsys):
    parts, log = shown(whole), log_of(tmp_path, whole)
    write_steps(log, parts, [0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (part_path(tmp_path, 1).stat().st_size + 99, hard))
    try:
        write_steps(log, parts, [2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_steps(log, parts, [3])
    log.sync()
    assert capsys.readouterr().err.count("completions cannot be kept") == 1
    assert list(kept_steps(tmp_path)) == [1, 2]
    assert part_path(tmp_path, 1).stat().st_size == sum(m.size for m in kept_steps(tmp_path).values())


def test_the_learner_of_a_step_shows_nothing_by_default(base):
    c = grpo_config("none", base)
    assert learner_of(c).observe(None, None, None) is None
