"""Which back end runs, what runs where Triton is missing, and what the element-wise ops refuse."""
import contextlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from r1zero.kernels import dispatch
from r1zero.kernels.chips import KIB, Chip
from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.dispatch import (
    HAS_TRITON,
    Backend,
    arch_of,
    check_tensors,
    choose,
    compute_dtype,
    serves_all,
    triton_refuses,
    warn_once,
    why_not_triton,
)
from r1zero.kernels.mlp import SWIGLU, swiglu, swiglu_mlp
from r1zero.kernels.rmsnorm import rmsnorm
from r1zero.kernels.rope import rope

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run_python(source: str, **env) -> str:
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", source], cwd=ROOT, text=True,
                          env={**os.environ, **env}, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the choice


class OnCuda:
    """Stands in for a CUDA tensor, of which only this much is asked."""

    is_cuda = True
    device = torch.device("cuda", 0)


def backends(triton=None, loops=None):
    """A table of three, each of which says its name; the reasons why the first two refuse."""
    return (Backend("triton", lambda *_: "triton", lambda *_: triton),
            Backend("cpu", lambda *_: "cpu", lambda *_: loops),
            Backend("reference", lambda *_: "reference", serves_all))


def test_the_first_back_end_that_serves_is_taken():
    x = torch.zeros(1)
    assert choose("op", backends(), None, x)(x) == "triton"
    assert choose("op", backends("not here"), None, x)(x) == "cpu"
    assert choose("op", backends("not here", "nor here"), None, x)(x) == "reference"
    with pytest.raises(ValueError, match="op: no back end serves these arguments; the last one says: no"):
        choose("op", backends("not here")[:1] + backends(loops="nor here")[1:2], None, x)


def test_impl_names_the_back_end_and_one_that_cannot_serve_says_why():
    x, table = torch.zeros(1), backends(loops="it is no number")
    assert [choose("op", table, name, x)(x) for name in ("triton", "reference")] == ["triton", "reference"]
    with pytest.raises(ValueError, match='op: impl is "cpu", but it is no number; expected impl=None'):
        choose("op", table, "cpu", x)
    with pytest.raises(ValueError, match='"triton", "cpu", "reference" or None'):
        choose("op", table, "gpu", x)
    with pytest.raises(ValueError, match="impl is 'cpu'; expected \"triton\", \"reference\" or None"):
        choose("op", table[::2], "cpu", x)  # an op without loops


def test_back_ends_are_given_all_arguments():
    seen = []
    table = (Backend("reference", None, lambda *args: seen.append(args)),)
    for impl in (None, "reference"):
        choose("op", table, impl, torch.zeros(1), 2, "three")
    assert [args[1:] for args in seen] == [(2, "three")] * 2


def test_a_cpu_tensor_is_served_without_triton_and_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for impl in (None, "reference"):
                run = choose("swiglu", SWIGLU, impl, torch.zeros(2, dtype=dtype))
                assert run in [backend.run for backend in SWIGLU[1:]]
            assert run is SWIGLU[-1].run


def test_what_a_cuda_tensor_goes_without_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="^it is too old: the slower back end 'cpu' runs instead") as said:
        for _ in range(3):
            assert choose("op", backends("it is too old"), None, OnCuda())() == "cpu"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", backends("it is too old"), "reference", OnCuda())() == "reference"
        assert choose("op", backends(), None, OnCuda())() == "triton"


def reason(dtype=torch.bfloat16, device="cuda", arch=90, installed=True, interpreting=False):
    return why_not_triton(dtype, device, arch, installed, interpreting)


def test_triton_serves_floating_dtypes_on_chips_that_are_new_enough():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(reason(dtype, arch=arch) is None for arch in (80, 86, 89, 90, 100, 120))
    assert reason(torch.float64) == "the Triton kernels take float32, float16 and bfloat16, not torch.float64"
    assert reason(arch=75) == "the Triton kernels need sm_80 or later, and this GPU is sm_75"
    assert reason(device="cpu").endswith("(and CPU tensors with TRITON_INTERPRET=1), not cpu")
    assert reason(installed=False) == "Triton is not installed (pip install triton)"


def test_the_interpreter_serves_a_cpu_but_not_in_bfloat16():
    for device in ("cpu", "cuda"):
        assert reason(torch.float16, device, interpreting=True) is None
        assert reason(torch.bfloat16, device, interpreting=True).endswith("interpreter is wrong for bfloat16")
        assert "not torch.float64" in reason(torch.float64, device, interpreting=True)


