"""Folders of runs and of a recipe, made by hand: what the tests of costs and of model cards read."""
import json
from pathlib import Path

from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.tokenizer import Tokenizer

from ..rl.cases import tiny

SFT_ROWS = [{"tokens": 100, "tokens_per_s": 50.0}, {"tokens": 60, "tokens_per_s": 40.0}]
TIMES = {"rollout_s": 1.0, "keep_s": 0.5}
RL_ROWS = [{"tokens": 400, "replaced_tokens": 100, "length": 10.0, "step_s": 2.0, **TIMES},
           {"tokens": 200, "replaced_tokens": 0, "length": 20.0, "step_s": 3.0, **TIMES}]


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_run(folder: Path, loop: str, rows=(), record=None, settings=None, n_layers=2, **state) -> Path:
    """A run with a checkpoint of a tiny model. rows: of its log; record: of its run.json, besides what is
    always there; settings: its flags, as a checkpoint keeps them."""
    model = tiny(n_layers=n_layers)
    state = {"model_config": model.config.to_dict(), "tokenizer": Tokenizer.bytes().to_dict(), "loop": loop,
             "settings": {"seed": 0, **(settings or {})}, **state}
    save_checkpoint(folder, max(1, len(rows)), {"model": dict(model.named_parameters())}, state)
    machine = {"gpu": None, "cpu": "Some CPU", "threads": 2}
    write_json(folder / "run.json", {"config": {"steps": len(rows)}, "machine": machine,
                                     "started": "2026-01-01 10:00:00 +0000", **(record or {})})
    lines = [json.dumps({"step": number, **row}) + "\n" for number, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def collected(model: str, **changes) -> dict:
    """The summary of a collection."""
    return {"model": model, "weights": "f" * 32, "task": "countdown", "split": "train",
            "problems": 2, "sampled": 8, "kept": 3,
            "tokens": 80, "seconds": 4.0, "by_difficulty": [], **changes}


def evaluated(checkpoint: str, accuracy: float = 0.25, **changes) -> dict:
    """The summary of an evaluation: 4 x 2 answers, 96 tokens in 3 seconds."""
    return {"checkpoint": checkpoint, "task": "countdown", "n_problems": 4, "n_samples": 2,
            "mean_tokens": 12.0, "tokens_per_second": 32.0, "accuracy": accuracy, "truncated": 0.125,
            "accuracy_95": [accuracy - 0.05, accuracy + 0.05], "flags": {"temperature": 1.0}, **changes}


def make_recipe(folder: Path) -> Path:
    """A recipe: SFT, answers collected from it, and RL; whose runs' names say nothing of their order."""
    make_run(folder / "warm", "sft", SFT_ROWS, {"seconds": 5.0})
    write_json(folder / "good.jsonl.summary.json", collected("elsewhere/warm/checkpoints/step_00000002"))
    make_run(folder / "after", "grpo", RL_ROWS, {"seconds": 7.0, "started": "2026-01-02 10:00:00 +0000"})
    seconds = {"warm": 4.0, "good": 6.0, "after": 9.0, "eval_after": 2.0}
    write_json(folder / "results.json", {"seconds": seconds, "after": {"eval": evaluated("")}})
    return folder
