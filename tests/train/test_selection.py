"""Which answers are kept: each filter by hand, the limit per problem, rankings, and counts that add up."""
import pytest

from r1zero.eval.response import Sample
from r1zero.rl.rewards import RewardConfig
from r1zero.train.acceptance import BINS, Tally, bin_of
from r1zero.train.answers import Answer, Judge, repeated_share
from r1zero.train.selection import RankedSelection, Selection, SelectionFlags, ranks_of

from ..rl.cases import Bandit
from .run_cases import fails


def answer(number: int = 0, text: str | None = None, n_tokens: int = 5, right: bool = True,
           formed: bool = True, reason: str = "stop", **changes) -> Answer:
    sample = Sample(None, f"text {number}" if text is None else text, list(range(n_tokens)), reason)
    parts = {"accuracy": float(right), "format": float(formed)}
    return Answer(**{"number": number, "sample": sample, "parts": parts, "reward": right + 0.2 * formed,
                     "language": None} | changes)


def numbers(answers) -> list[int]:
    return [each.number for each in answers]


GOOD = dict(keep=("all",))
REPEATING = Sample(None, "abab", [1, 2, 3, 4, 1, 2, 3, 4], "stop")  # 5 4-grams, 4 of them different


@pytest.mark.parametrize(("flags", "bad", "reason"), [
    (GOOD, answer(1, text=" \n"), "empty"),
    ({}, answer(1, right=False), "wrong"),
    (dict(keep=("right",)), answer(1, right=False), "wrong"),
    (dict(keep=("finished",)), answer(1, reason="length"), "cut off"),
    ({}, answer(1, formed=False), "not well formed"),
    ({}, answer(1, formed=False, reason="length"), "cut off"),
    (dict(keep=("formed",)), answer(1, formed=False), "not well formed"),
    (GOOD | dict(min_language=0.5), answer(1, language=0.49), "in another language"),
    (GOOD | dict(min_tokens=5), answer(1, n_tokens=4), "too short"),
    (GOOD | dict(max_tokens=5), answer(1, n_tokens=6), "too long"),
    (GOOD | dict(max_repetition=0.2 - 1e-9), answer(1, sample=REPEATING), "repeats itself"),
    (GOOD | dict(min_reward=1.2), answer(1, reward=1.19), "reward too low"),
])
def test_each_filter_drops_what_fails_it_and_says_why(flags, bad, reason):
    good = answer(0, language=0.5)
    selection = Selection(SelectionFlags(**flags))
    assert numbers(selection.choose("p", [good, bad])) == [0]
    assert selection.dropped == {reason: 1}
    if reason != "empty":  # the same answer passes where nobody asks
        assert numbers(Selection(SelectionFlags(**GOOD)).choose("p", [good, bad])) == [0, 1]


@pytest.mark.parametrize(("flags", "edge"), [
    (dict(max_repetition=0.2), answer(sample=REPEATING)), (dict(min_tokens=5, max_tokens=5), answer()),
    (dict(min_reward=1.2), answer()), (dict(min_language=1.0), answer(language=1.0)),
    (dict(keep=("right",)), answer(formed=False, reason="length")),
    (dict(keep=("formed",)), answer(right=False)),
    (dict(keep=("finished",)), answer(right=False, formed=False)),
])
def test_what_is_just_good_enough_or_not_asked_for_is_kept(flags, edge):
    assert len(Selection(SelectionFlags(**GOOD | flags)).choose("p", [edge])) == 1


def test_at_most_k_per_problem_each_text_once_the_first_or_the_shortest():
    group = [answer(i, n_tokens=n) for i, n in enumerate((9, 4, 7, 4, 2))] + [answer(5, text="text 0")]
    first = Selection(SelectionFlags(per_problem=3))
    assert numbers(first.choose("p", group)) == [0, 1, 2]
    assert first.dropped == {"over --per-problem": 2, "said before": 1}
    shortest = Selection(SelectionFlags(per_problem=3, prefer="shortest"))
    assert numbers(shortest.choose("p", group)) == [4, 1, 3]
    # A problem that a file holds twice is one problem; another one has its own limit, and its own texts.
    assert numbers(first.choose("p", [answer(9, text="new")])) == []
    assert numbers(first.choose("q", group)) == [0, 1, 2]


@pytest.mark.parametrize(("tokens", "share"), [
    ([], 0), ([1, 1, 1], 0), ([1, 1, 1, 1], 0), ([1] * 5, 1 / 2), ([1] * 13, 9 / 10), (range(20), 0),
    ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
])
def test_repetition_is_the_share_of_4_grams_that_stand_before(tokens, share):
    assert repeated_share(tokens) == pytest.approx(share, abs=1e-12)


