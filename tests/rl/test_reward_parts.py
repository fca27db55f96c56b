"""The parts of a reward beside accuracy and format, dead groups, and the control: by hand."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from r1zero.eval.response import Sample
from r1zero.eval.tasks.assistant import Assistant
from r1zero.eval.tasks.countdown import Countdown, CountdownProblem
from r1zero.rl.advantages import AdvantageConfig, Credit
from r1zero.rl.control import CONTROLS, random_rewards
from r1zero.rl.rewards import Grader, RewardConfig, check_parts, judge
from r1zero.rl.rollouts import DynamicSampler, Rollouts
from r1zero.rl.shaping import efficiency

from .cases import algorithm

PROBLEM = CountdownProblem((3, 7, 9), 13)
RIGHT, WRONG = (f"<think>{{}}</think><answer>{answer}</answer>" for answer in ("9-3+7", "9+3-7"))


def rollouts(texts, lengths, sizes, step: int = 0) -> Rollouts:
    """Groups of these sizes, of answers with these texts and numbers of tokens."""
    tokens = [np.full(1 + length, n) for n, length in enumerate(lengths)]
    return Rollouts([PROBLEM] * len(sizes), tokens, np.ones(len(texts), int), np.cumsum([0, *sizes]), [],
                    ["stop"] * len(texts), list(texts), 1.0, step)


# An all-right group, an all-wrong one and a mixed one, whose lengths and equations differ.
MIXED = rollouts([RIGHT.format("9-7=2"), RIGHT.format("9-7=3"), WRONG.format("9-7=2"), WRONG.format("9-7=3"),
                  RIGHT.format("9-7=2"), WRONG.format("9-7=3")], [10, 20, 10, 20, 10, 20], [2, 2, 2])


def graded(sampled=MIXED, **options):
    return Grader(algorithm(**options))(Countdown, sampled)


def advantages(rewards, baseline="group", scale="std") -> np.ndarray:
    """[N], of the first token of each answer."""
    credit = Credit(AdvantageConfig(baseline=baseline, scale=scale))
    return credit(rewards, MIXED).per_token[MIXED.response_offsets[:-1]]


# ---- efficiency ----

def test_efficiency_is_kimis_length_reward():
    lengths, right = np.array([10, 20, 30, 10, 20, 30, 7, 7, 9]), np.array([1, 1, 1, 0, 0, 0, 1, 0, 1])
    found = efficiency(lengths, right, np.array([0, 3, 6, 8, 9]))
    #                        right             wrong           one length, alone
    assert found.tolist() == [0.5, 0, -0.5] + [0, 0, -0.5] + [0, 0, 0]
    one = efficiency(np.array([10, 30, 20]), np.array([1, 0, 0]), np.array([0, 3]))
    assert one.tolist() == [0.5, -0.5, 0]


def test_each_part_is_kept_under_its_name_with_its_weight():
    found = graded(rewards=dict(efficiency_weight=0.5, coherence_weight=0.25))
    assert list(found.parts) == ["accuracy", "format", "coherence", "efficiency"]
    assert found.parts["efficiency"].tolist() == [0.5, -0.5, 0, -0.5, 0.5, -0.5]
    assert found.parts["coherence"].tolist() == [1, 0, 1, 0, 1, 0]
    assert {name: found.weights[name] for name in found.parts} == {
        "accuracy": 1.0, "format": 0.2, "efficiency": 0.5, "coherence": 0.25}
    assert found.total.tolist() == pytest.approx([1.7, 0.95, 0.45, -0.05, 1.7, -0.05])


def test_a_part_without_a_weight_is_not_graded():
    assert list(graded().parts) == ["accuracy", "format"]
    task = SimpleNamespace(grade=Countdown.grade, coherence=None)
    assert Grader(algorithm())(task, MIXED).accuracy.tolist() == [1, 1, 0, 0, 1, 0]


def test_a_tasks_own_coherence_must_be_a_number():
    task = SimpleNamespace(name="mine", grade=Countdown.grade, coherence=lambda problem, response: None)
    with pytest.raises(ValueError, match="the coherence of mine gave 'None', expected a finite number, for"):
        judge(task, [Sample(PROBLEM, "a")], RewardConfig(coherence_weight=0.1))


# ---- language ----

IN_CHINESE = Assistant.problem_from_text("3 7 9 → 13")
# Two right answers, and two wrong ones, each in the language of the question or the other.
SPOKEN = dataclasses.replace(
    rollouts([RIGHT.format("1-1=0 对"), RIGHT.format("1-1=0 ok"), WRONG.format("1-1=0 对"),
              WRONG.format("1-1=0 ok")], [10] * 4, [2, 2]), problems=[IN_CHINESE] * 2)


def spoken(**options):
    return Grader(algorithm(rewards=dict(language_weight=0.5), **options))(Assistant, SPOKEN)


def test_the_language_is_a_part_that_is_added_and_trained_on_in_groups_that_are_all_right():
    found = spoken()
    assert found.parts["language"].tolist() == [1, 0, 1, 0]
    assert found.total.tolist() == found.training.tolist() == pytest.approx([1.7, 1.2, 0.7, 0.2])
    assert not found.dead(SPOKEN).any()


def test_groups_equal_in_accuracy_are_dead_whatever_their_language_where_that_is_asked_for():
    found = spoken(dead_groups="accuracy")
    assert found.dead(SPOKEN).all()
    assert found.total.tolist() == pytest.approx([1.7, 1.2, 0.7, 0.2])  # what is logged is the same
    # A group of right and wrong answers counts whole.
    mixed = dataclasses.replace(SPOKEN, group_offsets=np.array([0, 4]), problems=[IN_CHINESE])
    grader = Grader(algorithm(rewards=dict(language_weight=0.5), dead_groups="accuracy"))
    live = grader(Assistant, mixed)
    assert live.training.tolist() == live.total.tolist()
    # And dynamic sampling replaces those groups then, and only then.
    for dead_groups, n_live in (("accuracy", 0), ("rules", 2), ("reward", 2)):
        grader = Grader(algorithm(dead_groups=dead_groups, rewards=dict(language_weight=0.5)))
        assert len(DynamicSampler(SimpleNamespace(), grader).live_groups(Assistant, SPOKEN)) == n_live


def test_a_language_is_refused_where_the_prompts_have_no_words():
    config = RewardConfig(language_weight=0.5)
    with pytest.raises(ValueError, match="--rewards.language-weight is 0.5, but the prompts of the task"):
        check_parts(Countdown(), config)
    for task in (Countdown(template="r1_zero"), Assistant()):
        check_parts(task, config)


# ---- dead groups ----

@pytest.mark.parametrize("part", ["efficiency_weight", "coherence_weight"])
def test_shaping_does_not_revive_dead_groups_unless_it_is_asked_for(part):
    found = graded(rewards={part: 0.5})
    assert found.dead(MIXED).tolist() == [True, True, False]
    for baseline, scale in (("group", "std"), ("group", "none"), ("leave_one_out", "none")):
        assert advantages(found, baseline, scale)[:4].tolist() == [0] * 4  # exactly
        assert advantages(found, baseline, scale)[4] > 0
    asked = graded(rewards={part: 0.5}, dead_groups="reward")
    assert asked.dead(MIXED).tolist() == [False, False, False]
    assert (advantages(asked)[[0, 2, 4]] > 0).all()
    assert (found.total == asked.total).all()  # what is logged is the same


def test_within_live_groups_shaping_counts_whole():
    found = graded(rewards=dict(efficiency_weight=0.5))
    assert found.training[4:].tolist() == found.total[4:].tolist() == pytest.approx([1.45, -0.05])
    assert found.training[:4].tolist() == pytest.approx([1.2, 1.2, 0.2, 0.2])


def test_the_penalty_for_long_answers_revives_a_group_as_before():
    found = graded(overlong_buffer=1.0, max_new_tokens=20)
    assert not found.dead(MIXED).any() and found.penalty.tolist() == [0.5, 1] * 3
    both = graded(overlong_buffer=1.0, max_new_tokens=20, rewards=dict(efficiency_weight=0.5))
    assert both.parts["efficiency"][:4].any()  # but efficiency does not come back with it
    assert not both.training_parts["efficiency"][:4].any()
    assert (both.training_parts["efficiency"][4:] == both.parts["efficiency"][4:]).all()


def test_dynamic_sampling_replaces_the_groups_that_the_setting_calls_dead():
    for dead_groups, live in (("rules", [2]), ("reward", [0, 1, 2])):
        grader = Grader(algorithm(dead_groups=dead_groups, rewards=dict(efficiency_weight=0.5)))
        sampler = DynamicSampler(SimpleNamespace(), grader)
        assert sampler.live_groups(Countdown, MIXED).tolist() == live


# ---- the control ----

@pytest.mark.parametrize("control", CONTROLS)
def test_the_control_changes_what_is_trained_on_and_not_what_is_logged(control):
    options = dict(rewards=dict(efficiency_weight=0.5, coherence_weight=0.25))
    real, found = graded(**options), graded(**options, control=control)
    assert (found.total == real.total).all() and found.parts.keys() == real.parts.keys()
    many = [graded(dataclasses.replace(MIXED, weights_version=step), control=control) for step in range(40)]
    assert any((each.training != real.training).any() for each in many)


def test_the_shuffle_keeps_dead_groups_dead():
    for step in range(20):
        sampled = dataclasses.replace(MIXED, weights_version=step)
        found = graded(sampled, control="permute", rewards=dict(efficiency_weight=0.5))
        assert found.dead(MIXED).tolist() == [True, True, False]
        assert sorted(found.training[4:]) == pytest.approx([-0.05, 1.45])


def test_random_rewards_are_fair_and_know_nothing_of_the_answers():
    texts = [RIGHT.format("")] * 2000 + [WRONG.format("")] * 2000
    sampled = rollouts(texts, [5] * 4000, [16] * 250)
    found = graded(sampled, control="random")
    assert set(found.training) == {0.0, 1.0} and list(found.training_parts) == ["random"]
    right, wrong = found.training[:2000].mean(), found.training[2000:].mean()
    assert abs(right - 0.5) < 0.05 and abs(wrong - 0.5) < 0.05
    assert graded(sampled, control="random").training.tolist() == found.training.tolist()
    assert graded(sampled, control="random", seed=1).training.tolist() != found.training.tolist()
    later = dataclasses.replace(sampled, weights_version=1)
    assert graded(later, control="random").training.tolist() != found.training.tolist()


def test_a_group_has_the_same_random_rewards_wherever_it_stands():
    """Dynamic sampling looks at a round of groups first, and trains on those that it kept."""
    kept = dataclasses.replace(MIXED, problems=[PROBLEM], sequences=MIXED.sequences[4:],
                               prompt_lengths=np.ones(2, int), group_offsets=np.array([0, 2]),
                               finish_reasons=["stop"] * 2, texts=MIXED.texts[4:])
    for step in range(10):
        whole, part = (random_rewards({}, dataclasses.replace(each, weights_version=step), 3)["random"]
                       for each in (MIXED, kept))
        assert whole[4:].tolist() == part.tolist()


# ---- what is refused ----

@pytest.mark.parametrize("options, fragment", [
    (dict(control="shuffle"), "--control is 'shuffle', expected none or permute or random"),
    (dict(control=True), "--control is True, expected none"),
    (dict(dead_groups="all"), "--dead-groups is 'all', expected rules or reward"),
])
def test_an_unknown_word_is_refused(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        algorithm(**options)


@pytest.mark.parametrize("options", [
    dict(accuracy_weight=0, format_weight=0, efficiency_weight=1), dict(efficiency_weight=-1),
    dict(coherence_weight=float("nan")), dict(plugin_weight=float("inf")),
    dict(accuracy_weight=0, format_weight=0)])
def test_weights_that_leave_nothing_to_judge_are_refused(options):
    with pytest.raises(ValueError, match="expected numbers of 0 or more, and one above 0 for accuracy"):
        RewardConfig(**options)


def test_coherence_is_refused_for_a_task_without_equations():
    config = RewardConfig(coherence_weight=0.5)
    check_parts(Countdown, config)
    with pytest.raises(ValueError, match="coherence does not apply to the task gsm8k, which does not check"):
        check_parts(SimpleNamespace(name="gsm8k"), config)
    check_parts(SimpleNamespace(name="gsm8k"), RewardConfig())


# ---- a reward model ----

def score(sampled, samples):
    """What a reward model would give: 10 for the first answer of all, 11 for the second, ..."""
    return 10.0 + np.asarray(samples)


def modelled(task=Countdown, step=0, **rewards):
    config = algorithm(steps=10, rewards=dict(model="somewhere", model_weight=0.5) | rewards)
    return Grader(config, score)(task, dataclasses.replace(MIXED, weights_version=step))


def test_a_reward_models_score_is_a_part_beside_accuracy_and_format():
    found = modelled()
    assert found.parts["model"].tolist() == [10, 11, 12, 13, 14, 15]
    assert found.parts["accuracy"].tolist() == [1, 1, 0, 0, 1, 0]
    assert found.training.tolist() == found.total.tolist()
    assert found.total == pytest.approx(found.accuracy + 0.2 * found.format + 0.5 * found.parts["model"])


def test_where_a_task_leaves_a_problem_to_the_reward_model_accuracy_does_not_count():
    """The second group alone: the others have no score, and it has no accuracy."""
    sampled = dataclasses.replace(MIXED, problems=["rules", "model", "rules"])
    task = SimpleNamespace(grade=lambda problem, text: Countdown.grade(PROBLEM, RIGHT.format("")),
                           judged_by_model=lambda problem: problem == "model")
    grader = Grader(algorithm(rewards=dict(model="somewhere", format_weight=0.0)), score)
    found = grader(task, sampled)
    assert found.accuracy.tolist() == [1] * 6 and found.parts["model"].tolist() == [0, 0, 12, 13, 0, 0]
    assert found.training.tolist() == found.total.tolist() == [1, 1, 12, 13, 1, 1]


def test_a_group_that_a_reward_model_judges_is_not_dead_for_want_of_right_answers():
    sampled = dataclasses.replace(MIXED, problems=["rules", "model", "rules"])
    task = SimpleNamespace(grade=lambda problem, text: Countdown.grade(PROBLEM, RIGHT.format("")),
                           judged_by_model=lambda problem: problem == "model")
    grader = Grader(algorithm(rewards=dict(model="somewhere"), dead_groups="accuracy"), score)
    assert grader(task, sampled).dead(sampled).tolist() == [True, False, True]


def test_a_reward_model_comes_in_with_the_step_that_begins_its_share():
    for share, first in ((0.0, 0), (0.75, 8), (0.7, 7), (0.05, 1)):
        has = ["model" in modelled(step=step, model_from=share).parts for step in range(10)]
        assert has == [step >= first for step in range(10)]
