"""A reward of the user's own: `--rewards.plugin my_module:function`.

    def brevity(samples):
        return [1.0 if len(sample.text) < 100 else 0.0 for sample in samples]

The function takes a list of samples (eval/response.py: problem, text, tokens, finish_reason) and
returns a list of numbers, one per sample. It is called with all samples of a step at once. With
dynamic sampling an answer may be graded more than once, so the same sample must earn the same.

What it returns is checked each time. Whatever is wrong ends the run with one line that names the
problem and the response; nothing is trained on it.
"""

import inspect
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..eval.plugin import import_own, load_named, raised
from ..eval.response import Sample, quoted

FLAG = "--rewards.plugin"


class PluginError(ValueError):
    """A plug-in reward has failed on samples of a run."""


def load_reward(spec: str) -> Callable:
    """The function `my_module:function`.

    Raises ValueError as `load_named` does, and for what cannot be called with one argument.
    """
    function = load_named(spec, FLAG)
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"{FLAG}: {spec} is of type {kind}, expected a function of samples")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C does not say
        return function
    try:
        signature.bind([])
    except TypeError as error:
        raise ValueError(
            f"{FLAG}: {spec} takes {signature}, expected one argument, the list of samples "
            f"({error})"
        ) from None
    return function


def source_of(spec: str) -> Path | None:
    """The file that the plug-in's module comes from; None if it comes from none."""
    module = import_own(spec.partition(":")[0], FLAG)
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def plugin_rewards(spec: str, samples: Sequence[Sample]) -> np.ndarray:
    """[N] float64: what the plug-in gives to each sample.

    Raises PluginError for an exception, and for anything but one finite number per sample.
    """
    function = load_reward(spec)
    try:
        given = function(list(samples))
        values = list(given)
    except (Exception, SystemExit) as error:  # whatever its author wrote
        culprit = first_that_fails(function, samples)
        raise PluginError(f"{FLAG} {spec} {raised(error)}, {on(culprit)}") from error
    if isinstance(given, str | dict) or len(values) != len(samples):
        raise PluginError(
            f"{FLAG} {spec} returned {shown(given)}, {len(values)} values for "
            f"{len(samples)} samples; expected a list with one number for each, {on(samples[0])}"
        )
    for value, sample in zip(values, samples, strict=True):
        if not isinstance(value, numbers.Real) or not np.isfinite(value):
            raise PluginError(
                f"{FLAG} {spec} returned {shown(value)}, expected a finite number, {on(sample)}"
            )
    return np.array(values, np.float64)


def first_that_fails(function: Callable, samples: Sequence[Sample]) -> Sample:
    """The first sample that the function fails on alone; the first of all if it fails on none."""
    for sample in samples:
        try:
            list(function([sample]))
        except (Exception, SystemExit):  # as above
            return sample
    return samples[0]


def shown(value: object, limit: int = 80) -> str:
    """A value on one line, short, for a message."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def on(sample: Sample) -> str:
    """A sample, short, for a message."""
    return f"on the problem {shown(sample.problem)} and the response {quoted(sample.text)}"
