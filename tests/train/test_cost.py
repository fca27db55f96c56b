"""What a run or a recipe has cost: each number against a sum by hand."""
import json
from dataclasses import replace

import pytest

from r1zero.model.transformer import flops_per_token
from r1zero.train.cost import Cost, StageCost, cost_of
from r1zero.train.pretrain import pretrain
from r1zero.train.run import read_record

from ..rl.cases import tiny
from .cost_cases import RL_ROWS, SFT_ROWS, collected, evaluated, make_recipe, make_run, write_json
from .loop_cases import pretrain_config, text_file
from .run_cases import fails, pretrain_on_text


def forward(length: float = 0) -> float:
    """FLOPs of a token's forward pass through the tiny model."""
    return flops_per_token(tiny().config, length, training=False)


def only(cost: Cost) -> StageCost:
    [stage] = cost.stages
    return stage


def test_a_run_that_trains_costs_three_passes_per_token_and_what_its_record_says_of_time(tmp_path):
    stage = only(cost_of(make_run(tmp_path / "warm", "sft", SFT_ROWS, {"seconds": 5.0})))
    assert stage == StageCost("warm", "sft", 5.0, 0, 160, 3 * 160 * forward())


def test_a_run_that_samples_trains_on_what_was_not_replaced(tmp_path):
    stage = only(cost_of(make_run(tmp_path / "rl", "grpo", RL_ROWS, {"seconds": 5.0})))
    assert (stage.sampled_tokens, stage.trained_tokens) == (600, 500)
    assert stage.flops == pytest.approx((600 + 3 * 500) * forward(length=15))
    assert forward(15) > forward()


def test_with_adapters_a_backward_pass_is_half_as_dear(tmp_path):
    lora = {"config": {"rank": 4}, "base": "x", "base_weights": "x"}
    stage = only(cost_of(make_run(tmp_path / "warm", "sft", SFT_ROWS, lora=lora)))
    assert stage.flops == 2 * 160 * forward()


@pytest.mark.parametrize("loop, rows, seconds", [
    ("sft", SFT_ROWS, 160 / 40), ("grpo", RL_ROWS, 2 + 0.5 + 3 + 0.5), ("sft", [], None)])
def test_a_run_of_an_older_version_took_what_its_steps_took(loop, rows, seconds, tmp_path):
    assert only(cost_of(make_run(tmp_path / "run", loop, rows))).seconds == seconds


def test_a_recipe_costs_what_all_its_stages_cost_in_their_order(tmp_path):
    cost = cost_of(make_recipe(tmp_path / "recipe"), price=2.5)
    assert [(s.name, s.loop, s.seconds, s.sampled_tokens, s.trained_tokens) for s in cost.stages] == [
        ("warm", "sft", 5.0, 0, 160),  # the recipe missed a second, or the run did: the larger counts
        ("good", "collect", 6.0, 80, 0), ("after", "grpo", 9.0, 600, 500),
        ("eval_after", "measuring", 2.0, 96, 0)]
    assert cost.sum_of("seconds") == 22 and cost.money == 22 / 3600 * 2.5
    assert [s.flops for s in cost.stages] == pytest.approx(
        [480 * forward(), 80 * forward(10), 2100 * forward(15), 96 * forward(12)])
    total = cost.to_dict()["total"]
    assert total == {"seconds": 22, "sampled_tokens": 776, "trained_tokens": 660, "price": 2.5,
                     "flops": pytest.approx(sum(s.flops for s in cost.stages)), "money": cost.money}
    assert json.loads(json.dumps(cost.to_dict())) == cost.to_dict()


