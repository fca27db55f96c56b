"""Which implementation runs, what runs where Triton is missing, and what the element-wise ops refuse."""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from r1zero.kernels import dispatch
from r1zero.kernels.cpu import compile as cpu
from r1zero.kernels.dispatch import HAS_TRITON, arch_of, check_tensors, use_triton, warn_once
from r1zero.kernels.mlp import swiglu
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

def test_a_cpu_tensor_is_served_by_the_reference_without_a_word(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert not use_triton(None, torch.zeros(1, dtype=dtype))
            assert not use_triton("reference", torch.zeros(1, dtype=dtype))


@needs_triton
@pytest.mark.parametrize("dtype, message", [
    (torch.float32, "impl is \"triton\", but Triton serves CUDA tensors .*, not cpu; expected impl=None"),
    (torch.float64, "take float32, float16 and bfloat16, not torch.float64"),
])
def test_triton_cannot_be_forced_where_it_cannot_serve(monkeypatch, dtype, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        use_triton("triton", torch.zeros(1, dtype=dtype))


class OnCuda:
    """Stands in for a CUDA tensor, of which only this much is asked."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype):
        self.dtype = dtype


def test_cuda_tensors_are_served_by_triton_and_a_slower_path_is_said_once(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert use_triton(None, OnCuda(dtype)) and use_triton("triton", OnCuda(dtype))
    assert not use_triton("reference", OnCuda(torch.float32))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="not torch.float64: the slower plain torch reference runs") as said:
        assert not any(use_triton(None, OnCuda(torch.float64)) for _ in range(3))
    assert len(said) == 1
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.warns(UserWarning, match="Triton is not installed") as said:
        assert not any(use_triton(None, OnCuda(torch.bfloat16)) for _ in range(3))
    assert len(said) == 1
    with pytest.raises(ValueError, match="Triton is not installed"):
        use_triton("triton", OnCuda(torch.bfloat16))


def test_arch_of():
    assert arch_of(torch.device("cpu")) == arch_of(torch.device("meta")) == 80


def test_where_triton_cannot_be_imported_everything_runs_on_the_references(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('no wheel')\n", encoding="utf-8")
    out = run_python("""
import torch
from r1zero.kernels import decode_attention, linear_logprob, attention, dispatch, rmsnorm, rope, swiglu

assert not dispatch.HAS_TRITON
x = torch.randn(4, 2, 8, requires_grad=True)
y = rope.rope(x, *rope.rope_table(torch.arange(4), 8, 1e4))
y = rmsnorm.rmsnorm(attention.attention(y, y, y, torch.tensor([0, 4], dtype=torch.int32), 4), torch.ones(8))
swiglu.swiglu(y).sum().backward()
assert x.grad.isfinite().all()
for work in (lambda: swiglu.swiglu(x, impl="triton"), lambda: dispatch.triton.cdiv(1, 2),
             lambda: dispatch.tl.arange(0, 2)):
    try:
        work()
    except (ValueError, ImportError) as error:
        print(error)
""", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    said = ['impl is "triton", but Triton is not installed', "triton.cdiv is needed", "triton.arange is need"]
    assert re.findall("|".join(said), out) == said


# ---- what is checked of every op

def test_check_tensors():
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
def test_impl(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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
