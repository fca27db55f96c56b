"""The benchmarks run at toy size and report everything that they should, and their arithmetic is right.

No test depends on how long anything takes."""
import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    ablation,
    common,
    generation,
    linear_logprob,
    memory,
    moe,
    rejection,
    routing,
    training,
    vs_trl,
)
from r1zero.eval.response import Sample
from r1zero.kernels import reference
from r1zero.model.config import ModelConfig, preset
from r1zero.model.transformer import Transformer
from r1zero.train.batches import next_token_batch
from r1zero.train.machine import use_onednn

from ..train.loop_cases import save_base

TINY = ModelConfig(vocab_size=50, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64,
                   qkv_bias=True, max_seq_len=64)
SMALL_STEP = vs_trl.Flags(rounds=2, warmup=1, prompts=2, prompt_tokens=3, group_size=2, new_tokens=5,
                          trl_micro=2, model=TINY)
needs_trl = pytest.mark.skipif(bool(vs_trl.missing()), reason="TRL is not installed")


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- common ----

def test_spread_and_how_it_is_shown():
    found = common.spread([5, 1, 2, 3, 4, 6])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert common.show(found, " ms", 10, 1) == "35.0 (20.0 to 50.0) ms"


def test_table_aligns_its_columns(capsys):
    common.table(["", "long header"], [["a name", 1], ["b", "22"]])
    assert capsys.readouterr().out == "        long header\na name            1\nb                22\n\n"


def test_finish_prints_and_writes_one_line_with_versions(tmp_path, capsys):
    out = tmp_path / "result.json"
    record = common.finish("x", {"rate": 1.5}, str(out), peers=("torch", "no-such-package"))
    assert json.loads(out.read_text()) == record == last_line(capsys) and out.read_text().count("\n") == 1
    assert record["rate"] == 1.5 and {"benchmark", "date", "machine"} <= record.keys()
    versions = record["machine"]["versions"]
    assert versions["no-such-package"] == "missing"
    assert versions["torch"].startswith(torch.__version__.split("+")[0])


# ---- training ----

def test_training_at_toy_size(tmp_path, capsys):
    out = tmp_path / "training.json"
    record = training.main(training.Flags(rounds=2, batch_tokens=128, seq_len=32, documents=20, matrix=16,
                                          model="tiny", profiled_steps=1, out=str(out)))
    assert last_line(capsys) == record == json.loads(out.read_text())
    assert set(record["batches"]) == {"documents", "windows of 32"}
    for found in record["batches"].values():
        assert found["share_of_rate"]["median"] > 0 and 0 < found["tokens_per_step"] <= 128
        shares = found["breakdown"]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["matrix products"] > 0 and shares["optimizer"] > 0
    assert record["batches"]["windows of 32"]["tokens_per_step"] == 128


def test_flops_count_attention_by_the_squares_of_the_lengths():
    class Batches:
        def batch(self, index):
            return next_token_batch(np.arange(40) % 7, np.array([0, 10]), np.array([10, 20]))

    step = training.Steps(Batches(), 7, training.Flags(model="tiny", batch_tokens=64))
    step()
    c = preset("tiny", 7)
    weights = sum(p.numel() for p in step.model.parameters() if p.ndim == 2)  # the tied head counts once
    scores = 2 * 2 * c.n_layers * c.n_heads * c.head_dim * (10**2 + 20**2) / 2  # q k and p v, the causal half
    assert step.tokens == [30] and step.flops == [pytest.approx(3 * (2 * weights * 30 + scores))]


@pytest.mark.parametrize("operator, group", [
    ("aten::mm", "matrix products"), ("aten::addmm_", "matrix products"),
    ("aten::mul", "norms, RoPE, SwiGLU, loss"), ("aten::baddbmm_", "attention"), ("data", "data"),
    ("aten::_fused_adamw_", "optimizer"), ("Optimizer.step#AdamW.step", "optimizer"),
    ("aten::copy_", "copies and gathers"),
    ("SwiGLUBackward", "norms, RoPE, SwiGLU, loss"), ("RopeAttention", "attention"),
    ("MLPBackward", "matrix products"),
    ("autograd::engine::evaluate_function: SwiGLUBackward", "Python, autograd"),
])
def test_where_an_operator_counts(operator, group):
    assert training.group_of(operator) == group


