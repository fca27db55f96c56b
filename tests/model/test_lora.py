"""Low-rank adapters against the formula, on every kind of layer."""
import math

import pytest
import torch

from r1zero.model.engine.engine import Engine
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.lora import (
    AdapterCopy,
    LoRAConfig,
    adapter_tensors,
    adapters_of,
    add_adapters,
    cast_frozen,
    merge_adapters,
    merged_copy,
    own_adapters,
    refresh_merged,
)
from r1zero.model.optimizer import OptimConfig, make_optimizer
from r1zero.model.packed import pack

from .model_cases import CONFIGS, each_config, scattered, sequences

TWO = LoRAConfig(rank=2, alpha=2.0)
BATCH = pack(sequences(5, 1, 9))


def states(model):
    return model.hidden_states(BATCH).detach()


def stirred(model, seed=1):
    """The model, after an update of all adapters."""
    rng = torch.Generator().manual_seed(seed)
    for tensor in adapter_tensors(model).values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype)
    return model


def adapted(config, lora=TWO, **kind):
    return add_adapters(scattered(config, **kind), lora, seed=0)


@each_config
def test_a_model_with_new_adapters_computes_what_its_base_does(config):
    plain = scattered(config)
    assert states(plain).equal(states(adapted(config)))


@each_config
def test_merged_is_the_same_as_beside_the_weights(config):
    model = stirred(adapted(config))
    beside = states(model)
    copied = merged_copy(model)
    assert (states(copied) - beside).abs().max() < 1e-12 * beside.abs().max()
    assert not adapters_of(copied) and (beside - states(scattered(config))).abs().max() > 1e-2
    merged = merge_adapters(model)
    assert states(merged).equal(states(copied)) and all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == scattered(config).state_dict().keys()


def test_each_matrix_has_the_update_of_its_own_pair():
    """q, k and v one by one, by the formula of the paper, with loops."""
    lora = LoRAConfig(rank=3, alpha=5.0)
    model = stirred(adapted(CONFIGS["qwen2"], lora))
    qkv = model.blocks[1].attn.qkv
    assert qkv.parts == (24, 12, 12) and qkv.lora_A.shape == (3, 3, 12) and qkv.lora_B.shape == (48, 3)
    x = torch.randn(4, 12, dtype=torch.float64)
    y = qkv(x).detach()
    qkv.requires_grad_(False)
    for row, part in ((0, 0), (23, 0), (24, 1), (35, 1), (36, 2), (47, 2)):
        for t in range(4):
            base = sum(float(qkv.weight[row, i] * x[t, i]) for i in range(12)) + float(qkv.bias[row])
            low = [sum(float(qkv.lora_A[part, r, i] * x[t, i]) for i in range(12)) for r in range(3)]
            update = 5.0 / 3 * sum(float(qkv.lora_B[row, r]) * low[r] for r in range(3))
            assert math.isclose(float(y[t, row]), base + update, rel_tol=1e-9)


def test_the_scale_is_alpha_by_the_rank_or_by_its_root():
    assert LoRAConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_only_adapters_have_gradients_and_moments():
    model = adapted(CONFIGS["deepseek's mixture"], dtype=torch.float32)
    optimizer = make_optimizer(model, OptimConfig())
    model.logprobs(model.hidden_states(BATCH), BATCH.tokens)[0].sum().backward()
    optimizer.step()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(adapter_tensors(model))
    assert all(name.endswith(("lora_A", "lora_B")) for name in with_gradient)
    n_moments = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert n_moments == 2 * sum(t.numel() for t in adapter_tensors(model).values())


def test_the_gradient_of_the_adapters_is_that_of_finite_differences():
    """Differences over two widths, combined so that the error of second order drops out (Richardson)."""
    model = stirred(adapted(CONFIGS["deepseek v3"]))
    weight = torch.randn_like(states(model))
    (model.hidden_states(BATCH) * weight).sum().backward()
    rng = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        here = parameter.data.clone()
        direction = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
        slopes = []
        for width in (1e-5, 2e-5):
            ends = []
            for sign in (1, -1):
                parameter.data.copy_(here + sign * width * direction)
                ends.append(float((states(model) * weight).sum()))
            slopes.append((ends[0] - ends[1]) / (2 * width))
        parameter.data.copy_(here)
        slope = (4 * slopes[0] - slopes[1]) / 3
        assert math.isclose(float((parameter.grad * direction).sum()), slope, rel_tol=1e-7, abs_tol=1e-7)


@pytest.mark.parametrize("layers, some, none", [("attention", "attn", "mlp"), ("mlp", "mlp", "attn")])
def test_the_layers_can_be_chosen(layers, some, none):
    names = adapters_of(adapted(CONFIGS["deepseek's mixture"], LoRAConfig(2, layers=layers)))
    assert names and all(f".{some}." in name and f".{none}." not in name for name in names)


def test_of_a_mixture_attention_and_shared_experts_are_adapted_and_no_router():
    names = set(adapters_of(adapted(CONFIGS["deepseek's mixture"])))
    kinds = {name.split(".", 2)[2] for name in names if name.startswith("blocks.1.")}
    assert kinds == {"attn.qkv", "attn.out", "mlp.shared.gate_up", "mlp.shared.down"}


