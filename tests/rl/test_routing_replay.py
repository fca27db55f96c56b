"""Routing replay: each packed token has the route that it was sampled with, however the batch is cut, and the
passes of the policy and of the reference take it; a critic chooses its own."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.engine.sampling import sample_seeds
from r1zero.model.optimizer import OptimConfig
from r1zero.model.packed import pack
from r1zero.model.routes import RecordedRouting, Routing
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl.heads import ValueHead
from r1zero.rl.losses import loss_weights
from r1zero.rl.rollouts import merge, micro_batch, micro_batches, response_logprobs, sample_groups
from r1zero.rl.step import expert_metrics, sampling_metrics
from r1zero.rl.update import (
    LogpGapError,
    Reference,
    kl_cost_to,
    kl_to_reference,
    lay_out_updates,
    logprobs_of,
    update_policy,
)

from .cases import (
    Bandit,
    Capture,
    algorithm,
    assert_same_gradient,
    make_learner,
    per_token,
    rollouts_by_hand,
    tiny,
)

MIXTURE = dict(moe=dict(n_experts=8, experts_per_token=3, d_expert=16, d_shared=16, scores="sigmoid"))
ADVANTAGES = np.array([1.5, -0.5, 0.25, 0, -1.0, 2.0])
STILL = OptimConfig(lr=1.0, warmup=0, schedule="constant", clip_grad=1e9)


def moe(seed=0, dtype=torch.float64):
    return tiny(seed, dtype, **MIXTURE)


def random_routes(rollouts, seed=0):
    """One array per answer; a group has those of its prompt in common, up to the last token."""
    rng, routes = np.random.default_rng(seed), []
    experts = np.arange(8, dtype=np.uint8)
    for start, end in zip(rollouts.group_offsets[:-1], rollouts.group_offsets[1:], strict=True):
        prompt = rng.permuted(np.broadcast_to(experts, (20, 2, 8)), axis=-1)[..., :3]
        for n in range(start, end):
            own = rng.permuted(np.broadcast_to(experts, (40, 2, 8)), axis=-1)[..., :3]
            n_prompt = int(rollouts.prompt_lengths[n]) - 1
            routes.append(np.concatenate([prompt[:n_prompt], own])[: len(rollouts.sequences[n]) - 1])
    return routes


def routed_rollouts(model, seed=0, **options):
    """Rollouts by hand whose routes are not the routers' own choice; sampler_logp is under those routes."""
    rollouts = rollouts_by_hand(model, **options)
    rollouts = dataclasses.replace(rollouts, routes=random_routes(rollouts, seed))
    with torch.no_grad():
        logp = [replayed_logp(model, rollouts, n).float().numpy() for n in range(len(rollouts.texts))]
    return dataclasses.replace(rollouts, sampler_logp=logp)


def replayed_logp(model, rollouts, n):
    """[r]: answer n by itself, through all logits, with its routes replayed: the oracle."""
    sequence, prompt = rollouts.sequences[n], int(rollouts.prompt_lengths[n])
    routing = Routing(torch.from_numpy(rollouts.routes[n]))
    logits = model.hidden_states(pack([sequence[:-1]]), routing) @ model.head.T / rollouts.temperature
    logp = logits[prompt - 1 :].log_softmax(-1)
    return logp.gather(1, torch.from_numpy(sequence[prompt:])[:, None])[:, 0]


def update_once(model, rollouts, advantages=ADVANTAGES, reference=None, **changes):
    """(the gradient of each optimizer step, what is logged)"""
    optimizer = Capture(model)
    config = algorithm(**{"optim": STILL, "micro_tokens": 10**6, "max_new_tokens": 12, **changes})
    learner = make_learner(config, model, optimizer, reference)
    return optimizer.grads, update_policy(learner, rollouts, per_token(advantages, rollouts), config, 0)


# ---- the layout ----

