"""The mixture of experts: how eight families route, what can be got wrong, its gradients, and its place in a
model, an engine and a checkpoint."""
import importlib
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, build_model
from r1zero.model.config import ModelConfig, preset
from r1zero.model.engine.pages import Pages, cast_copy
from r1zero.model.mlp import MLP, make_mlp
from r1zero.model.moe import MoE, Router, choose_experts, gates_of, scores_of
from r1zero.model.moe_config import ROUTING, MoEConfig
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, count_active_parameters, count_parameters

from .model_cases import CONFIGS, SHAPE, naive_mlp, scattered, sequences
from .moe_cases import ERRORS, naive_moe, naive_route

E, K, M, T = 16, 4, 12, 60
# family of ours: (its file in transformers, its class there, keys of its config)
THEIRS = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {}),
    "qwen2-moe": ("qwen2_moe", "Qwen2MoeTopKRouter", dict(norm_topk_prob=False)),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeTopKRouter", dict(norm_topk_prob=True)),
    "olmoe": ("olmoe", "OlmoeTopKRouter", dict(norm_topk_prob=False)),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2TopkRouter", dict(
        topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0)),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3TopkRouter", dict(
        n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True)),
    "glm-4.5": ("glm4_moe", "Glm4MoeTopkRouter", dict(
        n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=True)),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {}),
}
each_family = pytest.mark.parametrize("family", ROUTING)


def routing(family):
    return MoEConfig(E, K, 6, **{**ROUTING[family], "shared_gate": False})


def random_router(family):
    """A router whose every number matters; the balance bias makes most scores negative."""
    router = Router(M, routing(family))
    with torch.no_grad():
        for p in router.parameters():
            p.normal_()
        if router.balance_bias is not None:
            router.balance_bias.normal_(-1.5, 1.0)
    return router


def dense(experts, gates):
    """[T, E], 0 where an expert is not chosen."""
    return torch.zeros(len(gates), E, dtype=gates.dtype).scatter(1, experts, gates)


# ---- the families

@each_family
def test_each_family_routes_as_the_loop_says(family):
    router, x = random_router(family), torch.randn(T, M)
    routes = router(x)
    bias = None if router.balance_bias is None else router.balance_bias.tolist()
    for t, row in enumerate(routes.logits.tolist()):
        expected = naive_route(row, router.config, bias)
        assert routes.experts[t].tolist() == list(expected)
        assert routes.gates[t].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


@each_family
def test_each_family_routes_as_transformers_does(family):
    pytest.importorskip("transformers", reason="transformers is not installed")
    file, name, keys = THEIRS[family]
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    sizes = dict(num_experts_per_tok=K, num_experts=E, num_local_experts=E, hidden_size=M)
    router, x = random_router(family), torch.randn(T, M)
    theirs = getattr(module, name)(SimpleNamespace(**sizes, **keys))
    with torch.no_grad():
        theirs.weight.copy_(router.linear.weight)
        if family == "gpt-oss":
            theirs.bias.copy_(router.linear.bias)
        if router.balance_bias is not None:
            theirs.e_score_correction_bias.copy_(router.balance_bias)
        logits, gates, experts = theirs(x)
        ours = router(x)
    torch.testing.assert_close(ours.logits, logits)
    torch.testing.assert_close(dense(ours.experts, ours.gates), dense(experts, gates))


@pytest.mark.parametrize("error", ERRORS)
def test_each_public_error_would_move_the_output(error):
    family = ERRORS[error]
    router = random_router(family)
    bias = None if router.balance_bias is None else router.balance_bias.tolist()
    logits = router(torch.randn(T, M)).logits.tolist()
    wrong = [naive_route(row, router.config, bias, error) for row in logits]
    right = [naive_route(row, router.config, bias) for row in logits]
    pairs = zip(wrong, right, strict=True)
    assert max(abs(a.get(e, 0.0) - b.get(e, 0.0)) for a, b in pairs for e in range(E)) > 0.05