@needs_triton
@pytest.mark.parametrize("dtype, message", [
    (torch.float32, "impl is \"triton\", but Triton serves CUDA tensors .*, not cpu; expected impl=None"),
    (torch.float64, "take float32, float16 and bfloat16, not torch.float64"),
])
def test_triton_cannot_be_forced_where_it_cannot_serve(dtype, message):
    with pytest.raises(ValueError, match=message):
        choose("swiglu", SWIGLU, "triton", torch.zeros(1, dtype=dtype))


def test_tensors_without_a_chip_count_as_sm_80():
    assert arch_of(torch.device("cpu")) == arch_of(torch.device("meta")) == 80
    assert triton_refuses(torch.zeros(1)) == triton_refuses(torch.zeros(1), "whatever", 3)


def test_chips_before_sm_80_compute_in_fp16_without_triton_and_are_told_why(monkeypatch):
    assert compute_dtype(torch.device("cpu")) == torch.float32
    gpu = torch.device("cuda", 0)
    for arch, dtype in ((80, torch.bfloat16), (121, torch.bfloat16), (75, torch.float16)):
        chip = Chip(arch, 64 * KIB, 40)
        monkeypatch.setattr(dispatch, "chip_of", lambda device, chip=chip: chip)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warn_once.cache_clear()
            assert {compute_dtype(gpu) for _ in range(3)} == {dtype}
        assert len(said) == (arch < 80)
    assert "need sm_80 or later, and this GPU is sm_75: models compute in float16" in str(said[0].message)
    if HAS_TRITON:
        assert reason(torch.float16, arch=75).endswith("need sm_80 or later, and this GPU is sm_75")