@pytest.mark.parametrize("samples", [[0, 1, 2, 3, 4, 5], [4, 1, 0], [5], [2, 0, 5]])
def test_each_packed_token_has_the_route_of_its_own_position_and_answer(samples):
    """Log-probs of a batch are those of its answers one by one, whose routes need no packing."""
    model = moe()
    rollouts = routed_rollouts(model)
    batch = micro_batch(rollouts, np.array(samples), "cpu")
    assert batch.routes.shape == (len(batch.packed.tokens), 2, 3) and batch.routes.dtype == torch.uint8
    logp, _ = response_logprobs(model, batch, 1.0, batch.replay())
    expected = torch.cat([replayed_logp(model, rollouts, n) for n in samples])
    torch.testing.assert_close(logp, expected, rtol=1e-9, atol=1e-9)
    own, _ = response_logprobs(model, batch, 1.0)
    assert (own - expected).abs().max() > 1e-3  # without them it is another policy


def test_a_prompt_is_shared_by_answers_that_have_the_same_routes_of_it():
    model = moe()
    rollouts = rollouts_by_hand(model, lengths=(3, 4, 5, 6), group_offsets=(0, 4), seed=1)
    n_prompt = int(rollouts.prompt_lengths[0]) - 1
    assert n_prompt > 0
    rollouts = dataclasses.replace(rollouts, routes=random_routes(rollouts))
    everyone = np.arange(4)
    shared = micro_batch(rollouts, everyone, "cpu")
    assert len(shared.packed.tokens) == n_prompt + 3 + 4 + 5 + 6
    rollouts.routes[2][0] = rollouts.routes[2][0][:, ::-1]  # as if its prompt had been read another time
    apart = micro_batch(rollouts, everyone, "cpu")
    assert len(apart.packed.tokens) == 2 * n_prompt + 3 + 4 + 5 + 6
    logp, _ = response_logprobs(model, apart, 1.0, apart.replay())
    expected = torch.cat([replayed_logp(model, rollouts, n) for n in everyone])
    torch.testing.assert_close(logp, expected, rtol=1e-9, atol=1e-9)


def test_merged_rollouts_keep_each_answers_routes():
    model = moe()
    parts = [routed_rollouts(model, seed) for seed in (0, 1)]
    both = merge(parts, [np.array([1]), np.array([2, 0])])
    expected = parts[0].routes[2:5] + parts[1].routes[5:6] + parts[1].routes[0:2]
    assert len(both.routes) == len(both.sequences) == 6
    for found, routes, sequence in zip(both.routes, expected, both.sequences, strict=True):
        assert found is routes and len(found) == len(sequence) - 1
    dense = rollouts_by_hand(tiny())
    assert merge([dense], [np.array([0, 2])]).routes is None
    assert micro_batch(dense, np.array([0, 1]), "cpu").replay() is None


# ---- the update ----

@pytest.mark.parametrize("micro_tokens", [1, 15, 10**6])
def test_the_gradient_is_that_of_replayed_answers_one_by_one_however_they_are_cut(micro_tokens):
    model = moe()
    rollouts = routed_rollouts(model)
    weights, total = loss_weights(rollouts.response_lengths, "token", 12), 0.0
    for n, advantage in enumerate(ADVANTAGES):
        logp = replayed_logp(model, rollouts, n)
        total = total - weights[n] * advantage * (logp - logp.detach()).exp().sum()
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(expected[f"blocks.{i}.mlp.router.linear.weight"].abs().max() > 1e-3 for i in (0, 1))
    model.zero_grad()
    [found], metrics = update_once(model, rollouts, micro_tokens=micro_tokens)
    assert_same_gradient(found, expected, 1e-6)
    assert metrics["logp_gap"] < 1e-6 and metrics["flipped_tokens"] > 0.9


def test_the_order_of_answers_and_groups_changes_nothing():
    model = moe()
    rollouts = routed_rollouts(model)
    [expected], _ = update_once(model, rollouts)
    order = [5, 4, 2, 3, 1, 0]
    turned = {name: [getattr(rollouts, name)[n] for n in order]
              for name in ("sequences", "sampler_logp", "texts", "routes")}
    turned = dataclasses.replace(rollouts, **turned, prompt_lengths=rollouts.prompt_lengths[order],
                                 group_offsets=np.array([0, 1, 4, 6]))
    [found], _ = update_once(model, turned, ADVANTAGES[order], micro_tokens=20, seed=1)
    assert_same_gradient(found, expected, 1e-6)


