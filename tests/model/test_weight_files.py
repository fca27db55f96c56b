"""Files of weights: shards, damage, what does not belong; fp8; how much memory reading takes."""
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from r1zero.model.config import ModelConfig
from r1zero.model.config_json import content_of
from r1zero.model.huggingface import read_config, read_weights
from r1zero.model.transformer import Transformer
from r1zero.model.weight_files import copy_tensor, pieces, shards_of, stored_tensors, write_tensors

from .huggingface_cases import CPU, edit_config, read

# Big enough to be cut into blocks of 16 x 20 with edges.
CONFIG = ModelConfig(vocab_size=30, n_layers=2, d_model=24, n_heads=2, n_kv_heads=1, head_dim=12, d_ff=36)


def tensors_of(config=CONFIG) -> dict[str, torch.Tensor]:
    """Random tensors under the names of a Llama."""
    rng = torch.Generator().manual_seed(0)
    q, kv, d, f = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_model,
                   config.d_ff)
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    for layer in range(config.n_layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
                   at + "self_attn.q_proj.weight": (q, d), at + "self_attn.k_proj.weight": (kv, d),
                   at + "self_attn.v_proj.weight": (kv, d), at + "self_attn.o_proj.weight": (d, q),
                   at + "mlp.gate_proj.weight": (f, d), at + "mlp.up_proj.weight": (f, d),
                   at + "mlp.down_proj.weight": (d, f)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def folder_of(tensors, folder, most_bytes=1 << 30, **config):
    """A folder with these tensors, as they are."""
    (folder / "config.json").write_text(json.dumps(content_of("llama", CONFIG) | config))
    if most_bytes == 1 << 30:
        save_file(tensors, folder / "model.safetensors")
    else:
        write_tensors(folder, tensors, torch.float32, most_bytes)
    return folder


def refused(*words: str):
    """A ValueError of one line that has all the words, in order."""
    return pytest.raises(ValueError, match=rf"\A(?=.*{'.*'.join(words)})[^\n]+\Z")


def test_rows_of_q_k_v_and_of_gate_up_lie_below_each_other(tmp_path):
    tensors = tensors_of()
    model = read(folder_of(tensors, tmp_path))
    layer, block = "model.layers.1.", model.blocks[1]
    qkv = torch.cat([tensors[layer + f"self_attn.{x}_proj.weight"] for x in "qkv"])
    gate_up = torch.cat([tensors[layer + f"mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(block.attn.qkv.weight, qkv) and torch.equal(block.mlp.gate_up.weight, gate_up)
    assert torch.equal(model.embed, tensors["model.embed_tokens.weight"])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


# ---- shards ----

def test_shards_are_read_and_what_the_index_does_not_name_is_not(tmp_path):
    tensors = tensors_of()
    folder = folder_of(tensors, tmp_path, most_bytes=8000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    # An older, stale shard: the same names with other numbers, and names that mean nothing.
    stale = {"model.norm.weight": torch.zeros(24), "x": torch.zeros(1)}
    save_file(stale, folder / "model-00001-of-00099.safetensors")
    # And a tensor in a file of the index, which the index does not name.
    first = load_file(folder / files[0])
    save_file(first | {"left.over": torch.zeros(1)}, folder / files[0])
    assert stored_tensors(folder).keys() == tensors.keys()
    for name, value in tensors.items():
        stored = stored_tensors(folder)[name]
        assert torch.equal(torch.cat([piece for _, piece in pieces(stored, name)]), value)
    assert torch.equal(read(folder).norm, tensors["model.norm.weight"])


def test_no_shard_is_larger_than_it_may_be_unless_one_tensor_is():
    assert shards_of({"a": 3, "b": 3, "c": 9, "d": 1, "e": 4}, 6) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_missing_shard_is_named(tmp_path):
    folder = folder_of(tensors_of(), tmp_path, most_bytes=8000)
    gone = sorted(folder.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with refused("lacks", gone[0].name, gone[1].name):
        read(folder)


def test_a_single_file_beside_an_index_of_other_files(tmp_path):
    tensors = tensors_of()
    folder = folder_of(tensors, tmp_path, most_bytes=8000)
    save_file(tensors, folder / "model.safetensors")
    with refused("remove what is old"):
        read(folder)
    # An index whose files are all gone is left over from before.
    for path in folder.glob("model-*"):
        path.unlink()
    assert torch.equal(read(folder).norm, tensors["model.norm.weight"])


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}',
                                  '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    folder = folder_of(tensors_of(), tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    why = "not valid JSON" if text == "{" else "no JSON object" if text == "[]" else "no weight_map"
    with refused("model.safetensors.index.json", why):
        read(folder)


def test_a_file_stays_open_between_tensors_until_a_piece_of_it_counts_as_memory(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(3, 1 << 20)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    reader = stored["a"].reader
    assert stored["a"].rows("a", slice(1, 3)).shape == (2,)
    first = reader.file
    stored["a"].rows("a", slice(None))
    assert reader.file is first
    assert len(list(pieces(stored["b"], "b"))) == 2 and reader.file is not first


# ---- damage ----

@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(share, tmp_path):
    path = folder_of(tensors_of(), tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with refused("model.safetensors cannot be read", "cut off"):
        read(tmp_path)


def test_a_pointer_of_git_lfs_is_refused(tmp_path):
    path = folder_of(tensors_of(), tmp_path) / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:407a7c581b\nsize 1044992\n")
    with refused("git lfs pull"):
        read(tmp_path)


def test_a_folder_without_safetensors_or_config_is_refused(tmp_path):
    folder = folder_of(tensors_of(), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refused("has neither model.safetensors nor", ".bin"):
        read(folder)
    for text in ("{", "[1]", "null", "{}"):
        (folder / "config.json").write_text(text)
        with refused("config.json"):
            read_config(folder)
    (folder / "config.json").unlink()
    with refused("has no config.json"):
        read_config(folder)


# ---- what does not belong ----

def test_one_error_lists_all_that_is_missing_too_much_or_of_another_shape(tmp_path):
    tensors = tensors_of()
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(36, 24)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(24, 24)
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(12, 24, dtype=torch.int32)
    listed = ("2 missing: ", "model.layers.0.mlp.up_proj.weight", "1 not of this model: model.layers.2.mlp",
              r"k_proj.weight is \[24, 24\] and not \[12, 24\]", "v_proj.weight is I32")
    with refused(*listed):
        read(folder_of(tensors, tmp_path))


def test_tables_of_angles_in_old_files_are_ignored(tmp_path):
    tensors = tensors_of() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    read(folder_of(tensors, tmp_path))


def test_a_redundant_head_must_be_the_embedding(tmp_path):
    tensors = tensors_of()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in dict(read(folder_of(tensors, tmp_path)).named_parameters())
    tensors["lm_head.weight"][29, 23] += 1e-3
    with refused("lm_head.weight is not the embedding", "tie_word_embeddings"):
        read(folder_of(tensors, tmp_path))


def test_an_untied_head_that_is_absent_is_missed(tmp_path):
    with refused("1 missing: lm_head.weight", "tie_word_embeddings true"):
        read(folder_of(tensors_of(), tmp_path, tie_word_embeddings=False))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors", "fp8"])
def test_other_quantised_formats_are_refused_by_name(method, tmp_path):
    folder = folder_of(tensors_of(), tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with refused("quantization_config", method):
        read(folder)


# ---- dtypes ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_files_are_read_to_the_bit(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of().items()}
    folder = folder_of(tensors, tmp_path)
    assert torch.equal(read(folder).embed, tensors["model.embed_tokens.weight"].float())
    kept = read_weights(folder, read_config(folder), CPU, dtype=dtype)
    assert torch.equal(kept.embed, tensors["model.embed_tokens.weight"])


def fp8_folder(folder, scale_dtype=torch.float32):
    """A folder whose matrices are fp8 with a scale for each block of 16 x 20; and what they stand for."""
    tensors, meant = tensors_of(), {}
    for name, weight in list(tensors.items()):
        meant[name] = weight
        if "_proj" not in name:
            continue
        n_rows, n_columns = weight.shape
        scale = torch.empty(-(-n_rows // 16), -(-n_columns // 20))
        meant[name], fp8 = torch.empty_like(weight), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = slice(16 * i, 16 * i + 16), slice(20 * j, 20 * j + 20)
                scale[i, j] = 2.0 ** -(i + 2 * j) * (1 if scale_dtype != torch.float32 else 1.1)
                fp8[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
                meant[name][block] = fp8[block].float() * scale[i, j]
        tensors |= {name: fp8, name + "_scale_inv": scale.to(scale_dtype)}
    config = {"quant_method": "fp8", "weight_block_size": [16, 20], "activation_scheme": "dynamic"}
    return folder_of(tensors, folder, quantization_config=config), tensors, meant


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_is_read_block_by_block_with_ragged_edges(scale_dtype, tmp_path):
    folder, _, meant = fp8_folder(tmp_path, scale_dtype)
    down = read(folder).blocks[0].mlp.down.weight
    expected = meant["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(down, expected, rtol=1e-2 if scale_dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(read(folder).embed, meant["model.embed_tokens.weight"])


def test_fp8_of_several_pieces_has_the_scales_of_its_own_rows(tmp_path):
    fp8 = torch.ones(300, 8192).to(torch.float8_e4m3fn)
    scale = 1.0 + torch.arange(19 * 410).reshape(19, 410)  # blocks of 16 x 20
    save_file({"w": fp8, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    stored, target = stored_tensors(tmp_path), torch.empty(300, 8192)
    assert len(list(pieces(stored["w"], "w", 16))) > 1
    copy_tensor(target, "w", stored, (16, 20))
    rows, columns = torch.arange(300) // 16, torch.arange(8192) // 20
    assert torch.equal(target, scale[rows][:, columns])


def test_fp8_with_a_scale_that_is_missing_or_misshapen_is_refused(tmp_path):
    folder, tensors, _ = fp8_folder(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    kept = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    with refused(f"1 missing: {name}"):
        read(folder)
    save_file(tensors | {name: kept[:1].clone()}, folder / "model.safetensors")
    with refused(name, r"is \[1, 2\] and not \[2, 2\]"):
        read(folder)
    save_file(tensors | {name: kept}, folder / "model.safetensors")
    edit_config(folder, quantization_config=None)
    with refused("not of this model", "F8_E4M3"):
        read(folder)


def test_fp8_is_for_matrices_with_scales_of_a_floating_dtype(tmp_path):
    folder, tensors, _ = fp8_folder(tmp_path)
    norm, down = "model.norm.weight", "model.layers.0.mlp.down_proj.weight_scale_inv"
    odd = {norm: tensors[norm].to(torch.float8_e4m3fn), down: tensors[down].to(torch.int64)}
    save_file(tensors | odd, folder / "model.safetensors")
    with refused("2 of a dtype that is not read", f"{norm} is F8_E4M3", f"{down} is I64"):
        read(folder)


@pytest.mark.parametrize("block", [[0, 0], [16, -1], [16], [True, 16], "16"])
def test_a_block_without_rows_or_columns_is_refused(block, tmp_path):
    quantised = {"quant_method": "fp8", "weight_block_size": block}
    with refused("config.json has quantization_config", "weight_block_size"):
        read(folder_of(tensors_of(), tmp_path, quantization_config=quantised))
    with refused("has quantization_config 3", "it also has hidden_act 'gelu'"):
        read(folder_of(tensors_of(), tmp_path, quantization_config=3, hidden_act="gelu"))


def test_a_block_larger_than_the_matrix_takes_no_memory(tmp_path):
    save_file({"w": torch.ones(3, 5).to(torch.float8_e4m3fn), "w_scale_inv": torch.full((1, 1), 2.0)},
              tmp_path / "model.safetensors")
    target = torch.empty(3, 5)
    copy_tensor(target, "w", stored_tensors(tmp_path), (2**31 - 1, 2**31 - 1))
    assert (target == 2).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_read(number, tmp_path):
    tensors = tensors_of()
    tensors["model.layers.1.self_attn.k_proj.weight"][7, 3] = number
    with refused("layers.1.self_attn.k_proj.weight has numbers that are not finite", "model.safetensors"):
        read(folder_of(tensors, tmp_path))


# ---- writing and memory ----

def test_what_is_written_is_what_was_there_to_the_bit(tmp_path):
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors_of().items()}
    write_tensors(tmp_path, tensors, torch.bfloat16)
    back = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older readers refuse a file without
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name].float(), tensors[name])
               for name in tensors)


def test_numbers_that_do_not_fit_are_not_written(tmp_path):
    with refused("a has numbers that are not finite in torch.float16"):
        write_tensors(tmp_path, {"a": torch.tensor([1e6])}, torch.float16)


class Allocated(TorchDispatchMode):
    """Counts the bytes of new tensors that have memory. (A CPU takes none before something is written.)"""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten._to_copy.default):
            self.n_bytes += made.nbytes if made.device.type != "meta" else 0
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_never_there_in_another_dtype(dtype, tmp_path):
    folder = folder_of(tensors_of(), tmp_path)
    with Allocated() as allocated:
        model = read_weights(folder, read_config(folder), CPU, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and torch.get_default_dtype() == torch.float32
    assert allocated.n_bytes == sum(p.nbytes for p in model.parameters())


MEASURE = """
import sys, torch
from r1zero.model.huggingface import read_config, read_weights

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

config = read_config(sys.argv[1])
before = memory("VmRSS")
model = read_weights(sys.argv[1], config, torch.device("cpu"))
print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process took")
def test_reading_takes_little_more_memory_than_the_weights(tmp_path):
    big = ModelConfig(vocab_size=40_000, n_layers=4, d_model=768, n_heads=6, n_kv_heads=3, head_dim=128,
                      d_ff=1024)
    (tmp_path / "config.json").write_text(json.dumps(content_of("llama", big)))
    with torch.device("meta"):
        assert sum(p.nbytes for p in Transformer(big).parameters()) > 170e6
    save_file(tensors_of(big), tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    taken, weights = map(int, ran.stdout.split())
    assert weights < taken < 1.2 * weights
