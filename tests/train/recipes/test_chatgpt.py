"""ChatGPT's recipe: which stages, of which flags; and all of it at toy size."""
import json
import re

import pytest

from r1zero.train.cli.main import main
from r1zero.train.fit_head import on_test_side
from r1zero.train.recipes.chatgpt import (
    ChatGPTConfig,
    arms_of,
    check_same,
    stages_of,
    write_demonstrations,
    write_few_rankings,
)
from r1zero.train.recipes.over_optimisation import table
from r1zero.train.recipes.parts import PartResults

from ..run_cases import fails

SMALL = ["--model", "tiny", "--documents", "60", "--pretrain-steps", "2", "--sft-steps", "2",
         "--rankings", "40", "--answers", "4", "--rm-steps", "2", "--ppo-steps", "8", "--eval-problems", "4",
         "--few", "24", "--device", "cpu"]


def recipe(folder, *flags: str) -> int:
    return main(["recipe", "chatgpt", "--run", str(folder), *SMALL, *flags])


def test_each_stage_goes_on_from_the_ones_before(tmp_path):
    stages = {name: config for name, _, config in stages_of(ChatGPTConfig(), tmp_path)}
    assert list(stages) == ["base", "sft", "rm", "ppo", "rm_few", "ppo_few"]
    assert stages["sft"].base == str(tmp_path / "base")
    assert {stages[name].base for name in ("rm", "ppo", "rm_few", "ppo_few")} == {str(tmp_path / "sft")}
    for judge, ppo in arms_of(ChatGPTConfig()):
        rewards = stages[ppo].rewards
        assert rewards.model == stages[judge].run
        assert rewards.weights == {"accuracy": 0, "format": 0, "model": 1}
    assert stages["ppo"].loss.kl_in == "reward" and stages["ppo"].loss.kl_coef == 0.02
    assert not stages["ppo"].kl_in_loss and not stages["ppo_few"].kl_in_reward  # never twice
    names = [name for name, *_ in stages_of(ChatGPTConfig(base="there", few=0), tmp_path)]
    assert names == ["sft", "rm", "ppo"]
    assert stages_of(ChatGPTConfig(base="there"), tmp_path)[0][2].base == "there"


