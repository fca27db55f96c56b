"""r1zero card: it writes the card beside the run, and shows what it cost."""
import pytest

from r1zero.train.cli.main import main
from r1zero.train.report.card import card_of

from ..cost_cases import make_recipe


def test_the_card_is_written_into_the_folder_and_the_cost_is_shown(tmp_path, capfd):
    recipe = make_recipe(tmp_path / "recipe")
    assert main(["card", "--run", str(recipe), "--price", "2.5"]) == 0
    assert (recipe / "model_card.md").read_text() == card_of(recipe, 2.5)
    shown = capfd.readouterr().out
    assert shown.splitlines()[0].split()[-1] == "cost" and str(recipe / "model_card.md") in shown
    # It is replaced, and is no part of what the next one tells.
    assert main(["card", "--run", str(recipe)]) == 0
    assert (recipe / "model_card.md").read_text() == card_of(recipe)


@pytest.mark.parametrize("words, why", [
    (["--run", "nowhere"], "nowhere holds no run"),
    (["--price", "-1"], "--price is -1.0, expected a number of 0 or more"),
    (["--price", "nan"], "--price is nan, expected a finite number"),
])
def test_bad_flags_are_one_line_and_write_nothing(words, why, tmp_path, capfd):
    recipe = make_recipe(tmp_path / "recipe")
    given = {"--run": str(recipe)} | dict([words])
    assert main(["card", *(word for pair in given.items() for word in pair)]) == 2
    error = capfd.readouterr().err.strip()
    assert why in error and "\n" not in error
    assert not (recipe / "model_card.md").exists()
