"""What the tests of runs share: what a run left, how it is broken off, and errors of one line."""
import gzip
import json
import zlib
from pathlib import Path

import pytest
import torch

from r1zero.model.checkpoint import checkpoint_steps, load_checkpoint
from r1zero.model.config import preset
from r1zero.model.transformer import Transformer
from r1zero.train.fit import fit
from r1zero.train.log import read_metrics
from r1zero.train.pretrain import PretrainConfig, inputs_of, text_batches
from r1zero.train.run import Run

from .loop_cases import TIMES


def outcome(run: Path) -> dict:
    """What a run left and what must not depend on its past: the bytes of its checkpoints, its log."""
    files = {str(path.relative_to(run)): path.read_bytes()
             for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()}
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)]
    return {"files": files, "rows": rows, "samples": kept_samples(run)}


def kept_samples(run: Path) -> list[dict]:
    """Every line of rollouts.jsonl.gz and the parts after it, read by Python's gzip alone."""
    samples = []
    for path in sorted(run.glob("rollouts*.jsonl.gz"), key=lambda path: (len(path.name), path.name)):
        with gzip.open(path, "rt") as file:
            samples += [json.loads(line) for line in file]
    return samples


def assert_same(run: Path, expected: dict) -> None:
    found = outcome(run)
    assert found["rows"] == expected["rows"], f"{run}: the logs differ"
    assert found["samples"] == expected["samples"], f"{run}: other completions are kept"
    for name, data in expected["files"].items():  # killed before it removed an old one, it has more
        assert found["files"].get(name) == data, f"{run}: {name} differs"


def fails(kind: type, match: str):
    """The next lines raise `kind`, in one line, with a message like `match`."""
    return pytest.raises(kind, match=rf"\A(?=.*{match})[^\n]+\Z")


def finite(folder) -> bool:
    """Whether the last checkpoint holds no NaN and no infinity."""
    groups = load_checkpoint(folder).tensors.values()
    return all(torch.isfinite(tensor).all() for group in groups for tensor in group.values())


def pretrain_on_text(config: PretrainConfig, run_class: type = Run, spoil=lambda step, model: None) -> None:
    """`pretrain` on a text file, with another kind of Run, or with spoil(step, model) before each step."""
    tokenizer, batches, _ = text_batches(config)
    model = Transformer(preset(config.model, tokenizer.vocab_size)).init_weights(config.seed)

    class Spoiled:
        def batch(self, step: int):
            spoil(step, model)
            return batches.batch(step)

    run = run_class(config, "pretrain")
    run.check_inputs(inputs_of(config))
    with run:
        fit(run, model, tokenizer, Spoiled(), config)


class Broken(BaseException):
    """The end of a run that a test breaks off. It is no Exception: nothing is saved before it, as before a
    kill."""


def broken_at(monkeypatch, step: int, loop, config) -> None:
    """Run a loop that ends without warning as soon as `step` is logged, before it is saved."""
    log = Run.log

    def breaking(run, at, *rest, **options):
        log(run, at, *rest, **options)
        if at + 1 == step:
            raise Broken

    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(Run, "log", breaking)
        loop(config)


def forget(run, *names: str) -> None:
    """Make the last checkpoint one of an r1zero that did not know these settings and parts of its state."""
    path = run / "checkpoints" / f"step_{checkpoint_steps(run)[-1]:08d}" / "state.json"
    document = json.loads(path.read_text())
    state = document["content"]["state"]
    for name in names:
        part, _, inner = name.rpartition(".")
        (state["settings"][part] if part else state["settings"]).pop(inner, None)
        state.pop(name, None)
    document["crc32"] = zlib.crc32(json.dumps(document["content"]).encode())
    path.write_text(json.dumps(document))
