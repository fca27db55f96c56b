"""Countdown with worked examples in front of each problem: a task for a small real model.

    r1zero eval --run DIR --task benchmarks.laptop:FewShot --options n_numbers=2 ops=+- high=20

SmolLM2-135M answers a bare problem, or one in words, in tags once in 20 times. Four examples bring that to
three in four. The options are Countdown's, and so is the grader: what the model writes behind its answer, as
a next problem, is not read.
"""
from dataclasses import dataclass
from typing import ClassVar

from r1zero.eval.tasks.countdown import Countdown, CountdownProblem

EXAMPLES = """\
3 7 -> 10
<answer>3+7</answer>
5 8 -> 3
<answer>8-5</answer>
9 6 -> 3
<answer>9-6</answer>
2 4 -> 6
<answer>2+4</answer>
"""


@dataclass(frozen=True)
class FewShot(Countdown):
    """Countdown after four examples."""

    name: ClassVar[str] = "countdown_few_shot"

    @staticmethod
    def prompt(problem: CountdownProblem) -> str:
        """The examples, then the problem as Countdown asks it."""
        return EXAMPLES + Countdown.prompt(problem)
