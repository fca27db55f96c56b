"""The report: all parts there, nothing fetched or run, everything escaped, and what is missing survived."""
import json
import math
import re
import shlex
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from r1zero.rl.rewards import RewardConfig
from r1zero.train.cli.main import COMMANDS, parse_flags
from r1zero.train.cli.show import ShowConfig
from r1zero.train.grpo import GRPOConfig
from r1zero.train.recipes.demo import DemoConfig, grpo_config
from r1zero.train.report import plots
from r1zero.train.report.background import resume_command
from r1zero.train.report.demo_plots import CURVES, line_of
from r1zero.train.report.record import read_demo
from r1zero.train.report.report import seeds_table, write_report
from r1zero.train.report.results import what_got_worse
from r1zero.train.rollout_files import append_member, part_path
from r1zero.train.settings import settings_of

from .report_cases import CONFIG, Tags, lines, make_demo

PARTS = ["What was done", "The training", "What changed in the thinking", "One group, token by token",
         "The same problems before and after", "What memorising can not explain", "Why the loss says nothing",
         "Configuration", "Machine, time and tokens", "How to go on"]
PICTURES = ["curves", "accuracy", "length", "format", "dead_groups", "entropy", "kl_to_reference",
            "pretraining", "behaviour"]


TITLES = {curve.name: curve.title for curve in CURVES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A demo with its report, in coarse plots."""
    folder = make_demo(tmp_path_factory.mktemp("whole"))
    write_report(folder, partial(plots.plot, dpi=25), partial(plots.plot_bars, dpi=25))
    return folder


@pytest.fixture
def demo(whole, tmp_path):
    """A copy to take parts away from."""
    shutil.copytree(whole, tmp_path / "demo")
    return tmp_path / "demo"


def no_plot(*arguments) -> Path:
    """In place of a plot, which takes a second: an empty file."""
    path = next(a for a in arguments if isinstance(a, Path))
    path.write_bytes(b"\x89PNG")
    return path


def report(folder) -> str:
    path = write_report(folder, no_plot, no_plot)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_a_whole_report(whole):
    text = (whole / "report.html").read_text(encoding="utf-8")
    seen = Tags(text)
    assert re.findall("<h2>(.*?)</h2>", text) == PARTS
    assert seen.tags.count("img") == len(PICTURES)
    assert all(len((whole / f"{name}.png").read_bytes()) > 1000 for name in PICTURES)
    for figure in ("29.4 % → 76.1 %", "58.2 → 82.3", "× 1.41", "[26.4, 32.4]", "[73.1, 79.1]", "+0.7 points",
                   "+46.7", "The two intervals do not overlap", "at step 20", "550 problems",
                   "0 belong to the training side", "0.91 million parameters", "2,000,000", "x86_64",
                   "after the control", "corpus.persistent_share", "at least one of 4 answers right (pass@4)",
                   "tokens in an answer", "answers cut off for length"):
        assert figure in seen.text, figure
    assert "not finished" not in seen.text and "no clear gain" not in seen.text
    assert seen.text.count("answer 1: right, reward 1.10, advantage +1.30") == 1
    assert seen.text.count("✓ right") + seen.text.count("✗ wrong") == 16  # 8 problems, before and after


def test_the_page_is_self_contained(whole):
    seen = Tags((whole / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert seen.links and all(link.startswith("data:image/png;base64,") for link in seen.links)
    assert not re.search(r"url\(|@import|http", (whole / "report.html").read_text())


def test_everything_that_is_not_ours_is_escaped(demo):
    evil = "<script>alert(1)</script></pre>\ud800&amp;"
    seed = demo / "seed0"
    for part in ("base", "rl"):
        rows = [json.loads(line) for line in (seed / f"eval_{part}.jsonl").read_text().splitlines()]
        lines(seed / f"eval_{part}.jsonl",
              [{**row, "response": evil, "prompt": evil, "why": evil, "accuracy": 0.0} for row in rows])
    samples = [{"tokens": [evil, "<|" + evil], "why": evil, "reward": evil, "advantage": evil}]
    (seed / "group.json").write_text(json.dumps({"step": evil, "problem": evil, "samples": samples}))
    record = json.loads((demo / "demo.json").read_text())
    record |= {"config": {**CONFIG, evil: evil, "ops": evil}, "machine": {"cpu": evil}, "finished": evil}
    (demo / "demo.json").write_text(json.dumps(record))
    text = report(demo)
    assert "script" not in Tags(text).tags and "<script" not in text and "&amp;amp;" in text
    assert re.findall("<h2>(.*?)</h2>", text) == PARTS


MISSING = {  # what is taken away: what the report then says
    "seed0/group.json": "No group was kept",
    "seed0/control": "its curves are missing",
    "seed0/rl": "no log of reinforcement learning",
    "seed0/results.json": "no measurement before and after",
    "seed0/eval_base.jsonl": "Only one side has been measured",
    "seed0/base": "What was done",
    "seed0": "no measurement before and after",
}


@pytest.mark.parametrize("gone", MISSING)
def test_a_missing_part_is_said_and_survived(demo, gone):
    taken = demo / gone
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    text = report(demo)
    assert re.findall("<h2>(.*?)</h2>", text) == PARTS and MISSING[gone] in Tags(text).text
    assert seeds_table(demo).count("\n") == 3


def test_a_demo_without_control_or_end(demo):
    results = json.loads((demo / "seed0" / "results.json").read_text())
    del results["control"]
    (demo / "seed0" / "results.json").write_text(json.dumps(results))
    shutil.rmtree(demo / "seed0" / "control")
    record = json.loads((demo / "demo.json").read_text())
    (demo / "demo.json").write_text(json.dumps({**record, "finished": None}))
    seen = Tags(report(demo))
    assert "There is no control" in seen.text and "This demo has not finished" in seen.text
    assert "The control has met" not in seen.text and seen.text.count("after the control") == 0


@pytest.mark.parametrize("torn", [
    "", "{", "[1, 2]", "null", '"x"', '{"rl": 3, "seconds": [], "base": {"eval": 1}}',
    '{"samples": [1, null, {}]}', "\ufffd\x00", "[" * 100_000,
])
def test_torn_files_are_survived(demo, torn):
    for name in ("results.json", "group.json", "eval_rl.jsonl", "rl/metrics.jsonl", "rl/run.json"):
        (demo / "seed0" / name).write_text(torn)
    assert re.findall("<h2>(.*?)</h2>", report(demo)) == PARTS


def test_half_a_line_and_figures_that_are_none_leave_gaps(demo):
    path = demo / "seed0" / "rl" / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:40], '{"step": 41, "loss": NaN, "accuracy": null}', rows[41][:20]]))
    _, (seed,) = read_demo(demo)
    assert seed.last_step("rl") == 41
    line = line_of(seed, "rl", "accuracy", "")
    assert len(line.values) == 41 and math.isnan(line.values[40])
    assert "the loss says nothing" in report(demo)


NO_NUMBERS = [None, "x", [], {}, True, "NaN", "1" * 400, "Infinity"]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:9])
def test_metrics_that_are_no_numbers_leave_gaps(demo, value):
    for part in ("base", "rl", "control"):
        path = demo / "seed0" / part / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        raw = value if isinstance(value, str) and value not in ("x",) else json.dumps(value)
        texts = ["{" + ", ".join(f'"{name}": {n if name == "step" else raw}' for name, n in row.items()) + "}"
                 for row in rows]
        path.write_text("\n".join(texts))
    assert re.findall("<h2>(.*?)</h2>", report(demo)) == PARTS


def test_an_integer_of_thousands_of_digits_is_read_around(demo):
    path = demo / "seed0" / "rl" / "metrics.jsonl"
    whole = read_demo(demo)[1][0].logs["rl"]
    path.write_text('{"step": ' + "9" * 5000 + "}\n" + path.read_text())
    assert read_demo(demo)[1][0].logs["rl"] == whole


@pytest.mark.parametrize("name", ["kl_to_reference", "entropy", "accuracy", "loss"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_metric_that_was_not_measured_in_all_or_some_steps_has_no_picture_or_gaps(demo, name, every):
    for part in ("rl", "control"):
        path = demo / "seed0" / part / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[::every]:
            del row[name]
        lines(path, rows)
    text = report(demo)
    assert re.findall("<h2>(.*?)</h2>", text) == PARTS and "nan" not in Tags(text).text.split()
    is_shown = f'alt="{TITLES.get(name)} over the steps of GRPO"' in text
    assert name == "loss" or is_shown == (every == 2)


def test_no_demo_is_a_clear_error(tmp_path):
    for make in (write_report, seeds_table):
        with pytest.raises(ValueError, match="demo.json"):
            make(tmp_path)


def test_several_seeds(demo):
    folder = make_demo(demo.parent / "three", seeds=(0, 1, 2), steps=20)
    text = report(folder)
    assert "All seeds" in re.findall("<h2>(.*?)</h2>", text) and "table of all 3 seeds" in Tags(text).text
    head, rule, *rows = seeds_table(folder).splitlines()
    assert len(rows) == 3 and all(line.count("|") == head.count("|") for line in (rule, *rows))
    assert rows[2].startswith("| 2 | 29.4 % [26.4, 32.4] | 78.1 % [75.1, 81.1] | 30.1 % [27.1, 33.1] |")
    assert "| × 1.41 |" in rows[2] and rows[2].endswith("| 9.4 |")


def test_what_was_predicted_of_memory_stands_beside_what_was_measured(demo):
    assert "Memory of R1-Zero" not in report(demo)  # older runs have no plan
    predicted = {"weights": 3_560_000, "critic": 0, "<i>": 1_000_000, "peak": 12_340_000}
    path = demo / "seed0/rl/run.json"
    path.write_text(json.dumps({"memory": {"predicted": predicted, "measured": 456_700_000}}))
    text = report(demo)
    for row in ("<th>MB</th><th>seed 0</th>", "<td>weights</td><td>3.6</td>", "<td>peak</td><td>12.3</td>",
                "<td>peak, measured</td><td>456.7</td>", "<td>&lt;i&gt;</td><td>1.0</td>"):
        assert row in text, row
    assert "critic" not in text and "of the whole process, with Python" in text
    path.write_text(json.dumps({"memory": {"predicted": predicted, "measured": 1, "device": "cuda"}}))
    assert "measured at the end, of PyTorch’s tensors" in report(demo)
    for torn, shown in (({"predicted": {"weights": "x"}}, "<td>weights</td><td>–</td>"), (3, "Machine")):
        path.write_text(json.dumps({"memory": torn}))
        assert shown in report(demo)


def test_no_gain_is_called_no_gain(demo):
    path = demo / "seed0" / "results.json"
    results = json.loads(path.read_text())
    for accuracy, low, high in ((0.31, 0.28, 0.34), (0.1, 0.08, 0.12)):
        results["rl"]["eval"] |= {"accuracy": accuracy, "accuracy_95": [low, high]}
        path.write_text(json.dumps(results))
        assert "this run shows no clear gain" in report(demo)
    assert what_got_worse(read_demo(demo)[1][0]) == ""
    results["rl"]["behaviour"]["arithmetic_accuracy"] = 0.8
    path.write_text(json.dumps(results))
    assert "equations that are true (100.0 % → 80.0 %)" in Tags(report(demo)).text


def test_it_says_how_to_see_every_group_where_they_were_kept(demo):
    assert "r1zero show" not in report(demo)
    append_member(part_path(demo / "seed0" / "rl", 1), 1, b"{}\n")
    [command] = re.findall("<code>(r1zero show .*?)</code>", report(demo))
    flags = parse_flags("show", ShowConfig, shlex.split(Tags(command).text)[2:])
    assert flags.run == str(demo / "seed0" / "rl")


def test_the_commands_that_it_prints_parse(demo):
    rewards = {"format_weight": 0.2, "coherence_weight": 0.0, "efficiency_weight": 0.5,
               "plugin": "json:dumps", "plugin_weight": 0.1}
    config = {"seed": 3, "max_new_tokens": 128, "optim": {"lr": 2e-4}, "rewards": rewards,
              "loss": {"overlong_filter": True}, "task": {"options": ["high=9", "ops=+-"]}}
    (demo / "seed0" / "rl" / "run.json").write_text(json.dumps({"config": config}))
    text = re.findall("<pre>(.*?)</pre>", report(demo), re.DOTALL)[-1]
    commands = [shlex.split(line) for line in Tags(text).text.replace("\\\n", "").splitlines()
                if line.startswith("r1zero")]
    assert [words[1] for words in commands] == ["chat", "grpo", "demo", "demo", "demo"]
    grpo = parse_flags("grpo", GRPOConfig, commands[1][2:])
    assert grpo.task.options == ("high=9", "ops=+-") and grpo.rewards == RewardConfig(**rewards)
    assert (grpo.seed, grpo.max_new_tokens, grpo.optim.lr, grpo.resume) == (3, 128, 2e-4, True)
    assert grpo.loss.overlong_filter
    assert [parse_flags("demo", DemoConfig, words[2:]).seeds for words in commands[2:]] == ["0,1,2", "0", "0"]
    assert {words[1] for words in commands} <= set(COMMANDS)


@pytest.mark.parametrize("control", [False, True])
def test_the_command_to_go_on_has_the_settings_of_the_run(demo, control):
    config = DemoConfig(rewards=RewardConfig(format_weight=0.1))
    began = grpo_config(config, demo / "seed0", 7, control)
    (demo / "seed0" / "rl" / "run.json").write_text(json.dumps({"config": asdict(began)}))
    _, [seed] = read_demo(demo)
    words = shlex.split(resume_command(seed).replace("\\\n", ""))
    goes_on = parse_flags("grpo", GRPOConfig, words[2:])
    free = {"steps", "resume", "run", "save_every"}
    assert settings_of(goes_on, free) == settings_of(began, free)
