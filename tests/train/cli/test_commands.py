"""What stands beside the training loops: the model as a sampler, and the commands eval and grade."""
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from r1zero.eval.harness import Sampled, evaluate
from r1zero.eval.response import response_text
from r1zero.eval.result_file import fingerprint
from r1zero.eval.sampler import ModelSampler
from r1zero.eval.tasks.catalogue import make_task
from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.config import preset
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli.eval import EvalConfig, choose_problems, load_run, run_eval
from r1zero.train.cli.grade import GradeConfig, grade
from r1zero.train.cli.main import main
from r1zero.train.task_flags import TaskFlags

BYTES = Tokenizer.bytes()
GSM8K = [{"question": "Two hens lay 3 eggs each. How many?", "answer": "2*3 = 6 #### 6"},
         {"question": "One of 1,234 coins is lost.", "answer": "#### 1,233"},
         {"question": "Why? " * 60 + "How much is $3 and $4?", "answer": "#### 7"}]
COUNTDOWN = {"numbers": [3, 7, 9], "target": 13, "response": "<answer>(9-3)+7</answer>"}


def model_of(weight: float | None = None) -> Transformer:
    model = Transformer(preset("tiny", BYTES.vocab_size), torch.float32).init_weights(0)
    if weight is not None:
        torch.nn.init.constant_(model.embed, weight)
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, of steps 1 and 3: one with random weights, and one whose weights are NaN."""
    folder = tmp_path_factory.mktemp("runs")
    for name, weight in (("text", None), ("nan", float("nan"))):
        model = model_of(weight)
        state = {"settings": {}, "model_config": model.config.to_dict(), "tokenizer": BYTES.to_dict()}
        for step in (1, 3):
            save_checkpoint(folder / name, step, {"model": dict(model.named_parameters())}, state)
    return folder


def write_lines(path, rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, argv, fragment, code=2):
    assert main(argv) == code
    out, error = capsys.readouterr()
    assert fragment in error.splitlines()[-1] and "Traceback" not in error and out == "", error


# ---- the sampler ----

def test_responses_depend_on_seed_problem_and_sample_and_on_nothing_else():
    model, prompts = model_of(), ["same"] * 3 + ["another prompt", "x"]
    whole = ModelSampler(model, BYTES, 12, seed=5)(prompts, 3)
    one_by_one = ModelSampler(model, BYTES, 12, seed=5)
    assert [one_by_one([prompt], 3)[0] for prompt in prompts] == whole
    assert [group[:2] for group in whole] == ModelSampler(model, BYTES, 12, seed=5)(prompts, 2)
    assert len({r.text for group in whole[:3] for r in group}) == 9  # the same prompt, nine random numbers
    assert ModelSampler(model, BYTES, 12, seed=6)(prompts, 3) != whole
    for p, s in ((0, 0), (3, 2), (4, 1)):
        seed = int(sample_seeds(3, 5, p)[s])
        naive = generate_naive(model, Request(BYTES.encode(prompts[p]), 12, seed, stop_ids=(BYTES.eos_id,)))
        tokens = tuple(naive.tokens.tolist())
        text = response_text(BYTES, tokens)
        assert whole[p][s] == Sampled(text, len(tokens), naive.finish_reason, tokens)


def test_a_long_prompt_is_refused_or_cut_and_counted():
    model, long = model_of(), "".join(map(chr, range(33, 127))) * 3  # 282 bytes, max_seq_len 256
    strict = ModelSampler(model, BYTES, 250)
    with pytest.raises(ValueError, match="max_seq_len 256"):
        strict([long], 1)
    cutting = ModelSampler(model, BYTES, 250, cut_prompts=True)
    assert cutting.cut_message() is None
    cut = cutting([long, "abcdef", "abcdefg"], 1)
    assert cut == ModelSampler(model, BYTES, 250)([long[-6:], "abcdef", "bcdefg"], 1)
    assert (cutting.n_cut, cutting.n_prompts) == (2, 3)
    assert cutting.cut_message().startswith("2 of 3 prompts are longer than the 6 tokens")
    for wrong in (0, -1, 256, 1000):
        with pytest.raises(ValueError, match=rf"max_new_tokens is {wrong}, .* expected 1 to 255"):
            ModelSampler(model, BYTES, wrong)


# ---- eval ----

def test_gsm8k_from_a_file_with_long_prompts(runs, tmp_path, capsys):
    data = write_lines(tmp_path / "test.jsonl", GSM8K)
    argv = ["eval", "--run", str(runs / "text"), "--task", "gsm8k", "--data", data, "--max-new-tokens", "8"]
    assert main([*argv, "--samples", "2"]) == 0
    out, error = capsys.readouterr()
    assert "gsm8k: 3 problems x 2 samples" in out and "pass@2" in out and "[0.0%, 56.1%]" in out
    assert error.count("r1zero eval: warning: 1 of 3 prompts are longer than the 248 tokens") == 1
    rows = read_lines(runs / "text" / "eval_gsm8k_test_step3.jsonl")
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2] and rows[2]["problem"]["gold"] == "1,233"
    summary = json.loads((runs / "text" / "eval_gsm8k_test_step3.jsonl.summary.json").read_text())
    assert (summary["step"], summary["n_problems"], summary["prompts_cut"]) == (3, 3, 1)
    assert summary["accuracy"] == 0 and summary["flags"]["task"]["data"] == data
    # The same responses in batches of one, from the same weights at another step, to a file of the user's.
    kept = tmp_path / "deep" / "kept.jsonl"
    assert main([*argv, "--samples", "2", "--batch", "1", "--which", "1", "--out", str(kept)]) == 0
    assert read_lines(kept) == rows and (tmp_path / "deep" / "kept.jsonl.summary.json").exists()
    assert main([*argv[:2], str(runs / "text/checkpoints/step_00000001"), *argv[3:], "--n", "1"]) == 0
    assert len(read_lines(runs / "text" / "eval_gsm8k_test_step1.jsonl")) == 4


def test_math_from_a_file_with_votes_and_speed(runs, tmp_path, capsys):
    data = write_lines(tmp_path / "test.jsonl", [{"problem": "Half of 3?", "answer": "\\frac{3}{2}"}] * 3)
    argv = ["eval", "--run", str(runs / "text"), "--task", "math", "--data", data, "--max-new-tokens", "8"]
    assert main([*argv, "--samples", "4", "--ks", "1", "2", "4"]) == 0
    out = capsys.readouterr().out
    for piece in ("math: 3 problems x 4 samples", "maj@2 ", "maj@4 ", "cut off  ", "tokens per second"):
        assert piece in out
    summary = json.loads((runs / "text" / "eval_math_test_step3.jsonl.summary.json").read_text())
    assert summary["maj_at"] == {"1": 0, "2": 0, "4": 0} and set(summary["maj_at_95"]) == {"1", "2", "4"}
    assert summary["tokens_per_second"] > 0 and 0 <= summary["truncated"] <= 1
    assert main(["grade", "--task", "math", "--answer", "\\frac32", "--response", "so \\boxed{1.5}"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1
    assert main(["grade", "--task", "math", "--answer", "\\frac{", "--response", "7"]) == 2
    assert "the right answer" in capsys.readouterr().err


def test_how_many_problems(tmp_path):
    gsm8k = make_task("gsm8k", path=write_lines(tmp_path / "t.jsonl", GSM8K * 200))
    small, arithmetic = make_task("countdown", n_numbers=2, high=5), make_task("arithmetic")
    assert [len(choose_problems(task, None)) for task in (gsm8k, arithmetic)] == [600, 512]
    assert len(choose_problems(make_task("countdown"), None)) == 512
    assert len(choose_problems(small, None)) == small.size("test") < 20
    with pytest.raises(ValueError, match="--n is 601, but gsm8k has 600 test problems"):
        choose_problems(gsm8k, 601)


@pytest.mark.parametrize("flags, fragment", [
    ("--n 0", "--n is 0"), ("--samples 0", "--samples is 0"), ("--batch 0", "--batch is 0"),
    ("--ks 1 5", "--ks has 5"), ("--ks 0", "--ks has 0"), ("--temperature -1", "--temperature is -1.0"),
    ("--temperature nan", "--temperature is nan"), ("--temperature inf", "--temperature is inf"),
    ("--max-new-tokens 0", "--max-new-tokens is 0"), ("--max-new-tokens 256", "expected 1 to 255"),
    ("--which best", "marks no checkpoint as the best"), ("--which 2", "no checkpoint 2"),
    ("--which newest", "'newest'"), ("--n 99999", "--n is 99999"), ("--device tpu", "'tpu'"),
    ("--task chess", "'chess'"), ("--task gsm8k", "--data FILE"), ("--task gsm8k --data DATA", "line 2"),
    ("--task gsm8k --data DATA --out DATA", "would be lost"), ("--data DATA", "makes its own"),
    ("--out OUTER", "it is a folder"), ("--out OUTER/bad.jsonl/x", "is not a folder"),
    ("--task gsm8k --data DATA --out OUTER/./bad.jsonl", "would be lost"), ("--out /dev/null", "give a file"),
    ("--run OUTER/none", "does not exist"),
    ("--run RUNS", "holds several runs; give one of them: "), ("--run DATA", "is a file"),
])
def test_eval_refuses(flags, fragment, runs, tmp_path, capsys):
    data = write_lines(tmp_path / "bad.jsonl", [GSM8K[0], '{"question": "?", "answer": "no number"}'])
    words = flags.replace("DATA", data).replace("OUTER", str(tmp_path)).replace("RUNS", str(runs)).split()
    run = [] if "--run" in words else ["--run", str(runs / "text")]
    before = sorted(runs.rglob("*"))
    refused(capsys, ["eval", *run, *words], fragment)
    assert sorted(runs.rglob("*")) == before and len(read_lines(tmp_path / "bad.jsonl")) == 2


def test_a_broken_off_eval_leaves_the_earlier_result_whole(runs, tmp_path, capsys):
    """Both files of the call before, whatever broke this one off; a refused one touches nothing."""
    out, summary = tmp_path / "e.v1", tmp_path / "e.v1.summary.json"
    argv = ["eval", "--run", str(runs / "text"), "--n", "4", "--samples", "1", "--max-new-tokens", "2"]
    argv += ["--batch", "2", "--out", str(out)]
    assert main(argv) == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept.keys() == {"e.v1", "e.v1.summary.json"}
    nan = [*argv[:2], str(runs / "nan"), *argv[3:]]
    assert main(nan) == 1 and main([*argv, "--which", "7"]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept

    # The summary says which responses it sums up, so a kill between the two renames can be noticed.
    record = json.loads(summary.read_text())
    assert record["responses"] == {"file": "e.v1", **fingerprint(out)} and record["responses"]["lines"] == 4
    evaluate(ModelSampler(model_of(), BYTES, 2, seed=9), make_task("countdown"),
             make_task("countdown").problems("test", 4), out=out, progress=False)  # killed before its summary
    assert json.loads(summary.read_text()) == record
    assert record["responses"] != {"file": "e.v1", **fingerprint(out)}
    # Names that differ behind the last dot have summaries of their own.
    assert main([*argv[:-1], str(tmp_path / "e.v2")]) == 0 and json.loads(summary.read_text()) == record


def test_weights_that_are_nan_end_eval_and_chat_with_code_1(runs, capsys):
    refused(capsys, ["eval", "--run", str(runs / "nan"), "--n", "2"], "are NaN or infinite", code=1)
    assert main(["chat", "--run", str(runs / "nan"), "--problem", "x"]) == 1


# ---- grade ----

def graded(capsys, *argv) -> list[dict]:
    assert main(["grade", *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("task, problem, right, wrong", [
    ("countdown", ["--problem", "3 7 9 -> 13"], "<answer>(9-3)+7</answer>", "<answer>9+7-3-0</answer>"),
    ("gsm8k", ["--answer", "so #### 1,042"], "that is #### 1042", "1042"),
    ("arithmetic", ["--problem", "17-25="], "<answer>-8</answer>", "<answer>8</answer>"),
])
def test_one_response(task, problem, right, wrong, capsys):
    flags = ["--task", task, *problem, "--rewards.accuracy-weight", "2", "--rewards.format-weight", "0.5"]
    [row] = graded(capsys, *flags, "--response", right)
    assert (row["accuracy"], row["format"], row["reward"]) == (1, 0, 2) and "<think>" in row["why"]
    [row] = graded(capsys, *flags, "--response", wrong)
    assert row["accuracy"] == row["reward"] == 0 and row["why"]
    if "<" in right:
        [row] = graded(capsys, *flags, "--response", f"<think></think>{right}")
        assert row["reward"] == 2.5
    [row] = graded(capsys, *flags, "--response", "")
    assert row["reward"] == 0 and row["answer"] is None


def test_a_file_of_responses(tmp_path, capsys):
    inner = {"problem": {"numbers": [1, 2], "target": 3}, "answer": "9", "response": "<answer>2+1</answer>"}
    # A lone surrogate, escaped, and a line separator as it is.
    odd = json.dumps({**COUNTDOWN, "response": "\ud800 _ x"}).replace("_", "\u2028")
    path = write_lines(tmp_path / "in.jsonl", [COUNTDOWN, "", inner, odd])
    assert main(["grade", "--input", path]) == 0
    out, error = capsys.readouterr()
    rows = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [(row["line"], row["accuracy"]) for row in rows] == [(1, 1), (3, 1), (4, 0)]
    assert error == "3 responses: accuracy 66.7%, well formed 0.0%, mean reward 0.667\n"
    assert main(["grade", "--input", path, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out == "" and read_lines(tmp_path / "out.jsonl") == rows
    numbers = [{"answer": 18, "response": "#### 18"}, {"answer": "x #### 18", "response": "#### $18.00"},
               {"answer": 2.5, "response": "#### 2.50"}, {"answer": "18", "response": "#### 81"}]
    path = write_lines(tmp_path / "gsm8k.jsonl", numbers)
    assert [row["accuracy"] for row in graded(capsys, "--task", "gsm8k", "--input", path)] == [1, 1, 1, 0]


def test_grade_has_every_part_that_has_a_weight(tmp_path, capsys, monkeypatch):
    (tmp_path / "graded_of_the_tests.py").write_text("def long(samples):\n"
                                                     "    return [len(sample.text) for sample in samples]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    right, wrong = "<think>9-7=2,3+2=6</think><answer>9-3+7</answer>", "<answer>9</answer>"
    problem = {"numbers": [3, 7, 9], "target": 13}
    other = {"numbers": [1, 2], "target": 3, "response": "<answer>2+1</answer>", "n_tokens": 5}
    lines = [{**problem, "response": right, "n_tokens": 30}, other,
             {**problem, "response": wrong, "n_tokens": 10}, {**problem, "response": right, "n_tokens": 10}]
    flags = ["--rewards.efficiency-weight", "0.5", "--rewards.coherence-weight", "0.1",
             "--rewards.plugin", "graded_of_the_tests:long", "--rewards.plugin-weight", "0.01"]
    argv = ["grade", "--input", write_lines(tmp_path / "in.jsonl", lines), *flags]
    assert main(argv) == 0
    out, error = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["efficiency"] for row in rows] == [-0.5, 0, 0, 0.5]
    assert [row["coherence"] for row in rows] == [0.5, 0, 0, 0.5] and rows[2]["long"] == len(wrong)
    assert rows[0]["reward"] == pytest.approx(1.2 - 0.25 + 0.05 + 0.01 * len(right))
    assert "coherence 0.250, long 33.500, efficiency 0.000, mean reward" in error
    [row] = graded(capsys, "--problem", "3 7 9 -> 13", "--response", right, *flags)
    assert "efficiency" not in row and row["reward"] == pytest.approx(1.2 + 0.05 + 0.01 * len(right))
    for bad in ("7", -1, 1.5):
        path = write_lines(tmp_path / "bad.jsonl", [{**other, "n_tokens": bad}])
        refused(capsys, ["grade", "--input", path], "expected a whole number")
    lone = write_lines(tmp_path / "lone.jsonl", lines[:2])
    assert main(["grade", "--input", lone, *flags[:2]]) == 0
    assert "efficiency is left out: it compares" in capsys.readouterr().err
    refused(capsys, ["grade", "--task", "arithmetic", "--problem", "1+1", "--response", "2", *flags[2:4]],
            "coherence does not apply to the task arithmetic")
    sys.modules.pop("graded_of_the_tests")


@pytest.mark.parametrize("task, field", [("gsm8k", "question"), ("jsonl", "prompt")])
def test_efficiency_compares_answers_to_one_question_and_no_others(task, field, tmp_path, capsys):
    def found(*questions):
        lines = [{field: question, "answer": "18", "response": "<answer>18</answer>", "n_tokens": 10 * n}
                 for n, question in enumerate(questions, 1)]
        path = write_lines(tmp_path / "in.jsonl", lines)
        argv = ["grade", "--task", task, "--input", path, "--rewards.efficiency-weight", "1"]
        assert main(argv) == 0
        out, error = capsys.readouterr()
        return [json.loads(line).get("efficiency") for line in out.splitlines()], error
    earned, error = found("", "Eggs?", "", "Hens?", "Eggs?")
    assert earned == [0, 0.5, 0, 0, -0.5] and "left out" not in error
    earned, error = found("", "")
    assert earned == [None, None] and "efficiency is left out: it compares" in error


@pytest.mark.parametrize("name", ["countdown", "gsm8k", "arithmetic"])
def test_grading_what_eval_wrote_gives_the_same_words(name, tmp_path, capsys):
    """In a line of eval, `answer` is what the model said; taken for the right one, all would be right."""
    task = make_task(name, **({"path": write_lines(tmp_path / "t.jsonl", GSM8K)} if name == "gsm8k" else {}))
    again = f"\nQuestion: {GSM8K[0]['question']}\nAnswer: <answer>6</answer>"  # the question, said again
    answers = iter([again, "<answer>6</answer>", "<think></think><answer>7</answer>"] * 9)

    def sampler(prompts, n_samples):
        return [[Sampled(next(answers), 1, "stop") for _ in range(n_samples)] for _ in prompts]
    evaluate(sampler, task, task.problems("test", 3), 3, out=tmp_path / "e.jsonl", progress=False)
    keys = ("accuracy", "format", "answer")
    found = graded(capsys, "--task", name, "--input", str(tmp_path / "e.jsonl"))
    assert [[row[key] for key in keys] for row in found] == [
        [row[key] for key in keys] for row in read_lines(tmp_path / "e.jsonl")]


NAN, INF = float("nan"), float("inf")
BAD_LINES = [("countdown", line) for line in ("[1]", "{", "null", "1" * 5000, "[" * 100_000, {})]
BAD_LINES += [("countdown", {**COUNTDOWN, "numbers": numbers}) for numbers in (
    "3 7 9", [], [1] * 7, [True, 7, 9], [-3, 7, 9], [3, 7, 10**9], None, [3, 7.5, 9],
    ["3", "x", 9], [[3], 7])]
BAD_LINES += [("countdown", {**COUNTDOWN, "target": target}) for target in (
    13.5, None, NAN, INF, True, "13.5", "x", "1e3", -(10**9), 10**400)]
BAD_LINES += [("countdown", json.dumps({**COUNTDOWN, "target": 0}).replace(": 0", ": 1e400"))]
BAD_LINES += [("countdown", {**COUNTDOWN, "finish_reason": 3})]
BAD_LINES += [("countdown", {**COUNTDOWN, "response": None}), ("countdown", {**COUNTDOWN, "problem": {}})]
BAD_LINES += [("gsm8k", {"response": "x", "answer": answer}) for answer in (
    "twelve", None, True, [12], NAN, -INF, 10**400, 1e300, "####")]
BAD_LINES += [("arithmetic", {"response": "x", "expression": expression}) for expression in (
    "1/2", "2**9", "", 7, "__import__('os')", "9" * 400)]


@pytest.mark.parametrize("task, line", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(task, line, tmp_path, capsys):
    good = {**COUNTDOWN, "answer": "12", "expression": "1+1"}
    path = write_lines(tmp_path / "in.jsonl", [good, line])
    argv = ["grade", "--task", task, "--input", path, "--out", str(tmp_path / "out")]
    refused(capsys, argv, "in.jsonl, line 2: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, fragment", [
    (b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "No such file")])
def test_a_file_that_cannot_be_read(content, fragment, tmp_path, capsys):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    refused(capsys, ["grade", "--input", str(tmp_path / "in.jsonl")], fragment)


@pytest.mark.parametrize("argv, fragment", [
    ([], "either --input FILE.jsonl or --response TEXT"),
    (["--input", "f", "--response", "x"], "either --input"),
    (["--input", "f", "--problem", "1 2 -> 3"], "--problem goes with --response"),
    (["--response", "x"], "needs --problem beside it; got neither"),
    (["--task", "gsm8k", "--response", "x", "--problem", "1"], "needs --answer beside it; got --problem"),
    (["--response", "x", "--problem", "3 7 13"], "like 3 7 9 -> 13"), (["--task", "chess"], "'chess'"),
    (["--task", "gsm8k", "--response", "x", "--answer", "many"], "expected a number"),
    (["--task", "arithmetic", "--response", "x", "--problem", "1+"], "not valid arithmetic"),
    (["--response", "x", "--problem", "1 2 -> 3", "--out", "/dev/null/x"], "/dev/null is not a folder"),
    (["--input", "in.jsonl", "--out", "./in.jsonl"], "would be lost")])
def test_grade_refuses(argv, fragment, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [COUNTDOWN])
    refused(capsys, ["grade", *argv], fragment)
    assert read_lines(tmp_path / "in.jsonl") == [COUNTDOWN]


def test_a_line_that_was_cut_off_earns_no_format(tmp_path, capsys):
    whole = {**COUNTDOWN, "response": "<think></think><answer>(9-3)+7</answer>"}
    reasons = [{}, {"finish_reason": "stop"}, {"finish_reason": None}, {"finish_reason": "length"}]
    path = write_lines(tmp_path / "in.jsonl", [{**whole, **reason} for reason in reasons])
    rows = graded(capsys, "--input", path)
    assert [(row["accuracy"], row["format"]) for row in rows] == [(1, 1), (1, 1), (1, 1), (1, 0)]
    assert "cut off" in rows[3]["why"]


def test_bad_lines_are_named_at_once_or_skipped_and_counted(tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", [COUNTDOWN, "{", COUNTDOWN, {"numbers": [1]}])
    refused(capsys, ["grade", "--input", path], "in.jsonl, line 2: not JSON")
    refused(capsys, ["grade", "--input", path], "; line 4: ")
    assert main(["grade", "--input", path, "--skip-bad"]) == 0
    out, error = capsys.readouterr()
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 3]
    assert "skipped 2 of 4 lines" in error and "2 responses: " in error
    refused(capsys, ["grade", "--response", "x", "--problem", "1 2 -> 3", "--skip-bad"], "--skip-bad is for")


def test_an_eval_without_bad_lines_counts_them_in_its_summary(runs, tmp_path, capsys):
    data = write_lines(tmp_path / "t.jsonl", [GSM8K[0], "{", GSM8K[1], {"question": "?", "answer": True}])
    argv = ["eval", "--run", str(runs / "text"), "--task", "gsm8k", "--data", data, "--samples", "1"]
    argv += ["--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    refused(capsys, argv, "line 4: ")
    assert main([*argv, "--skip-bad"]) == 0 and "skipped 2 of 4 lines" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert (summary["lines_skipped"], summary["n_problems"]) == (2, 2)
    assert len(read_lines(tmp_path / "out")) == 2
    refused(capsys, ["eval", "--run", str(runs / "text"), "--skip-bad"], "--skip-bad is for a task that")


class Gone:
    """A stream whose reader has gone, as a pipe or a terminal can."""

    def write(self, text=""):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write

    def isatty(self):
        return False


class GoneLate(Gone):
    """One that keeps what is written until it is flushed."""

    def write(self, text):
        return len(text)


def test_what_is_shown_never_fails_an_eval(runs, tmp_path):
    config = EvalConfig(run=str(runs / "text"), n=2, samples=1, max_new_tokens=2, out=str(tmp_path / "out"))
    for where in (redirect_stdout, redirect_stderr):
        with where(Gone()):
            assert run_eval(config).n_problems == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.summary.json"]
        (tmp_path / "out").unlink()


def test_the_grades_are_the_product_and_their_summary_is_not(tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", [COUNTDOWN])
    with redirect_stderr(Gone()):
        assert len(grade(GradeConfig(input=path))) == 1
    for stdout in (Gone(), GoneLate()):
        with pytest.raises(BrokenPipeError), redirect_stdout(stdout):
            grade(GradeConfig(input=path))
    assert "responses: accuracy" not in capsys.readouterr().err


def test_grades_in_a_file_replace_it_when_all_are_written_and_never_the_input(tmp_path, capsys):
    source, out = write_lines(tmp_path / "in.jsonl", [COUNTDOWN]), tmp_path / "out"
    out.write_text("earlier")
    for other in ("soft", "in.jsonl.partial"):
        (tmp_path / other).symlink_to(source)
        refused(capsys, ["grade", "--input", source, "--out", str(tmp_path / other).removesuffix(".partial")],
                "would be lost")
    bad = write_lines(tmp_path / "bad.jsonl", [COUNTDOWN, "{"])
    refused(capsys, ["grade", "--input", bad, "--out", str(out)], "line 2")
    assert out.read_text() == "earlier" and not (tmp_path / "out.partial").exists()
    assert main(["grade", "--input", source, "--out", str(out)]) == 0 and len(read_lines(out)) == 1
    refused(capsys, ["grade", "--input", source, "--out", str(tmp_path / "in.jsonl" / "x")], "folder")
    assert main(["grade", "--input", source, "--out", str(tmp_path / "no/such/x")]) == 0  # it makes folders


@pytest.mark.parametrize("task, rows, accuracies", [
    ("countdown", [{"numbers": ["3", 7, 9.0], "target": target, "response": "<answer>(9-3)+7</answer>"}
                   for target in (13, 13.0, "13", "13.0")], [1, 1, 1, 1]),
    ("countdown", [{"numbers": [3, 7], "target": target, "response": "<answer>3−7 = −4</answer>"}
                   for target in (-4, "-4", "−4", -4.0, 4)], [1, 1, 1, 1, 0]),
    ("gsm8k", [{"answer": answer, "response": "#### 72"}
               for answer in (72, 72.0, "72", "#### 72", "$72", -72)],
     [1, 1, 1, 1, 1, 0]),
])
def test_numbers_in_files_may_be_text_or_decimals(task, rows, accuracies, tmp_path, capsys):
    path = write_lines(tmp_path / "in.jsonl", rows)
    assert [row["accuracy"] for row in graded(capsys, "--task", task, "--input", path)] == accuracies


# ---- diagnose ----


def test_the_model_that_a_run_began_with_is_no_run_of_its_own(tmp_path):
    for name in ("base", "rl", "rl/start"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds several runs; give one of them: [^,]*base, [^,]*rl$"):
        load_run(str(tmp_path), "last", torch.device("cpu"))


def test_the_file_of_problems_is_given_as_data_alone():
    """As an option of the task, it would be compared by its spelling when a run is resumed."""
    with pytest.raises(ValueError, match="--options got a path; give the file as --data FILE"):
        TaskFlags(name="gsm8k", options=("path=x.jsonl",)).make()
