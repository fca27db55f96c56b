"""The whole demo, end to end, at toy size: text -> base model -> R1-Zero -> control -> report."""
import json
import os
import re
import signal
from functools import partial

import pytest

from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.main import main
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.interrupt import Stopped
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.recipes.demo import DemoConfig, base_config, grpo_config
from r1zero.train.recipes.parts import part_done, run_part
from r1zero.train.run import Run

from ..loop_cases import TIMES, pretrain_config, text_file

SMALL = ["--model", "tiny", "--pretrain-steps", "12", "--documents", "400", "--rl-steps", "2",
         "--control-steps", "1", "--eval-problems", "6", "--eval-samples", "2", "--max-new-tokens", "24",
         "--high", "9"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--run", str(folder), "--seeds", "3", *SMALL]) == 0
    return folder


def test_every_part_leaves_its_results_and_the_report_shows_them(finished):
    seed = finished / "seed3"
    results = json.loads((seed / "results.json").read_text())
    assert {"base", "rl", "control", "seconds", "tokens", "parameters"} <= results.keys()
    for part in ("base", "rl", "control"):
        assert len((seed / f"eval_{part}.jsonl").read_text().splitlines()) == 6 * 2
        assert results[part]["eval"]["n_problems"] == 6
    assert len((seed / "rl" / "metrics.jsonl").read_text().splitlines()) == 2
    page = (finished / "report.html").read_text()
    assert "R1-Zero" in page and "http" not in page.split("<body")[0]
    assert (finished / "curves.png").stat().st_size > 10_000


MOE = ["tiny-moe" if word == "tiny" else word for word in SMALL] + ["--seeds", "3"]


def stopped_step(learner, task, config, step: int) -> dict:
    """A step of GRPO during which somebody presses Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    return timed_step(learner, task, config, step)


def mixture_stopped_and_resumed(folder) -> None:
    """The demo of a mixture, stopped by Ctrl-C after the first of its two steps of R1-Zero, then resumed."""
    config = DemoConfig(run=str(folder), model="tiny-moe", pretrain_steps=12, documents=400, rl_steps=2,
                        control_steps=1, eval_problems=6, eval_samples=2, max_new_tokens=24, high=9)
    run_part(pretrain, base_config(config, folder / "seed3" / "base", 3))
    with pytest.raises(Stopped):
        rl = grpo_config(config, folder / "seed3", 3, control=False)
        run_part(partial(grpo, step_of=stopped_step), rl)
    assert len(read_metrics(folder / "seed3" / "rl")) == 1
    assert main(["demo", "--run", str(folder), "--resume", *MOE]) == 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "demo"
    mixture_stopped_and_resumed(folder)
    return folder


def test_a_mixture_of_experts_goes_through_the_whole_demo_though_it_is_stopped(mixture):
    results = json.loads((mixture / "seed3" / "results.json").read_text())
    assert results["active_parameters"] < results["parameters"]
    for part in ("base", "rl", "control"):
        assert results[part]["eval"]["n_problems"] == 6
    assert [row["step"] for row in read_metrics(mixture / "seed3" / "rl")] == [1, 2]
    page = (mixture / "report.html").read_text()
    assert "How busy the experts were" in page and "has 2 mixtures, layers of 8 experts each" in page
    assert "--model tiny-moe" in page and "of which each token uses 0.04 million" in page
    assert (mixture / "expert_load.png").stat().st_size > 10_000


def test_a_dense_demo_has_no_word_of_experts(finished):
    assert "expert" not in (finished / "report.html").read_text().replace("base64", "")
    assert "active_parameters" not in json.loads((finished / "seed3" / "results.json").read_text())


def sections_of(folder) -> dict[str, str]:
    """The page by its headings, without the folder's name and without what times and dates it gives."""
    page = (folder / "report.html").read_text().replace(str(folder), "FOLDER")
    first, *rest = re.split("<h2>(.*?)</h2>", page)
    found = {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}
    return {name: text for name, text in found.items()
            if name not in ("Configuration", "Machine, time and tokens")}


@pytest.mark.slow
def test_a_mixture_that_was_stopped_has_the_same_log_and_page_as_one_that_was_not(mixture, tmp_path):
    whole = tmp_path / "demo"
    assert main(["demo", "--run", str(whole), *MOE]) == 0
    for part in ("base", "rl", "control"):
        logs = [[{name: value for name, value in row.items() if name not in TIMES}
                 for row in read_metrics(folder / "seed3" / part)] for folder in (mixture, whole)]
        assert logs[0] == logs[1]
    assert sections_of(mixture) == sections_of(whole) and len(sections_of(whole)) > 8


def test_an_unknown_model_is_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path / "demo"), "--model", "demo-mow"]) == 2
    error = capsys.readouterr().err
    assert "demo-mow" in error and "demo-moe" in error and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_all_parts_are_measured_on_the_same_problems(finished):
    problems = [[json.loads(line)["prompt"] for line in (finished / "seed3" / f"eval_{part}.jsonl").open()]
                for part in ("base", "rl", "control")]
    assert problems[0] == problems[1] == problems[2]


