"""Gradient work: a backbone by masked language modelling, modular prompts by multi-task pre-training."""

from mp2.training.mlm import MlmConfig, train_mlm
from mp2.training.pretrain import (
    PretrainConfig,
    Pretrainer,
    PretrainResult,
    pretrain,
    pretrain_command,
    score_table,
    span_loss,
)

__all__ = [
    "MlmConfig",
    "PretrainConfig",
    "PretrainResult",
    "Pretrainer",
    "pretrain",
    "pretrain_command",
    "score_table",
    "span_loss",
    "train_mlm",
]