def test_demonstrations_are_well_formed_answers_to_training_problems(tmp_path):
    write_demonstrations(ChatGPTConfig(), tmp_path / "d.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert len(lines) == 1000
    assert all(re.fullmatch(r"<think>.+</think><answer>.+</answer>", line["response"]) for line in lines)


def test_the_table_has_a_row_per_model():
    point = {"hidden": [1.5, 1.4, 1.6], "right": 0.5, "well_formed": 0.9, "tokens": 40.0, "kl": 4.0}
    points = {"sft": [point], "ppo": [point, point | {"wins": [0.75, 0.7, 0.8]}]}
    lines = table(points).splitlines()
    assert len(lines) == 3 and lines[1].split() == "fine-tuned – 1.50 50.0% 90.0% 40.0 2.00".split()
    assert lines[2].split() == "PPO 75.0 % [70, 80] 1.50 50.0% 90.0% 40.0 2.00".split()


@pytest.mark.parametrize("flags", [{"ppo_steps": 7}, {"rankings": 3}, {"answers": 1}, {"few": -1},
                                   {"kl": -1.0}, {"noise": 0.7}, {"rm_steps": 0}, {"few": 1},
                                   {"answers": 65}])
def test_flags_out_of_range_are_refused(flags, tmp_path):
    with fails(ValueError, f"--{next(iter(flags)).replace('_', '-')} is"):
        stages_of(ChatGPTConfig(**flags), tmp_path)


@pytest.mark.parametrize("flags, told", [
    ({"rankings": 3572}, "--rankings 3572, behind the 1,000 of demonstrations, asks for 4,572 problems, but"),
    ({"eval_problems": 1070}, "--eval-problems 1070 asks for .* different test problems; lower it")])
def test_more_problems_than_there_are_are_refused(flags, told):
    with fails(ValueError, told):
        ChatGPTConfig(**flags)
    [(flag, value)] = flags.items()
    assert getattr(ChatGPTConfig(**{flag: value - 1}), flag) == value - 1


def test_rankings_that_are_too_few_are_told_before_ppo_and_their_number_can_be_mended(tmp_path, capsys):
    numbered = [f"{n} 2 -> 9" for n in range(20)]
    trained, held_out = ([each for each in numbered if on_test_side(each, 0.25) == side] for side in (0, 1))
    prompts = [*trained[:2], held_out[0]]
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    with fails(ValueError, "--few is 2, and so few .*; add --resume, and give 0, or 3 or more"):
        write_few_rankings(ChatGPTConfig(few=2), tmp_path)
    assert not (tmp_path / "few_rankings.jsonl").exists()
    write_few_rankings(ChatGPTConfig(few=3), tmp_path)
    assert (tmp_path / "few_rankings.jsonl").read_text() == path.read_text()
    path.write_text(json.dumps({"prompt": prompts[0]}) + "\n")
    with fails(ValueError, "--few is 3, but all 1 rankings are too few .*; give --few 0 with --resume"):
        write_few_rankings(ChatGPTConfig(few=3), tmp_path)

    # --few may be another until the second reward model has begun, or something was measured.
    results = PartResults(tmp_path, {})
    results.values["config"] = {"few": 2}
    results.write()
    (tmp_path / "other/checkpoints/step_00000001").mkdir(parents=True)
    check_same(ChatGPTConfig(few=3), tmp_path)
    results.values["points"] = {}
    results.write()
    with fails(ValueError, "--few is 3, but .* was made with 2"):
        check_same(ChatGPTConfig(few=3), tmp_path)


def test_a_recipe_goes_on_only_with_the_flags_that_it_began_with(tmp_path, capsys):
    results = PartResults(tmp_path, {})
    results.values["config"] = {"answers": 5}
    results.write()
    (tmp_path / "sft/checkpoints/step_00000001").mkdir(parents=True)
    assert recipe(tmp_path) == 2 and "add --resume" in capsys.readouterr().err
    (tmp_path / "sft/checkpoints/step_00000001").rename(tmp_path / "step")
    (tmp_path / "other/checkpoints/step_00000001").mkdir(parents=True)
    assert recipe(tmp_path, "--resume") == 2
    assert "--answers is 4, but" in capsys.readouterr().err


def test_a_base_that_is_not_there_is_told_before_anything_is_made(tmp_path, capsys):
    folder = tmp_path / "recipe"
    assert recipe(folder, "--base", str(tmp_path / "nowhere")) == 2
    assert "nowhere does not exist" in capsys.readouterr().err and not folder.exists()


@pytest.mark.slow
def test_the_whole_recipe_at_toy_size_is_measured_and_is_not_done_again(tmp_path, capsys):
    folder = tmp_path / "recipe"
    assert recipe(folder) == 0
    results = json.loads((folder / "results.json").read_text())
    assert [point["step"] for point in results["points"]["ppo"]] == [*range(1, 9)]
    [begin] = results["points"]["sft"]
    assert set(begin["proxy"]) == {"rm", "rm_few"} and begin["kl"] == pytest.approx(0, abs=1e-5)
    assert len(results["best_of"]) == 10
    sampled = results["sampled"]
    assert sampled["rankings"]["answers"] == 40 * 4 and sampled["rankings"]["tokens"] > 0
    assert sampled["measuring"]["answers"] == 4 * (17 * 2 + 16) and results["seconds"]["rankings"] > 0
    assert (folder / "over_optimisation.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.split("held-out problems ")[-1]
    assert shown.count("\n") > 4
    # Measured again from the checkpoints: the same.
    del results["points"]["ppo"][3:]
    (folder / "results.json").write_text(json.dumps(results))
    assert recipe(folder, "--resume") == 0
    again = json.loads((folder / "results.json").read_text())
    assert len(again["points"]["ppo"]) == 8 and again["points"]["ppo"][:3] == results["points"]["ppo"]
    assert capsys.readouterr().out.split("held-out problems ")[-1].splitlines()[:4] == shown.splitlines()[:4]