def test_frozen_weights_in_the_compute_dtype_change_no_bit():
    """And what an fp32 head or router reads stays in fp32."""
    for name in ("qwen3", "deepseek's mixture", "deepseek v2 lite"):
        for fp32_head in (False, True):
            model = stirred(adapted(CONFIGS[name], dtype=torch.float32))
            model.compute_dtype, model.fp32_head = torch.bfloat16, fp32_head
            hidden = model.hidden_states(BATCH)
            logits = model.logits(hidden)
            cast_frozen(model)
            assert model.blocks[0].attn.out.weight.dtype == torch.bfloat16
            assert model.logits(model.hidden_states(BATCH)).equal(logits), (name, fp32_head)
            trained = [p for p in model.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {torch.float32}


def test_adapters_follow_from_the_seed():
    one, same, other = (add_adapters(scattered(CONFIGS["plain"]), LoRAConfig(2), seed) for seed in (3, 3, 4))
    A = [model.blocks[1].mlp.down.lora_A for model in (one, same, other)]
    assert A[0].equal(A[1]) and not A[0].equal(A[2])
    assert A[0].abs().max() <= 10**-0.5 and A[0].abs().max() > 0.1  # d_ff is 10


def test_a_merged_copy_shares_what_is_not_adapted_and_follows_the_adapters():
    model = adapted(CONFIGS["plain"], LoRAConfig(2, layers="mlp"))
    copied = merged_copy(model)
    theirs = dict(model.named_parameters())
    shared = {name for name, p in copied.named_parameters() if p is theirs[name]}
    own = set(dict(copied.named_parameters())) - shared
    assert own == {f"blocks.{i}.mlp.{name}.weight" for i in (0, 1) for name in ("gate_up", "down")}
    before = model.blocks[0].mlp.down.weight.clone()
    stirred(model)
    assert (states(copied) - states(model)).abs().max() > 1e-2  # of the old adapters
    refresh_merged(copied, model)
    assert (states(copied) - states(model)).abs().max() < 1e-12
    assert before.equal(model.blocks[0].mlp.down.weight)  # the base is as it was


@pytest.mark.parametrize("paged", [False, True])
def test_the_engine_decodes_with_the_newest_adapters(paged):
    model = stirred(adapted(CONFIGS["qwen2"], dtype=torch.float32))
    engine = Engine(model, max_rows=4, paged=paged)
    requests = [Request([1, 2, 3], 8, seed=seed) for seed in range(4)]
    for seed in (5, 6):
        stirred(model, seed)
        engine.refresh()
        answers = [answer.tokens.tolist() for answer in engine.generate(requests)]
        assert answers == [generate_naive(model, request).tokens.tolist() for request in requests]


def test_adapters_are_merged_once_for_a_batch_of_answers():
    class Counted(Engine):
        merged = 0

        def _take_weights(self):
            self.merged += 1
            super()._take_weights()

    model = stirred(adapted(CONFIGS["qwen2"], dtype=torch.float32))
    engine = Counted(model, max_rows=4)
    for version in (1, 2):
        engine.refresh()
        engine.generate([Request([1, 2, 3], 2, seed=0)])
        assert (engine.merged, engine.version) == (version, version)


def test_a_copy_of_the_adapters_is_swapped_in_and_out_exactly():
    model = adapted(CONFIGS["plain"])
    base, kept = states(model), AdapterCopy(model)
    trained = states(stirred(model))
    kept.swap(model)
    assert states(model).equal(base)
    kept.swap(model)
    assert states(model).equal(trained)
    assert set(kept.state_dict()) == set(adapter_tensors(model))
    kept.copy_from(model)
    stirred(model, 2)
    kept.swap(model)
    assert states(model).equal(trained)


def test_a_critic_has_adapters_of_its_own_over_the_same_weights():
    model = adapted(CONFIGS["plain"])
    own = own_adapters(model)
    before = states(model)
    stirred(own)
    assert states(model).equal(before) and not states(own).equal(before)
    theirs = dict(model.named_parameters())
    assert all((p is theirs[name]) != p.requires_grad for name, p in own.named_parameters())


@pytest.mark.parametrize("options, told", [
    (dict(rank=-1), "--lora.rank is -1, expected 1 or more"),
    (dict(alpha=16.0), "--lora.alpha, --lora.layers and --lora.rslora need --lora.rank"),
    (dict(rank=1, alpha=0.0), "--lora.alpha is 0.0, expected a number above 0"),
    (dict(rank=1, alpha=math.nan), "--lora.alpha is nan"),
    (dict(rank=1, layers="head"), "--lora.layers is 'head', expected all, attention, mlp"),
])
def test_options_that_are_no_adapters_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        LoRAConfig(**options)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(adapted(CONFIGS["plain"]), LoRAConfig(1), 0)
    with pytest.raises(ValueError, match="--lora.rank is 13, and the model is 12 wide; expected"):
        adapted(CONFIGS["plain"], LoRAConfig(13))
    with pytest.raises(ValueError, match="no matrix of this model can have an adapter .* attention"):
        adapted(CONFIGS["mixtral"], LoRAConfig(1, layers="mlp"))
