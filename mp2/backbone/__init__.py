"""The frozen encoder, layer by layer, and the checkpoints it can be loaded from."""

from mp2.backbone.config import BackboneConfig
from mp2.backbone.device import resolve_device
from mp2.backbone.encoder import Encoder, Layer, Prefix, add_to_rows
from mp2.backbone.load import (
    Backbone,
    freeze,
    load_backbone,
    random_backbone,
    save_backbone,
    weights_sha256,
)
from mp2.backbone.mlm_head import MlmHead
from mp2.backbone.tokenizer import Pieces, Tokenizer

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Encoder",
    "Layer",
    "MlmHead",
    "Pieces",
    "Prefix",
    "Tokenizer",
    "add_to_rows",
    "freeze",
    "load_backbone",
    "random_backbone",
    "resolve_device",
    "save_backbone",
    "weights_sha256",
]
