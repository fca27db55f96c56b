"""Type problems, or talk: see what the model thinks and answers.

    r1zero chat --run runs/rl                          type "3 7 9 -> 13"; quit or Ctrl-D ends
    r1zero chat --run runs/rl --problem "3 7 9 -> 13"  one answer, and out; the flag may be repeated
    r1zero chat --run runs/rl < problems.txt           one answer per line
    r1zero chat --base DIR --system "Be brief."        a conversation with an open chat model

A model with a chat template is talked to: every line is a turn of one conversation, and `new`
begins another one (conversation.py). A model that was trained on Countdown is given Countdown
problems and nothing else. Any other model (trained on text, or on pairs) is given the line as it
stands, and continues it.

In a terminal the response appears token by token, and Ctrl-C ends it and asks for the next line.

Left out: colours, and turns of several lines.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...eval.sampler import ModelSampler
from ...eval.tasks.countdown import TOY, Countdown, CountdownProblem
from ...model.chat_template import check_spelling
from ..checks import check_temperature
from ..compute_flags import ComputeFlags
from ..interrupt import Stopped
from ..machine import pick_device, reuse_memory
from ..run import at_least
from .conversation import Conversation
from .eval import load_run
from .main import printable
from .responses import printed, remarks, shown


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ComputeFlags):
    """Type problems, or talk: see what the model thinks and answers; quit or Ctrl-D ends."""

    run: str | None = None
    """Folder of the run, or of a checkpoint."""
    base: str | None = None
    """Folder of a Hugging Face model (or of a run) to talk to, instead of --run."""
    system: str | None = None
    """System prompt of the conversation, for a model with a chat template."""
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
        if (self.run is None) == (self.base is None):
            raise ValueError("expected either --run DIR or --base DIR")

    @property
    def folder(self) -> str:
        """The model's folder."""
        return self.base if self.run is None else self.run


def knows_countdown_only(settings: dict) -> bool:
    """Whether a run was trained on Countdown alone, by GRPO or on the demo's corpus.

    A chat model that was asked through its template can still be talked to.
    """
    task = settings.get("task")
    is_named = isinstance(task, dict) and task.get("name") == Countdown.name
    by_reward = is_named and not task.get("chat", False)
    return by_reward or settings.get("data") == [Countdown.name]


def template_of(settings: dict) -> str:
    """The template that a run of GRPO put its problems in; the toy form for any other run."""
    task = settings.get("task")
    options = task.get("options", ()) if isinstance(task, dict) else ()
    named = [option.partition("=")[2] for option in options if option.startswith("template=")]
    return named[-1] if named else TOY


# ---- lines and their answers ----


class Responder:
    """A model that answers lines, as problems of Countdown or as text to continue."""

    def __init__(self, sampler: ModelSampler, countdown_only: bool, template: str = TOY):
        """template: how a problem is put to a model that knows Countdown only."""
        self.sampler = sampler
        self.countdown_only = countdown_only
        self.template = template

    @property
    def greeting(self) -> str:
        """What a person may type."""
        problems, text = "problems, like 3 7 9 -> 13", "text for the model to continue"
        return f"type {problems if self.countdown_only else text}; quit or Ctrl-D ends"

    def read(self, line: str) -> tuple[CountdownProblem | None, str]:
        """(the problem in a line, None if it is other text; the prompt for the model).

        Raises ValueError for other text where the model knows Countdown only.
        """
        if self.countdown_only:
            problem = replace(Countdown.problem_from_text(line), template=self.template)
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
        whole = printed(self.sampler.stream(prompt))
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


def answer_flags(responder: Responder | Conversation, problems: tuple[str, ...]) -> None:
    """Answer what --problem gave."""
    for line in problems:
        responder.read(line)  # a bad one is refused before the first is answered
    for line in problems:
        print(responder.reply(line), flush=True)


def answer_pipe(responder: Responder | Conversation) -> None:
    """Answer every line of stdin; a line that cannot be answered is told why."""
    for line in typed_lines():
        try:
            print(responder.reply(line), flush=True)
        except ValueError as error:
            print(f"{printable(line)}\n{error}\n", flush=True)


def answer_person(responder: Responder | Conversation, name: str) -> None:
    """Ask for lines, and answer each as it is sampled."""
    print(f"{name}: {responder.greeting}")
    for line in typed_lines():
        try:
            responder.stream(line)
        except ValueError as error:
            print(error, flush=True)
        except Stopped:
            raise
        except KeyboardInterrupt:
            print()  # the answer was broken off; the next line is asked for


def responder_of(
    config: ChatConfig, sampler: ModelSampler, settings: dict
) -> Responder | Conversation:
    """A conversation, if the model has a template for one and was not trained on Countdown alone.

    settings: the flags of the run that trained the model. Raises ValueError for a --system that
    cannot be used.
    """
    countdown_only = knows_countdown_only(settings)
    if sampler.tokenizer.chat_template is not None and not countdown_only:
        if config.system is not None:
            check_spelling(sampler.tokenizer, config.system, "--system")
        return Conversation(sampler, config.system)
    if config.system is not None:
        raise ValueError(
            "--system is for a model with a chat template, and this one has none, or was trained "
            "on Countdown alone; leave it out"
        )
    return Responder(sampler, countdown_only, template_of(settings))


def chat(config: ChatConfig) -> None:
    """Answer until the lines end.

    Raises ValueError for bad flags or a bad --problem, NonFiniteError for NaN.
    """
    reuse_memory()
    device = pick_device(config.device)
    precision = config.precision(device)
    model, tokenizer, checkpoint = load_run(config.folder, config.which, device, precision)
    sampler = ModelSampler(model, tokenizer, config.max_new_tokens, config.temperature, config.seed)
    responder = responder_of(config, sampler, checkpoint.state.get("settings", {}))
    if config.problem:
        answer_flags(responder, config.problem)
    elif sys.stdin.isatty():
        answer_person(responder, str(checkpoint.path))
    else:
        answer_pipe(responder)