def test_every_operator_of_ours_counts_as_work():
    """Under a new name it would count as Python's time."""
    kernels = Path(__file__).parents[2] / "kernels"
    source = "".join(path.read_text(encoding="utf-8") for path in kernels.rglob("*.py"))
    names = re.findall(r"^class (\w+)\(.*autograd\.Function\)", source, re.MULTILINE)
    assert "MLP" in names and "RMSNorm" in names
    assert [name for name in names if training.group_of(name) == "Python, autograd"] == []


# ---- against TRL ----

def test_the_same_answers_earn_the_same_on_both_sides():
    task, tokenizer = vs_trl.TokenIdTask(50, 3), vs_trl.TokenIdTokenizer(50)
    [problem] = task.problems("train", 1, start=4)
    assert problem == task.problem("train", 4) != task.problem("train", 5) and len(problem) == 3
    assert tokenizer.encode_batch([task.prompt(problem)]) == [list(problem)]
    text = tokenizer.decode([0, 10, 20])
    ours = vs_trl.mean_token_ids([Sample(problem, text)])
    assert ours == [vs_trl.mean_token_id(text)] == [10]


def test_a_missing_peer_is_named_and_ours_is_measured(tmp_path, capsys):
    out = tmp_path / "vs_trl.json"
    record = vs_trl.main(dataclasses.replace(SMALL_STEP, out=str(out)), find_missing=lambda: ["trl"])
    printed = capsys.readouterr().out
    assert "missing: trl" in printed
    assert json.loads(printed.splitlines()[-1]) == record == json.loads(out.read_text())
    assert record["missing"] == ["trl"] and set(record["sides"]) == {"ours"} and record["ratio"] == {}
    assert record["sides"]["ours"]["step_s"]["median"] > record["sides"]["ours"]["generation_s"]["median"] > 0


def test_answers_that_do_not_fill_trls_batches_are_told():
    with pytest.raises(ValueError, match="--trl-micro is 3, expected a divisor of the 4 answers"):
        vs_trl.main(dataclasses.replace(SMALL_STEP, trl_micro=3))


@needs_trl
def test_both_sides_take_turns_at_toy_size(capsys):
    record = vs_trl.main(SMALL_STEP)
    assert last_line(capsys) == record and record["missing"] == [] and set(record["sides"]) == {"ours", "trl"}
    assert set(record["ratio"]) == {"step", "generation", "rest"}
    assert record["machine"]["versions"]["trl"] == importlib.metadata.version("trl")


@needs_trl
def test_another_model_than_ours_is_noticed():
    class Sharper(Transformer):
        """The same weights, but another function of them."""

        def hidden_states(self, packed, routing=None):
            return 1.1 * super().hidden_states(packed, routing)

    assert vs_trl.qwen2_of(Transformer(TINY).init_weights(0)).config.hidden_size == 32
    with pytest.raises(RuntimeError, match="differ by .* in log-prob"):
        vs_trl.qwen2_of(Sharper(TINY).init_weights(0))


# ---- generation ----

def test_generation_at_toy_size(monkeypatch, capsys):
    monkeypatch.setattr(generation, "qwen2_shaped", lambda: TINY)
    monkeypatch.setattr(generation, "larger", lambda: TINY)
    monkeypatch.setattr(generation, "LONGEST", 24)
    record = generation.main(generation.Flags(rounds=1, warmup=0, prompts=4, group_size=2, new_tokens=4))
    assert last_line(capsys) == record and set(record["figures"]) == {"equal", "spread", "larger"}
    assert [record["figures"][name]["tokens"] for name in ("equal", "larger")] == [32, 4]
    spread = record["figures"]["spread"]
    assert 8 <= spread["tokens"] < 8 * 24 and spread["ours_over"]["static"]["median"] > 0


def test_generation_in_the_shape_of_smollm2_and_an_unknown_case(monkeypatch):
    case = generation.case_named("smollm2", generation.Flags())
    assert (case.n_prompts * case.group_size, case.prompt_tokens, case.new_tokens) == (32, 64, 32)
    assert case.config == preset("smollm2-135m", 49_152, qkv_bias=True, max_seq_len=512)
    monkeypatch.setattr(generation, "smollm2_shaped", lambda: TINY)
    flags = generation.parsed(
        ["--cases", "smollm2", "--prompts", "4", "--group-size", "4", "--prompt-tokens", "2",
         "--new-tokens", "8", "--rounds", "1", "--warmup", "0", "--onednn"])
    try:
        record = generation.main(flags)
    finally:
        use_onednn(False)
    assert record["flags"]["onednn"] and record["figures"]["smollm2"]["tokens"] == 2 * 4
    with pytest.raises(ValueError, match="--cases has 'smol', expected equal, spread, larger or smollm2"):
        generation.case_named("smol", flags)


