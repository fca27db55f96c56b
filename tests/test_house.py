"""The rules of the house, read off the syntax tree. Each rule is a function from source to complaints, and is
shown to complain about a breach before the repository is held against it."""
import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "model", "eval", "rl", "train"]  # a floor may import those before it


def python_files(*folders: str) -> list[Path]:
    """Paths relative to the root, as the rules take them."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


LIBRARY = python_files(*FLOORS)
ALL = LIBRARY + python_files("tests", "benchmarks") + [Path("setup.py")]


# ---- the rules ----

def imported(path: Path, source: str) -> list[tuple[int, str, bool]]:
    """(line, full dotted name, is it relative?) of each import; import_module("literal") counts."""
    here = ["r1zero", *path.parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else []
            base = base + node.module.split(".") if node.module else base
            found += [(node.lineno, ".".join([*base, alias.name]), node.level > 0) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "."
            if not target.startswith("."):  # a full name; a relative one would need a second argument
                found.append((node.lineno, target, True))
    return found


def bad_imports(path: Path, source: str) -> list[str]:
    floor = path.parts[0] if path.parts[0] in FLOORS else None
    complaints = []
    for line, name, relative in imported(path, source):
        top, below = (name.split(".") + [""])[:2]
        if top in FLOORS:
            complaints.append(f"{path}:{line}: {name} as a top-level package; it is r1zero.{name}")
        if floor and top in ("tests", "benchmarks"):
            complaints.append(f"{path}:{line}: nothing imports {top}/")
        if floor and top == "r1zero" and not relative:
            complaints.append(f"{path}:{line}: {name} should be a relative import, within the five folders")
        if floor and top == "r1zero" and below not in FLOORS[:FLOORS.index(floor) + 1]:
            complaints.append(f"{path}:{line}: {floor}/ may not import {name}")
    return complaints


def bad_code(path: Path, source: str) -> list[str]:
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            complaints.append(f"{path}:{node.lineno}: bare except")
        if isinstance(node, ast.Name | ast.Attribute):
            if ast.unparse(node).removeprefix("builtins.") in ("eval", "exec"):
                complaints.append(f"{path}:{node.lineno}: the builtin {ast.unparse(node)}")
    return complaints


BACK_ENDS = ("triton", "numba")  # packages that only kernels/ may import


def names_a_back_end(path: Path, source: str) -> list[str]:
    """Outside kernels/ nobody imports a back end, or forces one with `impl`."""
    if path.parts[0] not in FLOORS[1:]:
        return []
    complaints = []
    for line, name, _ in imported(path, source):
        if name.split(".")[0] in BACK_ENDS or name.startswith("r1zero.kernels.cpu"):
            complaints.append(f"{path}:{line}: imports {name}, which kernels/ hides behind its ops")
    ops = {name.split(".")[-1] for _, name, _ in imported(path, source) if name.startswith("r1zero.kernels.")}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        by_name = any(keyword.arg == "impl" for keyword in node.keywords)
        words = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        by_place = ast.unparse(node.func).split(".")[-1] in ops and words & {"triton", "cpu", "reference"}
        if by_name or by_place:
            complaints.append(f"{path}:{node.lineno}: forces a back end with impl")
    return complaints


def imports_a_test(path: Path, source: str) -> list[str]:
    """What tests share lives in a cases module, not in a test module."""
    if path.parts[0] != "tests":
        return []
    here = path.parts[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = list(here[:len(here) - node.level + 1]) if node.level else []
            modules = [*base, *(node.module or "").split(".")]
            names = [modules[-1], *(alias.name for alias in node.names)]
            if modules[0] == "tests" and any(name.startswith("test_") for name in names):
                found.append(f"{path}:{node.lineno}: imports from a test module; move it to a cases module")
    return found


def branches(function: ast.FunctionDef) -> int:
    """Conditionals and loops of a function."""
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match, ast.comprehension, ast.BoolOp)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


def function_of(source: str, name: str) -> ast.FunctionDef:
    [found] = [node for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1


def never_imported(dependencies: list[str], sources: list[str]) -> list[str]:
    """Dependencies that no file imports: one enters with its first import, and leaves with its last."""
    words = {name.split(".")[0] for source in sources for _, name, relative in imported(Path("a.py"), source)
             if not relative}
    names = [Requirement(dependency).name for dependency in dependencies]
    return [name for name in names if name.replace("-", "_") not in words]


def forbidden_inits(paths: list[Path]) -> list[str]:
    return [f"{path}: the five folders hold no __init__.py" for path in paths
            if path.name == "__init__.py" and path.parts[0] in FLOORS]


def unlisted(paths: list[Path], packages: dict[str, str]) -> list[str]:
    """Library files that setup.py would leave out of a wheel, and packages that do not exist."""
    expected = {"r1zero." + ".".join(path.parts[:-1]): str(path.parent) for path in paths}
    return [f"setup.py says {name} is {packages.get(name)}, expected {expected.get(name)}"
            for name in sorted(expected.keys() | packages.keys()) if packages.get(name) != expected.get(name)]


def tree_of(readme: str) -> list[str]:
    """The paths in a README's file tree: a fenced block that begins with `r1zero/`; one name a line, further
    right when deeper (spaces or │ ├ └ ─), then, if any, an explanation. Folders end with a slash."""
    block = re.search(r"^```\w*\nr1zero/.*\n([\s\S]*?)^```", readme, re.MULTILINE)
    paths, above = [], []  # above: (column, name) of the folders that we are in
    for line in block[1].splitlines() if block else []:
        name = line.lstrip(" │├└─|`-\t")
        column = len(line) - len(name)
        if not name:
            continue
        name = name.split()[0]
        above = [(c, folder) for c, folder in above if c < column]
        paths.append("".join(folder for _, folder in above) + name)
        if name.endswith("/"):
            above.append((column, name))
    return paths


def wrong_tree(readme: str, library: list[str], exists) -> list[str]:
    """library: the files of the five folders, each of which the tree must name; exists: path -> bool."""
    tree = tree_of(readme)
    if not tree:
        return ["README.md has no file tree: a fenced block that begins with the line r1zero/"]
    return ([f"README.md does not name {path}" for path in library if path not in tree]
            + [f"README.md names {path}, which does not exist" for path in tree if not exists(path)])


def constant(source: str, name: str):
    """The value of a literal assigned to `name` at the top of a file."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"no {name}")


