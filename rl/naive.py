"""GRPO on one page: read this first. It is also the oracle that the fast version is tested against.

    python -m r1zero.rl.naive runs/demo/seed0/base      # slow on purpose: about 15 seconds per step

No engine, no packing, no kernel, no preset: one answer at a time, Python loops over groups and
answers, plain log_softmax. rl/step.py does the same four things, fast and for the whole family;
tests/rl/test_naive.py holds one against the other: same tokens, same advantages, same gradient.

Left out, because the lesson stands without it: the KL to a reference model, several updates per
batch and the clip (with one update the ratio is 1, and clipping does nothing), the replay of routes
(model/routes.py: here sampler and trainer are one computation), the learning rate's schedule,
checkpoints, logs.

Sources: DeepSeekMath (arXiv 2402.03300), section 4; DeepSeek-R1 (arXiv 2501.12948), section 2.2.

A suffix names a tensor's dimensions: N answers of a group, T tokens of a prompt and its answer, R
tokens of an answer, V vocabulary.
"""

import sys

import torch

from ..eval.response import parse_response, response_text
from ..eval.tasks.countdown import Countdown
from ..model.chat_template import encode_prompt
from ..model.checkpoint import load_model
from ..model.engine.naive import generate_naive
from ..model.engine.requests import Request
from ..model.engine.sampling import sample_seeds
from ..model.packed import pack

STEPS = 40
PROBLEMS_PER_STEP = 8
GROUP_SIZE = 8
MAX_NEW_TOKENS = 100
LEARNING_RATE = 2e-4
FORMAT_WEIGHT = 0.2
SEED = 0


def reward_of(task, problem, answer: list[int], tokenizer) -> float:
    """1 for a right answer and 0.2 for a well-formed one: two rules, no model judges.

    An answer without its end token was cut off, and what was cut off is not well formed.
    """
    text = response_text(tokenizer, answer)
    right = task.grade(problem, text).accuracy
    finished = answer[-1] in tokenizer.eos_ids
    well_formed = finished and parse_response(text).well_formed
    return right + FORMAT_WEIGHT * well_formed


def advantages_of(rewards: list[float]) -> torch.Tensor:
    """How much better was each answer than the rest of its group?

    A_i = (r_i - mean) / std                                               (DeepSeek-R1, eq. 3)
    """
    rewards_N = torch.tensor(rewards, dtype=torch.float64)
    if rewards_N.max() - rewards_N.min() < 1e-6:  # all alike: nothing to prefer, nothing to learn
        return torch.zeros_like(rewards_N)
    return (rewards_N - rewards_N.mean()) / rewards_N.std(correction=0)


def log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[R]: the log-probability of each answer token, given everything before it."""
    tokens = prompt + answer
    logits_TV = model.logits(model.hidden_states(pack([tokens], model.device)))

    # Row t scores the token that follows tokens[t], so the answer's tokens are predicted by the
    # rows from the prompt's last token on, and the last row predicts nothing that we have.
    logits_RV = logits_TV[len(prompt) - 1 : -1]
    logp_RV = logits_RV.log_softmax(-1)
    answer_R = torch.tensor(answer, device=logits_TV.device)
    return logp_RV.gather(1, answer_R[:, None])[:, 0]


def sample_answer(model, prompt: list[int], seed: int, eos_ids: tuple) -> list[int]:
    """Continue the prompt token by token at temperature 1, until the end token.

    The seed decides every random number, so the fast engine can be asked for the same answer.
    """
    request = Request(prompt, MAX_NEW_TOKENS, seed, temperature=1.0, stop_ids=eos_ids)
    return generate_naive(model, request).tokens.tolist()


def grpo_gradient(model, tokenizer, task, problems: list, step: int) -> dict:
    """Add the gradient of one GRPO step to the parameters' `.grad`.

    Returns what was sampled: answers, rewards and advantages, each a list with one item per group.
    """
    seeds = sample_seeds(len(problems) * GROUP_SIZE, SEED, step).tolist()
    sampled = {"answers": [], "rewards": [], "advantages": []}
    for group, problem in enumerate(problems):
        prompt = encode_prompt(tokenizer, task.prompt(problem))
        group_seeds = seeds[group * GROUP_SIZE : (group + 1) * GROUP_SIZE]

        # 1. Sample a group of answers to the same problem.
        answers = [sample_answer(model, prompt, seed, tokenizer.eos_ids) for seed in group_seeds]

        # 2. Grade each answer by rule: is it right, is it well formed?
        rewards = [reward_of(task, problem, answer, tokenizer) for answer in answers]

        # 3. Compare each answer with the rest of its group.
        advantages = advantages_of(rewards)

        # 4. Make the tokens of better answers more likely, and those of worse answers less.
        for answer, advantage in zip(answers, advantages.tolist(), strict=True):
            logp_R = log_probs(model, prompt, answer)
            # The objective (DeepSeek-R1, eq. 1). The old policy is this same one, so the ratio of
            # new to old probability is exp(0) = 1. Its gradient is not 0: d ratio = ratio * d logp.
            ratio_R = (logp_R - logp_R.detach()).exp()
            # Every answer has the same weight, whatever its length. (With `--loss.mean token` every
            # token has.)
            loss = -(ratio_R * advantage).mean() / (len(problems) * GROUP_SIZE)
            loss.backward()

        for name, values in (
            ("answers", answers),
            ("rewards", rewards),
            ("advantages", advantages),
        ):
            sampled[name].append(values)
    return sampled


def grpo_step(model, tokenizer, task, optimizer, problems: list, step: int) -> dict:
    """One optimizer step of GRPO; returns what was sampled, as `grpo_gradient` does."""
    optimizer.zero_grad()
    sampled = grpo_gradient(model, tokenizer, task, problems, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return sampled


def main(base: str) -> None:
    """Train the checkpoint in folder `base` on Countdown, and print how many answers are right."""
    model, tokenizer, _ = load_model(base, torch.device("cpu"))
    task = Countdown(n_numbers=3, high=20, ops="+-")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        problems = task.problems("train", PROBLEMS_PER_STEP, start=step * PROBLEMS_PER_STEP)
        sampled = grpo_step(model, tokenizer, task, optimizer, problems, step)
        rewards = [reward for group in sampled["rewards"] for reward in group]
        right = sum(reward >= 1 for reward in rewards) / len(rewards)
        print(f"step {step + 1:3}   {right:6.1%} of {len(rewards)} answers are right", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m r1zero.rl.naive BASE    (a run folder that holds a base model)")
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
