"""The worker that compares mathematical answers: math-verify, in a process of its own.

`Worker` in eval/worker.py starts it and limits it. math-verify reads LaTeX with a grammar, and
compares by SymPy: numbers, expressions, equations, intervals, sets, tuples and matrices.

Its own time limits are switched off, because they are alarms: Python looks at those only between
two of its instructions, and one power of large numbers is a single instruction.
"""

from collections.abc import Callable

from ..worker import serve

DIGITS = 15  # two expressions are alike if their difference vanishes in so many digits
APPROX = "\\approx"
NEAR = 0.01  # how far an approximation may be from the answer that it stands beside, relative to it


def load() -> dict[str, Callable]:
    """The questions of this worker. Raises ModuleNotFoundError without math-verify."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, Equality

    logging.disable(logging.CRITICAL)
    # The whole of a box, and no other part of the text, is the answer.
    target = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(
            f"\\boxed{{{text}}}",
            target,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
        )

    def alike(wanted: list, given: list) -> bool:
        return verify(wanted, given, numeric_precision=DIGITS, timeout_seconds=None)

    def is_true(relation: Basic) -> bool:
        """Whether equations hold that begin with a number; one with an unknown names it."""
        equations = relation.atoms(Equality)
        return all(each.lhs.free_symbols or alike([each.lhs], [each.rhs]) for each in equations)

    def is_near(wanted: list, given: list) -> bool:
        value, other = wanted[0].evalf(), given[0].evalf()
        return bool(abs(value - other) <= NEAR * abs(value))

    def is_right(gold: str, answer: str) -> bool:
        # An approximation may stand behind the answer, if it is one.
        answer, *approximations = answer.split(APPROX)
        wanted, given = read(gold), read(answer)
        if not alike(wanted, given):
            return False
        # 7 = 5 is not 5, although 5 is what stands behind the last sign.
        if isinstance(given[0], Basic) and not is_true(given[0]):
            return False
        return all(is_near(wanted, read(each)) for each in approximations)

    return {"is_right": is_right}


if __name__ == "__main__":
    serve(load)
