"""Predicted memory beside measured memory, at toy sizes, and its stage of `make gpu` without a GPU."""
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import aot, memory_predicted, rehearse
from benchmarks.memory_predicted import ON_GPU, OPTIONS, Case
from r1zero.kernels.dispatch import HAS_TRITON, INTERPRETING

CPU = torch.device("cpu")


@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_takes_the_memory_that_is_predicted(lora, recompute):
    found = memory_predicted.measure(Case("demo", 8000, 1024, lora=lora, recompute=recompute), CPU)
    assert found["measured"] / 1.15 < found["predicted"] < 1.15 * found["measured"]


def test_a_vocabulary_that_is_smaller_than_a_slice_of_logits_takes_its_own_width():
    found = memory_predicted.measure(Case("tiny", 300, 2048), CPU)
    assert found["measured"] < found["predicted"] < 1.3 * found["measured"]


@pytest.mark.parametrize("name, share", [
    ("--optim.moments bf16", 1), ("no KL, so no reference", 1), ("a quarter of --micro-tokens", None),
])
def test_an_option_saves_what_is_predicted(name, share):
    """share: how many bytes of fp32 weights it saves; None: more."""
    plain = Case("tiny", 10_000, 512, seq_len=32, reference="device")
    tokens = plain.tokens if share else 128
    option = replace(OPTIONS[name], model="tiny", vocabulary=10_000, tokens=tokens, seq_len=32)
    before, after = (memory_predicted.measure(case, CPU) for case in (plain, option))
    saved = {kind: before[kind] - after[kind] for kind in ("predicted", "measured")}
    assert saved["predicted"] == pytest.approx(saved["measured"], rel=0.2)
    if share:
        assert saved["measured"] == pytest.approx(share * before["parts"]["weights"], rel=0.02)


def run(capsys, *words, measured) -> tuple[dict, str]:
    record = memory_predicted.main(memory_predicted.parsed([*words]), measured)
    return record, capsys.readouterr().out


def test_predictions_stand_beside_what_was_measured(capsys):
    half = {"measured": 2_000_000, "predicted": 1_000_000, "parts": {}}
    record, out = run(capsys, measured=lambda case: half)
    assert len(record["cases"]) == 16 and out.count("2  0.500\n") == 16
    record, out = run(capsys, "--options", measured=lambda case: half)
    assert len(record["cases"]) == len(OPTIONS) == out.count("0.500     0%\n")
    assert "--ref-offload saves nothing on a CPU" in out


def test_on_a_gpu_each_case_is_written_at_once_and_one_too_large_is_named(capsys, tmp_path):
    seen, out_file = [], tmp_path / "memory.json"

    def measured(case: Case) -> dict:
        seen.append(len(json.loads(out_file.read_text())["cases"]) if out_file.exists() else 0)
        if case.lora:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return {"measured": 2_000_000, "predicted": 1_000_000, "reserved": 3_000_000, "parts": {}}

    record, out = run(capsys, "--device", "cuda", "--out", str(out_file), measured=measured)
    assert seen == list(range(len(ON_GPU)))
    assert record["cases"][0]["reserved"] == 3_000_000 and out.count("does not fit") == 3
    assert json.loads(out_file.read_text()) == record


@pytest.mark.skipif(not HAS_TRITON or INTERPRETING, reason="needs Triton's compiler")
def test_the_kernels_of_a_gpus_cases_are_known_before_they_run():
    rehearsal = rehearse.Rehearsal(90)
    with aot.chip(90):
        rehearsal.note("memory", memory_predicted.launch_all)
    assert {rehearse.dtype_of(launch) for launch in rehearsal.kernels} == {"bf16", "fp32"}
    names = {launch[1] for launch in rehearsal.kernels}
    assert names >= {"attention_bwd_dq_kernel", "logprob_dlogits_bwd_kernel", "moe_weights_bwd_kernel"}
    assert set(rehearsal.kernels.values()) == {"memory"} and rehearsal.unrehearsed == {}
