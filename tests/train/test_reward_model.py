"""A reward model from rankings: it learns, is centred, resumes, and refuses what nobody can learn from; and
GRPO with one as a part of the reward."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1zero.eval.harness import interval
from r1zero.model.checkpoint import (
    CheckpointError,
    checkpoint_steps,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.main import main
from r1zero.train.fit_head import ItemBatches, mixed_order, split_by_prompt
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.log import read_metrics
from r1zero.train.rankings import encode_rankings, read_rankings
from r1zero.train.reward_model import (
    RewardModelConfig,
    load_reward_model,
    measure,
    reward_model,
)
from r1zero.train.run import read_record

from ..rl.cases import Bandit, tiny
from .loop_cases import grpo_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome

CPU = torch.device("cpu")


def write(path, lines) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def more_of_a(n: int, seed: int = 0) -> list[dict]:
    """Rankings by how many of four letters are an a; right: two of them at least."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        answers = ["".join(rng.choice(list("abc"), 4)) for _ in range(4)]
        counts = [answer.count("a") for answer in answers]
        if len(set(counts)) > 1:
            ranks = [1 + sum(other > count for other in counts) for count in counts]
            lines.append({"prompt": f"{i}: ", "answers": answers, "ranks": ranks,
                          "right": [count > 1 for count in counts]})
    return lines


def split(lines, encoded, share) -> tuple[list, list]:
    return split_by_prompt([line.prompt for line in lines], encoded, share, "rankings")


