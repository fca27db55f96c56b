"""`generate` against the oracle that recomputes everything, and that it does no more work than it should."""
import numpy as np
import pytest
import torch

from r1zero.model.config import ModelConfig
from r1zero.model.generation import NonFiniteError, counter_uniform, generate, generate_naive, sample_seeds
from r1zero.model.packed import pack
from r1zero.model.transformer import Transformer

EOS = 3
CONFIG = ModelConfig(vocab_size=29, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24,
                     qk_norm=True, qkv_bias=True, tie_embeddings=False, max_seq_len=40)
PROMPTS = [[5, 6, 7], [8], [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12], [8], [20, 21, 22, 23, 24, 25], [9, 9]]


class Watched(Transformer):
    """Adds a constant to the end token's logit, and writes down what is asked of it."""

    def __init__(self, eos_bias=0.0, dtype=torch.float32):
        super().__init__(CONFIG, dtype)
        self.init_weights(0)
        self.eos_bias, self.prefilled, self.rows = eos_bias, [], []
        with torch.no_grad():
            self.lm_head.mul_(1.5)  # sharper choices

    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[:, EOS] += self.eos_bias
        return logits

    def prefill(self, packed):
        self.prefilled.append(packed.cu_seqlens.diff().tolist())
        return super().prefill(packed)

    def decode(self, tokens, lengths, caches, longest):
        self.rows.append(len(tokens))
        return super().decode(tokens, lengths, caches, longest)


def boundary_gap(model, tokens, temperature, seed):
    """How near the draw after `tokens` was to falling on another token."""
    with torch.no_grad():
        logits = model.logits(model(pack([tokens]))[-1:])[0]
    if temperature == 0:
        best, second = logits.topk(2).values.tolist()
        return best - second
    u = counter_uniform(torch.tensor([seed]), torch.tensor([len(tokens)]))
    return float(((logits / temperature).softmax(-1).cumsum(-1) - u).abs().min())


def same(a, b, model, prompt, temperature, seed):
    """True if equal; False if a draw on the edge between two tokens fell either way; fails otherwise."""
    n = min(len(a.tokens), len(b.tokens))
    apart = np.flatnonzero(a.tokens[:n] != b.tokens[:n])
    if len(apart):
        first = int(apart[0])
        assert boundary_gap(model, [*prompt, *a.tokens[:first].tolist()], temperature, seed) < 1e-5
        return False
    assert np.array_equal(a.tokens, b.tokens) and a.finish_reason == b.finish_reason
    assert a.logp.shape == a.tokens.shape and np.abs(a.logp - b.logp).max() < 1e-4
    return True