def test_softmax_before_the_choice_is_softmax_after_it_if_gates_are_divided_by_their_sum():
    logits = torch.randn(T, E, dtype=torch.float64)
    gates = []
    for kind, normalise in (("softmax", True), ("logits", True), ("softmax", False)):
        config = MoEConfig(E, K, 6, scores=kind, normalise=normalise)
        scores = scores_of(logits, config)
        experts = choose_experts(scores, None, config)
        gates.append(gates_of(scores, experts, config))
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-12, atol=1e-14)
    assert (gates[0] - gates[2]).abs().max() > 0.1


def test_gates_survive_scores_that_are_all_0():
    config = MoEConfig(4, 2, 6, scores="sigmoid")
    scores = torch.zeros(1, 4)
    assert gates_of(scores, torch.tensor([[0, 1]]), config).tolist() == [[0.0, 0.0]]


# ---- the layer

@pytest.mark.parametrize("name", ["mixtral", "deepseek's mixture", "qwen2's and gpt-oss's mixture"])
def test_values_and_gradients_are_those_of_the_loop_in_fp64(name):
    mlp = scattered(CONFIGS[name]).blocks[1].mlp
    x = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    parameters, dy = dict(mlp.named_parameters()), torch.randn(20, 12, dtype=torch.float64)
    y, expected = mlp(x), naive_moe(mlp, x, naive_mlp)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y, [x, *parameters.values()], dy)
    right = torch.autograd.grad(expected, [x, *parameters.values()], dy)
    for which, a, b in zip(["x", *parameters], got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=which)
        assert b.abs().max() > 1e-4, which  # the router's, too: it learns through all of its gates


def test_all_experts_with_equal_gates_are_the_mean_of_dense_mlps():
    config = ModelConfig(**SHAPE, moe=MoEConfig(3, 3, 10))
    moe, x = scattered(config).blocks[0].mlp, torch.randn(9, 12, dtype=torch.float64)
    with torch.no_grad():
        moe.router.linear.weight.zero_()
    mean = 0
    for e in range(3):
        mlp = MLP(replace(config, moe=None)).double()
        mlp.load_state_dict({"gate_up.weight": moe.gate_up[e], "down.weight": moe.down[e]})
        mean = mean + mlp(x) / 3
    torch.testing.assert_close(moe(x), mean)


def test_one_expert_is_a_dense_mlp():
    config = ModelConfig(**SHAPE, moe=MoEConfig(1, 1, 10))
    moe, x = scattered(config).blocks[0].mlp, torch.randn(4, 12, dtype=torch.float64)
    mlp = MLP(replace(config, moe=None)).double()
    mlp.load_state_dict({"gate_up.weight": moe.gate_up[0], "down.weight": moe.down[0]})
    torch.testing.assert_close(moe(x), mlp(x))


def test_an_fp32_router_chooses_in_fp32_whatever_the_model_computes_in():
    x = torch.randn(T, M, dtype=torch.bfloat16)
    router = random_router("deepseek-v3")
    assert torch.equal(router(x).logits, router(x.float()).logits)
    router = random_router("mixtral")
    assert not torch.equal(router(x).logits, router(x.float()).logits)
    assert router(x).logits.dtype == router(x).gates.dtype == torch.float32


def test_an_fp32_router_and_every_balance_bias_stay_in_fp32_in_a_model_in_bf16():
    """In bf16 an update of 0.001 to a bias of 5 would be lost (vLLM #23640, #38989)."""
    router = random_router("deepseek-v3")
    with torch.no_grad():
        router.balance_bias += 5.0
    before = {name: value.clone() for name, value in router.state_dict().items()}
    for moved in (router.to(torch.bfloat16), router.half()):
        assert all(torch.equal(moved.state_dict()[name], value) for name, value in before.items())
    # Where the router is not an fp32 one, it is the bias alone.
    other = Router(M, replace(routing("deepseek-v3"), fp32_router=False)).to(torch.bfloat16)
    assert other.linear.weight.dtype == torch.bfloat16 and other.balance_bias.dtype == torch.float32
    whole = Transformer(preset("tiny-moe", 300)).bfloat16().blocks[1].mlp
    assert whole.router.linear.weight.dtype == torch.float32 and whole.down.dtype == torch.bfloat16
    assert all(value.dtype == torch.float64 for value in router.double().state_dict().values())
    assert router.to("meta").balance_bias.device.type == "meta"
    assert "balance_bias" in dict(router.named_buffers()) and not router.balance_bias.requires_grad


