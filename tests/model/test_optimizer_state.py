"""The optimizer: what it trains, and its state by name, from which a run continues bit for bit."""
import pytest
import torch

from r1zero.model.checkpoint import load_checkpoint, save_checkpoint
from r1zero.model.config import preset
from r1zero.model.optimizer import (
    OptimConfig,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_step,
    optimizer_tensors,
)
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

from .checkpoint_cases import fails


def build(seed=0, width=8, extra=False, order=1):
    """A model with a tied head and an unused layer, and AdamW with two groups of parameters."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({
        "embed": torch.nn.Embedding(10, width), "mix": torch.nn.Linear(width, width),
        "unused": torch.nn.Linear(2, 2), "head": torch.nn.Linear(width, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    if extra:
        model["extra"] = torch.nn.Linear(2, 2)
    matrices = [p for p in model.parameters() if p.dim() > 1][::order]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))


def train(model, optimizer, steps):
    for step in steps:
        tokens = torch.arange(10).roll(step)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 3)
        logits = model["head"](torch.tanh(model["mix"](model["embed"](tokens))))
        torch.nn.functional.cross_entropy(logits, tokens.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("trained", ["norm", "weight", "qkv"])
def test_frozen_parameters_are_not_in_the_optimizer_and_do_not_change(trained):
    """Vectors alone, matrices alone, or both; the clipped gradient is the trained parameters' alone."""
    model = Transformer(preset("tiny", 30, qkv_bias=True)).init_weights(0)
    for name, p in model.named_parameters():
        p.requires_grad_(trained in name)
    chosen = [name for name, p in model.named_parameters() if p.requires_grad]
    config = OptimConfig(clip_grad=1e-3)
    optimizer, before = make_optimizer(model, config), {k: v.clone() for k, v in model.state_dict().items()}
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    assert sorted(sum((group["params"] for group in rest["groups"]), [])) == sorted(chosen)
    assert [group["weight_decay"] for group in rest["groups"]] == [config.weight_decay, 0.0]

    packed = pack([[1, 2, 3, 4], [5, 6]])
    logp, _ = model.logprobs(model.hidden_states(packed), packed.tokens.roll(-1))
    logp.sum().backward()
    expected = sum(p.grad.square().sum() for p in model.parameters() if p.requires_grad) ** 0.5
    assert optimizer_step(model, optimizer, 0.1, config) == pytest.approx(float(expected))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == chosen
    tensors, _ = optimizer_tensors(optimizer, model.named_parameters())
    assert {name.split("/")[0] for name in tensors} == set(chosen)


def test_a_model_with_nothing_to_train_is_refused():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of this Linear requires a gradient; expected one or"):
        make_optimizer(model, OptimConfig())


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(3))
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": rest})
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = build(seed=1)
    train(resumed, resumed_optimizer, [5])  # state of its own, which must go
    found = load_checkpoint(tmp_path)
    resumed.load_state_dict(found.tensors["model"])
    load_optimizer_tensors(resumed_optimizer, resumed.named_parameters(), found.tensors["optimizer"],
                           found.state["optimizer"])
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [0.1 / 5, 0.01]
    train(resumed, resumed_optimizer, range(3, 6))

    for (name, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        for field, value in optimizer.state[a].items():
            assert torch.equal(value, resumed_optimizer.state[b][field]), (name, field)
    for a, b in zip(optimizer.param_groups, resumed_optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_names_and_shapes_of_what_is_stored():
    model, optimizer = build()
    assert optimizer_tensors(optimizer, model.named_parameters())[0] == {}
    train(model, optimizer, range(1))
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{name}/{field}": shape
        for name, full in (("embed.weight", (10, 8)), ("mix.weight", (8, 8)), ("mix.bias", (8,)))
        for field, shape in (("step", ()), ("exp_avg", full), ("exp_avg_sq", full))}
    assert [group["params"] for group in rest["groups"]] == [["embed.weight", "mix.weight", "unused.weight"],
                                                            ["mix.bias", "unused.bias"]]


def test_state_that_is_no_tensor_is_kept_too():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, other = (torch.optim.SGD([weight], lr=0.1, momentum=0.9) for _ in range(2))
    optimizer.state[weight] = {"momentum_buffer": torch.ones(3), "count": 5}
    tensors, rest = optimizer_tensors(optimizer, [("w", weight)])
    assert rest["numbers"] == {"w/count": 5}
    load_optimizer_tensors(other, [("w", weight)], tensors, rest)
    assert other.state[weight]["count"] == 5
    assert torch.equal(other.state[weight]["momentum_buffer"], torch.ones(3))


def test_a_setting_that_only_this_torch_knows_keeps_its_value():
    model, optimizer = build()
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    for group in rest["groups"]:
        del group["amsgrad"]
    load_optimizer_tensors(optimizer, model.named_parameters(), tensors, rest)
    assert [group["amsgrad"] for group in optimizer.param_groups] == [False, False]


@pytest.mark.parametrize("options, match", [
    (dict(extra=True), r"only there \[\], only here \['extra.bias', 'extra.weight'\]"),
    (dict(order=-1), r"in other groups: only there \[\], only here \[\]"),
    (dict(width=4), r"holds embed.weight/exp_avg of shape \(10, 8\), but the parameter has \(10, 4\)"),
])
def test_another_model_is_told_and_nothing_changes(options, match):
    model, optimizer = build()
    train(model, optimizer, range(2))
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    other, other_optimizer = build(**options)
    before = repr(other_optimizer.state_dict())
    with fails(match):
        load_optimizer_tensors(other_optimizer, other.named_parameters(), tensors, rest)
    assert repr(other_optimizer.state_dict()) == before


def test_tensors_without_a_parameter_and_parameters_without_a_name():
    model, optimizer = build()
    tensors, rest = optimizer_tensors(optimizer, model.named_parameters())
    with fails("holds gone/exp_avg, but no parameter is 'gone'"):
        load_optimizer_tensors(optimizer, model.named_parameters(), {"gone/exp_avg": torch.ones(2)}, rest)
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(10, 8\), \(2, 2\)\] that are not named"):
        optimizer_tensors(optimizer, model["mix"].named_parameters())
