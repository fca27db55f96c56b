"""The benchmarks of mixtures of experts run at toy size and go on after a stop; their arithmetic is right."""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import balance, dense_vs_moe
from benchmarks.common import check_settings
from r1zero.model.config import preset
from r1zero.model.transformer import count_active_parameters, count_parameters
from r1zero.train.recipes.demo import DemoConfig

SMALL = DemoConfig(pretrain_steps=4, documents=100, rl_steps=2, control_steps=1, eval_problems=4,
                   eval_samples=2, max_new_tokens=8, high=9)


ROOT = Path(__file__).parents[2]


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_the_balance_at_toy_size_is_a_table_and_a_picture_and_goes_on(tmp_path, capsys):
    out = tmp_path / "balance.json"
    flags = balance.Flags(work=str(tmp_path / "runs"), model="tiny-moe", seeds=1, steps=4, documents=60,
                          out=str(out))
    record = balance.main(flags)
    assert last_line(capsys) == record == json.loads(out.read_text())
    assert [*record["runs"]] == [*balance.MEANS] == ["none", "auxiliary loss", "bias", "default"]
    [without], [default] = record["runs"]["none"], record["runs"]["default"]
    assert without["largest_load"] > 1 and without["loss"] != default["loss"]
    # Four steps are one column of the picture.
    assert [np.shape(row["expert_load"]) for row in record["loads"]["bias"]] == [(2, 8)]
    assert out.with_suffix(".png").stat().st_size > 10_000
    logs = [path.read_bytes() for path in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))]
    assert balance.main(flags)["runs"] == record["runs"] and len(logs) == 4
    with pytest.raises(ValueError, match="made with steps 4, not 2"):
        balance.main(replace(flags, steps=2))
    assert logs == [path.read_bytes() for path in sorted((tmp_path / "runs").glob("*/metrics.jsonl"))]


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    work, settings = str(tmp_path / "work"), {"model": "tiny", "steps": 4, "ops": ("+", "-")}
    for _ in range(2):
        check_settings(work, settings)
    for other, words in (({**settings, "model": "demo"}, "model 'tiny', not 'demo'"),
                         ({**settings, "rounds": 3}, "rounds None, not 3")):
        with pytest.raises(ValueError, match=words):
            check_settings(work, other)
    check_settings(work, settings)


@pytest.mark.parametrize("name, measure, n_rows", [("dense_vs_moe", dense_vs_moe, 18),
                                                   ("balance", balance, 4)])
def test_the_page_shows_the_tables_as_they_are_printed(name, measure, n_rows, tmp_path, capsys):
    record = tmp_path / f"{name}.json"
    record.write_text((ROOT / "benchmarks/results" / record.name).read_text())
    measure.main(measure.Flags(table_of=str(record)))
    printed = [set(re.split("  +", line)[1:]) for line in capsys.readouterr().out.splitlines()]
    page = (ROOT / "benchmarks/README.md").read_text()
    title = {"balance": "The balance of experts"}.get(name, "Dense against a mixture of experts")
    part = page.split(f"### {title}\n")[1].split("\n### ")[0]
    rows = [row.strip("| ").split(" | ") for row in part.splitlines() if row.startswith("| ")]
    shown = [row for row in rows if any(set(row[1:]) <= cells for cells in printed)]
    assert len(shown) >= n_rows and len(rows) == 1 + len(shown)  # one header has words of its own


def test_a_column_of_the_picture_is_the_mean_of_its_steps():
    rows = [{"step": step, "expert_load": [[step, 10 - step]]} for step in range(1, 11)]
    assert balance.binned(rows) == [{"step": 3.0, "expert_load": [[2.5, 7.5]]},
                                    {"step": 7.0, "expert_load": [[6.5, 3.5]]}]