def test_without_notes_of_the_recipe_runs_come_in_the_order_in_which_they_began(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    (recipe / "results.json").write_text('{"seconds": ')
    assert [s.name for s in cost_of(recipe).stages] == ["warm", "after", "good"]
    assert [s.seconds for s in cost_of(recipe).stages] == [5.0, 7.0, 4.0]
    # A run that was resumed began when it first did.
    first = {"started": "2026-01-01 09:00:00 +0000"}
    later = {"started": "2026-01-03 10:00:00 +0000", "starts": [first]}
    make_run(recipe / "zz", "sft", SFT_ROWS, later)
    assert [s.name for s in cost_of(recipe).stages][:2] == ["zz", "warm"]


def test_a_name_counts_before_a_loop_and_what_the_recipe_has_not_noted_counts_too(tmp_path):
    for name in ("cold", "sft", "tuned"):  # all of them by sft
        make_run(tmp_path / name, "sft", SFT_ROWS, {"seconds": 1.0})
    write_json(tmp_path / "results.json", {"seconds": {"sft": 9.0}})
    assert [(s.name, s.seconds) for s in cost_of(tmp_path).stages] == [
        ("sft", 9.0), ("cold", 1.0), ("tuned", 1.0)]


def test_the_stages_of_each_seed_are_named_with_their_folder(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"demo/seed{seed}/base", "pretrain", SFT_ROWS)
        seconds = {"pretrain": 9.0, "eval_base": 1.0}
        write_json(tmp_path / f"demo/seed{seed}/results.json", {"seconds": seconds})
    cost = cost_of(tmp_path / "demo")
    assert [(s.name, s.seconds) for s in cost.stages] == [
        ("seed0/base", 9.0), ("seed0/eval_base", 1.0),
        ("seed1/base", 9.0), ("seed1/eval_base", 1.0)]


def test_an_evaluation_in_the_folder_of_a_run_counts_and_other_files_do_not(tmp_path):
    run = make_run(tmp_path / "rl", "grpo", RL_ROWS)
    write_json(run / "eval_countdown_step2.jsonl.summary.json", evaluated("moved/rl/checkpoints/step_2"))
    write_json(run / "other.summary.json", {"tokens": 5})
    (run / "torn.summary.json").write_text('{"mean_tokens": ')
    _, found = cost_of(run).stages
    assert found == StageCost("eval_countdown_step2", "eval", 3.0, 96, 0, 96 * forward(12))


def test_a_collection_is_of_the_model_that_it_names_and_if_that_is_gone_of_the_one_beside_it(tmp_path):
    larger = make_run(tmp_path / "other/warm", "sft", SFT_ROWS, n_layers=5)
    recipe = make_recipe(tmp_path / "recipe")
    for where, n_layers in ((larger, 5), (tmp_path / "gone/warm", 2)):
        write_json(recipe / "good.jsonl.summary.json", collected(f"{where}/checkpoints/step_00000002"))
        [good] = [stage for stage in cost_of(recipe).stages if stage.name == "good"]
        shape = replace(tiny().config, n_layers=n_layers)
        assert good.flops == 80 * flops_per_token(shape, 10, training=False)


def test_the_completions_that_label_steps_are_a_part_of_what_a_collection_cost(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    labels = {"steps": 9, "completion_tokens": 300, "completion_seconds": 7.0}
    summary = collected("recipe/warm/checkpoints/step_00000002", labels=labels)
    write_json(recipe / "good.jsonl.summary.json", summary)
    [stage] = [stage for stage in cost_of(recipe).stages if stage.loop == "collect"]
    assert (stage.sampled_tokens, stage.seconds) == (80 + 300, 4.0 + 7.0)
    assert stage.flops == pytest.approx(380 * forward(length=10))


def test_answers_that_a_recipe_has_counted_cost_their_tokens_and_those_that_nobody_counted_are_a_dash(
        tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    noted = {"model": "moved/warm", "tokens": 60, "answers": 4}
    odd = {"model": "moved/warm", "tokens": 60}
    results = {"seconds": {"rankings": 3.0, "odd": 2.0, "eval_warm": 1.0},
               "sampled": {"rankings": noted, "odd": odd}}
    write_json(recipe / "results.json", results)
    cost = cost_of(recipe)
    counted, *unknown = cost.stages[:3]
    assert counted == StageCost("rankings", "measuring", 3.0, 60, 0, 60 * forward(15))
    assert unknown == [StageCost("odd", "measuring", 2.0, None, 0, None),
                       StageCost("eval_warm", "measuring", 1.0, None, 0, None)]
    assert cost.lacks("sampled_tokens") == ["odd", "eval_warm"]
    assert cost.sum_of("sampled_tokens") == 60 + 600 + 80 and "| - " not in cost.table()


def test_what_is_not_known_is_a_dash_and_no_zero(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    write_json(recipe / "good.jsonl.summary.json", collected("gone/base/checkpoints/step_1", seconds=None))
    write_json(recipe / "results.json", {})
    cost = cost_of(recipe, price=1.0)
    [good] = [row for row in cost.rows() if row[0] == "good"]
    assert good == ["good", "collect", "-", "80", "0", "-", "-"]
    assert cost.lacks("flops") == cost.lacks("seconds") == ["good"] and cost.lacks("name") == []


def test_the_table_has_a_total_and_with_a_price_the_cost(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    lines = cost_of(recipe, price=3600.0).table().splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 6
    assert lines[0].split()[-1] == "cost" and lines[-1].split()[-1] == "22.0000"
    assert lines[-1].split()[:3] == ["total", "22.0", "776"]
    free = cost_of(recipe).table().splitlines()
    assert "cost" not in free[0] and free[-1].split()[-1].endswith("e+08")


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_is_a_number_of_0_or_more(price, tmp_path):
    with fails(ValueError, "--price is .*, expected a number of 0 or more"):
        cost_of(make_run(tmp_path / "run", "sft"), price)


def test_a_folder_without_a_run_is_refused(tmp_path):
    write_json(tmp_path / "begun/run.json", {"config": {}})  # stopped before its first checkpoint
    for name in ("", "begun", "nowhere"):
        with fails(ValueError, "holds no run"):
            cost_of(tmp_path / name)


def test_the_seconds_of_a_run_go_on_when_it_is_resumed(tmp_path):
    data = text_file(tmp_path)
    noted = []
    for steps, options in ((2, {}), (4, {"resume": True}), (6, {"resume": True})):
        pretrain(pretrain_config(tmp_path / "run", data, steps=steps, **options))
        noted.append(read_record(tmp_path / "run/run.json")["seconds"])
        assert only(cost_of(tmp_path / "run")).seconds == noted[-1]
    assert 0 < noted[0] < noted[1] < noted[2]
    assert len(read_record(tmp_path / "run/run.json")["starts"]) == 3


@pytest.mark.parametrize("noted", [None, "long"])  # by an older version, or by hand
def test_a_run_whose_beginning_was_not_noted_is_not_said_to_have_taken_its_last_part_alone(noted, tmp_path):
    config = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=2)
    record = tmp_path / "run/run.json"
    pretrain(config)
    write_json(record, read_record(record) | {"seconds": noted})
    pretrain(replace(config, steps=4, resume=True))
    assert read_record(record)["seconds"] is None
    assert only(cost_of(tmp_path / "run")).seconds > 0  # by its log


def test_the_seconds_are_noted_with_every_checkpoint_in_case_that_the_process_is_killed(tmp_path):
    config, seen = pretrain_config(tmp_path / "run", text_file(tmp_path), steps=5, save_every=2), []
    pretrain_on_text(config, spoil=lambda step, model: seen.append(read_record(tmp_path / "run/run.json")))
    seconds = [record.get("seconds") for record in seen]
    assert seconds[:2] == [None, None] and seconds[2] == seconds[3] and 0 < seconds[2] < seconds[4]
