"""--dtype, --fp32-head, --device: they reach every model of a run; fp16 resumes to the same bits."""
import numpy as np
import pytest
import torch

from r1zero.model.config import preset
from r1zero.model.engine.pages import Pages
from r1zero.model.precision import Precision
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli.chat import ChatConfig
from r1zero.train.cli.eval import EvalConfig
from r1zero.train.compute_flags import ComputeFlags
from r1zero.train.fit import fit
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.log import read_metrics
from r1zero.train.machine import pick_device, use_onednn
from r1zero.train.pretrain import pretrain
from r1zero.train.run import Run
from r1zero.train.sft import SFTConfig

from .loop_cases import few_documents, grpo_config, pretrain_config, save_base, text_file
from .run_cases import assert_same, broken_at, fails, finite, forget, outcome


def test_an_apple_gpu_is_used_where_it_is_asked_for_and_never_by_itself():
    mac, gpu, bare = ("cpu", "mps"), ("cpu", "cuda"), ("cpu",)
    assert [pick_device("auto", here).type for here in (mac, gpu, bare)] == ["cpu", "cuda", "cpu"]
    assert pick_device("mps", mac).type == "mps" and pick_device("cpu", mac).type == "cpu"
    with fails(ValueError, "--device mps was given, but PyTorch sees no Apple GPU; use --device cpu"):
        pick_device("mps", gpu)
    with fails(ValueError, "--device cuda was given, but PyTorch sees no CUDA device; .*CUDA build"):
        pick_device("cuda", mac)


def test_an_unknown_dtype_is_refused_by_every_command_before_anything_is_written(tmp_path):
    run = str(tmp_path / "run")
    for make in (lambda: pretrain_config(run, "text", dtype="half"),
                 lambda: grpo_config(run, "base", dtype="fp8"),
                 lambda: SFTConfig(run=run, base="base", data="pairs", dtype="float32"),
                 lambda: EvalConfig(run=run, dtype="16"), lambda: ChatConfig(run=run, dtype="")):
        with fails(ValueError, "--dtype is '.*', expected auto, fp32, bf16, fp16"):
            make()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype,fp32_head", [("fp16", True), ("bf16", False)])
def test_policy_reference_critic_and_engine_compute_in_what_the_flags_say(tmp_path, dtype, fp32_head):
    seen = []

    def looking(learner, *rest):
        engine, critic = learner.sampler.engine, learner.credit.critic
        models = [learner.policy, learner.reference.model, critic.critic.trunk, engine.cache.weights]
        seen.extend(model.precision for model in models)
        seen.append(Precision(engine.cache.dtype, fp32_head))
        assert isinstance(engine.cache, Pages)  # the loops of a CPU's slots are for fp32 alone
        assert critic.scaler is learner.scaler and learner.scaler.enabled == (dtype == "fp16")
        return timed_step(learner, *rest)

    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), "ppo", steps=1, dtype=dtype,
                    fp32_head=fp32_head)
    assert grpo(c, step_of=looking).precision == seen[0]
    expected = torch.float16 if dtype == "fp16" else torch.bfloat16
    assert seen == 5 * [Precision(expected, fp32_head)]
    [row] = read_metrics(tmp_path / "run")
    assert ("loss_scale" in row) == (dtype == "fp16") and row["loss"] == row["loss"]


