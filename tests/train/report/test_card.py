"""The model card of a run and of a recipe: what it says, and that it tells what is not known."""
import json

import pytest

from r1zero.train.report.card import card_of

from ..cost_cases import RL_ROWS, SFT_ROWS, collected, evaluated, make_recipe, make_run, write_json

RL = {"control": "none", "base": "/home/somebody/base", "algo": "grpo", "rewards": {"accuracy_weight": 1.0}}


def limits(folder) -> str:
    return card_of(folder).partition("## Limits")[2]


def test_the_card_of_a_run_has_all_its_sections_in_order(tmp_path):
    record = {"seconds": 90.0, "machine": {"gpu": "H200", "versions": {"r1zero": "0.1.0", "torch": "2.13.0"},
                                           "commit": "0123456789abcdef"}}
    run = make_run(tmp_path / "rl", "grpo", RL_ROWS, record, RL)
    write_json(run / "eval.summary.json", evaluated("x/rl/checkpoints/step_00000002"))
    text = card_of(run, price=2.0)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == ["# rl", "## Where it comes from", "## Measured", "## Cost", "## Limits"]
    for part in ("- made by: `r1zero grpo`, step 2, seed 0\n",
                 "- reward: 1 x a right answer, by the rule of the task\n",
                 "Made on: H200, r1zero 0.1.0, torch 2.13.0, commit 0123456789ab.\n",
                 "| countdown | 25.0% [20.0%, 30.0%]", "\n| rl | grpo | 90.0 | 600 | 500 | ",
                 "1.6 minutes at 2 per hour: 0.05."):
        assert part in text, part
    assert "somebody" not in text and str(tmp_path) not in text


def test_the_card_of_a_recipe_has_a_section_per_run_in_the_order_of_the_recipe(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    # The clock says otherwise: it has seconds only, and may be set.
    make_run(recipe / "after", "grpo", RL_ROWS, {"started": "2025-01-01 10:00:00 +0000"}, RL)
    text = card_of(recipe)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == ["# recipe", "## warm", "## after", "## Data made on the way",
                     "## Measured", "## Cost", "## Limits"]
    assert "Made by 2 runs, in this order: warm, after." in text and "per hour" not in text
    assert "By the results of `recipe`:" in text
    assert "\n| after | 25.0% [20.0%, 30.0%] | 4 x 2 answers |\n" in text
    assert "\n| total |  | " in text


def test_collected_data_says_what_was_kept_of_whose_answers(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    write_json(recipe / "torn.summary.json", {"by_difficulty": []})
    [line] = [line for line in card_of(recipe).splitlines() if line.startswith("- `good`")]
    assert line == ("- `good`: 3 of 8 answers of `warm` (weights ffffffffffff) to 2 problems of `countdown`, "
                    "split train")


def test_a_long_fact_is_written_once(tmp_path):
    options = RL | {"advantage": {}, "loss": {}}
    for name, started in (("one", "2026-01-01"), ("two", "2026-01-02")):
        make_run(tmp_path / name, "grpo", RL_ROWS, {"started": started}, options)
    text = card_of(tmp_path)
    assert text.count("- algorithm: `grpo`; the reward") == 1
    assert text.count("- algorithm: as of `one`\n") == 1
    assert text.count("- made by: `r1zero grpo`, step 2, seed 0\n") == 2


def test_the_same_folder_gives_the_same_card(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    assert card_of(recipe, 2.5) == card_of(f"{recipe}/", 2.5)


@pytest.mark.parametrize("settings, record, told", [
    (RL, {}, "No run has rewards that say nothing"),
    (RL, {}, "Nothing was measured on held-out problems."),
    (RL, {}, "There is one seed"),
    (RL, {}, "What it cost to make `base`, from which a run began, is not counted."),
    (RL | {"teacher": "x/big"}, {}, "What it cost to make `big`, from which a run learned, is not counted."),
    (RL, {"config": {"steps": 5}}, "`run` is of step 2, and its run was to have 5 steps."),
    (RL, {"config": {"eval_every": 5}}, "The held-out problems of `run` chose its best checkpoint"),
    (RL, {"config": {"accept_changes": True}}, "`run` was resumed although its base or its data had"),
    (RL | {"rewards": {"model": "rm"}}, {}, "A reward model judged answers of `run`")])
def test_the_limits_tell_what_is_not_known(settings, record, told, tmp_path):
    make_run(tmp_path / "run", "grpo", RL_ROWS, record, settings)
    assert f"\n- {told}" in limits(tmp_path / "run")


def test_a_model_from_elsewhere_is_told_by_its_path_although_a_run_here_has_its_name(tmp_path):
    teacher = make_run(tmp_path / "demo/rl", "grpo", RL_ROWS)
    recipe = tmp_path / "recipe"
    base = make_run(recipe / "base", "pretrain", SFT_ROWS)
    make_run(recipe / "rl", "grpo", RL_ROWS, settings=RL | {"base": str(base), "teacher": str(teacher)})
    text = limits(recipe)
    assert "\n- What it cost to make another `rl`, from which a run learned, is not counted." in text
    assert "from which a run began" not in text


def test_what_was_done_is_no_limit(tmp_path):
    """A recipe of several seeds with a control, whose base is its own, and whose results are there."""
    for seed in (0, 1):
        make_run(tmp_path / f"base{seed}", "pretrain", SFT_ROWS, settings={"seed": seed})
        flags = {"control": "permute" if seed else "none", "base": f"x/base{seed}", "seed": seed}
        make_run(tmp_path / f"rl{seed}", "grpo", RL_ROWS, settings=RL | flags)
    write_json(tmp_path / "results.json", {"rl0": {"eval": evaluated("")}})
    assert limits(tmp_path).strip().splitlines() == [
        "- Nothing was measured of safety, of bias, of facts, or of any task that is not above."]


def test_time_that_nobody_noted_is_named(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    write_json(recipe / "good.jsonl.summary.json", collected("x/warm/checkpoints/step_1", seconds=None))
    write_json(recipe / "results.json", {})
    assert "\n- The time of good is not known, and the total lacks it." in limits(recipe)


def test_tokens_that_nobody_counted_are_named(tmp_path):
    recipe = make_recipe(tmp_path / "recipe")
    write_json(recipe / "results.json", {"seconds": {"eval_warm": 2.0}})
    told = "\n- How many tokens eval_warm sampled is not known, and the total lacks them."
    assert told in limits(recipe) and "\n| eval_warm | measuring | 2.0 | - | 0 | - |\n" in card_of(recipe)


def test_a_torn_record_costs_its_facts_and_no_more(tmp_path):
    run = make_run(tmp_path / "run", "sft", SFT_ROWS)
    odd = [json.dumps({"config": {}})[:-2], "[]", '{"config": [], "machine": 3, "seconds": "x", "starts": 5}']
    for text in odd:
        (run / "run.json").write_text(text)
        card = card_of(run)
        assert "Made on: an unknown machine." in card and "| run | sft | 4.0 | 0 | 160 |" in card
