"""Gradient work: a backbone by masked language modelling, modular prompts by multi-task pre-training."""

from mp2.training.config import PretrainConfig
from mp2.training.mlm import MlmConfig
from mp2.training.mlm_trainer import train_mlm
from mp2.training.outputs import PretrainResult
from mp2.training.pretrain import Pretrainer
from mp2.training.pretrain_run import PretrainInputs, asked_run, pretrain, pretrain_command, score_table
from mp2.training.prompted import PromptedEncoder, span_loss
from mp2.training.ranks import is_main

__all__ = [
    "MlmConfig",
    "PretrainConfig",
    "PretrainInputs",
    "PretrainResult",
    "Pretrainer",
    "PromptedEncoder",
    "asked_run",
    "is_main",
    "pretrain",
    "pretrain_command",
    "score_table",
    "span_loss",
    "train_mlm",
]