# ---- its place in a model

def test_the_first_layers_may_be_dense():
    mixture = MoEConfig(4, 2, 6, d_shared=5, dense_layers=(0, 1))
    config = ModelConfig(**{**SHAPE, "n_layers": 4}, moe=mixture)
    assert [type(make_mlp(config, layer)) for layer in range(4)] == [MLP, MLP, MoE, MoE]
    assert make_mlp(config, 3).shared.d_ff == 5 and make_mlp(config, 0).d_ff == SHAPE["d_ff"]


def test_total_and_active_parameters_are_those_that_the_papers_tell():
    """Qwen3-30B-A3B: 30.5 billion, 3.3 of them active."""
    config = ModelConfig(vocab_size=151_936, n_layers=48, d_model=2048, n_heads=32, n_kv_heads=4,
                         head_dim=128, qk_norm=True, tie_embeddings=False, moe=MoEConfig(128, 8, 768))
    assert round(count_parameters(config) / 1e9, 1) == 30.5
    assert count_active_parameters(config) == count_parameters(config) - 48 * 120 * 3 * 2048 * 768
    assert 3.3e9 < count_active_parameters(config) < 3.4e9
    plain = CONFIGS["plain"]
    assert count_active_parameters(plain) == count_parameters(plain)


def test_experts_begin_with_the_spread_of_their_own_fan_in():
    config = ModelConfig(**{**SHAPE, "d_model": 64}, moe=MoEConfig(9, 2, 50, d_shared=70))
    mlp = Transformer(config).init_weights(0).blocks[1].mlp
    for weight, fan_in in ((mlp.gate_up, 64), (mlp.down, 50 * 4), (mlp.router.linear.weight, 64),
                           (mlp.shared.down.weight, 70 * 4)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.08)


def test_a_config_with_experts_survives_json_and_a_dense_one_says_none():
    for name in ("deepseek's mixture", "qwen2's and gpt-oss's mixture", "mixtral"):
        config = CONFIGS[name]
        assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config
    old = CONFIGS["plain"].to_dict()
    assert old.pop("moe") is None
    assert ModelConfig(**old) == CONFIGS["plain"]


@pytest.mark.parametrize("change, message", [
    (dict(experts_per_token=9), "9 experts per token of 8; expected at most all of them"),
    (dict(n_groups=3), "8 experts do not divide into 3 groups"),
    (dict(n_groups=4, groups_per_token=5), "5 groups per token of 4"),
    (dict(n_groups=4, groups_per_token=1), "3 experts per token, but 1 groups of 2 hold only 2"),
    (dict(n_groups=8, groups_per_token=4, group_score="top2"), "groups of one expert have no top2"),
    (dict(n_experts=0), "n_experts is 0, expected a whole number of 1 or more"),
    (dict(d_expert=2.5), "d_expert is 2.5"),
    (dict(d_shared=-1), "d_shared is -1, expected a whole number of 0"),
    (dict(scores="relu"), "scores is 'relu'"),
    (dict(group_score="mean"), "group_score 'mean'"),
    (dict(scale=float("nan")), "scale is nan"),
    (dict(scale=0.0), "scale is 0.0"),
    (dict(shared_gate=True), "shared_gate needs a shared MLP"),
    (dict(n_experts=32_769), "n_experts is 32769, expected at most 32,768"),
    (dict(dense_layers=(0, 1, 0)), r"dense_layers is \(0, 1, 0\), expected different numbers of layers"),
    (dict(dense_layers=(-1,)), r"dense_layers is \(-1,\), expected different numbers of layers, from 0"),
    (dict(dense_layers=(0.5,)), r"dense_layers is \(0.5,\), expected different numbers of layers"),
    (dict(dense_layers=["0"]), r"dense_layers is \('0',\), expected different numbers of layers"),
    (dict(dense_layers=(2,)), r"moe.dense_layers is \(2,\), expected numbers of layers, 0 to 1"),
])
def test_bad_mixtures_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig(**SHAPE, moe={**asdict(MoEConfig(8, 3, 6)), **change})
    assert "\n" not in str(error.value)


