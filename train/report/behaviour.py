"""What the think blocks of Countdown responses do: the measures behind the demo's claim.

    <think>9+7=16,16-3=13,13-13=0 ok;9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>

An attempt is what stands between `;` (see recipes/demo_corpus.py). Its verdict is the `ok` or `no`
at its end. The skill that the pretraining text lacks is to use the verdict: go on after a `no`,
stop after an `ok`. So the two measures that count are the chances that the thoughts end right after
a verdict of each kind. Verdicts count as they are written; whether they are right is another
measure.

Left out: what a response earns (rl/rewards.py), and thoughts that are not attempts. The text comes
from a model, so it may be anything: no text raises, and none takes long.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ...eval.tasks.attempts import Attempt, follows, is_valid, parse_attempts
from ...eval.tasks.countdown import Countdown, CountdownProblem


@dataclass(frozen=True)
class Behaviour:
    """Shares are from 0 to 1, and None where there was nothing to count."""

    n_answers: int
    """Number of responses measured."""
    n_attempts: int
    """Number of attempts in all of them. One that was cut off before its verdict is not counted."""
    attempts_per_answer: float | None
    """Mean over all responses, those without any attempt included."""
    p_stop_after_ok: float | None
    """Share of verdicts "ok" after which the thoughts end."""
    n_ok: int
    """Number of verdicts "ok". One at the very end of a cut response decided nothing: left out."""
    p_stop_after_no: float | None
    """Share of verdicts "no" after which the thoughts end."""
    n_no: int
    """Number of verdicts "no", counted likewise."""
    verdict_accuracy: float | None
    """Share of right verdicts, among those after a readable check `v-t=d`. Right is "ok" if v and t
    both are the target, else "no"."""
    n_checks: int
    """Number of verdicts after a readable check."""
    arithmetic_accuracy: float | None
    """Share of written equations that are exactly true."""
    n_equations: int
    """Number of written equations."""
    valid_attempts: float | None
    """Share of attempts that are among demo_corpus.all_attempts of the problem."""
    repeated_attempts: float | None
    """Share of attempts that the same response had made before, letter for letter."""
    answer_follows_last: float | None
    """Share of answers with the expression of the last attempt."""
    n_answered: int
    """Number of responses with an answer and an attempt: those that the share above is of."""
    right_after_ok: float | None
    """Share of right answers, among those whose last verdict is "ok"."""
    n_last_ok: int
    """Number of responses with an answer whose last verdict is "ok"."""

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain JSON types."""
        return asdict(self)


def share(hits: Iterable[bool]) -> tuple[float | None, int]:
    """(share of True, how many in all); the share of nothing is None."""
    hits = list(hits)
    if not hits:
        return None, 0
    return sum(hits) / len(hits), len(hits)


class Answered(NamedTuple):
    """A response with an answer and at least one attempt."""

    problem: CountdownProblem
    response: str
    answer: str
    last: Attempt


def measure(problems: Sequence[CountdownProblem], responses: Sequence[str]) -> Behaviour:
    """The behaviour of responses[n] to problems[n]. Raises ValueError if the lengths differ."""
    made = [parse_attempts(response) for response in responses]

    # All attempts, each with its problem; and all responses that answer after an attempt.
    attempts: list[tuple[CountdownProblem, Attempt]] = []
    answered: list[Answered] = []
    for problem, response, group in zip(problems, responses, made, strict=True):
        attempts += [(problem, attempt) for attempt in group]
        answer = Countdown.grade(problem, response).answer  # the one that the grader judges
        if group and answer is not None:
            answered.append(Answered(problem, response, answer, group[-1]))

    p_stop_after_ok, n_ok = stops_after("ok", attempts)
    p_stop_after_no, n_no = stops_after("no", attempts)
    verdict_accuracy, n_checks = share(
        verdict_is_right(attempt, problem) for problem, attempt in attempts if attempt.check
    )
    arithmetic_accuracy, n_equations = share(
        step.true for _, attempt in attempts for step in attempt.steps if step
    )
    valid_attempts, _ = share(is_valid(attempt, problem) for problem, attempt in attempts)
    answer_follows_last, n_answered = share(follows(a.answer, a.last) for a in answered)

    # The grader judges by the problem that it is given; these options are quick to set up.
    grader = Countdown(n_numbers=2, high=9)
    right_after_ok, n_last_ok = share(
        grader.grade(a.problem, a.response).accuracy == 1.0
        for a in answered
        if a.last.verdict == "ok"
    )
    n_repeats = sum(len(group) - len({attempt.text for attempt in group}) for group in made)
    return Behaviour(
        n_answers=len(made),
        n_attempts=len(attempts),
        attempts_per_answer=len(attempts) / len(made) if made else None,
        p_stop_after_ok=p_stop_after_ok,
        n_ok=n_ok,
        p_stop_after_no=p_stop_after_no,
        n_no=n_no,
        verdict_accuracy=verdict_accuracy,
        n_checks=n_checks,
        arithmetic_accuracy=arithmetic_accuracy,
        n_equations=n_equations,
        valid_attempts=valid_attempts,
        repeated_attempts=n_repeats / len(attempts) if attempts else None,
        answer_follows_last=answer_follows_last,
        n_answered=n_answered,
        right_after_ok=right_after_ok,
        n_last_ok=n_last_ok,
    )


def stops_after(
    verdict: str, attempts: list[tuple[CountdownProblem, Attempt]]
) -> tuple[float | None, int]:
    """(share of these verdicts after which the thoughts end, how many of them decided anything)."""
    decisions = [
        attempt.ends_thoughts
        for _, attempt in attempts
        if attempt.verdict == verdict and attempt.ends_thoughts is not None
    ]
    return share(decisions)


def verdict_is_right(attempt: Attempt, problem: CountdownProblem) -> bool:
    """Whether the verdict is the one that the attempt's readable check calls for."""
    should_be_ok = attempt.check.a == attempt.check.b == problem.target
    return (attempt.verdict == "ok") == should_be_ok
