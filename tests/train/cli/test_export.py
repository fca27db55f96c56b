"""r1zero export: the folder, and a model card that says what is known and nothing else."""
import json

import pytest

from r1zero.model.checkpoint import load_checkpoint, mark_best, save_checkpoint
from r1zero.model.huggingface import read_model
from r1zero.model.tokenizer import Tokenizer
from r1zero.train.cli.export import ExportConfig, export
from r1zero.train.cli.main import main
from r1zero.train.machine import pick_device

from ...rl.cases import tiny
from ..cost_cases import RL_ROWS, evaluated, make_run

SETTINGS = {"base": "/home/somebody/models/base-1b", "algo": "dapo", "seed": 3,
            "task": {"name": "countdown", "data": "/data/private/countdown.jsonl"}}


def trained(folder, step=7, score=None, seed=0):
    """A run of GRPO with one checkpoint."""
    model = tiny(seed)
    state = {"model_config": model.config.to_dict(), "tokenizer": Tokenizer.bytes().to_dict(),
             "settings": SETTINGS, "loop": "grpo", "score": score}
    save_checkpoint(folder, step, {"model": dict(model.named_parameters())}, state, keep_last=9)
    return folder


def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_the_card_says_where_the_weights_come_from(tmp_path):
    run = trained(tmp_path / "run", score=0.5)
    export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    text = card(tmp_path / "out")
    n_parameters = f"{sum(p.numel() for p in tiny().parameters()):,} parameters"
    for word in ("# out", n_parameters, "`r1zero grpo`, step 7", "base: `base-1b`", "algorithm: `dapo`",
                 '"seed": 3', "task: `countdown`, problems from `countdown.jsonl`", "(pass@1): 50.0%"):
        assert word in text, word
    assert "somebody" not in text and "private" not in text
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_the_card_has_what_was_measured_of_this_checkpoint_and_of_no_other(tmp_path):
    run = trained(tmp_path / "run")
    at = "runs/rl/checkpoints/step_{:08}".format
    for name, content in (("eval_countdown_step7", evaluated(at(7))),
                          ("eval_countdown_step3", evaluated(at(3), 0.875)), ("broken", {"step": 7})):
        (run / f"{name}.jsonl.summary.json").write_text(json.dumps(content, indent=1))
    (run / "torn.summary.json").write_text('{"checkpoint": ')
    export(ExportConfig(run=str(run), out=str(tmp_path / "out")))
    text = card(tmp_path / "out")
    assert "| countdown | 25.0% [20.0%, 30.0%] | 4 | 2 | 1.0 | 12.5% |" in text and "87.5%" not in text
    assert "Nothing on held-out problems" not in text


def test_the_card_of_a_run_has_its_cost_and_its_limits_and_that_of_other_weights_has_not(tmp_path):
    run = make_run(tmp_path / "rl", "grpo", RL_ROWS, {"seconds": 5.0}, SETTINGS)
    export(ExportConfig(run=str(run), out=str(tmp_path / "one")))
    text = card(tmp_path / "one")
    assert "\n| rl | grpo | 5.0 | 600 | 500 | " in text and "\n## Limits\n\n- Nothing" in text
    export(ExportConfig(run=str(tmp_path / "one"), out=str(tmp_path / "two")))
    text = card(tmp_path / "two")
    assert "## Cost" not in text and "## Measured\n\nNothing on held-out problems." in text


def test_the_card_names_the_license_and_the_base_that_the_flags_give(tmp_path):
    run = trained(tmp_path / "run")
    flags = ExportConfig(run=str(run), out=str(tmp_path / "out"), license="apache-2.0",
                         base_model="Qwen/Qwen2.5-0.5B")
    export(flags)
    head = card(tmp_path / "out").split("---")[1].splitlines()
    assert 'license: "apache-2.0"' in head and 'base_model: "Qwen/Qwen2.5-0.5B"' in head
    export(ExportConfig(run=str(run), out=str(tmp_path / "plain")))
    head = card(tmp_path / "plain").split("---")[1]
    assert "license" not in head and "base_model" not in head


def test_a_checkpoint_may_be_chosen_and_the_dtype(tmp_path):
    run = trained(tmp_path / "run", step=3, seed=1)
    trained(run, step=7)
    mark_best(run, 3, 0.5)
    export(ExportConfig(run=str(run), which="best", out=str(tmp_path / "best"), dtype="bf16"))
    model, _ = read_model(tmp_path / "best", pick_device("cpu"))
    assert (model.embed == load_checkpoint(run, 3).tensors["model"]["embed"].bfloat16().float()).all()
    assert json.loads((tmp_path / "best/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_folder_that_was_not_trained_says_so(tmp_path):
    export(ExportConfig(run=str(trained(tmp_path / "run")), out=str(tmp_path / "one")))
    export(ExportConfig(run=str(tmp_path / "one"), out=str(tmp_path / "two")))
    assert "The weights of `one`, not trained any further." in card(tmp_path / "two")
    first, second = (read_model(tmp_path / name, pick_device("cpu"))[0] for name in ("one", "two"))
    assert all((a == b).all() for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("words, why", [
    (["--dtype", "int8"], "--dtype is 'int8', expected one of fp32, bf16, fp16"),
    (["--which", "9"], "no checkpoint 9"),
    (["--run", "nowhere"], "nowhere does not exist"),
])
def test_bad_flags_are_one_line_and_write_nothing(words, why, tmp_path, capfd):
    run = trained(tmp_path / "run")
    given = {"--run": str(run), "--out": str(tmp_path / "out")} | dict([words])
    assert main(["export", *(word for pair in given.items() for word in pair)]) == 2
    error = capfd.readouterr().err.strip()
    assert why in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused_before_the_model_is_loaded(tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["export", "--run", "nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capfd.readouterr().err
