"""The report: all parts there, nothing fetched or run, everything escaped, and what is missing survived."""
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.train.cli.main import COMMANDS, parse_flags
from r1zero.train.grpo import GRPOConfig
from r1zero.train.recipes.demo import DemoConfig
from r1zero.train.report import page, plots
from r1zero.train.report.record import read_demo
from r1zero.train.report.report import seeds_table, what_got_worse, write_report

from .report_cases import CONFIG, lines, make_demo

PARTS = ["What was done", "The training", "What changed in the thinking", "One group, token by token",
         "The same problems before and after", "What memorising can not explain", "Why the loss says nothing",
         "Configuration", "Machine, time and tokens", "How to go on"]
PICTURES = ["curves", "accuracy", "length", "format", "dead_groups", "entropy", "kl_to_reference",
            "pretraining", "behaviour"]


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A demo with its report, coarsely drawn."""
    folder = make_demo(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 25)
        write_report(folder)
    return folder


@pytest.fixture
def demo(whole, tmp_path, monkeypatch):
    """A copy to take parts away from. Pictures take a second to draw: here they are only collected."""
    def collect(*arguments):
        path = next(a for a in arguments if isinstance(a, Path))
        path.write_bytes(b"\x89PNG")
        return path
    monkeypatch.setattr(plots, "draw", collect)
    monkeypatch.setattr(plots, "draw_bars", collect)
    shutil.copytree(whole, tmp_path / "demo")
    return tmp_path / "demo"


def report(folder) -> str:
    path = write_report(folder)
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
                   "after the control", "corpus.persistent_share"):
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
    line = plots.line(seed, "rl", "accuracy", "")
    assert len(line.values) == 41 and math.isnan(line.values[40])
    assert "the loss says nothing" in report(demo)


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


def test_the_commands_that_it_prints_parse(demo):
    config = {"seed": 3, "max_new_tokens": 128, "optim": {"lr": 2e-4}, "rewards": {"format_weight": 0.2},
              "task": {"options": ["high=9", "ops=+-"]}}
    (demo / "seed0" / "rl" / "run.json").write_text(json.dumps({"config": config}))
    text = re.findall("<pre>(.*?)</pre>", report(demo), re.DOTALL)[-1]
    commands = [shlex.split(line) for line in Tags(text).text.replace("\\\n", "").splitlines()
                if line.startswith("r1zero")]
    assert [words[1] for words in commands] == ["chat", "grpo", "demo", "demo", "demo"]
    grpo = parse_flags("grpo", GRPOConfig, commands[1][2:])
    assert grpo.task.options == ("high=9", "ops=+-") and grpo.rewards.format_weight == 0.2
    assert (grpo.seed, grpo.max_new_tokens, grpo.optim.lr, grpo.resume) == (3, 128, 2e-4, True)
    assert [parse_flags("demo", DemoConfig, words[2:]).seeds for words in commands[2:]] == ["0,1,2", "0", "0"]
    assert {words[1] for words in commands} <= set(COMMANDS)


def test_gaps_are_drawn(tmp_path):
    gaps = plots.Line("a", plots.RL, [1, 2, 3], [math.nan, 1.0, math.inf])
    mark = plots.Mark("b", plots.BASE, 0, 0.5, (0.6, 0.4))  # an interval that does not hold its value
    panels = [plots.Panel("t", "y", [gaps], [mark], percent=True), plots.Panel("t", "y", [])]
    assert plots.draw(panels, tmp_path / "a.png", 4, 2).exists()
    assert plots.draw_bars("t", ["x"], [("a", plots.RL, [None])], tmp_path / "b.png", 4, 2).exists()


def test_smoothing_keeps_straight_lines_and_skips_gaps():
    steps = list(range(20))
    assert plots.smooth(steps, [2.0 * step + 1 for step in steps], 3) == pytest.approx(
        [2.0 * step + 1 for step in steps])
    assert plots.smooth([1, 2, 3], [1.0, math.nan, 3.0], 1) == pytest.approx([1, 2, 3])
    assert plots.smooth([], [], 1) == [] and plots.smooth([1], [5.0], 2) == [5.0]
    assert all(map(math.isnan, plots.smooth([1, 2], [math.nan] * 2, 1)))
    jitter = [(-1.0) ** step for step in steps]
    assert max(map(abs, plots.smooth(steps, jitter, 3)[3:-3])) < 0.2


@given(st.text(max_size=60))
def test_page_pieces_escape_any_text(text):
    made = page.document(text, [page.section(text, page.table([text], [[text]])), page.cards([(text,) * 3]),
                                page.tokens([text], text, text, -0.5), page.response(text, True, text, text)])
    seen = Tags(made.encode("utf-8").decode("utf-8"))
    assert set(seen.tags) <= {"html", "head", "meta", "title", "style", "body", "section", "h2", "div",
                              "table", "tr", "th", "td", "b", "span", "p", "br"}
    assert [seen.tags.count(tag) for tag in ("p", "table", "section", "title")] == [1, 1, 1, 1]
