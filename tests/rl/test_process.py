"""Process rewards: which token ends a step, the loss of labels, and what steps add to the advantages."""
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1zero.model.packed import pack
from r1zero.model.tokenizer import Tokenizer
from r1zero.rl.advantages import Credit
from r1zero.rl.family import resolve
from r1zero.rl.process import (
    ProcessReward,
    Steps,
    auc,
    first_error,
    first_errors,
    step_advantages,
    step_loss,
    token_ends,
    weighted_steps,
)
from r1zero.rl.rewards import Grader, RewardConfig, StepRewards, check_parts
from r1zero.rl.rollouts import DynamicSampler

from .cases import Bandit, algorithm, rollouts_by_hand, tiny

BYTES = Tokenizer.bytes()
WORDS = Tokenizer.from_words(["<think>", "9", "-7", "=2", ",3", "+2", "=5", ";9", " no", "</think>"])


class TwoByTwo(Bandit):
    """Each two characters are a step."""

    @staticmethod
    def step_ends(response, is_whole=True):
        ends = [*range(2, len(response), 2)]
        return [*ends, len(response)] if is_whole and response else ends


# ---- which token ends a step ----

def test_a_step_ends_with_the_token_that_begins_the_next():
    text = "<think>9-7=2,3+2=5 no;9-7=2</think>"
    tokens = [*WORDS.encode(text), WORDS.eos_id]
    assert [WORDS.decode([t], keep_special=True) for t in tokens[:-1]] == [
        "<think>", "9", "-7", "=2", ",3", "+2", "=5", " no", ";9", "-7", "=2", "</think>"]
    ends = [text.index(","), text.index(";"), text.index("</think>"), len(text)]
    assert token_ends(WORDS, tokens, ends) == dict(zip([4, 8, 11, 12], ends, strict=True))
    # Cut off: no end token, so the last step has no end; nor has one whose mark was not sampled.
    assert [*token_ends(WORDS, tokens[:-1], ends)] == [4, 8, 11]
    assert [*token_ends(WORDS, tokens[:4], ends)] == []


def test_the_ids_are_kept_as_they_were_sampled_and_not_encoded_again():
    text = "<think>9"
    whole, spelled = WORDS.encode(text), [*BYTES.encode(text)]
    by_bytes = [WORDS.encode(letter)[0] for letter in text]
    assert len(whole) == 2 and len(by_bytes) == len(spelled) == 8
    assert token_ends(WORDS, [*by_bytes, *by_bytes], [7, 9]) == {7: 7, 9: 9}


def naive_ends(tokenizer, tokens, ends) -> dict:
    """The first token with which the decoded prefix is longer than the step."""
    found = {}
    for end in ends:
        for i in range(len(tokens)):
            if len(tokenizer.decode(tokens[: i + 1], keep_special=True)) > end:
                found[i] = end
                break
    return found


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS])
def test_it_is_what_decoding_every_prefix_says(tokenizer):
    rng = np.random.default_rng(0)
    for text in ["ab,cd;e", "日本,語é;\U0001f600x", "a\n\x00,b"]:
        tokens = [*tokenizer.encode(text), tokenizer.eos_id, *tokenizer.encode("x,y")]
        written = tokenizer.decode(tokens, keep_special=True)
        for _ in range(20):
            ends = sorted({int(end) for end in rng.integers(1, len(written), 4)})
            assert token_ends(tokenizer, tokens, ends) == naive_ends(tokenizer, tokens, ends)


# ---- a head ----

def stirred(head):
    with torch.no_grad():
        head.value.normal_(generator=torch.Generator().manual_seed(0))
    return head


ANSWERS = [
    Steps(np.array([5, 6, 7, 8, 257]), np.array([1, 3, 4]), np.array([1.0, 0.25, np.nan]), {}),
    Steps(np.array([1, 2, 3]), np.array([2]), np.array([0.0]), {}),
    Steps(np.array([9, 9]), np.array([1]), np.array([np.nan]), {}),
]


def test_the_loss_is_the_cross_entropy_at_the_step_ends_with_labels_as_they_are():
    model = stirred(ProcessReward(tiny()))
    expected = 0.0
    for answer in ANSWERS:
        for end, label in zip(answer.ends, answer.labels, strict=True):
            if not math.isnan(label):
                hidden = model.trunk.hidden_states(pack([answer.tokens[: end + 1]]))[-1]
                p = 1 / (1 + math.exp(-float(hidden.detach() @ model.value.detach())))
                expected -= label * math.log(p) + (1 - label) * math.log(1 - p)
    loss, agreed = step_loss(model, ANSWERS)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
    assert len(agreed) == 3  # the steps that have a label