@pytest.mark.slow
def test_dense_against_a_mixture_at_toy_size(tmp_path, capsys):
    out = tmp_path / "found.json"
    flags = dense_vs_moe.Flags(work=str(tmp_path / "work"), dense="tiny", moe="tiny-moe", seeds=2,
                               equal_time_seeds=1, rounds=2, documents=20, demo=SMALL, out=str(out))
    record = dense_vs_moe.main(flags)
    assert last_line(capsys) == record == json.loads(out.read_text())
    counts = {arm: len(runs) for arm, runs in record["arms"].items()}
    assert counts == {"dense": 2, "moe": 2, "moe, equal time": 1}
    for run in (run for runs in record["arms"].values() for run in runs):
        assert run["held_out_loss"] > 3 and 0 <= run["largest_logp_gap"] < 1e-3
        assert run["rl"]["eval"]["n_problems"] == 4
    assert set(record["times"]["ratios"]) == {"pretrain", "grpo", "grpo_rollout", "grpo_update",
                                              "decoding_over_slots", "decoding_over_pages"}
    assert {arm: {run["replays"] for run in runs} for arm, runs in record["arms"].items()} == {
        "dense": {False}, "moe": {True}, "moe, equal time": {True}}
    # Called again, nothing is measured anew; the demo alone adds the moment that it takes to see that.
    again = dense_vs_moe.main(replace(flags, out=None))
    for found in (again, record):
        for run in (run for runs in found["arms"].values() for run in runs):
            assert run.pop("seconds")["pretrain"] > 0
    assert again["arms"] == record["arms"] and again["times"] == record["times"]
    with pytest.raises(ValueError, match="made with demo.rl_steps 2, not 3"):
        dense_vs_moe.main(replace(flags, demo=replace(SMALL, rl_steps=3), out=None))
    dense_vs_moe.main(dense_vs_moe.Flags(table_of=str(out)))
    assert "mixture, equal time, 0" in capsys.readouterr().out


def test_equal_time_means_fewer_steps_by_the_measured_ratios():
    flags = dense_vs_moe.Flags(demo=replace(SMALL, pretrain_steps=2000, rl_steps=50, control_steps=0))
    found = dense_vs_moe.demo_of(flags, dense_vs_moe.EQUAL_TIME, 1, {"pretrain": 1.25, "grpo": 2.0})
    assert (found.pretrain_steps, found.rl_steps, found.control_steps) == (1600, 25, 0)
    assert found.model == "demo-moe" and found.seeds == "1"
    same = dense_vs_moe.demo_of(flags, "moe", 1)
    assert (same.pretrain_steps, same.rl_steps) == (2000, 50) and same.run != found.run


def test_the_held_out_text_is_of_problems_that_the_corpus_never_has():
    held_out, plain = (kind(n_numbers=3, high=9) for kind in (dense_vs_moe.HeldOut, dense_vs_moe.Countdown))
    given = {held_out.problem("train", n).key for n in range(40)}
    assert given == {plain.problem("test", n).key for n in range(40)}
    assert held_out.problem("train", plain.size("test")) == plain.problem("test", 0)
    assert not given & {plain.problem("train", n).key for n in range(plain.size("train"))}


def test_bytes_of_decoding_are_those_of_the_active_weights_for_one_row_and_all_of_them_for_many():
    for name in ("demo", "demo-moe"):
        config = preset(name, 804)
        assert dense_vs_moe.bytes_of_decoding(config, 1) == pytest.approx(4 * count_active_parameters(config))
        assert dense_vs_moe.bytes_of_decoding(config, 10_000) == pytest.approx(4 * count_parameters(config))
    # Two rows: an expert of 16 stays unread if neither row has it among its 3.
    moe = preset("demo-moe", 804)
    experts = 4 * 16 * 3 * 128 * 96  # layers, experts, matrices
    unread = 4 * experts * (13 / 16) ** 2
    assert dense_vs_moe.bytes_of_decoding(moe, 2) == pytest.approx(4 * count_parameters(moe) - unread)
