"""What was measured, as tables: a share stands with its interval or not at all."""
import json

import pytest

from r1zero.model.checkpoint import load_checkpoint
from r1zero.train.report.measured import measured, measurements, points_table, shares_table

from ..cost_cases import evaluated, make_run, write_json


def test_an_evaluation_of_this_checkpoint_is_a_row(tmp_path):
    run = make_run(tmp_path / "run", "grpo")
    write_json(run / "a.summary.json", evaluated("x/step_00000001"))
    write_json(run / "b.summary.json", evaluated("x/step_00000002", 0.5))
    row = "| countdown | 25.0% [20.0%, 30.0%] | 4 | 2 | 1.0 | 12.5% |"
    assert measured(load_checkpoint(run))[2:] == [row]


@pytest.mark.parametrize("broken", [
    {"n_problems": "absent"}, {"flags": "absent"}, {"flags": None}, {"truncated": "absent"},
    {"accuracy": "high"}, {"accuracy_95": [0.1]}, {"accuracy_95": 3}, {"checkpoint": 3}, {"task": "absent"}])
def test_a_summary_that_lacks_something_is_no_row(broken, tmp_path):
    run = make_run(tmp_path / "run", "grpo")
    content = evaluated("x/step_00000001") | broken
    content = {key: value for key, value in content.items() if value != "absent"}
    (run / "eval.summary.json").write_text(json.dumps(content))
    assert measured(load_checkpoint(run)) == []


def test_shares_of_a_recipe_are_a_row_per_model_and_a_column_per_measure():
    results = {
        "base": {"steps": 3, "eval": {"n_problems": 8, "n_samples": 4, "mean_tokens": 0.5,
                                      "accuracy": 0.25, "accuracy_95": [0.2, 0.3],
                                      "pass_at": {"1": 0.25, "4": 0.5},
                                      "pass_at_95": {"1": [0.2, 0.3], "4": [0.4, 0.6]}}},
        "stages": {"rl": {"win_rate": [0.75, 0.5, 1.0], "accuracy": [0.5, 0.4, 0.6]}},
        "config": {"shares": [0.2, 0.1, 0.3]}, "seconds": {"rl": 3.0}}
    assert shares_table(results) == [
        "| model | accuracy | pass at 4 | win rate | problems |",
        "|---|---|---|---|---|",
        "| base | 25.0% [20.0%, 30.0%] | 50.0% [40.0%, 60.0%] | - | 8 x 4 answers |",
        "| rl | 50.0% [40.0%, 60.0%] | - | 75.0% [50.0%, 100.0%] | - |"]


@pytest.mark.parametrize("value", [
    [0.5, 0.6, 0.7], [0.5, 0.4], [5, 4, 6], [0.5, 0.4, None], ["a", "b", "c"], [-0.5, -0.6, 0.1], 0.5, None,
    {}, {"accuracy": 0.5, "accuracy_95": 3}, {"p": {"4": 0.5}, "p_95": {}},
    {"p": {"4": 0.5}, "p_95": {"4": [0.4]}}])
def test_what_is_no_share_with_an_interval_is_left_out(value):
    assert shares_table({"rl": {"x": value}, "x": value}) == []


def test_a_share_without_a_model_has_a_row_of_its_own():
    assert shares_table({"win_rate": [0.5, 0.4, 0.6], "eval": [0.5, 0.4, 0.6]})[2:] == [
        "| win_rate | 50.0% [40.0%, 60.0%] |", "| eval | 50.0% [40.0%, 60.0%] |"]


def test_of_policies_that_were_measured_on_their_way_the_last_point_counts():
    begin = {"step": 0, "hidden": [1.2, 0.3, 2.0], "kl": 0.0, "right": 0.5}
    point = {"step": 2, "hidden": [1.5, 1.25, 1.75], "kl": 4.0, "wins": [0.75, 0.7, 0.8]}
    odd = {"odd": [{"wins": [3, 4], "kl": "x"}], "none": [], "no": 3}
    points = {"sft": [begin], "ppo": [begin, point], **odd}
    assert points_table({"points": points}) == [
        "| model | liked better than where it began | hidden preference | KL, nats per answer |",
        "|---|---|---|---|",
        "| sft | - | 1.20 [0.30, 2.00] | 0.00 |",
        "| ppo | 75.0% [70.0%, 80.0%] | 1.50 [1.25, 1.75] | 4.00 |",
        "| odd | - | - | - |"]
    assert points_table({"points": []}) == points_table({}) == points_table({"points": {"ppo": []}}) == []


def test_reward_models_and_scores_during_a_run_are_measurements(tmp_path):
    record = {"reward_model": {"shares": {"agrees": [0.9, 0.8, 1.0]}}}
    run = make_run(tmp_path / "rm", "reward-model", record=record, score=0.5)
    text = "\n".join(measurements(run, {"rm": load_checkpoint(run)}))
    assert "| rm | 90.0% [80.0%, 100.0%] |" in text
    assert "`rm` on held-out problems during the run (pass@1): 50.0%" in text
    record = {"process_reward": {"answers": 3, "measured": {"AUC, true": [0.7, 0.6, 0.75]}}}
    run = make_run(tmp_path / "prm", "process-reward", record=record)
    assert "| prm | 70.0% [60.0%, 75.0%] |" in measurements(run, {"prm": load_checkpoint(run)})
    plain = make_run(tmp_path / "plain", "sft")
    assert measurements(plain, {"plain": load_checkpoint(plain)}) == []
