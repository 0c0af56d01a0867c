"""Model tuning: all weights of the backbone and a new span head (Devlin et al. 2019, BERT, section 4).

Rates from 5e-6 to 5e-5, of which dev chooses; AdamW with a decay of 0.01 of the matrices, and gradients
clipped at norm 1, as usual for BERT. The MP2 paper says neither rates nor epochs; 200 epochs a rate are ours,
and dev chooses among them too. No dropout: this encoder has none.
"""

from __future__ import annotations

from mp2.training.methods.method import Method, no_rows

METHOD = Method(
    name="model-tuning",
    kind="shallow",
    rows=no_rows,
    rates=(5e-6, 1e-5, 2e-5, 5e-5),
    epochs=200,
    trains_backbone=True,
    weight_decay=0.01,
    clip=1.0,
)