def test_where_triton_cannot_be_imported_everything_runs_on_the_references(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel')\n", encoding="utf-8")
    out = run_python("""
import torch
from r1zero.kernels import decode_attention, linear_logprob, attention, dispatch, grpo, mlp, rmsnorm, rope

assert not dispatch.HAS_TRITON
x = torch.randn(4, 2, 8, requires_grad=True)
y = rope.rope(x, *rope.rope_table(torch.arange(4), 8, 1e4))
y = rmsnorm.rmsnorm(attention.attention(y, y, y, torch.tensor([0, 4], dtype=torch.int32), 4), torch.ones(8))
mlp.swiglu(y).sum().backward()
assert x.grad.isfinite().all()
for work in (lambda: mlp.swiglu(x, impl="triton"), lambda: dispatch.triton.cdiv(1, 2),
             lambda: dispatch.tl.arange(0, 2)):
    try:
        work()
    except (ValueError, ImportError) as error:
        print(error)
""", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    said = ['impl is "triton", but Triton cannot be imported', "triton.cdiv is need", "triton.arange is need"]
    assert re.findall("|".join(said), out) == said


# ---- what is checked of every op

def test_tensors_of_one_op_lie_on_one_device_in_floating_dtypes_with_contiguous_rows():
    x, y = torch.zeros(2, 3), torch.zeros(2, 1).expand(2, 3)
    check_tensors("op")
    check_tensors("op", x=x, y=None, z=torch.zeros(()), strided=torch.zeros(4, 5)[::2, 1:3],
                  one_wide=torch.zeros(3, 4)[:, ::4])
    for tensors, message in (
            (dict(x=x, y=x.to("meta")), "op: y is on meta, but x is on cpu; move them to one device"),
            (dict(y=None, x=x, z=x.long()), "op: z is torch.int64; expected a floating dtype"),
            (dict(x=x.T), r"op: the last dimension of x has stride 3, expected 1; pass x.contiguous\(\)"),
            (dict(x=x, y=y), "op: the last dimension of y has stride 0")):
        with pytest.raises(ValueError, match=message):
            check_tensors("op", **tensors)


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


X, TABLE, META = zeros(5, 4, 8), zeros(5, 4), torch.device("meta")


@needs_triton
@pytest.mark.parametrize("call", [
    lambda impl: rmsnorm(X, zeros(8), impl=impl),
    lambda impl: rope(X, TABLE, TABLE, impl=impl),
    lambda impl: swiglu(X, impl=impl),
], ids=["rmsnorm", "rope", "swiglu"])
def test_impl_picks_the_back_end_of_an_op(call):
    if cpu.HAS_NUMBA:
        assert torch.equal(call(None), call("cpu"))
    torch.testing.assert_close(call(None), call("reference"))
    with pytest.raises(ValueError, match="impl is 'cuda'; expected \"triton\", \"cpu\", \"reference\" or"):
        call("cuda")
    with pytest.raises(ValueError, match="not cpu; expected impl=None or \"reference\" here"):
        call("triton")


@pytest.mark.parametrize("call, message", [
    (lambda: rmsnorm(X, zeros(8, device=META)), "rmsnorm: weight is on meta, but x is on cpu"),
    (lambda: rmsnorm(X, zeros(8), 1e-6, X.to(META)), "rmsnorm: residual is on meta, but x is on cpu"),
    (lambda: rmsnorm(X.mT, zeros(4)), "rmsnorm: the last dimension of x has stride 8"),
    (lambda: rmsnorm(X, zeros(8), 1e-6, zeros(5, 8, 4).mT), "the last dimension of residual has stride 4"),
    (lambda: rmsnorm(X.long(), zeros(8)), "rmsnorm: x is torch.int64; expected a floating dtype"),
    (lambda: rmsnorm(X, zeros(4)), r"weight has shape \(4,\), but the last dimension of x is 8; give one"),
    (lambda: rmsnorm(zeros(), zeros()), "the last dimension of x is missing"),
    (lambda: rmsnorm(X, zeros(8), 1e-6, zeros(4, 8)),
     r"residual is \(4, 8\) in torch.float32, but x is \(5, 4, 8\) in torch.float32; expected the "),
    (lambda: rmsnorm(X, zeros(8), 1e-6, X.half()), "residual is .* in torch.float16, but x is .*float32"),
    (lambda: rope(X, TABLE.to(META), TABLE), "rope: cos is on meta, but x is on cpu"),
    (lambda: rope(X, TABLE, TABLE.int()), "rope: sin is torch.int32"),
    (lambda: rope(zeros(5, 8, 4).mT, TABLE, TABLE), "rope: the last dimension of x has stride 4"),
    (lambda: rope(X, zeros(4, 5).T, TABLE), "rope: the last dimension of cos has stride 5"),
    (lambda: rope(X, zeros(5, 8), zeros(5, 8)), r"cos \(5, 8\), .*; expected \[T, H, D\] and twice"),
    (lambda: swiglu(X.mT), "swiglu: the last dimension of gate_up has stride 8"),
    (lambda: swiglu(X.long()), "swiglu: gate_up is torch.int64"),
    (lambda: swiglu(X[..., :7]), r"swiglu: gate_up is \(5, 4, 7\); its last dimension .* must be even"),
    (lambda: swiglu(zeros()), r"swiglu: gate_up is \(\)"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the whole MLP

def mlp_inputs(T, M=32, F=48):
    return [torch.randn(shape) for shape in ((T, M), (2 * F, M), (M, F))]


def test_the_mlp_is_swiglu_between_two_products_and_casts_the_weights():
    x, gate_up, down = mlp_inputs(6)
    expected = swiglu(x @ gate_up.T, impl="reference") @ down.T
    for impl in (None, "reference"):
        torch.testing.assert_close(swiglu_mlp(x, gate_up, down, impl), expected, rtol=1e-5, atol=1e-4)
    y = swiglu_mlp(x[None].bfloat16(), gate_up, down)
    assert y.dtype == torch.bfloat16 and y.shape == (1, 6, 32)
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    assert torch.equal(y[0], linear(swiglu(linear(x, gate_up)), down))


def test_the_mlp_names_shapes_and_back_ends_that_do_not_fit():
    x, gate_up, down = mlp_inputs(6)
    for wrong in ((x, gate_up[1:], down), (x, gate_up, down[1:]), (x[:, 1:], gate_up, down),
                  (x, down, gate_up)):
        with pytest.raises(ValueError, match=r"swiglu_mlp: x is .*expected \[..., M\], \[2F, M\] and"):
            swiglu_mlp(*wrong)
    with pytest.raises(ValueError, match='swiglu_mlp: impl is "cpu", but .*; expected impl=None'):
        swiglu_mlp(x, gate_up, down, "cpu")  # six tokens are too few
    with pytest.raises(ValueError, match="swiglu_mlp: impl is 'gpu'"):
        swiglu_mlp(x, gate_up, down, "gpu")


def test_triton_launches_on_the_device_of_the_tensor_and_others_are_left_alone(monkeypatch):
    """With two GPUs the current one is not always the tensor's."""
    entered = []

    class Entered:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            pass

        def __exit__(self, *rest):
            pass

    class OnTheSecondGPU:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Entered)
    x = OnTheSecondGPU()
    table = (Backend("triton", lambda x: "ran", lambda x: None),
             Backend("reference", lambda x: "plain", serves_all))
    for impl in (None, "triton"):
        assert choose("op", table, impl, x)(x) == "ran" and entered == [x.device]
        entered.clear()
    assert choose("op", table, "reference", torch.zeros(1))(torch.zeros(1)) == "plain" and entered == []


def test_whether_ops_are_compiled_first_follows_from_the_kept_machine_code(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "cache_folder", lambda: tmp_path)
    here = torch.device("cpu")
    assert dispatch.compiles_first(here) == cpu.HAS_NUMBA
    assert not dispatch.compiles_first(torch.device("meta"))
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "loop.nbi").touch()
    assert not dispatch.compiles_first(here)
