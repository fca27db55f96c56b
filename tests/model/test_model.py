"""The transformer against one written out naively; its estimators, its initialisation, its batch."""
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r1zero.model.config import PRESETS, ModelConfig, from_depth, preset
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer, flops_per_token, param_count

from ..kernels.naive_ops import naive_attention, naive_rmsnorm, naive_rope, naive_swiglu

SHAPE = dict(vocab_size=19, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=10)
CONFIGS = {
    "plain": ModelConfig(**SHAPE),
    "qwen2": ModelConfig(**SHAPE, qkv_bias=True, rope_theta=50.0),
    "qwen3": ModelConfig(**SHAPE, qk_norm=True, tie_embeddings=False),
    "all, three queries a key": ModelConfig(**{**SHAPE, "n_heads": 6}, qk_norm=True, qkv_bias=True,
                                            tie_embeddings=False, norm_eps=0.1),
    "one kv head": ModelConfig(**{**SHAPE, "n_kv_heads": 1}),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scattered(config, seed=0, dtype=torch.float64):
    """A model whose every parameter matters: biases and norms are not at their initial 0 and 1."""
    model = Transformer(config).init_weights(seed).to(dtype)
    model.compute_dtype = dtype
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=rng, dtype=dtype)
    return model


def sequences(*lengths, vocab=19):
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


def naive_logits(model, tokens):
    """All logits of one sequence, from the definition."""
    c, positions = model.config, torch.arange(len(tokens))
    H, G, D = c.n_heads, c.n_kv_heads, c.head_dim
    x = model.embed[torch.tensor(tokens)]
    for block in model.blocks:
        qkv = naive_rmsnorm(x, block.attn_norm, c.norm_eps) @ block.attn.qkv.T
        if c.qkv_bias:
            qkv = qkv + block.attn.qkv_bias
        q, k, v = (part.reshape(len(tokens), -1, D) for part in qkv.split([H * D, G * D, G * D], -1))
        if c.qk_norm:
            q = naive_rmsnorm(q, block.attn.q_norm, c.norm_eps)
            k = naive_rmsnorm(k, block.attn.k_norm, c.norm_eps)
        q, k = (naive_rope(part, positions, c.rope_theta) for part in (q, k))
        x = x + naive_attention(q, k, v, [len(tokens)]).flatten(1) @ block.attn.out.T
        y = naive_rmsnorm(x, block.mlp_norm, c.norm_eps)
        x = x + naive_swiglu(y @ block.mlp.gate_up.T) @ block.mlp.down.T
    head = model.embed if c.tie_embeddings else model.lm_head
    return naive_rmsnorm(x, model.norm, c.norm_eps) @ head.T


@each_config
def test_the_model_is_the_naive_one(config):
    model, batch = scattered(config), sequences(5, 1, 9)
    packed = pack(batch)
    with torch.no_grad():
        expected = torch.cat([naive_logits(model, s) for s in batch])
        hidden = model(packed)
        assert torch.allclose(model.logits(hidden).double(), expected, atol=1e-4, rtol=1e-4)
        targets = packed.tokens.roll(-1)
        logp, entropy = model.logprobs(hidden, targets, 0.7)
        expected = (expected / 0.7).log_softmax(-1)
        # rope's table is in fp32
        assert torch.allclose(logp, expected.gather(1, targets[:, None])[:, 0], atol=1e-5)
        assert torch.allclose(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5)


