"""Type problems, or talk: see what the model thinks and answers.

    r1zero chat --run runs/rl                          type "3 7 9 -> 13"; quit or Ctrl-D ends
    r1zero chat --run runs/rl --problem "3 7 9 -> 13"  one answer, and out; the flag may be repeated
    r1zero chat --run runs/rl < problems.txt           one answer per line
    r1zero chat --base DIR --system "Be brief."        a conversation with an open chat model

A model with a chat template is talked to: every line is a turn of one conversation, and `new`
begins another one (conversation.py). But a model that GRPO trained without --chat is asked as it
was in training: the line is a question in the template of its task. If that was Countdown, it is
given Countdown problems and nothing else. Any other model (trained on text, or on pairs) is given
the line as it stands, and continues it.

In a terminal the response appears token by token, and Ctrl-C ends it and asks for the next line.

Left out: colours, and turns of several lines.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...eval.sampler import ModelSampler
from ...eval.tasks import arithmetic, countdown, math
from ...eval.tasks.catalogue import TASKS
from ...eval.tasks.countdown import TOY, Countdown, CountdownProblem
from ...eval.tasks.prompts import TEMPLATES, Template
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

# The templates of a task, by its name; other tasks have those of prompts.py.
FORMS_OF = {
    "arithmetic": arithmetic.FORMS,
    "countdown": countdown.FORMS,
    "game24": countdown.FORMS,
    "math": math.FORMS,
}


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ComputeFlags):
    """Type problems, or talk: see what the model thinks and answers; quit or Ctrl-D ends."""

    run: str | None = None
    """Folder of the run, or of a checkpoint."""
    base: str | None = None
    """Folder of a Hugging Face model, of adapters in PEFT's layout, or of a run to talk to, instead
    of --run."""
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


def was_asked_in_text(settings: dict) -> bool:
    """Whether a run was trained by GRPO on prompts that it continues, without a chat template."""
    task = settings.get("task")
    return isinstance(task, dict) and not task.get("chat", False)


def template_of(settings: dict) -> str:
    """The template that a run of GRPO put its problems in; the toy form for any other run."""
    task = settings.get("task")
    if not isinstance(task, dict):
        return TOY
    named = [o.partition("=")[2] for o in task.get("options", ()) if o.startswith("template=")]
    return named[-1] if named else getattr(TASKS.get(task.get("name")), "template", TOY)


def form_of(settings: dict) -> Template | None:
    """The form that a run of GRPO put its questions in; None if they stood alone, or no run did."""
    task, template = settings.get("task"), template_of(settings)
    if template == TOY:
        return None
    return FORMS_OF.get(task.get("name"), TEMPLATES).get(template)


# ---- lines and their answers ----


class Responder:
    """A model that answers lines: problems of Countdown, questions, or text to continue."""

    def __init__(
        self,
        sampler: ModelSampler,
        countdown_only: bool,
        template: str = TOY,
        form: Template | None = None,
    ):
        """template: how a problem is put to a model that knows Countdown only. form: how any
        question is put to another model; None continues the line as it stands."""
        self.sampler = sampler
        self.countdown_only = countdown_only
        self.template = template
        self.form = form

    @property
    def greeting(self) -> str:
        """What a person may type."""
        wanted = "text for the model to continue"
        if self.countdown_only:
            wanted = "problems, like 3 7 9 -> 13"
        elif self.form is not None:
            wanted = f"questions, which go into the template {self.template} as in training"
        return f"type {wanted}; quit or Ctrl-D ends"

    def read(self, line: str) -> tuple[CountdownProblem | None, str]:
        """(the problem in a line, None if it is other text; the prompt for the model).

        Raises ValueError for other text where the model knows Countdown only.
        """
        if self.countdown_only:
            problem = replace(Countdown.problem_from_text(line), template=self.template)
            return problem, Countdown.prompt(problem)
        if self.form is not None:
            return None, self.form.prompt(line)
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
    """A conversation, if the model has a template for one and was not trained in another form.

    settings: the flags of the run that trained the model. Raises ValueError for a --system that
    cannot be used.
    """
    countdown_only = knows_countdown_only(settings)
    is_talker = not (countdown_only or was_asked_in_text(settings))
    if sampler.tokenizer.chat_template is not None and is_talker:
        if config.system is not None:
            check_spelling(sampler.tokenizer, config.system, "--system")
        return Conversation(sampler, config.system)
    if config.system is not None:
        raise ValueError(
            "--system is for a model with a chat template, and this one has none, or was trained "
            "on problems without one; leave it out"
        )
    return Responder(sampler, countdown_only, template_of(settings), form_of(settings))


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
