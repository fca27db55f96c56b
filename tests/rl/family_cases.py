"""One update of a preset on rollouts by hand, whole or shared by two processes.

    python -m tests.family_cases       two processes over gloo; prints each one's gradients as JSON
"""
import json
import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1zero.model.distributed import all_sum
from r1zero.model.optimizer import OptimConfig
from r1zero.rl import update as updates
from r1zero.rl.advantages import advantages
from r1zero.rl.heads import Critic
from r1zero.rl.losses import kl_estimate
from r1zero.rl.rollouts import merge, micro_batches

from ..train.loop_cases import Capture, grpo_config, rollouts_by_hand, tiny

REWARDS = np.array([1.0, 0.0, 0.2, 1.0, 0.0, 1.2])
GROUPS = (0, 2, 4, 6)
SHARED = ["r1_zero", "grpo", "dr_grpo", "reinforce", "ppo", "dead"]
STILL = OptimConfig(lr=1.0, warmup=0, schedule="constant", clip_grad=1e9)  # nothing is clipped


def whole_update(algo: str, micro_tokens: int, seed: int = 0, order=(0, 1, 2), rollouts=None,
                 advantages=None, share=None, sums: bool = False, **changes):
    """The gradient of one update by name (its sums in absolute value and as they are, if `sums`).

    order: of the groups; share: the groups of this process. The critic's gradients come as "critic.<name>".
    """
    model, reference = tiny(dtype=torch.float64), tiny(seed=9, dtype=torch.float64)
    rewards = REWARDS * [1, 1, 1, 1, 0, 0] if algo == "dead" else REWARDS
    algo = "r1_zero" if algo == "dead" else algo
    critic = Critic(tiny(seed=3, dtype=torch.float64)).double() if algo == "ppo" else None
    if critic:
        with torch.no_grad():
            critic.value.normal_(generator=torch.Generator().manual_seed(1))
    if rollouts is None:
        rollouts = rollouts_by_hand(model, group_offsets=GROUPS)
        rollouts.sampler_logp[1][:] -= 0.2
        rollouts.finish_reasons[3] = "length"
    chosen = np.array(order if share is None else share)
    if rollouts.group_offsets.tolist() == list(GROUPS):
        rewards = np.concatenate([rewards[2 * g : 2 * g + 2] for g in chosen])
        rollouts = merge([rollouts], [chosen])
    c = grpo_config("", "", algo=algo, optim=STILL, critic_optim=STILL, micro_tokens=micro_tokens, seed=seed,
                    max_new_tokens=12, **{"max_logp_gap": 100.0, **changes})
    batches = micro_batches(rollouts, np.arange(len(rollouts.texts)), 30, "cpu")
    kl_R = values_R = None
    if c.kl_in_reward:
        ref = updates.each_token(updates.logp_of(reference, 1.0), rollouts, batches, "cpu").numpy()
        logp = np.concatenate(rollouts.sampler_logp).astype(np.float64)
        kl_R = 50 * c.loss.kl_coef * kl_estimate(logp, ref, c.loss.kl_estimator)
    if critic:
        values_R = updates.each_token(critic, rollouts, batches, "cpu").numpy()
    returns = None
    if advantages is None:
        advantages, returns = compose(rewards, rollouts, c, kl_R, values_R)
    optimizer = Capture(model)
    updates.update_policy(model, reference, rollouts, advantages, optimizer, c, step=0)
    [gradient] = optimizer.grads
    if critic:
        optimizer = Capture(critic)
        updates.update_critic(critic, rollouts, values_R, returns, optimizer, c, step=0)
        [of_critic] = optimizer.grads
        gradient = gradient | {f"critic.{name}": g for name, g in of_critic.items()}
    return [f(g).item() for g in gradient.values() for f in (torch.sum, lambda x: x.abs().sum())] if sums \
        else gradient


def compose(rewards, rollouts, c, kl_R, values_R):
    return advantages(rewards, rollouts.group_offsets, rollouts.response_offsets, c.advantage, kl_R, values_R,
                      all_sum)


def rank_gradients(text: str) -> dict[str, list[list[float]]]:
    """{preset: the gradient of each process}, as `main` prints it."""
    return json.loads(text.splitlines()[-1])


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = [0, 1] if rank == 0 else [2]
    found = {algo: whole_update(algo, 25, share=mine, sums=True) for algo in SHARED}
    try:
        whole_update("r1_zero", 25, share=mine, max_logp_gap=0.1)  # only the first process has such a gap
    except updates.LogpGapError as error:
        found["gap"] = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_process, (folder,), nprocs=2)
        ranks = [json.load(open(os.path.join(folder, f"{rank}.json"))) for rank in range(2)]
    print(json.dumps({algo: [rank[algo] for rank in ranks] for algo in [*SHARED, "gap"]}))
