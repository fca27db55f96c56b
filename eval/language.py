"""How much of a text is in the language that was asked for: R1's language consistency.

    consistency = words of the target language / all words    (DeepSeek-R1, arXiv 2501.12948, eq. 7)

A word is told by its script, without a model: language detectors are noise on thoughts full of
digits and code. Digits, operators and single letters (`x`) are no words, and neither are LaTeX
commands (`\\frac`). A run of two or more letters is one word. Scripts without spaces (Chinese,
Japanese kana, Thai) have a word per character.

A text without words is consistent: 1. Otherwise the reward would punish thinking in numbers.

Left out: two languages of one script. English and French count as the same, and so do Chinese and
Japanese, which writes Chinese characters between its own.
"""

import re
import unicodedata
from collections import Counter
from functools import lru_cache

LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
LETTERS = re.compile(r"[^\W\d_]+")
# Scripts that write no spaces between words, by the first word of a character's Unicode name.
WITHOUT_SPACES = {"CJK", "THAI", "LAO", "KHMER", "MYANMAR"}
# A text in Japanese has all three.
SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


@lru_cache(maxsize=4096)
def script_of(letter: str) -> str:
    """The script of a letter, such as LATIN, CYRILLIC or CJK: the first word of its name."""
    script = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
    return SAME_SCRIPT.get(script, script)


def words_by_script(text: str) -> Counter:
    """The number of words of each script in a text."""
    counts = Counter()
    for run in LETTERS.findall(LATEX_COMMAND.sub(" ", text)):
        letters = Counter(map(script_of, run))
        for script, n_letters in letters.items():
            if script in WITHOUT_SPACES:
                counts[script] += n_letters
            elif n_letters > 1:
                counts[script] += 1
    return counts


def main_script(text: str) -> str | None:
    """The script of most words of a text; None for a text without words."""
    counts = words_by_script(text)
    return max(counts, key=counts.get) if counts else None


def share_of_words(counts: Counter, target: str) -> float:
    """The share of the words that are of the target, from 0 to 1; 1 where there are no words."""
    total = counts.total()
    return counts[target] / total if total else 1.0


def consistency(prompt: str, thoughts: str) -> float:
    """The share of the words of the thoughts that are in the script of the prompt, from 0 to 1.

    1 if either of them has no words.
    """
    target = main_script(prompt)
    if target is None:
        return 1.0
    return share_of_words(words_by_script(thoughts), target)
