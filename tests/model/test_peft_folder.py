"""Adapters in PEFT's layout: peft computes the same with them, and what it would warn of is an error."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1zero.model.checkpoint import load_model
from r1zero.model.huggingface import read_model
from r1zero.model.lora import LoRAConfig, adapter_tensors, add_adapters, merged_copy
from r1zero.model.peft_folder import merge_folder, write_adapters
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.tokens.json_file import write_tokenizer

from .huggingface_cases import CPU, logits_of, read, saved, sequences, transformers

FAMILIES = ["llama", "qwen2", "qwen3", "olmo2"]
MIXTURES = ["deepseek-v3", "qwen2-moe", "v2 lite"]
SOME = LoRAConfig(2, 4.0, "attention", rslora=True)
PREFIX = "base_model.model.model.layers."


def stirred(name: str, lora: LoRAConfig):
    """A tiny model of a family with adapters that have been trained."""
    model = add_adapters(read(saved(name)), lora, seed=0)
    rng = torch.Generator().manual_seed(1)
    for tensor in adapter_tensors(model).values():
        tensor += 0.2 * torch.randn(tensor.shape, generator=rng)
    return model


def logits_of_peft(base: str, folder) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    model = transformers().AutoModelForCausalLM.from_pretrained(saved(base))
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return torch.cat([model(tokens[None]).logits[0] for tokens in sequences()])


@pytest.mark.parametrize("name, lora", [*((name, LoRAConfig(3, 5.0)) for name in FAMILIES),
                                        *((name, SOME) for name in ("llama", *MIXTURES))])
def test_peft_computes_the_same_with_our_adapters_and_we_with_its(name, lora, tmp_path):
    model = stirred(name, lora)
    ours = logits_of(merged_copy(model))
    write_adapters(tmp_path / "out", model, lora, str(saved(name)), {"a fingerprint of its base"})
    assert (logits_of_peft(name, tmp_path / "out") - ours).abs().max() < 1e-4
    assert (logits_of(read(saved(name))) - ours).abs().max() > 1e-2
    # what peft itself writes, read by us
    peft = pytest.importorskip("peft")
    theirs = transformers().AutoModelForCausalLM.from_pretrained(saved(name))
    peft.PeftModel.from_pretrained(theirs, tmp_path / "out").save_pretrained(tmp_path / "theirs")
    plain = read(saved(name))
    merge_folder(tmp_path / "theirs", plain)
    assert (logits_of(plain) - ours).abs().max() < 1e-4


def test_adapters_of_a_few_matrices_are_read(tmp_path):
    """PEFT's default: q and v alone."""
    peft = pytest.importorskip("peft")
    theirs = transformers().AutoModelForCausalLM.from_pretrained(saved("qwen2"))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "q and v")
    plain = read(saved("qwen2"))
    merge_folder(tmp_path / "q and v", plain)
    assert (logits_of(plain) - logits_of_peft("qwen2", tmp_path / "q and v")).abs().max() < 1e-4


@pytest.fixture
def folder(tmp_path):
    lora = LoRAConfig(2, 1.0)
    write_adapters(tmp_path / "adapters", stirred("llama", lora), lora, str(saved("llama")))
    return tmp_path / "adapters"


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def without_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def reshape(tensors):
    tensors[PREFIX + "0.mlp.down_proj.lora_A.weight"] = torch.zeros(2, 3)


def spoil(tensors):
    tensors[PREFIX + "1.mlp.down_proj.lora_B.weight"][0, 0] = torch.nan


