"""The transformer against one written out naively; its gradients, its initialisation, what it takes."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1zero.kernels import dispatch
from r1zero.model.balance import Balance
from r1zero.model.config import PRESETS, ModelConfig, preset
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, count_parameters, flops_per_token

from .model_cases import CONFIGS, SHAPE, each_config, naive_logits, scattered, sequences


@each_config
def test_the_model_is_the_naive_one(config):
    model, batch = scattered(config), sequences(5, 1, 9)
    packed = pack(batch)
    with torch.no_grad():
        expected = torch.cat([naive_logits(model, s) for s in batch])
        hidden = model.hidden_states(packed)
        assert torch.allclose(model.logits(hidden).double(), expected, atol=1e-4, rtol=1e-4)
        targets = packed.tokens.roll(-1)
        logp, entropy = model.logprobs(hidden, targets, 0.7)
        expected = (expected / 0.7).log_softmax(-1)
        # rope's table is in fp32
        assert torch.allclose(logp, expected.gather(1, targets[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5)


# ---- gradients

@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_padded_vocabulary_have_no_probability_and_get_no_gradient(tied):
    """Two rows behind the 17 in use: the model is the one whose head never had them."""
    config = ModelConfig(**SHAPE, tie_embeddings=tied, vocab_in_use=17)
    model, (tokens,) = scattered(config), [torch.randint(17, (9,)).tolist()]
    hidden, targets = model.hidden_states(pack([tokens])), torch.tensor([*tokens[1:], 0])
    logp, entropy = model.logprobs(hidden, targets)
    expected = naive_logits(model, tokens)[:, :17].log_softmax(-1)
    torch.testing.assert_close(logp, expected[range(9), targets])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    assert model.logits(hidden).shape == (9, 17)
    logp.sum().backward()
    head = model.embed if tied else model.lm_head.weight
    assert not head.grad[17:].any() and head.grad[:17].any(1).all()


GRADIENT_CASES = ["qwen2", "all, three queries a key", "linear rope, biases", "smollm3", "olmo2", "mixtral",
                  "deepseek's mixture", "qwen2's and gpt-oss's mixture", "yarn", "deepseek v2 lite",
                  "deepseek v3"]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_are_finite_differences(name):
    model = scattered(CONFIGS[name])
    packed = pack(sequences(5, 3, 1))
    targets = packed.tokens.roll(-1)

    def loss():
        logp, entropy = model.logprobs(model.hidden_states(packed), targets, 0.9)
        return -logp.mean() - 0.5 * entropy.mean()

    loss().backward()
    for name, p in model.named_parameters():
        flat = p.detach().view(-1)
        for i in {int(p.grad.abs().argmax()), *torch.randint(len(flat), (3,)).tolist()}:
            was, step, losses = flat[i].item(), 1e-5, []
            for value in (was + step, was - step):
                flat[i] = value
                losses.append(loss().item())
            flat[i] = was
            measured = (losses[0] - losses[1]) / (2 * step)
            assert abs(measured - p.grad.view(-1)[i].item()) <= 1e-6 * max(1, abs(measured)), name


def test_a_tied_head_gets_both_gradients():
    tied = scattered(CONFIGS["plain"])
    untied = Transformer(ModelConfig(**SHAPE, tie_embeddings=False), torch.float64).double()
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embed.detach()})
    assert tied.head is tied.embed and untied.head is untied.lm_head.weight
    packed = pack(sequences(6, 2))
    for model in (tied, untied):
        model.logprobs(model.hidden_states(packed), packed.tokens.roll(-1))[0].sum().backward()
    assert torch.allclose(tied.embed.grad, untied.embed.grad + untied.lm_head.weight.grad, atol=1e-12)
    assert untied.embed.grad.abs().max() > 1e-3 and untied.lm_head.weight.grad.abs().max() > 1e-3


def test_bf16_compute_is_close_and_the_masters_stay_fp32():
    config = preset("tiny", 50)
    packed = pack(sequences(9, 20, 3, vocab=50))
    targets, results = packed.tokens.roll(-1), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(config, dtype).init_weights(0)
        hidden = model.hidden_states(packed)
        assert hidden.dtype == dtype and model.logits(hidden).dtype == torch.float32
        logp, _ = model.logprobs(hidden, targets)
        (-logp.mean()).backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        results[dtype] = (logp.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]))
    (logp, grad), (logp_16, grad_16) = results.values()
    assert 0 < (logp - logp_16).abs().max() < 0.1 and (logp - logp_16).abs().mean() < 0.02
    assert torch.cosine_similarity(grad, grad_16, dim=0) > 0.999


# ---- estimators, presets, initialisation

@pytest.mark.parametrize("config", [
    *CONFIGS.values(), preset("demo", 800), preset("tiny", 7, tie_embeddings=False), preset("depth=3", 100),
    preset("depth=9", 64)])
def test_count_parameters_is_the_sum_of_numel(config):
    assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


def latent_matrices(c):
    """Numbers in the matrices of latent attention (facts of DeepSeek-V3's own code)."""
    latent, H, D, M = c.latent, c.n_heads, c.head_dim, c.d_model
    q = M * H * D if latent.q_rank is None else latent.q_rank * (M + H * D)
    kv = M * (latent.kv_rank + latent.rope_dim)
    kv += latent.kv_rank * H * (D - latent.rope_dim + latent.value_dim)
    return q + kv + H * latent.value_dim * M


def closed_count(c):
    """The parameters as a formula."""
    heads = (c.n_heads + c.n_kv_heads) * c.qk_norm_full_width + 2 * c.qk_norm
    qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * (c.d_model + c.qkv_bias) + c.head_dim * heads
    attention = qkv + c.d_model * c.n_heads * c.head_dim
    if c.latent:
        attention = latent_matrices(c) + c.latent.kv_rank + (c.latent.q_rank or 0)
    block = attention + 2 * c.d_model + c.out_bias * c.d_model
    mlps = sum(closed_mlp(c, layer, c.moe and c.moe.n_experts, 1) for layer in range(c.n_layers))
    return c.n_layers * block + mlps + c.d_model + c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)


