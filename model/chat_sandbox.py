"""Runs a chat template, which is a program in Jinja that came with somebody's weights.

The environment is that of Hugging Face (transformers, utils/chat_template_utils.py), so that a
template renders here to the same text, to the last line break. It is sandboxed and trims blocks; it
has `break` and `continue`, a tag `generation`, a filter `tojson` that escapes no HTML, and the
functions raise_exception, strftime_now, dict and namespace.

The sandbox hides Python from the template. It does not bound what a template computes, so limits
of our own do, each for one way to compute without end:

    step            loops in loops, and macros that call themselves twice
    call_binop      'a' * 10 ** 9, and 10 ** 10 ** 9
    limited         a text that is appended to itself, again and again
    run_template    a loop that writes a long text at every pass

An honest template comes nowhere near them. A filter gets at most MAX_TEXT items from these, for
which it takes a second or so; `wordwrap`, whose time grows with the square, is taken away.

Left out: a process of its own, with a limit on its time and memory. A template that is made for it
can still take much, by a filter that pads or slices to a length of its choosing.

Needs jinja2 3.1.6, where known ways out of the sandbox are closed.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

OLDEST = (3, 1, 6)
MAX_STEPS = 200_000  # passes of loops, and calls
MAX_POWER_BITS = 4_096  # of a number
MAX_TEXT = 1_000_000  # characters of a text, or items of a list


class TooMuch(TemplateError):
    """A template wanted more than the limits above."""


# ---- what a template may call ----


def raise_exception(message: Any) -> None:
    """Raises TemplateError: how a template refuses messages."""
    raise TemplateError(str(message))


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is, where Jinja's own filter escapes what HTML would."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class MakeDict:
    """`dict` in a template: it makes one, and shows nothing of Python's type."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs) -> dict:
        return dict.fromkeys(*args, **kwargs)


def check_name(name: Any) -> None:
    """SecurityError for a name that begins with an underscore, as Python's internals do."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a template cannot hold {name!r}; rename it")


class SafeNamespace(Namespace):
    """`namespace` in a template: variables that a loop may change."""

    # Positional alone, so that a template may name a variable `self`.
    def __init__(self, /, *args, **kwargs):
        values = dict(*args, **kwargs)
        for name in values:
            check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        Namespace.__setitem__(self, name, value)


class Generation(Extension):
    """`{% generation %}` marks what the assistant said. It changes nothing of the text."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_whole")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _whole(self, caller: Callable[[], str]) -> str:
        return caller()


def limited(value: Any) -> Any:
    """The value of a variable, as it is. Raises TooMuch for one that is too long."""
    if hasattr(value, "__len__") and len(value) > MAX_TEXT:
        raise TooMuch(f"a variable of it held more than {MAX_TEXT:,} items")
    return value


# ---- the environment ----


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Hugging Face's environment, with limits."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self):
        extensions = [Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.steps = 0
        self.filters["tojson"] = tojson
        self.filters["counted"] = self.counted
        self.filters["limited"] = limited
        self.globals["raise_exception"] = raise_exception
        self.globals["dict"] = MakeDict()
        self.globals["namespace"] = SafeNamespace
        # Jinja's filler text takes minutes where a template asks for it, and so does this filter.
        del self.globals["lipsum"], self.filters["wordwrap"]

    def step(self) -> None:
        """One more pass of a loop, or call. Raises TooMuch behind the last that is allowed.

        All loops and calls share the count, or loops in loops would multiply it.
        """
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooMuch(f"it took more than {MAX_STEPS:,} steps")

    def counted(self, values: Iterable) -> Iterator:
        """The values that a loop goes over; each is a step."""
        for value in values:
            self.step()
            yield value

    def call(self, context, function, *args, **kwargs) -> Any:
        """What a template calls; each call is a step."""
        self.step()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        """`left * right` or `left ** right`, if the result is not too large.

        Jinja asks here for the operators in intercepted_binops, and for no others.
        """
        for count, value in ((left, right), (right, left)):
            is_repeated = isinstance(count, int) and hasattr(value, "__len__")
            if is_repeated and count * len(value) > MAX_TEXT:
                raise TooMuch(f"it repeated something to more than {MAX_TEXT:,} items")
        both_whole = isinstance(left, int) and isinstance(right, int)
        if both_whole:
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            if bits > MAX_POWER_BITS:
                raise TooMuch(f"it computed a number of more than {MAX_POWER_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


def watch(tree: nodes.Template, environment: ChatEnvironment) -> None:
    """Lead the values of all loops through `counted`, and those of variables through `limited`.

    Jinja calls no method of ours for a loop or a `set`, so the two are filters in its tree.
    """

    def filtered(node: nodes.Expr | None, name: str, line: int) -> nodes.Filter:
        made = nodes.Filter(node, name, [], [], None, None)
        return made.set_lineno(line).set_environment(environment)

    for loop in list(tree.find_all(nodes.For)):
        loop.iter = filtered(loop.iter, "counted", loop.lineno)
    for assignment in list(tree.find_all(nodes.Assign)):
        assignment.node = filtered(assignment.node, "limited", assignment.lineno)
    for block in list(tree.find_all(nodes.AssignBlock)):
        block.filter = filtered(block.filter, "limited", block.lineno)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template that is ready to render; the last few are kept.

    Raises TemplateError for a text that is no template, ImportError for an old jinja2.
    """
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal())
    if version < OLDEST:
        raise ImportError(f"jinja2 is {jinja2.__version__}, which has holes in its sandbox")
    environment = ChatEnvironment()
    tree = environment.parse(source)
    watch(tree, environment)
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def run_template(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of its variables. Raises whatever the template raises."""
    template = compiled(source)
    template.environment.steps = 0
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_TEXT:
            raise TooMuch(f"its text has more than {MAX_TEXT:,} characters")
    return "".join(pieces)
