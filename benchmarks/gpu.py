"""What is worth running on a machine with a GPU, unattended: stages in order, each with a time limit.

    make gpu                                       all stages into results_gpu/, under 10 minutes
    make gpu STAGES="correct kernels" GPU_OUT=out
    python -m benchmarks.gpu --stages kernels      the same without make
    python -m benchmarks.gpu --plan --jobs 16      how many kernels, and minutes on 16 cores; needs no GPU

A stage that fails or runs into its limit does not keep the next from running; the exit code is 1 in the end.
At its limit a stage is interrupted, and has some seconds to write what it has. A stage whose packages are not
installed is left out, and one line says which; so is one that needs a GPU, where none can be used. The last
runs in the time that the others leave, if compute-sanitizer is there.

The folder gets the log of each stage, what the stage itself writes, and summary.json, written after each.
Nothing is installed: where r1zero is not, the stages find it through a folder of links.
"""
import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "model", "eval", "rl", "train")  # installed as r1zero.kernels, ...


MOST = 600  # seconds for all stages
GRACE = 10  # seconds from the interrupt to the kill
TRITON = ("3.6", "3.7")  # the versions that all kernels have been compiled with
PACKAGES = ("torch", "triton", "numpy", "einops", "pytest")
QUERY = ("name", "driver_version", "memory.total", "memory.used", "pstate", "clocks.sm", "clocks.max.sm",
         "clocks.mem", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class Stage:
    command: tuple[str, ...]  # {out} stands for the folder
    limit: int  # seconds
    needs: tuple[str, ...] = ()  # packages
    gpu: bool = False  # whether it needs one
    program: str | None = None  # it is left out, and that is no failure, where this is not on PATH
    least: int = 0  # or where fewer seconds are left


def sanitized(*tests: str) -> tuple[str, ...]:
    """These tests under memcheck. Without a cache of PyTorch's, each tensor has an end that it can see."""
    return ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck",
            "--error-exitcode", "9", sys.executable, "-m", "benchmarks.correct", "--out", "{out}/sanitizer",
            "--tests", *tests)


REPEAT = 60  # seconds for the tests that failed, with another assembler
SANITIZED = tuple(f"tests/kernels/gpu/test_{name}" for name in (
    "elementwise.py::test_swiglu_and_its_gradient[344-torch.bfloat16]",
    "elementwise.py::test_rmsnorm_and_its_gradients_at_each_size[500-torch.bfloat16]",
    "decode_attention.py::test_decode_attention_at_every_head_dim_and_group_size[32-1-torch.bfloat16]",
    "attention.py::test_attention_at_every_head_dim[16-torch.bfloat16]",
    "attention.py::test_values_of_another_width_than_keys[32-80-torch.bfloat16]",
    "losses.py::test_linear_logprob_and_its_gradients[1-64-7-None-torch.bfloat16]",
    "moe.py::test_a_mixture_and_its_gradients[40-64-3-48-32-few-torch.bfloat16]",
    "losses.py::test_advantages_and_policy_loss_are_the_references_in_fp64[None-clip-False]"))
STAGES = {  # in this order; but for the last, the limits and REPEAT add up to less than MOST
    "compile": Stage((sys.executable, "-m", "benchmarks.rehearse", "--out", "{out}/compile.json"), 85,
                     PACKAGES),
    "correct": Stage((sys.executable, "-m", "benchmarks.correct", "--out", "{out}"), 150, PACKAGES,
                     gpu=True),
    "kernels": Stage((sys.executable, "-m", "benchmarks.kernels", "--out-dir", "{out}/kernels",
                      "--minutes", "2.0"), 145, (*PACKAGES[:4], "matplotlib"), gpu=True),
    "generation": Stage((sys.executable, "-m", "benchmarks.generation", "--device", "cuda", "--out",
                         "{out}/generation.json"), 80, PACKAGES[:4], gpu=True),
    "memory": Stage((sys.executable, "-m", "benchmarks.memory_predicted", "--device", "cuda", "--out",
                     "{out}/memory.json"), 30, PACKAGES[:4], gpu=True),
    "sanitizer": Stage(sanitized(*SANITIZED), 120, PACKAGES, gpu=True, program="compute-sanitizer", least=30),
}


