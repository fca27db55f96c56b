"""Runs with --lora.rank: what is trained, what is kept, and that a resumed run goes on bit for bit."""
import gc
import json
import shutil

import numpy as np
import pytest
import torch

from r1zero.model.checkpoint import (
    CheckpointError,
    checkpoint_steps,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.lora import LoRAConfig, adapters_of, add_adapters
from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.rollouts import micro_batches
from r1zero.rl.update import AdapterReference, Reference, logprobs_of
from r1zero.train import grpo as grpo_module
from r1zero.train.cli.export import ExportConfig, export
from r1zero.train.cli.flags import parse_flags
from r1zero.train.grpo import GRPOConfig, grpo, make_learner
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import tiny
from .loop_cases import grpo_config, save_base
from .run_cases import assert_same, broken_at, fails, outcome

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=2)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "base")


def weights_of(folder):
    return load_model(str(folder), CPU)[0].state_dict()


@pytest.mark.parametrize("algo, options", [("plain", {}), ("r1_zero", dict(ref_refresh=2)), ("ppo", {}),
                                           ("plain", dict(dtype="bf16"))])
def test_a_resumed_run_goes_on_bit_for_bit_from_its_adapters(base, tmp_path, monkeypatch, algo, options):
    def config(run, **more):
        return grpo_config(tmp_path / run, base, algo, lora=LORA, **options, **more)

    grpo(config("whole"))
    expected = outcome(tmp_path / "whole")
    broken_at(monkeypatch, 3, grpo, config("halves"))
    grpo(config("halves", resume=True))
    assert_same(tmp_path / "halves", expected)
    tensors = load_checkpoint(tmp_path / "whole").tensors
    for group in set(tensors) - {"optimizer", "critic_optimizer"}:
        names = set(tensors[group]) - {"value"}
        assert names and all(name.endswith(("lora_A", "lora_B")) for name in names), group


def test_the_trained_model_is_the_base_with_the_adapters_added(base, tmp_path):
    model = grpo(grpo_config(tmp_path / "run", base, lora=LORA))
    before, after = weights_of(base), weights_of(tmp_path / "run")
    assert before.keys() == after.keys() and not adapters_of(load_model(str(tmp_path / "run"), CPU)[0])
    adapted = adapters_of(model)
    for name, weight in before.items():
        module = adapted.get(name.removesuffix(".weight"))
        expected = weight if module is None else module.merged_weight()
        assert after[name].equal(expected)
        assert (module is None) == after[name].equal(weight), name
    assert not (tmp_path / "run/start").exists()  # that is the base


def test_the_reference_of_an_adapted_policy_is_its_base(base, tmp_path):
    """Against a second model, as a policy without adapters has it, with the KL in the loss."""
    config = grpo_config(tmp_path / "run", base, "r1_zero", lora=LORA)
    loaded = load_model(str(base), CPU)
    policy = add_adapters(loaded[0], LORA, seed=0)
    learner = make_learner(config, config.task.make(), loaded)
    assert type(learner.reference) is AdapterReference
    with torch.no_grad():
        for module in adapters_of(policy).values():
            module.lora_B.normal_()
    rollouts = learner.sampler.sample(config.task, config, 0)
    batches = micro_batches(rollouts, np.arange(len(rollouts.texts)), 64, CPU)
    second = Reference(load_model(str(base), CPU)[0], CPU).logprobs(batches, 1.0)
    trained = logprobs_of(policy, batches, 1.0)
    ours = learner.reference.logprobs(batches, 1.0)
    for ref, expected, now in zip(ours, second, trained, strict=True):
        assert (ref - expected).abs().max() < 1e-6 and (ref - now).abs().max() > 1e-3
    assert all(a.equal(b) for a, b in zip(trained, logprobs_of(policy, batches, 1.0), strict=True))
    learner.reference.refresh(policy)
    refreshed = learner.reference.logprobs(batches, 1.0)
    assert all(a.equal(b) for a, b in zip(trained, refreshed, strict=True))