def test_a_label_is_no_truth_value():
    """A share of 0.25 pulls the score to 0.25, and a step without a label pulls at nothing."""
    model = ProcessReward(tiny())  # scores of a half
    for label, pull in ((0.25, 0.25), (0.0, 0.5), (1.0, -0.5), (0.5, 0.0)):
        answer = Steps(np.array([5, 6, 7]), np.array([1, 2]), np.array([label, np.nan]), {})
        model.zero_grad()
        step_loss(model, [answer])[0].backward()
        with torch.no_grad():
            hidden = model.trunk.hidden_states(pack([answer.tokens]))[1]
        assert model.value.grad.tolist() == pytest.approx((pull * hidden).tolist(), abs=1e-5)


def test_scores_do_not_depend_on_the_batch_and_stand_at_the_tokens_of_all_answers():
    model, rollouts = stirred(ProcessReward(tiny(seed=3))), rollouts_by_hand(tiny())
    task = TwoByTwo()
    whole = model.score_steps(task, rollouts, BYTES, 1000)
    for tokens_per_batch in (1, 17):
        found = model.score_steps(task, rollouts, BYTES, tokens_per_batch)
        assert found.scores == pytest.approx(whole.scores, abs=1e-5)
        assert found.tokens.tolist() == whole.tokens.tolist() == sorted(whole.tokens)
    last = (rollouts.response_offsets[1:] - 1).tolist()
    assert rollouts.texts[3] == ""
    empty = last.pop(3)  # an answer of nothing but the end token has no step
    assert empty not in whole.tokens and set(last) <= set(whole.tokens)
    assert 0 < whole.scores.min() < whole.scores.max() < 1
    for n, end in zip((0, 1, 2, 4, 5), last, strict=True):
        hidden = model.trunk.hidden_states(pack([rollouts.sequences[n]]))[-1]
        value = float(hidden.detach() @ model.value.detach())
        found = whole.scores[list(whole.tokens).index(end)]
        assert found == pytest.approx(1 / (1 + math.exp(-value)), abs=1e-5)
    # Of an answer that was cut off, what follows the last mark has no end, so no score.
    cut = dataclasses.replace(rollouts, finish_reasons=["length"] * 6)
    assert not set(last) & set(model.score_steps(task, cut, BYTES, 1000).tokens)


# ---- what steps add to the advantages ----

def naive_advantages(scores, tokens, response_offsets, group_offsets) -> np.ndarray:
    found = np.zeros(response_offsets[-1])
    for g in range(len(group_offsets) - 1):
        first, last = response_offsets[group_offsets[g]], response_offsets[group_offsets[g + 1]]
        group = [s for s, t in zip(scores, tokens, strict=True) if first <= t < last]
        if not group or max(group) - min(group) < 1e-9:
            continue
        mean = sum(group) / len(group)
        std = math.sqrt(sum((s - mean) ** 2 for s in group) / len(group))
        for n in range(group_offsets[g], group_offsets[g + 1]):
            for t in range(response_offsets[n], response_offsets[n + 1]):
                found[t] = sum((s - mean) / std for s, end in zip(scores, tokens, strict=True)
                               if t <= end < response_offsets[n + 1])
    return found


def test_a_token_has_the_sum_of_the_normalised_scores_of_the_steps_that_end_there_or_later():
    response_offsets = np.array([0, 4, 4, 9, 10, 13, 15])  # the second answer has no token
    group_offsets = np.array([0, 3, 4, 6])
    tokens = np.array([1, 3, 6, 8, 9, 11, 14])
    scores = np.array([0.9, 0.2, 0.7, 0.7, 0.4, 0.6, 0.6])  # the last two groups are all alike
    found = step_advantages(StepRewards(scores, tokens), response_offsets, group_offsets)
    expected = naive_advantages(scores, tokens, response_offsets, group_offsets)
    assert found == pytest.approx(expected, abs=1e-12) and (found[9:] == 0).all()
    assert found[0] == found[1] != found[2] == found[3] and (found[:9] != 0).all()
    rng = np.random.default_rng(1)
    scores = rng.random(7)
    found = step_advantages(StepRewards(scores, tokens), response_offsets, group_offsets)
    assert found == pytest.approx(naive_advantages(scores, tokens, response_offsets, group_offsets), abs=1e-9)
    none = StepRewards(np.zeros(0), np.zeros(0, np.int64))
    assert step_advantages(none, response_offsets, group_offsets).tolist() == [0.0] * 15


