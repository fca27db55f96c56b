"""What goes wrong in a run: NaN, a full disk, foreign folders, bad data and flags. One line, nothing lost."""
import json
import resource

import pytest
import torch

from r1zero.eval.tasks.base import Grade
from r1zero.model.checkpoint import (
    CheckpointError,
    checkpoint_steps,
    load_model,
    save_checkpoint,
)
from r1zero.model.engine.sampling import NonFiniteError
from r1zero.model.optimizer import OptimConfig
from r1zero.rl.losses import LossConfig, policy_loss
from r1zero.rl.rewards import RewardConfig
from r1zero.train.grpo import GRPOConfig, grpo, timed_step
from r1zero.train.log import read_metrics
from r1zero.train.machine import pick_device
from r1zero.train.pretrain import PretrainConfig, pretrain
from r1zero.train.recipes.demo import DemoConfig
from r1zero.train.recipes.demo_corpus import CorpusConfig
from r1zero.train.run import Run, RunConfig
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import Bandit
from .loop_cases import QUICK, grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, finite, outcome, pretrain_on_text

NAN = float("nan")


# ---- NaN ----

def test_a_poisoned_weight_stops_pretraining_and_is_named(tmp_path):
    def poison(step, model):
        if step == 5:
            model.blocks[1].mlp.down.weight.data[3, 4] = NAN

    c = pretrain_config(tmp_path / "run", text_file(tmp_path))
    with fails(FloatingPointError, "loss is nan at step 6 .*weight blocks.1.mlp.down.weight.*"
                                   "checkpoint of step 3"):
        pretrain_on_text(c, spoil=poison)
    assert checkpoint_steps(c.run) == [3] and finite(c.run)
    assert [row["step"] for row in read_metrics(c.run)] == [1, 2, 3, 4, 5]


def test_a_gradient_that_is_not_finite_stops_pretraining_before_it_is_used(tmp_path):
    def overflow(step, model):
        if step == 1:
            model.norm.register_hook(lambda grad: grad * float("inf"))

    c = pretrain_config(tmp_path / "run", text_file(tmp_path), save_every=1)
    with fails(FloatingPointError, r"gradient_norm is (nan|inf) at step 2 .*gradient of norm\b.*step 1 is"):
        pretrain_on_text(c, spoil=overflow)
    assert checkpoint_steps(c.run) == [1] and finite(c.run)


def test_nan_logits_while_sampling_name_the_step(tmp_path):
    def poisoned(learner, task, config, step):
        metrics = timed_step(learner, task, config, step)
        if step == 2:  # after the third step's update
            learner.policy.norm.data[0] = NAN
        return metrics

    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"))
    with fails(NonFiniteError, "logits .*are NaN .*step 4.*checkpoint of step 2"):
        grpo(c, step_of=poisoned)
    assert checkpoint_steps(c.run) == [2] and finite(c.run)


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_a_nan_gradient_under_a_finite_loss_stops_grpo(tmp_path, updates_per_step):
    def sharp(logp, *rest):
        loss, metrics = policy_loss(logp, *rest)
        return loss + (0 * logp).sum().abs().sqrt(), metrics  # adds 0, with a gradient of inf * 0

    def sharp_step(learner, *rest):
        learner.policy_loss = sharp
        return timed_step(learner, *rest)

    base = save_base(tmp_path / "base")
    c = grpo_config(tmp_path / "run", base, updates_per_step=updates_per_step)
    with fails(FloatingPointError, "gradient_norm is nan at step 1 .*gradient of .*no checkpoint is kept"):
        grpo(c, step_of=sharp_step)
    assert checkpoint_steps(c.run) == [] and read_metrics(c.run) == []


class BrokenGrader(Bandit):
    def grade(self, problem, response):
        return Grade(NAN if problem == 1 else 0.0, None, "")


def test_a_nan_reward_is_named(tmp_path):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), task=BrokenGrader())
    with fails(ValueError, "the grader of bandit gave an accuracy of nan, .* for the problem '1' and the"):
        grpo(c)
    assert checkpoint_steps(c.run) == []


# ---- the disk ----

def test_a_full_disk_while_saving_loses_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class OnAFullDisk(Run):
        def save(self, step, *rest):
            if step + 1 > 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                super().save(step, *rest)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "whole", data))
    with fails(CheckpointError, "cannot save the checkpoint of step 6 .*checkpoint of step 3 is intact"):
        pretrain_on_text(pretrain_config(tmp_path / "run", data), OnAFullDisk)
    assert checkpoint_steps(tmp_path / "run") == [3]
    pretrain(pretrain_config(tmp_path / "run", data, resume=True))  # there is room again
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_base_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for base, reason in [("missing", "does not exist"), (".", "is not the folder of a run"),
                         ("notes.txt", "is a file")]:
        with fails(CheckpointError, reason):
            grpo(grpo_config(tmp_path / "run", tmp_path / base))
        assert not (tmp_path / "run").exists()
    save_checkpoint(tmp_path / "other", 1, {"weights": {"w": torch.zeros(2)}}, {})
    with fails(ValueError, "holds no model; give a folder that pretrain, sft, grpo or demo wrote"):
        load_model(str(tmp_path / "other"), torch.device("cpu"))


# ---- data ----

