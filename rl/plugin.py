"""A reward of the user's own: `--rewards.plugin my_module:function`.

    def brevity(samples):
        return [1.0 if len(sample.text) < 100 else 0.0 for sample in samples]

The function takes a list of samples (eval/response.py: problem, text, tokens, finish_reason) and
returns a list of numbers, one per sample. It is called with all samples of a step at once, and
before the run once, to try it, with made-up answers to a problem. With dynamic sampling an answer
may be graded more than once, so the same sample must earn the same.

What it returns is checked each time. Whatever is wrong ends the run with one line that names the
problem and the response; nothing is trained on it.
"""

import inspect
import math
import numbers
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..eval.plugin import import_own, load_named, raised
from ..eval.response import Sample, quoted

FLAG = "--rewards.plugin"
LARGEST = 1e30  # of a reward with its weight: its advantage is a 32-bit number
SEARCH_S = 5.0  # seconds that the search for the sample to blame may take


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


def plugin_rewards(
    spec: str, samples: Sequence[Sample], function: Callable | None = None
) -> np.ndarray:
    """[N] float64: what the plug-in gives to each sample. function: as `load_reward` gives it.

    Raises PluginError for an exception, and for anything but one finite number per sample.
    """
    function = function or load_reward(spec)
    try:
        given = function(list(samples))
        values = list(given) if is_list(given) else None  # which may run a generator of its own
    except (Exception, SystemExit) as error:  # whatever its author wrote
        where = on(first_that_fails(function, samples, error), len(samples))
        raise PluginError(f"{FLAG} {spec} {raised(error)}, {where}") from error
    expected = f"expected a list with one number for each of {len(samples)} samples"
    if values is None or len(values) != len(samples):
        many = "" if values is None else f", {len(values)} values"
        where = on(samples[0] if samples else None, 0)
        raise PluginError(f"{FLAG} {spec} returned {shown(given)}{many}; {expected}, {where}")
    numbers_N = np.array([number_of(value) for value in values], np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers_N))
    if len(bad):
        value, where = shown(values[bad[0]]), on(samples[bad[0]])
        raise PluginError(f"{FLAG} {spec} returned {value}, expected a finite number, {where}")
    return numbers_N


def probes(problem: Any, group_size: int) -> list[Sample]:
    """Whole groups of what a base model may answer to a problem; the tokens are the text's bytes,
    which every tokenizer has."""
    texts = ("", "no", "<think>a</think><answer>1</answer>", "<answer>")
    return [Sample(problem, text, [*text.encode(), 0], "stop") for text in texts * group_size]


def check_size(spec: str, weighted_N: np.ndarray, samples: Sequence[Sample]) -> None:
    """Raise PluginError for what is too large to train on. weighted_N: given, times its weight."""
    bad = np.flatnonzero(~(np.abs(weighted_N) <= LARGEST))
    if len(bad):
        value, where = weighted_N[bad[0]], on(samples[bad[0]])
        raise PluginError(
            f"{FLAG} {spec}: with its weight it is {value:g}, expected at most {LARGEST:g} in "
            f"size, {where}"
        )


def check_sign(
    spec: str, given_N: np.ndarray, total_N: np.ndarray, samples: Sequence[Sample]
) -> None:
    """Raise PluginError for what the plug-in gave below 0 if the sum of all parts is below 0."""
    bad = np.flatnonzero((given_N < 0) & (total_N < 0))
    if len(bad):
        value, total, where = given_N[bad[0]], total_N[bad[0]], on(samples[bad[0]])
        raise PluginError(
            f"{FLAG} {spec} returned {value:g}, and the whole reward is {total:g}; expected 0 or "
            f"more with --advantage.scale mean, {where}"
        )


def is_list(given: object) -> bool:
    """Whether a value can be one number after another: no text, and no keys without order."""
    try:
        iter(given)
    except TypeError:
        return False
    return not isinstance(given, str | bytes | dict | set)


def number_of(value: object) -> float:
    """A real number of any type as a float; NaN for whatever is none, or is too large for one."""
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except (OverflowError, TypeError, ValueError):
        return math.nan


def first_that_fails(
    function: Callable, samples: Sequence[Sample], error: BaseException, seconds: float = SEARCH_S
) -> Sample | None:
    """The first sample that the function fails on alone, with an error of the same type.

    None if there is none, or if it takes too long to find out: a judge may be slow.
    """
    end = time.monotonic() + seconds
    for sample in samples:
        if time.monotonic() >= end:
            return None
        try:
            list(function([sample]))
        except (Exception, SystemExit) as again:  # as above
            if type(again) is type(error):
                return sample
    return None


def shown(value: object, limit: int = 80) -> str:
    """A value on one line, short, for a message."""
    try:
        text = " ".join(ascii(value).split())
    except Exception:  # a number of too many digits, or a repr of its author's own
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def on(sample: Sample | None, n_samples: int = 1) -> str:
    """A sample, short, for a message; None for all samples."""
    if sample is None:
        return f"on all {n_samples} samples together"
    return f"on the problem {shown(sample.problem)} and the response {quoted(sample.text)}"
