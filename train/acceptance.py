"""How many of the sampled answers were kept, by the difficulty of their problem, and what it cost.

The difficulty of a problem is the share of its own answers that are right. A collection whose kept
answers come from the easy bins alone teaches little: `--per-problem` and more `--samples` help.
"""

from collections import Counter
from collections.abc import Sequence

from .answers import Answer
from .selection import REASONS, RankedSelection, Selection

# Problems by the share of their answers that are right.
BINS = ("0", "(0, 1/4]", "(1/4, 1/2]", "(1/2, 3/4]", "(3/4, 1)", "1")


def bin_of(n_right: int, n: int) -> int:
    """Which of BINS a problem belongs to, that n_right of n answers solve."""
    if n_right == n:
        return len(BINS) - 1
    return -(-4 * n_right // n)  # rounded up


class Tally:
    """A selection, and the counts of what it was given and what it kept."""

    def __init__(self, selection: Selection | RankedSelection):
        self.selection = selection
        self.problems: Counter[int] = Counter()
        """How many there are in each bin, by its index; the others count likewise."""
        self.sampled: Counter[int] = Counter()
        self.right: Counter[int] = Counter()
        self.kept: Counter[int] = Counter()
        self.covered: Counter[int] = Counter()
        """Problems of which an answer was kept."""
        self.n_tokens = 0
        """Tokens sampled."""
        self.kept_tokens = 0
        self.kept_cut_off = 0
        """Kept answers that ended at the limit of tokens."""
        self.seconds = 0.0
        """What sampling took."""

    def choose(self, prompt: str, answers: Sequence[Answer], seconds: float) -> list[Answer]:
        """The answers to a problem that are kept. seconds: what sampling them took."""
        kept = self.selection.choose(prompt, answers)
        n_right = sum(answer.right for answer in answers)
        which = bin_of(n_right, len(answers))
        self.problems[which] += 1
        self.sampled[which] += len(answers)
        self.right[which] += n_right
        self.kept[which] += len(kept)
        self.covered[which] += bool(kept)
        self.n_tokens += sum(answer.n_tokens for answer in answers)
        self.kept_tokens += sum(answer.n_tokens for answer in kept)
        self.kept_cut_off += sum(answer.sample.cut_off for answer in kept)
        self.seconds += seconds
        return kept

    def to_dict(self) -> dict:
        """The counts as JSON types."""
        dropped = self.selection.dropped
        counts = {
            "problems": self.problems,
            "sampled": self.sampled,
            "right": self.right,
            "kept": self.kept,
            "problems_kept": self.covered,
        }
        return {
            **{name: counter.total() for name, counter in counts.items()},
            "dropped": {reason: dropped[reason] for reason in REASONS if dropped[reason]},
            "by_difficulty": [
                {"share_right": BINS[i], **{name: counter[i] for name, counter in counts.items()}}
                for i in range(len(BINS))
            ],
            "tokens": self.n_tokens,
            "kept_tokens": self.kept_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.n_tokens / max(self.seconds, 1e-9),
        }

    def table(self) -> str:
        """Some lines for people."""
        dropped = self.selection.dropped
        n, n_kept = self.sampled.total(), self.kept.total()
        covered, problems = self.covered.total(), self.problems.total()
        # 1. From all answers to those that are kept.
        lines = [line("sampled", n, self.right.total() / n, "of them right")]
        lines += [
            line(f"- {reason}", dropped[reason], dropped[reason] / n)
            for reason in REASONS
            if dropped[reason]
        ]
        where = f"from {covered:,} of {problems:,} problems"
        lines.append(line("= kept", n_kept, n_kept / n, where))
        if self.kept_cut_off:
            share = self.kept_cut_off / n_kept
            of_what = "of the kept; --keep finished drops them"
            lines.append(line("  cut off at the limit", self.kept_cut_off, share, of_what))

        # 2. The same by difficulty.
        lines.append(f"  {'share right':<22} problems  sampled     kept  of the sampled")
        for i in range(len(BINS)):
            counts = f"{self.problems[i]:>8,} {self.sampled[i]:>8,} {self.kept[i]:>8,}"
            share = f"{self.kept[i] / self.sampled[i]:>7.1%}" if self.sampled[i] else ""
            lines.append(f"  {BINS[i]:<22} {counts} {share}".rstrip())

        # 3. What it cost.
        speed = f"{self.n_tokens / max(self.seconds, 1e-9):,.0f} tokens per second"
        each = f", {self.n_tokens / n_kept:,.0f} per kept answer" if n_kept else ""
        lines.append(f"  {'tokens sampled':<22} {self.n_tokens:>8,}{each}")
        lines.append(f"  {'seconds':<22} {self.seconds:>8,.1f}, {speed}")
        return "\n".join(lines)


def line(name: str, count: int, share: float, of_what: str = "") -> str:
    """A line of the table."""
    return f"  {name:<22} {count:>8,} {share:>7.1%} {of_what}".rstrip()