# ---- what is there

def missing(names: tuple[str, ...]) -> list[str]:
    """Which of these packages this Python does not have."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def why_no_gpu(python: str = sys.executable) -> str | None:
    """Why PyTorch cannot use a GPU, in its own words, such as a driver that is too old; None if it can."""
    command = (python, "-c", "import torch; torch.cuda.init()")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stderr.strip().splitlines() or ["it does not say why"])[-1] if done.returncode else None


def untested_triton() -> str | None:
    """The version of Triton, if the kernels have not been compiled with it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # missing, or built under another name
        return None
    return None if version.rpartition(".")[0] in TRITON else version


def said(*command: str) -> str | None:
    """What a program prints; None where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpus(nvidia_smi: str = "nvidia-smi") -> list[dict[str, str]]:
    """Driver, clocks, power and memory of each GPU at this moment, as nvidia-smi names them."""
    lines = said(nvidia_smi, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader") or ""
    return [dict(zip(QUERY, line.split(", "), strict=False)) for line in lines.splitlines()]


def assemblers() -> dict[str, str | None]:
    """The version of each ptxas that Triton may use: those of its wheel, and one named by the environment."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    found = {path.name: path for path in sorted(folder.glob("ptxas*"))} if folder else {}
    found |= {name: os.environ[name] for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
              if name in os.environ}
    matches = {name: re.search(r"V(\d[\d.]*)", said(str(path), "--version") or "")
               for name, path in found.items()}
    return {name: match and match[1] for name, match in matches.items()}


def machine() -> dict:
    """What the results depend on and the stages do not say: assemblers, driver, clocks, power, cores."""
    return {"python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0)), "ptxas": assemblers(),
            "gpus": gpus()}


