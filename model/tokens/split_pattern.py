r"""The pre-tokenizer of a tokenizer.json as one pattern for tiktoken.

A byte-level BPE splits its text in stages: each stage splits the pieces of the one before, and the
last writes bytes as letters. tiktoken has one pattern. A single stage is taken over as it is. In
a sequence, all stages but the last must match runs of a class C, as in `\p{N}{1,3}`; the stages
after it then see pieces without C, and to them a character of C is the end of the text:

    [X]  becomes  [X&&[^C]]        [^X]  becomes  [^XC]        (?!\S)  becomes  (?![\S&&[^C]])

The runs and the rewritten stage are alternatives of one pattern. tiktoken drops what no alternative
matches, where a stage keeps it as a piece of its own; so a last alternative takes the rest.

Left out: stages that cannot be written so. They raise `Inexpressible`, which names them.
"""

import re

# The split of GPT-2 (openai/gpt-2, src/encoder.py): English endings, then letters, digits or other
# signs with at most one space in front. A longer run of white space leaves its last character to
# the word after it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ANY_CHARACTER = r"[\s\S]"

# A longer run of characters that no stage matches is cut; the regex engine's stack has an end.
LONGEST_REST = 1_000

CLASS = r"\[(?:\\.|[^\]\\])*\]"  # [...]; a bracket in it is escaped
PROPERTY = r"\\[pP]\{\w+\}"
RUN_OF_A_CLASS = re.compile(rf"({PROPERTY}|{CLASS})(?:\+|\{{\d+(?:,\d+)?\}})?")
# The parts of a pattern that match one character of a set, and those that look at text's ends.
PART = re.compile(
    rf"(?P<set>{CLASS}|{PROPERTY}|\\[sSdDwW]|(?<!\\)\.)|(?P<end>\\[bBAzZG])|\\.|[^\\]"
)


class Inexpressible(ValueError):
    """A tokenizer that tiktoken cannot imitate; the message names the reason."""


def stages(pre_tokenizer: dict | None) -> list[dict]:
    """The stages of a pre-tokenizer, sequences opened."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [stage for part in pre_tokenizer["pretokenizers"] for stage in stages(part)]


def _stage_pattern(stage: dict) -> str:
    """The pattern of a stage before the last."""
    kind = stage["type"]
    if kind == "Digits":
        return r"\p{N}" if stage["individual_digits"] else r"\p{N}+"
    if kind != "Split":
        raise Inexpressible(f"its pre-tokenizer has the stage {kind}")

    # "Removed" with invert keeps the matches. It loses what lies between, if anything does.
    behavior = (stage["behavior"], stage["invert"])
    if behavior[0] != "Isolated" and behavior != ("Removed", True):
        raise Inexpressible(f"its Split has the behavior {behavior[0]}, invert {behavior[1]}")
    [(form, pattern)] = stage["pattern"].items()
    return re.escape(pattern) if form == "String" else pattern


def _without(pattern: str, excluded: str) -> str:
    """A pattern for which the characters of a class are the end of the text.

    excluded: the inside of the class, as `\\p{N}`; empty changes nothing.
    """
    if not excluded:
        return pattern
    parts = []
    for found in PART.finditer(pattern):
        part = found.group()
        if found["end"] or part in "^$":
            raise Inexpressible(f"its pre-tokenizer has {part!r} behind another stage")
        if found["set"] and part.startswith("[^"):
            part = part[:-1] + excluded + "]"
        elif found["set"]:
            inside = part[1:-1] if part.startswith("[") else part
            part = f"[{inside}&&[^{excluded}]]"
        parts.append(part)
    return "".join(parts)


def split_pattern(pre_tokenizer: dict | None) -> str:
    """One pattern whose pieces are those of the pre-tokenizer, and which matches every character.

    pre_tokenizer: as in tokenizer.json. Raises `Inexpressible` if there is no such pattern.
    """
    *before, last = stages(pre_tokenizer) or [{"type": "none"}]
    if last["type"] != "ByteLevel":
        raise Inexpressible(f"its pre-tokenizer ends with {last['type']}, expected ByteLevel")
    if last.get("add_prefix_space"):
        raise Inexpressible("its pre-tokenizer puts a space before the text (add_prefix_space)")
    patterns = [_stage_pattern(stage) for stage in before]
    if last.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    if not patterns:
        return rf"{ANY_CHARACTER}+"

    # 1. The stages before the last, each on what those before it have left.
    excluded, alternatives = "", []
    for pattern in patterns[:-1]:
        if (run := RUN_OF_A_CLASS.fullmatch(pattern)) is None or run[1].startswith("[^"):
            raise Inexpressible(f"its pre-tokenizer has, before the last, the split {pattern[:60]}")
        alternatives.append(_without(pattern, excluded))
        excluded += run[1].removeprefix("[").removesuffix("]")

    # 2. The last one, and everything that it leaves.
    alternatives.append(_without(patterns[-1], excluded))
    matched = "|".join(alternatives)
    if matched.endswith(f"|{ANY_CHARACTER}"):
        return matched
    return rf"{matched}|(?:(?!{matched}){ANY_CHARACTER}){{1,{LONGEST_REST}}}"
