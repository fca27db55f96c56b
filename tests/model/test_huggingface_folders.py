"""Hugging Face folders, whole: what goes in comes out, transformers loads it, and nothing is half written."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1zero.model.checkpoint import load_model
from r1zero.model.config import ModelConfig, from_depth, preset
from r1zero.model.config_json import config_of, content_of, family_of
from r1zero.model.huggingface import check_free, is_huggingface, read_config, read_model, write_model
from r1zero.model.moe_config import ROUTING
from r1zero.model.packed import pack
from r1zero.model.precision import Precision
from r1zero.model.rope_scaling import RopeScaling
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.tokens.json_file import write_tokenizer
from r1zero.model.transformer import Transformer

from .huggingface_cases import (
    CPU,
    MODELS,
    TINY,
    VOCAB,
    each_model,
    edit_config,
    loaded,
    logits_of_theirs,
    saved,
    their_logits,
    theirs,
    transformers,
)


def whole(name: str, folder):
    """The tiny model of transformers with a tokenizer of bytes; the Qwen2 with one as Qwen's."""
    from .tokens.cases import like_qwen2  # it needs the library `tokenizers`, as `saved` does

    shutil.copytree(saved(name), folder)
    write_tokenizer(folder, like_qwen2(VOCAB) if name == "qwen2" else Tokenizer.bytes())
    ends = {"bos_token_id": 256, "eos_token_id": [257, 10]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


@each_model
def test_a_model_goes_in_and_out_unchanged(name, tmp_path):
    folder = whole(name, tmp_path / "in")
    model, tokenizer = read_model(folder, CPU)
    assert tokenizer.eos_ids == (257, 10)
    write_model(tmp_path / "out", model, tokenizer)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    reloaded, original = loaded(tmp_path / "out"), theirs(name).state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in reloaded.state_dict().items())
    # Experts in other memory may be multiplied in another order.
    differ = (logits_of_theirs(reloaded) - their_logits(name)).abs().max()
    assert differ <= (0 if name in TINY else 1e-5)
    kind = json.loads((tmp_path / "out/config.json").read_text())["model_type"]
    assert kind == MODELS[name][0]
    again, same_tokenizer = read_model(tmp_path / "out", CPU)
    assert again.config == model.config and same_tokenizer.eos_ids == tokenizer.eos_ids
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in again.state_dict().items())


@each_model
def test_readers_of_old_and_of_new_keys_read_the_same(name, tmp_path):
    """transformers, given one half of what we write, or both."""
    config = read_config(saved(name))
    content = content_of(family_of(config), config)
    library = transformers()
    rope = ("rope_parameters", "rope_scaling", "rope_theta")
    read_by_them = []
    for without in ((), rope[1:], rope[:1]):
        kept = {key: value for key, value in content.items() if key not in without}
        assert config_of(kept) == config
        found = library.AutoConfig.for_model(**kept).to_dict()
        found["rope_parameters"].pop("type", None)
        read_by_them.append({key: found.get(key) for key in content if key not in rope[1:]})
    assert read_by_them[0] == read_by_them[1] == read_by_them[2]


def test_padded_rows_are_never_sampled_and_are_written_all_the_same(tmp_path):
    model, tokenizer = read_model(whole("qwen3", tmp_path / "in"), CPU)
    assert tokenizer.vocab_size == VOCAB and model.config.vocab_in_use == 258
    assert model.logits(torch.zeros(1, 32)).shape == (1, 258)
    write_model(tmp_path / "out", model, tokenizer)
    assert loaded(tmp_path / "out").config.vocab_size == VOCAB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_written_in_the_dtype_that_is_asked_for(dtype, tmp_path):
    model, tokenizer = read_model(whole("mistral", tmp_path / "in"), CPU)
    write_model(tmp_path / "out", model, tokenizer, dtype)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    theirs = loaded(tmp_path / "out", "auto")
    assert theirs.dtype == dtype
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed.to(dtype))


OURS = {
    "demo": (preset("demo", 258), "llama"),
    "depth=11, whose width is no multiple of its heads": (from_depth(11, 258, n_layers=1), "mistral"),
    "windows and no RoPE in some layers": (
        ModelConfig(258, n_layers=3, window=5, window_layers=(0, 2), nope_layers=(1,)), "smollm3"),
    "window in the middle": (
        ModelConfig(258, n_layers=3, window=5, window_layers=(1,), qk_norm=True), "qwen3"),
    "linear": (ModelConfig(258, n_layers=1, rope_scaling=RopeScaling("linear", 2.0)), "llama"),
    "demo-moe": (preset("demo-moe", 258, n_layers=2), "glm4_moe"),
    "latents without experts": (ModelConfig(258, n_layers=1, n_kv_heads=4, head_dim=24, latent=dict(
        kv_rank=20, rope_dim=8, value_dim=6)), "deepseek_v2"),
    "latents and 2 shared experts": (ModelConfig(258, n_layers=2, n_kv_heads=4, head_dim=24, latent=dict(
        kv_rank=20, q_rank=16, rope_dim=8, value_dim=6), moe=ROUTING["deepseek-v3"] | dict(
            n_experts=8, experts_per_token=2, d_expert=16, d_shared=32, dense_layers=(0,), n_groups=2,
            groups_per_token=1)), "deepseek_v3"),
    "experts in every other layer": (ModelConfig(258, n_layers=4, qk_norm=True, moe=dict(
        n_experts=4, experts_per_token=2, d_expert=16, dense_layers=(0, 2))), "qwen3_moe"),
}