@pytest.mark.parametrize("edit, told", [
    (without_prefix, "of no matrix of this model: model.layers.0"),
    (lambda t: t.pop(PREFIX + "0.self_attn.v_proj.lora_B.weight"), r"1 missing: .*0.self_attn.v_proj.lora_B"),
    (lambda t: t.pop(PREFIX + "1.self_attn.q_proj.lora_A.weight"), r"1 missing: .*1.self_attn.q_proj.lora_A"),
    (reshape, "1 of another shape: .*0.mlp.down_proj.lora_A"),
    (spoil, "1 not finite: .*1.mlp.down_proj.lora_B"),
    (lambda t: t.update({PREFIX + "9.mlp.down_proj.lora_A.weight": torch.zeros(2, 8)}), "no matrix .*9.mlp"),
    (lambda t: t.update({"base_model.model.lm_head.lora_magnitude": torch.zeros(8)}), "lora_magnitude"),
    (lambda t: t.clear(), "holds no adapter"),
])
def test_adapters_that_peft_would_only_warn_of_are_errors(folder, edit, told):
    edit_tensors(folder, edit)
    model = read(saved("llama"))
    before = logits_of(model)
    with pytest.raises(ValueError, match=told):
        merge_folder(folder, model)
    assert logits_of(model).equal(before)


@pytest.mark.parametrize("change, told", [
    (dict(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
    (dict(use_dora=True, bias="all"), "bias is 'all', which .* has not; use_dora is True"),
    (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
    (dict(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens is \[1, 2\]"),
    (dict(of_the_future=3), "of_the_future is 3, which plain LoRA has not"),
    (dict(rank_pattern={"q_proj": 4}), "rank_pattern is {'q_proj': 4}"),
    (dict(target_parameters=["mlp.experts.down_proj"]), "target_parameters is"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save is"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
    (dict(r=0), "r is 0, expected a whole number above 0"),
    (dict(lora_alpha="8"), "lora_alpha is '8', expected a number above 0"),
])
def test_adapters_that_are_not_plain_are_refused_by_name(folder, change, told):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        merge_folder(folder, read(saved("llama")))


@pytest.mark.parametrize("change", [dict(use_rslora=True), dict(lora_alpha=2), dict(r=2, lora_alpha=None)])
def test_what_the_config_says_of_the_scale_is_applied(folder, change):
    """A wrong one loads in peft without a word, so each must move the logits."""
    plain, other = read(saved("llama")), read(saved("llama"))
    merge_folder(folder, plain)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    merge_folder(folder, other)
    assert (logits_of(plain) - logits_of(other)).abs().max() > 1e-2
    assert (logits_of_peft("llama", folder) - logits_of(other)).abs().max() < 1e-4


def test_a_folder_of_adapters_is_a_model_wherever_one_is_taken(folder, tmp_path):
    write_tokenizer(saved("llama"), Tokenizer.bytes())
    model, _, checkpoint = load_model(str(folder), CPU)
    by_hand, _ = read_model(saved("llama"), CPU)
    merge_folder(folder, by_hand)
    assert logits_of(model).equal(logits_of(by_hand))
    assert checkpoint.step == 0 and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no checkpoint 3; ask for the last"):
        load_model(str(folder), CPU, 3)


@pytest.mark.parametrize("name, told", [
    ("Qwen/Qwen2.5-0.5B", "'Qwen/Qwen2.5-0.5B', which is no folder here; models are not fetched"),
    (None, "adapter_config.json names no base"), ("itself", "which holds adapters itself"),
])
def test_a_base_that_is_not_here_is_told_in_one_line(folder, name, told):
    path = folder / "adapter_config.json"
    name = str(folder) if name == "itself" else name
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path=name)))
    with pytest.raises(ValueError, match=told) as caught:
        load_model(str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_a_model_without_adapters_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters; export it whole"):
        write_adapters(tmp_path / "out", read(saved("llama")), LoRAConfig(1), "base")
    assert not list(tmp_path.iterdir())


def test_adapters_that_peft_would_put_elsewhere_are_not_written(tmp_path):
    """Of a mixture, peft takes those of a shared or dense MLP for the experts'."""
    lora = LoRAConfig(2)
    with pytest.raises(ValueError, match="adapters of a mixture's .* with --lora.layers attention"):
        write_adapters(tmp_path / "out", stirred("deepseek-v3", lora), lora, "base")
    assert not list(tmp_path.iterdir())
