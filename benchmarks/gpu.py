"""What is worth running on a machine with a GPU, unattended: stages in order, each with a time limit.

    make gpu                                       all stages into results_gpu/, under 10 minutes
    make gpu STAGES="correct kernels" GPU_OUT=out
    python -m benchmarks.gpu --stages kernels      the same without make

A stage that fails or runs into its limit does not keep the next from running; the exit code is 1 in the end.
The folder gets the log of each stage, what the stage itself writes, and summary.json, written after each.
Nothing is installed: where r1zero is not, the stages find it through a folder of links.
"""
import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "model", "eval", "rl", "train")  # installed as r1zero.kernels, ...


@dataclass(frozen=True)
class Stage:
    command: tuple[str, ...]  # {out} stands for the folder
    limit: int  # seconds


STAGES = {  # in this order; the limits add up to less than 10 minutes
    "correct": Stage((sys.executable, "-m", "pytest", "-m", "gpu", "tests/kernels/gpu", "-q",
                      "--durations=5"), 210),
    "kernels": Stage((sys.executable, "-m", "benchmarks.kernels", "--out-dir", "{out}/kernels",
                      "--minutes", "4"), 270),
    "generation": Stage((sys.executable, "-m", "benchmarks.generation", "--device", "cuda", "--out",
                         "{out}/generation.json"), 110),
}


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
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run_stage(name: str, stage: Stage, out: Path) -> dict:
    """Run one stage, its output in <out>/<name>.log. The result is "ok", "failed" or "out of time"."""
    command = [word.replace("{out}", str(out)) for word in stage.command]
    started, log = time.monotonic(), out / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   env=environment(out), start_new_session=True)
        try:
            code = process.wait(stage.limit)
        except BaseException as error:  # Ctrl-C too must not leave it running
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            result = "out of time"
        else:
            result = "failed" if code else "ok"
    return {"stage": name, "result": result, "exit_code": code, "limit": stage.limit, "log": str(log),
            "seconds": round(time.monotonic() - started, 1)}


def run(names: list[str], out: Path, stages: dict[str, Stage]) -> int:
    """Run the named stages in the order of `stages`; 0 if all are ok."""
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for name in [name for name in stages if name in names]:
        print(f"{name}: at most {stages[name].limit} s, log in {out / name}.log", flush=True)
        done.append(run_stage(name, stages[name], out))
        (out / "summary.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {done[-1]['result']} after {done[-1]['seconds']} s", flush=True)
        if done[-1]["result"] != "ok":
            lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"    {line[:200]}" for line in lines[-15:]), flush=True)
    return 0 if all(stage["result"] == "ok" for stage in done) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", default="results_gpu", help="folder for all that is written")
    flags = parser.parse_args(argv)
    return run(flags.stages, Path(flags.out).resolve(), STAGES)


if __name__ == "__main__":
    sys.exit(main())