@pytest.mark.parametrize("config, kind", OURS.values(), ids=OURS)
def test_models_of_our_own_are_written_as_the_family_that_computes_the_same(config, kind, tmp_path):
    assert family_of(config) == kind
    model = Transformer(config).init_weights(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm", "balance_bias")):
                tensor += 0.3 * torch.randn(tensor.shape)
    write_model(tmp_path / "out", model, Tokenizer.bytes())
    tokens = torch.randint(258, (40,))
    ours = model.logits(model.hidden_states(pack([tokens.tolist()])))
    with torch.no_grad():
        found = loaded(tmp_path / "out")(tokens[None]).logits[0]
    assert (ours - found).abs().max() < 1e-4


def test_a_model_that_no_family_describes_is_refused_and_nothing_is_written(tmp_path):
    config = ModelConfig(258, n_layers=1, qk_norm=True, qkv_bias=True)
    with pytest.raises(ValueError, match="no family of open models"):
        write_model(tmp_path / "out", Transformer(config).init_weights(0), Tokenizer.bytes())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    model = Transformer(preset("tiny", 258)).init_weights(0)
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already"):
            write_model(taken, model, Tokenizer.bytes())
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "empty", model, Tokenizer.bytes(), card="# card")
    assert (tmp_path / "empty/README.md").read_text() == "# card"
    modes = {path.stat().st_mode for path in (tmp_path / "empty").iterdir()}
    assert len(modes) == 1


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path):
    model = Transformer(preset("tiny", 258)).init_weights(0)
    with torch.no_grad():
        model.norm[3] = float("nan")
    with pytest.raises(ValueError, match="model.norm.weight has numbers that are not finite"):
        write_model(tmp_path / "out", model, Tokenizer.bytes())
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_the_weights_do_not_have_is_refused_before_the_tokenizer_takes_its_memory(tmp_path):
    folder = edit_config(whole("llama", tmp_path / "in"), vocab_size=2**31 - 1)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="embed_tokens.weight is"):
        read_model(folder, CPU)
    sizes = dict.fromkeys(("hidden_size", "head_dim", "num_attention_heads", "intermediate_size"), 2**31 - 2)
    edit_config(folder, **sizes)
    with pytest.raises(ValueError, match="larger than any memory"):
        read_model(folder, CPU)


@pytest.mark.parametrize("name", [".", "..", "sub/..", "/"])
def test_a_name_that_is_none_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path(name), Path(tmp_path)):
        with pytest.raises(ValueError, match="is no name for a new folder"):
            check_free(folder)


# ---- as a base ----

def test_such_a_folder_is_loaded_where_a_run_is(tmp_path):
    folder = whole("qwen3", tmp_path / "in")
    assert is_huggingface(folder) and not is_huggingface(tmp_path)
    model, tokenizer, checkpoint = load_model(str(folder), CPU, precision=Precision(torch.bfloat16, True))
    assert model.precision == Precision(torch.bfloat16, True) and model.embed.dtype == torch.float32
    assert checkpoint.step == 0 and checkpoint.path == folder
    assert ModelConfig(**json.loads(json.dumps(checkpoint.state["model_config"]))) == model.config
    assert Tokenizer.from_dict(checkpoint.state["tokenizer"]).fingerprint() == tokenizer.fingerprint()
    assert checkpoint.tensors["model"].keys() == dict(model.named_parameters()).keys()
    with pytest.raises(ValueError, match="has no checkpoint 'best'"):
        load_model(str(folder), CPU, "best")


def test_a_tokenizer_that_does_not_belong_is_refused(tmp_path):
    folder = whole("llama", tmp_path / "in")
    words = Tokenizer.from_words([f"word{i}" for i in range(VOCAB)])
    write_tokenizer(folder, words)
    with pytest.raises(ValueError, match=rf"\A[^\n]*{VOCAB} rows[^\n]*\Z"):
        read_model(folder, CPU)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json"):
        read_model(folder, CPU)