@each_config
def test_prefill_and_decode_go_on_where_forward_stands(config):
    model, batch = scattered(config), sequences(4, 1, 7)
    page, new = 3, sequences(3, 3, 3)
    table = torch.randperm(12)[:12].view(3, 4).int()  # of 13 pages, in any order
    with torch.no_grad():
        whole = [model(pack([s + n])) for s, n in zip(batch, new, strict=True)]
        packed = pack(batch)
        hidden, kept = model.prefill(packed)
        assert torch.equal(hidden, model(packed))
        caches = []
        for pair in kept:
            shape = (13, config.n_kv_heads, page, config.head_dim)
            caches.append(tuple(torch.full(shape, 1e3, dtype=torch.float64) for _ in pair))
            for x, cache in zip(pair, caches[-1], strict=True):
                for row, part in enumerate(x.split([4, 1, 7])):
                    for place, entry in enumerate(part):
                        cache[table[row, place // page], :, place % page] = entry
        for t in range(3):
            lengths = torch.tensor([4, 1, 7], dtype=torch.int32) + t
            hidden = model.decode(torch.tensor(new)[:, t], lengths, caches, table)
            for row in range(3):
                assert torch.allclose(hidden[row], whole[row][int(lengths[row])], atol=1e-9)


def test_a_sequence_knows_nothing_of_its_neighbours():
    model = scattered(CONFIGS["qwen3"], dtype=torch.float32)
    batch = sequences(5, 0, 1, 9, 30, 2, 2, 1, 1, 1, 1)
    with torch.no_grad():
        alone = [model(pack([s])) if s else torch.zeros(0, 12) for s in batch]
        for order in (range(11), reversed(range(11)), torch.randperm(11).tolist()):
            order = list(order)
            together = model(pack([batch[i] for i in order])).split([len(batch[i]) for i in order])
            for i, hidden in zip(order, together, strict=True):
                assert torch.allclose(hidden, alone[i], atol=2e-5)


def test_no_token_sees_a_later_one():
    model, (tokens,) = scattered(CONFIGS["plain"]), sequences(9)
    with torch.no_grad():
        before, after = (model(pack([[*tokens[:6], x, *tokens[7:]]])) for x in (3, 4))
    assert torch.equal(before[:6], after[:6])
    assert all(not torch.allclose(a, b, atol=1e-6) for a, b in zip(before[6:], after[6:], strict=True))


# ---- gradients

@pytest.mark.parametrize("name", ["qwen2", "all, three queries a key"])
def test_gradients_are_finite_differences(name):
    model = scattered(CONFIGS[name])
    packed = pack(sequences(5, 3, 1))
    targets = packed.tokens.roll(-1)

    def loss():
        logp, entropy = model.logprobs(model(packed), targets, 0.9)
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
    untied.load_state_dict({**tied.state_dict(), "lm_head": tied.embed.detach()})
    assert tied.head is tied.embed and untied.head is untied.lm_head
    packed = pack(sequences(6, 2))
    for model in (tied, untied):
        model.logprobs(model(packed), packed.tokens.roll(-1))[0].sum().backward()
    assert torch.allclose(tied.embed.grad, untied.embed.grad + untied.lm_head.grad, atol=1e-12)
    assert untied.embed.grad.abs().max() > 1e-3 and untied.lm_head.grad.abs().max() > 1e-3


def test_bf16_compute_is_close_and_the_masters_stay_fp32():
    config = preset("tiny", 50)
    packed = pack(sequences(9, 20, 3, vocab=50))
    targets, results = packed.tokens.roll(-1), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(config, dtype).init_weights(0)
        hidden = model(packed)
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
def test_param_count_is_the_sum_of_numel(config):
    assert param_count(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_presets_have_the_published_sizes():
    """As the models' weight files hold them, at Qwen's vocabulary of 151,936."""
    sizes = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen3-0.6b": 596_049_920}
    assert {name: param_count(preset(name, 151_936)) for name in sizes} == sizes
    assert all(preset(name, 10).vocab_size == 10 for name in PRESETS)
    assert preset("tiny", 10, n_layers=5, rope_theta=3.0) == ModelConfig(
        **{**PRESETS["tiny"], "n_layers": 5, "rope_theta": 3.0}, vocab_size=10)


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


def test_the_depth_dial():
    assert from_depth(4, 100) == preset("depth=4", 100) == ModelConfig(
        vocab_size=100, n_layers=4, d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384)
    assert preset("depth=12", 9).head_dim == 64 and preset("depth=2", 9, max_seq_len=7).max_seq_len == 7
    counts = [param_count(from_depth(depth, 100)) for depth in range(1, 40)]
    assert all(a < b for a, b in zip(counts, counts[1:], strict=False))


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
        expected = x.shape[1] ** -0.5 / (6**0.5 if name.endswith(("attn.out", "mlp.down")) else 1)
        assert abs(x.std().item() / expected - 1) < 0.02 and abs(x.mean().item()) < 0.02 * expected, name
        seen.add(x[0, 0].item())
    assert len(seen) == 4 * 3 + 2  # no two matrices hold the same numbers


@pytest.mark.parametrize("change,message", [
    ({"n_heads": 3}, "n_heads 3 is no multiple of n_kv_heads 2"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
    ({"n_layers": 0}, "n_layers is 0, expected a whole number above 0"),
    ({"n_layers": None}, "n_layers is None"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"d_ff": 2.5}, "d_ff is 2.5, expected a whole number"),
    ({"d_model": "12"}, "d_model is '12'"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0, expected a number above 0"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
])
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SHAPE, **change})


@pytest.mark.parametrize("name", ["gpt5", "", "depth=0", "depth=-1", "depth=x", "depth=", "depth=2.5"])
def test_unknown_presets(name):
    with pytest.raises(ValueError, match="depth=.*" if name.startswith("depth") else "known are demo,"):
        preset(name, 10)


# ---- Packed

def test_pack():
    packed = pack([[5, 6, 7], [], np.array([8]), (9, 1)])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 1] and packed.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4, 6] and packed.max_seqlen == 3
    assert packed.tokens.dtype == packed.positions.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32 and type(packed.max_seqlen) is int