@pytest.mark.parametrize("content, match", [
    (b"", "is empty; fill it or leave it out"),
    (b" \n\n", "is empty"),
    (b"abc\0def" * 100, "is binary: byte 3 is 0"),
    (b"ab\xff\xfe" * 100, "is not UTF-8 at byte 2"),
    (b"too short", "give more text or a smaller --seq-len"),
    (b"ab", "give more text or a smaller s"),
    (None, "cannot be read"),
])
def test_bad_data_for_pretraining(tmp_path, content, match):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with fails(ValueError, match):
        pretrain(pretrain_config(tmp_path / "run", str(path)))
    assert not (tmp_path / "run").exists()  # so that the next try needs no --resume


@pytest.mark.parametrize("content, match", [
    ("", "is empty"),
    ("not json\n", "line 1: not JSON"),
    ('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "line 2: no text in a field `response`"),
    ('{"prompt": "a", "response": " "}\n', "line 1: `response` is empty"),
    (json.dumps({"prompt": "a" * 300, "response": "b"}), "max_seq_len 256 has room"),
])
def test_bad_data_for_sft(tmp_path, content, match):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    base = save_base(tmp_path / "base")
    with fails(ValueError, match):
        sft(SFTConfig(run=str(tmp_path / "run"), base=str(base), data=str(path), device="cpu"))
    assert not (tmp_path / "run").exists()


# ---- flags ----

PRETRAIN = dict(run="r", data=("d",), task=QUICK)
GRPO = dict(run="r", base="b")
SFT = dict(run="r", base="b", data="d")


@pytest.mark.parametrize("kind, common, bad", [
    (RunConfig, dict(run="r"), dict(steps=0, save_every=0, keep_last=-1)),
    (PretrainConfig, PRETRAIN, dict(steps=-1, seq_len=0, batch_tokens=0, micro_tokens=0, documents=0, seed=-1,
                                    tail_share=[0.0, 1.0, -0.1, NAN], model=["huge", "depth=0", "depth=x"],
                                    vocab_size=-5)),
    (SFTConfig, SFT, dict(steps=0, batch_tokens=0, micro_tokens=-1, seed=-1)),
    (GRPOConfig, GRPO, dict(keep_last=0, prompts_per_step=0, group_size=1, max_new_tokens=0, micro_tokens=0,
                            updates_per_step=0, kl_samples=-1, seed=-1, keep_rollouts=[-0.1, 1.1, NAN],
                            temperature=[0.0, -1.0, NAN, 1e-7, float("inf")])),
    (OptimConfig, {}, dict(lr=[0.0, -1.0, NAN], warmup=-1, schedule="linear", final_lr=[-0.1, 1.1, NAN],
                           weight_decay=[-1.0, NAN], beta1=[1.0, -0.1, NAN], beta2=[1.0, NAN],
                           eps=[-1.0, NAN], clip_grad=[0.0, NAN])),
    (LossConfig, {}, dict(mean="max", clip_low=[0.0, 1.1, NAN], clip_high=[0.0, NAN], kl_coef=[-0.1, NAN],
                          max_importance=[-1.0, NAN], min_importance=[-1.0, NAN, 0.5], importance="answer",
                          importance_mask=True)),
    (RewardConfig, {}, dict(accuracy_weight=[-1.0, NAN, float("inf")], format_weight=[-0.1, NAN])),
    (CorpusConfig, {}, dict(persistent_share=[-1, 2, NAN], broken_share=1.1, max_careless_attempts=[0, 13])),
    (DemoConfig, {}, dict(documents=0, pretrain_steps=0, rl_steps=0, eval_problems=0, eval_samples=0,
                          control_steps=-1, seeds=["", "0,0", "a", "-1", "1,"], model="x",
                          max_new_tokens=[0, 256], numbers=9, ops="%")),
])
def test_flags_out_of_range_are_refused_by_name(kind, common, bad):
    kind(**common)  # sound without them
    for name, values in bad.items():
        for value in values if isinstance(values, list) else [values]:
            with pytest.raises(ValueError) as error:
                kind(**{**common, name: value})
            message = str(error.value)
            word = {"accuracy_weight": "accuracy", "format_weight": "format"}.get(name, name)
            assert word in message or word.replace("_", "-") in message, (name, value, message)
            assert "\n" not in message
            assert any(w in message for w in ("expected", "must be", "known", "needs")), message
    if kind is RewardConfig:
        with fails(ValueError, "one above 0 for accuracy"):
            RewardConfig(accuracy_weight=0, format_weight=0)


def test_an_unknown_preset_or_device_is_told_at_once_and_names_what_is_known(tmp_path):
    with fails(ValueError, "unknown model preset 'gpt'; known are .*demo, .*depth=N"):
        PretrainConfig(run="r", data=("countdown",), model="gpt", task=QUICK)
    with fails(ValueError, "--device is 'tpu', expected auto, cpu, cuda, mps"):
        pick_device("tpu")
    with fails(ValueError, "ranks file none cannot be read"):
        pretrain(pretrain_config(tmp_path / "run", text_file(tmp_path), tokenizer="none"))


def test_products_in_16_bit_are_summed_in_fp32_from_the_choice_of_the_device_on():
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    pick_device("cpu")
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


def test_a_prompt_that_leaves_no_room_is_told_before_anything_is_sampled(tmp_path):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), max_new_tokens=255)
    with fails(ValueError, "--max-new-tokens is 255, .* room for 256 in all. Give at most 254"):
        grpo(c)
    assert not (tmp_path / "run").exists()
