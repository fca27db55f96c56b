"""What can be got wrong about open models with experts and latent attention, and about their config.json."""
from dataclasses import replace

import torch

from r1zero.model.moe import MoE, Routes

from .huggingface_cases import YARN, halves, read, saved, swap, with_config, with_weights
from .latent_cases import in_file_order, set_scale, yarn_with
from .moe_cases import naive_route

# ---- from a right model to a wrong one ----

def routed(error):
    """The routers of moe_cases, token by token. error: what they do wrong, a key of ERRORS there; or None."""
    def change(model):
        for block in model.blocks:
            if isinstance(block.mlp, MoE):
                block.mlp.router.forward = naive_forward(block.mlp.router, error)
        return model
    return change


def naive_forward(router, error):
    """Stands in for a router's forward; it replays nothing."""
    return lambda x, routing=None: naive_routes(router, x, error)


def naive_routes(router, x, error) -> Routes:
    logits = router.linear(x)
    bias = None if router.balance_bias is None else router.balance_bias.tolist()
    chosen = [naive_route(row.tolist(), router.config, bias, error) for row in logits]
    experts = torch.tensor([list(gates) for gates in chosen])
    return Routes(experts, torch.tensor([list(gates.values()) for gates in chosen]), logits)


def with_moe(**fields):
    return lambda model: with_config(moe=replace(model.config.moe, **fields))(model)


def with_experts(edit):
    """The mixture of each layer that has one, changed."""
    return with_weights(lambda block: edit(block.mlp) if isinstance(block.mlp, MoE) else None)


def swap_gate_and_up(mlp) -> None:
    n_rows = mlp.gate_up.shape[1] // 2
    swap(mlp.gate_up[:, :n_rows], mlp.gate_up[:, n_rows:])