def closed_mlp(c, layer, n_experts, with_biases):
    """Numbers in the MLP of a layer, or in so many experts and what is beside them."""
    def dense(width):
        return 3 * c.d_model * width + with_biases * c.mlp_bias * (2 * width + c.d_model)

    moe = c.moe
    if moe is None or layer in moe.dense_layers:
        return dense(c.d_ff)
    router = moe.n_experts * (c.d_model + with_biases * moe.router_bias) + moe.shared_gate * c.d_model
    shared = dense(moe.d_shared) if moe.d_shared else 0
    return router + shared + 3 * n_experts * c.d_model * moe.d_expert


def closed_flops(c, seqlen, training):
    """The FLOPs as a formula."""
    attention, per_key = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim * c.d_model, 2 * c.head_dim
    if c.latent:
        attention, per_key = latent_matrices(c), c.head_dim + c.latent.value_dim
    mlps = sum(closed_mlp(c, layer, c.moe and c.moe.experts_per_token, 0) for layer in range(c.n_layers))
    matmuls = 2 * (c.n_layers * attention + mlps + c.vocab_size * c.d_model)
    return (matmuls + c.n_layers * c.n_heads * per_key * seqlen) * (3 if training else 1)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(preset(name, 151_936) for name in PRESETS),
                                    preset("qwen2.5-1.5b", 9, tie_embeddings=False)])
def test_what_the_layers_tell_is_the_closed_formula(config):
    assert count_parameters(config) == closed_count(config)
    for training in (False, True):
        for seqlen in (0, 1, 1024):
            assert flops_per_token(config, seqlen, training) == closed_flops(config, seqlen, training)
        assert flops_per_token(config, 1 / 3, training) == pytest.approx(
            closed_flops(config, 1 / 3, training), rel=1e-12)


def test_a_model_on_the_meta_device_tells_its_size_without_memory():
    with torch.device("meta"):  # 1 TB of weights
        model = Transformer(preset("qwen2.5-1.5b", 10**8, tie_embeddings=False), torch.bfloat16)
    assert model.device.type == "meta" and sum(p.nbytes for p in model.parameters()) > 10**12
    assert model.cache_bytes_per_token == 28_672  # as published for Qwen2.5-1.5B
    assert model.blocks[0].attn.cache_shape == (2, 128, 128)
    assert {Transformer(CONFIGS["plain"], dtype).cache_bytes_per_token
            for dtype in (torch.float32, torch.float16)} == {2 * 2 * 2 * 6 * 4, 2 * 2 * 2 * 6 * 2}


def test_the_parameters_are_in_the_order_that_seeds_rely_on():
    """`init_weights` samples in this order, and the norm of the gradient is added up in it."""
    names = [name for name, _ in Transformer(ModelConfig(**SHAPE, tie_embeddings=False)).named_parameters()]
    block = ["attn_norm", "mlp_norm", "attn.qkv.weight", "attn.out.weight", "mlp.gate_up.weight",
             "mlp.down.weight"]
    blocks = [f"blocks.{i}.{name}" for i in (0, 1) for name in block]
    assert names == ["embed", "norm", "lm_head.weight", *blocks]
    model, rng = Transformer(ModelConfig(**SHAPE)).init_weights(3), torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = p.shape[1] ** -0.5 / (2 if name.endswith(("out.weight", "down.weight")) else 1)
            assert torch.equal(p, torch.randn(p.shape, generator=rng) * std), name


def test_flops_per_token_is_what_a_counter_counts():
    for config in (CONFIGS["plain"], CONFIGS["all, three queries a key"]):
        model, (tokens,) = scattered(config), sequences(16)
        with FlopCounterMode(display=False) as counter:
            logits = naive_logits(model, tokens)
        # the naive model computes the scores above the diagonal too, so it counts as twice the length
        assert counter.get_total_flops() == 16 * flops_per_token(config, 32, training=False)
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
        assert counter.get_total_flops() == 16 * (flops_per_token(config, 32, training=True)
                                                  - flops_per_token(config, 32, training=False))


