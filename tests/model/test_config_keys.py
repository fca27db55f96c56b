"""The keys of a config.json: one error for all that is wrong, and none of them is Python's."""
import pytest

from r1zero.model.config_json import config_of
from r1zero.model.config_keys import KINDS, NULL_IS_NONE, SIZES, Complaints, Unusable, keys_of

GOOD = dict(model_type="llama", vocab_size=64, hidden_size=128, num_hidden_layers=5, num_attention_heads=32,
            intermediate_size=48)


def complaint(**changes) -> str:
    with pytest.raises(ValueError) as caught:
        config_of(GOOD | changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_error_names_all_that_is_wrong():
    said = complaint(hidden_act="gelu", tie_word_embeddings="no",
                     rope_scaling={"type": "longrope", "factor": 2},
                     head_dim=15, num_key_value_heads=5, architectures="LlamaForCausalLM",
                     vocab_size=None, sliding_window=8, rms_norm_eps=True, intermediate_size=0)
    for what in ("has hidden_act 'gelu'", "has rope_type 'longrope'",
                 "tie_word_embeddings 'no'; expected true or false",
                 "head_dim 15, which is odd", "num_attention_heads 32, no multiple of num_key_value_heads 5",
                 "architectures 'LlamaForCausalLM'", "lacks vocab_size", "has a sliding window",
                 "rms_norm_eps True; expected a number above 0", "intermediate_size 0; expected"):
        assert said.count(what) == 1, what


def test_what_follows_from_a_wrong_key_is_no_second_complaint():
    said = complaint(hidden_size="128", num_attention_heads=None)
    assert said == ("lacks num_attention_heads; take the whole config.json of the model; it also has "
                    "hidden_size '128'; expected a whole number above 0 and below 2^31")


@pytest.mark.parametrize("key", KINDS)
def test_a_value_of_another_type_is_refused_for_every_key(key):
    is_switch = KINDS[key].expected == "true or false"
    for value in ("7", [[]], -1, float("nan"), float("inf"), 10**400, 1 if is_switch else True):
        assert f"has {key} {value!r}; expected {KINDS[key].expected}" in complaint(**{key: value})


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10**9), ("vocab_size", 10**18),
                                        ("no_rope_layer_interval", 0), ("no_rope_layers", [2] * 5),
                                        ("layer_types", [["full_attention"]] * 5)])
def test_a_number_that_would_take_all_memory_or_divide_by_nothing_is_refused(key, value):
    for family in ("llama", "smollm3"):
        assert f"has {key}" in complaint(model_type=family, **{key: value})


def test_a_null_is_an_absent_key_except_where_it_means_none():
    defaults = {"a": 1, **dict.fromkeys(NULL_IS_NONE, 5)}
    keys = keys_of(dict.fromkeys([*SIZES, "a", *NULL_IS_NONE]), defaults, Complaints())
    assert keys == {"a": 1, **dict.fromkeys(NULL_IS_NONE)}
    with pytest.raises(Unusable):
        keys["hidden_size"]
