"""What the GRPO loop asks of the engine, and what it does about log-probs that are not the trainer's."""
import json

import pytest

from r1zero.model.engine.engine import Engine
from r1zero.train import grpo as grpo_file
from r1zero.train.grpo import grpo, timed_step
from r1zero.train.run import read_metrics

from .loop_cases import grpo_config, save_base


def test_grpo_says_what_a_step_needs(tmp_path, monkeypatch):
    asked = {}

    class Asked(Engine):
        def __init__(self, *args, **options):
            asked.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(grpo_file, "Engine", Asked)
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), steps=1, save_every=1)
    policy = grpo_file.grpo(c)
    assert asked["reserve"] == 12 * sum(p.numel() for p in policy.parameters())
    assert c.max_new_tokens < asked["longest"] and asked["max_rows"] == c.prompts_per_step * c.group_size


def test_grpo_logs_the_gap_and_stops_when_it_is_too_large(tmp_path):
    c = grpo_config(tmp_path / "run", save_base(tmp_path / "base"), steps=4, save_every=1)

    def disagreeing(learner, task, config, step):
        sample = learner.sampler.sample

        def sample_and_spoil(*args):
            rollouts = sample(*args)
            if step == 2:
                for logp in rollouts.sampler_logp:
                    logp[0] -= 0.01
            return rollouts

        learner.sampler.sample = sample_and_spoil
        return timed_step(learner, task, config, step)

    with pytest.raises(FloatingPointError, match="is 0.01 from the trainer's own, more than --max-logp-gap "
                                                 "0.001, at step 3; the checkpoint of step 2 is kept"):
        grpo(c, step_of=disagreeing)
    rows = read_metrics(c.run)
    assert len(rows) == 2 and all(0 <= row["logp_gap_mean"] <= row["logp_gap"] < 1e-4 for row in rows)
    assert rows[0]["logp_gap"] > 0
    with pytest.raises(ValueError, match="--max-logp-gap is -1"):
        grpo_config("", "", max_logp_gap=-1.0)
    grpo(grpo_config(c.run, c.base, steps=4, save_every=1, resume=True, max_logp_gap=0.1))
    assert len(json.dumps(read_metrics(c.run))) and len(read_metrics(c.run)) == 4
