"""Gradient work: a backbone by masked language modelling, modular prompts by multi-task pre-training."""

from __future__ import annotations

from typing import Any

from mp2.lazy import lazily

_MODULES = {
    "MlmConfig": "config",
    "PretrainConfig": "config",
    "PretrainInputs": "pretrain_run",
    "PretrainResult": "outputs",
    "Pretrainer": "pretrainer",
    "PromptedEncoder": "prompted",
    "TuneConfig": "config",
    "asked_run": "pretrain_run",
    "is_main": "ranks",
    "pretrain": "pretrain_run",
    "pretrain_command": "pretrain_run",
    "score_table": "pretrain_run",
    "span_loss": "prompted",
    "train_mlm": "mlm_trainer",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MODULES, name)
