"""One value head, read at three places, and a reward model's centre, floor and batches."""
import dataclasses
import math

import numpy as np
import pytest
import torch

from r1zero.model.packed import pack
from r1zero.rl.heads import RewardModel, ValueHead
from r1zero.rl.rollouts import micro_batch

from .cases import rollouts_by_hand, tiny


def stirred(head):
    """The head with a value vector that is not 0."""
    with torch.no_grad():
        head.value.normal_(generator=torch.Generator().manual_seed(0))
    return head


def value_of(head, tokens) -> float:
    """The oracle: the value at the last of these tokens, from this one sequence alone."""
    hidden = head.trunk.hidden_states(pack([tokens]))
    return float((hidden[-1] @ head.value).detach())


SEQUENCES = [np.array(tokens) for tokens in ([5, 6, 7, 257], [9, 257], [1, 2, 3, 4, 5, 257])]


def test_a_head_begins_at_0():
    assert RewardModel(tiny()).scores(SEQUENCES, 100).tolist() == [0, 0, 0]


def test_the_three_readings_are_values_of_the_text_before_each_token_to_its_end_and_to_the_end_of_a_step():
    head, rollouts = stirred(ValueHead(tiny(seed=2))), rollouts_by_hand(tiny())
    batch = micro_batch(rollouts, np.arange(6), "cpu")
    before = head(batch)
    for i, n in enumerate(batch.samples):
        for t in range(rollouts.response_lengths[n]):
            prefix = rollouts.sequences[n][: rollouts.prompt_lengths[n] + t]
            found = float(before[int(batch.response_offsets[i]) + t].detach())
            assert found == pytest.approx(value_of(head, prefix), abs=1e-4)
    packed = pack(SEQUENCES)
    assert head.at_ends(packed).tolist() == pytest.approx([value_of(head, s) for s in SEQUENCES], abs=1e-4)
    # Steps of the last sequence that end with its tokens 2 and 4, and one of the first.
    rows = torch.tensor([1, 6 + 1, 6 + 3])
    expected = [value_of(head, tokens) for tokens in ([5, 6], [1, 2], [1, 2, 3, 4])]
    assert head.at(packed, rows).tolist() == pytest.approx(expected, abs=1e-4)


def test_scores_do_not_depend_on_the_batch_and_are_equal_to_the_last_bit_for_equal_answers():
    model = stirred(RewardModel(tiny()))
    repeated = [*SEQUENCES, SEQUENCES[0].astype(np.int32), SEQUENCES[2]]
    expected = [value_of(model, tokens) for tokens in repeated]
    for tokens_per_batch in (1, 7, 1000):
        found = model.scores(repeated, tokens_per_batch)
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
        assert found[3] == found[0] and found[4] == found[2]
    assert model.scores([], 10).shape == (0,)


def test_centred_scores_have_a_mean_of_0_on_the_training_answers_and_the_lowest_is_the_floor():
    model = stirred(RewardModel(tiny()))
    before = model.scores(SEQUENCES, 100)
    assert not model.is_centred and math.isnan(float(model.floor))
    model.centre_on(SEQUENCES, 100)
    model.centre_on(SEQUENCES, 100)  # once more changes nothing
    found = model.scores(SEQUENCES, 100)
    assert found.mean() == pytest.approx(0, abs=1e-5) and model.is_centred
    assert np.diff(found) == pytest.approx(np.diff(before), abs=1e-5)
    assert float(model.floor) == pytest.approx(found.min(), abs=1e-5)


def test_an_answer_that_was_cut_off_has_no_end_token_and_gets_the_floor():
    model = stirred(RewardModel(tiny(seed=3)))
    rollouts = rollouts_by_hand(tiny())
    model.centre_on(rollouts.sequences[:4], 100)
    reasons = ["stop", "length", "stop", "stop", "length", "stop"]
    rollouts = dataclasses.replace(rollouts, finish_reasons=reasons)
    found = model.score_rollouts(rollouts, np.array([0, 1, 4, 5]), 50)
    whole = model.scores(rollouts.sequences, 50)
    assert found[[0, 3]] == pytest.approx(whole[[0, 5]], abs=1e-5)
    assert found[1] == found[2] == float(model.floor) == pytest.approx(whole[:4].min(), abs=1e-5)