def test_init_is_a_function_of_the_seed_with_the_stated_spread():
    config = ModelConfig(vocab_size=300, n_layers=3, d_ff=256, qk_norm=True, qkv_bias=True,
                         tie_embeddings=False)
    state = torch.random.get_rng_state()
    a, b, other = (Transformer(config).init_weights(seed) for seed in (5, 5, 6))
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's random numbers are used up
    seen = set()
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), name
        if x.ndim == 1:
            assert x.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
            continue
        assert not torch.allclose(x, z), name
        writes = name.endswith(("attn.out.weight", "mlp.down.weight"))  # to the residual stream
        expected = x.shape[1] ** -0.5 / (6**0.5 if writes else 1)
        assert abs(x.std().item() / expected - 1) < 0.02 and abs(x.mean().item()) < 0.02 * expected, name
        seen.add(x[0, 0].item())
    assert len(seen) == 4 * 3 + 2  # no two matrices hold the same numbers


# ---- what training keeps

def bytes_saved(model: Transformer, n_tokens: int) -> int:
    """What a forward pass of the model, on the meta device, saves for backward beside the weights."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x  # held, so that no other storage gets its address
        return x

    lengths = [n_tokens // 4] * 3 + [n_tokens - n_tokens // 4 * 3]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        packed = pack([[1] * n for n in lengths], "meta")
        logp, entropy = model.logprobs(model.hidden_states(packed), packed.tokens)
    assert (logp.sum() + entropy.sum()).grad_fn is not None
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("name, n_tokens, dtype", [
    ("qwen2.5-0.5b", 4096, torch.bfloat16), ("qwen3-0.6b", 1000, torch.bfloat16),
    ("demo", 4096, torch.float32), ("deepseek-v2-lite", 1000, torch.bfloat16)])
def test_the_estimate_of_what_training_keeps_is_what_is_saved(name, n_tokens, dtype, monkeypatch):
    """In the shapes that the Triton kernels make, with the copies of the weights in the compute dtype."""
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_: None)
    with torch.device("meta"):
        model = Transformer(preset(name, 151_936, n_layers=4, moe=None), dtype)
    saved = bytes_saved(model, n_tokens)
    assert saved / 1.1 < model.saved_bytes(n_tokens) < 1.1 * saved
    # the workspace of the head at least, and no more than one layer's gradients beside
    workspace = max(model.workspaces(n_tokens))
    assert 4096 * dtype.itemsize * n_tokens < workspace < 0.7 * saved + 4096 * 4 * n_tokens


# ---- what is not kept: activation checkpointing, frozen parameters ----

def gradients_of(model, packed) -> dict:
    logp, entropy = model.logprobs(model.hidden_states(packed), packed.tokens)
    (logp.sum() + entropy.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@each_config
def test_frozen_matrices_have_no_gradient_and_that_of_the_rest_is_the_same_bit_for_bit(config):
    packed, model = pack(sequences(5, 9)), scattered(config, dtype=torch.float32)
    expected = gradients_of(scattered(config, dtype=torch.float32), packed)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim < 2)
    found = gradients_of(model, packed)
    assert {name for name, gradient in found.items() if gradient is None} >= \
        {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for name, gradient in found.items():
        assert gradient is None or gradient.equal(expected[name]), name


@each_config
def test_what_is_computed_again_has_the_same_gradients_bit_for_bit(config):
    packed = pack(sequences(5, 9))
    expected = gradients_of(scattered(config, dtype=torch.float32), packed)
    model = scattered(config, dtype=torch.float32)
    model.recomputes = True
    found = gradients_of(model, packed)
    for name, gradient in expected.items():
        assert (gradient is None and found[name] is None) or gradient.equal(found[name]), name


def test_a_block_runs_again_in_the_backward_pass_and_only_where_there_is_one():
    model, calls = scattered(CONFIGS["plain"]), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    packed = pack(sequences(5, 9))
    model.recomputes = True
    with torch.no_grad():
        model.hidden_states(packed)
    assert len(calls) == 2
    gradients_of(model, packed)
    assert len(calls) == 2 + 4


def test_experts_are_counted_once_where_blocks_run_twice():
    loads, packed = [], pack(sequences(5, 9))
    for recomputes in (False, True):
        model = scattered(CONFIGS["mixtral"], dtype=torch.float32)
        model.recomputes = recomputes
        balance = Balance(model)
        with balance.watch():
            hidden = model.hidden_states(packed)
        (model.logprobs(hidden, packed.tokens)[0].sum() + balance.loss(1.0)).backward()
        loads.append(balance.counts_LE)
        assert model.blocks[0].mlp.router.linear.weight.grad.abs().max() > 0
    assert loads[0].equal(loads[1]) and loads[0].sum() == 2 * 14 * 2