@pytest.mark.parametrize("bad", [[], [[]], [[], []], [[1, -1]]])
def test_pack_refuses(bad):
    with pytest.raises(ValueError, match="pack: "):
        pack(bad)


def test_pack_with_shared_prefixes():
    packed = pack([[1, 2, 3], [9], [], [4, 5], [6], [7]], after=np.array([-1, -1, -1, 0, 1, 2]))
    assert packed.positions.tolist() == [0, 1, 2, 0, 3, 4, 1, 0]
    assert packed.tokens[packed.keys].tolist() == [1, 2, 3, 9, 1, 2, 3, 4, 5, 9, 6, 7]
    assert packed.cu_keys.tolist() == [0, 3, 4, 4, 9, 11, 12] and packed.max_keys == 5
    assert packed.cu_keys.dtype == torch.int32 and packed.keys.dtype == torch.int64
    for bad in ([-1, 2], [-1], [0, -1], [1, 0], [-2, -1]):
        with pytest.raises(ValueError, match="pack: after is .*expected for each the index of one"):
            pack([[1], [2]], after=np.array(bad))


@each_config
def test_shared_prefixes_change_neither_hidden_states_nor_gradients(config):
    model = scattered(config)
    prefixes, tails = sequences(140, 3, 0), sequences(5, 2, 150, 5, 7, 4, 1, *range(9))
    of = np.array([1, 0, 0, 1, -1, 2, 0, *[1] * 9])
    shared = pack([*prefixes, *tails], after=np.append([-1] * 3, of))
    whole = pack([prefixes[p] + tail for p, tail in zip(of, tails, strict=True)])  # prefix -1 is empty, too
    weight = torch.randn(len(tails), model.config.d_model, dtype=torch.float64)
    results = []
    for packed in (shared, whole):
        hidden, ends = model(packed), packed.cu_seqlens[-len(tails) :].tolist()
        parts = [hidden[end - len(tail) : end] for end, tail in zip(ends, tails, strict=True)]
        model.zero_grad()
        sum((part * w).sum() for part, w in zip(parts, weight, strict=True)).backward()
        results.append([torch.cat(parts), *(p.grad for p in model.parameters())])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)
