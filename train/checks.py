"""Checks of flags that several commands share. Each raises ValueError on one line.

What holds of every flag of its type (finite, within 64 bits, not empty) is checked where the
command line is read: cli/flags.py.
"""

import math

from ..model.engine.requests import LEAST_TEMPERATURE


class BatchTooLargeError(MemoryError):
    """The largest micro-batch there can be does not fit; the message says what would help."""


def check_temperature(temperature: float, may_be_zero: bool = True) -> None:
    """Refuse a temperature that the engine would refuse; 0 takes the most likely token."""
    if temperature == 0 and may_be_zero:
        return
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        zero = "0, or " if may_be_zero else ""
        raise ValueError(
            f"--temperature is {temperature}, expected {zero}a number of "
            f"{LEAST_TEMPERATURE:g} or more"
        )