def unpinned(dependencies: list[str], requirements: str) -> list[str]:
    """Dependencies of setup.py that requirements.txt does not pin, or pins to what setup.py refuses."""
    lines = [Requirement(line) for line in requirements.splitlines() if line and not line.startswith("#")]
    pins = {line.name: str(line.specifier) for line in lines}
    complaints = [f"{name}{pin} is no pin, expected =="
                  for name, pin in pins.items() if not re.fullmatch(r"==[^*,]+", pin)]
    for wanted in map(Requirement, dependencies):
        version = pins.get(wanted.name, "").removeprefix("==")
        if not version or not wanted.specifier.contains(version, prereleases=True):
            complaints.append(f"setup.py wants {wanted}, the pin is {version or 'missing'}")
    return complaints


# ---- each rule sees a breach, and does not see one where there is none ----

@pytest.mark.parametrize("path, line, fine", [
    ("model/a.py", "from ..kernels.attention import attention", True),
    ("model/a.py", "from ..kernels import attention", True),
    ("model/a.py", "from .. import kernels", True),
    ("model/a.py", "from . import config", True),
    ("model/a.py", "from .config import ModelConfig", True),
    ("model/a.py", "import torch, os.path", True),
    ("model/deep/a.py", "from ...kernels import attention", True),
    ("model/deep/a.py", "from .. import config", True),
    ("train/a.py", "import_module('r1zero.rl.loss')", True),
    ("tests/a.py", "from r1zero.train import demo\nimport benchmarks.speed", True),
    ("tests/a.py", "import evaluate, modelling", True),
    ("model/a.py", "from ..eval import tasks", False),
    ("model/a.py", "from .. import train", False),
    ("model/a.py", "def f():\n    from ..rl.loss import loss", False),
    ("model/a.py", "if 0:\n    importlib.import_module('r1zero.rl.loss')", False),
    ("model/deep/a.py", "from ...rl import loss", False),
    ("kernels/a.py", "from ..model.packed import Packed", False),
    ("model/a.py", "from r1zero.kernels import attention", False),
    ("model/a.py", "import r1zero.kernels", False),
    ("model/a.py", "from .. import nowhere", False),
    ("model/a.py", "import kernels.attention", False),
    ("train/a.py", "from tests import oracle", False),
    ("rl/a.py", "import benchmarks.speed", False),
    ("tests/a.py", "from model.config import ModelConfig", False),
    ("benchmarks/a.py", "import kernels", False),
    ("benchmarks/a.py", "importlib.import_module('kernels')", False),
])
def test_import_rule(path, line, fine):
    assert bool(bad_imports(Path(path), line)) != fine