def cache_folder(out: Path) -> dict[str, str]:
    """The variable that moves Triton's cache into `out` if its own folder cannot be written; else nothing."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or
                  Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton/cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return {}
    except OSError as error:
        print(f"Triton's cache goes to {out / 'triton'}: {folder} cannot be written ({error.strerror})",
              flush=True)
        return {"TRITON_CACHE_DIR": str(out / "triton")}


# ---- the stages

def links(folder: Path) -> Path:
    """A folder from which Python imports r1zero.kernels and so on out of this checkout."""
    package = folder / "r1zero"
    package.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        link = package / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(ROOT / name, target_is_directory=True)
    return folder


def environment(out: Path) -> dict[str, str]:
    """This process's own, with the repository to import from."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("r1zero") is None:
        paths.insert(0, str(links(out / "import")))
    return {**os.environ, **cache_folder(out), "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen, grace: float) -> int:
    """Interrupt a stage, so that it writes what it has; after `grace` seconds end it with all it started."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_stage(name: str, stage: Stage, out: Path, env: dict[str, str]) -> dict:
    """Run one stage, its output in <out>/<name>.log. The result is "ok", "failed" or "out of time"."""
    command = [word.replace("{out}", str(out)) for word in stage.command]
    started, log = time.monotonic(), out / f"{name}.log"
    before = gpus()
    with open(log, "w", encoding="utf-8") as file:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env,
                                   start_new_session=True)
        try:
            code = process.wait(stage.limit)
        except subprocess.TimeoutExpired:
            code, result = stop(process, GRACE), "out of time"
        except BaseException:  # Ctrl-C too must not leave it running
            stop(process, 0)
            raise
        else:
            result = "failed" if code else "ok"
    return {"stage": name, "result": result, "exit_code": code, "limit": stage.limit, "log": str(log),
            "seconds": round(time.monotonic() - started, 1), "gpus_before": before, "gpus_after": gpus()}


def failed_tests(csv_file: Path) -> list[str]:
    """The names of the tests that failed, as the correctness stage has written them."""
    if not csv_file.exists():
        return []
    with open(csv_file, newline="", encoding="utf-8") as file:
        return [row["test"] for row in csv.DictReader(file) if row["result"] == "failed"]


def repeat_with_another_assembler(failed: list[str], out: Path, env: dict[str, str]) -> dict:
    """What the tests that failed say if another ptxas assembles them: see hazard.py."""
    import torch  # only where a test has failed, on a GPU

    from .hazard import repeat

    major, minor = torch.cuda.get_device_capability()
    return repeat(failed, out, REPEAT, 10 * major + minor, env)


def lacks(picked: dict[str, Stage]) -> dict[str, list[str]]:
    """What each of these stages needs and does not have; one line for each reason says so."""
    lacking = {name: missing(stage.needs) for name, stage in picked.items()}
    if any(lacking.values()):
        packages = list(dict.fromkeys(package for found in lacking.values() for package in found))
        left_out = ", ".join(name for name in picked if lacking[name])
        print(f"{sys.executable} has no {', '.join(packages)}, so these stages are left out: {left_out}; "
              f"{sys.executable} -m pip install {' '.join(packages)}", flush=True)
    on_gpu = [name for name, stage in picked.items() if stage.gpu and not lacking[name]]
    if on_gpu and (why := why_no_gpu()):
        print(f"no GPU can be used ({why}), so these stages are left out: {', '.join(on_gpu)}", flush=True)
        lacking |= dict.fromkeys(on_gpu, ["a GPU"])
    return lacking


def why_left_out(stage: Stage, left: float) -> str | None:
    """Why a stage that may be left out is, with so many seconds left."""
    if stage.program and not shutil.which(stage.program):
        return f"{stage.program} is not on PATH"
    if left < stage.least:
        return f"{max(0, left):.0f} s are left, and it takes {stage.least} or more"
    return None


def run(names: list[str], out: Path, stages: dict[str, Stage]) -> int:
    """Run the named stages in the order of `stages`; 0 if all are ok."""
    out.mkdir(parents=True, exist_ok=True)
    started, summary = time.monotonic(), {"machine": machine(), "stages": []}
    picked, env = {name: stages[name] for name in stages if name in names}, environment(out)
    if version := untested_triton():
        print(f"Triton is {version}, and the kernels have been compiled with {' and '.join(TRITON)} only: "
              "what fails may be its doing", flush=True)
    lacking = lacks(picked)
    for name, stage in picked.items():
        left = MOST - GRACE - (time.monotonic() - started)
        if stage.least:  # it takes what the others leave
            stage = replace(stage, limit=min(stage.limit, max(1, int(left))))
        if lacking[name]:
            done = {"stage": name, "result": "missing", "missing": lacking[name]}
        elif why := why_left_out(stage, left):
            done = {"stage": name, "result": "left out", "why": why}
            print(f"{name}: left out: {why}", flush=True)
        else:
            print(f"{name}: at most {stage.limit} s, log in {out / name}.log", flush=True)
            done = run_stage(name, stage, out, env)
            print(f"{name}: {done['result']} after {done['seconds']} s", flush=True)
        if name == "correct" and (failed := failed_tests(out / "correct.csv")):
            done["assemblers"] = repeat_with_another_assembler(failed, out, env)
        summary["stages"].append(done)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if done["result"] in ("failed", "out of time"):
            lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"    {line[:200]}" for line in lines[-15:]), flush=True)
    return 0 if all(stage["result"] in ("ok", "left out") for stage in summary["stages"]) else 1


def plan(jobs: int | None, arch: int | None) -> int:
    """Print how many kernels the tests need and how long they compile. Needs no GPU."""
    if lacking := missing(PACKAGES):
        print(f"{sys.executable} has no {', '.join(lacking)}; "
              f"{sys.executable} -m pip install {' '.join(lacking)}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "benchmarks.rehearse", "--plan"]
    command += [f"--jobs={jobs}"] if jobs else []
    command += [f"--arch={arch}"] if arch else []
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(command, cwd=ROOT, env=environment(Path(folder))).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", default="results_gpu", help="folder for all that is written")
    parser.add_argument("--plan", action="store_true",
                        help="count the kernels, predict the time, run nothing")
    parser.add_argument("--jobs", type=int, help="with --plan: cores; by default this machine's")
    parser.add_argument("--arch", type=int, help="with --plan: compute capability, such as 90")
    flags = parser.parse_args(argv)
    if flags.plan:
        return plan(flags.jobs, flags.arch)
    return run(flags.stages, Path(flags.out).resolve(), STAGES)


if __name__ == "__main__":
    sys.exit(main())