@pytest.mark.parametrize("eos_bias", [0.0, 2.0, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_generate_is_the_naive_loop(temperature, eos_bias):
    model, n = Watched(eos_bias), 4
    seeds = sample_seeds(len(PROMPTS) * n, 1)
    completions = generate(model, PROMPTS, n, 12, temperature, seeds, EOS)
    assert len(completions) == len(PROMPTS) * n
    equal = 0
    for i, completion in enumerate(completions):
        prompt, seed = PROMPTS[i // n], int(seeds[i])
        oracle = generate_naive(model, prompt, 12, temperature, seed, EOS)
        equal += same(completion, oracle, model, prompt, temperature, seed)
    assert equal >= len(completions) - 1
    lengths = {len(c.tokens) for c in completions}
    assert temperature == 0 or len(lengths) > 1
    for c in completions:
        assert c.tokens.dtype == np.int64 and c.logp.dtype == np.float32
        assert EOS not in c.tokens[:-1]
        assert c.finish_reason == ("stop" if c.tokens[-1] == EOS else "length")
        assert c.finish_reason == "stop" or len(c.tokens) == 12


def test_waves_order_and_neighbours_change_nothing():
    model, n = Watched(2.0), 3
    seeds = sample_seeds(len(PROMPTS) * n, 2)
    whole = generate(model, PROMPTS, n, 10, 1.0, seeds, EOS)
    equal, total = 0, 0

    def compare(found, rows):
        nonlocal equal, total
        for completion, row in zip(found, rows, strict=True):
            equal += same(completion, whole[row], model, PROMPTS[row // n], 1.0, int(seeds[row]))
            total += 1

    for max_rows in (1, 3, 7, 12):
        model.prefilled.clear()
        compare(generate(model, PROMPTS, n, 10, 1.0, seeds, EOS, max_rows), range(len(seeds)))
        assert all(len(wave) == max(1, max_rows // n) for wave in model.prefilled[:-1])
        assert [x for wave in model.prefilled for x in wave] == [len(p) for p in PROMPTS]
    order = [4, 0, 5, 2, 1, 3]
    rows = [p * n + i for p in order for i in range(n)]
    compare(generate(model, [PROMPTS[p] for p in order], n, 10, 1.0, seeds[rows], EOS), rows)
    for row in range(0, len(seeds), 2):
        compare(generate(model, [PROMPTS[row // n]], 1, 10, 1.0, seeds[row : row + 1], EOS), [row])
    assert equal >= total - 1


def test_equal_prompts_with_other_seeds_go_other_ways():
    model = Watched()
    found = generate(model, [[8]] * 2, 4, 10, 1.0, sample_seeds(8, 3), EOS)
    assert len({tuple(c.tokens) for c in found}) == 8
    found = generate(model, [[8]] * 2, 4, 10, 1.0, torch.full((8,), 7), EOS)
    assert len({tuple(c.tokens) for c in found}) == 1


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_logp_is_of_the_distribution_that_was_sampled(temperature):
    model = Watched()
    completions = generate(model, PROMPTS, 1, 12, temperature, sample_seeds(6, 4), EOS)
    for prompt, c in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            hidden = model(pack([[*prompt, *c.tokens.tolist()]]))
            logp, _ = model.logprobs(hidden[len(prompt) - 1 : -1], torch.from_numpy(c.tokens), temperature)
        assert np.abs(c.logp - logp.numpy()).max() < 1e-5


def test_a_prompt_is_prefilled_once_and_finished_rows_leave():
    model, n = Watched(2.0), 16
    completions = generate(model, PROMPTS, n, 20, 1.0, sample_seeds(len(PROMPTS) * n, 5), EOS)
    assert model.prefilled == [[len(p) for p in PROMPTS]]
    lengths = np.array([len(c.tokens) for c in completions])
    stops = np.array([c.finish_reason == "stop" for c in completions])
    # a row that has t tokens and did not stop needs one more decoding
    alive = [int(((lengths > t) | ((lengths == t) & ~stops)).sum()) for t in range(1, 20)]
    alive = [a for a in alive if a]
    assert len(model.rows) == len(alive) and alive[-1] < alive[0] / 4
    for rows, needed in zip(model.rows, alive, strict=True):
        assert rows == needed or needed > rows * 7 // 8
    assert model.rows == sorted(model.rows, reverse=True)


def test_one_new_token_needs_no_decoding():
    model = Watched(3.0)
    completions = generate(model, PROMPTS, 8, 1, 1.0, sample_seeds(48, 6), EOS)
    assert model.rows == [] and {len(c.tokens) for c in completions} == {1}
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert all((c.finish_reason == "stop") == (c.tokens[0] == EOS) for c in completions)


def test_a_prompt_may_fill_the_model_and_hold_the_end_token():
    model = Watched()
    prompt = [EOS] * (CONFIG.max_seq_len - 2)
    a, = generate(model, [prompt], 1, 2, 1.0, torch.tensor([5]), 28)
    assert same(a, generate_naive(model, prompt, 2, 1.0, 5, 28), model, prompt, 1.0, 5)


def test_bf16_generation_is_near_fp32():
    """The same seed draws the same token wherever the draw is not near an edge."""
    seeds = sample_seeds(24, 7)
    wide, narrow = (generate(Watched(dtype=dtype), PROMPTS, 4, 1, 1.0, seeds, EOS)
                    for dtype in (torch.float32, torch.bfloat16))
    assert sum(int(a.tokens[0] == b.tokens[0]) for a, b in zip(wide, narrow, strict=True)) >= 21
    assert max(abs(a.logp[0] - b.logp[0]) for a, b in zip(wide, narrow, strict=True)
               if a.tokens[0] == b.tokens[0]) < 0.1


def test_gradients_are_neither_made_nor_lost():
    model = Watched()
    completion, = generate(model, [[5]], 1, 3, 1.0, torch.tensor([1]), EOS)
    hidden = model(pack([[5, *completion.tokens.tolist()]]))
    logp, _ = model.logprobs(hidden, torch.zeros(len(hidden), dtype=torch.int64))
    logp.sum().backward()
    assert model.embed.grad is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named_and_not_sampled_from(value):
    model = Watched()
    with torch.no_grad():
        model.blocks[1].mlp.down[3, 3] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="logits .* in 12 of 12 rows"):
            generate(model, PROMPTS, 2, 5, temperature, sample_seeds(12, 8), EOS)
        with pytest.raises(NonFiniteError, match="logits"):
            generate_naive(model, [5], 5, temperature, 1, EOS)


@pytest.mark.parametrize("change,message", [
    ({"prompts": []}, "0 prompts"), ({"prompts": [[1], []]}, "at least one token"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -0.1}, "temperature -0.1"),
    ({"temperature": float("nan")}, "temperature nan"), ({"temperature": float("inf")}, "temperature inf"),
    ({"prompts": [[1], [1] * 39]}, "a prompt of 39 tokens and max_new_tokens 2 pass .* max_seq_len 40"),
    ({"seeds": torch.zeros(5, dtype=torch.int64)}, "5 seeds for 2 prompts x 2 samples; expected 4"),
    ({"n_samples": 0, "seeds": torch.zeros(0)}, "n_samples is 0"), ({"n_samples": -1}, "n_samples is -1"),
    ({"prompts": [[1], [29]]}, "token id 29"),
])
def test_requests_that_cannot_be_served(change, message):
    request = dict(prompts=[[1], [2, 3]], n_samples=2, max_new_tokens=2, temperature=1.0,
                   seeds=torch.zeros(4, dtype=torch.int64), eos_id=EOS)
    generate(Watched(), **request)
    with pytest.raises(ValueError, match=message):
        generate(Watched(), **{**request, **change})