def test_they_are_added_to_those_of_the_answers_times_their_weight():
    rollouts, config = rollouts_by_hand(tiny()), algorithm()
    steps = StepRewards(np.array([0.1, 0.9, 0.5]), np.array([4, 7, 12]))
    rewards = dataclasses.replace(Grader(config)(Bandit(), rollouts), steps=steps)
    alone = Credit(config.advantage)(rewards, rollouts).per_token
    found = Credit(config.advantage, step_credit=lambda *both: weighted_steps(*both, weight=0.5))(
        rewards, rollouts)
    more = step_advantages(steps, rollouts.response_offsets, rollouts.group_offsets)
    assert found.per_token == pytest.approx(alone + 0.5 * more) and (more != 0).any()
    assert found.metrics == {"reward_process": pytest.approx(0.5), "steps_per_answer": 0.5}


def test_the_control_deals_the_scores_out_within_their_group_or_tosses_coins():
    rollouts = rollouts_by_hand(tiny(), lengths=(8,) * 6)
    tokens = np.arange(1, 48, 2)
    scores = np.arange(24) / 24
    real = StepRewards(scores, tokens)

    def dealt(control, seed=0):
        config = algorithm(control=control, seed=seed, rewards=dict(process="x"))
        grader = Grader(config, score_steps=lambda task, rollouts: real)
        return grader(Bandit(), rollouts).steps

    assert dealt("none") is real
    found = dealt("permute")
    assert found.tokens is tokens and found.scores.tolist() != scores.tolist()
    for start, end in ((0, 8), (8, 20), (20, 24)):  # groups of 2, 3 and 1 answers, 4 steps each
        assert sorted(found.scores[start:end]) == scores[start:end].tolist()
    assert dealt("permute").scores.tolist() == found.scores.tolist() != dealt("permute", 1).scores.tolist()
    assert set(dealt("random").scores) == {0.0, 1.0}


def test_a_group_whose_steps_differ_is_not_dead_and_dynamic_sampling_keeps_it():
    rollouts = rollouts_by_hand(tiny(), lengths=(8,) * 6)  # groups of 2, 3 and 1 answers, all alike
    tokens = np.array([3, 7, 11, 15, 19, 27, 47])  # the first has 4 steps, the second 2, the last 1
    rewards = dict(accuracy_weight=0.0, format_weight=0.0, process="x")
    for differs, live in ((1, [0]), (5, [1]), (6, [])):
        scores = np.where(np.arange(7) == differs, 0.9, 0.4)
        grader = Grader(algorithm(rewards=rewards), score_steps=lambda *_: StepRewards(scores, tokens))  # noqa: B023
        dead = grader(Bandit(), rollouts).dead(rollouts)
        assert np.flatnonzero(~dead).tolist() == live
        assert DynamicSampler(SimpleNamespace(), grader).live_groups(Bandit(), rollouts).tolist() == live
        offsets = rollouts.response_offsets
        moved = step_advantages(StepRewards(scores, tokens), offsets, rollouts.group_offsets)
        has_moved = [moved[offsets[a]:offsets[b]].any() for a, b in ((0, 2), (2, 5), (5, 6))]
        assert has_moved == [g in live for g in range(3)]


def test_what_does_not_go_together_is_refused():
    for algo, told in (("ppo", "--advantage.baseline critic: steps"), ("gspo", "gspo with --rewards.process"),
                       ("reinforce_pp", "--advantage.baseline none"),
                       ("distill", "--advantage.baseline teacher: steps")):
        with pytest.raises(ValueError, match=told):
            resolve(algo, {"rewards": {"process": "x"}})
    with pytest.raises(ValueError, match="the task bandit does not say where the steps"):
        check_parts(Bandit(), RewardConfig(process="x"))
    check_parts(TwoByTwo(), RewardConfig(process="x"))
    RewardConfig(accuracy_weight=0, format_weight=0, process="x")
    with pytest.raises(ValueError, match="process -1"):
        RewardConfig(process="x", process_weight=-1)
    with pytest.raises(ValueError, match="one above 0"):
        RewardConfig(accuracy_weight=0, format_weight=0)


# ---- how good a head is ----

def test_the_auc_counts_the_pairs_in_order_and_ties_half():
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores, positive = rng.integers(0, 6, 40) / 5, rng.random(40) < 0.4
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
        assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert auc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0
    assert math.isnan(auc(np.array([0.1, 0.9]), np.array([True, True])))


def test_first_errors_are_found_and_the_others_spared():
    assert [first_error(np.array(good, bool)) for good in ([1, 1], [1, 0, 0], [0], [])] == [-1, 1, 0, -1]
    result = first_errors(named=[0, 2, 1, -1, -1, 3, -1], real=[0, 1, 1, 2, -1, -1, -1])
    assert (result.found, result.spared) == (0.5, pytest.approx(2 / 3))
    assert result.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert first_errors([1], [0])._replace(spared=0.0).f1 == 0.0
