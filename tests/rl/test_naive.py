"""The page that teaches GRPO is the oracle of the step that trains: same tokens, same advantages, same
gradient."""
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from r1zero.eval.tasks.countdown import Countdown
from r1zero.model.checkpoint import save_checkpoint
from r1zero.model.config import preset
from r1zero.model.engine.engine import Engine
from r1zero.model.optimizer import OptimConfig
from r1zero.model.tokenizer import Tokenizer
from r1zero.model.transformer import Transformer
from r1zero.rl import naive
from r1zero.rl.family import make_learner, resolve
from r1zero.rl.step import grpo_step
from r1zero.rl.update import Reference

from .cases import Bandit, Capture, assert_same_gradient, tiny

PROBLEMS = 3


def fast_learner(model, tokenizer, **overrides):
    """(learner, config) of the fast step with the naive page's settings; nothing is clipped or stepped."""
    still = OptimConfig(lr=1.0, warmup=0, schedule="constant", clip_grad=1e9)
    options = {"loss": {"kl_coef": 0.0}, "prompts_per_step": PROBLEMS, "group_size": naive.GROUP_SIZE,
               "max_new_tokens": naive.MAX_NEW_TOKENS, "seed": naive.SEED, "optim": still, **overrides}
    config = resolve("grpo", options)
    reference = Reference(deepcopy(model), model.device)
    learner = make_learner(config, model, reference, Engine(model, tokenizer, keep_routes=True))
    learner.optimizer = Capture(model)
    return learner, config


LATENTS = dict(n_kv_heads=2, latent=dict(kv_rank=16, q_rank=20, rope_dim=6, value_dim=12))

MIXTURE = dict(n_layers=1, moe=dict(n_experts=4, experts_per_token=2, d_expert=16, scores="sigmoid"))


@pytest.fixture(scope="module", params=[{}, LATENTS, MIXTURE], ids=["grouped queries", "latents", "experts"])
def both(request):
    """(what the naive page sampled, its gradient, rollouts, rewards and advantages of the fast step, its
    gradient) of the second step from the same random weights."""
    model, tokenizer, task, step = tiny(dtype=torch.float64, **request.param), Tokenizer.bytes(), Bandit(), 1
    sampled = naive.grpo_gradient(model, tokenizer, task, task.problems("train", PROBLEMS, PROBLEMS), step)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    learner, config = fast_learner(model, tokenizer)
    learner.sampler.position = PROBLEMS
    seen = {}
    for name, part in (("sampler", learner.sampler), ("grader", learner.grader), ("credit", learner.credit)):
        setattr(learner, name, Watched(part, name, seen))
    metrics = grpo_step(learner, task, config, step)
    return sampled, expected, seen, learner.optimizer.grads, metrics


class Watched:
    """A part of a learner whose first result is kept."""

    def __init__(self, part, name, seen):
        self.part, self.name, self.seen = part, name, seen

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __call__(self, *args):
        return self.seen.setdefault(self.name, self.part(*args))

    def sample(self, *args):
        return self.seen.setdefault(self.name, self.part.sample(*args))


def test_both_sample_the_same_tokens(both):
    sampled, _, seen, _, _ = both
    rollouts = seen["sampler"]
    answers = [answer for group in sampled["answers"] for answer in group]
    assert len(answers) == PROBLEMS * naive.GROUP_SIZE == len(rollouts.sequences)
    for answer, sequence, prompt in zip(answers, rollouts.sequences, rollouts.prompt_lengths, strict=True):
        assert sequence[prompt:].tolist() == answer
    assert len({len(answer) for answer in answers}) > 3  # some end by themselves, at different lengths


def test_both_give_the_same_rewards_and_advantages(both):
    sampled, _, seen, _, _ = both
    rewards = np.concatenate(sampled["rewards"])
    assert seen["grader"].training.tolist() == rewards.tolist() and 0 < rewards.mean() < 1
    advantages = torch.cat(sampled["advantages"]).numpy()
    lengths = seen["sampler"].response_lengths
    np.testing.assert_allclose(seen["credit"].per_token, np.repeat(advantages, lengths), rtol=0, atol=1e-12)
    assert (np.abs(advantages) > 0.1).any()


def test_both_have_the_same_gradient(both):
    _, expected, _, gradients, metrics = both
    [found] = gradients
    assert_same_gradient(found, expected, 1e-6)
    assert metrics["accuracy"] > 0 and metrics["groups_sampled"] == PROBLEMS
    # In float64 a router that chooses again chooses the same.
    assert metrics.get("flipped_routers", 0.0) == 0.0


def test_a_group_whose_rewards_are_alike_teaches_nothing():
    assert naive.advantages_of([0.2, 0.2, 0.2]).tolist() == [0, 0, 0]
    assert naive.advantages_of([1.0, 0.0]).tolist() == [1, -1]


def test_the_page_runs_on_a_base_model_and_says_how_many_are_right(tmp_path, monkeypatch, capsys):
    tokenizer = Tokenizer.bytes()
    model = Transformer(preset("tiny", tokenizer.vocab_size)).init_weights(0)
    state = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.to_dict(), "settings": {}}
    save_checkpoint(tmp_path, 0, {"model": dict(model.named_parameters())}, state)
    for name, value in (("STEPS", 1), ("PROBLEMS_PER_STEP", 1), ("GROUP_SIZE", 2), ("MAX_NEW_TOKENS", 2)):
        monkeypatch.setattr(naive, name, value)
    naive.main(str(tmp_path))
    assert capsys.readouterr().out == "step   1     0.0% of 2 answers are right\n"


def test_without_a_base_it_says_how_it_is_called():
    done = subprocess.run([sys.executable, "-m", "r1zero.rl.naive"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage: python -m r1zero.rl.naive BASE")


def test_a_step_makes_the_answers_that_earn_more_likelier():
    model, tokenizer, task = tiny(), Tokenizer.bytes(), Countdown(n_numbers=2, high=9)
    problems = task.problems("train", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rewards = iter([1.0] + [0.0] * (naive.GROUP_SIZE - 1))

    class FirstIsRight(Countdown):
        def grade(self, problem, response):
            return type("Grade", (), {"accuracy": next(rewards)})

    task = FirstIsRight(n_numbers=2, high=9)
    sampled = naive.grpo_step(model, tokenizer, task, optimizer, problems, 0)
    prompt, best = tokenizer.encode(task.prompt(problems[0])), sampled["answers"][0][0]
    before = naive.log_probs(tiny(), prompt, best).sum()
    assert float(naive.log_probs(model, prompt, best).sum().detach()) > float(before.detach())