def test_old_log_probs_and_those_of_the_reference_are_replayed():
    model, other = moe(), moe(seed=3)
    rollouts = routed_rollouts(model)
    config = algorithm(updates_per_step=2, loss=dict(kl_coef=0.1), optim=STILL, max_new_tokens=12)
    learner = make_learner(config, model, Capture(model), other)
    batches = sum(lay_out_updates(learner, rollouts, per_token(ADVANTAGES, rollouts), config, 0), [])
    assert len(batches) == 2
    for batch in batches:
        expected = torch.cat([replayed_logp(model, rollouts, n) for n in batch.samples.tolist()])
        torch.testing.assert_close(batch.old_logp, expected, rtol=1e-9, atol=1e-9)
        expected = torch.cat([replayed_logp(other, rollouts, n) for n in batch.samples.tolist()])
        torch.testing.assert_close(batch.ref_logp, expected, rtol=1e-9, atol=1e-9)
    # The first update's ratios are 1, the second's only as far as the first has moved the weights.
    _, metrics = update_once(model, rollouts, updates_per_step=2)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-9)
    found = Reference(other, torch.device("cpu")).logprobs(batches, 1.0)
    assert all(torch.equal(a, b.ref_logp) for a, b in zip(found, batches, strict=True))


def test_the_kl_to_a_reference_of_the_same_weights_is_0_wherever_it_is_measured():
    """In the loss, in the log and in the reward: routes of another choice are no distance."""
    model = moe(dtype=torch.float32)
    rollouts = routed_rollouts(model)
    reference = Reference(moe(dtype=torch.float32), torch.device("cpu"))
    config = algorithm(loss=dict(kl_coef=0.1), updates_per_step=2)
    learner = make_learner(config, model, Capture(model), reference.model)
    updates = lay_out_updates(learner, rollouts, per_token(ADVANTAGES, rollouts), config, 0)
    assert all(torch.equal(batch.ref_logp, batch.old_logp) for batch in sum(updates, []))
    assert abs(kl_to_reference(reference, rollouts, config, 0)["kl_to_reference"]) < 1e-6
    in_reward = algorithm("rloo", loss=dict(kl_coef=1.0))
    assert np.abs(kl_cost_to(reference, in_reward)(rollouts)).max() < 1e-5


def test_a_critic_chooses_its_own_experts():
    critic = ValueHead(moe(seed=4))
    with torch.no_grad():
        critic.value.normal_()
    batch = micro_batch(routed_rollouts(moe()), np.arange(6), "cpu")
    assert torch.equal(critic(batch), critic(dataclasses.replace(batch, routes=None)))


def test_the_log_says_how_many_routers_would_have_chosen_otherwise():
    model = moe()
    rollouts = rollouts_by_hand(model, lengths=(5, 3, 9, 1, 4, 6))
    own = []  # the routers' own choice, replayed
    for sequence in rollouts.sequences:
        routing = RecordedRouting()
        model.hidden_states(pack([sequence[:-1]]), routing)
        own.append(routing.routes(model.config))
    rollouts = dataclasses.replace(rollouts, routes=own)
    _, metrics = update_once(model, rollouts)
    assert metrics["flipped_routers"] == metrics["flipped_tokens"] == 0
    others = [e for e in range(8) if e not in own[5][-1, 1]]
    rollouts.routes[5][-1, 1] = others[:3]  # one router of one token
    _, metrics = update_once(model, rollouts, max_logp_gap=10.0, micro_tokens=10)
    batches = micro_batches(rollouts, np.array([0, 1, 2, 4, 5]), 10, "cpu")
    n_tokens = sum(len(batch.packed.tokens) for batch in batches)
    assert metrics["flipped_tokens"] == pytest.approx(1 / n_tokens)
    assert metrics["flipped_routers"] == pytest.approx(1 / (2 * n_tokens))


