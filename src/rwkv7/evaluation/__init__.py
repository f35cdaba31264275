"""How probable a model finds texts and continuations, and tests of it that stand in files."""

from .scores import LOGITS_AT_ONCE, Score, carried_bits, score, scores_as_they_come, summed_bits
from .tasks import evaluate_file

__all__ = [
    "LOGITS_AT_ONCE",
    "Score",
    "carried_bits",
    "evaluate_file",
    "score",
    "scores_as_they_come",
    "summed_bits",
]
