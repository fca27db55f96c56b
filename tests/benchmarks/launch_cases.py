"""The launches of the tests that need a GPU and of the models, recorded on the device "meta".

The tests of tests/kernels/gpu run as they are, except that "cuda" means "meta", that a back end named
"reference" answers with the Triton op's shapes, and that each question to a tensor has the answer yes or 0.
"""
import importlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import aot
from benchmarks.kernel_ops import OPS
from benchmarks.kernels import as_list
from r1zero.kernels import dispatch, grpo, reference
from r1zero.kernels.chips import KNOWN_CHIPS
from r1zero.kernels.linear_logprob import linear_logprob
from r1zero.model.config import PRESETS, ModelConfig, preset
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

GPU_TESTS = Path(__file__).parents[1] / "kernels/gpu"


def on_meta(x):
    names_cuda = isinstance(x, str | torch.device) and str(x).startswith("cuda")
    return torch.device("meta") if names_cuda else x


class CudaIsMeta(TorchFunctionMode):
    """Where Python names "cuda"; and what Python asks of a tensor."""

    answers = {"equal": True, "item": 0.0, "__bool__": True, "__float__": 0.0}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple(on_meta(x) for x in args)
        kwargs = {name: on_meta(x) for name, x in (kwargs or {}).items()}
        first, name = args[0] if args else None, function.__name__
        if name == "cuda":
            moved = first.to("meta")
            moved.on_host = first
            return moved
        if isinstance(first, torch.Tensor) and first.device.type == "meta":
            if name in self.answers:
                return self.answers[name]
            if name == "tolist":  # what the tests expect of dead groups
                return [1] + [0] * (len(first) - 1)
            if name == "repeat_interleave" and hasattr(args[1], "on_host"):
                return function(*args, output_size=int(args[1].on_host.sum()))
        return function(*args, **kwargs)


class OpsLaunch(TorchDispatchMode):
    """Our operators launch on "meta", too, where PyTorch would ask for the result's shape only."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "r1zero":
            return OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def launches(function: Callable, arch: int) -> set[tuple[str, str]]:
    """(kernel, data) of all that it launches, but for the references, whose backward is in fp64."""
    found, off = set(), []

    def note(*, fn, compile, **_):
        data = compile["specialization_data"]
        if not off and "*fp64" not in data:
            found.add((fn.name, data))
        return True

    @contextmanager
    def unseen():
        off.append(True)
        try:
            yield
        finally:
            off.pop()

    def named(op, backends, impl, args):
        if impl == "triton":
            return backends[0]

        def run(*args):
            with unseen():
                return backends[0].run(*args)

        return SimpleNamespace(name="meta", run=run)

    def exact_advantages(rewards, offsets, normalise=True):
        with unseen():
            return grpo.grpo_advantages(rewards, offsets, normalise, impl="triton")

    def exact_logprob(*args):
        with unseen():
            return linear_logprob(*args, impl="triton")

    with ExitStack() as stack:
        stack.enter_context(aot.chip(arch))
        for owner, name, value in (
                (dispatch, "why_not_triton", lambda *_: None), (dispatch, "_named", named),
                (aot.chips, "chip_of", lambda device: KNOWN_CHIPS[arch]),
                (reference, "grpo_advantages", exact_advantages),
                (reference, "linear_logprob", exact_logprob),
                (torch.cuda, "mem_get_info", lambda: (2**50, 2**50)),
                (torch.testing, "assert_close", lambda *_, **__: None),
                (aot.triton.knobs.runtime, "jit_cache_hook", note)):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(CudaIsMeta())
        stack.enter_context(OpsLaunch())
        function()
    return found


def calls_of(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """The tests of a file with each set of parameters, as pytest would call them."""
    for name, function in vars(module).items():
        if not name.startswith("test_") or "graph" in name:
            continue  # meta has no CUDA graphs
        axes = []
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                names = [x.strip() for x in mark.args[0].split(",")]
                values = [x if len(names) > 1 else (x,) for x in mark.args[1]]
                axes.append([dict(zip(names, x, strict=True)) for x in values])
        for sets in itertools.product(*axes):
            options = {name: value for one in sets for name, value in one.items()}
            yield f"{name} {options}", lambda f=function, o=options: f(**o)


def gpu_tests() -> Iterator[tuple[str, Callable]]:
    for path in sorted(GPU_TESTS.glob("test_*.py")):
        yield from calls_of(importlib.import_module(f"tests.kernels.gpu.{path.stem}"))


def one_step(config: ModelConfig):
    """Forward and backward of a model, as training runs them on a GPU."""
    model = Transformer(config, torch.bfloat16).to("meta")
    hidden = model.hidden_states(pack([[1] * 300, [1] * 129], "cuda"))
    logp, entropy = model.logprobs(hidden, torch.zeros(len(hidden), dtype=torch.int64, device="meta"))
    (logp.sum() + entropy.sum()).backward()


def presets() -> Iterator[tuple[str, Callable]]:
    for name in PRESETS:
        config = preset(name, 1000, n_layers=1)
        yield name, lambda config=config: one_step(config)


def benchmark(case, dtype: torch.dtype):
    """What benchmarks.kernels times of our own."""
    def new(*shape):
        return torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)

    op = OPS["rmsnorm" if case.op == "rmsnorm_residual" else case.op]
    ours = op.ours(case, torch.device("meta"), "triton")
    inputs = op.inputs(case, new)
    outputs = as_list(ours(*inputs))
    torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs])


def benchmark_cases() -> Iterator[tuple[str, Callable]]:
    for op in OPS.values():
        for case in (*op.full_size, *op.smoke):
            yield f"{case.op} {case.label}", lambda case=case: benchmark(case, torch.bfloat16)


def needs(kernel: str, data: str) -> str:
    """What makes a kernel another one. The alignment of index pointers is left out: it wins nothing."""
    data = json.loads(data)
    types, names = data["signature"], list(data["signature"])
    attributes = {names[path[0]]: value
                  for path, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True)
                  if types[names[path[0]]] not in ("*i32", "*i64")}
    constants = {names[path[0]]: value
                 for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
    return json.dumps([kernel, types, constants, attributes, data["options"]], sort_keys=True)
