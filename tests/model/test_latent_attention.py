"""Latent attention against transformers' DeepSeek-V2 and V3, its two forms against each other, its cache."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from r1zero.kernels.rope import rope_table
from r1zero.model.attention import PackedKV
from r1zero.model.config import LatentShape, ModelConfig
from r1zero.model.engine.cache import PAGE, step_bytes
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.pages import PagedKV, Pages
from r1zero.model.engine.slots import Slots
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, count_parameters

from .huggingface_cases import LATENTS, TOLERANCE, error_of, read, saved, sequences, their_logits
from .latent_cases import ALL_ERRORS, absorbed_hidden_states, wrong
from .model_cases import CONFIGS, scattered

OURS = ["deepseek v2 lite", "deepseek v3"]
each_model = pytest.mark.parametrize("name", LATENTS)


@each_model
def test_packed_sequences_have_the_logits_of_transformers(name):
    assert error_of(read(saved(name)), name) < TOLERANCE


@each_model
def test_a_cache_of_latents_has_them_token_by_token(name):
    model = read(saved(name))
    with torch.no_grad():
        hidden = torch.cat([absorbed_hidden_states(model, tokens.tolist()) for tokens in sequences()])
        assert (model.logits(hidden) - their_logits(name)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name, error", ALL_ERRORS)
def test_every_classic_error_moves_the_logits(name, error):
    assert error_of(wrong(name, error), name) > 100 * TOLERANCE


# ---- the two forms ----

@pytest.mark.parametrize("name", OURS)
def test_absorbed_is_expanded(name):
    model, tokens = scattered(CONFIGS[name]), torch.randint(19, (40,)).tolist()
    with torch.no_grad():
        expanded = model.hidden_states(pack([tokens]))
        torch.testing.assert_close(absorbed_hidden_states(model, tokens), expanded, rtol=1e-9, atol=1e-9)


class Adapted(nn.Module):
    """A matrix with a low-rank addition, as LoRA has it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear
        n_out, n_in = linear.weight.shape
        self.down = nn.Parameter(torch.randn(rank, n_in, dtype=linear.weight.dtype))
        self.up = nn.Parameter(torch.randn(n_out, rank, dtype=linear.weight.dtype))

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def test_an_adapter_on_the_absorbed_matrix_counts():
    model, tokens = scattered(CONFIGS["deepseek v3"]), torch.randint(19, (20,)).tolist()
    with torch.no_grad():
        without = model.hidden_states(pack([tokens]))
        for block in model.blocks:
            block.attn.kv_up = Adapted(block.attn.kv_up)
        expanded = model.hidden_states(pack([tokens]))
        torch.testing.assert_close(absorbed_hidden_states(model, tokens), expanded, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(without, expanded, atol=1e-3)


def test_bf16_of_both_forms_is_near_fp32():
    model, tokens = scattered(CONFIGS["deepseek v3"], dtype=torch.float32), torch.randint(19, (40,)).tolist()
    with torch.no_grad():
        exact = model.hidden_states(pack([tokens]))
        model.compute_dtype = torch.bfloat16
        for hidden in (model.hidden_states(pack([tokens])), absorbed_hidden_states(model, tokens)):
            assert hidden.dtype == torch.bfloat16
            assert 0 < (hidden - exact).abs().mean() < 0.02 * exact.abs().mean()


# ---- what it takes ----

V2_LITE = ModelConfig(  # DeepSeek-V2-Lite with dense MLPs
    vocab_size=102_400, n_layers=27, d_model=2048, n_heads=16, n_kv_heads=16, head_dim=192, d_ff=10_944,
    tie_embeddings=False, max_seq_len=4096, latent=LatentShape())


def test_the_cache_holds_as_many_bytes_as_published():
    with torch.device("meta"):
        model = Transformer(V2_LITE, torch.bfloat16)
    assert model.blocks[0].attn.cache_shape == (1, 64, 512)
    assert model.cache_bytes_per_token == 31_104  # 276,480 of keys and values
    attention = sum(p.numel() for p in model.blocks[0].attn.parameters())
    assert attention == 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048
    assert count_parameters(V2_LITE) == 2 * 102_400 * 2048 + 2048 + 27 * (
        attention + 2 * 2048 + 3 * 2048 * 10_944)
    # the prefill of a step: the stream five times; per head q and k twice, a value and an output
    narrow = replace(V2_LITE, d_ff=64)
    prefill = [step_bytes(narrow, torch.bfloat16, n, 1) for n in (0, 1000)]
    assert prefill[1] - prefill[0] == 1000 * 2 * (5 * 2048 + 16 * (4 * 192 + 2 * 128))


def test_pages_have_the_size_that_the_layer_says():
    model = scattered(CONFIGS["deepseek v3"], dtype=torch.float32)
    assert not Slots.serves(model)
    engine = Engine(model, max_rows=2, cache_tokens=32)
    assert isinstance(engine.cache, Pages)
    numbers = sum(x.numel() for layer in engine.cache.caches for x in layer)
    assert numbers * 4 == (32 + 16) * model.cache_bytes_per_token == 48 * 2 * (6 + 7) * 4
    with pytest.raises(ValueError, match="more than attention and dense MLPs"):
        Engine(model, paged=False)


def test_a_decoding_step_asks_the_device_for_no_number():
    """On the meta device there is none to be had: so a CUDA graph can hold the step."""
    with torch.device("meta"):
        model = Transformer(CONFIGS["deepseek v3"], torch.bfloat16)
        caches = [[torch.empty(9, n, PAGE, w, dtype=torch.bfloat16) for w in widths]
                  for n, *widths in (block.attn.cache_shape for block in model.blocks)]
        kv = PagedKV(caches, torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
        hidden = model(torch.zeros(3, dtype=torch.int64), kv.positions, kv)
    assert hidden.shape == (3, 12) and hidden.dtype == torch.bfloat16


def test_the_estimate_of_what_training_keeps_is_what_the_layer_saves():
    """With attention on one sequence longer than a block of queries, which keeps no scores."""
    config, n_tokens, kept = CONFIGS["deepseek v3"], 400, {}
    attn = scattered(config, dtype=torch.float32).blocks[0].attn
    weights = {p.untyped_storage()._cdata for p in attn.parameters()}

    def keep(x):
        if x.untyped_storage()._cdata not in weights and x.numel() > n_tokens:
            kept[x.untyped_storage()._cdata] = x
        return x

    packed, x = pack([[1] * n_tokens]), torch.randn(n_tokens, config.d_model, requires_grad=True)
    cos, sin = rope_table(packed.positions, config.rope_dim, config.rope_theta)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert attn(x, cos, sin, PackedKV(packed)).grad_fn is not None
    saved = sum(x.untyped_storage().nbytes() for x in kept.values()) // (4 * n_tokens)
    # The plain path has its output twice, by head and by token; all layers share the angles.
    assert saved - 4 * config.latent.value_dim - config.latent.rope_dim == attn.kept_per_token
