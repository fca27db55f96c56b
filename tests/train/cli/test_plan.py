"""`r1zero plan`: what fits a card, what would make it fit, and what a run took."""
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1zero.model.checkpoint import load_model
from r1zero.model.config import preset
from r1zero.model.lora import LoRAConfig
from r1zero.model.memory import Setup, predict, usable
from r1zero.model.moe_config import MoEConfig
from r1zero.model.optimizer import optimizer_tensors
from r1zero.model.transformer import count_parameters
from r1zero.rl.step import grpo_step
from r1zero.train.checks import BatchTooLargeError
from r1zero.train.cli.errors import explain
from r1zero.train.cli.main import main
from r1zero.train.grpo import grpo, make_learner, timed_step
from r1zero.train.interrupt import Stopped
from r1zero.train.memory_check import predicted_for, try_longest_batch
from r1zero.train.planning import CARDS, SHAPES, Work, choose, seconds_per_step, smallest
from r1zero.train.planning import GIB as G

from ..loop_cases import grpo_config, save_base
from ..run_cases import broken_at, fails

BIG = Setup(preset("qwen2.5-1.5b", 151_936), rows=256, longest=1280)


def printed(capsys, *words) -> tuple[int, str, str]:
    code = main(["plan", *words])
    out, error = capsys.readouterr()
    return code, out, error


# ---- what is chosen ----

def test_each_choice_fits_its_card_and_larger_cards_are_never_worse():
    memories = (8, 12, 16, 24, 48, 80, 141)
    choices = [choose(BIG, memory * G) for memory in memories]
    for memory, choice in zip(memories, choices, strict=True):
        assert predict(choice.setup, usable(memory * G)).peak <= usable(memory * G)
    trains_all = [choice.setup.lora.rank == 0 for choice in choices]
    assert trains_all == sorted(trains_all) and not trains_all[0] and trains_all[-1]
    assert choices[-1].rows == 256 and choices[-1].setup.micro_tokens == 16_384


def test_what_is_asked_for_stays():
    choice = choose(Setup(BIG.model, lora=LoRAConfig(64), reference="none", longest=1280), 141 * G)
    assert choice.setup.lora.rank == 64 and choice.setup.reference == "none"


def test_the_flags_of_a_choice_are_those_of_grpo(tmp_path):
    from r1zero.train.cli.flags import parse_flags
    from r1zero.train.grpo import GRPOConfig
    for memory in (8, 24, 44, 80):
        choice = choose(BIG, memory * G)
        config = parse_flags("grpo", GRPOConfig, ["--run", "r", "--base", "b", *choice.flags.split()])
        assert config.micro_tokens == choice.setup.micro_tokens
        assert config.lora.rank == choice.setup.lora.rank and config.recompute == choice.setup.recompute
        assert config.optim.moments == choice.setup.moments
        assert config.ref_offload == (choice.setup.reference == "cpu")


def test_nothing_fits_below_the_smallest_card():
    _, needed = smallest(BIG)
    assert choose(BIG, 1.001 * needed) is not None and choose(BIG, 0.97 * needed) is None


# ---- how long ----

def test_the_time_of_a_step_follows_from_bytes_and_flops():
    """By hand, for 2 N FLOPs per token and pass, plus attention; and all weights read per new token."""
    choice, work, card = choose(BIG, 80 * G), Work(256, 256, 1024), CARDS["a100"]
    sampling, update = seconds_per_step(choice, work, card)
    n = 1_543_714_304
    products = 4 * 2 * n * 256 * 1280 / (0.35 * 312e12)  # forward, backward twice, the reference
    assert products < update < 1.3 * products
    cache = 256 * (256 + 512) * 28_672
    assert sampling == pytest.approx(1024 * (2 * n + cache) / (0.5 * 2.04e12), rel=0.01)


# ---- what is printed ----

def test_a_table_for_all_cards_and_a_plan_for_one(capsys):
    code, out, _ = printed(capsys, "--model", "qwen2.5-1.5b")
    assert code == 0 and out.count("| ") > 20 and "| 8 GiB | LoRA 16, recompute |" in out
    assert "predicted" in out.splitlines()[0]
    words = ["--model", "qwen2.5-1.5b", "--gpu", "a100", "--price", "2", "--steps", "100"]
    code, out, _ = printed(capsys, *words)
    assert code == 0 and "engine's copy" in out and "100 steps: about" in out and "at 2 per hour" in out


def test_models_that_judge_are_planned_for(capsys):
    sizes = {}
    for n in "012":
        out = printed(capsys, "--model", "qwen2.5-0.5b", "--memory", "141", "--judges", n)[1]
        sizes[n] = float((re.search(r"models that judge +(\S+)", out) or [0, "0"])[1])
    assert sizes["0"] == 0 and sizes["1"] == pytest.approx(494_032_768 * 2 / G, abs=0.05)
    assert sizes["2"] == pytest.approx(2 * sizes["1"], abs=0.1)


