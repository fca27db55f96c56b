"""A run in sentences: each option of a run has its words, and a path is its last part."""
from dataclasses import asdict, replace

import pytest

from r1zero.model.checkpoint import load_checkpoint
from r1zero.model.lora import LoRAConfig
from r1zero.rl.advantages import BASELINES, SCALES
from r1zero.rl.losses import MEANS, OBJECTIVES
from r1zero.train.grpo import grpo_config
from r1zero.train.report import run_in_words as words
from r1zero.train.report.run_in_words import (
    algorithm_in_words,
    reward_in_words,
    run_in_words,
    without_folders,
)
from r1zero.train.reward_model import RewardModelConfig
from r1zero.train.settings import settings_of
from r1zero.train.sft import SFTConfig

from ..cost_cases import make_run


def facts(folder, loop: str, settings: dict, **state) -> dict[str, str]:
    """What is said of a run with these flags."""
    return run_in_words(load_checkpoint(make_run(folder / "run", loop, settings=settings, **state)))


def rl_settings(**options) -> dict:
    """The flags of a run of GRPO, as a checkpoint keeps them."""
    return settings_of(grpo_config(**{"run": "x", "base": "runs/somebody/base", **options}), set())


def test_settings_have_of_each_path_the_last_part_only():
    assert without_folders("/home/some body/my base") == "my base"
    given = {"a": "/home/me/base", "b": "../me/base", "c": ["runs/me/x.jsonl", "~/me/rewards.py:score"]}
    assert without_folders(given) == {"a": "base", "b": "base", "c": ["x.jsonl", "rewards.py:score"]}
    texts = {"a": "hub:openai/gsm8k", "b": "</answer>", "c": "1 / 2 of them", "d": 3}
    assert without_folders(texts) == texts


def test_a_run_of_rl_says_what_it_did(tmp_path):
    inputs = {"base": [["weights", "0123456789abcdef"], ["shape", "x"]]}
    found = facts(tmp_path, "grpo", rl_settings(algo="grpo", seed=3), inputs=inputs)
    assert found == {
        "made by": "`r1zero grpo`, step 1, seed 3",
        "base": "`base`, weights 0123456789ab, license not known here",
        "task": "`countdown`",
        "each step": "16 problems with 16 answers each, at temperature 1, of 128 tokens at most",
        "reward": "1 x a right answer, by the rule of the task + 0.2 x a well-formed response",
        "algorithm": "`grpo`; the reward of an answer is compared with the mean of its group, and the "
                     "difference is divided by the standard deviation; the ratio of each token to the old "
                     "policy is kept from 1 - 0.2 to 1 + 0.2; all answers of the step count alike; a KL of "
                     "weight 0.001 to the reference counts in the loss"}


@pytest.mark.parametrize("algo, said", [
    ("dapo", ["to 1 + 0.28", "all tokens of the step count alike", "replaced by others", "no KL",
              "the last 20% of the room"]),
    ("ppo", ["what a critic expects", "whitened over the step", "counts in the reward"]),
    ("dr_grpo", ["is not scaled", "counts by its length"]),
    ("demo", ["4 updates per step"]),
    ("distill", ["does not count: the KL to the teacher alone teaches", "counts in the reward"]),
    ("dppo", ["falls by 0.15 at most, and rises by 0.15 at most"])])
def test_each_algorithm_says_what_sets_it_apart(algo, said):
    text = algorithm_in_words(rl_settings(algo=algo))
    assert all(part in text for part in (f"`{algo}`; ", *said)), text


def test_every_choice_has_its_words():
    for known, said in ((OBJECTIVES, words.OBJECTIVES), (MEANS, words.MEANS), (BASELINES, words.BASELINES),
                        (SCALES, words.SCALES)):
        assert set(said) == set(known)


def test_a_reward_names_the_parts_that_have_a_weight():
    rewards = rl_settings()["rewards"] | {"format_weight": 0.0, "language_weight": 0.5, "model": "reward",
                                          "model_weight": 0.25, "model_from": 0.75, "later_weight": 2.0}
    assert reward_in_words(rewards) == (
        "1 x a right answer, by the rule of the task + 0.5 x thoughts in the language of the question + "
        "0.25 x the score of the reward model `reward`, from 75% of the steps on + 2 x later")
    rewards = {"accuracy_weight": 0.0, "plugin": "mine:short", "plugin_weight": 0.1, "model": None,
               "model_weight": 1}
    assert reward_in_words(rewards) == "0.1 x `mine:short`, a function of its own"
    assert "process" not in reward_in_words(rl_settings()["rewards"])
    rewards = {"accuracy_weight": 0.0, "process": "prm", "process_weight": 0.5}
    assert reward_in_words(rewards) == "0.5 x the scores of the steps by the process reward `prm`"


def test_a_teacher_is_named():
    text = algorithm_in_words(rl_settings(algo="distill", teacher="runs/rl"))
    assert "a KL of weight 1 to the teacher `runs/rl` counts in the reward" in text


