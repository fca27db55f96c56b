"""Patterns for answers: they say what Python's `re.fullmatch` says, and no pattern takes long."""

import random
import re
import time
import warnings

import pytest

from r1zero.eval.tasks.patterns import MAX_PATTERN, MAX_TEXT, compile_pattern, full_match

PIECES = [
    "a",
    "b",
    "A",
    ".",
    "[ab]",
    "[^a]",
    "[]a]",
    "[a-c]",
    "\\d",
    "\\w",
    "\\.",
    "\\n",
    "(",
    "(?:",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{1,2}",
    "{,2}",
    "{1,}",
    "*?",
    "??",
    "++",
    "{1,}+",
    "^",
    "$",
    "\\\\",
    "\\$",
    "1",
    "{",
    "}",
    "a{",
    ",",
    "]",
    "-",
    "(?i)",
    "(?=",
    "(?P<x>",
    "\\1",
    "\\b",
]


def test_a_pattern_that_is_taken_means_what_it_means_to_python():
    rng, n_taken, n_matches = random.Random(0), 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6000):
            pattern = "".join(rng.choices(PIECES, k=rng.randint(1, 7)))
            try:
                compile_pattern(pattern)
            except ValueError:
                continue
            n_taken += 1
            for _ in range(4):
                text = "".join(rng.choices("aabcA1.\n{}$\\-٣", k=rng.randint(0, 4)))
                expected = re.compile(pattern).fullmatch(text) is not None
                assert full_match(pattern, text) == expected, (pattern, text)
                n_matches += expected
    assert n_taken > 800 and n_matches > 200


@pytest.mark.parametrize(
    "pattern, right, wrong",
    [
        ("[Pp]aris|the capital", ["Paris", "paris", "the capital"], ["Paris!", "xParis", "the Paris", ""]),
        ("^(yes|no)$", ["yes", "no"], ["yesno", "yes\n"]),
        ("(?i)yes", ["YES", "yEs"], ["yess"]),
        ("[0-9]{2,3}(,[0-9]+)?", ["12", "123,4"], ["1", "1234", "12,"]),
        (r"a\$", ["a$"], ["a"]),
        ("", [""], ["a"]),
        (r"\\$", ["\\"], ["\\$"]),
        ("a{0}", [""], ["a"]),
        ("(a|)*b", ["b", "aab"], ["a"]),
    ],
)
def test_a_pattern_matches_the_whole_text(pattern, right, wrong):
    assert all(full_match(pattern, text) for text in right)
    assert not any(full_match(pattern, text) for text in wrong)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)*b",
        "(a|a)*b",
        "(a|aa)+b",
        "a*a*a*a*a*a*b",
        "((a*)*)*b",
        "(.*)(.*)(.*)(.*)x",
        "(a?){60}a{60}",
        "(|a)*b",
        "((a{0,5}){0,5}){0,5}b",
    ],
)
def test_patterns_that_keep_python_busy_for_ever_are_quick(pattern):
    started = time.perf_counter()
    assert not full_match(pattern, "a" * (MAX_TEXT - 1) + "c")
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "pattern, why",
    [
        ("(a", "missing \\), unterminated"),
        ("*a", "nothing to repeat"),
        ("[a", "unterminated character set"),
        ("a" * (MAX_PATTERN + 1), "at most 500"),
        ("(a{20}){26}", "larger than 500 steps"),
        ("a{99999999999}", "too large"),
        (r"(a)\1", "is not taken here"),
        ("(?=a)a", "is not taken"),
        ("(?<!b)a", "is not taken"),
        (r"\ba", "is not taken"),
        ("a^b", "is not taken"),
        ("a++", "is not taken"),
        ("(?P<n>a)", "is not taken"),
        ("(?s).", "is not taken"),
        ("(" * 240 + ")" * 240, "more than 50 groups within"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_reason(pattern, why):
    with pytest.raises(ValueError, match=why) as error:
        compile_pattern(pattern)
    assert "\n" not in str(error.value)


def test_an_answer_that_is_too_long_does_not_match():
    assert full_match("a*", "a" * MAX_TEXT) and not full_match("a*", "a" * (MAX_TEXT + 1))
