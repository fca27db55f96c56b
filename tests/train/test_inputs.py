"""A run knows its inputs by content: paths may change as one likes, replaced content is refused."""
import base64
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from r1zero.model.checkpoint import CheckpointError, checkpoint_steps, load_checkpoint
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.grpo import grpo
from r1zero.train.inputs import base_parts, changes_of, file_parts, plugin_parts
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import pretrain
from r1zero.train.sft import SFTConfig, sft

from .loop_cases import SENTENCE, grpo_config, pretrain_config, save_base, text_file
from .run_cases import fails, forget, outcome


def linked(path):
    link = path.with_name(f"link_to_{path.name}")
    link.symlink_to(path)
    return link


def copied(path):
    copy = path.with_name(f"copy_of_{path.name}")
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    return copy


def moved(path):
    return path.rename(path.with_name(f"moved_{path.name}"))


# Ways to spell a path, or to put its content elsewhere.
SPELLINGS = {
    "a slash at the end": lambda path: f"{path}/" if path.is_dir() else str(path),
    "./ before it": lambda path: f"./{os.path.relpath(path)}",
    "a detour": lambda path: f"{path.parent}/../{path.parent.name}/{path.name}",
    "a link": linked,
    "a copy": copied,
    "moved": moved,
}


def sft_config(run, base, data, **changes) -> SFTConfig:
    options = dict(batch_tokens=16, micro_tokens=8, device="cpu", steps=2) | changes
    return SFTConfig(run=str(run), base=str(base), data=str(data), **options)


def pairs_file(folder, response: str = "2"):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "response": response * (1 + i % 3)}) + "\n"
                            for i in range(9)))
    return path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_content_under_another_path_goes_on(tmp_path, spelling):
    spelled = SPELLINGS[spelling]
    base, pairs, text = save_base(tmp_path / "base"), pairs_file(tmp_path), Path(text_file(tmp_path))
    sft(sft_config(tmp_path / "sft", base, pairs))
    grpo(grpo_config(tmp_path / "grpo", base, steps=1))
    pretrain(pretrain_config(tmp_path / "pretrain", str(text), steps=1))
    base, pairs, text = spelled(base), spelled(pairs), spelled(text)
    sft(sft_config(tmp_path / "sft", base, pairs, steps=3, resume=True))
    grpo(grpo_config(tmp_path / "grpo", base, steps=2, resume=True))
    pretrain(pretrain_config(tmp_path / "pretrain", str(text), steps=2, resume=True))
    assert [checkpoint_steps(tmp_path / name)[-1] for name in ("sft", "grpo", "pretrain")] == [3, 2, 2]


def test_another_base_under_the_same_path_is_refused_and_named(tmp_path, capsys):
    base, pairs = save_base(tmp_path / "base"), pairs_file(tmp_path)
    sft(sft_config(tmp_path / "sft", base, pairs))
    grpo(grpo_config(tmp_path / "grpo", base, steps=1))
    before = outcome(tmp_path / "sft"), outcome(tmp_path / "grpo")
    shutil.rmtree(base)
    save_base(base, seed=1)
    for resumed in (lambda: sft(sft_config(tmp_path / "sft", base, pairs, steps=3, resume=True)),
                    lambda: grpo(grpo_config(tmp_path / "grpo", base, steps=2, resume=True))):
        with fails(CheckpointError, "have changed: base .changed: weights..*--accept-changes"):
            resumed()
    assert (outcome(tmp_path / "sft"), outcome(tmp_path / "grpo")) == before
    capsys.readouterr()
    sft(sft_config(tmp_path / "sft", base, pairs, steps=3, resume=True, accept_changes=True))
    said = "accepted, and compared with from now on: base (changed: weights)"
    assert said in capsys.readouterr().err
    sft(sft_config(tmp_path / "sft", base, pairs, steps=4, resume=True))  # what was accepted is what it has
    assert said not in capsys.readouterr().err


def test_a_base_that_was_trained_on_is_another_one(tmp_path):
    """Its folder holds a later checkpoint then, which --base takes."""
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "base", data, steps=2))  # it keeps two checkpoints: 2 and 4
    grpo(grpo_config(tmp_path / "grpo", tmp_path / "base", steps=1))
    pretrain(pretrain_config(tmp_path / "base", data, steps=4, save_every=2, resume=True))
    with fails(CheckpointError, "base .changed: weights"):
        grpo(grpo_config(tmp_path / "grpo", tmp_path / "base", steps=2, resume=True))
    step_2 = tmp_path / "base/checkpoints/step_00000002"
    grpo(grpo_config(tmp_path / "grpo", step_2, steps=2, resume=True))
    grpo(grpo_config(tmp_path / "grpo", tmp_path / "grpo/start", steps=3, resume=True))  # the run's own copy


