"""One update of a preset on rollouts by hand, whole or shared by two processes.

    python -m tests.rl.family_cases       two processes over gloo; prints each one's gradients as JSON
"""
import json
import os
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1zero.model.lora import LoRAConfig, adapter_tensors, add_adapters, own_adapters
from r1zero.model.optimizer import OptimConfig
from r1zero.rl.heads import Critic, CriticLearner
from r1zero.rl.rollouts import merge
from r1zero.rl.update import AdapterReference, LogpGapError, Reference, update_policy

from .cases import Capture, algorithm, make_learner, per_token, rollouts_by_hand, tiny
from .exact_cases import WEIGHTS, parts_of

REWARDS = np.array([1.0, 0.0, 0.2, 1.0, 0.0, 1.2])
GROUPS = (0, 2, 4, 6)
SHARED = ["r1_zero", "grpo", "dr_grpo", "reinforce", "ppo", "gdpo", "dead", "r1_zero lora", "ppo lora",
          "dead lora"]
STILL = OptimConfig(lr=1.0, warmup=0, schedule="constant", clip_grad=1e9)  # nothing is clipped


def whole_update(algo: str, micro_tokens: int, seed: int = 0, order=(0, 1, 2), rollouts=None,
                 advantages=None, share=None, sums: bool = False, **changes):
    """The gradient of one update by name (its sums in absolute value and as they are, if `sums`).

    algo: a preset, "dead" (the last group teaches nothing), or one of these and " lora". order: of the
    groups; share: the groups of this process. The critic's gradients come as "critic.<name>".
    """
    algo, _, adapted = algo.partition(" ")
    model, reference, trunk = models(bool(adapted))
    rewards = REWARDS * [1, 1, 1, 1, 0, 0] if algo == "dead" else REWARDS
    algo = "plain" if algo == "dead" else algo
    critic = Critic(trunk).double() if algo == "ppo" else None
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
    config = algorithm(algo, optim=STILL, critic_optim=STILL, micro_tokens=micro_tokens, seed=seed,
                       max_new_tokens=12, **{"max_logp_gap": 100.0, **changes})
    optimizer, of_critic = Capture(model), None
    if critic:
        of_critic = Capture(critic)
        critic = CriticLearner(critic, of_critic, config)
    learner = make_learner(config, model, optimizer, reference, critic)
    if config.kl_in_reward:
        kl_cost = learner.credit.kl_cost
        learner.credit.kl_cost = lambda rollouts: 50 * kl_cost(rollouts)
    if advantages is None:
        graded = SimpleNamespace(training=rewards, training_parts=parts_of(rewards), weights=WEIGHTS)
        found = learner.credit(graded, rollouts)
    else:
        found = per_token(advantages, rollouts)
    update_policy(learner, rollouts, found, config, step=0)
    [gradient] = optimizer.grads
    if critic:
        gradient = gradient | {f"critic.{name}": g for name, g in of_critic.grads[0].items()}
    return [f(g).item() for g in gradient.values() for f in (torch.sum, lambda x: x.abs().sum())] if sums \
        else gradient


def models(adapted: bool):
    """(policy, reference, the critic's trunk); if adapted, over the same frozen weights."""
    model, second, third = (tiny(seed, dtype=torch.float64) for seed in (0, 9, 3))
    if not adapted:
        return model, Reference(second, model.device), third
    add_adapters(model, LoRAConfig(rank=2), seed=0)
    reference, trunk = AdapterReference(model), own_adapters(model)
    for seed, module in enumerate((model, trunk)):
        rng = torch.Generator().manual_seed(seed)
        for tensor in adapter_tensors(module).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype)
    return model, reference, trunk


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
    except LogpGapError as error:
        found["gap"] = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_process, (folder,), nprocs=2)
        ranks = [json.load(open(os.path.join(folder, f"{rank}.json"))) for rank in range(2)]
    print(json.dumps({algo: [rank[algo] for rank in ranks] for algo in [*SHARED, "gap"]}))
