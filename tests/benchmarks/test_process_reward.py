"""The benchmark of process rewards: what exists is not made again, and its tables say what was found."""
import json

from benchmarks import process_reward as bench
from r1zero.model.files import atomic_write_json

ROWS = [{"tokens": 1000.0, "steps_per_answer": 8.84}, {"tokens": 2000.0, "steps_per_answer": 24.3}]


def test_an_arm_that_has_a_file_is_read_and_the_table_adds_up_its_tokens(tmp_path, capsys):
    for name, rows in (("base", []), ("process_true", ROWS), ("both_true", [])):
        arm = {"arm": name, "seed": 3, "rows": rows, "seconds": 1.0, "accuracy": 0.5,
               "accuracy_95": [0.4, 0.6], "format_rate": 0.9, "mean_tokens": 40.4, "truncated": 0.0}
        atomic_write_json(tmp_path / f"{name}_3.json", arm)
    flags = bench.Flags(work=str(tmp_path), arms=("process true", "both, true"), seed=3)
    arms = bench.arms_of(flags)
    assert [arm["arm"] for arm in arms] == ["base", "process_true", "both_true"]
    bench.show_arms(arms)
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["process_true", "50.0%", "[40.0%,", "60.0%]", "90.0%", "40", "0.0%",
                            "8.8", "->", "24.3", "2", "3k"]


def test_a_process_reward_that_was_measured_is_not_trained_again(tmp_path, capsys):
    measured = {"AUC, its labels": [0.9, 0.85, 0.95]}
    run = tmp_path / "exact_true"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(
        {"process_reward": {"labels": "true", "answers": 9, "steps": 70, "measured": measured}}))
    found = bench.head(bench.Flags(work=str(tmp_path)), str(tmp_path / "exact.jsonl"), "true", 10, 0.1)
    bench.show_heads([found])
    assert "0.900 [0.850, 0.950]" in capsys.readouterr().out
