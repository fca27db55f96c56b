"""A made-up demo folder for tests of the report: small, quick, with everything that demo.py would leave."""
import json
import math
from html.parser import HTMLParser
from pathlib import Path

from r1zero.eval.tasks.countdown import Countdown
from r1zero.train.recipes.demo_corpus import all_attempts
from r1zero.train.report.behaviour import measure

TASK = Countdown(high=9)
CONFIG = {"run": "runs/demo", "numbers": 3, "high": 9, "ops": "+-", "documents": 40_000, "eval_problems": 12,
          "corpus": {"persistent_share": 0.1}, "seeds": "0"}
MACHINE = {"gpu": None, "cpu": "x86_64", "threads": 2, "python": "3.11.2", "versions": {"torch": "2.13.0"},
           "commit": "abc"}
N_SAMPLES = 2


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rl_rows(n: int, learns: bool) -> list[dict]:
    """Curves of the shape that training has, with jitter that is no chance."""
    rows = []
    for step in range(1, n + 1):
        up = (1 - math.exp(-step / 25)) if learns else 0.02
        jitter = 0.04 * math.sin(2.4 * step) * math.cos(1.1 * step)
        rows.append({"step": step, "accuracy": 0.29 + 0.5 * up + jitter, "format": 0.84 + 0.15 * up,
                     "length": 58 + 26 * up + 40 * jitter, "dead_groups": 0.02 + 0.2 * up,
                     "loss": -0.01 + jitter / 9, "entropy": 0.45 - 0.2 * up, "kl_to_reference": 0.12 * up,
                     "gradient_norm": 0.3, "logp_gap": 2e-6, "reward": 0.4, "truncated": 0.0,
                     "tokens": 15_000})
    return rows


def give_experts(folder: Path, seed: int = 0, n_layers: int = 5, n_experts: int = 4) -> list[dict]:
    """Make a demo one of a mixture: the first expert of layer l has 1 + l / 10 times the mean.
    Returns the rows of the log."""
    path = folder / f"seed{seed}" / "base" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        firsts = [1 + layer / 10 for layer in range(n_layers)]
        others = [[(n_experts - first) / (n_experts - 1)] * (n_experts - 1) for first in firsts]
        row["expert_load"] = [[first, *rest] for first, rest in zip(firsts, others, strict=True)]
        row |= {"expert_load_max": max(firsts), "experts_dead": 0.125, "router_entropy": 1.25}
    lines(path, rows)
    return rows


def evaluation(persistent: bool, accuracy: float, tokens: float) -> tuple[dict, list[dict]]:
    """Answers in the manner of the corpus, graded for real; the other figures are given."""
    problems = TASK.problems("test", 12)
    rows = []
    for index, problem in enumerate(problems):
        tried = all_attempts(problem.numbers, problem.target, "+-")[:6]
        for n_attempts in (next((i + 1 for i, attempt in enumerate(tried) if attempt[2]), 6), 2)[:N_SAMPLES]:
            written = tried[: n_attempts if persistent else 3]
            think = ";".join(attempt[0] for attempt in written)
            response = f"<think>{think}</think><answer>{written[-1][1]}</answer>"
            grade = TASK.grade(problem, response)
            rows.append({"index": index, "problem": {"numbers": problem.numbers, "target": problem.target},
                         "prompt": TASK.prompt(problem), "response": response, "accuracy": grade.accuracy,
                         "format": 1.0, "answer": grade.answer, "why": grade.why, "n_tokens": 60,
                         "finish_reason": "stop"})
    b = measure([p for p in problems for _ in range(N_SAMPLES)], [row["response"] for row in rows])
    figures = {"task": "countdown", "n_problems": 512, "n_samples": 4, "accuracy": accuracy,
               "accuracy_95": [accuracy - 0.03, accuracy + 0.03], "pass_at": {"1": accuracy, "4": 0.9},
               "pass_at_95": {"1": [0, 1], "4": [0, 1]}, "format_rate": 0.9, "format_rate_95": [0.88, 0.92],
               "mean_tokens": tokens, "truncated": 0.01}
    return {"eval": figures, "behaviour": b.to_dict()}, rows


TOKENS = ["<think>", "9", "+7", "=16", ",16", "-3", "=13", ",13", "-13", "=0", " ok", "</think>", "<answer>",
          "(9", "+7", ")", "-3", "</answer>", "<|eos|>"]


def group() -> dict:
    samples = []
    for n in range(8):
        accuracy, well_formed = float(n % 3 == 0), float(n != 4)
        reward = accuracy + 0.1 * well_formed
        samples.append({"tokens": TOKENS[: 12 if n == 7 else None], "accuracy": accuracy,
                        "format": well_formed, "reward": reward, "advantage": (reward - 0.4625) / 0.49,
                        "why": "The answer equals 13.", "finish_reason": "length" if n == 7 else "stop"})
    return {"step": 20, "problem": "3 7 9 -> 13", "samples": samples}


def make_demo(folder: Path, seeds=(0,), steps: int = 80) -> Path:
    """Write a whole demo into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps({
        "config": CONFIG, "machine": MACHINE, "seeds": list(seeds), "seconds": {"all": 580.0},
        "finished": "2026-11-21 12:00:00"}))
    for seed in seeds:
        place, results = folder / f"seed{seed}", {}
        lines(place / "base" / "metrics.jsonl",
              [{"step": s, "loss": 0.45 + 4 * math.exp(-s / 20), "tokens": 2048} for s in range(1, 201)])
        lines(place / "rl" / "metrics.jsonl", rl_rows(steps, True))
        lines(place / "control" / "metrics.jsonl", rl_rows(steps // 2, False))
        for part, figures in (("base", (False, 0.294, 58.2)), ("control", (False, 0.301, 57.6)),
                              ("rl", (True, 0.761 + 0.01 * seed, 82.3))):
            results[part], rows = evaluation(*figures)
            lines(place / f"eval_{part}.jsonl", rows)
        results |= {"seconds": {"pretrain": 190.0, "eval_base": 20.0, "rl": 210.0, "eval_rl": 25.0,
                                "control": 100.0, "eval_control": 20.0},
                    "tokens": {"pretrain": 2_000_000, "rl": 1_400_000, "control": 600_000},
                    "parameters": 914_000}
        (place / "results.json").write_text(json.dumps(results))
        (place / "group.json").write_text(json.dumps(group()))
    return folder


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
