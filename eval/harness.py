"""The harness: sample responses, grade them, report metrics with their uncertainty.

    pass@1      share of right responses, averaged over problems
    pass@k      chance that at least one of k responses is right (arXiv 2107.03374, eq. 1)
    maj@k       share of problems where the answer that most of k responses give is right
    format      share of well-formed responses (eval/response.py)

Every share has a 95 % interval over problems: what would have come out with other problems of the
same kind. Responses to one problem are not independent of each other, so more samples per problem
narrow the interval less than more problems do.

Left out: significance tests between two runs (on the same problems, compare them problem by
problem, from the JSON lines), and anything that knows a model: a sampler is any callable.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .console import Bar
from .response import Sample, grade_response, quoted
from .result_file import ResultFile
from .tasks.base import Task

Z95 = 1.959964  # 97.5 % quantile of the normal distribution
# What is kept of each response for the summary.
SUMMED = ("accuracy", "answer", "format", "n_tokens", "finish_reason")


class Sampled(NamedTuple):
    """One response as a sampler gives it."""

    text: str
    n_tokens: int
    finish_reason: str
    """ "length" if it was cut at the token limit; any other word otherwise."""
    tokens: tuple[int, ...] = ()
    """The token ids, for graders that look at them; empty where a sampler does not know them."""

    def sample_of(self, problem: Any) -> Sample:
        """The response to a problem, as graders take it."""
        return Sample(problem, self.text, self.tokens, self.finish_reason)


class Estimate(NamedTuple):
    """A share with its 95 % interval, all from 0 to 1."""

    mean: float
    low: float
    high: float


Sampler = Callable[[list[str], int], list[list[Sampled]]]
"""sampler(prompts, n_samples) -> n_samples responses to each prompt. It is called once per batch.
One that seeds by the position in the batch would give all batches the same random numbers, so seed
by call or prompt."""


@dataclass(frozen=True)
class EvalResult:
    task: str
    n_problems: int
    n_samples: int
    accuracy: Estimate
    """pass@1 over all samples."""
    pass_at: dict[int, Estimate]
    """pass@k for each k asked for."""
    maj_at: dict[int, Estimate]
    """maj@k for each k asked for."""
    format_rate: Estimate
    mean_tokens: float
    """Mean response length in tokens."""
    truncated: float
    """Share of responses that were cut at the token limit."""
    tokens_per_second: float = field(default=0.0, compare=False)
    """New tokens per second of sampling, the prompts' time included; grading is not."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; intervals as [low, high]."""

        def means(shares: dict[int, Estimate]) -> dict[str, float]:
            return {str(k): share.mean for k, share in shares.items()}

        def intervals(shares: dict[int, Estimate]) -> dict[str, list[float]]:
            return {str(k): [share.low, share.high] for k, share in shares.items()}

        return {
            "task": self.task,
            "n_problems": self.n_problems,
            "n_samples": self.n_samples,
            "accuracy": self.accuracy.mean,
            "accuracy_95": [self.accuracy.low, self.accuracy.high],
            "pass_at": means(self.pass_at),
            "pass_at_95": intervals(self.pass_at),
            "maj_at": means(self.maj_at),
            "maj_at_95": intervals(self.maj_at),
            "format_rate": self.format_rate.mean,
            "format_rate_95": [self.format_rate.low, self.format_rate.high],
            "mean_tokens": self.mean_tokens,
            "truncated": self.truncated,
            "tokens_per_second": self.tokens_per_second,
        }

    def table(self) -> str:
        """A few lines for people."""
        shares = {"pass@1": self.accuracy}
        shares |= {f"pass@{k}": self.pass_at[k] for k in sorted(self.pass_at) if k != 1}
        shares |= {f"maj@{k}": self.maj_at[k] for k in sorted(self.maj_at) if k != 1}
        shares |= {"well formed": self.format_rate}
        counts = f"{self.n_problems:,} problems x {self.n_samples} samples"
        lines = [f"{self.task}: {counts}, 95 % intervals over problems"]
        for name, share in shares.items():
            interval_95 = f"[{share.low:.1%}, {share.high:.1%}]"
            lines.append(f"  {name:<12} {share.mean:7.1%}   {interval_95}")
        lines.append(f"  {'cut off':<12} {self.truncated:7.1%}")
        lines.append(f"  {'length':<12} {self.mean_tokens:7.1f} tokens")
        lines.append(f"  {'speed':<12} {self.tokens_per_second:7,.0f} tokens per second")
        return "\n".join(lines)


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Chance that k of n responses, sampled without replacement, hold a right one.

    1 - C(n - n_right, k) / C(n, k): the unbiased estimator of arXiv 2107.03374, eq. 1. The quotient
    is a product of k factors from 0 to 1, so nothing overflows.
    """
    assert 1 <= k <= n and 0 <= n_right <= n
    return 1.0 - math.prod(max(n - n_right - i, 0) / (n - i) for i in range(k))


def same_answer_of(task: Task) -> Callable[[str, str], bool]:
    """Whether two answers are one, as the task says; ValueError, with both, where it raises.

    None of ours does; a task of the user's own may.
    """
    alike = getattr(task, "same_answer", Task.same_answer)

    def asked(answer: str, other: str) -> bool:
        try:
            return bool(alike(answer, other))
        except (Exception, SystemExit) as error:  # whatever the code of a user may raise
            raise ValueError(
                f"same_answer of {task.name} raised {type(error).__name__}: {error}, for the "
                f"answers {quoted(answer)} and {quoted(other)}"
            ) from error

    return asked


def majority_right(rows: Sequence[dict[str, Any]], alike: Callable[[str, str], bool]) -> float:
    """1.0 if the answer that most responses to a problem give is right, else 0.0.

    alike: whether two answers are one. A response without an answer has no vote. Of two answers
    with as many votes, the one that was given first counts; without any answer, nothing is right.
    """
    # Each answer as it was first given, with its votes.
    ballots: list[dict[str, Any]] = []
    for row in rows:
        if row["answer"] is None:
            continue
        for ballot in ballots:
            if alike(ballot["answer"], row["answer"]):
                ballot["votes"] += 1
                break
        else:
            ballots.append({"answer": row["answer"], "right": row["accuracy"], "votes": 1})
    # max takes the first of several that are equal.
    winner = max(ballots, key=lambda ballot: ballot["votes"], default=None)
    return float(winner is not None and winner["right"] == 1.0)


def majority_at_k(
    rows: Sequence[dict[str, Any]], k: int, alike: Callable[[str, str], bool]
) -> float:
    """maj@k of a problem: the mean over its responses, k at a time; what is left over is not used.

    Each k responses are one vote, so no response counts in two, and the estimate is unbiased.
    """
    starts = range(0, len(rows) - k + 1, k)
    return sum(majority_right(rows[i : i + k], alike) for i in starts) / len(starts)


def interval(scores: Sequence[float], n_samples: int = 1) -> Estimate:
    """The mean of per-problem scores from 0 to 1, and its 95 % interval over problems.

    Wilson's interval (1927) for yes/no trials, with as many independent trials as would scatter as
    much as the scores do: mean * (1 - mean) / variance of the mean. So it never has zero width and
    never leaves 0..1.

    With one sample per problem that is plain Wilson. With several, the number of trials lies
    between the number of problems (all samples of a problem agree) and the number of responses
    (they are independent). If all scores are 0 or all are 1, or there is a single problem, the
    scatter is unknown and the number of problems counts.
    """
    n = len(scores)
    mean = math.fsum(scores) / n
    variance = math.fsum((score - mean) ** 2 for score in scores) / n
    # How many independent trials the scores are worth.
    spread = mean * (1.0 - mean)
    trials = float(n)
    if n > 1 and spread > 1e-12:
        trials = n * min(spread / variance, n_samples) if variance > 0 else float(n * n_samples)
    # Wilson's interval for that many trials.
    z2 = Z95**2
    centre = (mean + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(spread / trials + z2 / (4 * trials**2))
    # Rounding may leave the mean a hair outside where it is 0 or 1.
    low = max(0.0, min(centre - half, mean))
    high = min(1.0, max(centre + half, mean))
    return Estimate(mean, low, high)


def _row(index: int, problem: Any, prompt: str, sampled: Sampled, task: Task) -> dict[str, Any]:
    graded = grade_response(task, sampled.sample_of(problem))
    return {
        "index": index,
        "problem": asdict(problem) if is_dataclass(problem) else problem,
        "prompt": prompt,
        "response": sampled.text,
        "accuracy": graded.accuracy,
        "format": graded.format,
        "answer": graded.answer,
        "why": graded.why,
        "n_tokens": int(sampled.n_tokens),
        "finish_reason": sampled.finish_reason,
    }


def _summary(
    task: Task, rows: list[dict[str, Any]], n_samples: int, ks: Sequence[int], seconds: float
) -> EvalResult:
    """The metrics of all responses; those of one problem lie next to each other.

    seconds: what sampling took.
    """
    groups = [rows[i : i + n_samples] for i in range(0, len(rows), n_samples)]
    n_right = [sum(row["accuracy"] == 1.0 for row in group) for group in groups]
    n_formed = [sum(row["format"] == 1.0 for row in group) for group in groups]
    n_tokens = sum(row["n_tokens"] for row in rows)
    alike = same_answer_of(task)
    pass_at, maj_at = {}, {}
    for k in ks:
        chances = [pass_at_k(n_samples, right, k) for right in n_right]
        pass_at[k] = interval(chances, n_samples)
        votes = [majority_at_k(group, k, alike) for group in groups]
        maj_at[k] = interval(votes, n_samples // k)
    return EvalResult(
        task=task.name,
        n_problems=len(groups),
        n_samples=n_samples,
        accuracy=interval([right / n_samples for right in n_right], n_samples),
        pass_at=pass_at,
        maj_at=maj_at,
        format_rate=interval([formed / n_samples for formed in n_formed], n_samples),
        mean_tokens=n_tokens / len(rows),
        truncated=sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        tokens_per_second=n_tokens / max(seconds, 1e-9),
    )


def _check(n_problems: int, n_samples: int, ks: Sequence[int], batch: int) -> None:
    if not n_problems:
        raise ValueError("evaluate got no problems; give at least one")
    if n_samples < 1 or batch < 1:
        raise ValueError(
            f"evaluate: n_samples is {n_samples} and batch {batch}; both must be 1 or more"
        )
    for k in ks:
        if not 1 <= k <= n_samples:
            raise ValueError(
                f"pass@{k} needs 1 <= k <= n_samples, but n_samples is {n_samples}; raise it"
            )


def evaluate(
    sampler: Sampler,
    task: Task,
    problems: Sequence[Any],
    n_samples: int = 1,
    ks: Sequence[int] = (1,),
    out: str | Path | None = None,
    batch: int = 64,
    progress: bool = True,
) -> EvalResult:
    """Sample `n_samples` responses to each problem, grade them, and sum up.

    ks: the k of each pass@k and maj@k that is wanted. out: a file for one JSON line per response.
    Lines are written batch by batch to `<out>.partial`, which replaces `out` at the end; an
    evaluation that is broken off leaves `out` as it was, and its own lines in `<out>.partial`.
    batch: problems in one call of the sampler. progress: show a bar on stderr.

    Raises ValueError for no problems, a k above n_samples, counts below 1, a file that cannot be
    written, and a sampler that returns the wrong number of responses.
    """
    problems = list(problems)
    _check(len(problems), n_samples, ks, batch)
    kept: list[dict[str, Any]] = []
    seconds = 0.0
    with (
        nullcontext() if out is None else ResultFile(out) as file,
        Bar(
            total=len(problems), disable=not progress, desc=f"{task.name} problems", unit="problem"
        ) as bar,
    ):
        for start in range(0, len(problems), batch):
            # 1. Sample a group of responses to each problem of the batch.
            chunk = problems[start : start + batch]
            prompts = [task.prompt(problem) for problem in chunk]
            began = time.perf_counter()
            groups = sampler(prompts, n_samples)
            seconds += time.perf_counter() - began
            if [len(group) for group in groups] != [n_samples] * len(chunk):
                raise ValueError(
                    f"the sampler must give each of {len(chunk)} prompts {n_samples} responses"
                )
            # 2. Grade them.
            rows = []
            for index, (problem, prompt, group) in enumerate(
                zip(chunk, prompts, groups, strict=True), start
            ):
                rows += [_row(index, problem, prompt, sampled, task) for sampled in group]
            # 3. Write them to the disk before the next batch, and keep what the summary needs.
            if file is not None:
                file.write(rows)
            kept += [{name: row[name] for name in SUMMED} for row in rows]
            bar.update(len(chunk))
    return _summary(task, kept, n_samples, ks, seconds)