def test_onednn_computes_the_products_of_a_run_that_asks_for_it_and_of_no_other(tmp_path):
    def precision_in(name, **options):
        seen = []

        def looking(*step):
            seen.append(torch.get_float32_matmul_precision())
            return timed_step(*step)

        grpo(grpo_config(tmp_path / name, base, steps=1, **options), step_of=looking)
        [row] = read_metrics(tmp_path / name)
        assert row["logp_gap"] < 0.1
        return seen

    base = save_base(tmp_path / "base")
    # "medium" is PyTorch's word for it; a GPU's products are left alone
    assert precision_in("with", onednn=True) == ["medium"] and precision_in("without") == ["highest"]
    ComputeFlags(onednn=True).precision(torch.device("mps"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_by_onednn_are_those_of_mkl_but_for_rounding():
    a, b = torch.randn(100, 576), torch.randn(576, 200)
    exact = a.double() @ b.double()
    try:
        use_onednn(True)
        assert (a @ b - exact).abs().max() < 1  # with AMX, sums of 576 products rounded to bf16
    finally:
        use_onednn(False)
    assert (a @ b - exact).abs().max() < 1e-3


def test_pretraining_in_fp16_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "whole", data, dtype="fp16"))
    expected = outcome(tmp_path / "whole")
    assert expected["rows"][-1]["loss"] < expected["rows"][0]["loss"]
    part = pretrain_config(tmp_path / "part", data, dtype="fp16")
    broken_at(monkeypatch, 5, pretrain, part)
    pretrain(pretrain_config(tmp_path / "part", data, dtype="fp16", resume=True))
    assert_same(tmp_path / "part", expected)


def test_grpo_in_fp16_with_a_critic_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")

    def config(name, **changes):
        return grpo_config(tmp_path / name, base, "ppo", dtype="fp16", fp32_head=True, updates_per_step=2,
                           steps=4, **changes)

    grpo(config("whole"))
    broken_at(monkeypatch, 3, grpo, config("part"))
    grpo(config("part", resume=True))
    assert_same(tmp_path / "part", outcome(tmp_path / "whole"))
    assert all(row["loss_scale"] == 2.0**16 for row in read_metrics(tmp_path / "part"))


class Overflowing:
    """Batches for a model whose gradients are too large for fp16 at the first scale."""

    def batch(self, step: int):
        return few_documents().batch(0)


def overflowing_run(config) -> None:
    """Pretrain a model with huge weights."""
    tokenizer = Tokenizer.bytes()
    model = Transformer(preset("tiny", tokenizer.vocab_size), torch.float16).init_weights(0)
    with torch.no_grad():
        model.embed.mul_(1000)
    with (run := Run(config, "pretrain")):
        fit(run, model, tokenizer, Overflowing(), config)


def test_a_run_goes_on_over_skipped_updates_and_resumes_with_its_scale(tmp_path, monkeypatch):
    options = dict(data="none", dtype="fp16", save_every=2)
    overflowing_run(pretrain_config(tmp_path / "whole", **options))
    rows = read_metrics(tmp_path / "whole")
    skipped = [row["skipped_updates"] for row in rows]
    assert skipped[0] == 1 and 1 < skipped[-1] < 8
    assert [row["loss_scale"] for row in rows] == [2.0 ** (16 - n) for n in skipped]
    for row, new in zip(rows, np.diff([0, *skipped]), strict=True):
        assert (row["gradient_norm"] == 0) == bool(new)
    # As long as updates are skipped the weights stay, and with them the loss.
    assert len({row["loss"] for row in rows[: skipped[-1] + 1]}) == 1 and finite(tmp_path / "whole")
    broken_at(monkeypatch, 3, overflowing_run, pretrain_config(tmp_path / "part", **options))
    overflowing_run(pretrain_config(tmp_path / "part", resume=True, **options))
    assert_same(tmp_path / "part", outcome(tmp_path / "whole"))


def test_the_dtype_stays_the_same_on_resume_and_an_older_run_had_the_default(tmp_path):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=2))
    for changes, named in ((dict(dtype="bf16"), "--dtype is auto there and bf16 here"),
                           (dict(fp32_head=True), "--fp32-head is False there and True here"),
                           (dict(onednn=True), "--onednn is False there and True here")):
        with fails(ValueError, named):
            pretrain(pretrain_config(tmp_path / "run", data, steps=3, resume=True, **changes))
    forget(tmp_path / "run", "dtype", "fp32_head", "onednn")
    pretrain(pretrain_config(tmp_path / "run", data, steps=3, resume=True))
    assert len(read_metrics(tmp_path / "run")) == 3