def test_a_ranking_has_the_best_first_and_leaves_out_what_has_no_end_no_text_or_is_a_repeat():
    group = [answer(0, reward=0.2), answer(1, reward=1.2), answer(2, reward=1.2), answer(3, reason="length"),
             answer(4, text=""), answer(5, text="text 1", reward=1.2), answer(6, reward=-1.0)]
    selection = RankedSelection()
    best_first = selection.choose("p", group)
    assert numbers(best_first) == [1, 2, 0, 6] and ranks_of([a.reward for a in best_first]) == [1, 1, 2, 3]
    assert selection.dropped == {"cut off": 1, "empty": 1, "said before": 1}
    assert selection.choose("p", [answer(0), answer(1)]) == []  # all alike
    assert selection.choose("p", [answer(0)]) == [] and selection.choose("p", []) == []
    assert selection.dropped["nothing to rank"] == 3


@pytest.mark.parametrize(("flags", "match"), [
    (dict(keep=("good",)), "--keep is 'good', expected some of right"), (dict(keep=()), "--keep is empty"),
    (dict(keep=("all", "right")), "--keep has all and"), (dict(prefer="longest"), "--prefer is 'longest'"),
    (dict(min_language=1.5), "--min-language is 1.5"),
    (dict(min_language=float("nan")), "--min-language is nan"),
    (dict(max_repetition=-0.1), "--max-repetition is -0.1"), (dict(min_tokens=-1), "--min-tokens is -1"),
    (dict(max_tokens=0), "--max-tokens is 0"),
    (dict(per_problem=0), "--per-problem is 0, expected 1 or more"),
    (dict(min_tokens=9, max_tokens=8), "no answer would be kept"),
    (dict(rank=True, keep=("right",)), "--keep keeps some"),
    (dict(rank=True, per_problem=2), "--per-problem keeps"),
])
def test_filters_that_make_no_sense_are_refused(flags, match):
    with fails(ValueError, match):
        SelectionFlags(**flags)


@pytest.mark.parametrize(("right", "n", "name"), [
    (0, 4, "0"), (1, 4, "(0, 1/4]"), (2, 4, "(1/4, 1/2]"), (3, 4, "(1/2, 3/4]"), (4, 4, "1"),
    (1, 8, "(0, 1/4]"), (3, 8, "(1/4, 1/2]"), (7, 8, "(3/4, 1)"), (1, 1, "1"), (0, 1, "0"),
    (1, 3, "(1/4, 1/2]"), (2, 3, "(1/2, 3/4]"),
])
def test_problems_are_binned_by_the_share_that_is_right(right, n, name):
    assert BINS[bin_of(right, n)] == name


def test_the_counts_add_up_in_all_and_by_difficulty():
    tally = Tally(Selection(SelectionFlags(per_problem=2)))
    tally.choose("easy", [answer(i) for i in range(4)], 0.5)
    tally.choose("hard", [answer(i, right=i == 3, n_tokens=10) for i in range(4)], 1.5)
    tally.choose("none", [answer(i, right=False) for i in range(4)], 2.0)
    found = tally.to_dict()
    assert found["dropped"] == {"wrong": 7, "over --per-problem": 2}
    assert found["sampled"] == found["kept"] + sum(found["dropped"].values()) == 12
    assert (found["problems"], found["problems_kept"], found["right"], found["kept"]) == (3, 2, 5, 3)
    assert (found["tokens"], found["kept_tokens"], found["seconds"]) == (80, 20, 4.0)
    rows = {row["share_right"]: row for row in found["by_difficulty"]}
    assert {name: (row["problems"], row["kept"]) for name, row in rows.items() if row["problems"]} == {
        "0": (1, 0), "(0, 1/4]": (1, 1), "1": (1, 2)}
    table = tally.table()
    assert "- wrong                       7   58.3%" in table and "from 2 of 3 problems" in table
    assert "27 per kept answer" in table and "20 tokens per second" in table
    assert "cut off" not in table
    tally = Tally(Selection(SelectionFlags(keep=("all",))))
    tally.choose("a", [answer(i, reason="length" if i else "stop") for i in range(4)], 0.5)
    assert "cut off at the limit        3   75.0% of the kept; --keep finished" in tally.table()


def test_the_reward_is_that_of_grpo_efficiency_among_the_problem_s_answers_too():
    config = RewardConfig(efficiency_weight=0.5, accuracy_weight=2.0)
    samples = [Sample(0, "right", [1] * n, "stop") for n in (2, 4, 6)]
    samples.append(Sample(0, "\u00e9", [1] * 8, "stop"))
    found = Judge(Bandit(), config)(samples)
    assert [each.parts["efficiency"] for each in found] == pytest.approx([0.5, 1 / 6, -1 / 6, -0.5])
    assert [each.reward for each in found] == pytest.approx([2.25, 2 + 1 / 12, 2 - 1 / 12, -0.25])
    assert [each.language for each in found] == [None] * 4 and found[3].right is False
