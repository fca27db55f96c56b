"""rollouts.jsonl.gz: every completion of a GRPO run, and what it earned.

    zcat runs/rl/rollouts.jsonl.gz | head -1                # each line is one sample
    r1zero show --run runs/rl --step 40                     # its groups, for people

A step is one gzip member (rollout_files.py), appended when the step is whole. On resume, the steps
that are done again are cut off, so each is there once. When a file has PART_BYTES, the next one
begins: rollouts.2.jsonl.gz, and so on. All parts but the newest may be moved away.

What is kept informs, and decides nothing. If it cannot be written, that is said once, and the run
goes on without it. In the demo it takes 0.6 % of a step's time and 17 kB per step; `keep_s` in
metrics.jsonl has the seconds.

    step               the step's number, as in metrics.jsonl
    group              the group's number in the step, from 1
    problem            the fields of the problem
    prompt, response   as text
    tokens             token ids of the response, with its end token
    parts              name -> reward before weights
    reward             the weighted sum
    training_reward    what the advantage was computed from
    advantage          the mean over the answer's tokens; null if nothing was trained on it
    token_advantages   one per token, where they differ (PPO)
    finish_reason      "stop" or "length"
    why                the grader's reason
    replaced           whether dynamic sampling has replaced the group

Left out: log-probs, and the routes of a mixture of experts.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.console import say
from ..model.files import flush
from ..model.tokenizer import Tokenizer
from ..rl.advantages import Advantages
from ..rl.rewards import Rewards
from ..rl.rollouts import Rollouts
from .rollout_files import append_member, cut_after, part_path, parts_of

PART_BYTES = 256_000_000  # a file of this size is followed by the next
DIGITS = 6  # of an advantage

# ---- from a step to its lines ----


@dataclass(frozen=True)
class Seen:
    """Some groups of a step, as the learner showed them."""

    rollouts: Rollouts
    rewards: Rewards
    advantages: Advantages | None
    """None for groups that dynamic sampling has replaced."""


def fields_of(problem: Any) -> Any:
    """A problem as JSON types; as text where it is of a kind that JSON does not know."""
    try:
        fields = asdict(problem) if is_dataclass(problem) else problem
        return json.loads(json.dumps(fields, default=str))
    except (TypeError, ValueError, RecursionError):  # odd keys, a circle, no end
        return str(problem)


def samples_of_group(seen: Seen, group: int, tokenizer: Tokenizer) -> Iterator[dict]:
    """What is kept of each sample of a group, but for the numbers of step and group."""
    rollouts, rewards = seen.rollouts, seen.rewards
    start, end = rollouts.group_offsets[group : group + 2]

    # What all samples of the group share.
    problem = fields_of(rollouts.problems[group])
    prompt = rollouts.sequences[start][: rollouts.prompt_lengths[start]]
    prompt_text = tokenizer.decode(prompt.tolist(), keep_special=True)

    for n in range(start, end):
        response = rollouts.sequences[n][rollouts.prompt_lengths[n] :]
        yield {
            "problem": problem,
            "prompt": prompt_text,
            "response": rollouts.texts[n],
            "tokens": response.tolist(),
            "parts": {name: float(values[n]) for name, values in rewards.parts.items()},
            "reward": float(rewards.total[n]),
            "training_reward": float(rewards.training[n]),
            **advantage_of_sample(seen, n),
            "finish_reason": rollouts.finish_reasons[n],
            "why": rewards.why[n],
            "replaced": seen.advantages is None,
        }


def advantage_of_sample(seen: Seen, n: int) -> dict:
    """{"advantage": its mean}, and each token's if they differ."""
    if seen.advantages is None:
        return {"advantage": None}
    start, end = seen.rollouts.response_offsets[n : n + 2]
    of_tokens = seen.advantages.per_token[start:end]
    kept = {"advantage": round(float(of_tokens.mean()), DIGITS)}
    if np.ptp(of_tokens) > 0:
        kept["token_advantages"] = of_tokens.round(DIGITS).tolist()
    return kept


# ---- the log ----


class RolloutLog:
    """Keeps the completions of each step of a run.

    kept = RolloutLog(folder, last_step, tokenizer)
    learner.observe = kept.observe          # shown while the step is computed
    kept.write(step)                        # when it is whole
    kept.sync()                             # before a checkpoint
    """

    def __init__(
        self,
        folder: Path,
        last_step: int,
        tokenizer: Tokenizer,
        share: float = 1.0,
        seed: int = 0,
        part_bytes: int = PART_BYTES,
    ):
        """last_step: steps after it are cut off, because they are done again.

        share: of the groups, which are chosen at random by seed and step.
        """
        self.folder, self.tokenizer = folder, tokenizer
        self.share, self.seed, self.part_bytes = share, seed, part_bytes
        self._seen: list[Seen] = []
        self._unsynced: set[Path] = set()  # the parts appended to since the last sync
        self._works = True
        try:
            for _, path in parts_of(folder):
                cut_after(path, last_step)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def observe(self, rollouts: Rollouts, rewards: Rewards, advantages: Advantages | None) -> None:
        """See the groups of a step; advantages are None for those that were replaced."""
        if advantages is not None:
            self._seen = []  # a step begins; whatever came before was not finished
        self._seen.append(Seen(rollouts, rewards, advantages))

    def write(self, step: int) -> list[dict]:
        """Keep what was seen of 0-based `step`; returns the samples that were kept. Never raises
        OSError."""
        seen, self._seen = self._seen, []
        if not self._works:
            return []
        samples = self._chosen(seen, step)
        if not samples:
            return []
        lines = [json.dumps(sample, separators=(",", ":")) for sample in samples]
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            path = self._part()
            self._unsynced.add(path)
            append_member(path, step + 1, data)
        except OSError as error:
            self._give_up(error)
            return []
        return samples

    def sync(self) -> None:
        """Return when every step is on the disk, or once it is said that it cannot be."""
        unsynced, self._unsynced = self._unsynced, set()
        try:
            for path in unsynced:
                if path.exists():  # and was not moved away
                    flush(path)
        except OSError as error:
            self._give_up(error)

    def _chosen(self, seen: list[Seen], step: int) -> list[dict]:
        """The samples of the groups to keep: each group by a random number of its own."""
        groups = [(part, group) for part in seen for group in range(len(part.rollouts.problems))]
        lots = np.random.default_rng([self.seed, step, 2]).random(len(groups))
        return [
            {"step": step + 1, "group": number, **sample}
            for number, ((part, group), lot) in enumerate(zip(groups, lots, strict=True), 1)
            if lot < self.share
            for sample in samples_of_group(part, group, self.tokenizer)
        ]

    def _part(self) -> Path:
        """The file to append to."""
        parts = parts_of(self.folder)
        if not parts:
            return part_path(self.folder, 1)
        number, path = parts[-1]
        is_full = path.stat().st_size >= self.part_bytes
        return part_path(self.folder, number + 1) if is_full else path

    def _give_up(self, error: Exception) -> None:
        """Keep nothing more, and say why, once."""
        if not self._works:
            return
        self._works = False
        why = getattr(error, "strerror", None) or error
        say(f"completions cannot be kept in {self.folder} ({why}); the run goes on without them")