def config(run, base, data, **changes) -> RewardModelConfig:
    optim = OptimConfig(lr=1e-2, warmup=2, schedule="constant", weight_decay=0.0)
    common = dict(steps=6, save_every=2, rankings_per_step=8, optim=optim, device="cpu")
    data = tuple(map(str, data)) if isinstance(data, tuple) else (str(data),)
    return RewardModelConfig(run=str(run), base=str(base), data=data, **{**common, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, rankings, and a reward model of them in rm/."""
    folder = tmp_path_factory.mktemp("rm")
    save_base(folder / "base")
    write(folder / "r.jsonl", more_of_a(120))
    reward_model(config(folder / "rm", folder / "base", folder / "r.jsonl", steps=40, save_every=20))
    return folder


# ---- training ----

def test_it_learns_what_the_judge_prefers_on_prompts_that_it_has_not_seen(folder):
    found = read_record(folder / "rm/run.json")["reward_model"]
    assert found["shares"]["agrees"][0] > 0.9 and found["ceiling"] == 1.0
    assert set(found["shares"]) == {"agrees", "right against wrong", "within a class"}
    assert sum(one["n_pairs"] for one in found["calibration"]) == found["pairs"] > 30
    rows = read_metrics(folder / "rm")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["accuracy"] == 0.5
    assert [row["step"] for row in rows if "held_out_accuracy" in row] == [20, 40]
    assert rows[-1]["held_out_accuracy"] == found["shares"]["agrees"][0]
    assert (folder / "rm/calibration.png").read_bytes().startswith(b"\x89PNG")


def test_its_scores_are_centred_on_the_answers_that_it_was_trained_on(folder):
    model, tokenizer, _ = load_reward_model(str(folder / "rm"), CPU)
    lines = read_rankings(folder / "r.jsonl")
    encoded = encode_rankings(tokenizer, lines, model.config, 0.0, 0)
    trained, held_out = split(lines, encoded, 0.1)
    scores = model.scores([tokens for r in trained for tokens in r.sequences], 1000)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.min() == pytest.approx(float(model.floor), abs=1e-4)
    assert all(len(tokens) > 4 and tokens[-1] == tokenizer.eos_id for tokens in held_out[0].sequences)


def test_a_run_resumes_to_the_same_bits_whatever_the_micro_batch(folder, tmp_path, monkeypatch):
    base, data = folder / "base", folder / "r.jsonl"
    reward_model(config(tmp_path / "whole", base, data, noise=0.1))
    broken_at(monkeypatch, 5, reward_model, config(tmp_path / "run", base, data, noise=0.1))
    with fails(CheckpointError, "training was stopped, and its scores are not centred"):
        load_reward_model(str(tmp_path / "run"), CPU)
    reward_model(config(tmp_path / "run", base, data, noise=0.1, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    reward_model(config(tmp_path / "small", base, data, noise=0.1, micro_tokens=1))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "small")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    write(tmp_path / "r.jsonl", more_of_a(120, seed=1))
    with fails(CheckpointError, "have changed: data"):
        reward_model(config(tmp_path / "run", base, tmp_path / "r.jsonl", noise=0.1, resume=True))


def test_a_model_that_is_trained_further_has_no_centre_until_its_training_ends(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    reward_model(config(run, folder / "base", folder / "r.jsonl"))
    nothing_left = config(run, folder / "base", folder / "r.jsonl", resume=True)
    assert reward_model(nothing_left).is_centred
    further = config(run, folder / "base", folder / "r.jsonl", steps=12, resume=True)
    broken_at(monkeypatch, 10, reward_model, further)
    with fails(CheckpointError, "training was stopped, and its scores are not centred"):
        load_reward_model(str(run), CPU)
    reward_model(further)
    load_reward_model(str(run), CPU)


def test_rankings_of_the_same_prompt_count_as_one(tmp_path):
    lines = read_rankings(write(tmp_path / "r.jsonl", more_of_a(12)))
    once, twice = [encode_rankings(Tokenizer.bytes(), each, tiny().config, 0.0, 0)
                   for each in (lines, lines * 2)]
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=4) for _ in lines]
    found = measure(scores, once, config("x", "x", "x"))
    assert found == measure(scores * 2, twice, config("x", "x", "x"))
    shares = [agreed(*each) for each in zip(once, scores, strict=True)]
    n_pairs = int(np.mean([len(each.clean.better) for each in once]))
    assert found["agrees"] == interval(shares, n_pairs) and 0 < np.mean(shares) < 1


def agreed(ranking, scores) -> float:
    """The share of the pairs of a ranking in which these scores agree."""
    return float((scores[ranking.clean.better] > scores[ranking.clean.worse]).mean())


def test_with_noise_the_table_shows_the_ceiling_and_the_share_without_it(folder, tmp_path, capsys):
    reward_model(config(tmp_path / "run", folder / "base", folder / "r.jsonl", noise=0.3, held_out=0.5))
    found = read_record(tmp_path / "run/run.json")["reward_model"]
    shares = found["shares"]
    assert found["ceiling"] == 0.7 and shares["agrees"][0] < shares["agrees without the noise"][0]
    assert "the most that could        70.0%" in capsys.readouterr().out


# ---- rankings ----

def test_a_prompt_is_on_one_side_alone_and_batches_are_a_function_of_seed_and_index(tmp_path):
    lines = read_rankings(write(tmp_path / "r.jsonl", [*more_of_a(60), *more_of_a(60, seed=1)]))
    encoded = encode_rankings(Tokenizer.bytes(), lines, tiny().config, 0.0, 0)
    trained, held_out = split(lines, encoded, 0.25)
    prompts = [{bytes(r.sequences[0].tolist()[:-5]) for r in side} for side in (trained, held_out)]
    assert not prompts[0] & prompts[1] and len(trained) + len(held_out) == len(lines)
    batches = ItemBatches(trained, 7, seed=3)
    seen = [id(r) for i in range(len(trained)) for r in ItemBatches(trained, 7, seed=3).batch(i)]
    assert seen == [id(r) for i in range(len(trained)) for r in batches.batch(i)]
    assert sorted(seen[: len(trained)]) == sorted(map(id, trained))
    assert seen[:7] != [id(r) for r in trained[:7]]


def test_files_of_rankings_are_mixed_by_weight_and_without_any_are_read_as_one(folder, tmp_path):
    few, many, both = more_of_a(20), more_of_a(60, seed=1), tmp_path / "both.jsonl"
    files = (write(tmp_path / "few.jsonl", few), write(tmp_path / "many.jsonl", many))
    one = reward_model(config(tmp_path / "one", folder / "base", write(both, few + many), noise=0.2))
    two = reward_model(config(tmp_path / "two", folder / "base", files, noise=0.2))
    rows = [outcome(tmp_path / name)["rows"] for name in ("one", "two")]
    assert one.value.equal(two.value) and rows[0] == rows[1]

    # 3 : 1 of what is trained on, in each epoch, though the first file is the smaller one
    prompts = [[line["prompt"] for line in lines] for lines in (few, many)]
    mixed = config(tmp_path / "mixed", folder / "base", (files[0] + ":3", files[1] + ":1"))
    order = mixed_order(mixed, prompts)
    n_few = len(split_by_prompt(prompts[0], few, 0.1, "rankings")[0])
    n_all = len(split_by_prompt(sum(prompts, []), few + many, 0.1, "rankings")[0])
    for epoch in (0, 1):
        from_few = np.sum(order(epoch) < n_few)
        assert 3 * (len(order(epoch)) - from_few) == from_few and order(epoch).max() < n_all
    batches = ItemBatches([*range(n_all)], len(order(0)), 0, order)
    assert batches.batch(1) == order(1).tolist()

    reward_model(mixed)
    with fails(CheckpointError, "have changed: data weights"):
        reward_model(replace(mixed, data=(files[0] + ":2", files[1] + ":1"), resume=True))
    one = write(tmp_path / "one.jsonl", more_of_a(1))
    with fails(ValueError, "one.jsonl has no line to train on, since --held-out 0.9"):
        mixed_order(replace(mixed, data=(files[1], one + ":2"), held_out=0.9), [prompts[1], ["0: "]])


GOOD = {"prompt": "p", "answers": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize("change, told", [
    (dict(ranks=[1, 1]), "all 2 ranks are equal"),
    (dict(answers=["a"], ranks=[1]), "1 answers, expected 2 to 64"),
    (dict(answers=["a"] * 65, ranks=[*range(65)]), "65 answers, expected 2 to 64"),
    (dict(ranks=[1]), "2 answers and 1 ranks"),
    (dict(right=[True]), "2 answers and 1 right"),
    (dict(ranks=[1, 2.5]), "`ranks` is missing or another kind"),
    (dict(ranks=[True, False]), "`ranks` holds true or false"),
    (dict(ranks="12"), "`ranks` is missing"),
    (dict(answers="ab"), "`answers` is missing"),
    (dict(answers=["a", None]), "`answers` is missing or another kind"),
    (dict(prompt=" "), "`prompt` is missing, empty"),
    (dict(right=[0.5, 1]), "`right` holds other numbers than 0 and 1"),
    (dict(answers=["a", "\ud800"]), "answer 2 has half of a character"),
])
def test_a_line_that_is_no_ranking_is_named_with_its_fault(tmp_path, change, told):
    path = write(tmp_path / "r.jsonl", [GOOD, GOOD | change])
    with fails(ValueError, f"line 2: .*{told}"):
        read_rankings(path)
    assert len(read_rankings(path, skip_bad=True)) == 1
    with fails(ValueError, "is empty"):
        read_rankings(write(tmp_path / "empty.jsonl", []))


def test_what_the_model_cannot_read_is_refused_before_there_is_a_folder(folder, tmp_path):
    def train(lines, **changes):
        data = write(tmp_path / "r.jsonl", lines)
        reward_model(config(tmp_path / "run", folder / "base", data, **changes))

    with fails(ValueError, "of 1 rankings 0 are held out by --held-out 0.1"):
        train([GOOD])
    with fails(ValueError, "ranking 1 .* an answer of 302 tokens with its prompt, .* room for 256"):
        train([GOOD, GOOD | {"answers": ["a" * 300, "b"]}])
    with fails(ValueError, "--noise is 0.6"):
        train([GOOD], noise=0.6)
    with fails(ValueError, "--held-out is 1.0"):
        train([GOOD], held_out=1.0)
    shape = replace(tiny().config, vocab_size=257)
    with fails(ValueError, "ranking 0 .* has the token id 257, and the model's vocabulary has ids .* to 256"):
        encode_rankings(Tokenizer.bytes(), read_rankings(tmp_path / "r.jsonl"), shape, 0.0, 0)
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_learns_from(folder, tmp_path, capsys):
    tied = GOOD | {"answers": ["a", "b", "c"], "ranks": [1, 2, 2]}
    data = write(tmp_path / "r.jsonl", [*more_of_a(40), tied])
    words = ["reward-model", "--run", str(tmp_path / "x"), "--base", str(folder / "base"), "--data", data,
             "--steps", "1", "--device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert "pairs to train on" in out.err and "held-out prompts" in out.out
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err


# ---- as a part of the reward ----

def rl_config(folder, run, algo="plain", **changes):
    rewards = dict(accuracy_weight=0.0, format_weight=0.0, model=str(folder / "rm"))
    return grpo_config(run, folder / "base", algo, **{"rewards": rewards, "steps": 4, **changes})


def test_grpo_raises_the_score_of_a_reward_model_and_logs_it(folder, tmp_path):
    grpo(rl_config(folder, tmp_path / "run", steps=12, prompts_per_step=8, max_new_tokens=6))
    scores = [row["reward_model"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.1
    assert all(row["reward"] == row["reward_model"] for row in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("algo", ["plain", "ppo"])
def test_a_run_with_one_resumes_to_the_same_bits_and_knows_it_by_its_content(
        folder, tmp_path, monkeypatch, algo):
    grpo(rl_config(folder, tmp_path / "whole", algo))
    broken_at(monkeypatch, 3, grpo, rl_config(folder, tmp_path / "run", algo))
    grpo(rl_config(folder, tmp_path / "run", algo, resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    other = config(tmp_path / "other", folder / "base", folder / "r.jsonl", steps=2)
    reward_model(other)
    with fails(CheckpointError, "have changed: reward model .*weights"):
        grpo(rl_config(folder, tmp_path / "run", algo, resume=True, rewards=dict(
            accuracy_weight=0.0, format_weight=0.0, model=other.run)))


def test_it_comes_in_after_its_share_of_the_steps(folder, tmp_path):
    rewards = dict(model=str(folder / "rm"), model_from=0.5)
    policy = grpo(rl_config(folder, tmp_path / "run", rewards=rewards))
    rows = read_metrics(tmp_path / "run")
    assert ["reward_model" in row for row in rows] == [False, False, True, True]
    predicted = json.loads((tmp_path / "run/run.json").read_text())["memory"]["predicted"]
    assert predicted["models that judge"] == sum(p.nbytes for p in policy.parameters())  # all in fp32
    for row in rows:
        expected = row["accuracy"] + 0.2 * row["format"] + row.get("reward_model", 0.0)
        assert row["reward"] == pytest.approx(expected)


def test_ppos_critic_begins_from_the_reward_model_which_stays_what_it_is(folder, tmp_path):
    learners = []

    def step(learner, *rest):
        learners.append(learner)
        return timed_step(learner, *rest)

    grpo(rl_config(folder, tmp_path / "run", "ppo", steps=1), step)
    [learner] = learners
    model = learner.grader.score.func.__self__
    saved = load_checkpoint(folder / "rm").tensors["model"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    trunk = learner.credit.critic.critic.trunk
    assert trunk is not model.trunk and all(p.requires_grad for p in trunk.parameters())
    assert float((trunk.embed - model.trunk.embed).detach().abs().max()) < 0.01
    assert float((trunk.embed - learner.reference.model.embed).detach().abs().max()) > 0.01


def test_a_reward_model_that_does_not_fit_is_refused_before_there_is_a_folder(folder, tmp_path):
    def refused(told: str, model, **changes):
        with fails(ValueError, told):
            grpo(rl_config(folder, tmp_path / "run", rewards=dict(model=str(model)), **changes))
        assert not (tmp_path / "run").exists()

    refused("base/checkpoints/step_00000000 holds no reward model", folder / "base")
    refused("nowhere does not exist", tmp_path / "nowhere")
    words = Tokenizer.from_words(["ab"])
    model = tiny(vocab_size=words.vocab_size)
    state = {"model_config": model.config.to_dict(), "tokenizer": words.to_dict(), "settings": {}}
    save_checkpoint(tmp_path / "words", 0, {"model": dict(model.named_parameters())}, state)
    reward_model(config(tmp_path / "rm", tmp_path / "words", folder / "r.jsonl", steps=1))
    refused("made with another tokenizer than --base", tmp_path / "rm")
    save_base(tmp_path / "short", max_seq_len=32)
    reward_model(config(tmp_path / "rm2", tmp_path / "short", folder / "r.jsonl", steps=1))
    refused("has room for 32 tokens, and a prompt and its answer may have 42; lower --max-new-tokens by 10",
            tmp_path / "rm2", max_new_tokens=40)
    with fails(ValueError, "--rewards.model-from is 1.0"):
        rl_config(folder, tmp_path / "run", rewards=dict(model="x", model_from=1.0))
    with fails(ValueError, "--rewards.model-from 0.8 of 4 --steps leaves none to the reward model"):
        rl_config(folder, tmp_path / "run", rewards=dict(model="x", model_from=0.8))
    for name, value in (("model-from", 0.5), ("process-weight", 2.0)):
        with fails(ValueError, f"--rewards.{name} is given without --rewards.{name.partition('-')[0]}, and"):
            rl_config(folder, tmp_path / "run", rewards={name.replace("-", "_"): value})
    with fails(ValueError, "--rewards.model-weight 1.0 with --advantage.scale mean"):
        rl_config(folder, tmp_path / "run", "maxrl", rewards=dict(model="x"))


def test_a_reward_model_is_no_model_that_writes_and_other_commands_have_none(folder, tmp_path, capsys):
    with fails(ValueError, "holds a reward model, which scores answers and writes none"):
        load_model(str(folder / "rm"), CPU)
    grade = ["--response", "x", "--problem", "3 7 9 -> 13"]
    for command, flags in ((["grade"], grade), (["demo"], []), (["recipe", "minimal"], [])):
        assert main([*command, *flags, "--rewards.model", "x"]) == 2
        assert f"r1zero {' '.join(command)} has no reward model" in capsys.readouterr().err
    assert checkpoint_steps(folder / "rm") == [20, 40]
    rewards = dict(model=str(folder / "rm"), model_weight=0.0)
    grpo(rl_config(folder, tmp_path / "zero", steps=1, rewards=rewards))
    assert "reward_model" not in read_metrics(tmp_path / "zero")[0]


def test_a_task_may_leave_some_of_its_problems_to_the_reward_model(folder, tmp_path):
    class Half(Bandit):
        @staticmethod
        def judged_by_model(problem):
            return problem % 2 == 1

    rewards = dict(model=str(folder / "rm"))
    grpo(rl_config(folder, tmp_path / "run", task=Half(), steps=1, rewards=rewards))
    [row] = read_metrics(tmp_path / "run")
    assert row["reward"] < row["accuracy"] + 0.2 * row["format"] + row["reward_model"]
