"""Open models with experts and latent attention compute what transformers does; what an error would do."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1zero.model.config import ModelConfig
from r1zero.model.engine.pages import Pages
from r1zero.model.engine.slots import Slots
from r1zero.model.huggingface import read_config, read_weights, write_model
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.model.weight_files import pieces, stored_tensors

from .expert_cases import ALL_ERRORS, CHANGES, REFUSALS, routed, wrong
from .huggingface_cases import (
    CPU,
    EXPERTS,
    TOLERANCE,
    changed,
    edit_config,
    error_of,
    error_of_cache,
    gradients,
    loaded,
    read,
    saved,
    theirs,
)

each_mixture = pytest.mark.parametrize("name", EXPERTS)


@each_mixture
def test_packed_sequences_have_the_logits_of_transformers(name):
    model = read(saved(name))
    assert error_of(model, name) < TOLERANCE
    assert error_of(routed(None)(model), name) < TOLERANCE  # so that only errors of the router move them


@each_mixture
def test_the_cache_has_them_token_by_token(name):
    model = read(saved(name))
    assert not Slots.serves(model)
    assert error_of_cache(Pages, model, name) < TOLERANCE


@each_mixture
def test_gradients_are_those_of_transformers(name):
    expected, ours = gradients(name)
    assert expected.keys() == ours.keys()
    for key, gradient in expected.items():
        assert (ours[key] - gradient).abs().max() < 1e-3 * gradient.abs().max(), key


@pytest.mark.parametrize("name, error", ALL_ERRORS)
def test_every_classic_error_moves_the_logits(name, error):
    assert error_of(wrong(name, error), name) > 100 * TOLERANCE


@pytest.mark.parametrize("name, key, value", CHANGES)
def test_every_key_of_the_config_moves_the_logits(name, key, value, tmp_path):
    assert error_of(read(changed(name, key, value, tmp_path)), name) > 100 * TOLERANCE


@pytest.mark.parametrize("name, key, value, why", REFUSALS)
def test_a_config_that_does_not_fit_is_refused_in_one_line(name, key, value, why, tmp_path):
    with pytest.raises(ValueError, match=rf"\A(?=.*{why})[^\n]+\Z"):
        read(changed(name, key, value, tmp_path))


# ---- folders, whole ----

def equal_states(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@each_mixture
def test_stacked_experts_are_read_as_those_one_by_one_are(name, tmp_path):
    theirs(name).save_pretrained(tmp_path, save_original_format=False)
    stored = stored_tensors(tmp_path)
    assert stored["model.layers.2.mlp.experts.down_proj"].shape[0] == read_config(tmp_path).moe.n_experts
    assert equal_states(read(tmp_path), read(saved(name)))


def folder_with(name, folder, **changes):
    """The folder of a tiny model with other tensors; None takes one out."""
    changed(name, "use_cache", True, folder)
    tensors = load_file(saved(name) / "model.safetensors") | changes
    (folder / "model.safetensors").unlink()
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors",
              {"format": "pt"})
    return folder


def refused(*words: str):
    """A ValueError of one line that has all the words, in order."""
    return pytest.raises(ValueError, match=rf"\A(?=.*{'.*'.join(words)})[^\n]+\Z")


def test_one_error_lists_experts_that_are_missing_too_many_or_misshapen(tmp_path):
    at = "model.layers.1.mlp.experts."
    odd = {at + "3.gate_proj.weight": None, at + "3.up_proj.weight": None, at + "3.down_proj.weight": None,
           at + "8.up_proj.weight": torch.zeros(12, 32), at + "5.up_proj.weight": torch.zeros(13, 32),
           "model.layers.2.mlp.gate.e_score_correction_bias": None}
    with refused(f"4 missing: {at}3.gate_proj.weight, .*{at}3.down_proj.weight", "e_score_correction_bias",
                 f"1 not of this model: {at}8.up_proj.weight", "1 of another shape:",
                 rf"{at}5.up_proj.weight is \[13, 32\] and not \[12, 32\]"):
        read(folder_with("deepseek-v3", tmp_path, **odd))


def test_a_mixture_of_stacked_experts_and_those_one_by_one_is_refused(tmp_path):
    at, stacked = "model.layers.0.mlp.experts.", {}
    tensors = load_file(saved("olmoe") / "model.safetensors")
    for kind in ("gate", "up", "down"):
        stacked[kind] = torch.stack([tensors[f"{at}{e}.{kind}_proj.weight"] for e in range(6)])
    both = {at + "gate_up_proj": torch.cat([stacked["gate"], stacked["up"]], dim=1),
            at + "down_proj": stacked["down"]}
    with refused("missing: model.layers.1.mlp.experts.gate_up_proj", "some experts are stacked"):
        read(folder_with("olmoe", tmp_path, **both))
    # The stacks of down alone are none, either.
    with refused("1 not of this model: model.layers.0.mlp.experts.down_proj"):
        read(folder_with("olmoe", tmp_path / "down", **{at + "down_proj": both[at + "down_proj"]}))


def test_layers_that_predict_further_tokens_are_not_read_and_that_is_said(tmp_path):
    at = "model.layers.3."
    expert = {at + "mlp.experts.0.up_proj.weight": torch.ones(12, 32), at + "enorm.weight": torch.ones(32)}
    extra = expert | {at + "eh_proj.weight": torch.zeros(32, 64)}
    folder = folder_with("deepseek-v3", tmp_path, **extra)
    with pytest.warns(UserWarning, match=r"model.layers.3.\* are not read") as said:
        assert equal_states(read(folder), read(saved("deepseek-v3")))
    assert len(said) == 1
    # But a layer that is more than the config says is none of them.
    with refused("2 not of this model: model.layers.3"):
        read(folder_with("deepseek-v3", tmp_path / "more", **expert))
    # Nor is one of the model's own.
    with refused("1 not of this model: model.layers.2.eh_proj.weight"):
        read(folder_with("deepseek-v3", tmp_path / "own", **{"model.layers.2.eh_proj.weight": torch.ones(1)}))


ROUTERS = "mlp.gate.weight", "mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-moe"])
def test_16_bit_files_keep_what_experts_are_chosen_by_in_fp32(name, dtype, tmp_path):
    model = read(saved(name))
    write_model(tmp_path / "out", model, Tokenizer.bytes(), dtype)
    tensors = load_file(tmp_path / "out/model.safetensors")
    is_v3 = name == "deepseek-v3"
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if is_v3 and key.endswith(ROUTERS) else dtype), key
    again = loaded(tmp_path / "out", "auto")
    assert equal_states(again.float(), theirs(name)) is False  # rounded, but for the router of V3
    for key, tensor in again.state_dict().items():
        if is_v3 and key.endswith(ROUTERS):
            assert torch.equal(tensor, theirs(name).state_dict()[key])
    # Read into 16 bit, too, and exactly as it is there.
    kept = read_weights(tmp_path / "out", read_config(tmp_path / "out"), CPU, dtype=dtype).state_dict()
    for key, tensor in kept.items():
        is_router = key.endswith(("router.linear.weight", "balance_bias"))
        assert tensor.dtype == (torch.float32 if is_v3 and is_router else dtype), key
    experts = kept["blocks.2.mlp.gate_up"]
    assert torch.equal(experts[1, :12], tensors["model.layers.2.mlp.experts.1.gate_proj.weight"])
    assert torch.equal(experts, model.blocks[2].mlp.gate_up.to(dtype))


def in_fp8(weight, block):
    """(fp8, scales per block, what they stand for) of a matrix, ragged at its edges."""
    rows, columns = (torch.arange(n) // step for n, step in zip(weight.shape, block, strict=True))
    scale = 2.0 ** -torch.arange((rows[-1] + 1) * (columns[-1] + 1)).remainder(5).view(rows[-1] + 1, -1)
    wide = scale[rows][:, columns]
    fp8 = (weight / wide).to(torch.float8_e4m3fn)
    return fp8, scale, fp8.float() * wide


def test_experts_and_rotated_rows_in_fp8_with_scales_per_block_are_read(tmp_path):
    quantised, plain, block = {}, {}, (10, 12)
    for key, weight in load_file(saved("deepseek-v3") / "model.safetensors").items():
        if "_proj" in key:
            quantised[key], quantised[key + "_scale_inv"], plain[key] = in_fp8(weight, block)
    folder = folder_with("deepseek-v3", tmp_path / "fp8", **quantised)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    assert equal_states(read(folder), read(folder_with("deepseek-v3", tmp_path / "plain", **plain)))
    gone = {"model.layers.1.mlp.experts.2.up_proj.weight_scale_inv": None}
    folder_with("deepseek-v3", tmp_path / "gone", **quantised | gone)
    edit_config(tmp_path / "gone", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with refused("1 missing: model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"):
        read(tmp_path / "gone")


def test_a_small_part_of_the_files_is_held_while_stacked_experts_are_read(tmp_path):
    """One expert is read at a time where it is larger than a piece."""
    tensors = {"w": torch.arange(4.0).view(4, 1, 1).expand(4, 3, 1 << 20).contiguous()}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = [(rows, piece.shape) for rows, piece in pieces(stored_tensors(tmp_path)["w"], "w")]
    assert sizes == [(slice(i, i + 1), (1, 3, 1 << 20)) for i in range(4)]


def test_shards_of_experts_are_read_whichever_file_they_are_in(tmp_path):
    theirs("qwen3-moe").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert equal_states(read(tmp_path), read(saved("qwen3-moe")))


def test_experts_that_no_family_has_are_refused_and_nothing_is_written(tmp_path):
    for change in (dict(router_bias=True), dict(scores="logits"), dict(d_shared=8, d_expert=16),
                   dict(dense_layers=(1,), scores="sigmoid", balance_bias=True)):
        moe = dict(n_experts=4, experts_per_token=2, d_expert=16) | change
        model = Transformer(ModelConfig(258, n_layers=2, moe=moe)).init_weights(0)
        with pytest.raises(ValueError, match="no family of open models"):
            write_model(tmp_path / "out", model, Tokenizer.bytes())
    assert list(tmp_path.iterdir()) == []
