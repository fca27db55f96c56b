"""A Hugging Face folder is a base: it is trained, resumed, exported, and trained on."""
import json
import shutil

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, load_checkpoint, load_model
from r1zero.model.huggingface import read_model, write_model
from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.export import ExportConfig, export
from r1zero.train.grpo import grpo
from r1zero.train.sft import SFTConfig, sft

from ..rl.cases import tiny
from .loop_cases import grpo_config

CPU = torch.device("cpu")


def open_model(folder, seed=0):
    """A Hugging Face folder with a tiny model of bytes, some rows of which are padding."""
    write_model(folder, tiny(seed, vocab_size=264), Tokenizer.bytes())
    return folder


def weights(folder) -> dict:
    return load_checkpoint(folder).tensors["model"]


def run(folder, base, **changes):
    """Four steps of GRPO with a KL to the base."""
    changes = dict(steps=4, save_every=2, loss={"kl_coef": 0.1, "kl_in": "loss"}) | changes
    grpo(grpo_config(folder, base, **changes))
    return folder


def test_grpo_goes_on_bit_for_bit_and_knows_its_base_by_content(tmp_path):
    base = open_model(tmp_path / "base")
    whole = run(tmp_path / "whole", base)
    run(tmp_path / "half", base, steps=2)
    assert load_checkpoint(tmp_path / "half").state["model_config"]["vocab_in_use"] == 258
    # The base may move, but not change.
    moved = tmp_path / "moved"
    base.rename(moved)
    before = tmp_path / "half/start"
    original, _ = read_model(moved, CPU)
    kept = load_checkpoint(before).tensors["model"]
    assert all(torch.equal(kept[name], p) for name, p in original.named_parameters())
    other = open_model(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="inputs .* have changed: base"):
        run(tmp_path / "half", other, resume=True)
    run(tmp_path / "half", moved, resume=True)
    first, second = weights(whole), weights(tmp_path / "half")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed"], kept["embed"])


def test_what_a_run_leaves_is_exported_loaded_by_transformers_and_trained_on(tmp_path):
    transformers = pytest.importorskip("transformers")
    base = open_model(tmp_path / "base")
    trained = run(tmp_path / "run", base, steps=2)
    export(ExportConfig(run=str(trained), out=str(tmp_path / "out")))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    model, tokenizer, _ = load_model(str(trained), CPU)
    tokens = torch.randint(258, (50,))
    ours = model.logits(model.hidden_states(pack([tokens.tolist()])))
    with torch.no_grad():
        assert (theirs(tokens[None]).logits[0, :, :258] - ours).abs().max() < 1e-4
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("naïve 12", add_special_tokens=False)
    assert ids["input_ids"] == tokenizer.encode("naïve 12")
    # And as the base of the next run, whose first weights are the last of this one.
    again = run(tmp_path / "again", tmp_path / "out", steps=1)
    start, last = load_checkpoint(again / "start").tensors["model"], weights(trained)
    assert all(torch.equal(start[name], last[name]) for name in last)


def test_sft_starts_from_one(tmp_path):
    base = open_model(tmp_path / "base")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "response": "2"}) + "\n")
    sft(SFTConfig(run=str(tmp_path / "run"), base=str(base), data=str(data), steps=1, device="cpu"))
    assert load_checkpoint(tmp_path / "run").step == 1


def test_a_base_that_is_damaged_leaves_no_run(tmp_path):
    base = open_model(tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        run(tmp_path / "run", base)
    assert not (tmp_path / "run").exists()
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "run", base)
