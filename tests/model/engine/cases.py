"""What the tests of the engine share: a small model, mixed prompts, and when two answers count as equal."""
import numpy as np
import pytest
import torch

from r1zero.kernels.cpu import compile as cpu
from r1zero.model.attention import PrefillKV
from r1zero.model.config import ModelConfig
from r1zero.model.engine.naive import generate_naive
from r1zero.model.engine.pages import Pages
from r1zero.model.engine.requests import Request
from r1zero.model.engine.sampling import counter_uniform, sample_seeds
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

needs_numba = pytest.mark.skipif(not cpu.HAS_NUMBA, reason="slots need Numba, which is not installed")
both_caches = pytest.mark.parametrize("paged", [pytest.param(False, marks=needs_numba), True],
                                      ids=["slots", "pages"])
EOS = 3
CONFIG = ModelConfig(vocab_size=29, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24,
                     qk_norm=True, qkv_bias=True, tie_embeddings=False, max_seq_len=256)
PROMPTS = [[5, 6, 7], [8], [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12], [8], [20, 21, 22, 23, 24, 25], [9, 9]]


def mixed_requests(n=24, temperature=1.0):
    """Prompts, lengths and seeds of all kinds; some prompts twice or more."""
    rng = np.random.default_rng(0)
    return [Request(PROMPTS[i % 6], int(rng.integers(1, 20)), int(seed), temperature, stop_ids=(EOS,))
            for i, seed in enumerate(sample_seeds(n, 1).tolist())]


class Watched(Transformer):
    """Adds a constant to the end token's logit, and writes down what is prefilled."""

    def __init__(self, eos_bias=0.0, dtype=torch.float32, config=CONFIG):
        super().__init__(config, dtype)
        self.init_weights(0)
        self.eos_bias, self.prefilled = eos_bias, []
        self.register_forward_pre_hook(note_prefill)
        with torch.no_grad():
            self.lm_head.weight.mul_(1.5)  # sharper choices
            for name, p in self.named_parameters():
                if name.endswith(("norm", "bias")):
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 4)

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[:, EOS] += self.eos_bias
        return logits


def note_prefill(model, args) -> None:
    _, _, kv = args
    if isinstance(kv, PrefillKV):
        model.prefilled.append(kv.packed.cu_seqlens.diff().tolist())


ORACLE = {}  # its answers so far: it is slow, and many tests ask the same


def naive_of(model, r):
    """The oracle's answer; r has no filters."""
    weights = sum(float(p.detach().double().sum()) for p in model.parameters())
    key = (weights, model.config, model.eos_bias, tuple(r.prompt),
           r.max_new_tokens, r.temperature, r.seed, r.stop_ids)
    if key not in ORACLE:
        ORACLE[key] = generate_naive(model, r)
    return ORACLE[key]


def boundary_gap(model, tokens, temperature, seed):
    """How near sampling after `tokens` was to another token."""
    with torch.no_grad():
        logits = model.logits(model.hidden_states(pack([tokens]))[-1:])[0]
    if temperature == 0:
        best, second = logits.topk(2).values.tolist()
        return best - second
    u = counter_uniform(torch.tensor([seed]), torch.tensor([len(tokens)]))
    return float(((logits / temperature).softmax(-1).cumsum(-1) - u).abs().min())


def same(a, b, model, r):
    """True if equal; False if a random number near an edge between two tokens fell either way; else fails."""
    n = min(len(a.tokens), len(b.tokens))
    apart = np.flatnonzero(a.tokens[:n] != b.tokens[:n])
    if len(apart):
        first = int(apart[0])
        assert boundary_gap(model, [*r.prompt, *a.tokens[:first].tolist()], r.temperature, r.seed) < 1e-5
        return False
    assert np.array_equal(a.tokens, b.tokens) and a.finish_reason == b.finish_reason
    assert a.logp.shape == a.tokens.shape and np.abs(a.logp - b.logp).max() < 1e-4
    return True


def agree(model, requests, completions, edges=1):
    """All as the oracle has it, but for at most so many random numbers on an edge."""
    assert len(requests) == len(completions)
    equal = sum(same(c, naive_of(model, r), model, r) for r, c in zip(requests, completions, strict=True))
    assert equal >= len(requests) - edges


def everything_is_free(engine):
    assert engine.n_unfinished == engine.scheduler.n_finished == 0
    assert engine.rows.n == engine.cache.n == 0
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.completed
    if isinstance(engine.cache, Pages):
        table = engine.cache.page_table
        assert sorted(table.free) == list(range(1, table.n_pages + 1))
        assert not table.users.any() and not table.pages.any() and not table.lengths.any()
