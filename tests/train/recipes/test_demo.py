"""The whole demo, end to end, at toy size: text -> base model -> R1-Zero -> control -> report."""
import json

import pytest

from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.main import main
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.recipes.demo import DemoConfig, part_done
from r1zero.train.run import Run

from ..loop_cases import pretrain_config, text_file

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
