"""The report's section on a mixture of experts: its pictures and numbers, and logs that are torn."""
import json
from functools import partial
from pathlib import Path

import pytest

from r1zero.train.report import plots
from r1zero.train.report.experts import load_maps, plot_experts, read_loads
from r1zero.train.report.record import read_demo
from r1zero.train.report.report import write_report

from .report_cases import Tags, give_experts, lines, make_demo

TITLE = "How busy the experts were"


@pytest.fixture
def demo(tmp_path):
    return make_demo(tmp_path / "demo", steps=20)


class Asked:
    """In place of the plots: files without a picture, and what was asked for."""

    def __init__(self):
        self.panels, self.grids = {}, {}

    def plot(self, panels, path, *rest) -> Path:
        self.panels[path.stem] = panels
        path.write_bytes(b"\x89PNG")
        return path

    def bars(self, title, groups, series, path, *rest) -> Path:
        path.write_bytes(b"\x89PNG")
        return path

    def heat_maps(self, grid, colours, path, *rest) -> Path:
        self.grids[path.stem] = grid
        path.write_bytes(b"\x89PNG")
        return path


def report(folder: Path) -> tuple[str, Asked]:
    asked = Asked()
    return write_report(folder, asked.plot, asked.bars, asked.heat_maps).read_text(encoding="utf-8"), asked


def test_the_page_of_a_mixture_shows_the_load_of_each_expert_of_each_layer(demo):
    rows = give_experts(demo)
    text, asked = report(demo)
    assert TITLE in text and text.count("the load of each expert over the steps") == 1
    seen = Tags(text).text
    assert "has 5 mixtures, layers of 4 experts each" in seen
    assert "busiest expert of all layers had 1.40 times the mean" in seen
    assert "12.5 % of the experts had no token" in seen and "1.25 nats, of at most 1.39" in seen
    # Five layers: four in the first row of the picture, one below.
    grid = asked.grids["expert_load"]
    assert [len(row) for row in grid] == [4, 1]
    for layer, heat_map in enumerate([*grid[0], *grid[1]]):
        assert heat_map.title == f"mixture {layer}" and list(heat_map.steps) == list(range(1, 201))
        assert [len(loads) for loads in heat_map.rows] == [200] * 4
        for expert, loads in enumerate(heat_map.rows):
            assert list(loads) == [row["expert_load"][layer][expert] for row in rows]
    busiest, dead, entropy = asked.panels["experts"]
    assert set(busiest.lines[0].values) == {1.4} and set(dead.lines[0].values) == {0.125} and dead.percent
    assert set(entropy.lines[0].values) == {1.25}


def test_the_page_says_how_many_parameters_a_token_uses_and_goes_on_with_the_same_model(demo):
    give_experts(demo)
    results = json.loads((demo / "seed0" / "results.json").read_text())
    results |= {"parameters": 2_815_616, "active_parameters": 898_688}
    (demo / "seed0" / "results.json").write_text(json.dumps(results))
    record = json.loads((demo / "demo.json").read_text())
    record["config"]["model"] = "demo-moe"
    (demo / "demo.json").write_text(json.dumps(record))
    seen = Tags(report(demo)[0]).text
    assert "2.82 million parameters, of which each token uses 0.90 million, trained here" in seen
    assert seen.count("r1zero demo --model demo-moe --run") == 3


def test_a_dense_model_has_no_word_of_experts(demo):
    text, asked = report(demo)
    assert "expert" not in text and not asked.grids and "experts" not in asked.panels
    assert "r1zero demo --run runs/seeds" in text


NO_LOADS = [None, "x", {}, [], [[]], [1.0], [[1.0, 2.0], [1.0]], [[1.0, None]], [["1"]], [[True]],
            [[10**400]]]


@pytest.mark.parametrize("value", NO_LOADS, ids=lambda value: repr(value)[:12])
def test_a_row_without_a_table_of_loads_is_left_out(demo, value):
    rows = give_experts(demo)
    rows[7]["expert_load"] = value
    steps, tables = read_loads(rows)
    assert 8 not in steps and len(steps) == len(tables) == 199
    rows[0]["expert_load"] = value
    lines(demo / "seed0" / "base" / "metrics.jsonl", [{**row, "expert_load_max": value} for row in rows])
    seen = Tags(report(demo)[0]).text
    assert TITLE in seen and "had – times the mean" in seen
    for row in rows:
        row["expert_load"] = value
    assert read_loads(rows) == ([], []) and load_maps(rows) == []


@pytest.mark.parametrize("step", [None, "x", float("nan"), "left out"], ids=str)
def test_a_row_without_its_step_is_left_out(step):
    row = {"expert_load": [[1.5, 0.5]]}
    torn = row if step == "left out" else {**row, "step": step}
    assert read_loads([torn, {**row, "step": 2}]) == ([2], [[[1.5, 0.5]]])


def test_loads_of_another_shape_are_left_out(demo):
    rows = give_experts(demo)
    rows[3]["expert_load"] = [[1.0, 1.0]]
    assert 4 not in read_loads(rows)[0]


def test_the_pictures_of_a_small_log_are_drawn(demo):
    rows = give_experts(demo, n_layers=2)
    lines(demo / "seed0" / "base" / "metrics.jsonl", rows[:3])
    coarse = [partial(draw, dpi=25) for draw in (plots.plot, plots.plot_heat_maps)]
    found = plot_experts(demo, read_demo(demo)[1][0], *coarse)
    assert [*found] == ["expert_load", "experts"]
    assert all(len(path.read_bytes()) > 1000 for path in found.values())
