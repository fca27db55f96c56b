"""Where the machine code of the loops is kept: by a hash of the sources, where it can be written."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1zero.kernels.cpu import compile as cpu

pytestmark = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="Numba is not installed")
KERNELS = Path(cpu.__file__).parents[1]
ONE_LOOP = """if True:
    import numpy, torch
    from kernels.cpu import compile as cpu
    from kernels.cpu.elementwise import swiglu, swiglu_fwd_loop
    assert cpu.UNCACHED  # nothing has been touched by the import
    x = torch.randn(3, 8)
    gate, up = x.chunk(2, 1)
    assert torch.allclose(swiglu(x), torch.nn.functional.silu(gate) * up, atol=1e-6)
    print(cpu.cache_folder(), sum(swiglu_fwd_loop.stats.cache_hits.values()))"""


@pytest.fixture
def copy(tmp_path):
    """The kernels alone, in a folder of their own, without caches."""
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def environment(root, **more):
    home = {"HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "home" / ".cache")}
    kept = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    return kept | home | {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_NUM_THREADS": "1"} | more


def start(root, **more):
    return subprocess.Popen([sys.executable, "-c", ONE_LOOP], cwd=root, env=environment(root, **more),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(the cache folder, how many loops were read from it)"""
    out, error = process.communicate()
    assert process.returncode == 0, error
    folder, hits = out.split()
    return folder, int(hits)


def test_a_changed_source_changes_the_folder(copy):
    folder = copy / "kernels" / "cpu"
    before = cpu.source_hash(folder)
    assert before == cpu.source_hash(folder) == cpu.source_hash(Path(cpu.__file__).parent)
    seen = {before}
    for path in sorted(folder.glob("*.py")):
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        seen.add(cpu.source_hash(folder))
    (folder / "sampling.py").rename(folder / "samplings.py")  # in the same order
    seen.add(cpu.source_hash(folder))
    assert len(seen) == 2 + len(list(folder.glob("*.py")))


def test_code_is_kept_beside_the_source_and_an_old_one_is_left_alone(copy):
    first, hits = finish(start(copy))
    assert Path(first).parent == copy / "kernels" / "cpu" / "__pycache__" and hits == 0
    assert finish(start(copy)) == (first, 1)
    registers = copy / "kernels" / "cpu" / "registers.py"
    registers.write_text(registers.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    second, hits = finish(start(copy))
    assert second != first and hits == 0 and list(Path(first).rglob("*.nbi"))


def test_folders_that_cannot_be_written_to(copy):
    # a file where the folder would be stops even the superuser, whom a folder's mode does not
    (copy / "kernels" / "cpu" / "__pycache__").write_text("", encoding="utf-8")
    folder, _ = finish(start(copy))
    assert Path(folder).is_relative_to(copy / "home") and list(Path(folder).rglob("*.nbi"))
    chosen, _ = finish(start(copy, NUMBA_CACHE_DIR=str(copy / "chosen")))
    assert Path(chosen).parent == copy / "chosen" and list(Path(chosen).rglob("*.nbi"))
    assert finish(start(copy, NUMBA_CACHE_DIR=str(copy / "kernels" / "mlp.py"))) == ("None", 0)
    shutil.rmtree(copy / "home")
    (copy / "home").write_text("", encoding="utf-8")
    assert finish(start(copy)) == ("None", 0)


def test_processes_may_race(copy):
    racing = [start(copy) for _ in range(3)]
    folders = {finish(process)[0] for process in racing}
    assert len(folders) == 1 and finish(start(copy)) == (*folders, 1)
