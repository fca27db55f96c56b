"""Linear, and the question that a fused path asks before it reads a weight itself."""
import pytest
import torch

from r1zero.model.engine.pages import cast_copy
from r1zero.model.linear import Linear, plain
from r1zero.model.mlp import MLP
from r1zero.model.packed import pack

from .model_cases import CONFIGS, scattered, sequences


class Doubled(Linear):
    """Another forward on the same weight, as an adapter has."""

    def forward(self, x):
        return 2 * super().forward(x)


class Same(Linear):
    """Counts its calls, and changes nothing."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def replaced(linear, kind):
    """A module of another kind with the weights of `linear`."""
    n_out, n_in = linear.weight.shape
    new = kind(n_in, n_out, linear.bias is not None).to(linear.weight.dtype)
    new.load_state_dict(linear.state_dict())
    return new


def test_a_copy_in_another_dtype_keeps_what_the_layers_are():
    """The engine's copy on a GPU: same modules, same function, weights of its own."""
    model = scattered(CONFIGS["plain"], dtype=torch.float32)
    model.blocks[1].mlp.down = replaced(model.blocks[1].mlp.down, Doubled)
    copied = cast_copy(model, torch.float64)
    assert type(copied.blocks[1].mlp.down) is Doubled
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(copied.named_parameters()).keys()
    for name, mine in copied.named_parameters():
        assert mine.dtype == torch.float64 and mine.equal(theirs[name].double()) and not mine.requires_grad
        assert mine.data_ptr() != theirs[name].data_ptr()
    batch = pack(sequences(5, 9))
    with torch.no_grad():
        assert (copied.hidden_states(batch) - model.hidden_states(batch)).abs().max() < 1e-4


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_casts_its_weights_to_what_comes_in(bias):
    linear, x = Linear(5, 3, bias), torch.randn(2, 4, 5, dtype=torch.float64)
    torch.nn.init.normal_(linear.weight)
    if bias:
        torch.nn.init.normal_(linear.bias)
    y = linear(x)
    assert y.shape == (2, 4, 3) and y.dtype == torch.float64 and linear.weight.dtype == torch.float32
    expected = x @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    torch.testing.assert_close(y, expected)
    assert linear.flops_per_token() == 30


def test_plain_is_true_for_linear_alone():
    assert plain() and plain(Linear(2, 2)) and plain(Linear(2, 2), Linear(2, 3, bias=True))
    for other in (Same(2, 2), torch.nn.Linear(2, 2), torch.nn.Identity()):
        assert not plain(other) and not plain(Linear(2, 2), other)


def test_a_replaced_linear_is_called_and_the_fused_path_not_taken():
    model = scattered(CONFIGS["qwen2"], dtype=torch.float32)
    packed, counted = pack(sequences(9, 4)), []
    with torch.no_grad():
        expected = model.hidden_states(packed)
        for block in model.blocks:
            attn, mlp = block.attn, block.mlp
            for layer, name in ((attn, "qkv"), (attn, "out"), (mlp, "gate_up"), (mlp, "down")):
                counted.append(replaced(getattr(layer, name), Same))
                setattr(layer, name, counted[-1])
        torch.testing.assert_close(model.hidden_states(packed), expected)
    assert [linear.calls for linear in counted] == [1] * 8


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_an_mlp_never_passes_over_what_a_replaced_linear_does(name):
    mlp, x = MLP(CONFIGS["plain"]), torch.randn(7, 12)
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    gate, up = (x @ mlp.gate_up.weight.T).chunk(2, 1)
    if name == "gate_up":
        gate, up = 2 * gate, 2 * up
    expected = (torch.nn.functional.silu(gate) * up) @ mlp.down.weight.T * (2 if name == "down" else 1)
    setattr(mlp, name, replaced(getattr(mlp, name), Doubled))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_a_replaced_head_makes_logits_and_refuses_log_probs():
    model, packed = scattered(CONFIGS["qwen3"], dtype=torch.float32), pack(sequences(5))
    with torch.no_grad():
        hidden = model.hidden_states(packed)
        expected = model.logits(hidden)
        model.lm_head = replaced(model.lm_head, Doubled)
        torch.testing.assert_close(model.logits(hidden), 2 * expected)
        with pytest.raises(ValueError, match="the head is a Doubled, .*expected a Linear: leave lm_head out"):
            model.logprobs(hidden, packed.tokens)
