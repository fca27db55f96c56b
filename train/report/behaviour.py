"""What the think blocks of Countdown responses do: the measures behind the demo's claim.

    <think>9+7=16,16-3=13,13-13=0 ok;9-7=2,3+2=5,5-13=-8 no</think><answer>3+(9-7)</answer>

An attempt is what stands between `;` (see corpus.py); its verdict is the `ok` or `no` at its end. The skill
that the pretraining text lacks is to use the verdict: go on after a `no`, stop after an `ok`. So the two
figures that count are the chances that the block ends right after a verdict of each kind. Verdicts count as
they are WRITTEN: whether they are right is a measure of its own.

Left out: what a response is paid for (rl/rewards.py), and any judgement of thoughts that are no attempts.
Text comes from a model, so it may be anything: no text raises, and none takes long.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ...eval.response import parse_response
from ...eval.tasks.attempts import follows, is_valid, parse_attempts
from ...eval.tasks.countdown import Countdown, CountdownProblem


@dataclass(frozen=True)
class Behaviour:
    """Shares are from 0 to 1, and None where there was nothing to count."""

    n_answers: int
    """Responses measured."""
    n_attempts: int
    """Attempts in all of them; one that was cut off before its verdict is not counted anywhere."""
    attempts_per_answer: float | None
    """Mean over all responses, those without any included."""
    p_stop_after_ok: float | None
    """Share of verdicts that say ok after which the thoughts end."""
    n_ok: int
    """How many verdicts say ok; one at the very end of a cut response decided nothing and is left out."""
    p_stop_after_no: float | None
    """Share of verdicts that say no after which the thoughts end."""
    n_no: int
    """How many verdicts say no, counted likewise."""
    verdict_accuracy: float | None
    """Of the verdicts behind a readable check `v-t=d`: says ok where v and t both are the target, else no."""
    n_checks: int
    """How many verdicts stand behind a readable check."""
    arithmetic_accuracy: float | None
    """Share of written equations that are exactly true."""
    n_equations: int
    valid_attempts: float | None
    """Share of attempts without any fault: letter for letter one of corpus.all_attempts of its problem."""
    repeated_attempts: float | None
    """Share of attempts that the same response had made before, letter for letter."""
    answer_follows_last: float | None
    """Share of answers with the expression of the last attempt."""
    n_answered: int
    """Responses with both an answer and an attempt; the two shares beside are of these."""
    right_after_ok: float | None
    """Share of right answers where the last verdict says ok."""
    n_last_ok: int
    """Of those, responses whose last attempt says ok."""

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain JSON types."""
        return asdict(self)


def share(hits: Iterable[bool]) -> tuple[float | None, int]:
    """(share of True, how many in all); the share of nothing is None."""
    hits = list(hits)
    return (sum(hits) / len(hits) if hits else None), len(hits)


def measure(problems: Sequence[CountdownProblem], responses: Sequence[str]) -> Behaviour:
    """The behaviour of responses[n] to problems[n]. Raises ValueError only if the two differ in length."""
    grader = Countdown(
        n_numbers=2, high=9
    )  # judges by the problem given; these dials are quick to set up
    made = [parse_attempts(response) for response in responses]
    attempts = [
        (problem, attempt)
        for problem, group in zip(problems, made, strict=True)
        for attempt in group
    ]
    stops = {
        word: share(
            a.ends_thoughts
            for _, a in attempts
            if a.verdict == word and a.ends_thoughts is not None
        )
        for word in ("ok", "no")
    }
    checks = share(
        (a.verdict == "ok") == (a.check.a == a.check.b == problem.target)
        for problem, a in attempts
        if a.check
    )
    equations = share(step.true for _, a in attempts for step in a.steps if step)
    answered = [
        (problem, response, answer, group[-1])
        for problem, response, group in zip(problems, responses, made, strict=True)
        if group and (answer := parse_response(response).answer) is not None
    ]
    follow = share(follows(answer, last) for _, _, answer, last in answered)
    right_after_ok = share(
        grader.grade(problem, response).accuracy == 1.0
        for problem, response, _, last in answered
        if last.verdict == "ok"
    )
    n_repeats = sum(len(group) - len({a.text for a in group}) for group in made)
    return Behaviour(
        n_answers=len(made),
        n_attempts=len(attempts),
        attempts_per_answer=len(attempts) / len(made) if made else None,
        p_stop_after_ok=stops["ok"][0],
        n_ok=stops["ok"][1],
        p_stop_after_no=stops["no"][0],
        n_no=stops["no"][1],
        verdict_accuracy=checks[0],
        n_checks=checks[1],
        arithmetic_accuracy=equations[0],
        n_equations=equations[1],
        valid_attempts=share(is_valid(a, problem) for problem, a in attempts)[0],
        repeated_attempts=n_repeats / len(attempts) if attempts else None,
        answer_follows_last=follow[0],
        n_answered=follow[1],
        right_after_ok=right_after_ok[0],
        n_last_ok=right_after_ok[1],
    )