# ---- memory ----

def test_memory_by_a_further_token(monkeypatch, capsys):
    monkeypatch.setattr(reference, "VOCAB_SLICE", 256)
    flags = memory.Flags(vocabularies=(1024, 4096), tokens=(512, 1024), seq_len=32, model="tiny")
    record = memory.main(flags, measured=memory.measure)
    assert last_line(capsys) == record
    slope = {(x["vocabulary"], x["head"]): x["bytes_per_further_token"] for x in record["cases"]}
    assert slope[1024, "sliced"] == pytest.approx(slope[4096, "sliced"], rel=0.05)
    assert slope[4096, "materialised"] - slope[1024, "materialised"] >= 4 * (4096 - 1024)
    weights = {x["vocabulary"]: x["many"]["weights"] for x in record["cases"]}
    assert weights[4096] - weights[1024] == (4096 - 1024) * 32 * 4
    for x in record["cases"]:
        assert x["many"]["moments"] == 2 * x["many"]["weights"]
        assert x["many"]["tensors_peak"] == x["bytes_at_no_tokens"] + 1024 * x["bytes_per_further_token"]


def test_a_fresh_process_measures_what_this_one_does(monkeypatch):
    case = {"model": "tiny", "vocabulary": 300, "head": "sliced", "seq_len": 16, "tokens": 64}
    here, there = memory.measure(case), memory.in_fresh_process(case)
    assert {**here, "process_peak": 0} == {**there, "process_peak": 0}
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measuring .*'vocabulary': 300.* failed"):
        memory.in_fresh_process(case)


def test_token_numbers_that_make_no_line_are_told():
    with pytest.raises(ValueError, match="--tokens is 128 64, expected two rising multiples of --seq-len 32"):
        memory.main(memory.Flags(tokens=(128, 64), seq_len=32))


# ---- linear_logprob ----

def test_linear_logprob_at_toy_size(tmp_path, capsys, monkeypatch):
    """Sliced logits take a fraction of the memory, and both sides compute the same."""
    monkeypatch.setattr(reference, "VOCAB_SLICE", 64)
    monkeypatch.setattr(linear_logprob, "reuse_memory", lambda: None)  # it would act on all tests
    picture = tmp_path / "memory.png"
    flags = linear_logprob.Flags(tokens=(64, 128), d_model=8, vocabulary=4096, rounds=1,
                                 picture=str(picture))
    record = linear_logprob.main(flags)
    assert last_line(capsys) == record and picture.stat().st_size > 10_000
    logits = 4 * 128 * 4096
    assert logits / 32 < record["bytes"]["sliced"][1] < logits / 8
    assert logits < record["bytes"]["materialised"][1] < 4 * logits
    h, w, targets = linear_logprob.inputs(64, flags)
    torch.testing.assert_close(*(side(h, w, targets) for side in linear_logprob.SIDES.values()))


def test_a_mixture_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moe, "reuse_memory", lambda: None)  # it would act on all tests
    record = moe.main(["--seconds", "0.01", "--cases", "decoding", "--out", str(tmp_path / "moe.json")])
    assert last_line(capsys) == record and len(record["cases"]) == 2
    for modes in record["cases"].values():
        assert set(modes) == {"forward", "full"}
        for sides in modes.values():
            assert set(sides) == {"grouped", "loop", "ratio"}
            assert all(0 < x["p20"] <= x["median"] <= x["p80"] for x in sides.values())


def test_the_ablation_at_toy_size(tmp_path, capsys, monkeypatch):
    flags = ablation.Flags(base=str(save_base(tmp_path / "base")), work=str(tmp_path / "runs"), seeds=1,
                           budget=100, presets=("rloo@1", "control"), problems=2,
                           out=str(tmp_path / "found.json"))
    ablation.main(flags)
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(run["preset"], run["seed"], len(run["rows"])) for run in found["runs"]] == \
        [("base", 0, 0), ("rloo@1", 0, 1), ("control", 0, 1)]
    assert all(set(run["pass_at"]) == {"1", "2", "4", "8", "16"} for run in found["runs"])
    assert "rloo@1" in text and (tmp_path / "found.png").stat().st_size > 20_000
    monkeypatch.setattr(ablation, "one_run", None)  # nothing is done twice
    ablation.main(flags)
    ablation.main(dataclasses.replace(flags, table_of=flags.out))
    with pytest.raises(ValueError, match="made with other settings"):
        ablation.main(dataclasses.replace(flags, budget=200))
    with pytest.raises(ValueError, match="made with other settings"):  # another base is another experiment
        ablation.main(dataclasses.replace(flags, base=str(save_base(tmp_path / "other", seed=1))))


