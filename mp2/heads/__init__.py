"""What turns hidden states into losses and answers."""

from mp2.heads.head import Head, States
from mp2.heads.mlm import LabelWordHead
from mp2.heads.ridge import FittedRidge, RidgeHead, RidgePart, RidgeSettings
from mp2.heads.span import SpanHead, span_scores

__all__ = [
    "FittedRidge",
    "Head",
    "LabelWordHead",
    "RidgeHead",
    "RidgePart",
    "RidgeSettings",
    "SpanHead",
    "States",
    "span_scores",
]