@pytest.mark.parametrize("kl", ["in the log", "in the loss"])
def test_the_kl_is_measured_to_the_model_of_the_start_always(tmp_path, kl):
    options = dict(kl_samples=8, steps=4)
    if kl == "in the loss":
        options["loss"] = {"kl_coef": 0.05}
    base = save_base(tmp_path / "base")
    grpo(grpo_config(tmp_path / "whole", base, **options))
    grpo(grpo_config(tmp_path / "run", base, **options | {"steps": 2}))
    shutil.rmtree(base)
    save_base(base, seed=1)
    for steps in (3, 4):  # accepted once, and not asked about again
        grpo(grpo_config(tmp_path / "run", base, resume=True, accept_changes=steps == 3,
                         **options | {"steps": steps}))
    found, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    assert [row["kl_to_reference"] for row in found] == [row["kl_to_reference"] for row in expected]
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    weights = [load_checkpoint(tmp_path / name).tensors["model"] for name in ("run", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def one_line_more(folder):
    with open(folder / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "a", "response": "b"}\n')


def another_order(folder):
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(reversed(lines)))


CHANGES = {
    "other responses": lambda folder: pairs_file(folder, "3"),
    "one line more": one_line_more,
    "another order": another_order,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_under_the_same_path_are_refused_and_named(tmp_path, change):
    base, pairs = save_base(tmp_path / "base"), pairs_file(tmp_path)
    sft(sft_config(tmp_path / "run", base, pairs))
    CHANGES[change](tmp_path)
    with fails(CheckpointError, "data .changed: .*pairs.jsonl"):
        sft(sft_config(tmp_path / "run", base, pairs, steps=3, resume=True))
    sft(sft_config(tmp_path / "run", base, pairs, steps=3, resume=True, accept_changes=True))


def test_a_folder_of_texts_is_compared_file_by_file(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"{name} {SENTENCE}" * 10)
    pretrain(pretrain_config(tmp_path / "run", str(folder), steps=1))
    moved(folder)
    folder = tmp_path / "moved_texts"
    pretrain(pretrain_config(tmp_path / "run", str(folder), steps=2, resume=True))
    (folder / "b.txt").write_text(SENTENCE)
    (folder / "c.txt").unlink()
    (folder / "d.txt").write_text("new")
    with fails(CheckpointError, "data .changed: .*b.txt, gone: .*c.txt, new: .*d.txt"):
        pretrain(pretrain_config(tmp_path / "run", str(folder), steps=3, resume=True))


def test_the_fingerprint_of_a_base_is_its_weights_shape_and_tokenizer(tmp_path):
    first = load_checkpoint(save_base(tmp_path / "first"))
    same = load_checkpoint(save_base(tmp_path / "again"))
    other = load_checkpoint(save_base(tmp_path / "other", seed=1))
    bytes_, words = Tokenizer.bytes(), Tokenizer.from_words(["12", "34"])
    assert base_parts(first, bytes_) == base_parts(same, bytes_)

    def differ(checkpoint, tokenizer) -> set:
        found, expected = dict(base_parts(checkpoint, tokenizer)), dict(base_parts(first, bytes_))
        return {name for name in expected if found[name] != expected[name]}

    assert differ(other, bytes_) == {"weights"} and differ(first, words) == {"tokenizer"}
    first_weights = first.tensors["model"]
    same.tensors["model"] = dict(reversed(first_weights.items()))  # the order of names is no content
    assert differ(same, bytes_) == set()
    same.tensors["model"] = {name: t.to(torch.bfloat16) for name, t in first_weights.items()}
    assert differ(same, bytes_) == {"weights"}
    name, tensor = next((name, t) for name, t in first_weights.items() if t.ndim == 2)
    same.tensors["model"] = first_weights | {name: tensor.reshape(-1, 2)}  # the same bytes in another shape
    assert differ(same, bytes_) == {"weights"}
    same.tensors["model"] = {f"{name}.": t for name, t in first_weights.items()}
    assert differ(same, bytes_) == {"weights"}
    same.tensors["model"] = first_weights | {"embed.weight": first_weights[next(iter(first_weights))]}
    assert differ(same, bytes_) == {"weights"}


def test_the_code_of_a_reward_of_one_s_own_is_an_input_and_that_of_ours_is_none():
    [[name, _]] = plugin_parts("json:dumps")["plugin"]
    assert Path(name) == Path(json.__file__)
    assert plugin_parts(None) == plugin_parts("r1zero.train.recipes.r1_corpus:preferences") == {}


def test_files_in_another_order_are_other_data_and_a_missing_one_is_told(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    both, swapped = file_parts([a, b]), file_parts([b, a])
    assert changes_of({"data": both}, {"data": swapped}) == "data (the same files in another order)"
    assert changes_of({"data": both}, {"data": both}) == changes_of({}, {"data": both}) == ""
    with fails(ValueError, "none cannot be read .*check the path"):
        file_parts([tmp_path / "none"])


# What a run began with, what it is resumed with, and what is said of it.
OTHER_DATA = {
    "the same file once, not twice": (("a.txt", "a.txt"), ("a.txt",), "data .gone: .*a.txt"),
    "a folder without its file besides": ((".", "a.txt"), (".",), "data .gone: .*a.txt"),
    "one of two equal files": (("a.txt", "b.txt"), ("b.txt",), "data .gone: .*b.txt"),
    "lines that are read as text": (("c.jsonl",), ("c.txt",), "kind of data .gone: .*c.jsonl, new: .*c.txt"),
}


@pytest.mark.parametrize("kind", OTHER_DATA)
def test_the_same_bytes_can_be_other_data(tmp_path, kind):
    first, then, said = OTHER_DATA[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(SENTENCE * 9)
    if "c.jsonl" in first:
        (folder / "c.jsonl").write_text(json.dumps({"text": SENTENCE * 9}) + "\n")
        (folder / "c.txt").write_bytes((folder / "c.jsonl").read_bytes())

    def config(names, **changes):
        c = pretrain_config(tmp_path / "run", "", steps=1)
        return dataclasses.replace(c, data=tuple(str(folder / name) for name in names), **changes)

    pretrain(config(first))
    with fails(CheckpointError, said):
        pretrain(config(then, steps=2, resume=True))


# ---- the model that a run of GRPO began with ----

def test_without_its_copy_the_base_must_be_the_one_of_the_start(tmp_path):
    base = save_base(tmp_path / "base")
    grpo(grpo_config(tmp_path / "run", base, steps=1))
    shutil.rmtree(tmp_path / "run/start")
    grpo(grpo_config(tmp_path / "run", base, steps=2, resume=True))
    shutil.rmtree(base)
    save_base(base, seed=1)
    with fails(CheckpointError, "start is gone, and --base is not the model that the run began with"):
        grpo(grpo_config(tmp_path / "run", base, steps=3, resume=True, accept_changes=True))
    assert checkpoint_steps(tmp_path / "run")[-1] == 2


def test_a_base_of_another_shape_or_tokenizer_is_refused_even_if_changes_are_accepted(tmp_path):
    base = save_base(tmp_path / "base")
    grpo(grpo_config(tmp_path / "run", base, steps=1))
    before = (tmp_path / "run/run.json").read_bytes()
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "wide", data, steps=1, model="depth=1"))
    with fails(CheckpointError, "made with another config: .*n_layers"):
        grpo(grpo_config(tmp_path / "run", tmp_path / "wide", steps=2, resume=True, accept_changes=True))
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=2))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ranks = tmp_path / "ranks.tiktoken"
    tokens = [bytes([n]) for n in range(256)] + [b"the"]
    ranks.write_text("".join(f"{base64.b64encode(token).decode()} {n}\n" for n, token in enumerate(tokens)))
    with fails(CheckpointError, "made with another tokenizer: the data, the base or --tokenizer has changed"):
        pretrain(pretrain_config(tmp_path / "run", data, steps=4, resume=True, tokenizer=str(ranks)))
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_of_before_fingerprints_says_that_nothing_can_be_compared(tmp_path, capsys):
    data = text_file(tmp_path)
    pretrain(pretrain_config(tmp_path / "run", data, steps=1))
    forget(tmp_path / "run", "inputs")
    pretrain(pretrain_config(tmp_path / "run", data, steps=2, resume=True))
    assert "has no fingerprints: nobody can tell whether its data changed" in capsys.readouterr().err