def test_rejection_at_toy_size(tmp_path, capsys, monkeypatch):
    arms = {"all": dict(keep=("all",)), "all, 1 per problem": dict(keep=("all",), per_problem=1)}
    monkeypatch.setattr(rejection, "ARMS", arms)  # random weights have no right answer to keep
    base, other = str(save_base(tmp_path / "base")), str(save_base(tmp_path / "other", seed=1))
    flags = rejection.Flags(base=base, teacher=other, work=str(tmp_path / "work"), seeds=1, problems=4,
                            samples=2, sample_tokens=9, pairs=3, steps=1, eval_problems=2, max_new_tokens=8,
                            out=str(tmp_path / "found.json"))
    found = rejection.main(flags)
    assert last_line(capsys) == found == json.loads((tmp_path / "found.json").read_text())
    assert {name: [run["problems"] for run in runs] for name, runs in found["runs"].items()} == {
        "base: all": [2], "base: all, 1 per problem": [3],
        "teacher: all": [2], "teacher: all, 1 per problem": [3]}
    monkeypatch.setattr(rejection, "run_arm", None)  # nothing is done twice
    assert rejection.main(flags)["runs"] == found["runs"]
    with pytest.raises(ValueError, match="made with pairs 3, not 4"):
        rejection.main(dataclasses.replace(flags, pairs=4))


# ---- routing ----

def test_routing_at_toy_size(tmp_path, capsys, monkeypatch):
    smaller = {"SIZES": {"dense": None, "E=8 K=2": (8, 2)}, "NEW_TOKENS": 3, "HELD_OUT": 2, "ANSWERS": 2}
    for name, value in smaller.items():
        monkeypatch.setattr(routing, name, value)
    base = save_base(tmp_path / "base", moe=dict(n_experts=8, experts_per_token=2, d_expert=16))
    flags = routing.Flags(base=str(base), sequences=8, tokens=4, curve_steps=1, seeds=(3,), problems=1,
                          work=str(tmp_path / "work"), out=str(tmp_path / "found.json"))
    record = routing.main(flags)
    assert last_line(capsys) == record == json.loads((tmp_path / "found.json").read_text())
    assert set(record["gaps"]) == {"dense", "E=8 K=2", "trained"}
    assert set(record["gaps"].pop("dense")["bf16, fp32"]) == {"free"}
    for pairs in record["gaps"].values():
        same, mixed = pairs["fp32, fp32"], pairs["bf16, fp32"]
        assert same["free"]["max"] < 1e-3 < mixed["replayed"]["max"] and same["replayed"]["routers"] < 0.05
        assert all(0 <= found["routers"] <= found["flipped_tokens"] <= 1 for found in mixed.values())
    curves = record["curves"]["curves"]
    assert [(curve["seed"], curve["replays"], len(curve["rows"])) for curve in curves] == \
        [(3, True, 1), (3, False, 1)]
    assert ["flipped_routers" in curve["rows"][0] for curve in curves] == [True, False]
    assert (tmp_path / "found.png").stat().st_size > 10_000
    monkeypatch.setattr(routing, "one_curve", None)  # nothing is done twice
    assert routing.measure_curves(flags)["curves"] == curves
    with pytest.raises(ValueError, match="made with other settings"):
        routing.measure_curves(dataclasses.replace(flags, curve_steps=2))
    with pytest.raises(ValueError, match="is a dense model; expected a mixture"):
        routing.mixture_in(str(save_base(tmp_path / "dense")))
    with pytest.raises(ValueError, match="there is no --base to train"):
        routing.main(dataclasses.replace(flags, base=None))


def test_students_interval_by_hand():
    mean, half = ablation.mean_and_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.30 * 0.1 / 3 ** 0.5)
    assert np.isnan(ablation.mean_and_interval([0.5])[1])
