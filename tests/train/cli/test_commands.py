"""What stands beside the training loops: the model as a sampler, and the commands eval and grade."""
import json

import pytest
import torch

from r1zero.eval.harness import Sampled, evaluate
from r1zero.eval.sampler import ModelSampler
from r1zero.eval.tasks.catalogue import make_task
from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.config import preset
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.train.cli import eval as eval_command
from r1zero.train.cli.eval import choose_problems
from r1zero.train.cli.main import main

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
        assert whole[p][s] == Sampled(BYTES.decode(naive.tokens), len(naive.tokens), naive.finish_reason)


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
    rows = read_lines(runs / "text" / "eval_gsm8k_step3.jsonl")
    assert [row["index"] for row in rows] == [0, 0, 1, 1, 2, 2] and rows[2]["problem"]["gold"] == "1,233"
    summary = json.loads((runs / "text" / "eval_gsm8k_step3.summary.json").read_text())
    assert (summary["step"], summary["n_problems"], summary["prompts_cut"]) == (3, 3, 1)
    assert summary["accuracy"] == 0 and summary["flags"]["task"]["data"] == data
    # The same responses in batches of one, from the same weights at another step, to a file of the user's.
    kept = tmp_path / "deep" / "kept.jsonl"
    assert main([*argv, "--samples", "2", "--batch", "1", "--which", "1", "--out", str(kept)]) == 0
    assert read_lines(kept) == rows and (tmp_path / "deep" / "kept.summary.json").exists()
    assert main([*argv[:2], str(runs / "text/checkpoints/step_00000001"), *argv[3:], "--n", "1"]) == 0
    assert len(read_lines(runs / "text" / "eval_gsm8k_step1.jsonl")) == 4


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
    ("--out OUTER", "cannot write the responses"), ("--run OUTER/none", "does not exist"),
    ("--run RUNS", "holds several runs; give one of them: "), ("--run DATA", "is a file"),
])
def test_eval_refuses(flags, fragment, runs, tmp_path, capsys):
    data = write_lines(tmp_path / "bad.jsonl", [GSM8K[0], '{"question": "?", "answer": "no number"}'])
    words = flags.replace("DATA", data).replace("OUTER", str(tmp_path)).replace("RUNS", str(runs)).split()
    run = [] if "--run" in words else ["--run", str(runs / "text")]
    before = sorted(runs.rglob("*"))
    refused(capsys, ["eval", *run, *words], fragment)
    assert sorted(runs.rglob("*")) == before and len(read_lines(tmp_path / "bad.jsonl")) == 2


def test_a_broken_off_eval_leaves_no_summary_of_an_earlier_one(runs, tmp_path, capsys, monkeypatch):
    argv = ["eval", "--run", str(runs / "text"), "--n", "2", "--max-new-tokens", "2"]
    argv += ["--out", str(tmp_path / "e.jsonl")]
    assert main(argv) == 0 and (tmp_path / "e.summary.json").exists()

    def broken_off(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(eval_command, "evaluate", broken_off)
    assert main(argv) == 130 and not (tmp_path / "e.summary.json").exists()


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


@pytest.mark.parametrize("name", ["countdown", "gsm8k", "arithmetic"])
def test_grading_what_eval_wrote_gives_the_same_words(name, tmp_path, capsys):
    """In a line of eval, `answer` is what the model said; taken for the right one, all would be right."""
    task = make_task(name, **({"path": write_lines(tmp_path / "t.jsonl", GSM8K)} if name == "gsm8k" else {}))
    answers = iter(["<answer>6</answer>", "<answer>1</answer>", "<think></think><answer>7</answer>"] * 9)

    def sampler(prompts, n_samples):
        return [[Sampled(next(answers), 1, "stop") for _ in range(n_samples)] for _ in prompts]
    evaluate(sampler, task, task.problems("test", 3), 3, out=tmp_path / "e.jsonl", progress=False)
    keys = ("accuracy", "format", "answer")
    found = graded(capsys, "--task", name, "--input", str(tmp_path / "e.jsonl"))
    assert [[row[key] for key in keys] for row in found] == [
        [row[key] for key in keys] for row in read_lines(tmp_path / "e.jsonl")]


NAN = float("nan")
BAD_LINES = [("countdown", line) for line in ("[1]", "{", "null", "1" * 5000, "[" * 100_000, {})]
BAD_LINES += [("countdown", {**COUNTDOWN, "numbers": numbers}) for numbers in (
    "3 7 9", [], [1] * 7, [True, 7, 9], [-3, 7, 9], [3, 7, 10**9], None)]
BAD_LINES += [("countdown", {**COUNTDOWN, "target": target}) for target in (13.0, None, NAN, "13")]
BAD_LINES += [("countdown", {**COUNTDOWN, "response": None}), ("countdown", {**COUNTDOWN, "problem": {}})]
BAD_LINES += [("gsm8k", {"response": "x", "answer": answer}) for answer in ("twelve", None, True, [12], NAN)]
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
    (["--response", "x", "--problem", "1 2 -> 3", "--out", "/nowhere/x"], "/nowhere/x: No such file"),
    (["--input", "in.jsonl", "--out", "./in.jsonl"], "would be lost")])
def test_grade_refuses(argv, fragment, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", [COUNTDOWN])
    refused(capsys, ["grade", *argv], fragment)
    assert read_lines(tmp_path / "in.jsonl") == [COUNTDOWN]


# ---- diagnose ----