def test_the_log_counts_the_experts_of_all_groups_the_replaced_ones_included():
    model, task = moe(), Bandit()
    kept, replaced = rollouts_by_hand(model), rollouts_by_hand(model, lengths=(5, 3), group_offsets=(0, 2))
    # The kept ones use no expert above 5, and the replaced ones only those of the first layer.
    kept = dataclasses.replace(kept, routes=[np.minimum(r, 5) for r in random_routes(kept)])
    replaced = dataclasses.replace(replaced, routes=[r * [[1], [0]] for r in random_routes(replaced, 1)])
    learner = make_learner(algorithm(), model, Capture(model))
    learner.sampler = SimpleNamespace(position=0)
    for parts in ((kept,), (kept, replaced)):
        rollouts = dataclasses.replace(kept, replaced=parts[1] if len(parts) > 1 else None)
        found = sampling_metrics(learner, task, rollouts, learner.grader(task, rollouts), None)
        routes = np.concatenate([array for part in parts for array in part.routes])
        counts = np.stack([np.bincount(routes[:, i].ravel(), minlength=8) for i in (0, 1)])
        assert found["expert_load_max"] == pytest.approx(max(row.max() / row.mean() for row in counts))
        assert found["experts_dead"] == (counts == 0).mean() == (4 if len(parts) == 1 else 2) / 16
    assert expert_metrics([rollouts_by_hand(tiny())], tiny()) == {}


@pytest.mark.parametrize("spoil, message", [
    (lambda routes: [r[:-1] for r in routes], "those of sequence 0 are"),
    (lambda routes: [r[:, :1] for r in routes], r"expected \[\d+, 2, 3\] integers"),
    (lambda routes: [r + 8 for r in routes], "none of the model's, expected 0 to 7"),
    (lambda routes: [r * 0 for r in routes], "through an expert twice"),
    (lambda routes: routes[1:], "got 5 arrays for 6 sequences"),
])
def test_routes_of_another_model_are_refused_before_anything_is_updated(spoil, message):
    model = moe()
    rollouts = routed_rollouts(model)
    rollouts = dataclasses.replace(rollouts, routes=spoil(rollouts.routes))
    optimizer = Capture(model)
    config, advantages = algorithm(optim=STILL), per_token(ADVANTAGES, rollouts)
    with pytest.raises(ValueError, match=message):
        update_policy(make_learner(config, model, optimizer), rollouts, advantages, config, 0)
    assert optimizer.grads == [] and all(p.grad is None for p in model.parameters())


# ---- a sampler that rounds otherwise ----

def test_a_sampler_in_bf16_agrees_with_a_trainer_in_fp32_as_far_as_that_of_a_dense_model():
    """Without the replay some routers of some tokens choose otherwise, and those log-probs are far off."""
    tokenizer = Tokenizer.bytes()
    config = preset("tiny", tokenizer.vocab_size, moe=dict(n_experts=32, experts_per_token=4, d_expert=8))
    trainer = Transformer(config).init_weights(0)
    sampler = Transformer(config, torch.bfloat16)
    sampler.load_state_dict(trainer.state_dict())
    engine = Engine(sampler, tokenizer, keep_routes=True)
    rollouts = sample_groups(engine, ["1:", "22:"], 8, 12, 1.0, sample_seeds(16, 0))
    with_routes = micro_batches(rollouts, np.arange(16), 10**6, "cpu")
    free = [dataclasses.replace(batch, routes=None) for batch in with_routes]
    [replayed], [own] = (logprobs_of(trainer, batches, 1.0) for batches in (with_routes, free))
    gaps = [(logp - with_routes[0].sampler_logp).abs() for logp in (replayed, own)]
    assert gaps[0].mean() < 0.5 * gaps[1].mean() and gaps[0].max() < 0.5 * gaps[1].max()
    limit = 1.5 * float(gaps[0].max())
    advantages = np.where(np.arange(16) % 2, 1.0, -1.0)
    _, metrics = update_once(trainer, rollouts, advantages, max_logp_gap=limit)
    assert 0 < metrics["flipped_routers"] < metrics["flipped_tokens"] < 0.9
    with pytest.raises(LogpGapError, match="other experts than in sampling: leave out --no-routing-replay"):
        update_once(trainer, dataclasses.replace(rollouts, routes=None), advantages, max_logp_gap=limit)