def swap_up_and_down(mlp) -> None:
    swap(mlp.gate_up[:, mlp.gate_up.shape[1] // 2:], mlp.down)


def roll_experts(mlp) -> None:
    mlp.gate_up.copy_(mlp.gate_up.roll(1, 0))
    mlp.down.copy_(mlp.down.roll(1, 0))


def round_bias(mlp) -> None:
    mlp.router.balance_bias.copy_(mlp.router.balance_bias.bfloat16())


def scale_shared(factor):
    return with_experts(lambda mlp: mlp.shared.down.weight.mul_(factor))


def gate_always_open(mlp) -> None:
    mlp.shared_gate.weight.zero_()  # a half for every token


EVERYWHERE = {
    "gate and up swapped": with_experts(swap_gate_and_up),
    "experts in another order": with_experts(roll_experts),
    "the two norms swapped": with_weights(lambda block: swap(block.attn_norm, block.mlp_norm)),
    "the other normalisation": lambda model: with_moe(normalise=not model.config.moe.normalise)(model),
    "one expert less per token": lambda model: with_moe(
        experts_per_token=model.config.moe.experts_per_token - 1)(model),
}
SHARED = {
    "shared experts forgotten": scale_shared(0),
    "shared experts doubled": scale_shared(2),
    "gate and up of the shared ones swapped": with_experts(
        lambda mlp: swap(*halves(mlp.shared.gate_up.weight, mlp.shared.d_ff))),
}
LATENT = {
    "pairs not permuted": in_file_order("q_up", "kv_down"),
    "pairs of keys not permuted": in_file_order("kv_down"),
    "pairs of queries not permuted": in_file_order("q_up"),
    "eps of the other norms for latents": with_weights(lambda block: setattr(block.attn, "norm_eps", 1e-5)),
}
YARN_ERRORS = {
    "no yarn factor on the scores": set_scale(lambda attn: attn.head_dim**-0.5),
    "yarn not applied": with_config(rope_scaling=None),
}
BIASED = {error: routed(error) for error in ("biased score as gate", "bias forgotten")} | {
    "bias in bf16": with_experts(round_bias)}
GROUPS = {error: routed(error) for error in ("another group score", "groups ignored")}
ERRORS = {
    "mixtral": {
        "w2 and w3 mixed up": with_experts(swap_up_and_down),
        "window ignored": with_config(window=None, window_layers=()),
    },
    "qwen2-moe": SHARED | {
        "gate of the shared expert ignored": with_experts(gate_always_open),
        "window in all layers": with_config(window_layers=(0, 1, 2)),
        "softmax over the chosen": routed("softmax over the chosen"),
    },
    "qwen3-moe": {"qk-norm forgotten": with_config(qk_norm=False)},
    "olmoe": {
        "norms behind instead of before": with_config(post_norm=True),
        "qk-norm forgotten": with_config(qk_norm_full_width=False),
        "softmax over the chosen": routed("softmax over the chosen"),
    },
    "deepseek-v2-lite": SHARED | LATENT | YARN_ERRORS | {
        "no yarn factor on cosines and sines": yarn_with(attention_factor=1.0)},
    "deepseek-v2": SHARED | LATENT | GROUPS | {"scale forgotten": routed("scale forgotten")},
    "deepseek-v3": SHARED | LATENT | YARN_ERRORS | GROUPS | BIASED | {
        "scale forgotten": routed("scale forgotten"),
        "masked groups at 0": routed("masked groups at 0"),
        "softmax instead of sigmoid": with_moe(scores="softmax"),
    },
    "glm": SHARED | BIASED | {"softmax instead of sigmoid": with_moe(scores="softmax")},
}
ALL_ERRORS = [(name, error) for name in ERRORS for error in (*EVERYWHERE, *ERRORS[name])]


def wrong(name: str, error: str):
    """The tiny model with an error."""
    return {**EVERYWHERE, **ERRORS[name]}[error](read(saved(name)))


# ---- config.json with one key changed ----

CHANGES = [
    ("mixtral", "num_experts_per_tok", 1),
    ("mixtral", "num_experts_per_tok", 3),
    ("mixtral", "sliding_window", 9),
    ("mixtral", "sliding_window", "absent"),
    ("mixtral", "rms_norm_eps", 1e-6),
    ("mixtral", "rope_parameters.rope_theta", "absent"),
    ("qwen2-moe", "num_experts_per_tok", "absent"),
    ("qwen2-moe", "norm_topk_prob", True),
    ("qwen2-moe", "sliding_window", 9),
    ("qwen2-moe", "layer_types", ["sliding_attention"] * 3),
    ("qwen2-moe", "rms_norm_eps", 1e-5),
    ("qwen2-moe", "rope_parameters.rope_theta", 500.0),
    ("qwen3-moe", "num_experts_per_tok", 2),
    ("qwen3-moe", "norm_topk_prob", False),
    ("qwen3-moe", "norm_topk_prob", "absent"),
    ("qwen3-moe", "rms_norm_eps", 1e-6),
    ("qwen3-moe", "rope_parameters.rope_theta", 500.0),
    ("olmoe", "num_experts_per_tok", 2),
    ("olmoe", "norm_topk_prob", True),
    ("olmoe", "rms_norm_eps", 1e-5),
    ("olmoe", "rope_parameters.rope_theta", 500.0),
    ("deepseek-v2-lite", "num_experts_per_tok", 2),
    ("deepseek-v2-lite", "routed_scaling_factor", 1.5),
    ("deepseek-v2-lite", "rms_norm_eps", 1e-6),
    ("deepseek-v2-lite", "rope_parameters", YARN | {"rope_theta": 300.0}),
    *(("deepseek-v2-lite", f"rope_parameters.{key}", value) for key, value in (
        ("mscale", 1.0), ("mscale", 0), ("mscale_all_dim", 0.707), ("mscale_all_dim", "absent"),
        ("factor", 4.0), ("rope_theta", 500.0), ("beta_fast", 0.5),
        ("original_max_position_embeddings", 64))),
    ("deepseek-v2", "topk_method", "greedy"),
    ("deepseek-v2", "topk_method", "absent"),
    ("deepseek-v2", "n_group", 2),
    ("deepseek-v2", "topk_group", 3),
    ("deepseek-v2", "routed_scaling_factor", "absent"),
    ("deepseek-v2", "num_experts_per_tok", 2),
    ("deepseek-v3", "n_group", 2),
    ("deepseek-v3", "topk_group", 3),
    ("deepseek-v3", "topk_group", "absent"),
    ("deepseek-v3", "norm_topk_prob", False),
    ("deepseek-v3", "routed_scaling_factor", 1.0),
    ("deepseek-v3", "num_experts_per_tok", 2),
    ("deepseek-v3", "rope_interleave", False),
    ("deepseek-v3", "rope_interleave", None),
    ("deepseek-v3", "rope_parameters.mscale_all_dim", 0),
    ("deepseek-v3", "rope_parameters.mscale_all_dim", 0.707),
    ("glm", "norm_topk_prob", False),
    ("glm", "routed_scaling_factor", 2.5),
    ("glm", "n_group", 2),
    ("glm", "num_experts_per_tok", 2),
    ("glm", "rms_norm_eps", 1e-6),
]
# And those after which the config no longer fits the weights, or speaks of what we do not have.
REFUSALS = [
    ("mixtral", "num_local_experts", 4, "9 not of this model: model.layers.0.block_sparse_moe.experts.4.w1"),
    ("mixtral", "num_local_experts", 6, "9 missing: model.layers.0.block_sparse_moe.experts.5.w1.weight"),
    ("mixtral", "num_local_experts", "absent", "27 missing"),
    ("mixtral", "num_experts", 8, "num_experts 8 and num_local_experts 5, which contradict each other"),
    ("mixtral", "num_experts_per_tok", 6, "6 experts per token of 5"),
    ("mixtral", "intermediate_size", 48, r"w1.weight is \[32, 32\] and not \[48, 32\]"),
    ("mixtral", "layer_types", ["full_attention"] * 3, "in all of its layers or in none"),
    ("mixtral", "sliding_window", 0, "has sliding_window 0 for 3 layers"),
    ("mixtral", "n_routed_experts", "5", "has n_routed_experts '5'; expected a whole number"),
    ("qwen2-moe", "num_experts", 7, "9 missing: model.layers.0.mlp.experts.6.gate_proj.weight"),
    ("qwen2-moe", "qkv_bias", False, "9 not of this model: model.layers.0.self_attn.k_proj.bias"),
    ("qwen2-moe", "shared_expert_intermediate_size", 24, r"shared_expert.*is \[20, 32\] and not \[24, 32\]"),
    ("qwen2-moe", "moe_intermediate_size", 16, r"54 of another shape"),
    ("qwen2-moe", "mlp_only_layers", [0], "3 missing: model.layers.0.mlp.gate_proj.weight"),
    ("qwen2-moe", "decoder_sparse_step", 2, "not of this model: model.layers.0.mlp.experts.0"),
    ("qwen2-moe", "shared_expert_intermediate_size", 0, "shared_expert_intermediate_size 0; expected"),
    ("qwen3-moe", "mlp_only_layers", [], "19 missing: model.layers.1.mlp.experts.0.gate_proj"),
    ("qwen3-moe", "mlp_only_layers", [0, 1], "19 not of this model"),
    ("qwen3-moe", "mlp_only_layers", "1", "has mlp_only_layers '1'; expected a list of numbers of layers"),
    ("qwen3-moe", "norm_topk_prob", 1, "has norm_topk_prob 1; expected true or false"),
    ("qwen3-moe", "layer_types", ["sliding_attention"] * 3, "in all of its layers or in none"),
    ("olmoe", "clip_qkv", 8.0, "clip_qkv 8.0, which r1zero does not compute"),
    ("olmoe", "hidden_act", "gelu", "hidden_act 'gelu'"),
    ("deepseek-v2-lite", "first_k_dense_replace", 0, "28 missing: model.layers.0.mlp.experts.0.gate_proj"),
    ("deepseek-v2-lite", "first_k_dense_replace", 2, "not of this model: model.layers.1.mlp.experts.0"),
    ("deepseek-v2-lite", "moe_layer_freq", 2, "not of this model: model.layers.1.mlp.experts.0"),
    ("deepseek-v2-lite", "n_shared_experts", 1, r"is \[24, 32\] and not \[12, 32\]"),
    ("deepseek-v2-lite", "n_shared_experts", None, "6 not of this model: model.layers.1.mlp.shared_experts"),
    ("deepseek-v2-lite", "q_lora_rank", "absent", "9 missing: model.layers.0.self_attn.q_a_layernorm.weight"),
    ("deepseek-v2-lite", "kv_lora_rank", 13, r"kv_a_proj_with_mqa.weight is \[20, 32\] and not \[21, 32\]"),
    ("deepseek-v2-lite", "qk_rope_head_dim", 7, "has qk_rope_head_dim 7, which is odd"),
    ("deepseek-v2-lite", "num_key_value_heads", 2, "num_key_value_heads 2 beside num_attention_heads 4"),
    ("deepseek-v2-lite", "num_experts_per_tok", "absent", "lacks num_experts_per_tok"),
    ("deepseek-v2-lite", "norm_topk_prob", True, "norm_topk_prob True, which r1zero does not compute"),
    ("deepseek-v2-lite", "scoring_func", "sigmoid", "scoring_func 'sigmoid', which"),
    ("deepseek-v2-lite", "topk_method", "group_limited_greedy", "has n_group None and topk_group N"),
    ("deepseek-v2", "topk_method", "noaux_tc", "topk_method 'noaux_tc'; expected greedy or group_limited"),
    ("deepseek-v2", "n_group", 3, "8 experts do not divide into 3 groups"),
    ("deepseek-v2", "topk_group", 5, "5 groups per token of 4"),
    ("deepseek-v2", "topk_group", 1, "3 experts per token, but 1 groups of 2 hold only 2"),
    ("deepseek-v2", "mlp_bias", True, "missing: model.layers.0.mlp.gate_proj.bias"),
    ("deepseek-v3", "n_group", None, "has n_group None and topk_group 2; expected two numbers, 1 and 1 i"),
    ("deepseek-v3", "topk_group", None, "has n_group 4 and topk_group None; expected two numbers"),
    ("deepseek-v3", "n_group", 8, "has n_group 8 beside n_routed_experts 8; expected 2 experts or more per"),
    ("deepseek-v3", "n_routed_experts", 40_000, "has n_routed_experts 40000; expected 1 to 32,768"),
    ("deepseek-v3", "attention_bias", True, "attention_bias True, which r1zero does not compute"),
    ("deepseek-v3", "scoring_func", "softmax", "scoring_func 'softmax', which"),
    ("deepseek-v3", "topk_method", "greedy", "topk_method 'greedy', which"),
    ("deepseek-v3", "q_lora_rank", None, "9 not of this model: model.layers.0.self_attn.q_a_layernorm"),
    ("deepseek-v3", "num_hidden_layers", 2, "not of this model: model.layers.2.input_layernorm"),
    ("deepseek-v3", "model_type", "deepseek_v32", r"_v32' \(its attention is sparse\); "),
    ("glm", "rope_parameters.partial_rotary_factor", 0.5, "factor 0.5; r1zero rotates"),
    ("glm", "rope_parameters.partial_rotary_factor", "absent", "means. partial_rotary_factor 0.5"),
    ("glm", "use_qk_norm", False, "6 not of this model"),
    ("glm", "attention_bias", False, "9 not of this model"),
    ("glm", "model_type", "gpt_oss", r"'gpt_oss' \(its experts have biases and a clamped activation"),
]
