"""Open models from a Hugging Face folder compute what transformers computes; and what an error would do."""
import pytest

from r1zero.model.engine.pages import Pages
from r1zero.model.engine.slots import Slots

from .huggingface_cases import (
    ALL_ERRORS,
    CHANGES,
    REFUSALS,
    TOLERANCE,
    changed,
    each_family,
    edit_config,
    error_of,
    error_of_cache,
    gradients,
    read,
    saved,
    wrong,
)


@each_family
def test_packed_sequences_have_the_logits_of_transformers(name):
    assert error_of(read(saved(name)), name) < TOLERANCE


@each_family
@pytest.mark.parametrize("kind", [Pages, Slots])
def test_the_cache_has_them_token_by_token(name, kind):
    model = read(saved(name))
    if kind is Slots and not Slots.serves(model):
        pytest.skip("the compiled loops do not serve this family")
    assert error_of_cache(kind, model, name) < TOLERANCE


@each_family
def test_gradients_are_those_of_transformers(name):
    theirs, ours = gradients(name)
    assert theirs.keys() == ours.keys()
    for key, gradient in theirs.items():
        assert (ours[key] - gradient).abs().max() < 1e-3 * gradient.abs().max(), key


@pytest.mark.parametrize("name, error", ALL_ERRORS)
def test_every_classic_error_moves_the_logits(name, error):
    assert error_of(wrong(name, error), name) > 100 * TOLERANCE


@pytest.mark.parametrize("name, key, value", CHANGES)
def test_every_key_of_the_config_moves_the_logits(name, key, value, tmp_path):
    assert error_of(read(changed(name, key, value, tmp_path)), name) > 100 * TOLERANCE


def test_without_layer_types_other_keys_say_which_layers_have_the_window(tmp_path):
    for name, key, right, wrongs in (("qwen2", "max_window_layers", 1, (0, 2, 3)),
                                     ("smollm3", "no_rope_layers", [1, 0, 1, 0], ([1, 1, 1, 0],))):
        folder = changed(name, "layer_types", "absent", tmp_path / name)
        assert error_of(read(edit_config(folder, **{key: right})), name) < TOLERANCE
        for value in wrongs:
            assert error_of(read(edit_config(folder, **{key: value})), name) > 100 * TOLERANCE, (name, value)


@pytest.mark.parametrize("name, key, value, why", REFUSALS)
def test_a_config_that_does_not_fit_is_refused_in_one_line(name, key, value, why, tmp_path):
    with pytest.raises(ValueError, match=rf"\A(?=.*{why})[^\n]+\Z"):
        read(changed(name, key, value, tmp_path))
