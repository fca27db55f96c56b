"""Which of a problem's sampled answers are kept as data, in which order, and why not the others.

    FILTERS          named predicates; an answer is dropped by the first that it fails
    Selection        of the answers that pass, at most k per problem, each text once
    RankedSelection  all answers of a problem from best to worst, to train a reward model on

Without a limit per problem easy problems dominate the data: they have the most right answers. The
limit and the preference for short answers are those of DeepSeek-R1's rejection sampling (arXiv
2501.12948, appendix B.3.3) and of Sky-T1-Flash (shortest right answer).

Left out: filters that compare answers of different problems, but for texts that are the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from .answers import Answer

KEEP = ("right", "formed", "finished", "all")
PREFER = ("first", "shortest")


@dataclass(frozen=True, kw_only=True)
class SelectionFlags:
    """Which answers are kept."""

    keep: tuple[str, ...] = ("right", "formed")
    """What an answer must be to be kept: right, formed (a think and an answer block, not cut off),
    finished (not cut off), or several of them; all keeps every answer that is not empty."""
    min_language: float = 0.0
    """Minimum share of words in the prompt's language, from 0 to 1, for tasks that tell languages
    apart."""
    min_tokens: int = 0
    """Minimum number of tokens of an answer that is kept."""
    max_tokens: int | None = None
    """Maximum number of tokens of an answer that is kept."""
    max_repetition: float = 1.0
    """Maximum share of an answer's 4-grams of tokens that it has written before, from 0 to 1."""
    min_reward: float | None = None
    """Minimum reward of an answer that is kept: the weighted sum of the parts that --rewards
    sets, a plug-in's among them."""
    per_problem: int | None = None
    """Maximum number of answers kept per problem."""
    prefer: str = "first"
    """Which answers are kept where a problem has more than --per-problem: the first or the
    shortest."""
    rank: bool = False
    """Write rankings instead: all answers of a problem that were not cut off, ranked by their
    reward. 4 to 9 samples per problem are usual. No filter goes with it."""
    label_steps: int | None = None
    """Write the answers with their steps instead, each labelled by the task's exact check, and by
    the share of right ones among this many completions sampled from its end; 0 samples none. With
    --keep all."""

    def __post_init__(self):
        unknown = [word for word in self.keep if word not in KEEP]
        if unknown or not self.keep:
            given = repr(unknown[0]) if unknown else "empty"
            raise ValueError(f"--keep is {given}, expected some of {', '.join(KEEP)}")
        if "all" in self.keep and len(self.keep) > 1:
            raise ValueError("--keep has all and something else; give either")
        if self.prefer not in PREFER:
            raise ValueError(f"--prefer is {self.prefer!r}, expected {' or '.join(PREFER)}")
        self._check_ranges()
        if self.rank:
            self._check_rank()
        if self.label_steps is not None and "right" in self.keep:
            raise ValueError(
                "--label-steps is for right and wrong answers, and --keep has right; give --keep "
                "all"
            )

    def _check_ranges(self) -> None:
        for name in ("min_language", "max_repetition"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {share}, expected a share from 0 to 1")
        for name, least in (
            ("min_tokens", 0),
            ("max_tokens", 1),
            ("per_problem", 1),
            ("label_steps", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {value}, expected {least} or more")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"--max-tokens is {self.max_tokens} and --min-tokens {self.min_tokens}, so no "
                "answer would be kept; raise the first or lower the second"
            )

    def _check_rank(self) -> None:
        """A ranking has all answers, so a filter beside it is a mistake."""
        for field in fields(SelectionFlags):
            if field.name != "rank" and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--rank writes all answers, and --{flag} keeps some; give either")


# ---- the filters ----


def says_something(answer: Answer, flags: SelectionFlags) -> bool:
    """Fine-tuning takes no empty response, so this one is always asked."""
    return bool(answer.sample.text.strip())


def is_right(answer: Answer, flags: SelectionFlags) -> bool:
    return "right" not in flags.keep or answer.right


def is_finished(answer: Answer, flags: SelectionFlags) -> bool:
    """Who is trained on an answer that was cut off learns to stop in its middle."""
    is_asked = "finished" in flags.keep or "formed" in flags.keep
    return not is_asked or not answer.sample.cut_off


def is_formed(answer: Answer, flags: SelectionFlags) -> bool:
    return "formed" not in flags.keep or answer.parts["format"] == 1.0


def is_in_language(answer: Answer, flags: SelectionFlags) -> bool:
    return flags.min_language == 0 or answer.language >= flags.min_language


def is_long_enough(answer: Answer, flags: SelectionFlags) -> bool:
    return answer.n_tokens >= flags.min_tokens


def is_short_enough(answer: Answer, flags: SelectionFlags) -> bool:
    return flags.max_tokens is None or answer.n_tokens <= flags.max_tokens


def repeats_little(answer: Answer, flags: SelectionFlags) -> bool:
    return flags.max_repetition == 1 or answer.repetition <= flags.max_repetition


def earns_enough(answer: Answer, flags: SelectionFlags) -> bool:
    return flags.min_reward is None or answer.reward >= flags.min_reward


# Why an answer is dropped -> the predicate that it fails. They are asked in this order.
FILTERS: dict[str, Callable[[Answer, SelectionFlags], bool]] = {
    "empty": says_something,
    "wrong": is_right,
    "cut off": is_finished,
    "not well formed": is_formed,
    "in another language": is_in_language,
    "too short": is_long_enough,
    "too long": is_short_enough,
    "repeats itself": repeats_little,
    "reward too low": earns_enough,
}
SAID_BEFORE, OVER_LIMIT, NO_RANKING = "said before", "over --per-problem", "nothing to rank"
REASONS = (*FILTERS, SAID_BEFORE, OVER_LIMIT, NO_RANKING)


# ---- the choice among a problem's answers ----


class Selection:
    """At most k answers per problem, each text once."""

    def __init__(self, flags: SelectionFlags):
        self.flags = flags
        self.dropped: Counter[str] = Counter()
        """How many answers were dropped, by the reason."""
        # By the prompt, because a file may hold a problem twice.
        self._taken: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()

    def choose(self, prompt: str, answers: Sequence[Answer]) -> list[Answer]:
        """The answers that are kept, the preferred ones first."""
        # 1. Those that pass all filters.
        passed = [answer for answer in answers if self._passes(answer)]
        # 2. The preferred ones first; sorting keeps the order of equal ones.
        if self.flags.prefer == "shortest":
            passed.sort(key=lambda answer: answer.n_tokens)
        # 3. Each text once, and no more than the limit.
        return [answer for answer in passed if self._takes(prompt, answer)]

    def _passes(self, answer: Answer) -> bool:
        for reason, passes in FILTERS.items():
            if not passes(answer, self.flags):
                self.dropped[reason] += 1
                return False
        return True

    def _takes(self, prompt: str, answer: Answer) -> bool:
        text = prompt, answer.sample.text
        if text in self._seen:
            self.dropped[SAID_BEFORE] += 1
            return False
        if self._taken[prompt] == self.flags.per_problem:
            self.dropped[OVER_LIMIT] += 1
            return False
        self._seen.add(text)
        self._taken[prompt] += 1
        return True


class RankedSelection:
    """All answers of a problem, the best first: at least two, not all equally good.

    An answer that was cut off has no end, where a reward model reads its score, so it has no rank.
    """

    def __init__(self):
        self.dropped: Counter[str] = Counter()

    def choose(self, prompt: str, answers: Sequence[Answer]) -> list[Answer]:
        """The answers from best to worst; none if they cannot be ranked."""
        by_text: dict[str, Answer] = {}
        for answer in answers:
            if answer.sample.cut_off:
                self.dropped["cut off"] += 1
            elif not says_something(answer, None):
                self.dropped["empty"] += 1
            elif answer.sample.text in by_text:
                self.dropped[SAID_BEFORE] += 1
            else:
                by_text[answer.sample.text] = answer
        if len({answer.reward for answer in by_text.values()}) < 2:
            self.dropped[NO_RANKING] += len(by_text)
            return []
        return sorted(by_text.values(), key=lambda answer: -answer.reward)


def ranks_of(rewards: Sequence[float]) -> list[int]:
    """The rank of each: 1 for the largest, 2 for the next smaller, equal ones alike."""
    levels = sorted(set(rewards), reverse=True)
    return [levels.index(reward) + 1 for reward in rewards]
