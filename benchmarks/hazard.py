"""A fault of assemblers for Hopper: found in machine code without a GPU, told apart from others on one.

A matrix product of sm_90 (HGMMA) may take its first operand A from registers. It is asynchronous: it reads
them while the program goes on, until a wait (WARPGROUP.DEPBAR) covers it. A value that is put into those
registers earlier may enter the product, which is then wrong without an error: triton-lang/triton#9433. The
assemblers of CUDA 12.8 to 13.1, which come with Triton 3.6 and 3.7, do that even to code that copies A to be
safe from it; that of CUDA 13.5 does not.

`hazards` walks over every path from a product to the wait that covers it, around loops too, and names each
instruction on the way that writes A. `python -m benchmarks.aot --archs 90` reports them, for the assembler
that TRITON_PTXAS_PATH names. Left out: writes inside functions that are called (Triton inlines all), and the
accumulators, which assemblers guard with waits of their own.

`repeat` runs the GPU tests that failed once more with another assembler and says what both made of them.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from r1zero.kernels import dispatch

if dispatch.HAS_TRITON:
    import triton

ROOT = Path(__file__).parents[1]
A_REGISTERS = 4  # 64 rows x 32 bytes, over 128 threads of 4 bytes a register
MOST_GROUPS = 8  # a wait allows at most 7 groups to be unfinished
LINE = re.compile(r"\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?"
                  r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;")
LABEL = re.compile(r"\s*(?P<label>\.L\w+):")
TARGET = re.compile(r"`\((?P<label>\.L\w+)\)")
SHAPE = re.compile(r"\d+x(?P<columns>\d+)x\d+")
REGISTER = re.compile(r"R(\d+)(?:\.\w+)*")
PREDICATE = re.compile(r"!?U?P(?:\d|T)")
DOUBLES = re.compile(r"D(?:ADD|MUL|FMA|MNMX)")
PREDICATES_ONLY = re.compile(r"\w*SETP2?|FCHK|QSPC")  # these write predicates, and no register
RESULTS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
RESULT = f"(?P<result>{'|'.join(RESULTS)})"
TEST_THEN_RESULT = re.compile(rf"(?P<test>\S+\.py::.+?) {RESULT}\b")
RESULT_THEN_TEST = re.compile(rf"\[gw\d+\] \[ *\d+%\] {RESULT} (?P<test>\S+\.py::.+?)\s*$")
READS_ONLY = ("BRX", "JMX", "NANOSLEEP", "RET", "WARPSYNC")  # whose first operand is a source


# ---- reading nvdisasm's text ----

@dataclass(frozen=True)
class Instruction:
    address: str
    predicate: str  # "" for none, else such as "P0", "!P0", "!PT"
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        guard = f"@{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)} at {self.address}"


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of `nvdisasm -c`, and for each label the index of the instruction behind it."""
    instructions, labels = [], {}
    for line in sass.splitlines():
        if found := LABEL.match(line):
            labels[found["label"]] = len(instructions)
        elif found := LINE.match(line):
            operands = tuple(word.strip() for word in found["operands"].split(",") if word.strip())
            instructions.append(Instruction(found["address"], found["predicate"] or "", found["opcode"],
                                            operands))
    return instructions, labels


def width(instruction: Instruction) -> int:
    """How many registers its destination has."""
    name, parts = instruction.name, instruction.parts
    if name.endswith("GMMA"):
        columns = int(SHAPE.search(instruction.opcode)["columns"])
        return columns // 4 if "F16" in parts[:2] else columns // 2
    if name in ("HMMA", "IMMA", "DMMA"):
        return 2 if "F16" in parts[:2] else 4
    if "128" in parts or name == "LDSM" and parts[-1] == "4":
        return 4
    wide = {"64", "WIDE", "F64", "S64", "U64"} & set(parts) or name == "LDSM" and parts[-1] == "2"
    # CS2R without .32 reads a 64-bit special register
    if wide or DOUBLES.fullmatch(name) or name == "LEPC" or name == "CS2R" and "32" not in parts:
        return 2
    return 1


