"""GRPO with a teacher: the student comes nearer to it, whatever its shape; one of other tokens is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, load_model, save_checkpoint
from r1zero.model.lora import LoRAConfig
from r1zero.model.memory import Setup, predict
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.rl.rollouts import micro_batches
from r1zero.rl.update import Teacher, kl_cost_to, logprobs_of
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.log import read_metrics

from ..rl.cases import algorithm, rollouts_by_hand, tiny
from .loop_cases import grpo_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student in base/, and a teacher of three layers, which is surer of itself, in teacher/."""
    folder = tmp_path_factory.mktemp("teacher")
    save_base(folder / "base")
    model = tiny(5, n_layers=3)
    with torch.no_grad():
        model.head.mul_(3)
    save(model, folder / "teacher")
    return folder


def save(model, folder, tokenizer=None):
    tokenizer = tokenizer or Tokenizer.bytes()
    state = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.to_dict(), "settings": {}}
    save_checkpoint(folder, 0, {"model": dict(model.named_parameters())}, state)


def config(folder, run, **changes):
    return grpo_config(run, folder / "base", "distill", **{"teacher": str(folder / "teacher"), **changes})


def test_the_student_comes_nearer_to_a_teacher_of_another_shape_and_rewards_are_for_the_log(
        folder, tmp_path, capsys):
    optim = OptimConfig(lr=1e-2, warmup=0, schedule="constant", weight_decay=0.0)
    grpo(config(folder, tmp_path / "run", steps=12, prompts_per_step=16, updates_per_step=2, optim=optim,
                advantage=dict(scale="batch")))
    rows = read_metrics(tmp_path / "run")
    first, last = (np.mean([row["kl_in_reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert 0 < last < 0.85 * first
    assert "far_from_reference" not in capsys.readouterr().err  # it is to come away from its base
    assert all(row["reward"] == pytest.approx(row["accuracy"] + 0.2 * row["format"]) for row in rows)
    assert not (tmp_path / "run/start").exists()  # its KL is to the teacher's folder
    again = dict(accuracy_weight=7.0)
    grpo(config(folder, tmp_path / "paid", steps=2, rewards=again))
    grpo(config(folder, tmp_path / "two", steps=2))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("paid", "two")]
    assert losses[0] == losses[1]


def test_a_run_resumes_to_the_same_bits_and_knows_its_teacher_by_its_content(folder, tmp_path, monkeypatch):
    grpo(config(folder, tmp_path / "whole"))
    broken_at(monkeypatch, 3, grpo, config(folder, tmp_path / "run"))
    grpo(config(folder, tmp_path / "run", resume=True))
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))
    save_base(tmp_path / "other", 9)
    with fails(CheckpointError, "have changed: teacher .*weights"):
        grpo(config(folder, tmp_path / "run", resume=True, steps=7, teacher=str(tmp_path / "other")))


def test_adapters_learn_from_a_teacher_and_not_from_their_base(folder, tmp_path):
    seen = []

    def step(learner, *rest):
        seen.append(learner.reference)
        return timed_step(learner, *rest)

    grpo(config(folder, tmp_path / "run", steps=1, lora=LoRAConfig(rank=2)), step)
    saved, _, _ = load_model(str(folder / "teacher"), CPU)
    assert type(seen[0]) is Teacher and seen[0].model.head.equal(saved.head)
    assert read_metrics(tmp_path / "run")[0]["kl_in_reward"] > 0.1


def test_the_cost_of_each_token_is_its_log_ratio_and_a_mixture_chooses_its_own_experts():
    student, teacher = tiny(0), tiny(1, moe=dict(n_experts=4, experts_per_token=1, d_expert=8))
    rollouts = rollouts_by_hand(student, temperature=0.7)
    # Routes of some other mixture, which the teacher could not follow.
    lengths = [len(sequence) - 1 for sequence in rollouts.sequences]
    routed = replace(rollouts, routes=[np.full((n, 5, 3), 99) for n in lengths])
    c = algorithm("distill", micro_tokens=30)
    costs = [kl_cost_to(Teacher(teacher, CPU), c)(each) for each in (rollouts, routed)]
    assert np.array_equal(*costs)
    for batch in micro_batches(rollouts, np.arange(6), 30, CPU):
        [expected] = logprobs_of(teacher, [batch], 0.7)
        cost = torch.from_numpy(costs[0])[batch.token_index]
        torch.testing.assert_close(cost, (batch.sampler_logp - expected).double(), atol=1e-5, rtol=0)


def test_a_teacher_that_does_not_fit_is_refused_before_there_is_a_folder(folder, tmp_path):
    def refused(told: str, **changes):
        with fails(ValueError, told):
            grpo(config(folder, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    refused("nowhere does not exist", teacher=str(tmp_path / "nowhere"))
    refused("--algo distill learns from a teacher alone; add --teacher", teacher=None)
    words = Tokenizer.from_words(["ab"])
    save(tiny(vocab_size=words.vocab_size), tmp_path / "words", words)
    refused("words has another tokenizer than --base .*collect and r1zero sft",
            teacher=str(tmp_path / "words"))
    save_base(tmp_path / "short", max_seq_len=32)
    refused("--teacher .*short has room for 32 tokens, .* may have 42; lower --max-new-tokens by 10",
            teacher=str(tmp_path / "short"), max_new_tokens=40)
    refused("--ref-refresh 3 would replace the teacher", ref_refresh=3)
    refused("--advantage.baseline teacher learns from the KL alone", loss=dict(kl_in="loss"))
    refused("--dynamic-sampling 3 with --advantage.baseline teacher: no reward counts", dynamic_sampling=3)
    refused("--control permute with --advantage.baseline teacher: no reward counts", control="permute")
    refused("there is no KL", advantage=dict(baseline="group"), loss=dict(kl_coef=0.0), kl_samples=0)


def test_a_larger_teacher_is_counted_in_the_plan_of_the_memory():
    small, large = tiny().config, tiny(n_layers=3, d_model=64).config
    own, taught = (predict(Setup(small, teacher=teacher, lora=LoRAConfig(rank=rank))).reference
                   for teacher, rank in ((None, 0), (large, 2)))
    assert taught == predict(Setup(large)).reference > own