@pytest.mark.parametrize("words, told", [
    (["--model", "demo", "--judges", "-1"], "--judges is -1, expected 0 or more"),
    (["--model", "qwen2.5-1.5b", "--memory", "4"], "does not fit 4 GiB at any setting; the least is LoRA 16, "
                                                    "recompute, which needs a card of 7.7 GiB, 3.7 more"),
    (["--model", "qwen2.5-1.5b", "--memory", "0"], "it does not fit 0 GiB at any setting; the least is"),
    (["--model", "qwen2.5-1.5b", "--memory", "-3"], "--memory is -3.0, expected 0 or more"),
    (["--model", "qwen2.5-1.5b", "--price", "2"], "--price needs --gpu"),
    (["--run", "nowhere"], "--run nowhere does not exist"),
    (["--run", "nowhere", "--memory", "8"], "leave out --memory and --gpu"),
    (["--model", "qwen9"], "unknown model preset 'qwen9'"),
    (["--model", "qwen9"], "depth=N; of the recipes' models smollm2-360m, "),
    (["--model", "demo", "--lora.rank", "-1"], "--lora.rank is -1, expected 1 or more, or 0 for no LoRA"),
    (["--max-new-tokens", "5000"], "are 5256 tokens, and OLMo-2-1B has room for 4096; give fewer"),
    (["--gpu", "tpu", "--model", "demo"], "--gpu is 'tpu', expected one of rtx-3060"),
    (["--memory", "8"], "need a model; give --base DIR or --model NAME"),
    (["--base", "a", "--model", "demo"], "--base and --model were given; give one"),
    (["--model", "demo", "--memory", "8"], "1280 tokens, and the model has room for 256"),
    (["--base", "."], "is not the folder of a run"),
])
def test_what_cannot_be_planned_is_told_in_one_line(capsys, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    code, out, error = printed(capsys, *words)
    assert code == 2 and told in error and len(error.splitlines()) == 1 and not out


def test_a_card_of_the_size_that_is_told_fits(capsys):
    for model in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"):
        error = printed(capsys, "--model", model, "--memory", "1")[2]
        told = re.search(r"needs a card of (\S+) GiB", error)[1]
        code, out, _ = printed(capsys, "--model", model, "--memory", told, "--lora.rank", "16")
        assert code == 0 and f"{told} GiB: LoRA 16, recompute" in out


def test_a_cards_memory_leaves_room_beside_what_pytorch_finds_there():
    """The capacities are those in PyTorch's messages; error correction takes a part of some."""
    found = {"l4": 22.05, "a10g": 22.05, "a40": 44.4, "l40s": 44.4, "rtx-4090": 23.6,
             "a100": 79.1, "h200": 139.7}
    for name, capacity in found.items():
        assert 0.85 * capacity < usable(CARDS[name].memory * G) / G < capacity - 0.4


def test_the_table_of_the_recipes_models_is_that_of_the_readme(capsys):
    """Their sizes are the published ones."""
    assert {name: count_parameters(shape) for name, shape in SHAPES.items()} == {
        "SmolLM2-360M": 361_821_120, "Qwen2.5-0.5B": 494_032_768, "Qwen3-0.6B": 596_049_920,
        "OLMo-2-1B": 1_484_916_736, "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688}
    code, out, _ = printed(capsys)
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert code == 0 and out in readme and len(out.splitlines()) == 2 + len(SHAPES)


# ---- a run beside its prediction ----

def test_a_run_keeps_what_was_predicted_and_what_it_took(tmp_path, capsys, monkeypatch):
    base = save_base(tmp_path / "base")
    config = grpo_config(tmp_path / "run", base)
    broken_at(monkeypatch, 2, grpo, config)
    code, out, _ = printed(capsys, "--run", str(tmp_path / "run"))
    assert code == 0 and "not yet, the run has not ended" in out
    grpo(grpo_config(tmp_path / "run", base, resume=True))
    told = capsys.readouterr().err
    assert "GB of tensors were predicted; the peak of the process" in told
    memory = json.loads((tmp_path / "run/run.json").read_text())["memory"]
    assert memory["predicted"]["weights"] == 4 * 26_848 and memory["measured"] > memory["predicted"]["peak"]
    code, out, _ = printed(capsys, "--run", str(tmp_path / "run"))
    assert code == 0 and "gradients" in out and "engine's copy" not in out
    assert memory["device"] == "cpu" and "measured peak of the process" in out  # whatever GPU there is
    record = {"machine": {"gpu": None}, "memory": memory | {"device": "cuda"}}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert "measured peak of PyTorch's tensors" in printed(capsys, "--run", str(tmp_path / "run"))[1]
    assert "measured peak of the process, with Python and its libraries: " in out
    (tmp_path / "run/run.json").write_text("{}")
    code, _, error = printed(capsys, "--run", str(tmp_path / "run"))
    assert code == 2 and "keeps no plan" in error


def test_a_run_that_is_stopped_keeps_its_peak(tmp_path):
    def step_of(*words):
        signal.raise_signal(signal.SIGINT)
        return timed_step(*words)

    config = grpo_config(tmp_path / "run", save_base(tmp_path / "base"))
    with pytest.raises(Stopped):
        grpo(config, step_of)
    memory = json.loads((tmp_path / "run/run.json").read_text())["memory"]
    assert memory["measured"] > memory["predicted"]["peak"]


# ---- the largest batch first ----

def learner_on(tmp_path, shape: dict, **changes):
    config = grpo_config(tmp_path / "run", save_base(tmp_path / "base", **shape), **changes)
    return make_learner(config, config.task.make(), load_model(config.base, torch.device("cpu"))), config


def try_longest(learner, config, longest: int):
    try_longest_batch(learner, config, longest, predicted_for(config, learner, longest))


def test_the_longest_batch_is_as_long_as_a_micro_batch_or_the_longest_answer(tmp_path):
    learner, config = learner_on(tmp_path, {}, micro_tokens=100)
    seen = []
    learner.policy.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try_longest(learner, config, 30)
    try_longest(learner, config, 150)
    assert seen == [100, 100, 150, 150]  # twice each: the second meets the gradients of the first


def test_a_step_of_few_answers_is_not_predicted_a_micro_batch_that_never_comes(tmp_path):
    learner, config = learner_on(tmp_path, {}, micro_tokens=10**6, prompts_per_step=2, group_size=3)
    seen = []
    learner.policy.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try_longest(learner, config, 30)
    assert seen == [2 * 3 * 30] * 2
    few, many = (predicted_for(replace(config, micro_tokens=n), learner, 30) for n in (180, 10**6))
    assert few == many and predicted_for(replace(config, micro_tokens=90), learner, 30).update < many.update


MIXTURE = dict(moe=MoEConfig(n_experts=4, experts_per_token=2, d_expert=8, balance_bias=True))


@pytest.mark.parametrize("shape, changes", [
    ({}, {}), (MIXTURE, {}), ({}, dict(algo="ppo")), ({}, dict(lora=LoRAConfig(2))),
])
def test_a_run_has_the_same_bits_with_and_without_the_longest_batch(tmp_path, shape, changes):
    """Weights, routers' balance, moments, metrics and random numbers, after steps with it and without."""
    outcomes = []
    for tries in (True, False):
        learner, config = learner_on(tmp_path, shape, **changes)
        state, rows = torch.get_rng_state(), []
        for step in range(2):  # without moments, and with them
            if tries:
                try_longest(learner, config, 30)
            assert all(p.grad is None for p in learner.policy.parameters())
            rows.append(grpo_step(learner, config.task.make(), config, step))
        assert torch.get_rng_state().equal(state)
        moments, _ = optimizer_tensors(learner.optimizer, learner.policy.named_parameters())
        outcomes.append((rows, dict(learner.policy.state_dict()) | moments))
    (rows, tensors), (expected_rows, expected) = outcomes
    assert rows == expected_rows and tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("part, fill", [
    ("the activations", lambda policy: policy.blocks[1].register_forward_pre_hook(full)),
    ("the log-probs", lambda policy: setattr(policy, "logprobs", full)),
    ("the backward pass", lambda policy: policy.embed.register_hook(full)),
])
def test_a_batch_that_does_not_fit_names_the_part_and_what_would_help(tmp_path, part, fill):
    learner, config = learner_on(tmp_path, {})
    fill(learner.policy)
    told = f"ended at {part}.*Predicted were weights 0.0 GB, .*--recompute"
    with fails(BatchTooLargeError, told) as failure:
        try_longest(learner, config, 30)
    code, message = explain(failure.value, config)
    assert code == 1 and message.startswith("out of memory: a micro-batch of 40 tokens does not fit")
    assert message.endswith("--lora.rank; `r1zero plan` says what each would save")
    assert all(p.grad is None for p in learner.policy.parameters())


def test_a_run_with_adapters_is_told_no_flag_that_it_refuses(tmp_path):
    learner, config = learner_on(tmp_path, {}, lora=LoRAConfig(2))
    learner.policy.blocks[1].register_forward_pre_hook(full)
    with fails(BatchTooLargeError, "a smaller --micro-tokens, --recompute or a smaller --lora.rank;"):
        try_longest(learner, config, 30)
