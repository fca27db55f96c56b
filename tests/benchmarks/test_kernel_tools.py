"""The tools that need a GPU, as far as they go without one: their whole logic at toy size, with stand-ins."""
import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import aot, gpu, kernel_ops, kernels, tune
from benchmarks.kernel_ops import OPS, attention_case, moe_case
from benchmarks.timing import Timer
from r1zero.kernels import rope
from r1zero.kernels.chips import KNOWN_CHIPS, Chip
from r1zero.kernels.dispatch import HAS_TRITON

ROOT = Path(__file__).parents[2]


# ---- benchmarks.kernels ----

def rows_of(folder: Path) -> list[dict]:
    with open(folder / "kernels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_kernels_smoke_writes_csv_pictures_and_json(tmp_path, capsys):
    assert kernels.main(["--smoke", "--out-dir", str(tmp_path / "deep" / "out")]) == 0
    folder, printed = tmp_path / "deep" / "out", capsys.readouterr().out
    rows, record = rows_of(folder), json.loads(printed.splitlines()[-1])
    assert record == json.loads((folder / "kernels.json").read_text()) and len(record["rows"]) == len(rows)
    assert tuple(rows[0]) == kernels.COLUMNS and [row["provider"] for row in rows[:2]] == ["copy", "matmul"]
    assert {path.name for path in folder.glob("*.png")} == {f"{name}.png" for name in OPS}
    assert {row["op"] for row in rows} == {*OPS, "rmsnorm_residual", "ceiling"}
    measured = [row for row in rows[2:] if not row["note"]]
    for op in OPS:
        found = {(row["provider"], row["mode"]) for row in measured if row["op"] == op}
        assert {(name, mode) for name in ("ours", "eager") for mode in kernels.MODES} <= found
    unequal = [row["provider"] for row in measured if row["op"] == "attention" and row["D"] != row["E"]]
    assert set(unequal) == {"ours", "eager", "SDPA math"} and len(unequal) == 9
    for row in measured:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert float(row["error"]) < 1e-5 and row["dtype"] == "float32" and row["torch"] == torch.__version__
        assert float(row["gbs"]) > 0 and float(row["fraction_of_roofline"]) > 0
        assert bool(row["tflops"]) == (row["op"] in ("attention", "linear_logprob", "moe"))
    assert any(row["note"] == "left out: measured on a GPU only" for row in rows)


def test_a_peer_that_is_wrong_or_fails_is_marked_and_not_timed(tmp_path, monkeypatch, capsys):
    def swiglu_peers(case, device):
        def once(gate_up, calls=[]):  # noqa: B006  the check's call is the one that works
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once\nand never again")
            return right(gate_up)

        right = kernel_ops.swiglu_peers(case, device)["eager"]
        return {"scaled": lambda x: right(x) * 1.2, "cut": lambda x: right(x)[:, 1:],
                "nan": lambda x: right(x) * float("nan"), "breaks": lambda x: 1 / 0, "once": once,
                "gone": "missing: gone", "right": right}

    monkeypatch.setitem(kernels.OPS, "swiglu", kernels.Op(**{**vars(OPS["swiglu"]), "peers": swiglu_peers}))
    assert kernels.main(["--smoke", "--ops", "swiglu", "--out-dir", str(tmp_path)]) == 0
    found = {}
    for row in rows_of(tmp_path)[2:]:
        if row["F"] == "16":
            found.setdefault(row["provider"], {})[row["mode"]] = row["note"] or float(row["ms_median"])
    assert found["scaled"]["all"].startswith("wrong: off by 0.")
    assert found["nan"]["all"].startswith("wrong: off by inf")
    assert found["breaks"] == {"all": "fails: ZeroDivisionError: division by zero"}
    assert found["gone"] == {"all": "missing: gone"} and list(found["cut"]) == ["all"]
    assert set(found["once"].values()) == {"fails: RuntimeError: only once"}
    assert set(found["right"]) == set(found["ours"]) == set(kernels.MODES)
    assert "gone, all: missing: gone" in capsys.readouterr().out


def test_ours_wrong_is_an_exit_code(tmp_path, monkeypatch, capsys):
    asked = iter(["the truth", "ours"] * 2)  # case by case

    def ours(case, device, impl):
        right = kernel_ops.ours_rope(case, device, "reference")
        return right if next(asked) == "the truth" else lambda x: right(x) + 1
    monkeypatch.setitem(kernels.OPS, "rope", kernels.Op(**{**vars(OPS["rope"]), "ours": ours}))
    assert kernels.main(["--smoke", "--ops", "rope", "--out-dir", str(tmp_path)]) == 1
    assert "OURS rope wrong: off by" in capsys.readouterr().err


def test_kernels_leaves_out_what_is_late_and_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    assert kernels.main(["--smoke", "--ops", "rope", "--minutes", "0", "--out-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out, as 0 minutes were over: rope: T 8, D 8, H 2; rope" in out
    assert json.loads(out.splitlines()[-1])["left_out"] and len(rows_of(tmp_path)) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == tune.main(["attention"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("sees no CUDA device" in line for line in errors)
    for main, argv in ((kernels.main, ["--ops", "chess"]), (tune.main, ["rope", "--parts", "fwd"]),
                       (gpu.main, ["--stages", "chess"])):
        with pytest.raises(SystemExit):
            main(argv)


def test_least_costs_follow_the_roofline_table():
    attention = attention_case(2, 1000, 8, 2, 64)
    flops, moved = kernel_ops.attention_cost(attention, "forward")
    assert flops == 4 * 2 * 8 * 1000**2 * 64 / 2
    assert moved == 2 * 2 * 1000 * 64 * (2 * 8 + 2 * 2) + 4 * 2 * 8 * 1000
    assert kernel_ops.attention_cost(attention, "backward") == (2.5 * flops, 2 * moved - 4 * 2 * 8 * 1000)
    latent = attention_case(2, 1000, 8, 8, 192, E=128)  # q k^T and its two gradients are 192 wide, p v 128
    pairs, tensors = 2 * 8 * 1000**2 / 2, 2 * 1000 * 8 * (192 + 192 + 128 + 128)
    assert kernel_ops.attention_cost(latent, "forward") == (2 * pairs * 320, 2 * tensors + 4 * 2 * 8 * 1000)
    assert kernel_ops.attention_cost(latent, "backward") == (2 * pairs * (3 * 192 + 2 * 128),
                                                             4 * tensors + 4 * 2 * 8 * 1000)
    [norm], [residual] = (kernel_ops.widths(op, "M", (64,), 10) for op in ("rmsnorm", "rmsnorm_residual"))
    assert [kernel_ops.rmsnorm_cost(norm, mode)[1] for mode in kernels.MODES[:2]] == [4 * 640, 6 * 640]
    assert [kernel_ops.rmsnorm_cost(residual, mode)[1] for mode in kernels.MODES[:2]] == [8 * 640, 8 * 640]
    [swiglu] = kernel_ops.widths("swiglu", "F", (64,), 10)
    assert [kernel_ops.swiglu_cost(swiglu, mode)[1] for mode in kernels.MODES[:2]] == [6 * 640, 10 * 640]
    mixture = moe_case(1000, 16, 4, 64, 32)
    weights, tokens, gates = 2 * 16 * 3 * 64 * 32, 2 * 1000 * 64, 4 * 1000 * 4
    assert kernel_ops.moe_cost(mixture, "forward") == (
        2 * 4000 * 3 * 64 * 32, weights + 2 * tokens + gates)
    assert kernel_ops.moe_cost(mixture, "backward") == (
        4 * 4000 * 3 * 64 * 32, 2 * weights + 3 * tokens + 2 * gates)
    peaks, ms = {"flops": 1e12, "bytes": 1e9}, {"median": 1.0, "p20": 0.5, "p80": 2.0}
    found = kernels.metrics(OPS["swiglu"], swiglu, "full", ms, peaks)
    assert found["fraction_of_roofline"] == pytest.approx(16 * 640 / 1e9 / 1e-3) and found["tflops"] is None
    found = kernels.metrics(OPS["attention"], attention, "forward", ms, {"flops": 1e13, "bytes": 1e12})
    assert found["fraction_of_roofline"] == pytest.approx(flops / 1e13 / 1e-3)
    assert found["tflops"] == pytest.approx(flops / 1e9)


def test_one_wrong_row_is_an_error():
    truth = [torch.randn(1000, 64), torch.randn(64)]
    assert kernels.error_of([x.half() for x in truth], truth) < 1e-3
    wrong = [truth[0].clone(), truth[1]]
    wrong[0][500] = 0
    assert kernels.error_of(wrong, truth) > 0.3 > kernels.LARGEST_ERROR


# ---- benchmarks.tune ----

def test_tune_overrides_ranks_and_lists_faults():
    module = types.SimpleNamespace(config=lambda part, size: {"BLOCK": 8, "num_warps": 4},
                                   bwd_config=lambda size: (3, {"BLOCK": 8, "num_warps": 4}))
    sweep = tune.Sweep("fwd", "forward", "config", {"BLOCK": (16, 32), "num_warps": (1, 2)})
    assert len(sweep.configs()) == 4 and tune.words(sweep.configs()[0]) == "BLOCK=16 num_warps=1"
    original = module.config
    with tune.overridden(module, sweep, (("BLOCK", 16),)):
        assert module.config("fwd", 1) == {"BLOCK": 16, "num_warps": 4}
        assert module.config("dq", 1) == {"BLOCK": 8, "num_warps": 4}
    assert module.config is original
    with tune.overridden(module, tune.Sweep("bwd", "backward", "bwd_config", {}), (("BLOCK", 16),)):
        assert module.bwd_config(1) == (3, {"BLOCK": 16, "num_warps": 4})

    def work():  # a slow one, a fast one, a wrong one, one that does not run
        if module.config("fwd", 1) == {"BLOCK": 16, "num_warps": 1}:
            sum(range(300_000))

    def check():
        config = module.config("fwd", 1)
        if config == {"BLOCK": 32, "num_warps": 1}:
            raise RuntimeError("no such launch")
        return 0.5 if config == {"BLOCK": 32, "num_warps": 2} else 0.0

    def under(config):
        return tune.overridden(module, sweep, config)

    best, faults = tune.rank(sweep.configs(), under, check, work, Timer(torch.device("cpu")))
    assert [tune.words(config) for config, _ in best] == ["BLOCK=16 num_warps=2", "BLOCK=16 num_warps=1"]
    assert {tune.words(config): fault for config, fault in faults.items()} == {
        "BLOCK=32 num_warps=1": "fails: RuntimeError: no such launch",
        "BLOCK=32 num_warps=2": "wrong: off by 0.5 of a row"}


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("chip", [KNOWN_CHIPS[90], Chip(121, 101_376, 48)], ids=["known", "unknown"])
def test_tune_compiles_ahead_and_lists_what_cannot_run(chip):
    sweep = tune.Sweep("both", "full", "rope_config", {"ROWS": (4, 128), "num_warps": (1, 3)})

    def launch():
        with aot.chip(chip.arch):
            table = aot.empty(4, 32, dtype=torch.float32)
            rope.rope_rotate(aot.empty(4, 2, 64), table, table, False)

    def under(config):
        return tune.overridden(rope, sweep, config)

    faults = tune.compile_ahead(chip, sweep.configs(), under, launch, 1)
    found = {tune.words(config): fault for config, fault in faults.items()}
    assert set(found) == {"ROWS=4 num_warps=3", "ROWS=128 num_warps=1", "ROWS=128 num_warps=3"}
    assert found["ROWS=128 num_warps=1"].startswith("rope_fwd_kernel: spills")
    assert found["ROWS=4 num_warps=3"].startswith("fails: AssertionError: num_warps must be a power of 2")


def test_every_sweep_names_a_function_of_its_op_and_its_block_sizes():
    for op, sweeps in tune.SWEEPS.items():
        for sweep in sweeps:
            assert callable(getattr(tune.module_of(op), sweep.function))
            assert {len(config) for config in sweep.configs()} == {len(sweep.grid)}
        assert tune.cases_of(op, [64, 128])


# ---- benchmarks.gpu and make gpu ----

def python(code: str, limit: int = 60) -> gpu.Stage:
    return gpu.Stage((sys.executable, "-c", code), limit)


def test_stages_go_on_after_a_failure_and_the_exit_code_tells(tmp_path, capsys):
    child = tmp_path / "child"
    slow = ("import subprocess, time; process = subprocess.Popen(['sleep', '60']);"
            f"open({str(child)!r}, 'w').write(str(process.pid)); time.sleep(60)")
    stages = {"first": python("print('here'); open('{out}/written', 'w')"), "breaks": python("1 / 0"),
              "slow": python(slow, 3), "last": python("import r1zero.kernels.reference, benchmarks.common")}
    assert gpu.run(["last", "first", "breaks", "slow"], tmp_path / "out", stages) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    done, machine = summary["stages"], summary["machine"]
    assert machine["cores"] >= 1 and machine["gpus"] == gpu.gpus() and "gpus_after" in done[0]
    if HAS_TRITON:
        assert machine["ptxas"]["ptxas"][:3] in ("12.", "13.")
    assert [(x["stage"], x["result"]) for x in done] == [
        ("first", "ok"), ("breaks", "failed"), ("slow", "out of time"), ("last", "ok")]
    assert (tmp_path / "out" / "first.log").read_text() == "here\n"
    assert (tmp_path / "out" / "written").exists()
    assert "ZeroDivisionError" in capsys.readouterr().out
    state = Path(f"/proc/{child.read_text()}/stat")  # what a stage started has ended with it
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert gpu.run(["first"], tmp_path / "out", stages) == 0


def test_stages_find_r1zero_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    for _ in range(2):  # again over what is there
        path = gpu.environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[:2] == [str(tmp_path / "import"), str(ROOT)]
    # nor are these to be counted on there
    code = ("import sys; sys.modules |= dict.fromkeys(('tyro', 'wandb', 'math_verify', 'einops'));"
            "import benchmarks.kernels, benchmarks.tune, benchmarks.aot, r1zero.kernels.reference as found;"
            "print(found.__file__)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path[:2])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True,
                           text=True, check=True).stdout
    assert found.strip() == str(tmp_path / "import/r1zero/kernels/reference.py")


def test_the_limits_keep_within_ten_minutes_and_make_gpu_passes_its_flags(tmp_path):
    *before, last = gpu.STAGES.values()
    assert sum(stage.limit + gpu.GRACE for stage in before) + gpu.REPEAT <= gpu.MOST == 600
    assert last.least and not any(stage.least for stage in before)  # it takes what the others leave
    assert list(gpu.STAGES) == ["compile", "correct", "kernels", "generation", "memory", "sanitizer"]
    make = ["make", "-C", str(ROOT), "--no-print-directory", "gpu", f"GPU_OUT={tmp_path}/x"]
    said = subprocess.run([*make, "-n", "STAGES=kernels correct"], capture_output=True, text=True, check=True)
    assert f'-m benchmarks.gpu --out "{tmp_path}/x" --stages kernels correct' in said.stdout
    blind = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(make, capture_output=True, text=True, env=blind)
    assert said.returncode == 2 and not (tmp_path / "x").exists()
    *reasons, last = said.stderr.splitlines()[:3]
    assert [line.split(": ")[0] for line in reasons] == [".venv/bin/python", "python3"]
    assert "sees a CUDA device" in last
    assert "not found" in reasons[0] or "CUDA" in reasons[0]  # one line each, in their own words


# ---- what a first run needs

def test_compiled_peers_come_last_and_memory_ends_one_case(tmp_path, monkeypatch, capsys):
    def no_memory(case, device, impl):
        if case.shape["F"] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return kernel_ops.ours_swiglu(case, device, impl)

    monkeypatch.setitem(kernels.OPS, "swiglu", kernels.Op(**{**vars(OPS["swiglu"]), "ours": no_memory}))
    assert kernels.main(["--smoke", "--ops", "rope,swiglu", "--out-dir", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)[2:]
    is_compiled = [row["provider"] in kernels.COMPILED for row in rows]
    assert is_compiled == sorted(is_compiled)
    last = rows[is_compiled.index(True):]
    assert {row["op"] for row in last} == {"rope", "swiglu"}
    [small] = [row for row in rows if row["op"] == "swiglu" and row["F"] == "16" and row not in last]
    assert small["provider"] == "this case" and small["note"].startswith("out of memory: CUDA")
    assert any(row["op"] == "swiglu" and row["F"] != "16" and row["ms_median"] for row in rows)


def test_the_cache_is_flushed_by_reading():
    timer = Timer(torch.device("cpu"))
    timer.buffer.fill_(3)
    version = timer.buffer._version
    timer.flush()
    assert timer.total.item() == 12 and timer.buffer._version == version
