"""The road from R1-Zero to R1 at toy size: every stage is an ordinary run, made once and measured."""
import json
import re

import pytest

from r1zero.eval.harness import interval
from r1zero.eval.response import Sample
from r1zero.eval.tasks.assistant import Assistant
from r1zero.train.cli.main import main
from r1zero.train.recipes.r1 import R1Config, Results, check_collection, stages_of
from r1zero.train.recipes.r1_corpus import said
from r1zero.train.recipes.r1_measure import (
    by_problem,
    measure,
    reached,
    win_rate,
    write_samples,
)
from r1zero.train.report.r1_page import CLAIMS, EVEN, TITLES, claims, verdict
from r1zero.train.run import read_record

from ..run_cases import fails

SMALL = """--model tiny --documents 300 --pretrain-steps 40 --zero-steps 1 --cold-steps 2 --reasoning-steps 1
           --tuned-steps 2 --reward-steps 2 --all-steps 4 --collect-problems 8 --eval-problems 3
           --eval-samples 2 --keep all --max-new-tokens 60 --device cpu""".split()
STAGES = """base zero cold_data cold reasoning no_language no_cold chosen tuned alone rankings reward
            r1""".split()


def recipe(folder, *flags: str) -> int:
    return main(["r1", "--run", str(folder), *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1") / "recipe"
    assert recipe(folder) == 0
    return folder


@pytest.mark.slow
def test_every_stage_is_made_and_every_model_is_measured_on_the_same_problems(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [name for name in results["seconds"] if not name.startswith("eval_")] == STAGES
    models = [name for name in STAGES if name not in ("cold_data", "chosen", "rankings", "reward")]
    assert list(results["stages"]) == models
    assert list(results["sampled"]) == [f"eval_{name}" for name in models]
    prompts = []
    for name in models:
        rows = [json.loads(row) for row in (finished / f"eval_{name}.jsonl").read_text().splitlines()]
        prompts.append([row["prompt"] for row in rows])
        assert len(rows) == 3 * 3 * 2
        counted = results["sampled"][f"eval_{name}"]
        assert (counted["answers"], counted["tokens"]) == (18, sum(row["n_tokens"] for row in rows))
    assert prompts == [prompts[0]] * len(models)
    assert results["stages"]["reasoning"]["steps_to_70"] is None
    assert "steps_to_70" not in results["stages"]["cold"]
    assert "win_rate" in results["stages"]["r1"] and "win_rate" not in results["stages"]["tuned"]
    page = (finished / "report.html").read_text()
    assert all(TITLES[name][0] in page for name in models) and (finished / "r1.png").exists()


@pytest.mark.slow
def test_each_stage_begins_where_the_paper_says(finished):
    begins = {"zero": "base", "cold": "base", "reasoning": "cold", "tuned": "base", "reward": "tuned",
              "r1": "tuned", "no_language": "cold", "no_cold": "base", "alone": "base"}
    bases = {name: read_record(finished / name / "run.json")["config"]["base"] for name in begins}
    assert {name: base.rpartition("/")[2] for name, base in bases.items()} == begins


@pytest.mark.slow
def test_a_finished_road_is_neither_overwritten_nor_gone_again(finished, capsys):
    weights = sorted(finished.glob("*/checkpoints/*/model.safetensors")) + sorted(finished.glob("*.jsonl"))
    before = [file.stat().st_mtime_ns for file in weights if file.name != "general.jsonl"]
    assert recipe(finished) == 2 and "--resume" in capsys.readouterr().err
    assert recipe(finished, "--resume") == 0
    assert [file.stat().st_mtime_ns for file in weights if file.name != "general.jsonl"] == before
    assert recipe(finished, "--resume", "--language-weight", "0.7") == 2
    assert "--rewards.language-weight" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_that_is_gone_is_made_again_and_the_others_are_not(finished, capsys):
    kept = (finished / "eval_r1.jsonl").read_bytes()
    chosen = (finished / "chosen.jsonl").read_bytes()
    (finished / "chosen.jsonl").unlink()
    assert recipe(finished, "--resume") == 0
    assert (finished / "chosen.jsonl").read_bytes() == chosen
    assert (finished / "eval_r1.jsonl").read_bytes() == kept


@pytest.mark.slow
def test_with_other_held_out_problems_every_model_is_measured_again(finished):
    flags = [*SMALL[:SMALL.index("--eval-problems") + 1], "4", *SMALL[SMALL.index("--eval-problems") + 2:]]
    assert main(["r1", "--run", str(finished), *flags, "--resume"]) == 0
    found = json.loads((finished / "results.json").read_text())["stages"]
    assert {stage["eval_problems"] for stage in found.values()} == {4}
    assert all(len((finished / f"eval_{name}.jsonl").read_text().splitlines()) == 4 * 3 * 2 for name in found)
    assert recipe(finished, "--resume") == 0


def test_the_controls_and_the_broken_run_differ_in_one_thing_each(tmp_path):
    stages = {stage.name: stage.config for stage in stages_of(R1Config(hack=True), tmp_path)}

    def differs(one, other):
        theirs = vars(stages[other])
        return {key for key, value in vars(stages[one]).items() if value != theirs[key]} - {"run"}

    assert differs("no_language", "reasoning") == {"rewards"}
    assert stages["no_language"].rewards.language_weight == 0
    assert differs("no_cold", "reasoning") == {"base"}
    assert differs("alone", "tuned") == {"data"}
    assert differs("hacked", "r1") == {"rewards", "steps", "task"}
    assert "requests_from=480" in stages["r1"].task.options and stages["r1"].prompts_per_step == 16
    assert "requests_from=0" in stages["hacked"].task.options
    assert stages["hacked"].rewards.model_from == 0 and stages["r1"].rewards.model_from == 0.75
    assert stages["hacked"].steps == 4 * stages["r1"].steps and stages["r1"].temperature == 0.7
    alone = [stage.name for stage in stages_of(R1Config(controls=False), tmp_path)]
    assert not {"no_language", "no_cold", "alone", "hacked"} & set(alone)


@pytest.mark.parametrize("flags", [{"pretrain_steps": 0}, {"cold_steps": 0}, {"all_steps": 0},
                                   {"documents": 0}, {"eval_problems": 0}, {"seed": -1}, {"model": "huge"},
                                   {"high": 0},
                                   {"keep": ("good",)}, {"language_weight": -1.0}])
def test_flags_out_of_range_are_refused_before_anything_is_made(flags):
    with pytest.raises(ValueError, match=next(iter(flags)).partition("_")[0]):
        R1Config(**flags)


@pytest.mark.parametrize("flags, told", [
    ({"high": 2}, "--eval-problems 200 asks for 200 problems, but assistant with these options has 3"),
    ({"eval_problems": 1070}, "--eval-problems 1070 .*1,069 different test problems; lower it"),
    ({"collect_problems": 2286}, "--collect-problems 2286, twice for puzzles, asks for 4,572 problems, but"),
    ({"collect_problems": 1}, "--collect-problems is 1, and so few requests .*; expected 2 or more"),
    ({"max_new_tokens": 250}, "--max-new-tokens is 250, but --model demo has room for 249 beside a problem"),
    ({"all_steps": 3}, "--all-steps is 3, expected 4 or more")])
def test_what_a_late_stage_would_refuse_is_refused_at_once(flags, told):
    with fails(ValueError, told):
        R1Config(**flags)


def test_the_fewest_steps_of_the_last_rl_have_the_reward_model(tmp_path):
    [r1] = [stage.config for stage in stages_of(R1Config(all_steps=4), tmp_path) if stage.name == "r1"]
    assert "requests_from=48" in r1.task.options and r1.prompts_per_step * r1.steps == 64


def test_answers_that_are_whole_are_compared_by_the_flags_of_the_recipe_before_anything_is_made(
        tmp_path, capsys):
    for name, flags in (("cold_data", {"keep": ["right"], "problems": 32}), ("chosen", {"problems": 16})):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
        (tmp_path / f"{name}.jsonl.summary.json").write_text(json.dumps({"flags": flags}))
    assert recipe(tmp_path, "--resume") == 2
    told = f"--keep was right and --collect-problems was 16 when {tmp_path}/cold_data.jsonl was made; give"
    assert told in capsys.readouterr().err and not (tmp_path / "general.jsonl").exists()
    # Those that are not complete may have others.
    (tmp_path / "cold_data.jsonl.partial").write_text("{}\n")
    config = R1Config(collect_problems=8, keep=("all",))
    stages = {stage.name: stage.config for stage in stages_of(config, tmp_path)}
    for name in ("cold_data", "chosen", "rankings"):
        check_collection(config, stages[name])


def test_a_stage_is_measured_again_if_its_samples_are_gone_and_a_torn_file_is_named(tmp_path):
    results = Results(tmp_path, R1Config())
    results.stages["tuned"] = {"steps": 3}
    path = tmp_path / "eval_tuned.jsonl"
    assert not results.is_measured("tuned", {"steps": 3})
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert results.is_measured("tuned", {"steps": 3}) and not results.is_measured("tuned", {"steps": 4})
    path.write_text('{"prompt": "a"}\n{"prom')
    with fails(ValueError, f"{path} is torn: 1 of its 2 lines are JSON objects; remove it, and --resume"):
        results.is_measured("tuned", {"steps": 3})
    (tmp_path / "results.json").write_text('{"seconds": {"base"')
    with fails(ValueError, f"{tmp_path}/results.json is torn: .*; restore it, or remove it"):
        Results(tmp_path, R1Config())


# ---- what is measured ----

def groups(*texts: str) -> list[list[Sample]]:
    """A puzzle in each language and a request, each answered by these texts."""
    problems = [Assistant.problem_from_text(prompt) for prompt in ("3 7 9 -> 13", "3 7 9 → 13", "say 3 7:")]
    return [[Sample(problem, text, range(10), "stop") for text in texts] for problem in problems]


def test_shares_are_means_over_problems_of_each_kind():
    found = measure(groups("<think>1-1=0 ok</think><answer>9-3+7</answer>", said((3, 7), 1)))
    assert found["accuracy"][0] == 0.5 and found["format"][0] == 1.0
    # The second answer has no words, so it is consistent; the first is in English.
    assert found["consistency_en"][0] == 1.0 and found["consistency_zh"][0] == 0.5
    assert found["consistency"][0] == 0.75
    assert found["general"][0] == 0.5 and found["thanks_once"][0] == 0.5 and found["tokens"] == 10


def test_a_sum_in_two_languages_and_a_request_that_comes_twice_are_one_problem_each():
    right, wrong = "<think></think><answer>9-3+7</answer>", "<think></think><answer>9</answer>"
    [english, chinese, request] = groups(right, wrong)
    [other] = [[Sample(Assistant.problem_from_text("1 2 9 -> 6"), right, range(10), "stop")] * 4]
    merged = by_problem([english, chinese, request, request, other])
    assert [len(group) for group in merged] == [4, 4, 4] and merged[0] == english + chinese
    assert measure([english, chinese, other])["accuracy"] == list(interval([0.5, 0.0], 4))


def test_the_win_rate_compares_every_answer_with_every_other_and_ties_count_half(tmp_path):
    good, bad = said((3, 7), 1), said((3,), 0)
    for name, texts in (("one", (good, good)), ("same", (good, bad)), ("bad", (bad, bad))):
        write_samples(tmp_path / name, groups(*texts))
    assert win_rate(tmp_path / "one", tmp_path / "bad").mean == 1.0
    assert win_rate(tmp_path / "bad", tmp_path / "one").mean == 0.0
    assert win_rate(tmp_path / "one", tmp_path / "same").mean == 0.75
    assert win_rate(tmp_path / "one", tmp_path / "one").mean == 0.5


def test_an_accuracy_is_reached_when_a_mean_of_steps_is(tmp_path):
    rights = [0.1, 0.9, 0.2, 0.6, 0.8, 0.9]
    rows = [{"step": step, "accuracy": right} for step, right in enumerate(rights, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reached(tmp_path, 0.7) == 6 and reached(tmp_path, 0.39) == 3 and reached(tmp_path, 0.8) is None


# ---- what is claimed ----

def test_a_claim_holds_only_if_the_intervals_are_apart_and_the_sign_is_right():
    high, low, wide = [0.9, 0.85, 0.95], [0.5, 0.45, 0.55], [0.7, 0.5, 0.9]
    assert verdict(high, low, True) == "yes" and verdict(low, high, False) == "yes"
    assert verdict(low, high, True).startswith("no:") and verdict(high, low, False).startswith("no:")
    assert verdict(high, wide, True) == verdict(wide, high, True) == "no difference: the intervals overlap"
    assert verdict(high, wide, None) == "yes: the intervals overlap" and verdict(high, low, None) == "yes"
    assert verdict(low, high, None).startswith("no:")  # what was to be kept
    for claim in CLAIMS:
        assert {claim.one, claim.other} <= TITLES.keys() | {EVEN} and re.match("[A-Za-z]", claim.text)


def test_answers_are_preferred_if_they_are_so_more_often_than_not():
    for share, holds in (([0.63, 0.6, 0.67], "<td>yes</td>"), ([0.52, 0.48, 0.56], "no difference"),
                         ([0.03, 0.02, 0.04], "no: the other way round")):
        assert holds in claims({"r1": {"win_rate": share}})
    assert claims({"base": {"accuracy": [0.5, 0.4, 0.6]}}) == ""
