"""Checkpoints that nothing happens to: what is saved comes back bit for bit, and the right ones stay."""
import json
import shutil

import pytest
import torch

from r1zero.model.checkpoint import check_config, checkpoint_steps, load_checkpoint, save_checkpoint

from .checkpoint_cases import assert_sound, fails, save, two_saved


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_tensors_come_back_bit_for_bit(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, 1 / 3])
    odd.view(torch.int32)[0] = 0x7FC12345  # a NaN with something in it
    whole = torch.arange(12.0)
    group = {"odd": odd, "bf16": odd.bfloat16(), "fp64": odd.double(), "int": whole.long(), "bool": whole > 3,
             "scalar": torch.tensor(7.0), "empty": torch.empty(0, 4), "empty too": torch.empty(0, 4),
             "turned": torch.randn(3, 5).T, "whole": whole, "part": whole[2:9], "reshaped": whole.view(3, 4),
             "every other": whole[::2], "parameter": torch.nn.Parameter(torch.randn(4))}
    path = save_checkpoint(tmp_path, 7, {"model": group, "nothing": {}}, {})
    found = load_checkpoint(tmp_path)
    assert (found.step, found.path, found.tensors["nothing"]) == (7, path, {})
    back = found.tensors["model"]
    assert back.keys() == group.keys()
    for name, tensor in group.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor.detach()), name
        assert back[name].numel() == 0 or back[name].data_ptr() % 64 == 0, name  # where fresh tensors are put


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    embedding = torch.nn.Embedding(1000, 8)
    head = torch.nn.Linear(8, 1000, bias=False)
    head.weight = embedding.weight
    state = torch.nn.ModuleDict({"embedding": embedding, "head": head}).state_dict()
    path = save_checkpoint(tmp_path, 0, {"model": state}, {})
    assert (path / "model.safetensors").stat().st_size < 1.1 * embedding.weight.nbytes
    back = load_checkpoint(tmp_path).tensors["model"]
    assert back.keys() == state.keys() and back["head.weight"] is back["embedding.weight"]
    assert torch.equal(back["head.weight"], embedding.weight)


def test_state_comes_back_as_json_gives_it(tmp_path):
    state = {"lr": 0.1 + 0.2, "betas": (0.9, 0.95), 3: None, "3.0": [True, {"deep": "\ud800 ☃"}],
             "loss": float("inf")}
    save_checkpoint(tmp_path, 1, {}, state)
    assert load_checkpoint(tmp_path).state == json.loads(json.dumps(state))


def test_others_may_read_the_files_as_the_umask_says(tmp_path):
    path = two_saved(tmp_path)
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_all_three_folders_name_a_checkpoint(tmp_path):
    path = two_saved(tmp_path)
    for folder in (tmp_path, str(tmp_path), tmp_path / "checkpoints", path):
        assert_sound(load_checkpoint(folder), 2)
    assert_sound(load_checkpoint(tmp_path, 1), 1)
    shutil.copytree(path, tmp_path / "elsewhere")
    assert_sound(load_checkpoint(tmp_path / "elsewhere"), 2)
    assert checkpoint_steps(tmp_path) == [1, 2] and checkpoint_steps(tmp_path / "nowhere") == []


def test_the_last_and_the_best_stay(tmp_path):
    left = []
    for step, score in enumerate([0.1, 0.5, 0.3, float("nan"), 0.5, None, 0.6, 0.2]):
        save(tmp_path, step, keep_last=2, score=score)
        left.append((checkpoint_steps(tmp_path), load_checkpoint(tmp_path, "best").step))
    assert left == [([0], 0), ([0, 1], 1), ([1, 2], 1), ([1, 2, 3], 1), ([1, 3, 4], 1), ([1, 4, 5], 1),
                    ([5, 6], 6), ([6, 7], 6)]
    with pytest.raises(ValueError, match="keep_last is 0"):
        save(tmp_path, 9, keep_last=0)


def test_scores_of_checkpoints_that_are_gone_do_not_count(tmp_path):
    save(tmp_path, 1, score=0.9)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    save(tmp_path, 2, score=0.1)
    assert load_checkpoint(tmp_path, "best").step == 2
    save(tmp_path, 2, score=0.05)  # saved again, with another score
    save(tmp_path, 3, score=0.06)
    assert load_checkpoint(tmp_path, "best").step == 3


def test_a_run_resumed_from_an_earlier_step_keeps_what_it_saves(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=1)
    (tmp_path / "checkpoints" / "step_00000030" / "state.json").unlink()
    for step in (21, 22):
        save(tmp_path, step, keep_last=1)
    with pytest.warns(UserWarning, match="step_00000030: state.json is missing"):
        assert_sound(load_checkpoint(tmp_path), 22)


def test_best_is_asked_for_in_vain(tmp_path):
    two_saved(tmp_path)
    with fails(r"marks no checkpoint as the best.*steps \[1, 2\]"):
        load_checkpoint(tmp_path, "best")
    for text in ("{", "[]", '{"step": 9, "score": 1}', '{"step": "x"}', "[" * 100_000):
        (tmp_path / "checkpoints" / "best.json").write_text(text)
        with pytest.warns(UserWarning, match="best.json names no checkpoint"):
            assert_sound(load_checkpoint(tmp_path, "best"), 2)
    save(tmp_path, 3, score=0.0)
    (tmp_path / "checkpoints" / "step_00000003" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 4)
    with pytest.warns(UserWarning, match="using .*step_00000004 .*step_00000003: model.safetensors has 0 "):
        assert_sound(load_checkpoint(tmp_path, "best"), 4)


def test_another_config_is_told_field_by_field():
    check_config({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1.0}, "run")
    with fails(r"run was made with another config: layers is 4 there and 6 here; new is missing there and "
               r"True here; old is \[1\] there and missing here. Use the settings"):
        check_config({"layers": 4, "same": 1, "old": (1,)}, {"layers": 6, "same": 1, "new": True}, "run")