def test_a_checkpoint_comes_back_with_its_balance_bias_and_one_without_an_expert_is_refused():
    config = CONFIGS["deepseek's mixture"]
    model = scattered(config, dtype=torch.float32)
    weights = model.state_dict()
    again = build_model(config.to_dict(), weights, torch.device("cpu"))
    packed = pack(sequences(7, 4))
    assert torch.equal(again.hidden_states(packed), model.hidden_states(packed))
    assert torch.equal(again.blocks[1].mlp.router.balance_bias, model.blocks[1].mlp.router.balance_bias)
    name = "blocks.1.mlp.down"
    short = {**weights, name: weights[name][:7]}
    for spoiled, part in [(short, r"down is \[7, 12, 5\], expected \[8, 12, 5\]"),
                          ({k: v for k, v in weights.items() if k != name}, "down is missing"),
                          ({**weights, "more": weights[name]}, "more is .*, expected none of that name")]:
        with pytest.raises(CheckpointError, match=part) as error:
            build_model(config.to_dict(), spoiled, torch.device("cpu"))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("d_shared", [0, 40])
def test_the_estimate_of_what_training_keeps_is_what_is_saved(d_shared):
    moe = MoEConfig(8, 3, 32, d_shared=d_shared)
    mlp = MoE(ModelConfig(**{**SHAPE, "d_model": 64}, moe=moe), None)
    if d_shared:
        mlp.shared = MLP(ModelConfig(**{**SHAPE, "d_model": 64, "d_ff": d_shared}))
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in mlp.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mlp(torch.randn(100, 64, requires_grad=True))
    saved = sum(x.untyped_storage().nbytes() for x in kept.values()) / 100 / 4
    assert saved / 1.15 < mlp.kept_per_token < 1.15 * saved


def test_an_engines_copy_keeps_the_fp32_router_and_the_bias():
    for name, dtype in (("deepseek's mixture", torch.float32), ("mixtral", torch.bfloat16)):
        model = scattered(CONFIGS[name], dtype=torch.float32)
        router, copied = model.blocks[1].mlp.router, cast_copy(model, torch.bfloat16).blocks[1].mlp.router
        assert copied.linear.weight.dtype == dtype
        if router.balance_bias is not None:
            assert torch.equal(copied.balance_bias, router.balance_bias)
            assert copied.balance_bias is not router.balance_bias


def test_an_engine_that_is_refreshed_has_the_trainers_bias():
    model = scattered(CONFIGS["deepseek's mixture"], dtype=torch.float32)
    pages = Pages(model, 2)
    pages.weights = cast_copy(model, torch.bfloat16)
    router, copied = model.blocks[1].mlp.router, pages.weights.blocks[1].mlp.router
    with torch.no_grad():
        router.balance_bias += 1.0
        router.linear.weight += 1.0
    assert not torch.equal(copied.balance_bias, router.balance_bias)
    pages.refresh()
    assert torch.equal(copied.balance_bias, router.balance_bias)
    assert torch.equal(copied.linear.weight, router.linear.weight)


def test_a_graph_holds_a_step_only_where_no_part_waits_for_the_host():
    moe = MoE(ModelConfig(**{**SHAPE, "d_model": 16}, moe=MoEConfig(4, 2, 8)), None)
    assert moe.can_capture(torch.bfloat16) and not moe.can_capture(torch.float64)
    assert MLP(CONFIGS["plain"]).can_capture(torch.float64)
    odd = MoE(ModelConfig(**{**SHAPE, "d_model": 16}, moe=MoEConfig(4, 2, 5)), None)
    assert not odd.can_capture(torch.bfloat16)
