"""What turns hidden states into losses and answers."""

from mp2.heads.head import Head, States
from mp2.heads.span import SpanHead, span_scores

__all__ = ["Head", "SpanHead", "States", "span_scores"]