def test_fine_tuning_with_adapters_fits_its_data(base, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}:", "response": "yes"}) + "\n" for i in range(8)))
    common = dict(base=str(base), data=str(data), steps=30, device="cpu")
    sft(SFTConfig(run=str(tmp_path / "run"), lora=LoRAConfig(4), **common))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert set(load_checkpoint(tmp_path / "run").tensors["model"]) == {
        f"blocks.{i}.{name}.lora_{letter}" for i in (0, 1) for letter in "AB"
        for name in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")}


def test_a_run_with_adapters_is_a_base_and_its_adapters_are_exported(base, tmp_path):
    grpo(grpo_config(tmp_path / "first", base, lora=LORA, steps=2))
    grpo(grpo_config(tmp_path / "second", tmp_path / "first", lora=LORA, steps=2))
    export(ExportConfig(run=str(tmp_path / "first"), out=str(tmp_path / "out"), adapters=True))
    content = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"]) == (2, 32.0)
    assert weights_of(tmp_path / "out").keys() == weights_of(tmp_path / "first").keys()
    for name, weight in weights_of(tmp_path / "first").items():
        assert (weights_of(tmp_path / "out")[name] - weight).abs().max() < 1e-6
    with fails(ValueError, "--adapters: .* holds a whole model"):
        export(ExportConfig(run=str(base), out=str(tmp_path / "no"), adapters=True))
    with fails(ValueError, "adapters are written in fp32"):
        ExportConfig(run=str(base), out="x", adapters=True, dtype="bf16")


def test_exported_adapters_know_their_base_by_its_weights(base, tmp_path):
    """As it is, and written as an open model; another one of the same shape is refused by name."""
    grpo(grpo_config(tmp_path / "one", base, lora=LORA, steps=1))
    grpo(grpo_config(tmp_path / "two", tmp_path / "one", lora=LORA, steps=1))  # its base is a sum
    folder, name = tmp_path / "out", str(tmp_path / "one")
    export(ExportConfig(run=str(tmp_path / "two"), out=str(folder), adapters=True))
    path = folder / "adapter_config.json"

    def of(base):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
        return weights_of(folder)

    before = of(base.parent / "one/checkpoints/step_00000001")
    export(ExportConfig(run=name, out=str(tmp_path / "open")))
    after = of(tmp_path / "open")
    assert all((weight - before[key]).abs().max() < 1e-6 for key, weight in after.items())
    with fails(CheckpointError, "out holds adapters of .*/one/checkpoints/step_00000001, and .*base has "
                                "other weights; put the path of that base into .*, or remove .*_base.json"):
        of(base)
    (folder / "r1zero_base.json").write_text("{}")
    with fails(ValueError, "r1zero_base.json is damaged; .*, or remove it"):
        of(base)
    (folder / "r1zero_base.json").unlink()
    of(base)  # as with adapters of others


def test_a_base_that_is_gone_or_another_is_told_in_one_line(base, tmp_path):
    grpo(grpo_config(tmp_path / "run", base, lora=LORA, steps=2))
    moved = base.rename(tmp_path / "elsewhere")
    load_model(str(tmp_path / "run"), CPU)  # the run keeps a link to a base that is a checkpoint
    shutil.rmtree(tmp_path / "run/base")
    with fails(ValueError, "holds adapters alone, and their base cannot be loaded: .* does not exist"):
        load_model(str(tmp_path / "run"), CPU)
    save_base(base, seed=1)
    with fails(ValueError, "holds adapters of other weights than .* has now"):
        load_model(str(tmp_path / "run"), CPU)
    shutil.rmtree(base)
    moved.rename(base)
    load_model(str(tmp_path / "run"), CPU)


def test_adapters_of_another_shape_are_refused(base, tmp_path):
    grpo(grpo_config(tmp_path / "run", base, lora=LORA, steps=2))
    with fails(ValueError, "lora.rank is 2 there and 3 here"):
        grpo(grpo_config(tmp_path / "run", base, lora=LoRAConfig(3), steps=4, resume=True))
    named = LoRAConfig(2, layers="mlp", rslora=True)
    grpo(grpo_config(tmp_path / "named", base, lora=named, steps=1))
    with fails(CheckpointError, "add the flags of its start: --lora.rank 2 --lora.layers mlp --lora.rslora$"):
        grpo(grpo_config(tmp_path / "named", base, steps=4, resume=True))
    grpo(grpo_config(tmp_path / "all", base, steps=1))
    with fails(CheckpointError, f"trains all weights; leave out --lora.rank, or .*--base {tmp_path / 'all'}"):
        grpo(grpo_config(tmp_path / "all", base, lora=LORA, steps=4, resume=True))
    checkpoint = load_checkpoint(tmp_path / "run")
    first = sorted(checkpoint.tensors["model"])[0]
    checkpoint.tensors["model"].pop(first)
    save_checkpoint(tmp_path / "run", 3, checkpoint.tensors, checkpoint.state)
    with fails(ValueError, f"{first} is missing"):
        load_model(str(tmp_path / "run"), CPU)


@pytest.mark.parametrize("command, kind, words", [
    ("grpo", GRPOConfig, ["--run", "r", "--base", "b"]),
    ("sft", SFTConfig, ["--run", "r", "--base", "b", "--data", "d"]),
])
def test_the_default_learning_rate_is_ten_times_that_of_full_fine_tuning(command, kind, words):
    full = parse_flags(command, kind, words)
    for flags in (["--lora.rank", "8"], ["--lora.rank=8"]):
        assert parse_flags(command, kind, words + flags).optim.lr == pytest.approx(10 * full.optim.lr)
    assert parse_flags(command, kind, [*words, "--lora.rank", "0"]).optim.lr == full.optim.lr
    named = parse_flags(command, kind, [*words, "--lora.rank", "8", "--optim.lr", "0.5"])
    assert named.optim.lr == 0.5 and named.lora == LoRAConfig(8)


def test_a_reference_that_is_the_policys_own_weights_is_not_offloaded(tmp_path):
    with fails(ValueError, "--ref-offload with --lora.rank: .*; leave --ref-offload out"):
        grpo_config(tmp_path / "run", "none", lora=LORA, ref_offload=True)


def test_the_memory_of_the_optimizer_is_that_of_the_adapters(base, tmp_path):
    """What the engine leaves room for, and what AdamW keeps."""
    grpo(grpo_config(tmp_path / "run", base, lora=LORA, steps=1))
    assert checkpoint_steps(tmp_path / "run") == [1]
    n_adapters = sum(module.lora_A.numel() + module.lora_B.numel()
                     for module in adapters_of(add_adapters(tiny(), LORA, 0)).values())
    moments = load_checkpoint(tmp_path / "run").tensors["optimizer"].values()
    assert sum(tensor.numel() for tensor in moments if tensor.dim()) == 2 * n_adapters


@pytest.mark.parametrize("lora", [LoRAConfig(), LORA])
def test_without_a_kl_there_is_no_reference_and_the_run_is_the_same(base, tmp_path, monkeypatch, lora):
    """The plain algorithm has no KL in its loss; here the log does not measure it either."""
    def config(run, **more):
        return grpo_config(tmp_path / run, base, lora=lora, ref_refresh=2, **more)

    grpo(config("with"))
    broken_at(monkeypatch, 3, grpo, config("without", kl_samples=0))
    grpo(config("without", kl_samples=0, resume=True))
    assert not (tmp_path / "without/start").exists()
    both = [load_checkpoint(tmp_path / name).tensors for name in ("with", "without")]
    assert "reference" in both[0] and "reference" not in both[1]
    assert all(tensor.equal(both[1]["model"][name]) for name, tensor in both[0]["model"].items())


def test_adapters_outlive_the_pruning_of_their_base_and_may_be_stacked(base, tmp_path):
    """A run on a run with adapters, whose base goes on and removes its old checkpoints."""
    grpo(grpo_config(tmp_path / "one", base, lora=LORA, steps=2, keep_last=1, save_every=1))
    grpo(grpo_config(tmp_path / "two", tmp_path / "one", lora=LORA, steps=2))
    before = weights_of(tmp_path / "two")
    grpo(grpo_config(tmp_path / "one", base, lora=LORA, steps=4, keep_last=1, save_every=1, resume=True))
    assert not (tmp_path / "one/checkpoints/step_00000002").exists()
    after = weights_of(tmp_path / "two")
    assert all(after[name].equal(before[name]) for name in before)


def test_a_base_with_adapters_is_known_by_its_parts(base, tmp_path):
    """Their sum rounds differently from machine to machine."""
    grpo(grpo_config(tmp_path / "one", base, lora=LORA, steps=1))
    first, same = (load_model(str(tmp_path / "one"), CPU)[2] for _ in range(2))
    same.tensors["model"]["embed"][0, 0] += 1e-7
    assert first.weights_fingerprint == same.weights_fingerprint
    grpo(grpo_config(tmp_path / "one", base, lora=LORA, steps=2, resume=True))
    assert load_model(str(tmp_path / "one"), CPU)[2].weights_fingerprint != first.weights_fingerprint


def test_a_balance_bias_stays_as_it_is_with_adapters(tmp_path):
    """It is no adapter, so no checkpoint would hold it."""
    model = Transformer(preset("tiny-moe", Tokenizer.bytes().vocab_size)).init_weights(0)
    state = {"model_config": model.config.to_dict(), "tokenizer": Tokenizer.bytes().to_dict(), "settings": {}}
    save_checkpoint(tmp_path / "base", 0, {"model": model.state_dict()}, state)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "1", "response": "yes"}\n' * 8)
    trained = sft(SFTConfig(run=str(tmp_path / "run"), base=str(tmp_path / "base"), data=str(data), steps=3,
                            device="cpu", lora=LORA))
    assert not trained.blocks[0].mlp.router.balance_bias.any()
    loaded = load_model(str(tmp_path / "run"), CPU)[0]
    packed = pack([[1, 2, 3]])
    with torch.no_grad():
        assert (loaded.hidden_states(packed) - trained.hidden_states(packed)).abs().max() < 1e-5


def test_no_second_copy_of_the_base_is_alive_when_the_engine_measures_memory(base, tmp_path, monkeypatch):
    size = tiny().embed.numel()

    def embeddings():
        gc.collect()
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)
                and x.numel() == size and x.dtype == torch.float32]

    before, alive = {id(x) for x in embeddings()}, []

    class Watched(Engine):
        def __init__(self, model, *args, **options):
            alive.extend(x.shape for x in embeddings() if id(x) not in before)
            super().__init__(model, *args, **options)

    monkeypatch.setattr(grpo_module, "Engine", Watched)
    grpo(grpo_config(tmp_path / "run", base, lora=LORA, steps=1, dtype="bf16"))
    assert not alive
