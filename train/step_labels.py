"""Labels for the steps of sampled answers, as lines of JSON for `r1zero process-reward`.

    {"prompt": "3 7 9 -> 13", "tokens": [5, 9, ...], "right": true, "steps": [
        {"end": 4, "text": "<think>9-7=2", "true": true, "reaches": false, "share": 0.25}, ...]}

`tokens` are the ids that were sampled, and `end` counts among them: the token that ends the step
(rl/process.py). `true` and `reaches` are the task's exact check (eval/tasks/steps.py). `share` is
the share of right ones of the completions sampled from there (Math-Shepherd, arXiv 2312.08935,
section 3.3), and null where none was sampled. For the step that ends the answer it is the answer's
own grade.

A completion goes on from the ids up to the step's end, within the limit of tokens of the answer.
Its seed is a function of --seed, the index of the problem, the number of the sample, and the token
that ends the step. The shares of a problem are kept as soon as they are known (sample_file.py), so
a call that is resumed goes on behind them; the completions themselves are not.
"""

import time

import numpy as np

from ..eval.response import Sample, response_text, verdict
from ..eval.sampler import ModelSampler
from ..eval.tasks.base import Task
from ..eval.tasks.steps import cut_steps
from ..model.chat_template import encode_prompts
from ..model.engine.requests import Request
from ..model.engine.sampling import sample_seeds
from ..rl.process import token_ends
from .answers import Answer
from .inputs import Inputs
from .sample_file import StepLabelFile


