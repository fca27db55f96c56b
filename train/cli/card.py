"""Write a model card into the folder of a run or of a recipe.

    r1zero card --run runs/rl
    r1zero card --run runs/r1 --price 2.5

The card, model_card.md, says how the model was made, what was measured, what it cost by stage, and
what is not known (report/card.py). `r1zero export` writes a card beside exported weights.
"""

from dataclasses import dataclass
from pathlib import Path

from ...eval.console import show
from ...model.files import atomic_write_text
from ..cost import cost_of
from ..report.card import card_of

CARD = "model_card.md"


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Write a model card: how a model was made, what was measured, and what it cost."""

    run: str
    """Folder of the run, or of a recipe with several."""
    price: float = 0.0
    """Price of the machine per hour, for the cost."""


def write_card(config: CardConfig) -> Path:
    """Write the card, and show the cost; returns its path.

    Raises ValueError for a folder without a run and for a price below 0, and OSError if the card
    cannot be written.
    """
    text = card_of(config.run, config.price)
    path = Path(config.run) / CARD
    atomic_write_text(path, text)
    show(f"{cost_of(config.run, config.price).table()}\n\n{path}")
    return path