def written(instruction: Instruction) -> range:
    """The registers it writes: none, or some in a row."""
    if instruction.predicate == "!PT" or instruction.name in READS_ONLY:
        return range(0)
    if PREDICATES_ONLY.fullmatch(instruction.name):
        return range(0)
    # predicates may stand before the register, as in SHFL.BFLY PT, R38, R43
    operands = [word for word in instruction.operands if not PREDICATE.fullmatch(word)]
    found = REGISTER.fullmatch(operands[0]) if operands else None
    if not found:  # memory, a uniform register, RZ, a label
        return range(0)
    return range(int(found[1]), int(found[1]) + width(instruction))


def registers_of_a(instruction: Instruction) -> range:
    """Those that hold operand A of a matrix product, none if it lies in shared memory."""
    if not instruction.name.endswith("GMMA"):
        return range(0)
    found = REGISTER.fullmatch(instruction.operands[1])
    return range(int(found[1]), int(found[1]) + A_REGISTERS) if found else range(0)


def products_from_registers(sass: str) -> int:
    """How many matrix products take operand A from registers."""
    return sum(len(registers_of_a(instruction)) > 0 for instruction in parse(sass)[0])


def successors(index: int, instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """What may run next. Raises ValueError for a branch whose target is not a label."""
    instruction = instructions[index]
    after = [index + 1] if index + 1 < len(instructions) else []
    if instruction.name not in ("BRA", "BRX", "EXIT", "JMP", "JMX", "RET"):
        return after
    if instruction.name in ("EXIT", "RET"):
        return after if instruction.predicate else []
    found = TARGET.search(instruction.operands[-1])
    if not found or found["label"] not in labels:
        raise ValueError(f"{instruction}: expected a branch to a label of the same text; give all that "
                         "`nvdisasm -c` prints")
    # a condition may be a predicate before the instruction, or an operand: BRA.U UP0, `(.L_x_1)
    conditional = instruction.predicate or len(instruction.operands) > 1
    return [labels[found["label"]], *(after if conditional else [])]


# ---- the fault ----

@dataclass(frozen=True)
class Hazard:
    product: Instruction
    writer: Instruction
    registers: tuple[int, ...]  # of A, that are written

    def __str__(self) -> str:
        names = ", ".join(f"R{register}" for register in self.registers)
        return f"{self.writer} writes {names} before the wait that covers {self.product}"


def hazards(sass: str) -> list[Hazard]:
    """Every write to A's registers between a matrix product and the wait that covers it.

    sass: what `nvdisasm -c` prints for sm_90. Products are committed in groups, by gsb0 on the last of each,
    and end in order. `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are unfinished: it covers a
    product behind whose group at least n others were committed. Raises ValueError for an indirect branch.
    """
    if "GMMA" not in sass:
        return []
    instructions, labels = parse(sass)
    found = {}
    for start, product in enumerate(instructions):
        a = registers_of_a(product)
        if not a:
            continue
        # groups committed behind the product's own; -1 while that itself is not
        groups = 0 if "gsb0" in product.operands else -1
        paths = [(after, groups) for after in successors(start, instructions, labels)]
        seen = set(paths)
        while paths:
            index, groups = paths.pop()
            instruction = instructions[index]
            overlap = sorted(set(a) & set(written(instruction)))
            if overlap:
                found[start, index] = Hazard(product, instruction, tuple(overlap))
            if instruction.name.endswith("GMMA") and "gsb0" in instruction.operands:
                groups = min(groups + 1, MOST_GROUPS)
            waits = instruction.opcode.startswith("WARPGROUP.DEPBAR") and not instruction.predicate
            if waits and groups >= int(instruction.operands[1], 16):
                continue
            for after in successors(index, instructions, labels):
                if (after, groups) not in seen:
                    seen.add((after, groups))
                    paths.append((after, groups))
    return [found[key] for key in sorted(found)]


# ---- on a GPU: the tests that failed, with another assembler ----

def version_of(path: Path) -> str | None:
    """Such as "12.8.93"; None if that is no assembler that runs."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release .*V([\d.]+)", text)
    return found[1] if found else None


def assemblers() -> dict[str, Path]:
    """Every ptxas on this machine by its version, newest first: Triton's two, and those of a CUDA toolkit."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    paths = [folder / "ptxas" for folder in folders]
    if dispatch.HAS_TRITON:
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin"
        paths = [bundled / "ptxas", bundled / "ptxas-blackwell", *paths]
    if on_path := shutil.which("ptxas"):
        paths.append(Path(on_path))
    found = {}
    for path in paths:
        version = version_of(path) if path.is_file() else None
        if version:
            found.setdefault(version, path)
    newest_first = sorted(found, key=lambda version: [int(n) for n in version.split(".")], reverse=True)
    return {version: found[version] for version in newest_first}


def assembler_in_use(arch: int) -> str:
    """The version of the ptxas that Triton runs for that chip."""
    nvidia = triton.knobs.nvidia
    tool = nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas
    return version_of(Path(tool.path)) or tool.version


def outcomes(log: str) -> dict[str, str]:
    """"passed", "failed" or "skipped" of each test that `pytest -v` has named, with pytest-xdist too."""
    results = {}
    for line in log.splitlines():
        found = TEST_THEN_RESULT.match(line) or RESULT_THEN_TEST.match(line)
        if found:
            # a test that passes and then fails to clean up is named twice: the last word counts
            results[found["test"]] = RESULTS[found["result"]]
    return results


def repeat(failed: list[str], out: Path, seconds: float, arch: int, env: dict[str, str],
           other: tuple[str, Path] | None = None, root: Path = ROOT) -> dict:
    """Run the tests that failed again, assembled by another ptxas and compiled afresh.

    failed: their names, as pytest takes them. out: the folder for assemblers.json and assemblers.log.
    seconds: at most, for all of them. env: of the first run. other: (version, path), by default the newest
    ptxas that is not in use. root: where the tests' paths begin.

    Returns and writes {"in_use": version, "other": version or None, "tests": {test: {version: result}}}; a
    test that time did not allow is "not run". Prints a line for each test. Nothing is run where
    no test failed, or where there is no other assembler.
    """
    in_use = assembler_in_use(arch)
    if other is None:
        others = [item for item in assemblers().items() if item[0] != in_use]
        other = others[0] if others else (None, None)
    version, path = other
    report = {"in_use": in_use, "other": version, "tests": {test: {in_use: "failed"} for test in failed}}
    if failed and version:
        again = rerun(failed, out / "assemblers.log", seconds, arch, env, path, root)
        for test, results in report["tests"].items():
            results[version] = again.get(test, "not run")
            print(f"{test}: failed with ptxas {in_use}, {results[version]} with ptxas {version}",
                  flush=True)
    elif failed:
        print(f"{len(failed)} failed with ptxas {in_use}, and there is no other to try: pip install "
              "nvidia-cuda-nvcc", flush=True)
    (out / "assemblers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def rerun(tests: list[str], log: Path, seconds: float, arch: int, env: dict[str, str], ptxas: Path,
          root: Path) -> dict[str, str]:
    """What became of the tests with that assembler; those that there was no time for are missing."""
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if arch >= 100 else "TRITON_PTXAS_PATH"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *tests]
    with open(log, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as cache:
        settings = {variable: str(ptxas), "TRITON_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=root, stdout=file, stderr=subprocess.STDOUT,
                                   env={**env, **settings}, start_new_session=True)
        try:
            process.wait(seconds)
        except BaseException as error:  # Ctrl-C too must not leave it running
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    return outcomes(log.read_text(encoding="utf-8", errors="replace"))