def test_a_finished_demo_is_neither_overwritten_nor_done_again(finished, capsys):
    weights = finished / "seed3" / "rl" / "checkpoints" / "step_00000002" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["demo", "--run", str(finished), "--seeds", "3", *SMALL]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["demo", "--run", str(finished), "--seeds", "3", "--resume", *SMALL]) == 0
    assert weights.stat().st_mtime_ns == before


def test_a_finished_demo_is_not_shown_under_other_flags_and_nothing_is_written(finished, capsys):
    record = finished / "demo.json"
    before = record.read_bytes()
    other = ["--rewards.format-weight", "0.7"]
    assert main(["demo", "--run", str(finished), "--seeds", "3", "--resume", *SMALL, *other]) == 2
    assert "--rewards.format-weight" in capsys.readouterr().err and record.read_bytes() == before


def test_a_demo_that_lost_its_later_parts_does_only_those_again(finished):
    """As after a kill between R1-Zero and the control: the base stays, what comes after is made anew, the
    same."""
    seed = finished / "seed3"
    results = json.loads((seed / "results.json").read_text())
    lost = {"control": results.pop("control")}
    (seed / "results.json").write_text(json.dumps(results))
    assert main(["demo", "--run", str(finished), "--seeds", "3", "--resume", *SMALL]) == 0
    again = json.loads((seed / "results.json").read_text())
    for found in (again, lost):
        assert found["control"]["eval"].pop("tokens_per_second") > 0  # the one figure that may differ
    assert again["control"]["eval"] == lost["control"]["eval"]


@pytest.mark.parametrize("flags", [{"seeds": "0,0"}, {"seeds": "a"}, {"seeds": ""}, {"control_steps": -1},
                                   {"rl_steps": 0}, {"eval_samples": 0}])
def test_flags_out_of_range_are_refused(flags):
    with pytest.raises(ValueError, match=next(iter(flags)).replace("_", "-")):
        DemoConfig(**flags)


def test_a_part_of_the_demo_counts_as_done_when_its_last_step_is_saved_not_logged(tmp_path):
    """Killed between the two, it has the last line in its log and an older checkpoint."""
    c = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=4, save_every=100)
    with Run(c, "pretrain") as run:
        for step in run.steps():
            run.log(step, {"loss": 1.0})
    assert read_metrics(c.run)[-1]["step"] == 4 and not part_done(tmp_path / "run", 4)
    pretrain(pretrain_config(c.run, c.data[0], steps=4, resume=True))
    assert part_done(tmp_path / "run", 4) and not part_done(tmp_path / "none", 4)
    assert load_checkpoint(c.run).state["tokenizer"] == Tokenizer.bytes().to_dict()