@pytest.mark.parametrize("source, fine", [
    ("model.eval()", True), ("from ..eval.tasks import Task", True), ("re.compile('eval(1)')", True),
    ("try:\n    f()\nexcept ValueError:\n    pass", True), ("eval('1')", False), ("x = [exec]", False),
    ("import builtins\nbuiltins.eval('1')", False), ("try:\n    f()\nexcept:\n    pass", False),
])
def test_code_rule(source, fine):
    assert bool(bad_code(Path("model/a.py"), source)) != fine


@pytest.mark.parametrize("path, source, fine", [
    ("model/a.py", "from ..kernels.mlp import swiglu_mlp\nswiglu_mlp(x, w, v)", True),
    ("kernels/a.py", "from .cpu import mlp\nimport triton\nf(x, impl='cpu')", True),
    ("tests/a.py", "f(x, impl='reference')", True),
    ("model/a.py", "from ..kernels.cpu import mlp", False),
    ("model/deep/a.py", "from ...kernels.cpu.mlp import mlp", False),
    ("rl/a.py", "import numba", False),
    ("train/a.py", "f(x, impl='reference')", False),
    ("model/a.py", "from ..kernels.mlp import swiglu\nswiglu(x, 'cpu')", False),
    ("model/a.py", "from ..kernels.mlp import swiglu\nimport torch\ntorch.device('cpu')", True),
])
def test_back_end_rule(path, source, fine):
    assert bool(names_a_back_end(Path(path), source)) != fine


@pytest.mark.parametrize("path, source, fine", [
    ("tests/rl/test_a.py", "from .cases import tiny", True),
    ("tests/rl/test_a.py", "from ..train.loop_cases import save_base", True),
    ("tests/rl/test_a.py", "from r1zero.rl import test_time", True),
    ("tests/rl/test_a.py", "from .test_b import tiny", False),
    ("tests/rl/test_a.py", "from ..train import test_b", False),
    ("tests/rl/test_a.py", "from tests.train.test_b import tiny", False),
])
def test_rule_of_shared_test_code(path, source, fine):
    assert bool(imports_a_test(Path(path), source)) != fine


def test_counting_rules():
    source = "def f(x):\n    \"\"\"Text.\"\"\"\n    if x and y:\n        pass\n    return [a for a in x]\n"
    assert branches(function_of(source, "f")) == 3 and code_lines(function_of(source, "f")) == 3
    required = ["torch>=2", "a-b; sys_platform == 'linux'"]
    assert never_imported(required, ["import torch.nn", "import a"]) == ["a-b"]
    assert never_imported(["a-b"], ["from a_b.c import d"]) == []


def test_init_and_package_rules():
    assert forbidden_inits([Path("rl/__init__.py")]) and forbidden_inits([Path("rl/deep/__init__.py")])
    assert not forbidden_inits([Path("tests/__init__.py"), Path("rl/a.py")])
    files = [Path("model/a.py"), Path("model/deep/b.py")]
    assert not unlisted(files, {"r1zero.model": "model", "r1zero.model.deep": "model/deep"})
    assert unlisted(files, {"r1zero.model": "model"})
    assert unlisted(files[:1], {"r1zero.model": "model", "r1zero.gone": "gone"})
    assert unlisted(files[:1], {"model": "model"})


TREE = """Text.
```
r1zero/
├── model/          the transformer
│   ├── a.py        its config
│   └── deep/
│       └── b.py
├── tests/
└── setup.py
```
"""


def test_tree_rule():
    there = ["model/", "model/a.py", "model/deep/", "model/deep/b.py", "tests/", "setup.py"]
    assert tree_of(TREE) == tree_of(re.sub("[│├└─]", " ", TREE)) == there
    library = ["model/a.py", "model/deep/b.py"]
    assert wrong_tree(TREE, library, there.__contains__) == []
    assert wrong_tree(TREE, [*library, "model/new.py"], there.__contains__)
    for gone in there:
        assert wrong_tree(TREE, library, lambda path, gone=gone: path != gone)
    assert wrong_tree("no tree\n```\nelse/\n```\n", library, there.__contains__)


def test_pin_rule():
    assert not unpinned(["torch>=2.11,<2.14", "a-b; sys_platform == 'linux'"], "# x\ntorch==2.13.0\n\na-b==1")
    assert unpinned(["torch>=2.11,<2.14"], "torch==2.14.0")
    for pins in ("torch>=2.13", "torch==2.*", "torch", "tqdm==1", ""):
        assert unpinned(["torch"], pins)


