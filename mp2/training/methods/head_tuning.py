"""A random span head tuned on the few-shot examples over the frozen backbone, without any prompt.

Not in the paper: the head that a search from scratch has where nothing was pre-trained (``mp2 scratch
--head``), so that BBT and BBTv2 with a span head can be told apart from what MP2's head knows.
"""

from __future__ import annotations

from mp2.training.methods.method import Method, no_rows

METHOD = Method(name="head-tuning", kind="shallow", rows=no_rows, rates=(1e-3, 1e-2), epochs=1000)
