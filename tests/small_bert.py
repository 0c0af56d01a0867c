"""A small BERT with random weights, as transformers saves it, over the embedded backbone's vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from mp2.backbone.load import EMBEDDED

VOCABULARY = EMBEDDED["mini"] / "vocab.txt"


def save_bert(folder: Path, kind: type[BertModel] | type[BertForMaskedLM]) -> Path:
    """Write one of 3 layers of 32 to ``folder``, which is returned."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY.read_text("utf-8").splitlines()),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=96,
    )
    kind(config).save_pretrained(folder)
    (folder / "vocab.txt").write_bytes(VOCABULARY.read_bytes())
    return folder