class StepLabels:
    """From answers to lines with labelled steps. Made once per collection; it counts."""

    def __init__(
        self,
        task: Task,
        sampler: ModelSampler,
        n_completions: int,
        kept: StepLabelFile | None = None,
        graders: Inputs | None = None,
    ):
        """kept: the shares that an earlier call has sampled; None keeps none. graders: the files
        that decide what is right; shares of before they changed are sampled anew."""
        self.task, self.sampler, self.n_completions = task, sampler, n_completions
        self.kept, self.graders = kept, graders or {}
        self.steps: list[dict] = []
        """All steps so far."""
        self.n_tokens = 0
        """Tokens of all completions so far."""
        self.seconds = 0.0
        """What sampling them took."""

    def lines(self, prompt: str, answers: list[Answer], source: dict) -> list[dict]:
        """A line per answer that has a step; source: what they share, `index` among it."""
        steps = [self._exact(answer.sample) for answer in answers]
        if self.n_completions:
            self._add_shares(prompt, answers, steps, source["index"])
        for each in steps:
            self.steps += each
        return [
            {
                "prompt": prompt,
                "tokens": list(answer.sample.tokens),
                "response": answer.sample.text,
                "right": answer.right,
                "steps": each,
                **source,
                "sample": answer.number,
                "finish_reason": answer.sample.finish_reason,
            }
            for answer, each in zip(answers, steps, strict=True)
            if each
        ]

    def _exact(self, sample: Sample) -> list[dict]:
        """The steps of an answer, each with the task's own check."""
        ends = self.task.step_ends(sample.text, not sample.cut_off)
        end_of = token_ends(self.sampler.tokenizer, sample.tokens, ends)
        texts = cut_steps(sample.text, [*end_of.values()])
        found = []
        for number, end in enumerate(end_of):
            checked = self.task.check_step(sample.problem, texts[: number + 1])
            facts = {"true": bool(checked.true), "reaches": bool(checked.reaches)}
            found.append({"end": end, "text": texts[number], **facts, "share": None})
        return found

    def _add_shares(
        self, prompt: str, answers: list[Answer], steps: list[list[dict]], index: int
    ) -> None:
        """Put the share of right completions beside each step of the answers to a problem: the
        shares that are kept, or new ones."""
        flat = [step for each in steps for step in each]
        ends = [
            [answer.number, step["end"]]
            for answer, each in zip(answers, steps, strict=True)
            for step in each
        ]
        asked = {"index": index, "completions": self.n_completions, "steps": ends, **self.graders}
        kept = self.kept.find(asked) if self.kept else None
        if kept is None:
            tokens, seconds = self.n_tokens, self.seconds
            self._complete(prompt, answers, steps, index)
            if self.kept:
                cost = {"tokens": self.n_tokens - tokens, "seconds": self.seconds - seconds}
                self.kept.append(asked | {"shares": [step["share"] for step in flat], **cost})
            return
        for step, share in zip(flat, kept["shares"], strict=True):
            step["share"] = share
        self.n_tokens += kept["tokens"]
        self.seconds += kept["seconds"]

    def _complete(
        self, prompt: str, answers: list[Answer], steps: list[list[dict]], index: int
    ) -> None:
        """Sample completions from the end of each step, and put the share of right ones beside
        it."""
        sampler = self.sampler
        [prompt_ids] = encode_prompts(sampler.tokenizer, [prompt], sampler.chat)
        # 1. All completions of all steps are one call of the engine.
        requests, of_step = [], []
        for answer, each in zip(answers, steps, strict=True):
            tokens = list(answer.sample.tokens)
            for step in each:
                if step["end"] == len(tokens) - 1 and not answer.sample.cut_off:
                    step["share"] = float(answer.right)
                    continue
                begun = tokens[: step["end"] + 1]
                n_left = sampler.max_new_tokens - len(begun)
                if n_left < 1:
                    continue
                keys = (sampler.seed, index, answer.number, step["end"])
                for seed in sample_seeds(self.n_completions, *keys).tolist():
                    stop = tuple(sampler.tokenizer.eos_ids)
                    ids = [*prompt_ids, *begun]
                    request = Request(ids, n_left, seed, sampler.temperature, stop_ids=stop)
                    requests.append(request)
                    of_step.append((step, begun, answer.sample.problem))
        # 2. Each is graded as a whole answer.
        began = time.perf_counter()
        completions = sampler.engine.generate(requests) if requests else ()
        self.seconds += time.perf_counter() - began
        right = []
        for (_, begun, problem), completion in zip(of_step, completions, strict=True):
            tokens = [*begun, *completion.tokens.tolist()]
            self.n_tokens += len(completion.tokens)
            text = response_text(sampler.tokenizer, tokens)
            sample = Sample(problem, text, tokens, completion.finish_reason)
            right.append(verdict(self.task, sample).accuracy)

        # 3. Those of a step follow each other. (Divided once: nine ninths add up to more than 1.)
        n = self.n_completions
        for first in range(0, len(right), n):
            of_step[first][0]["share"] = sum(right[first : first + n]) / n

    # ---- what was counted ----

    def to_dict(self) -> dict:
        """The counts as JSON types."""
        found = {
            "steps": len(self.steps),
            "completion_tokens": self.n_tokens,
            "completion_seconds": self.seconds,
        }
        found |= {name: mean(step[name] for step in self.steps) for name in ("true", "reaches")}
        shared = [step for step in self.steps if step["share"] is not None]
        if shared:
            hard = [step["share"] > 0 for step in shared]
            found["share"] = mean(step["share"] for step in shared)
            found["hard"] = mean(hard)
            found["hard_is_reaches"] = mean(
                is_hard == step["reaches"] for is_hard, step in zip(hard, shared, strict=True)
            )
        return found

    def table(self) -> str:
        """Some lines for people."""
        found = self.to_dict()
        words = {
            "true": "true",
            "reaches": "reach the target",
            "share": "completions right",
            "hard": "with one right",
            "hard_is_reaches": "as `reaches` says",
        }
        lines = [f"  {'steps labelled':<22} {found['steps']:>8,}"]
        lines += [
            f"  {'- ' + words[name]:<22} {found[name]:>16.1%}" for name in words if name in found
        ]
        if self.n_tokens:
            lines.append(f"  {'tokens completed':<22} {self.n_tokens:>8,}")
        return "\n".join(lines)


def mean(values) -> float:
    """The mean of some numbers or truths; NaN of none."""
    values = [float(value) for value in values]
    return float(np.mean(values)) if values else float("nan")
