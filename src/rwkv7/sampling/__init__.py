"""Choosing the next token from logits: greedy, or drawn at random and repeatable.

`Sampler` holds one text's settings and what they need to know of its past; `sample_batch` serves
many texts at once. Both know token ids alone.
"""

from .batch import probabilities, sample_batch
from .sampler import ORDERS, Sampler

__all__ = ["ORDERS", "Sampler", "probabilities", "sample_batch"]
