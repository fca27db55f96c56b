"""`r1zero collect`: each line can be traced and made again, whatever the batch, a kill or a resume."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from r1zero.eval.sampler import ModelSampler
from r1zero.model.checkpoint import load_model
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.requests import group_requests
from r1zero.model.engine.sampling import sample_seeds
from r1zero.rl.rewards import RewardConfig
from r1zero.train.cli.main import main
from r1zero.train.collect import CollectConfig, collect, sample_problems
from r1zero.train.conversations import read_conversations
from r1zero.train.interrupt import Stopped
from r1zero.train.sample_file import SampleFile
from r1zero.train.task_flags import TaskFlags

from ..rl.cases import Bandit
from .loop_cases import save_base
from .run_cases import fails


@dataclass(frozen=True)
class Plain(Bandit):
    """A task that random bytes often solve, and its own flags."""
    chat: bool = False
    most: int | None = None
    files = ()

    def size(self, split):
        return self.most


class Letters(Plain):
    """The same, and it tells languages apart: ASCII or not."""

    @staticmethod
    def language(problem, response):
        return sum(letter.isascii() for letter in response) / len(response) if response else 1.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def config_for(base, out, **changes) -> CollectConfig:
    options = dict(task=Letters(), problems=7, samples=3, max_new_tokens=6, keep=("right",), batch=2)
    return CollectConfig(run=str(base), out=str(out), device="cpu", **options | changes)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(path) -> dict:
    return json.loads(path.with_name(f"{path.name}.summary.json").read_text())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """What a call without a break leaves, and the samples that it was made of."""
    out = tmp_path_factory.mktemp("whole") / "pairs.jsonl"
    record = collect(config_for(base, out))
    impossible = out.with_name("none.jsonl")
    with fails(ValueError, "nothing is kept, so .*none.jsonl is not written"):
        collect(config_for(base, impossible, min_reward=99.0))
    samples = out.with_name("none.jsonl.partial").read_bytes()
    return {"lines": out.read_bytes(), "record": record, "rows": read(out), "samples": samples}


def test_each_line_is_sampled_by_seed_index_and_number_and_says_where_it_is_from(base, whole, tmp_path):
    model, tokenizer, checkpoint = load_model(str(base), torch.device("cpu"))
    engine, task = Engine(model, tokenizer), Letters()
    rows = whole["rows"]
    assert 0 < len(rows) < 21
    for row in rows:
        seeds = sample_seeds(3, 0, row["index"])[row["sample"] : row["sample"] + 1]
        requests = group_requests([tokenizer.encode(row["prompt"])], 1, 6, 1.0, seeds, tokenizer.eos_ids)
        [found] = engine.generate(requests)
        assert len(found.tokens) == row["n_tokens"] and found.finish_reason == row["finish_reason"]
        ids = [token for token in found.tokens.tolist() if token not in tokenizer.eos_ids]
        assert tokenizer.decode(ids, keep_special=True) == row["response"]
        assert row["prompt"] == task.prompt(row["problem"]) and task.grade(0, row["response"]).accuracy == 1
        assert row["parts"]["accuracy"] == 1
        assert row["reward"] == pytest.approx(1 + 0.2 * row["parts"]["format"])
        assert row["language"] == Letters.language(0, row["response"])
        assert (row["task"], row["split"], row["seed"], row["temperature"]) == ("bandit", "train", 0, 1.0)
        assert row["weights"] == checkpoint.weights_fingerprint and row["model"] == str(checkpoint.path)
    out = tmp_path / "pairs.jsonl"
    out.write_bytes(whole["lines"])
    pairs = [(pair.prompt, pair.response) for [pair] in read_conversations(out)]  # as `r1zero sft` reads them
    assert pairs == [(row["prompt"], row["response"]) for row in rows]


@pytest.mark.parametrize("changes", [dict(batch=1), dict(batch=64), dict(batch=5)])
def test_the_lines_do_not_depend_on_the_batch(base, whole, tmp_path, changes):
    collect(config_for(base, tmp_path / "x.jsonl", **changes))
    assert (tmp_path / "x.jsonl").read_bytes() == whole["lines"]


def test_other_problems_and_more_samples_change_no_sample_and_another_seed_all(base, whole, tmp_path):
    def sampled(name: str, **changes) -> dict:
        collect(config_for(base, tmp_path / name, **changes))
        return {(row["index"], row["sample"]): row["response"] for row in read(tmp_path / name)}

    expected = {(row["index"], row["sample"]): row["response"] for row in whole["rows"]}
    later = {key: text for key, text in expected.items() if key[0] >= 3}
    assert sampled("later", start=3, problems=4) == later
    more = sampled("more", samples=5)
    assert len(more) > len(expected) and {key: more[key] for key in expected} == expected
    other = sampled("other", seed=1)
    assert sum(other.get(key) == text for key, text in expected.items()) < len(expected) / 2


def test_the_summary_has_flags_counts_and_cost(whole, base, tmp_path):
    out = tmp_path / "x.jsonl"
    record = collect(config_for(base, out, per_problem=1, start=1, problems=3))
    assert summary(out) == json.loads(json.dumps(record))
    assert record["flags"]["per_problem"] == 1
    assert record["lines"]["lines"] == record["kept"] == len(read(out))
    assert record["sampled"] == 9 == record["kept"] + sum(record["dropped"].values())
    assert record["tokens"] >= record["kept_tokens"] > 0 and record["seconds"] > 0
    assert not out.with_name("x.jsonl.partial").exists()


# ---- broken off, and resumed ----

def test_killed_at_any_byte_it_goes_on_to_the_same_bytes(base, whole, tmp_path, capsys):
    samples = whole["samples"]
    ends = [i + 1 for i, byte in enumerate(samples) if byte == ord("\n")]
    assert len(ends) == 8
    cuts = [0, 10, ends[0], ends[0] + 5, ends[1], ends[2] - 1, ends[2], ends[5] + 9, ends[6], ends[7] - 1,
            ends[7]]
    for cut in cuts:
        out = tmp_path / f"{cut}.jsonl"
        partial = out.with_name(f"{out.name}.partial")
        partial.write_bytes(samples[:cut])
        collect(config_for(base, out, resume=True))
        assert out.read_bytes() == whole["lines"], cut
        assert not partial.exists()
    assert capsys.readouterr().err.count("holds no samples to go on with") == 2
    # Damaged in its middle, it is whole up to there.
    lines = samples.splitlines(keepends=True)
    torn = lines[3][:30] + b"\n"
    for name, damaged in (("gone", lines[:3] + lines[4:]), ("torn", [*lines[:3], torn, *lines[4:]])):
        (tmp_path / f"{name}.jsonl.partial").write_bytes(b"".join(damaged))
        collect(config_for(base, tmp_path / f"{name}.jsonl", resume=True))
        assert (tmp_path / f"{name}.jsonl").read_bytes() == whole["lines"], name


def test_whole_batches_are_kept_and_not_sampled_again(base, whole, tmp_path):
    out = tmp_path / "x.jsonl"
    header, *groups = whole["samples"].splitlines()
    marked = [json.dumps(json.loads(group) | {"seconds": 1000.0}).encode() for group in groups]
    partial = tmp_path / "x.jsonl.partial"
    partial.write_bytes(b"\n".join([header, *marked[:5], b""]))
    record = collect(config_for(base, out, resume=True))  # --batch is 2: four of the five stay
    assert 4000 < record["seconds"] < 4900 and out.read_bytes() == whole["lines"]
    # Where all are there, the last batch need not be whole.
    partial.write_bytes(b"\n".join([header, *marked, b""]))
    out.unlink()
    assert collect(config_for(base, out, resume=True))["seconds"] == 7000


def test_ctrl_c_stops_behind_a_batch_and_resume_goes_on(base, whole, tmp_path):
    config = config_for(base, tmp_path / "x.jsonl")
    model, tokenizer, _ = load_model(str(base), torch.device("cpu"))
    sampler = ModelSampler(model, tokenizer, 6)
    calls = []

    class Pressed:
        """The sampler, with Ctrl-C pressed in its second batch."""
        n_prompts = 0

        def __call__(self, prompts, n_samples):
            calls.append(len(prompts))
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            sampler.n_prompts = self.n_prompts
            return sampler(prompts, n_samples)

    header = json.loads(whole["samples"].splitlines()[0])
    file = SampleFile(config.out)
    prompts = [Letters().prompt(i) for i in range(7)]
    file.open(config, header, prompts)
    with pytest.raises(Stopped, match="4 of 7 problems are in .*x.jsonl.partial; go on with --resume"):
        sample_problems(config, Pressed(), prompts, file)
    assert calls == [2, 2]
    with fails(ValueError, "holds the samples of a call that was broken off; go on with --resume"):
        collect(config)
    collect(config_for(base, config.out, resume=True))
    assert (tmp_path / "x.jsonl").read_bytes() == whole["lines"]


def test_resumed_with_other_filters_it_samples_nothing_again(base, whole, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    out.with_name("x.jsonl.partial").write_bytes(whole["samples"])
    collect(config_for(base, out, resume=True, keep=("all",), per_problem=2, batch=3, problems=5))
    rows = read(out)
    assert {row["index"] for row in rows} == set(range(5)) and len(rows) == 10
    assert any(row["parts"]["accuracy"] == 0 for row in rows)
    # The samples of the two other problems stay, and are taken for all seven.
    assert out.with_name("x.jsonl.partial").read_bytes() == whole["samples"]
    assert "x.jsonl.partial stays, since it holds the samples of more problems" in capsys.readouterr().err
    collect(config_for(base, out, resume=True))
    assert out.read_bytes() == whole["lines"] and not out.with_name("x.jsonl.partial").exists()


@pytest.mark.parametrize(("changes", "match"), [
    (dict(seed=1), "--seed is 0 there and 1 here"), (dict(temperature=0.5), "--temperature is 1.0 there"),
    (dict(samples=2), "--samples is 3 there"), (dict(max_new_tokens=5), "--max-new-tokens"),
    (dict(start=1), "--start"), (dict(split="test"), "--split"),
])
def test_samples_of_other_flags_are_refused_and_stay(base, whole, tmp_path, changes, match):
    partial = tmp_path / "x.jsonl.partial"
    partial.write_bytes(whole["samples"])
    with fails(ValueError, match):
        collect(config_for(base, tmp_path / "x.jsonl", resume=True, **changes))
    assert partial.read_bytes() == whole["samples"] and not (tmp_path / "x.jsonl").exists()


def test_samples_of_another_model_other_prompts_or_none_of_ours_are_refused(base, whole, tmp_path):
    partial = tmp_path / "x.jsonl.partial"
    other = whole["samples"].replace(b'"prompt": "4:"', b'"prompt": "5:"')
    model = save_base(tmp_path / "other", seed=1)
    for samples, run, match in [(whole["samples"], model, "are of another model"),
                                (other, base, "problem 4 has another prompt in .*'5:', and '4:' now"),
                                (b'{"index": 1}\n', base, "is not as r1zero collect wrote it"),
                                (b"\xff\n", base, "is not as r1zero collect wrote it")]:
        partial.write_bytes(samples)
        with fails(ValueError, match):
            collect(config_for(run, tmp_path / "x.jsonl", resume=True))
        assert partial.read_bytes() == samples


def test_a_whole_file_is_not_made_again_with_resume_unless_the_flags_differ(base, whole, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    record = collect(config_for(base, out))
    assert collect(config_for(base, out, resume=True, batch=5)) == json.loads(json.dumps(record))
    assert "nothing to do" in capsys.readouterr().err
    with fails(ValueError, "is whole, and was made with another --per-problem, --seed;"):
        collect(config_for(base, out, resume=True, per_problem=2, seed=1))
    # A summary of before there were these flags: they count as their defaults.
    older = summary(out)
    del older["flags"]["max_repetition"], older["flags"]["rewards"]["process"]
    (tmp_path / "x.jsonl.summary.json").write_text(json.dumps(older))
    collect(config_for(base, out, resume=True))
    assert "nothing to do" in capsys.readouterr().err
    with fails(ValueError, "is whole, and was made with another --max-repetition;"):
        collect(config_for(base, out, resume=True, max_repetition=0.9))
    with fails(ValueError, "made with another --run"):
        collect(config_for(save_base(tmp_path / "other", seed=1), out, resume=True))
    out.write_bytes(b"{}\n")  # no longer the lines of the summary: they are made again
    collect(config_for(base, out, resume=True))
    assert out.read_bytes() == whole["lines"]


def test_a_whole_file_whose_graders_have_changed_is_not_taken_for_whole(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, data, out = tmp_path / "judge_that_changes.py", tmp_path / "q.jsonl", tmp_path / "x.jsonl"
    code.write_text("def judge(samples):\n    return [1.0 for sample in samples]\n")
    data.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n')
    task = TaskFlags("jsonl", ("test_share=0",), data=str(data))
    config = config_for(base, out, task=task, problems=2, keep=("all",), resume=True,
                        rewards=RewardConfig(plugin="judge_that_changes:judge"))
    record = collect(config)
    assert collect(config) == json.loads(json.dumps(record))
    for file, what in ((code, "plugin .changed: .*judge_that_ch"), (data, "problems .changed: .*q.jsonl")):
        before = file.read_text()
        file.write_text(before.replace("1", "3"))
        with fails(ValueError, f"is whole, and what grades its answers has changed since: {what}"):
            collect(config)
        file.write_text(before)
    older = summary(out)  # of before graders were kept
    del older["graders"]
    (tmp_path / "x.jsonl.summary.json").write_text(json.dumps(older))
    code.write_text("# other\n")
    assert collect(config) == older


@pytest.mark.slow
def test_a_real_kill_loses_no_whole_batch(tmp_path):
    base = save_base(tmp_path / "base")
    words = [sys.executable, "-m", "r1zero.train.cli.main", "collect", "--run", str(base),
             "--problems", "200", "--keep", "all", "--batch", "2", "--max-new-tokens", "8", "--device", "cpu"]
    subprocess.run([*words, "--out", str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    out = tmp_path / "x.jsonl"
    partial = tmp_path / "x.jsonl.partial"
    quiet = subprocess.DEVNULL
    child = subprocess.Popen([*words, "--out", str(out)], stdout=quiet, stderr=quiet)
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 20):
        time.sleep(0.001)
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert partial.exists() and not out.exists()
    subprocess.run([*words, "--out", str(out), "--resume"], check=True, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- rankings ----

def test_rankings_have_all_answers_the_best_first(base, tmp_path):
    out = tmp_path / "rankings.jsonl"
    record = collect(config_for(base, out, rank=True, keep=("right", "formed"), samples=5, max_new_tokens=40))
    rows = read(out)
    assert rows and record["lines"]["lines"] == len(rows)
    for row in rows:
        assert 2 <= len(row["answers"]) <= 5 and len(set(row["answers"])) == len(row["answers"])
        assert row["ranks"] == sorted(row["ranks"]) and row["ranks"][0] == 1 < row["ranks"][-1]
        assert [float(is_right) for is_right in row["right"]] == row["scores"]
        assert len(row["samples"]) == len(row["n_tokens"]) == len(row["parts"]) == len(row["answers"])
    assert record["kept"] == sum(len(row["answers"]) for row in rows)


# ---- bad input ----

@pytest.mark.parametrize(("changes", "match"), [
    (dict(samples=0), "--samples is 0"), (dict(problems=0), "--problems is 0"),
    (dict(start=-1), "--start is -1"),
    (dict(split="dev"), "--split is 'dev', expected train or test"), (dict(batch=0), "--batch is 0"),
    (dict(temperature=-1.0), "--temperature is -1"),
    (dict(temperature=0.0), "gives one answer, and --samples is 3"),
    (dict(temperature=0.0, samples=1, keep=("all",), label_steps=8), "gives one completion, and --label-st"),
    (dict(rank=True, keep=("right", "formed"), samples=1), "--rank compares answers"),
    (dict(max_new_tokens=0), "--max-new-tokens is 0"), (dict(max_new_tokens=10_000), "max_seq_len is 256"),
    (dict(max_new_tokens=255), "problem 0 has 2 tokens, and a max_seq_len of 256 leaves 1 beside 255"),
    (dict(out="/"), "it is a folder"),
    (dict(task=Letters(most=5)), "ask for 7 problems, but bandit has 5 different train problems"),
    (dict(task=Plain(), min_language=0.5), "bandit does not tell languages apart"),
    (dict(task=Letters(chat=True), rank=True, keep=("right", "formed")), "--chat with --rank: "),
    (dict(run="/nowhere"), "/nowhere"),
])
def test_bad_flags_are_refused_before_anything_is_written(base, tmp_path, changes, match):
    given = dict(run=str(base), out=str(tmp_path / "folder" / "x.jsonl")) | changes
    with fails(ValueError, match):
        collect(config_for(given.pop("run"), given.pop("out"), **given))
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_refused(base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with fails(ValueError, "pipe is a device or a pipe; give a file"):
        config_for(base, tmp_path / "pipe")


def test_the_checkpoint_itself_is_never_replaced(base):
    with fails(ValueError, "would replace the file"):
        config_for(base, base / "checkpoints" / "best.json")


def test_from_the_command_line_with_a_filter_of_one_s_own(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_filter_for_collect.py").write_text(
        "def even(samples):\n    return [1.0 if len(s.tokens) % 2 == 0 else 0.0 for s in samples]\n")
    words = ["collect", "--run", str(base), "--out", "x.jsonl", "--problems", "6", "--max-new-tokens", "30",
             "--options", "n_numbers=2", "high=9", "--device", "cpu"]
    assert main(words) == 2  # random weights solve nothing
    err = capsys.readouterr().err
    assert "nothing is kept" in err and "Traceback" not in err
    more = ["--keep", "all", "--rewards.plugin", "my_filter_for_collect:even", "--min-reward", "1",
            "--resume"]
    assert main([*words, *more]) == 0
    rows = read(tmp_path / "x.jsonl")
    assert rows and all(row["n_tokens"] % 2 == 0 and row["parts"]["even"] == 1 for row in rows)
    assert "reward too low" in capsys.readouterr().out
    # `r1zero grade` reads the lines, and finds the same rewards.
    assert main(["grade", "--input", "x.jsonl", "--out", "grades.jsonl", "--rewards.plugin-weight", "0"]) == 0
    grades = read(tmp_path / "grades.jsonl")
    assert [row["format"] for row in grades] == [row["parts"]["format"] for row in rows]
