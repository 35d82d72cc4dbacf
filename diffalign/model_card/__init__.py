"""Model cards: what a result is, what it gained and cost, what it was made from, and how diffusers loads it."""

from diffalign.model_card.card import CARD, PICTURE, write_card
from diffalign.model_card.result import Result, find_result

__all__ = ["CARD", "PICTURE", "Result", "find_result", "write_card"]