def test_what_is_no_result_is_said_to_be_none(tmp_path):
    control = facts(tmp_path / "a", "grpo", rl_settings(control="permute"))
    assert control["beware"].startswith("a control: its rewards are dealt out by chance (`permute`)")
    mistake = facts(tmp_path / "b", "grpo", rl_settings(mistake="no_end_token"))
    assert mistake["beware"].startswith("trained with a mistake on purpose, `no_end_token`: ")
    older = facts(tmp_path / "c", "grpo", rl_settings() | {"control": False})
    assert "beware" not in older


def test_adapters_are_told_in_prose(tmp_path):
    config = LoRAConfig(rank=8, alpha=16.0)
    for name, layers, where in (("a", "all", "all matrices"), ("b", "mlp", "the matrices of the mlp")):
        lora = {"config": asdict(replace(config, layers=layers)), "base": "/home/somebody/base"}
        found = facts(tmp_path / name, "sft", {}, lora=lora)
        assert found["adapters"] == (f"low-rank adapters (LoRA) of rank 8 and alpha 16 beside {where} of "
                                     "each block; the weights of the base were not trained")


def test_data_has_a_fingerprint_of_each_file(tmp_path):
    config = SFTConfig(run="x", base="b", data=("runs/somebody/a.jsonl:3", "b.jsonl:1"))
    parts = [["runs/somebody/a.jsonl", "0123456789abcdef"], ["b.jsonl", "f" * 16]]
    found = facts(tmp_path / "a", "sft", settings_of(config, set()), inputs={"data": parts})
    assert found["data"] == "`a.jsonl:3` (0123456789ab), `b.jsonl:1` (ffffffffffff)"
    assert found["each step"] == "1,024 tokens at most"
    folder = facts(tmp_path / "b", "sft", settings_of(config, set()), inputs={"data": [*parts, ["c", "d"]]})
    assert folder["data"] == "`a.jsonl:3`, `b.jsonl:1`"


def test_the_text_of_a_recipe_is_told_as_made_here(tmp_path):
    settings = {"data": ["countdown"], "documents": 60_000, "model": "depth=2", "batch_tokens": 2048}
    inputs = {"data": [["countdown", "by its flags"]]}
    found = facts(tmp_path, "pretrain", settings, inputs=inputs)
    assert found["data"] == "`countdown`, a text that r1zero makes: 60,000 documents"
    assert found["model"] == "`depth=2`, from random weights" and "base" not in found


def test_rankings_say_how_many_pairs_were_turned_around(tmp_path):
    config = RewardModelConfig(run="x", base="b", data="rankings.jsonl", noise=0.1)
    found = facts(tmp_path / "a", "reward-model", settings_of(config, set()))
    assert found["each step"] == "16 rankings, with 10% of the pairs turned around"
    exact = facts(tmp_path / "b", "reward-model", settings_of(replace(config, noise=0.0), set()))
    assert exact["each step"] == "16 rankings" and exact["data"] == "`rankings.jsonl`"


def test_the_license_is_that_of_what_the_base_was_made_from(tmp_path):
    open_model = tmp_path / "open"
    open_model.mkdir()
    front_matter = '---\ntags: [x]\nlicense: "apache-2.0"\n---\n'
    (open_model / "README.md").write_text(f"{front_matter}license: of something else\n")
    make_run(tmp_path / "tuned", "sft", settings={"base": str(open_model)})
    found = facts(tmp_path, "grpo", {"base": str(tmp_path / "tuned")})
    assert found["base"] == "`tuned`, license apache-2.0"
    (open_model / "README.md").write_text("A model.\n---\nlicense: mit\n")
    assert facts(tmp_path, "grpo", {"base": str(open_model)})["base"] == "`open`, license not known here"


def test_a_base_with_adapters_has_two_fingerprints(tmp_path):
    inputs = {"base": [["weights", f"{'a' * 32}+{'b' * 32}"]]}
    found = facts(tmp_path, "grpo", {"base": "runs/lora"}, inputs=inputs)
    assert found["base"] == f"`lora`, weights {'a' * 12}+{'b' * 12}, license not known here"


def test_a_base_that_was_moved_with_its_run_is_found_beside_it(tmp_path):
    make_run(tmp_path / "base", "pretrain")
    found = facts(tmp_path, "grpo", {"base": "runs/old/base"})
    assert found["base"] == "`base`, trained from random weights with r1zero"


def test_a_run_that_is_its_own_base_ends_the_search(tmp_path):
    found = facts(tmp_path, "sft", {"base": str(tmp_path / "run")})
    assert found["base"] == "`run`, license not known here"


def test_of_an_unknown_loop_little_is_said(tmp_path):
    assert facts(tmp_path, "later", {"seed": 1}) == {"made by": "`r1zero later`, step 1, seed 1"}
