"""Type problems, see what the model thinks and answers.

    r1zero chat --run runs/rl                          type "3 7 9 -> 13"; quit or Ctrl-D ends
    r1zero chat --run runs/rl --problem "3 7 9 -> 13"  one answer, and out; the flag may be repeated
    r1zero chat --run runs/rl < problems.txt           one answer per line

A model that was trained on Countdown is given Countdown problems and nothing else. Any other model
(trained on text, or on pairs) is given the line as it stands, and continues it.

In a terminal the response appears token by token, and Ctrl-C ends it and asks for the next line.

Left out: memory of earlier lines (the models here answer one prompt), colours.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ...eval.harness import Sampled
from ...eval.response import Sample, grade_response, parse_response
from ...eval.sampler import ModelSampler
from ...eval.tasks.countdown import Countdown, CountdownProblem
from ..checks import check_temperature
from ..compute_flags import ComputeFlags
from ..interrupt import Stopped
from ..machine import pick_device, reuse_memory
from ..run import at_least
from .eval import load_run
from .main import printable


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ComputeFlags):
    """Type problems, see what the model thinks and answers; quit or Ctrl-D ends."""

    run: str
    """Folder of the run, or of a checkpoint."""
    which: str = "last"
    """Which checkpoint of the run to load: last, best, or a step number."""
    problem: tuple[str, ...] = ()
    """Problems to answer before leaving, instead of asking for lines."""
    max_new_tokens: int = 160
    """Maximum number of new tokens per answer."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    seed: int = 0
    """Seed of the random numbers for sampling; a repeated line still gets another answer."""
    device: str = "auto"
    """Device to compute on: auto (a CUDA GPU if there is one), cpu, cuda or mps."""

    def __post_init__(self):
        ComputeFlags.__post_init__(self)
        at_least(self, 1, "max_new_tokens")
        check_temperature(self.temperature)


def knows_countdown_only(settings: dict) -> bool:
    """Whether a run was trained on Countdown alone, by GRPO or on the demo's corpus."""
    task = settings.get("task")
    by_reward = isinstance(task, dict) and task.get("name") == Countdown.name
    return by_reward or settings.get("data") == [Countdown.name]


# ---- a response, for people ----


def shown(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """The parts of a response, one below the other, and the remarks about it."""
    response = parse_response(sampled.text)
    blocks = [("think", response.think), ("answer", response.answer)]
    parts = [(name, text) for name, text in blocks if text is not None]
    if not parts:
        parts = [("text" if problem else "", sampled.text)]
    notes = remarks(problem, sampled)
    return labelled(parts) + (f"\n{notes}" if notes else "")


def remarks(problem: CountdownProblem | None, sampled: Sampled) -> str:
    """The grade of a response to a Countdown problem, and whether it was cut off."""
    parts = []
    if problem:
        sample = Sample(problem, sampled.text, sampled.tokens, sampled.finish_reason)
        graded = grade_response(Countdown, sample)
        parts.append(("grade", f"{'right' if graded.accuracy else 'wrong'}. {graded.why}"))
        if not graded.format:
            parts.append(("format", graded.why_format))
    if sampled.finish_reason == "length":
        parts.append(("note", f"cut off after {sampled.n_tokens} tokens"))
    return labelled(parts)


def labelled(parts: list[tuple[str, str]]) -> str:
    """Each (label, text) on lines of its own, the labels in a column."""
    return "\n".join(
        f"{label:<8}{printable(text)}" if label else printable(text) for label, text in parts
    )


# ---- lines and their answers ----


class Responder:
    """A model that answers lines, as problems of Countdown or as text to continue."""

    def __init__(self, sampler: ModelSampler, countdown_only: bool):
        self.sampler = sampler
        self.countdown_only = countdown_only

    def read(self, line: str) -> tuple[CountdownProblem | None, str]:
        """(the problem in a line, None if it is other text; the prompt for the model).

        Raises ValueError for other text where the model knows Countdown only.
        """
        if self.countdown_only:
            problem = Countdown.problem_from_text(line)
            return problem, Countdown.prompt(problem)
        try:
            return Countdown.problem_from_text(line), line
        except ValueError:
            return None, line

    def reply(self, line: str) -> str:
        """The line and the answer to it. Raises ValueError as `read` and the sampler do."""
        problem, prompt = self.read(line)
        [[sampled]] = self.sampler([prompt], 1)
        return f"{printable(line)}\n{shown(problem, sampled)}\n"

    def stream(self, line: str) -> None:
        """Print the answer token by token, then the remarks. Raises ValueError likewise."""
        problem, prompt = self.read(line)
        shown = ""
        for text, sampled in self.sampler.stream(prompt):
            print(printable(text), end="", flush=True)
            shown += text
            whole = sampled  # None until the last text
        print()
        if shown != whole.text:  # special tokens are not streamed, but they are graded
            print(labelled([("sampled", whole.text)]))
        if notes := remarks(problem, whole):
            print(notes)


def typed_lines() -> Iterator[str]:
    """The lines of stdin until its end or `quit`, without blank ones; a person is asked."""
    is_person = sys.stdin.isatty()
    while True:
        if is_person:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line and is_person:
            print()  # Ctrl-D leaves the cursor behind the prompt
        if not line or line.strip() == "quit":
            return
        if line.strip():
            yield line.rstrip("\r\n")


def answer_flags(responder: Responder, problems: tuple[str, ...]) -> None:
    """Answer what --problem gave."""
    for line in problems:
        responder.read(line)  # a bad one is refused before the first is answered
    for line in problems:
        print(responder.reply(line), flush=True)


def answer_pipe(responder: Responder) -> None:
    """Answer every line of stdin; a line that cannot be answered is told why."""
    for line in typed_lines():
        try:
            print(responder.reply(line), flush=True)
        except ValueError as error:
            print(f"{printable(line)}\n{error}\n", flush=True)


def answer_person(responder: Responder, name: str) -> None:
    """Ask for lines, and answer each as it is sampled."""
    problems, text = "problems, like 3 7 9 -> 13", "text for the model to continue"
    kind = problems if responder.countdown_only else text
    print(f"{name}: type {kind}; quit or Ctrl-D ends")
    for line in typed_lines():
        try:
            responder.stream(line)
        except ValueError as error:
            print(error, flush=True)
        except Stopped:
            raise
        except KeyboardInterrupt:
            print()  # the answer was broken off; the next line is asked for


def chat(config: ChatConfig) -> None:
    """Answer until the lines end.

    Raises ValueError for bad flags or a bad --problem, NonFiniteError for NaN.
    """
    reuse_memory()
    device = pick_device(config.device)
    precision = config.precision(device)
    model, tokenizer, checkpoint = load_run(config.run, config.which, device, precision)
    sampler = ModelSampler(model, tokenizer, config.max_new_tokens, config.temperature, config.seed)
    settings = checkpoint.state.get("settings", {})
    responder = Responder(sampler, knows_countdown_only(settings))
    if config.problem:
        answer_flags(responder, config.problem)
    elif sys.stdin.isatty():
        answer_person(responder, str(checkpoint.path))
    else:
        answer_pipe(responder)
