"""Type problems, see what the model thinks and answers.

    r1zero chat --run runs/rl                          type "3 7 9 -> 13"; quit or Ctrl-D ends
    r1zero chat --run runs/rl --problem "3 7 9 -> 13"  one answer, and out; the flag may be repeated
    r1zero chat --run runs/rl < problems.txt           one answer a line

A model that was trained on Countdown is given Countdown problems and nothing else. Any other model (trained
on text, or on pairs) is given the line as it stands, and goes on with it.

In a terminal the response appears token by token, and Ctrl-C ends it and asks for the next line.

Left out: memory of earlier lines (the models here answer one prompt), colours.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from ...eval.harness import Sampled
from ...eval.response import parse_response
from ...eval.sampler import ModelSampler
from ...eval.tasks.countdown import CountdownProblem, parse_prompt
from ..machine import pick_device, reuse_memory
from .eval import load_run
from .grade import grader
from .main import printable


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Type problems, see what the model thinks and answers; quit or Ctrl-D ends."""

    run: str
    """Folder of the run (or checkpoint)."""
    which: str = "last"
    """The checkpoint: last, best, or its step."""
    problem: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Answer this and leave."""
    max_new_tokens: int = 160
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    seed: int = 0
    """Of sampling; the number of the line counts too, so a repeated line gets another answer."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {self.max_new_tokens}, expected 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}, expected a number of 0 or more")


def knows_countdown_only(settings: dict) -> bool:
    """Whether a run with these settings was trained on Countdown, by GRPO or on the demo's corpus."""
    task = settings.get("task")
    by_reward = isinstance(task, dict) and task.get("name") == "countdown"
    return by_reward or settings.get("data") == ["countdown"]


def as_problem(line: str) -> CountdownProblem | None:
    """The Countdown problem of a line, None if it is other text."""
    try:
        return parse_prompt(line)
    except ValueError:
        return None


def shown(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """A response for people: its parts apart, and the grader's word if it answers a Countdown problem."""
    response = parse_response(sampled.text)
    parts = []
    if response.think is None and response.answer is None:
        parts.append(("text" if problem else "", sampled.text))
    else:
        parts += [
            (name, part)
            for name, part in (("think", response.think), ("answer", response.answer))
            if part is not None
        ]
    lines = [f"{name:<8}{printable(part)}" if name else printable(part) for name, part in parts]
    return "\n".join([*lines, *filter(None, [remarks(problem, sampled)])])


def remarks(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """What there is to say about a response: the grader's word, its form, and whether it was cut off."""
    parts = []
    if problem:
        grade, response = (
            grader("countdown").grade(problem, sampled.text),
            parse_response(sampled.text),
        )
        parts.append(("grade", f"{'right' if grade.accuracy else 'wrong'}. {grade.why}"))
        if not response.well_formed:
            parts.append(("format", response.why))
    if sampled.finish_reason == "length":
        parts.append(("note", f"cut off after {sampled.n_tokens} tokens"))
    return "\n".join(f"{name:<8}{printable(part)}" for name, part in parts)


def typed_lines(ask: str) -> Iterator[str]:
    """The lines of stdin until its end or `quit`, blank ones left out; `ask` is shown to a person who
    types."""
    person = sys.stdin.isatty()
    while True:
        if person:
            print(ask, end="", flush=True)
        line = sys.stdin.readline()
        if line.strip() == "quit" or not line:
            if person and not line:
                print()  # Ctrl-D leaves the cursor behind the prompt
            return
        if line.strip():
            yield line.rstrip("\r\n")


def chat(c: ChatConfig) -> None:
    """Answer until the lines end. Raises ValueError for bad flags or a bad --problem, NonFiniteError for
    NaN."""
    reuse_memory()
    model, tokenizer, checkpoint = load_run(c.run, c.which, pick_device(c.device))
    sampler = ModelSampler(model, tokenizer, c.max_new_tokens, c.temperature, c.seed)
    countdown_only = knows_countdown_only(checkpoint.state.get("settings", {}))

    def asked(line: str) -> tuple[CountdownProblem | None, str]:
        problem = parse_prompt(line) if countdown_only else as_problem(line)
        return problem, grader("countdown").prompt(problem) if countdown_only else line

    def reply(line: str) -> str:
        problem, prompt = asked(line)
        return shown(problem, sampler([prompt], 1)[0][0])

    def stream(line: str) -> None:
        problem, prompt = asked(line)
        for text, whole in sampler.stream(prompt):
            print(printable(text), end="", flush=True)
            sampled = whole
        print()
        if notes := remarks(problem, sampled):
            print(notes)

    if c.problem:
        if countdown_only:
            for line in c.problem:
                parse_prompt(line)  # a bad one is told before the first is answered
        for line in c.problem:
            print(f"{printable(line)}\n{reply(line)}\n", flush=True)
        return
    if sys.stdin.isatty():
        kind = (
            "problems, like 3 7 9 -> 13" if countdown_only else "text for the model to go on with"
        )
        print(f"{checkpoint.path}: type {kind}; quit or Ctrl-D ends")
    for line in typed_lines("> "):
        try:
            if sys.stdin.isatty():
                stream(line)
            else:
                print(f"{printable(line)}\n{reply(line)}\n", flush=True)
        except ValueError as error:
            print(error if sys.stdin.isatty() else f"{printable(line)}\n{error}\n", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()  # the answer was broken off; the next line is asked for