# ---- the repository keeps them ----

def test_the_library_is_not_empty():
    assert len(LIBRARY) > 10 and {path.parts[0] for path in LIBRARY} == set(FLOORS)


@pytest.mark.parametrize("rule", [bad_imports, bad_code, names_a_back_end, imports_a_test])
def test_every_file_keeps_the_rule(rule):
    assert [complaint for path in ALL for complaint in rule(path, (ROOT / path).read_text())] == []


def test_a_step_of_grpo_is_four_calls_without_a_branch():
    step = function_of((ROOT / "rl/step.py").read_text(), "grpo_step")
    assert branches(step) == 0
    called = [ast.unparse(node.func) for node in ast.walk(step) if isinstance(node, ast.Call)]
    assert [name for name in called if name.startswith("learner.") or name == "update_policy"] == [
        "learner.sampler.sample", "learner.grader", "learner.credit", "update_policy"]
    update = function_of((ROOT / "rl/update.py").read_text(), "update_policy")
    assert branches(update) <= 6 and code_lines(update) < 40


def test_every_dependency_is_imported():
    dependencies = constant((ROOT / "setup.py").read_text(), "DEPENDENCIES")
    assert never_imported(dependencies, [(ROOT / path).read_text() for path in LIBRARY]) == []


def test_no_init_in_the_five_folders_and_every_package_is_listed():
    packages = constant((ROOT / "setup.py").read_text(), "PACKAGES")
    assert forbidden_inits(LIBRARY) + unlisted(LIBRARY, packages) == []
    assert [(ROOT / folder / "__init__.py").exists() for folder in ("tests", "benchmarks")] == [True, True]


def test_readme_names_every_file_and_no_other():
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.is_file()]
    library = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts]
    readme = (ROOT / "README.md").read_text()
    assert wrong_tree(readme, library, lambda path: (ROOT / path).exists()) == []


def test_dependencies_are_pinned_within_what_setup_allows():
    setup, pins = ((ROOT / name).read_text() for name in ("setup.py", "requirements.txt"))
    assert unpinned(constant(setup, "DEPENDENCIES"), pins) == []
    extras = constant(setup, "EXTRAS")
    assert unpinned(extras["dev"] + extras["bpe"], (ROOT / "requirements-dev.txt").read_text()) == []


def build_wheel(tmp_path: Path) -> Path:
    """A wheel of setup.py, from a copy of the library alone."""
    source = tmp_path / "source"
    for folder in FLOORS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    return wheel


def test_a_wheel_holds_the_library_and_nothing_else(tmp_path):
    target = tmp_path / "target"
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        wheel.extractall(target)
    files = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix == ".py"} == {"r1zero" / path for path in LIBRARY}
    assert {path.parts[0].split("-")[0] for path in files} == {"r1zero"}
    # The root of the repository, with its bare folders, is the hardest place to find the right module from.
    find = "import importlib.util; print(importlib.util.find_spec('r1zero.model.config').origin)"
    found = subprocess.run([sys.executable, "-c", find], cwd=ROOT, env={"PYTHONPATH": str(target)},
                           capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(target / "r1zero/model/config.py")


@pytest.mark.slow
def test_an_installed_wheel_runs_outside_the_checkout(tmp_path):
    """From text to a checkpoint to an answer, in an empty folder, by the command that pip installs."""
    target, here = tmp_path / "target", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*pip, build_wheel(tmp_path)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}

    def r1zero(*words: str) -> str:
        ran = subprocess.run([sys.executable, target / "bin" / "r1zero", *words], cwd=here, env=environment,
                             capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = subprocess.run([sys.executable, "-c", "import r1zero.rl.step as s; print(s.__file__)"], cwd=here,
                           env=environment, capture_output=True, text=True, check=True)
    assert where.stdout.strip() == str(target / "r1zero/rl/step.py")
    r1zero("pretrain", "--run", "base", "--data", "countdown", "--documents", "200", "--steps", "4",
           "--batch-tokens", "256")
    r1zero("grpo", "--run", "rl", "--base", "base", "--steps", "2", "--prompts-per-step", "2",
           "--group-size", "2", "--max-new-tokens", "4")
    assert "countdown: 3 problems" in r1zero("eval", "--run", "rl", "--n", "3", "--samples", "1",
                                             "--max-new-tokens", "4")
