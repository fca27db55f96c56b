"""What a model computes in: how it is chosen, what an fp32 head changes; the engine computes alike."""
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1zero.kernels.dispatch import why_not_dtype, widest_dtype
from r1zero.model.config import ModelConfig
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.pages import cast_copy
from r1zero.model.engine.requests import Request
from r1zero.model.packed import pack
from r1zero.model.precision import Precision, choose_precision
from r1zero.model.transformer import Transformer

from .model_cases import CONFIGS, SHAPE, scattered

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


def random_model(dtype: torch.dtype, fp32_head: bool) -> Transformer:
    """Every parameter is random, the norms too, or their rounding would not show."""
    model = scattered(CONFIGS["plain"], dtype=torch.float32)
    model.compute_dtype, model.fp32_head = dtype, fp32_head
    return model


def test_a_dtype_is_chosen_by_name_and_refused_where_the_device_lacks_it():
    assert choose_precision("auto", False, CPU) == Precision(torch.float32, False)
    assert choose_precision("bf16", True, CPU) == Precision(torch.bfloat16, True)
    assert choose_precision("fp16", False, CPU).dtype == torch.float16
    gpu = torch.device("cuda")
    assert choose_precision("bf16", False, gpu, arch=80).dtype == torch.bfloat16
    assert choose_precision("fp16", False, gpu, arch=75).dtype == torch.float16
    with pytest.raises(ValueError, match=r"\A--dtype is 'half', expected auto, fp32, bf16, fp16\Z"):
        choose_precision("half", False, CPU)
    with pytest.raises(ValueError, match=r"\A--dtype is bf16, but bfloat16 needs sm_80 .* sm_75; expected"):
        choose_precision("bf16", False, gpu, arch=75)
    assert why_not_dtype(torch.bfloat16, "cpu", 75) is None


def test_an_apple_gpu_is_asked_for_no_float64():
    assert widest_dtype(torch.device("mps")) == torch.float32 and widest_dtype(CPU) == torch.float64


class Float64Seen(TorchDispatchMode):
    """The ops that made a float64 tensor."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(out)):
            self.ops.append(op)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_float64_a_model_trains_all_the_same(monkeypatch, dtype):
    monkeypatch.setattr("r1zero.kernels.rope.widest_dtype", lambda device: torch.float32)  # as on mps
    model, packed = random_model(dtype, False), pack([np.arange(9) % 7])
    with Float64Seen() as seen:
        logp, entropy = model.logprobs(model.hidden_states(packed), packed.tokens)
        (logp.sum() + entropy.sum()).backward()
    assert seen.ops == [] and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_an_fp32_head_is_the_fp32_product_of_hidden_states_that_were_never_rounded(dtype):
    packed = pack([np.arange(9) % 7, np.arange(5)])
    plain, exact = random_model(dtype, False), random_model(dtype, True)
    with torch.no_grad():
        rounded, hidden = plain.hidden_states(packed), exact.hidden_states(packed)
        assert rounded.dtype == dtype and hidden.dtype == torch.float32
        assert not torch.equal(hidden.to(dtype).float(), hidden)
        assert torch.allclose(hidden, rounded.float(), rtol=0.02, atol=0.02)
        assert torch.allclose(exact.logits(hidden), hidden @ exact.head.T, rtol=1e-6, atol=1e-6)
        rounded_logits = plain.logits(rounded)  # a product in 16 bit: its results are rounded, too
        assert torch.equal(rounded_logits.to(dtype).float(), rounded_logits)


def test_an_fp32_head_changes_no_bit_of_a_model_in_fp32():
    packed, found = pack([np.arange(9) % 7]), []
    for fp32_head in (False, True):
        model = random_model(torch.float32, fp32_head)
        logp, _ = model.logprobs(model.hidden_states(packed), packed.tokens)
        logp.sum().backward()
        found.append([logp, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_that_a_gpu_decodes_from_keeps_what_an_fp32_head_reads(tied):
    config = ModelConfig(**{**SHAPE, "tie_embeddings": tied})
    for fp32_head in (False, True):
        model = Transformer(config, torch.bfloat16, fp32_head).init_weights(0)
        copy = cast_copy(model, torch.bfloat16)
        assert copy.precision == model.precision == Precision(torch.bfloat16, fp32_head)
        kept = {name for name, p in copy.named_parameters() if p.dtype == torch.float32}
        head = "embed" if tied else "lm_head.weight"
        assert kept == ({"norm", head} if fp32_head else set())
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copy.parameters()}
        assert not shared  # it is rewritten in place, and must not be the masters
        packed = pack([np.arange(9) % 7])
        with torch.no_grad():
            ours, theirs = (m.logits(m.hidden_states(packed)) for m in (model, copy))
        assert torch.allclose(ours, theirs, atol=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_with_an_fp32_head_the_engine_is_nearer_to_the_trainer(dtype):
    gaps = {}
    for fp32_head in (False, True):
        model = random_model(dtype, fp32_head)
        prompt = np.arange(4)
        requests = [Request(prompt, max_new_tokens=24, seed=i) for i in range(16)]
        gap = []
        for completion in Engine(model).generate(requests):
            sequence = np.append(prompt, completion.tokens)
            hidden = model.hidden_states(pack([sequence[:-1]]))
            rows = torch.arange(len(prompt) - 1, len(sequence) - 1)
            logp, _ = model.logprobs(hidden, torch.from_numpy(sequence[len(prompt):]), rows=rows)
            gap.append((logp.detach() - torch.as_tensor(completion.logp)).abs())
        gaps[fp32_head] = float(torch.cat(gap).mean())
    assert 0 <= gaps[True] < 0.5 * gaps[False] < 0.1, gaps
